"""What must hold for every agent and every run, whatever went wrong on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from tests.agents import AgentProcess
from tests.servers import TERMINAL, Api
from tests.waiting import wait_until

LOST = "lost the server at"
BACK = "answers again after"
REFUSED = "refuses our credentials"


def executions(trace: Path) -> Counter[str]:
    """How often the body of each run was executed."""
    return Counter(line.split()[0] for line in trace.read_text().splitlines()) if trace.exists() else Counter()


def lines(agent: AgentProcess, text: str) -> list[str]:
    """The lines of the agent's log that hold this text."""
    return [line for line in agent.log().splitlines() if text in line]


def check_agent(agent: AgentProcess) -> None:
    """The agent lives and has seen no bug of its own."""
    assert agent.returncode is None, agent.log()
    for sign in ("Traceback", "internal error", "giving up"):
        assert sign not in agent.log(), agent.log()


def check_runs(api: Api, agents: Collection[AgentProcess], trace: Path, ends: dict[str, str], timeout: float) -> None:
    """Each run comes to the end named for it, had its body executed exactly once, and leaves no process."""
    for run_id, end in ends.items():
        api.wait_for_state(run_id, end, timeout)
    assert executions(trace) == Counter(ends.keys()), {run_id: api.story(run_id) for run_id in ends}
    for agent in agents:
        wait_until(
            lambda agent=agent: not agent.run_processes(),  # type: ignore[misc]
            15,
            "no process of the runs is left",
            more=agent.log,
        )
        check_agent(agent)
    for run_id, end in ends.items():
        kinds = [kind for kind, _ in api.states(run_id)]
        assert kinds[-1] == end, api.story(run_id)
        assert kinds.count("PENDING") <= 2, api.story(run_id)  # the claim, and on 3.x Submitting
        # A forced report that was delivered twice is stored twice; it still says the same.
        assert {kind for kind in kinds if kind in TERMINAL} == {end}, api.story(run_id)
