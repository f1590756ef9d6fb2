"""What a machine does to an agent and its runs: it goes down, restarts the service, kills, and lets its disks fill up."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from supervisor.failpoints import VARIABLE
from supervisor.process.cgroup import RunGroup
from tests.agents import AgentProcess, config_for
from tests.groups import group_of_our_own
from tests.invariants import check_agent, executions
from tests.killchecks import check_history, check_processes
from tests.killsuite import ENGINE
from tests.servers import Api, PrefectServer
from tests.test_logs_disk import fill
from tests.test_systemd_manager import BY_SYSTEMD, REBOOT, fake, says
from tests.waiting import lines, wait_until

ApiOf = Callable[[PrefectServer], Api]

# Before the engine: where the process was born, and a daemon that nothing but its control group tells to be the run's.
BIRTH = """\
#!/bin/sh
if [ "$1" = -m ]; then
  while read -r line; do echo "$line"; done </proc/self/cgroup >{born}
  {python} -S -c '{daemon}' {stray}
fi
exec {engine} "$@"
"""
DAEMON = """
import os, resource, sys
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
resource.setrlimit(10, (resource.getrlimit(10)[1],) * 2)
stray = "import os, sys, time; open(sys.argv[1], chr(119)).write(str(os.getpid())); time.sleep(600)"
os.execve(sys.executable, [sys.executable, "-S", "-c", stray, sys.argv[1]], {})
"""

# Ends by itself only if it can print more than any disk here holds.
BURSTS = """
import time
from pathlib import Path
from prefect import flow

@flow
def bursts(trace: str):
    for number in range(6):
        Path(trace).open("a").write(f"burst {number}\\n")
        while not Path(f"{trace}.{number}").exists():
            time.sleep(0.01)
        for _ in range(400):
            print("x" * 1000)
        print(f"end of burst {number}", flush=True)
"""


class Scene:
    """A server with one pool, and an agent for it. Owns the agent and the files to which the flows write."""

    def __init__(self, server: PrefectServer, api: Api, folder: Path) -> None:
        self.server, self.api, self.folder = server, api, folder
        self.trace, self.hooks, self.go = folder / "trace", folder / "hooks", folder / "go"
        self.pool = api.create_pool()
        self.agent: AgentProcess
        self._scripted = ""

    def engine(self) -> Path:
        """The scripted one, playing a Python with the server's Prefect."""
        python = self.folder / f"python-{self.server.version}"
        python.write_text(f"#!{sys.executable} -IS\n{ENGINE.read_text()}")
        python.chmod(0o755)
        return python

    def start(self, *, behind: Sequence[str] = (), env: Mapping[str, str] | None = None, **sections: Any) -> None:
        """Starts the agent. The engine is the scripted one unless `flows` names another Python."""
        flows = {"python": self.engine(), **sections.pop("flows", {})}
        poll = {"interval_seconds": 0.2, "cancel_interval_seconds": 0.2, "jitter": 0}
        config = config_for(self.server, [{"pool": self.pool}], poll=poll, flows=flows, **sections)
        self.agent = AgentProcess(config, env=env, behind=behind)
        self.agent.start()

    def create_run(self, outcome: str = "completes", *, held: bool = False) -> str:
        """A due run for the scripted engine. `held`: its body does not end before `let_go`."""
        self._scripted = self._scripted or self.api.create_deployment("scripted", pool=self.pool)
        wanted = {"outcome": outcome, "trace": str(self.trace), "hooks": str(self.hooks)}
        return self.api.create_run(self._scripted, wanted | ({"go": str(self.go)} if held else {}))

    def let_go(self) -> None:
        self.go.touch()

    def wait_begun(self, run_id: str, times: int = 1) -> int:
        """Until its body has begun that often; returns the latest pid."""
        wait_until(lambda: executions(self.trace)[run_id] == times, 60, "the body has begun", more=self.agent.log)
        return [int(line.split()[1]) for line in lines(self.trace) if line.startswith(run_id)][-1]

    def wait_status(self, text: str, since: int = 0) -> None:
        """Until the manager has been told that, after so many other status lines."""
        wait_until(
            lambda: any(text in line for line in self.agent.notify.lines("STATUS")[since:]),
            30,
            f"the status says {text!r}",
            more=lambda: "\n".join(self.agent.notify.lines("STATUS")),
        )

    def check(self, run_id: str, end: str) -> None:
        """The run ended so and in no other way, was executed once, and leaves no process."""
        assert not [*check_history(self.api.states(run_id), end)], self.api.story(run_id)
        assert executions(self.trace)[run_id] == 1
        # What the engine has left behind is ended after the engine, so a little after its state.
        wait_until(lambda: not [*check_processes(run_id)], 15, "no process is left", more=self.agent.log)


@pytest.fixture
def scene_of(api_of: ApiOf, tmp_path: Path) -> Iterator[Callable[[PrefectServer], Scene]]:
    made: list[Scene] = []

    def make(server: PrefectServer) -> Scene:
        made.append(Scene(server, api_of(server), tmp_path))
        return made[-1]

    yield make
    for scene in made:
        if hasattr(scene, "agent"):
            scene.agent.close()


@pytest.fixture
def scene(scene_of: Callable[[PrefectServer], Scene], server_3: PrefectServer) -> Scene:
    """With a server and engines of 3.8."""
    return scene_of(server_3)


@pytest.fixture
def service() -> Iterator[Path]:
    """A real control group named like a service's."""
    with group_of_our_own(".service") as path:
        yield path


@pytest.fixture
def going_down(tmp_path: Path) -> dict[str, str]:
    """The environment of an agent on a machine that is about to reboot."""
    return systemd_that(says(REBOOT), tmp_path)


def systemd_that(script: str, folder: Path) -> dict[str, str]:
    (folder / "bin").mkdir()
    return {**BY_SYSTEMD, "PATH": f"{fake(folder / 'bin', script)}:{os.environ['PATH']}"}


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# --- the machine goes down -------------------------------------------------------------------------------------------


def test_a_run_that_ends_before_the_machine_does_is_let_to(scene: Scene, going_down: dict[str, str]) -> None:
    scene.start(env=going_down, stop={"shutdown_timeout_seconds": 600})
    run = scene.create_run(held=True)
    scene.wait_begun(run)
    scene.agent.send(signal.SIGTERM)
    scene.wait_status("machine going down: 1 live run, ")
    scene.agent.wait_for_log("the machine is going down; 1 live run(s) have 600 s")
    scene.let_go()
    assert scene.agent.wait() == 0
    scene.check(run, "COMPLETED")


def test_a_run_that_outlasts_the_machine_is_reported_as_crashed_for_that_reason(
    scene_of: Callable[[PrefectServer], Scene], prefect_server: PrefectServer, going_down: dict[str, str]
) -> None:
    scene = scene_of(prefect_server)
    scene.start(env=going_down, stop={"shutdown_timeout_seconds": 0.5})
    run = scene.create_run(held=True)
    scene.wait_begun(run)
    assert scene.agent.stop() == 0
    scene.check(run, "CRASHED")
    assert lines(scene.hooks) == [f"crashed {run}"]
    scene.agent.wait_for_log("stopping: The machine went down while it ran.")
    # That of 3.8 has said itself that it was ended, but not why.
    assert scene.api.read_run(run)["state"]["message"] == "The machine went down while it ran."


def test_a_run_that_outlasts_the_machine_is_handed_back_by_word_to_its_engine_and_executed_again(
    scene: Scene, going_down: dict[str, str]
) -> None:
    flow = scene.api.create_deployment("held", pool=scene.pool, file="held.py")
    run = scene.api.create_run(flow, {"trace": str(scene.trace), "go": str(scene.go)})
    stop = {"shutdown_timeout_seconds": 0.5, "then": "reschedule"}
    scene.start(env=going_down, stop=stop, flows={"python": scene.server.python})
    scene.wait_begun(run)
    assert scene.agent.stop() == 0
    states = scene.api.states(run)
    assert states[-1] == ("SCHEDULED", "AwaitingRetry"), scene.api.story(run)
    assert "CRASHED" not in dict(states), scene.api.story(run)  # what the engine makes of a signal without a word
    assert not [*check_processes(run)]
    scene.agent.start()  # the machine is up again
    scene.wait_begun(run, times=2)
    scene.let_go()
    scene.api.wait_for_state(run, "COMPLETED")
    check_agent(scene.agent)


def test_a_machine_that_goes_down_in_the_middle_of_a_drain_does_not_wait_for_it(scene: Scene, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    jobs.touch()
    env = systemd_that(f"case \"$*\" in *list-jobs*) cat '{jobs}';; *) echo running;; esac", tmp_path)
    scene.start(env=env, stop={"shutdown_timeout_seconds": 0.5})
    run = scene.create_run(held=True)
    scene.wait_begun(run)
    scene.agent.send(signal.SIGTERM)
    scene.wait_status("draining: 1 live run, 2")  # 25 or 24 min
    assert scene.agent.notify.lines("EXTEND_TIMEOUT_USEC")
    jobs.write_text(REBOOT)
    scene.agent.wait_for_log("the stop has become a shutdown")
    assert scene.agent.wait() == 0
    scene.check(run, "CRASHED")


# --- the service is restarted ----------------------------------------------------------------------------------------


def test_a_restart_of_the_service_leaves_the_run_in_its_group_and_the_next_agent_sees_it_end(
    scene: Scene, service: Path, tmp_path: Path
) -> None:
    os.setxattr(service, "trusted.delegate", b"1")
    env = systemd_that(says(f"31 {service.name} restart running"), tmp_path)
    inside = ["/bin/sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(service)]
    scene.start(env=env, behind=inside)
    run = scene.create_run(held=True)
    pid = scene.wait_begun(run)
    assert scene.agent.stop(timeout=20) == 0
    assert "leaving 1 live run(s) to the next flow-agent" in scene.agent.log()
    assert pid in RunGroup(service / "runs" / run, service).pids()
    scene.agent.start()
    scene.agent.wait_for_log(f"still running as process {pid}")
    scene.let_go()
    scene.api.wait_for_state(run, "COMPLETED")
    wait_until(lambda: not (service / "runs" / run).exists(), 15, "the group is gone", more=scene.agent.log)
    scene.check(run, "COMPLETED")
    check_agent(scene.agent)


# --- the agent hangs -------------------------------------------------------------------------------------------------


def test_an_agent_that_hangs_says_where_and_its_run_goes_on_without_it(scene: Scene) -> None:
    scene.start(env={"WATCHDOG_USEC": "3000000", VARIABLE: "after pid:hang"})
    run = scene.create_run(held=True)
    pid = scene.wait_begun(run)
    scene.agent.wait_for_log("the event loop has stood still")  # and systemd has heard nothing for as long
    scene.agent.send(signal.SIGUSR1)
    scene.agent.wait_for_log("SIGUSR1: where every task stands")
    for place in (
        r"supervisor/failpoints\.py:\d+ failpoint",
        r"supervisor/runs/poller\.py:\d+ Poller\.run",
        f"- run {run}",
    ):
        assert len(re.findall(place, scene.agent.log())) == 2, scene.agent.log()
    scene.agent.send(signal.SIGABRT)  # systemd's next word
    assert scene.agent.wait(20) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in scene.agent.log()
    assert alive(pid)
    del scene.agent.env[VARIABLE]
    scene.agent.start()
    scene.agent.wait_for_log(f"still running as process {pid}")
    scene.let_go()
    scene.api.wait_for_state(run, "COMPLETED")
    wait_until(lambda: not alive(pid), 20, "its process has gone")
    scene.check(run, "COMPLETED")


# --- control groups --------------------------------------------------------------------------------------------------


class Contained:
    """A run in a group of its own, with a daemon that has rid itself of every other sign of whose it is."""

    def __init__(self, scene: Scene, service: Path) -> None:
        born, stray = scene.folder / "born", scene.folder / "stray"
        script = BIRTH.format(born=born, python=sys.executable, daemon=DAEMON, stray=stray, engine=scene.engine())
        python = scene.folder / "python"
        python.write_text(script)
        python.chmod(0o755)
        scene.start(agent={"cgroup": str(service)}, flows={"python": python})
        self.run = scene.create_run(held=True)
        self.pid = scene.wait_begun(self.run)
        self.born_in = born.read_text()
        self.group = RunGroup(service / "runs" / self.run, service)
        wait_until(lambda: stray.exists() and stray.read_text(), 30, "the daemon lives")
        self.stray = int(stray.read_text())


def test_the_group_of_a_run_is_kept_by_the_next_agent_and_goes_with_all_its_processes_when_it_is_cancelled(
    scene: Scene, service: Path
) -> None:
    contained = Contained(scene, service)
    assert f"0::/{service.name}/runs/{contained.run}\n" in contained.born_in
    scene.agent.kill()
    assert {contained.pid, contained.stray} <= {*contained.group.pids()}
    scene.agent.start()
    scene.agent.wait_for_log(f"still running as process {contained.pid}")
    scene.api.cancel(contained.run)
    scene.api.wait_for_state(contained.run, "CANCELLED")
    assert not alive(contained.pid)
    assert not alive(contained.stray)
    wait_until(lambda: not contained.group.path.exists(), 15, "the group is gone", more=scene.agent.log)
    scene.check(contained.run, "CANCELLED")
    check_agent(scene.agent)


def test_a_daemon_that_only_its_group_gives_away_ends_with_its_run(scene: Scene, service: Path) -> None:
    contained = Contained(scene, service)
    scene.let_go()
    scene.api.wait_for_state(contained.run, "COMPLETED")
    wait_until(lambda: not contained.group.path.exists(), 15, "the group is gone", more=scene.agent.log)
    assert not alive(contained.stray)
    scene.check(contained.run, "COMPLETED")
    check_agent(scene.agent)


# --- the disk is full ------------------------------------------------------------------------------------------------


def small_disk_at(folder: Path) -> list[str]:
    """A command behind which the agent and its runs have a disk of 4 MB there; it is gone with the last of them."""
    folder.mkdir()
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    return [*namespace, "/bin/sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && exec "$@"', str(folder)]


def as_seen_by(agent: AgentProcess, folder: Path) -> Path:
    return Path(f"/proc/{agent.pid}/root{folder}")


def test_an_agent_without_room_for_its_journal_ends_what_it_has_and_takes_no_more_until_there_is_some(
    scene: Scene, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    scene.start(agent={"state_dir": state}, behind=small_disk_at(state))
    disk = as_seen_by(scene.agent, state)
    live = scene.create_run("crashes", held=True)
    scene.wait_begun(live)
    fill(disk)
    later = [scene.create_run() for _ in range(3)]
    scene.wait_status("1 running, taking no new ones: there is no room in the state directory")
    scene.let_go()
    ended = scene.api.wait_for_state(live, "CRASHED")
    assert "SIGKILL" in ended["state"]["message"]
    scene.wait_status("0 running, taking no new ones: there is no room in the state directory")
    assert {kind for run in later for kind, _ in scene.api.states(run)} == {"SCHEDULED"}, scene.agent.log()
    told = len(scene.agent.notify.lines("STATUS"))
    (disk / "ballast").unlink()
    for run in later:
        scene.api.wait_for_state(run, "COMPLETED")
    scene.wait_status("0 running, no limit", since=told)
    for run, end in {live: "CRASHED", **dict.fromkeys(later, "COMPLETED")}.items():
        scene.check(run, end)
    check_agent(scene.agent)


def test_a_run_goes_on_printing_and_completes_although_the_disk_of_its_output_is_full(
    scene: Scene, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    (tmp_path / "bursts.py").write_text(BURSTS)
    flow = scene.api.create_deployment("bursts", pool=scene.pool, file="bursts.py", path=tmp_path)
    run = scene.api.create_run(flow, {"trace": str(scene.trace)})
    real = {"flows": {"python": scene.server.python}}
    scene.start(agent={"log_dir": logs}, behind=small_disk_at(logs), **real, output={"show": True})
    disk = as_seen_by(scene.agent, logs)
    wait_until(lambda: lines(scene.trace), 60, "the flow has begun", more=scene.agent.log)
    fill(disk)
    for number in range(6):
        Path(f"{scene.trace}.{number}").touch()
        # Room for two bursts is reserved when this has been seen: the agent has come by since the one before it.
        scene.agent.wait_for_log(f"end of burst {number}")
    scene.api.wait_for_state(run, "COMPLETED")
    wait_until(lambda: not [*check_processes(run)], 15, "no process is left", more=scene.agent.log)
    printed = (disk / f"{run}.log").read_text()
    assert "Finished in state Completed()" in printed.splitlines()[-1]
    assert (disk / "ballast").stat().st_size + 6 * 400 * 1000 > 4 << 20, "there was room for all of it"
    check_agent(scene.agent)
