"""Warm runs when something dies: their agent before it has let them go, and the fork server that they are copies of.

What else is promised of a run is promised of a warm one, too: the other suites run in both modes (`tests/agents.py`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.agents import RUN_MARK, AgentProcess
from tests.killsuite import Scene
from tests.servers import Api, PrefectServer, processes_with
from tests.waiting import lines, wait_until


def test_a_copy_whose_agent_died_before_it_let_it_go_is_not_taken_for_the_run(
    server_3: PrefectServer, api_of: Callable[..., Api]
) -> None:
    with Scene(server_3, api_of(server_3), "here", warm=True) as scene:
        run_id = scene.create_run("completes")
        scene.let_go()
        scene.start("before go:hang")
        wait_until(lambda: processes_with(RUN_MARK, run_id), 20, "the copy waits", more=scene.agent.log)
        [copy] = processes_with(RUN_MARK, run_id)
        copy.send_signal(signal.SIGSTOP)  # so that it is there yet when the next agent looks
        scene.kill()
        assert copy.is_running()
        scene.start_ready()
        wait_until(lambda: not scene.open_runs(), 30, "the run completes", more=scene.agent.log)
        scene.stop()
        scene.check()
        assert not scene.tally.findings, scene.tally.findings
        for sign in ("going on with it", "starting it again"):
            assert sign not in scene.agent.log()


def test_runs_live_on_and_tell_how_they_end_when_their_fork_server_is_dead(
    server_3: PrefectServer, api_of: Callable[..., Api], agent_process: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    api, trace, go = api_of(server_3), tmp_path / "trace", tmp_path / "go"
    pool = api.create_pool()
    deployment = api.create_deployment("held", pool=pool, file="held.py")
    parameters = {"trace": str(trace), "go": str(go)}
    agent = agent_process(server_3, [{"pool": pool}], flows={"start": "warm"})
    agent.wait_for_log("warm starts with", 60)
    kept = api.create_run(deployment, {**parameters, "go": str(tmp_path / "later")})
    coded = api.create_run(deployment, {**parameters, "code": 3})
    signalled = api.create_run(deployment, parameters)
    wait_until(lambda: len(lines(trace)) == 3, 60, "the flows have begun", more=agent.log)
    pids = {run: int(pid) for run, pid in map(str.split, lines(trace))}
    assert agent.log().count("(warm)") == 3
    [fork_server] = agent.fork_servers()
    fork_server.kill()
    agent.wait_for_log(f"the fork server (process {fork_server.pid}) has ended")

    os.kill(pids[signalled], signal.SIGUSR1)
    ended = api.wait_for_state(signalled, "CRASHED")
    assert "ended by SIGUSR1" in ended["state"]["message"]
    go.touch()
    ended = api.wait_for_state(coded, "CRASHED")
    assert "exited with code 3" in ended["state"]["message"]

    agent.kill()
    assert psutil.pid_exists(pids[kept])
    agent.start()
    agent.wait_for_log(f"still running as process {pids[kept]}")
    (tmp_path / "later").touch()
    api.wait_for_state(kept, "COMPLETED")
    assert agent.stop() == 0
    assert not agent.fork_servers()


def test_a_run_that_waits_for_its_fork_server_is_cancelled_at_once(
    server_3: PrefectServer, api_of: Callable[..., Api], agent_process: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    api = api_of(server_3)
    pool = api.create_pool()
    deployment = api.create_deployment("held", pool=pool, file="held.py")
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    flows = {"start": "warm", "preload": ["slow"], "env": {"PYTHONPATH": str(tmp_path)}}
    agent = agent_process(server_3, [{"pool": pool}], flows=flows)
    run = api.create_run(deployment, {"trace": str(tmp_path / "trace"), "go": str(tmp_path)})
    wait_until(lambda: ("PENDING", "Submitting") in api.states(run), 30, "it is about to be started", more=agent.log)
    api.cancel(run)
    api.wait_for_state(run, "CANCELLED")
    assert (
        "started, process" not in agent.log()
    )  # as it would be, cold, once patience with the fork server is at an end
    assert agent.stop() == 0
    assert not agent.fork_servers()
