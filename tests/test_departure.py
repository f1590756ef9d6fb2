"""How an agent goes that is told to stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from supervisor.config import Stop, Work
from supervisor.lifecycle import Claiming, Exit, Exited, Phase, ProcessRef, Running, Starting, StopReason
from supervisor.runs.departure import ASK_SECONDS, ENDING_SECONDS, OWING_SECONDS, Departure
from supervisor.systemd.manager import Intent
from tests.fakes import on_jumping_clock, work

PHASES = {
    "its claim is in doubt": Claiming(transition_id="t"),
    "it waits for its job": Starting(attempt=1),
    "its end is not told": Exited(how=Exit(code=0)),
}


RUNNING = Running(process=ProcessRef(pid=1, start_ticks=1, boot_id="b"), attempt=1)


@dataclass
class FakeRun:
    """Deaf: it goes on whatever it is asked."""

    phase: Phase
    work: Work = field(default_factory=work)  # with a grace of 30 s
    asked: list[StopReason] = field(default_factory=list)

    def ask_to_stop(self, reason: StopReason, *_: object, **__: object) -> None:
        self.asked.append(reason)


@dataclass
class FakeRoster:
    runs: list[FakeRun] = field(default_factory=list)

    def all(self) -> list[FakeRun]:
        return self.runs

    def __len__(self) -> int:
        return len(self.runs)


async def leave(phase: Phase, *, lost: bool) -> float | None:
    """After how many seconds an agent that drains leaves its only run to the next; None: not within ten minutes."""
    runs = trio.CancelScope()
    roster = FakeRoster([FakeRun(phase)])
    departure = Departure(roster, Stop(), trio.CancelScope(), runs, lambda: lost)  # type: ignore[arg-type]
    began = trio.current_time()
    with trio.move_on_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(departure.leave_debts)
            nursery.start_soon(departure.act, "drain", "SIGTERM")
            with runs:
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
    return trio.current_time() - began if runs.cancelled_caught else None


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_runs_that_only_wait_for_a_lost_server_are_left_to_the_next_agent(phase: Phase) -> None:
    @on_jumping_clock
    async def check() -> None:
        waited = await leave(phase, lost=True)
        assert waited is not None
        assert OWING_SECONDS <= waited < OWING_SECONDS + 2

    check()


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_server_that_answers_is_waited_for(phase: Phase) -> None:
    @on_jumping_clock
    async def check() -> None:
        assert await leave(phase, lost=False) is None

    check()


@on_jumping_clock
async def test_a_process_is_not_left_because_the_server_is_lost() -> None:
    assert await leave(RUNNING, lost=True) is None


# --- what the service manager wants, and hears --------------------------------------------------------------------


class Leaving:
    """An agent with one live run that has been told to stop. Owns what its service manager would say."""

    def __init__(self, **stop: Any) -> None:
        self.run = FakeRun(RUNNING)
        self.roster = FakeRoster([self.run])
        self.runs = trio.CancelScope()
        self.wants = Intent.STOP
        self.asked: list[float] = []
        arguments = (self.roster, Stop(**stop), trio.CancelScope(), self.runs, lambda: False, self._why)
        self.departure = Departure(*arguments)  # type: ignore[arg-type]
        self._began = trio.current_time()

    async def _why(self) -> Intent:
        self.asked.append(self.now)
        return self.wants

    @property
    def now(self) -> float:
        """Seconds since it was told."""
        return trio.current_time() - self._began

    async def until_asked(self) -> float:
        """When the run was asked to stop."""
        while not self.run.asked:
            await trio.sleep(0.5)
        return self.now

    async def until_left(self) -> float:
        """When the run was left to the next agent."""
        while not self.runs.cancel_called:
            await trio.sleep(0.5)
        return self.now


@asynccontextmanager
async def leaving(why: Intent = Intent.STOP, **stop: Any) -> AsyncIterator[Leaving]:
    agent = Leaving(**stop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.departure.begin, why, "SIGTERM")
        await trio.sleep(1)
        yield agent
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_machine_that_goes_down_during_a_drain_shortens_it() -> None:
    async with leaving(shutdown_timeout_seconds=90) as agent:
        await trio.sleep(599)
        assert agent.asked == pytest.approx([ASK_SECONDS * (1 + n) for n in range(len(agent.asked))], rel=0.05)
        agent.wants = Intent.SHUTDOWN
        assert 690 <= await agent.until_asked() <= 690 + 2 * ASK_SECONDS
        assert agent.run.asked == [StopReason.SHUTDOWN]
        assert max(agent.asked) <= 600 + 2 * ASK_SECONDS  # nothing is more urgent


@on_jumping_clock
async def test_a_machine_that_goes_down_never_lengthens_a_drain() -> None:
    async with leaving(drain_timeout_seconds=100, then="keep") as agent:
        await trio.sleep(79)
        agent.wants = Intent.SHUTDOWN
        assert 100 <= await agent.until_asked() <= 101


@on_jumping_clock
async def test_a_drain_of_which_a_restart_is_made_leaves_the_runs_to_the_agent_that_comes() -> None:
    async with leaving() as agent:
        await trio.sleep(59)
        agent.wants = Intent.RESTART
        assert 60 <= await agent.until_left() <= 60 + 2 * ASK_SECONDS
        assert agent.run.asked == []


@on_jumping_clock
async def test_a_restart_that_drains_as_well_changes_nothing_about_the_bound_of_a_drain() -> None:
    async with leaving(on_restart="drain", drain_timeout_seconds=200) as agent:
        agent.wants = Intent.RESTART
        assert 200 <= await agent.until_asked() <= 201
        assert agent.run.asked == [StopReason.OPERATOR]


@on_jumping_clock
async def test_a_manager_that_no_longer_answers_does_not_turn_a_restart_into_a_stop() -> None:
    async with leaving(Intent.RESTART, on_restart="drain", on_stop="cancel") as agent:
        await trio.sleep(599)
        assert agent.run.asked == []
        agent.wants = Intent.SHUTDOWN
        await agent.until_asked()
        assert agent.run.asked == [StopReason.OPERATOR]


@on_jumping_clock
async def test_a_signal_during_a_drain_is_above_what_the_manager_wants() -> None:
    async with leaving() as agent:
        agent.departure.cancel_all("SIGTERM")
        agent.wants = Intent.SHUTDOWN
        await trio.sleep(600)
        assert agent.run.asked == [StopReason.OPERATOR]
        assert agent.asked == []


@on_jumping_clock
async def test_the_status_says_what_becomes_of_how_many_runs_and_when() -> None:
    async with leaving(then="reschedule") as agent:
        assert agent.departure.describe() == "draining: 1 live run, 24 min left, then reschedule"
        agent.roster.runs.append(FakeRun(RUNNING))
        await trio.sleep(1440)
        assert agent.departure.describe() == "draining: 2 live runs, 59 s left, then reschedule"
        await trio.sleep(60)
        assert agent.departure.describe() == "handing back: 2 live runs, 2 min left"
        agent.departure.kill_all("SIGTERM")
        assert agent.departure.describe() == "killing: 2 live runs"
        agent.roster.runs.clear()
        assert agent.departure.describe() == "stopping"
    async with leaving(Intent.SHUTDOWN) as agent:
        assert agent.departure.describe() == "machine going down: 1 live run, 89 s left, then end them"
    async with leaving(on_stop="cancel") as agent:
        assert agent.departure.describe() == "cancelling: 1 live run, 2 min left"
    async with leaving(on_stop="keep") as agent:
        assert agent.departure.describe() == "leaving 1 live run to the next flow-agent"
    assert Leaving().departure.describe() == ""


@on_jumping_clock
async def test_the_manager_is_asked_for_patience_within_our_own_bounds_and_no_longer() -> None:
    assert not Leaving().departure.in_time()  # nobody has told us to stop
    async with leaving(drain_timeout_seconds=2000) as agent:
        await trio.sleep(1900)
        assert agent.departure.in_time()
        await trio.sleep(110)
        while agent.departure.in_time():
            await trio.sleep(1)
        grace = agent.run.work.flows.grace_seconds
        assert agent.now == pytest.approx(2000 + grace + ENDING_SECONDS, abs=3)
