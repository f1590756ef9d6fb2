"""How an agent goes that is told to stop."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio

from supervisor.config import Stop
from supervisor.lifecycle import Claiming, Exit, Exited, Phase, ProcessRef, Running, Starting
from supervisor.runs.departure import OWING_SECONDS, Departure
from tests.fakes import on_jumping_clock

PHASES = {
    "its claim is in doubt": Claiming(transition_id="t"),
    "it waits for its job": Starting(attempt=1),
    "its end is not told": Exited(how=Exit(code=0)),
}


@dataclass
class FakeRun:
    phase: Phase

    def ask_to_stop(self, *_: object, **__: object) -> None:
        """Deaf."""


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
    ref = ProcessRef(pid=1, start_ticks=1, boot_id="b")
    assert await leave(Running(process=ref, attempt=1), lost=True) is None
