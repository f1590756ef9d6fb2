"""A server that goes away and comes back: the agent stays, says so once, and every run is reported rightly in the end."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.agents import RUN_MARK, AgentProcess
from tests.faultserver import Fault, Refuse, Rule, Status, ThreadedFaultServer, fault_server_thread, html, on
from tests.invariants import BACK, LOST, REFUSED, check_agent, check_runs, executions, lines
from tests.releases import with_one_release
from tests.servers import Api, PrefectServer, processes_with
from tests.waiting import wait_until

Start = Callable[..., AgentProcess]


@pytest.fixture
def faults(prefect_server: PrefectServer) -> Iterator[ThreadedFaultServer]:
    with fault_server_thread(prefect_server.url) as running:
        yield running


@pytest.fixture
def agent_behind(
    faults: ThreadedFaultServer, prefect_server: PrefectServer, agent_process: Start
) -> Iterator[Callable[..., AgentProcess]]:
    """Starts an agent that speaks to the server through the proxy; its flows speak to it directly."""
    started: list[AgentProcess] = []

    def start(*work: dict[str, object]) -> AgentProcess:
        agent = agent_process(
            prefect_server,
            work,
            api={"url": faults.url, "timeout_seconds": 5},
            poll={"max_backoff_seconds": 4, "jitter": 0},
            flows={"env": {"PREFECT_API_URL": prefect_server.url}},
        )
        started.append(agent)
        return agent

    yield start
    faults.rules.clear()
    for agent in started:
        assert agent.stop(signal.SIGQUIT) == 0  # while there is somebody to hear its last words


def polls(faults: ThreadedFaultServer) -> int:
    """How often the server was asked for work so far."""
    return sum(
        count for (_, path), count in faults.received.items() if path.endswith(("/get_runs", "get_scheduled_flow_runs"))
    )


def begun(trace: Path, run_id: str, agent: AgentProcess) -> None:
    wait_until(lambda: run_id in executions(trace), 60, f"the body of {run_id} has begun", more=agent.log)


def process_of(run_id: str) -> psutil.Process:
    """The engine's process."""
    found = processes_with(RUN_MARK, run_id)
    assert len(found) == 1, found
    return found[0]


def check_said_once(agent: AgentProcess, times: int = 1) -> None:
    """So many losses and recoveries stand in the log, by turns."""
    said = [LOST if LOST in line else BACK for line in agent.log().splitlines() if LOST in line or BACK in line]
    assert said == [LOST, BACK] * times, agent.log()


@with_one_release
def test_an_agent_started_without_its_server_waits_for_it(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    pool, trace = api.create_pool(), tmp_path / "trace"
    run_id = api.create_run(api.create_deployment("hello", pool=pool), {"trace": str(trace)})
    faults.go_down()
    agent = agent_behind({"pool": pool})
    agent.wait_for_log(LOST)
    faults.come_up()
    check_runs(api, [agent], trace, {run_id: "COMPLETED"}, 60)
    check_said_once(agent)


@with_one_release
def test_runs_that_end_during_an_outage_are_reported_after_it_and_the_others_go_on(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    pool, trace = api.create_pool(), tmp_path / "trace"
    sleeper = api.create_deployment("sleeper", pool=pool, parameters={"trace": str(trace)})
    outage = 20 if api.server.major == 3 else 8
    lasting, short, killed = (api.create_run(sleeper, {"seconds": seconds}) for seconds in (outage + 5, 5, 600))
    agent = agent_behind({"pool": pool})
    for run_id in (lasting, short, killed):
        begun(trace, run_id, agent)
    process = process_of(lasting)
    faults.go_down()
    away_since = time.monotonic()
    agent.wait_for_log(LOST)
    process_of(killed).kill()
    api.wait_for_state(short, "COMPLETED", 60)
    wait_until(lambda: time.monotonic() - away_since > outage, 30, "the outage has lasted a while")
    assert api.state(killed) == "RUNNING"
    assert process.is_running()
    faults.come_up()
    check_runs(api, [agent], trace, {lasting: "COMPLETED", short: "COMPLETED", killed: "CRASHED"}, 60)
    assert any("SIGKILL" in line for line in api.logs(killed))
    check_said_once(agent)


TROUBLES: dict[str, Fault] = {
    "dropped": Refuse(),
    "500": Status(500, {}, {"exception_message": "Internal Server Error"}),
    "html": html(200),
    "nothing found": html(404),
    "redirect": Status(302, {"Location": "http://127.0.0.1/login"}),
}


def test_every_kind_of_trouble_is_said_once_and_waited_out_with_growing_pauses(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: Start, tmp_path: Path
) -> None:
    api, trace = api_of(server_3), tmp_path / "trace"
    pool, queues = api.create_pool(), [api.create_queue(), api.create_queue()]
    run_id = api.create_run(api.create_deployment("sleeper", pool=pool), {"trace": str(trace)})
    with fault_server_thread(server_3.url) as faults:
        agent = agent_process(
            server_3,
            [{"pool": pool}, {"queues": queues}],
            api={"url": faults.url},
            poll={"max_backoff_seconds": 2, "jitter": 0},
            flows={"env": {"PREFECT_API_URL": server_3.url}},
        )
        begun(trace, run_id, agent)
        process = process_of(run_id)
        for times, fault in enumerate(TROUBLES.values(), start=1):
            asked: list[float] = []

            def poll_of_pool(_: str, path: str, asked: list[float] = asked) -> bool:
                # A poll begins with one or, every 30 s, with the other.
                if path in (f"/work_pools/{pool}/get_scheduled_flow_runs", f"/work_pools/{pool}"):
                    asked.append(time.monotonic())
                return True

            faults.rules[:] = [Rule(poll_of_pool, fault)]
            wait_until(lambda asked=asked: len(asked) >= 3, 30, "three polls", more=agent.log)  # type: ignore[misc]
            faults.rules.clear()
            pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
            assert pauses[0] >= 1, pauses
            assert pauses[1] >= 2, pauses
            wait_until(lambda times=times: len(lines(agent, BACK)) == times, 30, "the recovery is said", more=agent.log)  # type: ignore[misc]
            check_said_once(agent, times)
        assert [line for line in agent.log().splitlines() if "cannot ask work queue" in line] == []
        check_agent(agent)
        assert process.is_running()
        api.cancel(run_id)
        api.wait_for_state(run_id, "CANCELLED", 30)
        assert agent.stop() == 0


def test_wrong_credentials_are_said_once_and_right_ones_are_taken_from_the_file_without_a_restart(
    own_server: Callable[..., PrefectServer], agent_process: Start, tmp_path: Path
) -> None:
    server = own_server("3.8.8", {"PREFECT_SERVER_API_AUTH_STRING": "agent:right"})
    api = Api(server, {"Authorization": "Basic YWdlbnQ6cmlnaHQ="})
    pool, trace, secret = api.create_pool(), tmp_path / "trace", tmp_path / "auth"
    sleeper = api.create_deployment("sleeper", pool=pool, parameters={"trace": str(trace)})
    first = api.create_run(sleeper)
    secret.write_text("agent:wrong")
    with fault_server_thread(server.url) as faults:
        agent = agent_process(
            server,
            [{"pool": pool}],
            api={"url": faults.url, "auth_string_file": secret},
            poll={"max_backoff_seconds": 2},
            flows={"env": {"PREFECT_API_URL": server.url}},
        )
        wait_until(lambda: sum(faults.received.values()) >= 4, 30, "some more polls", more=agent.log)
        assert len(lines(agent, "we keep asking")) == 1
        assert len(lines(agent, REFUSED)) == 1
        secret.write_text("agent:right")
        begun(trace, first, agent)
        assert len(lines(agent, BACK)) == 1
        # And the other way round, with a run that lives through it.
        secret.write_text("agent:wrong")
        refused = on("*", ".*", Status(401, {}, {"exception_message": "Unauthorized"}))
        faults.rules.append(refused)
        wait_until(lambda: refused.hits >= 4, 30, "some more polls", more=agent.log)
        # Once a loss; an answer that was on its way may have ended one and begun another.
        assert len(lines(agent, "we keep asking")) == len(lines(agent, BACK)) + 1
        process = process_of(first)
        secret.write_text("agent:right")
        faults.rules.clear()
        api.cancel(first)
        check_runs(api, [agent], trace, {first: "CANCELLED"}, 60)
        assert not process.is_running()
        assert len(lines(agent, BACK)) == len(lines(agent, "we keep asking"))
        assert "agent:" not in agent.log()
        assert agent.stop() == 0
    api.close()


@pytest.mark.parametrize("version", ["3.8.8", "2.20.26"])
def test_a_killed_server_costs_no_run_its_right_end(
    own_server: Callable[..., PrefectServer],
    api_of: Callable[[PrefectServer], Api],
    agent_process: Start,
    tmp_path: Path,
    version: str,
) -> None:
    server = own_server(version)
    api, trace = api_of(server), tmp_path / "trace"
    pool = api.create_pool()
    sleeper = api.create_deployment("sleeper", pool=pool, parameters={"trace": str(trace)})
    waiting, killed, lasting = (
        api.create_run(sleeper),
        api.create_run(sleeper),
        api.create_run(sleeper, {"seconds": 12}),
    )
    agent = agent_process(server, [{"pool": pool}], agent={"limit": 3})
    for run_id in (waiting, killed, lasting):
        begun(trace, run_id, agent)
    later = api.create_run(sleeper, {"seconds": 0})
    server.kill()
    agent.wait_for_log(LOST)
    process_of(killed).kill()
    server.restart()
    api.wait_for_state(killed, "CRASHED", 60)
    api.cancel(waiting)
    # An engine may or may not survive the loss of its server; what became of it is told rightly.
    end = api.wait_for_state(lasting, timeout=60)["state_type"]
    ends = {killed: "CRASHED", waiting: "CANCELLED", later: "COMPLETED", lasting: end}
    assert end in ("COMPLETED", "FAILED", "CRASHED")
    check_runs(api, [agent], trace, ends, 60)
    assert len(lines(agent, LOST)) >= 1
    assert len(lines(agent, LOST)) == len(lines(agent, BACK))


@pytest.mark.parametrize("tables", [1, 2], ids=["in-one-table", "in-two-tables"])
@with_one_release
def test_one_failing_queue_stops_no_other(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path, tables: int
) -> None:
    trace, bad, good = tmp_path / "trace", api.create_queue(), api.create_queue()
    runs = [api.create_run(api.create_deployment("hello", queue=queue), {"trace": str(trace)}) for queue in (bad, good)]
    bad_id = api.get(f"/work_queues/name/{bad}")["id"]
    failing = on("POST", f"/work_queues/{bad_id}/get_runs", Status(500, {}, {"exception_message": "no"}))
    faults.rules.append(failing)
    agent = agent_behind(*([{"queues": [bad, good]}] if tables == 1 else [{"queues": [bad]}, {"queues": [good]}]))
    api.wait_for_state(runs[1], "COMPLETED", 60)
    wait_until(lambda: failing.hits >= 3, 30, "the failing queue is asked again and again", more=agent.log)
    assert api.state(runs[0]) == "SCHEDULED"
    about_it = [line for line in agent.log().splitlines() if bad_id in line or f"'{bad}'" in line]
    assert sum("answered 500" in line for line in about_it) == 1, agent.log()  # a name may hold these digits, too
    faults.rules.clear()
    check_runs(api, [agent], trace, dict.fromkeys(runs, "COMPLETED"), 60)
    assert len(lines(agent, BACK)) <= 1, agent.log()


@with_one_release
def test_a_pause_is_said_once_and_its_runs_start_when_it_is_over(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    pool, queue, trace = api.create_pool(), api.create_queue(), tmp_path / "trace"
    runs = [
        api.create_run(api.create_deployment("hello", **place), {"trace": str(trace)})
        for place in ({"pool": pool}, {"queue": queue})
    ]
    queue_id = api.get(f"/work_queues/name/{queue}")["id"]

    def pause(*, paused: bool) -> None:
        api.patch(f"/work_pools/{pool}", {"is_paused": paused})
        api.patch(f"/work_queues/{queue_id}", {"is_paused": paused})

    pause(paused=True)
    agent = agent_behind({"pool": pool}, {"queues": [queue]})
    wait_until(lambda: polls(faults) >= 8, 30, "some polls of each", more=agent.log)
    assert len(lines(agent, f"work pool '{pool}' is paused")) == 1
    assert len(lines(agent, f"work queue '{queue}' is paused")) == 1
    assert not executions(trace)
    pause(paused=False)
    check_runs(api, [agent], trace, dict.fromkeys(runs, "COMPLETED"), 60)
