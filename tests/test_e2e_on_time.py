"""Scheduled runs are Running when they are due, on real servers with real engines."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.agents import AgentProcess
from tests.servers import Api, PrefectServer
from tests.waiting import SLOWEST, wait_until

StartAgent = Callable[..., AgentProcess]
PREFETCH = 5.0
LATE = 3.0 * SLOWEST  # benchmarks/ measures; this is for machines that do ten things at once
EARLY = 0.5  # the server rounds to whole seconds what is left until a run is due
CLOCKS = 0.1


def when(said: str) -> dt.datetime:
    return dt.datetime.fromisoformat(said)


def seconds_after_due(states: list[Mapping[str, Any]], kind: str) -> float:
    """How long after it was first due the run came into a state of that type."""
    first = min(states, key=lambda state: when(state["timestamp"]))
    due = when(first["state_details"]["scheduled_time"])
    return min((when(state["timestamp"]) - due).total_seconds() for state in states if state["type"] == kind)


def test_runs_are_running_when_they_are_due_and_what_is_withdrawn_before_is_never_started(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool = api.create_pool()
    deployment = api.create_deployment("hello", pool=pool)
    settings = {"limit": 2, "prefetch_seconds": PREFETCH, "log_level": "debug"}
    agent = agent_process(prefect_server, [{"pool": pool}], agent=settings, poll={"interval_seconds": 4})
    began = time.monotonic()
    api.wait_for_state(api.create_run(deployment), timeout=90)
    took = time.monotonic() - began  # that long a run takes here and now
    base = PREFETCH + 2 + took
    runs = [api.create_run(deployment, due_in=base + seconds) for seconds in (0, 1.3)]
    withdrawn = cancelled, moved, deleted = [api.create_run(deployment, due_in=base) for _ in range(3)]
    wait_until(
        lambda: all(f"({run}): due in" in agent.log() for run in withdrawn), base, "they are waited for", more=agent.log
    )
    api.set_state(cancelled, "CANCELLED")
    later = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)).isoformat()
    api.set_state(moved, "SCHEDULED", state_details={"scheduled_time": later})
    api.delete(f"/flow_runs/{deleted}")
    for run in runs:
        assert api.wait_for_state(run, timeout=90)["state_type"] == "COMPLETED"
        states = api.state_records(run)
        assert -EARLY - CLOCKS <= seconds_after_due(states, "RUNNING") <= LATE + took
        assert seconds_after_due(states, "PENDING") >= -PREFETCH - CLOCKS
    assert [kind for kind, _ in api.states(cancelled)] == ["SCHEDULED", "CANCELLED"]
    assert {kind for kind, _ in api.states(moved)} == {"SCHEDULED"}
    assert not [run for run in withdrawn if f"({run}): started" in agent.log()]
    assert agent.stop() == 0


# This machine's clock as the agent sees it: an hour ahead of the server's.
HOUR_AHEAD = """
import datetime
from supervisor.runs.clock import ServerClock
def wall():
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
ServerClock.__init__.__defaults__ = wall, *ServerClock.__init__.__defaults__[1:]
"""


def test_an_agent_whose_clock_is_an_hour_ahead_does_not_begin_runs_an_hour_early(
    server_3: PrefectServer, api_of: Callable[..., Api], agent_process: StartAgent, tmp_path: Path
) -> None:
    api = api_of(server_3)
    pool = api.create_pool()
    deployment = api.create_deployment("hello", pool=pool)
    later = [api.create_run(deployment, due_in=1800) for _ in range(2)]
    (tmp_path / "sitecustomize.py").write_text(HOUR_AHEAD)
    settings = {"limit": 2, "log_level": "debug"}
    agent = agent_process(server_3, [{"pool": pool}], agent=settings, env={"PYTHONPATH": str(tmp_path)})
    for run in later:
        wait_until(lambda run=run: f"({run}): due in" in agent.log(), 30, "it is waited for", more=agent.log)  # type: ignore[misc]
    api.wait_for_state(api.create_run(deployment), "COMPLETED", timeout=90)  # from which it learns the time
    assert [api.states(run) for run in later] == [[("SCHEDULED", "Scheduled")]] * 2
    assert agent.stop() == 0
