"""An agent that dies, or leaves, and the one that comes after it: the flows go on, and every end is told."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.agents import AgentProcess
from tests.faultserver import fault_server_thread
from tests.invariants import check_agent, executions
from tests.servers import Api, PrefectServer
from tests.waiting import lines, wait_until

StartAgent = Callable[..., AgentProcess]


class Scene:
    """One run whose body has begun, and its agent."""

    def __init__(self, api: Api, start: StartAgent, tmp_path: Path) -> None:
        self.api = api
        self._start = start
        self.trace = tmp_path / "trace"
        self.hooks = tmp_path / "hooks"
        self.pool = api.create_pool()

    def open(self, flow: str, parameters: dict[str, Any] | None = None, **sections: Any) -> None:
        wanted = {"trace": str(self.trace), **(parameters or {})}
        self.run = self.api.create_run(self.api.create_deployment(flow, pool=self.pool), wanted)
        self.agent = self._start(self.api.server, [{"pool": self.pool}], **sections)
        wait_until(lambda: lines(self.trace), 60, "the flow has begun", more=self.agent.log)
        self.pid = int(lines(self.trace)[0].split()[1])

    def other_agent(self, **sections: Any) -> AgentProcess:
        return self._start(self.api.server, [{"pool": self.pool}], **sections)

    def end(self, state: str, *, name: str | None = None, executed: int = 1) -> dict[str, Any]:
        """The run ends so, was executed that often, and nothing of it is left."""
        run = self.api.wait_for_state(self.run, state)
        if name is not None:
            wait_until(lambda: self.api.read_run(self.run)["state_name"] == name, 20, f"it is {name}")
        wait_until(lambda: not self.agent.run_processes(), 15, "no process is left", more=self.agent.log)
        assert executions(self.trace) == {self.run: executed}
        return dict(self.api.read_run(self.run) if name is not None else run)


@pytest.fixture
def scene(api: Api, agent_process: StartAgent, tmp_path: Path) -> Scene:
    return Scene(api, agent_process, tmp_path)


@pytest.fixture
def scene_3(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent, tmp_path: Path
) -> Scene:
    """For what is the same with every engine and server."""
    return Scene(api_of(server_3), agent_process, tmp_path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_flow_outlives_its_agent_and_the_next_one_sees_it_end(scene_3: Scene) -> None:
    scene_3.open("sleeper", {"seconds": 6})
    scene_3.agent.kill()
    assert alive(scene_3.pid)
    scene_3.agent.start()
    scene_3.agent.wait_for_log(f"still running as process {scene_3.pid}")
    scene_3.end("COMPLETED")
    scene_3.agent.wait_for_log(f"process {scene_3.pid} ended unseen")
    check_agent(scene_3.agent)
    assert scene_3.agent.stop() == 0


@pytest.mark.parametrize("flow", ["sleeper", "deaf"])
def test_a_run_that_was_adopted_can_be_cancelled(scene: Scene, flow: str) -> None:
    scene.open(flow, flows={"grace_seconds": 2})
    scene.agent.kill()
    scene.api.cancel(scene.run)  # while nobody looks
    scene.agent.start()
    scene.end("CANCELLED", name="Cancelled")
    check_agent(scene.agent)


def test_hooks_of_an_adopted_run_run_once(scene: Scene) -> None:
    scene.open("hooked_sleeper", {"hooks": str(scene.hooks)})
    scene.agent.kill()
    scene.agent.start()
    scene.agent.wait_for_log("still running as process")
    scene.api.cancel(scene.run)
    scene.end("CANCELLED", name="Cancelled")
    assert scene.agent.stop() == 0
    assert lines(scene.hooks) == [f"cancellation {scene.run} Cancelling"]


def test_a_run_that_crashed_while_nobody_looked_is_reported_with_what_is_known(scene: Scene) -> None:
    scene.open("hooked_sleeper", {"hooks": str(scene.hooks)})
    scene.agent.kill()
    os.kill(scene.pid, signal.SIGKILL)
    wait_until(lambda: not scene.agent.run_processes(), 15, "the flow is gone")
    scene.agent.start()
    ended = scene.end("CRASHED")
    assert "ended unseen while flow-agent was not running" in ended["state"]["message"]
    assert scene.agent.stop() == 0
    assert lines(scene.hooks) == [f"crashed {scene.run} Crashed"]
    assert sum("ended unseen" in line for line in scene.api.logs(scene.run)) == 1


def test_the_time_limit_of_a_run_goes_on_across_agents(scene_3: Scene) -> None:
    limit = 25  # enough for an engine to begin on a busy machine
    scene_3.open("sleeper", flows={"timeout_seconds": limit})
    scene_3.agent.kill()
    started = psutil.Process(scene_3.pid).create_time()
    wait_until(lambda: time.time() - started > limit, limit + 5, "its time is over")
    began = time.monotonic()
    scene_3.agent.start()
    ended = scene_3.end("CANCELLED", name="Cancelled")
    assert "ran longer than timeout_seconds = 25" in ended["state"]["message"]
    assert time.monotonic() - began < limit  # one limit, not two


def test_an_agent_told_to_keep_its_runs_leaves_at_once_and_the_next_goes_on(scene_3: Scene) -> None:
    scene_3.open("sleeper", {"seconds": 8}, stop={"on_stop": "keep"})
    assert scene_3.agent.stop() == 0
    assert "leaving 1 live run(s) to the next flow-agent" in scene_3.agent.log()
    assert alive(scene_3.pid)
    scene_3.agent.start()
    scene_3.end("COMPLETED")
    assert scene_3.agent.stop() == 0


def test_an_agent_told_to_reschedule_hands_its_runs_to_another(scene: Scene) -> None:
    scene.open("sleeper", {"seconds": 3600}, stop={"on_stop": "reschedule"})
    assert scene.agent.stop() == 0
    assert scene.api.read_run(scene.run)["state_name"] == "AwaitingRetry", scene.api.story(scene.run)
    assert scene.api.read_run(scene.run)["infrastructure_pid"] is None
    assert not scene.agent.run_processes()
    assert "CRASHED" not in [kind for kind, _ in scene.api.states(scene.run)] or scene.api.server.major < 3
    other = scene.other_agent(agent={"name": "the-other"})
    wait_until(lambda: len(lines(scene.trace)) == 2, 60, "the other agent runs it", more=other.log)
    assert other.stop(signal.SIGQUIT) == 0


def test_a_drain_that_takes_too_long_does_what_comes_then(scene_3: Scene) -> None:
    scene_3.open("sleeper", stop={"drain_timeout_seconds": 1, "then": "cancel"})
    assert scene_3.agent.stop() == 0
    assert "the drain took longer than 1 s" in scene_3.agent.log()
    scene_3.end("CANCELLED", name="Cancelled")


def test_a_crash_is_retried_as_often_as_wished_and_then_told(scene: Scene) -> None:
    scene.open("kill_self", flows={"crash_retries": 1})
    ended = scene.end("CRASHED", executed=2)
    assert "SIGKILL" in ended["state"]["message"]
    assert [name for _, name in scene.api.states(scene.run)].count("AwaitingRetry") == 1
    assert scene.agent.stop() == 0


def test_a_report_outlives_the_outage_and_the_agent_that_owed_it(
    scene_3: Scene, server_3: PrefectServer, agent_process: StartAgent
) -> None:
    with fault_server_thread(server_3.url) as way:
        scene_3.open(
            "sleeper", api={"url": way.url}, flows={"env": {"PREFECT_API_URL": server_3.url}, "crash_retries": 0}
        )
        way.go_down()
        os.kill(scene_3.pid, signal.SIGKILL)
        scene_3.agent.wait_for_log("ended by SIGKILL")
        assert scene_3.agent.stop() == 0  # it does not wait for ever for a server that is away
        assert "leaving 1 run(s) to the next flow-agent" in scene_3.agent.log()
        assert scene_3.api.state(scene_3.run) == "RUNNING"
        way.come_up()
        scene_3.agent.start()
        ended = scene_3.end("CRASHED")
        assert "SIGKILL" in ended["state"]["message"]  # which only the first agent could know
        assert scene_3.agent.stop() == 0
        assert sum("SIGKILL" in line for line in scene_3.api.logs(scene_3.run)) == 1


def test_a_lost_journal_is_set_aside_and_live_runs_are_found_by_their_mark(scene: Scene) -> None:
    scene.open("sleeper", {"seconds": 600})
    scene.agent.kill()
    journal = scene.agent.state_dir / "journal.sqlite3"
    for part in scene.agent.state_dir.glob("journal.sqlite3-*"):
        part.unlink()
    journal.write_bytes(b"this was a journal once" * 1000)
    scene.agent.start()
    scene.agent.wait_for_log(f"running as process {scene.pid}")
    assert list(scene.agent.state_dir.glob("journal.sqlite3.corrupt-*"))
    scene.api.cancel(scene.run)
    scene.end("CANCELLED", name="Cancelled")
    check_agent(scene.agent)


def test_a_run_of_another_boot_is_reported_as_lost_with_the_machine(scene_3: Scene) -> None:
    scene_3.open("sleeper")
    scene_3.agent.kill()
    scene_3.agent.kill_runs()
    with sqlite3.connect(scene_3.agent.state_dir / "journal.sqlite3") as journal:
        [(record,)] = journal.execute("SELECT record FROM records").fetchall()
        other = record.replace(json.loads(record)["boot_id"], "another-boot")
        journal.execute("UPDATE records SET record = ?, crc = ?", (other, zlib.crc32(other.encode())))
    scene_3.agent.start()
    ended = scene_3.end("CRASHED")
    assert "ended when the machine went down" in ended["state"]["message"]
    check_agent(scene_3.agent)


def test_a_run_that_others_have_claimed_since_is_left_to_them(scene_3: Scene) -> None:
    scene_3.open("sleeper")
    scene_3.agent.kill()
    scene_3.agent.kill_runs()
    for state in ("SCHEDULED", "PENDING", "RUNNING"):  # somebody has put it back, and another agent runs it
        scene_3.api.set_state(scene_3.run, state, force=True)
    scene_3.agent.start()
    scene_3.agent.wait_for_log("somebody else has claimed it since")
    assert scene_3.agent.stop() == 0
    assert scene_3.api.state(scene_3.run) == "RUNNING"


def test_output_is_shown_once_across_agents(scene_3: Scene) -> None:
    scene_3.open("talker", {"seconds": 9}, output={"show": True}, stop={"on_stop": "keep"})
    wait_until(lambda: "word 2" in scene_3.agent.log(), 30, "it is heard", more=scene_3.agent.log)
    assert scene_3.agent.stop() == 0
    heard = _words(scene_3.agent)
    scene_3.agent.start()
    wait_until(lambda: len(_words(scene_3.agent)) > len(heard), 30, "the next one goes on", more=scene_3.agent.log)
    assert len(set(_words(scene_3.agent))) == len(_words(scene_3.agent))
    scene_3.agent.kill()
    before = _words(scene_3.agent)
    scene_3.agent.start()
    scene_3.end("COMPLETED")
    assert scene_3.agent.stop() == 0
    heard = _words(scene_3.agent)
    again = [word for word in heard[len(before) :] if word in before]
    assert again == before[len(before) - len(again) :]  # at most what was said last before a kill -9 is said again
    assert sorted(set(heard)) == list(range(len(set(heard))))  # and nothing is left out


def _words(agent: AgentProcess) -> list[int]:
    return [int(line.rpartition("word ")[2]) for line in agent.log().splitlines() if "): word " in line]
