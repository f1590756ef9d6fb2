"""Many agents may serve the same pool or queues: no run is ever executed by two, and none is left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agents import AgentProcess
from tests.invariants import check_agent, check_runs, executions, lines
from tests.releases import with_one_release
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

QUICK_ENGINE = Path(__file__).parent / "flows" / "quick_engine.py"

Start = Callable[..., AgentProcess]


def two_agents(start: Start, server: PrefectServer, work: dict[str, Any], **flows: Any) -> list[AgentProcess]:
    """Two agents on the same work, polling as one; neither can take all of it."""
    return [start(server, [work], agent={"name": f"agent-{number}", "limit": 3}, flows=flows) for number in (1, 2)]


def taken(agent: AgentProcess) -> set[str]:
    """The runs that this agent has started a process for."""
    return {line.partition("(")[2].partition(")")[0] for line in lines(agent, "started, process")}


def check_shared(agents: list[AgentProcess], runs: list[str]) -> None:
    """Every run was started by exactly one of the agents, and each agent had some."""
    by_agent = [taken(agent) for agent in agents]
    assert Counter(run_id for part in by_agent for run_id in part) == Counter(runs)
    assert all(by_agent), "one agent took everything"


# Each release and each kind once: how a claim is settled differs by the one, how work is found by the other.
@pytest.mark.parametrize(
    ("prefect_server", "kind"),
    [("3.8.8", "pool"), ("2.20.26", "queue")],
    ids=["3.8-pool", "2.20-queue"],
    indirect=["prefect_server"],
)
def test_two_agents_execute_sixty_quick_runs_once_each(
    kind: str, api: Api, prefect_server: PrefectServer, agent_process: Start, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    name = api.create_queue() if kind == "queue" else api.create_pool()
    deployment = api.create_deployment("hello", **{kind: name})
    runs = [api.create_run(deployment) for _ in range(60 if prefect_server.major == 3 else 20)]
    command = [sys.executable, "-IS", str(QUICK_ENGINE), str(trace)]
    work = {"queues": [name]} if kind == "queue" else {"pool": name}
    agents = two_agents(agent_process, prefect_server, work, command=command)

    def all_ended() -> bool:
        ended = {"flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["COMPLETED"]}}}}
        return bool(api.post("/flow_runs/count", ended) == len(runs))

    wait_until(
        all_ended, 120, "all runs are COMPLETED", every=0.3, more=lambda: "\n".join(agent.log() for agent in agents)
    )
    assert executions(trace) == Counter(runs)
    for agent in agents:
        wait_until(lambda agent=agent: not agent.run_processes(), 15, "no process is left")  # type: ignore[misc]
        check_agent(agent)
    check_shared(agents, runs)


@with_one_release
def test_two_agents_execute_real_runs_once_each(
    api: Api, prefect_server: PrefectServer, agent_process: Start, tmp_path: Path
) -> None:
    pool, trace = api.create_pool(), tmp_path / "trace"
    hello = api.create_deployment("hello", pool=pool, parameters={"trace": str(trace)})
    failing = api.create_deployment("failing", pool=pool, parameters={"trace": str(trace)})
    count = 5 if prefect_server.major == 3 else 3
    ends = {api.create_run(hello): "COMPLETED" for _ in range(count)}
    ends |= {api.create_run(failing): "FAILED" for _ in range(count)}
    agents = two_agents(agent_process, prefect_server, {"pool": pool})
    check_runs(api, agents, trace, ends, 120)
    check_shared(agents, list(ends))
