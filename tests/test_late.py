"""A claim that is stored a second time, when its run has ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from supervisor.config import Poll
from supervisor.errors import ServerTrouble
from supervisor.lifecycle.record import Record
from supervisor.model import State, StateType
from supervisor.runs.health import ServerHealth
from supervisor.runs.late import WAITING, LateClaims
from supervisor.runs.patience import Patience
from tests.fakes import FakeBackend, offer, on_jumping_clock, record_of


def executed(end: StateType = StateType.COMPLETED) -> tuple[FakeBackend, Record, State]:
    """A run that was claimed twice and has ended; and the claim that may be stored yet."""
    backend, record = FakeBackend(offer()), record_of(offer())
    claim = State(type=StateType.PENDING, name="Pending", id="claim", transition_id=record.claim_id)
    running = State(type=StateType.RUNNING, name="Running", id="running")
    ended = State(type=end, name="Own name", id="end", data={"x": 1})
    backend.histories["r1"] += [claim, claim, running, ended]  # ordered by proposal, as servers do
    backend.states["r1"] = ended
    return backend, record, claim


async def watch(backend: FakeBackend, record: Record, meanwhile: Callable[[], Awaitable[None]]) -> None:
    late = LateClaims(backend, Patience(Poll(), ServerHealth("http://server/api")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(late.run)
        late.claimed_twice(record)
        await meanwhile()
        await trio.sleep(WAITING * 2)
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_the_end_is_put_back_that_a_late_claim_has_overwritten() -> None:
    backend, record, claim = executed()

    async def arrive() -> None:
        await trio.sleep(WAITING / 2)
        backend.states["r1"] = claim
        backend.faults["read_run"] = [ServerTrouble("503")]

    await watch(backend, record, arrive)
    now = backend.states["r1"]
    assert (now.type, now.name, now.data) == (StateType.COMPLETED, "Own name", {"x": 1})


@on_jumping_clock
async def test_a_run_that_no_late_claim_came_upon_is_left_alone() -> None:
    backend, record, _ = executed()
    await watch(backend, record, trio.lowlevel.checkpoint)
    assert not backend.proposals


@on_jumping_clock
async def test_a_run_that_still_waits_for_its_engine_is_left_alone() -> None:
    backend, record, claim = executed()
    backend.histories["r1"] = [claim]
    backend.states["r1"] = claim
    await watch(backend, record, trio.lowlevel.checkpoint)
    assert not backend.proposals
