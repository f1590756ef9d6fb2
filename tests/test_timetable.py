"""Offers that are not due yet: kept without a slot, begun in time, dropped when they are offered no more."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest
import trio

from supervisor.config import Poll
from supervisor.model import FlowRun
from supervisor.runs.claim import NotOurs
from supervisor.runs.clock import ServerClock
from supervisor.runs.roster import Roster
from supervisor.runs.sources import Source
from supervisor.runs.timetable import MOST, Timetable
from tests.fakes import EPOCH, FakeBackend, ShortRun, lives, offer, on_jumping_clock, poller_of, roster_of, wall, work

Started = list[tuple[str, float]]


def due(run_id: str, seconds: float, **values: Any) -> FlowRun:
    return offer(run_id, expected_start=EPOCH + timedelta(seconds=seconds), **values)


class Waiting:
    """A timetable, and what it has begun when. `places`: how many it may begin."""

    def __init__(self, places: int = 1000) -> None:
        self.begun: Started = []
        self.places = places
        self.clock_set = 0.0
        self.table = Timetable(self.admit, ServerClock(lambda: wall() + timedelta(seconds=self.clock_set)))
        self.source = Source(work(pool="p"), FakeBackend())

    def admit(self, offered: FlowRun, source: Source) -> bool:
        if len(self.begun) >= self.places:
            return False
        self.begun.append((offered.id, trio.current_time()))
        return True

    def offered(self, *offers: FlowRun, whole: bool = True, lead: float = 2.0) -> tuple[int, int]:
        return self.table.offered(self.source, offers, lambda _: lead, whole=whole)


@on_jumping_clock
async def test_what_is_due_is_begun_at_once_in_the_servers_order_and_the_rest_in_time() -> None:
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.table.run)
        offers = (due("later", 60), due("late", -5), due("at any time", 0), due("nearly", 1.9), due("soon", 10))
        assert waiting.offered(*offers) == (3, 2)
        assert [run for run, _ in waiting.begun] == ["late", "at any time", "nearly"]
        assert len(waiting.table) == 2
        await trio.sleep(100)
        assert waiting.begun[3:] == [("soon", pytest.approx(8.0)), ("later", pytest.approx(58.0))]
        assert len(waiting.table) == 0
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_run_that_is_offered_no_more_is_not_begun_and_one_that_is_offered_anew_at_its_new_time() -> None:
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.table.run)
        waiting.offered(due("cancelled", 10), due("moved", 10), due("kept", 10))
        await trio.sleep(3)
        waiting.offered(due("moved", 30), due("kept", 10))
        await trio.sleep(100)
        assert waiting.begun == [("kept", pytest.approx(8.0)), ("moved", pytest.approx(28.0))]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_an_answer_that_may_not_be_the_whole_list_drops_nothing() -> None:
    waiting = Waiting()
    waiting.offered(due("hidden", 10))
    waiting.offered(due("first", 5), whole=False)
    assert len(waiting.table) == 2


@on_jumping_clock
async def test_a_source_that_is_forgotten_begins_nothing_any_more_and_others_do() -> None:
    waiting, other = Waiting(), Source(work(pool="other"), FakeBackend())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.table.run)
        waiting.offered(due("gone", 10))
        waiting.table.offered(other, [due("theirs", 10)], lambda _: 2.0, whole=True)
        waiting.table.forget(waiting.source)
        await trio.sleep(100)
        assert [run for run, _ in waiting.begun] == ["theirs"]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_clock_that_is_set_makes_nothing_late() -> None:
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.table.run)
        waiting.offered(due("r1", 3600), due("r2", 9999))
        await trio.sleep(10)
        waiting.clock_set = 3600  # or the machine has slept
        await trio.sleep(1.1)
        assert [run for run, _ in waiting.begun] == ["r1"]
        assert waiting.table.describe() == ", 1 to come"
        nursery.cancel_scope.cancel()
    assert waiting.table.describe() == ""  # an agent that stops begins nothing more


@on_jumping_clock
async def test_no_more_is_kept_of_a_source_than_a_page_and_it_is_what_comes_first() -> None:
    waiting = Waiting()
    for start in (1000, 0):
        waiting.offered(*[due(f"r{start + n}", 10 + start + n) for n in range(MOST)], whole=False)
    assert len(waiting.table) == MOST
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.table.run)
        await trio.sleep(10_000)
        assert [run for run, _ in waiting.begun] == [f"r{n}" for n in range(MOST)]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_one_that_finds_no_place_at_its_time_is_left_to_the_next_poll() -> None:
    waiting = Waiting(places=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.table.run)
        waiting.offered(due("r1", 10))
        await trio.sleep(20)
        assert len(waiting.table) == 0
        waiting.places = 1
        assert waiting.offered(due("r1", 10)) == (1, 0)
        nursery.cancel_scope.cancel()


# --- polls and the timetable ---------------------------------------------------------------------------------------------


def polling(backend: FakeBackend, roster: Roster, **poll: float) -> tuple[Any, Timetable]:
    timetable = Timetable(roster.admit, ServerClock(wall))
    return poller_of(Source(work(queues=("q",)), backend), roster, timetable, **poll), timetable


@on_jumping_clock
async def test_no_run_falls_between_two_polls_and_none_is_taken_earlier_than_it_may_be() -> None:
    backend = FakeBackend(*[due(f"r{n}", 5 + 10 * n) for n in range(30)])
    await backend.create_queue("q")
    started: Started = []
    roster = roster_of(None, lives(1, started))
    poller, timetable = polling(backend, roster, interval_seconds=30.0)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(poller.run)
        nursery.start_soon(timetable.run)
        await trio.sleep(400)
        nursery.cancel_scope.cancel()
    when = dict(started)  # the fake goes on offering what has been begun: the last time counts for nothing
    first = {run: min(at for name, at in started if name == run) for run in when}
    leads = [5 + 10 * n - first[f"r{n}"] for n in range(30)]
    assert min(leads) > 0.5
    assert max(leads) < 10  # prefetch_seconds


@on_jumping_clock
async def test_with_no_prefetch_a_run_is_taken_when_it_is_due() -> None:
    backend = FakeBackend(due("r1", 10))
    await backend.create_queue("q")
    started: Started = []
    roster = roster_of(1, lives(1000, started))
    poller, timetable = polling(backend, roster)
    poller.use(poller.source.work, Poll(jitter=0.0), 0.0)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(poller.run)
        nursery.start_soon(timetable.run)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert started == [("r1", pytest.approx(10.0))]


@on_jumping_clock
async def test_what_is_due_is_not_hidden_behind_a_crowd_that_is_to_come() -> None:
    """Servers put priority before time."""
    backend = FakeBackend(*[due(f"r{n}", 15) for n in range(300)], due("due", -1))
    await backend.create_queue("q")
    started: Started = []
    roster = roster_of(1, lives(1000, started))
    poller, _ = polling(backend, roster, interval_seconds=30.0)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        await poller.poll_once()
        assert [run for run, _ in started] == ["due"]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_asked_once_it_takes_what_is_within_prefetch_and_nothing_that_comes_later() -> None:
    backend = FakeBackend(due("r1", 9), due("r2", 11))
    await backend.create_queue("q")
    started: Started = []
    roster = roster_of(None, lives(1, started))
    poller, timetable = polling(backend, roster)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        await poller.poll_once(hold=False)
    assert [run for run, _ in started] == ["r1"]
    assert len(timetable) == 0


@on_jumping_clock
async def test_a_table_that_is_gone_or_has_other_times_leaves_nothing_on_the_timetable() -> None:
    backend = FakeBackend(due("r1", 25))
    await backend.create_queue("q")
    roster = roster_of(None, lives(1))
    poller, timetable = polling(backend, roster, interval_seconds=30.0)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(poller.run)
        await trio.sleep(1)
        assert len(timetable) == 1
        poller.use(poller.source.work, Poll(jitter=0.0, interval_seconds=1.0), 3.0)
        await trio.sleep(1)
        assert len(timetable) == 0  # four seconds are all it has to look ahead now
        poller.use(poller.source.work, Poll(jitter=0.0, interval_seconds=30.0), 3.0)
        await trio.sleep(1)
        assert len(timetable) == 1
        poller.end()
        await trio.sleep(1)
        assert len(timetable) == 0
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_refused_run_that_is_scheduled_anew_need_not_rest() -> None:
    source = Source(work(pool="p"), FakeBackend())
    roster = roster_of(None, lambda run, src: ShortRun(run, src, 0, NotOurs(reason="no")))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        assert roster.admit(offer("r1"), source)
        await trio.sleep(1)
        assert not roster.admit(offer("r1"), source)
        assert roster.admit(msgspec.structs.replace(offer("r1"), state_id="another"), source)
