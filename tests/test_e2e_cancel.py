"""Runs that are cancelled, at whatever stage they are, and runs whose time is over."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.agents import AgentProcess
from tests.faultserver import Delay, ThreadedFaultServer, fault_server_thread, on
from tests.releases import with_one_release
from tests.servers import Api, PrefectServer
from tests.waiting import SLOWEST, lines, wait_until

StartAgent = Callable[..., AgentProcess]


@pytest.fixture
def pool(api: Api) -> str:
    return api.create_pool()


@pytest.fixture
def start_run(api: Api, pool: str, tmp_path: Path) -> Callable[..., str]:
    """A due run of that flow in the pool, whose body leaves a line in the file TRACE/<run's name>."""

    def start(
        flow: str, parameters: Mapping[str, Any] | None = None, name: str | None = None, **deployment: Any
    ) -> str:
        trace = tmp_path / f"{name or flow}.trace"
        wanted = {"trace": str(trace), **(parameters or {})}
        return api.create_run(api.create_deployment(flow, pool=pool, **deployment), wanted)

    return start


@pytest.fixture
def faults(prefect_server: PrefectServer) -> Iterator[ThreadedFaultServer]:
    with fault_server_thread(prefect_server.url) as server:
        yield server


def wait_body(tmp_path: Path, name: str, timeout: float = 60) -> None:
    """Until the body of that flow has begun."""
    wait_until(lambda: lines(tmp_path / f"{name}.trace"), timeout, f"the flow {name} has begun")


def alive(pids: Mapping[str, int]) -> dict[str, int]:
    """Those which are still there, zombies left out."""
    found = {}
    for kind, pid in pids.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found[kind] = pid
    return found


def wait_gone(agent: AgentProcess) -> None:
    """Newer engines report CANCELLED themselves and then still have to come to their end."""
    wait_until(lambda: not agent.run_processes(), 15, "no process of a run is left", more=agent.log)


def watch_to_the_end(api: Api, run_id: str, timeout: float = 60) -> Any:
    """Asks without a pause, so that what we look at next is as it was when the server first showed the end."""
    deadline = time.monotonic() + timeout * SLOWEST
    while (run := api.read_run(run_id))["state_name"] != "Cancelled":
        assert time.monotonic() < deadline, api.story(run_id)
    return run


def test_runs_that_run_pause_or_wait_are_ended_by_either_form_of_cancelling(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    runs = {flow: start_run(flow) for flow in ("sleeper", "async_sleeper", "pauser", "retrying")}
    agent = agent_process(prefect_server, [{"pool": pool}], flows={"env": {"E2E_RETRY_DELAY": "600"}})
    for name in runs:
        wait_body(tmp_path, name, 90)
    api.wait_for_state(runs["pauser"], "PAUSED")
    api.wait_for_state(runs["retrying"], "SCHEDULED")
    wait_until(lambda: api.read_run(runs["retrying"])["infrastructure_pid"], 10, "the server knows the process")
    for name, run in runs.items():
        if name == "async_sleeper":  # the form that Prefect 2 had before it had the type
            api.set_state(run, "CANCELLED", "Cancelling", force=True)
        else:  # Prefect 2 lets nobody cancel a paused run who does not insist
            api.set_state(run, "CANCELLING", force=name == "pauser")
    for name, run in runs.items():
        ended = watch_to_the_end(api, run)
        assert ended["state_type"] == "CANCELLED", name
        assert not {"CRASHED", "FAILED"} & {kind for kind, _ in api.states(run)}, f"{name}: {api.states(run)}"
        assert len(lines(tmp_path / f"{name}.trace")) == 1, name
    wait_gone(agent)
    assert agent.stop() == 0


def test_a_run_cancelled_between_claim_and_start_is_never_started(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    faults: ThreadedFaultServer,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    faults.rules.append(on("GET", r"/deployments/[^/]+", Delay(600)))  # how to start it stays unknown
    run = start_run("hello")
    agent = agent_process(prefect_server, [{"pool": pool}], api={"url": faults.url})
    api.wait_for_state(run, "PENDING")
    wait_until(lambda: faults.received["GET", "/deployments/{id}"], 10, "the agent asks how to start it")
    api.cancel(run)
    assert watch_to_the_end(api, run, 15)["state_type"] == "CANCELLED"
    assert agent.stop() == 0
    assert "started, process" not in agent.log()
    assert lines(tmp_path / "hello.trace") == []


def test_a_run_cancelled_while_its_engine_starts_never_begins(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    run = start_run("sleeper")
    agent = agent_process(prefect_server, [{"pool": pool}], flows={"start": "cold"})  # a warm one is too quick for us
    agent.wait_for_log("started, process")
    api.cancel(run)
    watch_to_the_end(api, run, 30)
    wait_gone(agent)
    assert lines(tmp_path / "sleeper.trace") == []
    assert agent.log().count("started, process") == 1


def test_a_suspended_run_has_no_process_and_is_cancelled_all_the_same(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    run = start_run("suspender")
    agent = agent_process(prefect_server, [{"pool": pool}])
    wait_body(tmp_path, "suspender")
    api.wait_for_state(run, "PAUSED")
    wait_until(lambda: not agent.run_processes(), 30, "its process has ended")
    wait_until(lambda: not (agent.state_dir / "runs" / run).exists(), 10, "the agent is done with it")
    # A server answers today's form itself, because it knows that a suspended run has no process.
    api.set_state(run, "CANCELLED", "Cancelling")
    assert watch_to_the_end(api, run, 20)["state_type"] == "CANCELLED"
    assert len(lines(tmp_path / "suspender.trace")) == 1


def test_when_the_server_shows_cancelled_no_child_of_the_run_lives(
    request: pytest.FixtureRequest,
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    run = start_run("spawner", {"pids": str(tmp_path / "pids")})
    agent = agent_process(prefect_server, [{"pool": pool}], flows={"grace_seconds": 3})
    wait_body(tmp_path, "spawner")
    pids = json.loads((tmp_path / "pids").read_text())
    pids["engine"] = int(lines(tmp_path / "spawner.trace")[0].split()[1])
    request.addfinalizer(lambda: [psutil.Process(pid).kill() for pid in alive(pids).values()])
    assert sorted(alive(pids)) == ["bare", "daemon", "deaf", "engine", "group", "plain", "session"]
    api.cancel(run)
    watch_to_the_end(api, run)
    left = set(alive(pids))
    if prefect_server.major > 2:
        left -= {"engine"}  # it reported the end itself, on its way out
    assert not left
    wait_until(lambda: not alive(pids), 15, "the last of them is gone", more=agent.log)
    wait_gone(agent)


@with_one_release
def test_a_run_that_ignores_the_signal_is_killed_when_its_grace_is_over(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    run = start_run("deaf")
    agent = agent_process(prefect_server, [{"pool": pool}], flows={"grace_seconds": 3})
    wait_body(tmp_path, "deaf")
    engine = {"engine": int(lines(tmp_path / "deaf.trace")[0].split()[1])}
    api.cancel(run)
    asked = time.monotonic()
    wait_until(lambda: not alive(engine), 30, "the engine has been killed", more=agent.log)
    assert time.monotonic() - asked > 3
    watch_to_the_end(api, run, 30)
    wait_gone(agent)
    assert "ended by SIGKILL" in agent.log()
    assert "outlived the grace of 3 s" in agent.log()


@with_one_release
def test_a_command_that_is_no_engine_is_cancelled_like_one(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, start_run: Callable[..., str], pool: str
) -> None:
    run = start_run("hello", job_variables={"command": "sleep 600"})
    agent = agent_process(prefect_server, [{"pool": pool}])
    agent.wait_for_log("started, process")
    wait_until(lambda: [p.name() for p in agent.run_processes()] == ["sleep"], 10, "the command runs")
    api.cancel(run)
    watch_to_the_end(api, run, 20)
    wait_gone(agent)


@with_one_release
def test_a_draining_agent_still_cancels(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    run = start_run("sleeper")
    agent = agent_process(prefect_server, [{"pool": pool}])
    wait_body(tmp_path, "sleeper")
    agent.send(signal.SIGTERM)
    agent.wait_for_log("waiting for 1 live run")
    api.cancel(run)
    assert agent.wait(30) == 0
    assert api.read_run(run)["state_name"] == "Cancelled"


@with_one_release
def test_a_run_that_takes_too_long_is_cancelled_with_that_reason(
    prefect_server: PrefectServer,
    api: Api,
    agent_process: StartAgent,
    start_run: Callable[..., str],
    pool: str,
    tmp_path: Path,
) -> None:
    limit = 6  # longer than an engine takes to start, on most machines; if not, the end is the same
    run = start_run("hooked_sleeper", {"hooks": str(tmp_path / "hooks")})
    agent = agent_process(prefect_server, [{"pool": pool}], flows={"timeout_seconds": limit})
    ended = api.wait_for_state(run, "CANCELLED")
    reason = f"ran longer than timeout_seconds = {limit}."
    wait_until(lambda: reason in api.read_run(run)["state"]["message"], 10, "the reason stands in its last state")
    assert ended["state_name"] == "Cancelled"
    assert agent.stop() == 0
    assert lines(tmp_path / "hooks") == [f"cancellation {run} Cancelling"]


def test_an_engine_that_has_begun_its_hooks_is_left_to_finish_them(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, pool: str, tmp_path: Path
) -> None:
    deployment = api.create_deployment("dawdler", pool=pool)
    hooks, trace = tmp_path / "hooks", tmp_path / "trace"
    go = tmp_path / "go"
    run = api.create_run(deployment, {"go": str(go), "hooks": str(hooks), "trace": str(trace)})
    agent = agent_process(prefect_server, [{"pool": pool}], poll={"cancel_interval_seconds": 3, "push": False})
    wait_until(lambda: lines(trace), 60, "the flow has begun")
    api.cancel(run)  # which the engine hears when it reports COMPLETED, before the agent asks
    go.touch()
    assert api.wait_for_state(run, "CANCELLED")["state_name"] == "Cancelled"
    assert agent.stop() == 0
    assert lines(hooks) == [f"cancellation {run} Cancelling"]


def test_a_cancellation_at_the_very_end_never_makes_two_ends(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, pool: str, tmp_path: Path
) -> None:
    deployment = api.create_deployment("hooked_sleeper", pool=pool)
    hooks, traces = tmp_path / "hooks", tmp_path / "traces"
    runs = [api.create_run(deployment, {"seconds": 2, "hooks": str(hooks), "trace": str(traces)}) for _ in range(8)]
    agent = agent_process(prefect_server, [{"pool": pool}], poll={"cancel_interval_seconds": 0.1})
    # The first are cancelled as soon as they sleep, the last when it is known to have ended, the others around their end.
    after = {run: number * 0.5 for number, run in enumerate(runs)}
    begun: dict[str, float] = {}

    def is_due(run: str) -> bool:
        if run not in begun or time.monotonic() <= begun[run] + after[run]:
            return False
        return run != runs[-1] or bool(api.read_run(run)["state_type"] == "COMPLETED")

    deadline = time.monotonic() + 90
    while after:
        assert time.monotonic() < deadline, agent.log()
        for line in lines(traces):
            begun.setdefault(line.split()[0], time.monotonic())
        for run in [run for run in after if is_due(run)]:
            del after[run]
            api.cancel(run)
    ends = {run: api.wait_for_state(run, {"COMPLETED", "CANCELLED"})["state_name"] for run in runs}
    assert agent.stop() == 0
    assert {run: api.read_run(run)["state_name"] for run in runs} == ends, "an end was changed afterwards"
    assert set(ends.values()) == {"Completed", "Cancelled"}
    assert sorted(line.split()[0] for line in lines(traces)) == sorted(runs)
    cancelled = [f"cancellation {run} Cancelling" for run in runs if ends[run] == "Cancelled"]
    assert sorted(lines(hooks)) == sorted(cancelled)
