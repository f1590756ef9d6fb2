"""A server, or a way to it, that misbehaves: every claimed run is executed once and ends in its one right state.

Only the agent suffers; the engines are given the real server's address. So every fault hits what this project has to get right.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from tests.agents import AgentProcess
from tests.faultserver import (
    Delay,
    Duplicate,
    Fault,
    HalfClose,
    LoseAnswer,
    Refuse,
    Rule,
    SlowBody,
    Status,
    ThreadedFaultServer,
    fault_server_thread,
    html,
    on,
    wrong_json,
)
from tests.invariants import check_agent, check_runs, executions
from tests.releases import with_one_release
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

FLOWS = ("hello", "failing", "kill_self", "hard_exit", "sleeper", "deaf")
TIMEOUT = 2.0  # the agent's own, for one request
TOO_SLOW = TIMEOUT + 1

Start = Callable[..., AgentProcess]


@pytest.fixture
def faults(prefect_server: PrefectServer) -> Iterator[ThreadedFaultServer]:
    with fault_server_thread(prefect_server.url) as running:
        yield running


@pytest.fixture
def agent_behind(
    faults: ThreadedFaultServer, prefect_server: PrefectServer, agent_process: Callable[..., AgentProcess]
) -> Iterator[Start]:
    """Starts an agent that speaks to the server through the faults; its flows do not."""
    started: list[AgentProcess] = []

    def start(*, flows: Mapping[str, Any] | None = None, **work: Any) -> AgentProcess:
        agent = agent_process(
            prefect_server,
            [work],
            agent={"limit": 4},
            api={"url": faults.url, "timeout_seconds": TIMEOUT},
            poll={"max_backoff_seconds": 2},
            flows={"env": {"PREFECT_API_URL": prefect_server.url}, "grace_seconds": 3, **(flows or {})},
        )
        started.append(agent)
        return agent

    yield start
    faults.rules.clear()
    for agent in started:
        assert agent.stop(signal.SIGQUIT) == 0  # while there is somebody to hear its last words


def proposing(faults: ThreadedFaultServer, run_id: str, state: str, fault: Fault, times: int = 1) -> Rule:
    """A fault for proposals of that state: a type, or "Submitting"."""

    def match(method: str, path: str) -> bool:
        if (method, path) != ("POST", f"/flow_runs/{run_id}/set_state"):
            return False
        proposed = json.loads(faults.requests[-1].body)["state"]  # the request that is being decided about
        return bool((proposed.get("name") or proposed["type"]) == state)

    return Rule(match, fault, times)


def logging(faults: ThreadedFaultServer, run_id: str, fault: Fault) -> Rule:
    """A fault for the first lines that are written to a run's log."""
    return Rule(lambda _, path: path == "/logs/" and run_id.encode() in faults.requests[-1].body, fault, 1)


def reading(run_id: str, fault: Fault, times: int = 1) -> Rule:
    return on("GET", f"/flow_runs/{run_id}", fault, times)


def test_a_claim_that_arrives_after_somebody_else_ran_the_run_is_taken_back(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    pool = api.create_pool()
    run = api.create_run(api.create_deployment("hello", pool=pool), {"trace": str(tmp_path / "trace")})
    claim = proposing(faults, run, "PENDING", Delay(TIMEOUT / 2))
    faults.rules.append(claim)
    agent = agent_behind(pool=pool, flows={"start": "cold"})  # whoever waits until it can start warm sees it too late
    wait_until(lambda: claim.hits, 30, "the claim is on its way", every=0.01)
    for state in ("PENDING", "RUNNING", "COMPLETED"):  # another agent's run, from claim to end
        api.set_state(run, state)
    agent.wait_for_log("somebody else executed it while we claimed it")
    assert [kind for kind, _ in api.states(run)][-2:] == ["PENDING", "COMPLETED"], api.story(run)
    assert not executions(tmp_path / "trace")
    check_agent(agent)


@with_one_release
def test_faults_at_each_step_of_a_run_change_neither_its_one_execution_nor_its_end(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    pool, trace = api.create_pool(), tmp_path / "trace"
    parameters = {"trace": str(trace)}
    deployments = {flow: api.create_deployment(flow, pool=pool) for flow in FLOWS}

    def run(flow: str, *rules: Callable[[str], Rule]) -> str:
        run_id = api.create_run(deployments[flow], parameters)
        faults.rules.extend(rule(run_id) for rule in rules)
        return run_id

    def propose(state: str, fault: Fault, times: int = 1) -> Callable[[str], Rule]:
        return lambda run_id: proposing(faults, run_id, state, fault, times)

    ends = {
        run("hello", propose("PENDING", LoseAnswer(), 2)): "COMPLETED",
        run("hello", propose("PENDING", Duplicate())): "COMPLETED",
        run("failing", propose("PENDING", HalfClose()), lambda run_id: reading(run_id, wrong_json())): "FAILED",
        run(
            "kill_self",
            propose("PENDING", SlowBody(TOO_SLOW)),
            propose("CRASHED", LoseAnswer(), 2),
            lambda run_id: logging(faults, run_id, LoseAnswer()),
        ): "CRASHED",
        run("hard_exit", propose("PENDING", html(200)), propose("CRASHED", Duplicate())): "CRASHED",
        run(
            "hard_exit",
            propose("PENDING", wrong_json({"status": 7, "state": "yes"})),
            propose("CRASHED", html(502)),
            propose("CRASHED", wrong_json([])),
        ): "CRASHED",
    }
    cancelled = [
        run("deaf", propose("PENDING", Status(503), 3), propose("CANCELLED", LoseAnswer(), 2)),
        run("deaf", propose("PENDING", Refuse()), propose("CANCELLED", Duplicate())),
    ]
    if api.server.major == 3:  # which is told that a run is being submitted
        first, second, *_ = ends
        faults.rules += [propose("Submitting", LoseAnswer())(first), propose("Submitting", Duplicate())(second)]
    agent = agent_behind(pool=pool)
    cancel_once_begun(api, cancelled, trace, agent)
    check_runs(api, [agent], trace, ends | dict.fromkeys(cancelled, "CANCELLED"), 90)
    assert [rule.fault for rule in faults.rules if not rule.hits] == []


def test_a_run_cancelled_while_its_claim_is_in_doubt_is_not_started_and_not_left_open(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    pool, trace = api.create_pool(), tmp_path / "trace"
    run_id = api.create_run(api.create_deployment("hello", pool=pool), {"trace": str(trace)})
    claim = proposing(faults, run_id, "PENDING", LoseAnswer())
    unread = Rule(lambda _, path: claim.hits > 0 and path == f"/flow_runs/{run_id}", Status(503))
    faults.rules += [claim, unread]
    agent = agent_behind(pool=pool)
    wait_until(lambda: unread.hits, 30, "the agent is in doubt", more=agent.log)
    api.cancel(run_id)
    assert api.state(run_id) == "CANCELLING"
    faults.rules.clear()
    api.wait_for_state(run_id, "CANCELLED", 30)
    check_agent(agent)
    assert not executions(trace)


def cancel_once_begun(api: Api, runs: Collection[str], trace: Path, agent: AgentProcess) -> None:
    """Cancels each of these runs as soon as its body has begun."""
    left = set(runs)

    def all_cancelled() -> bool:
        for run_id in left & set(executions(trace)):
            api.cancel(run_id)
            left.remove(run_id)
        return not left

    wait_until(all_cancelled, 120, "the sleepers have begun", more=agent.log)


def test_a_wait_that_the_server_asks_for_is_kept_before_the_next_poll(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start
) -> None:
    agent = agent_behind(queues=[api.create_queue()])

    def wait_after(fault: Status) -> float:
        polls: list[float] = []

        def first(_: str, path: str) -> bool:
            if path.endswith("/get_runs"):
                polls.append(time.monotonic())
            return path.endswith("/get_runs") and len(polls) == 1

        faults.rules[:] = [Rule(first, fault)]
        wait_until(lambda: len(polls) >= 2, 30, "a poll after the refused one", more=agent.log)
        return polls[1] - polls[0]

    assert wait_after(Status(429, {"Retry-After": "3"}, {"detail": "slow down"})) >= 3
    soon = datetime.now(UTC) + timedelta(seconds=5)  # in whole seconds, and it is met a poll later
    assert wait_after(Status(503, {"Retry-After": format_datetime(soon, usegmt=True)})) >= 2.5


def test_a_random_fifth_of_all_requests_going_wrong_costs_no_run_and_doubles_none(
    api: Api, faults: ThreadedFaultServer, agent_behind: Start, tmp_path: Path
) -> None:
    seed = int(os.environ.get("E2E_FAULT_SEED") or random.randrange(10**6))
    print(f"E2E_FAULT_SEED={seed}")
    chance = random.Random(seed)
    pool, trace = api.create_pool(), tmp_path / "trace"
    parameters = {"trace": str(trace)}
    deployments = {flow: api.create_deployment(flow, pool=pool) for flow in FLOWS}
    plan = ["hello"] * 4 + ["failing"] * 2 + ["kill_self"] * 2 + ["hard_exit"] * 2 + ["sleeper"] * 2
    ends = {"hello": "COMPLETED", "failing": "FAILED", "kill_self": "CRASHED", "hard_exit": "CRASHED"}
    chance.shuffle(plan)
    # One rule for each kind, each for its share of what the ones before it have left.
    for tried, fault in enumerate(KINDS):
        share = PART / len(KINDS) / (1 - PART * tried / len(KINDS))
        faults.rules.append(Rule(lambda _method, _path, share=share: chance.random() < share, fault))  # type: ignore[misc]
    runs = {api.create_run(deployments[flow], parameters): flow for flow in plan}
    agent = agent_behind(pool=pool)
    cancel_once_begun(api, [run_id for run_id, flow in runs.items() if flow == "sleeper"], trace, agent)
    check_runs(api, [agent], trace, {run_id: ends.get(flow, "CANCELLED") for run_id, flow in runs.items()}, 90)
    hits = sum(rule.hits for rule in faults.rules)
    assert hits > PART * len(faults.requests) / 2, f"{hits} faults in {len(faults.requests)} requests"


PART = 0.2
KINDS: list[Fault] = [
    Refuse(),
    LoseAnswer(),
    LoseAnswer(),
    Duplicate(),
    Duplicate(),
    HalfClose(),
    SlowBody(TOO_SLOW),
    SlowBody(0.3),
    Delay(0.5),
    Status(503),
    Status(503, {"Retry-After": "1"}),
    Status(429, {"Retry-After": "1"}),
    Status(500, {}, {"exception_message": "Internal Server Error"}),
    html(200),
    html(502),
    html(404),
    wrong_json(),
    wrong_json({"status": [], "state": 7, "id": {}}),
    wrong_json("text"),
]
