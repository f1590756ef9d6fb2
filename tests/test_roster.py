"""Capacity, admission, and the offers that are left alone for a while."""

from __future__ import annotations

from typing import Any

import trio

from supervisor.config import Poll, Work
from supervisor.errors import ServerTrouble
from supervisor.lifecycle import StopReason
from supervisor.model import FlowRun, StateType
from supervisor.runs.canceller import OUTLIVE_SECONDS, Canceller
from supervisor.runs.claim import NotOurs
from supervisor.runs.health import ServerHealth
from supervisor.runs.roster import REFUSED_SECONDS, Roster
from supervisor.runs.sources import Source
from tests.fakes import (
    FakeBackend,
    QuietPulse,
    ShortRun,
    lives,
    offer,
    on_jumping_clock,
    poller_of,
    roster_of,
    work,
)


@on_jumping_clock
async def test_slots_are_counted_from_the_live_runs() -> None:
    source = Source(work(pool="p"), FakeBackend())
    roster = roster_of(2, lives(10))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        assert [roster.admit(offer(f"r{n}"), source) for n in range(3)] == [True, True, False]
        assert roster.free() == 0
        await trio.sleep(11)
        assert roster.free() == 2


@on_jumping_clock
async def test_a_run_that_is_live_is_not_admitted_twice() -> None:
    source = Source(work(pool="p"), FakeBackend())
    roster = roster_of(None, lives(10))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        assert roster.admit(offer(), source)
        assert not roster.admit(offer(), source)


@on_jumping_clock
async def test_a_table_with_a_limit_of_its_own_leaves_the_rest_to_others() -> None:
    narrow, wide = Source(work(pool="narrow", limit=1), FakeBackend()), Source(work(pool="wide"), FakeBackend())
    roster = roster_of(3, lives(10))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        assert [roster.admit(offer(f"n{n}"), narrow) for n in range(2)] == [True, False]
        assert [roster.admit(offer(f"w{n}"), wide) for n in range(3)] == [True, True, False]


@on_jumping_clock
async def test_a_refused_run_is_left_alone_for_a_while_and_others_are_not() -> None:
    source = Source(work(pool="p"), FakeBackend())
    roster = roster_of(None, lambda run, src: ShortRun(run, src, 0, NotOurs(reason="no")))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        roster.admit(offer("r1"), source)
        await trio.sleep(1)
        assert not roster.admit(offer("r1"), source)
        assert roster.admit(offer("r2"), source)
        await trio.sleep(REFUSED_SECONDS)
        assert roster.admit(offer("r1"), source)


@on_jumping_clock
async def test_a_full_deployment_rests_with_all_its_runs_and_other_deployments_go_on() -> None:
    source = Source(work(pool="p"), FakeBackend())
    full = NotOurs(reason="full", deployment_full=True)
    roster = roster_of(None, lambda run, src: ShortRun(run, src, 0, full))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        roster.admit(offer("a1", deployment="a"), source)
        await trio.sleep(1)
        assert not roster.admit(offer("a2", deployment="a"), source)
        assert roster.admit(offer("b1", deployment="b"), source)


@on_jumping_clock
async def test_runs_beyond_a_full_deployments_page_are_still_reached() -> None:
    """Thirty runs of a full deployment come first in the server's order; the one behind them must not starve."""
    backend = FakeBackend(*[offer(f"a{n}", deployment="a") for n in range(30)], offer("b", deployment="b"))
    started: list[str] = []

    def start(offered: FlowRun, source: Source) -> ShortRun:
        if offered.deployment_id == "a":
            return ShortRun(offered, source, 0, NotOurs(reason="full", deployment_full=True))
        started.append(offered.id)
        return ShortRun(offered, source, 1000)

    backend.queues["q"] = backend.queues["q"] if "q" in backend.queues else await backend.create_queue("q")
    roster = roster_of(1, start)
    poller = poller_of(Source(work(queues=("q",)), backend), roster)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(poller.run)
        await trio.sleep(60)
        assert started == ["b"]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_freed_slot_polls_at_once() -> None:
    backend = FakeBackend(offer("r1"), offer("r2"))
    started: list[tuple[str, float]] = []

    def start(offered: FlowRun, source: Source) -> ShortRun:
        backend.set_state(offered.id, StateType.RUNNING)
        started.append((offered.id, trio.current_time()))
        return ShortRun(offered, source, 7.0)

    roster = roster_of(1, start)
    poller = poller_of(Source(work(queues=("q",)), backend), roster, interval_seconds=100.0)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(poller.run)
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert [run for run, _ in started] == ["r1", "r2"]
    assert 7.0 <= started[1][1] - started[0][1] < 7.5


@on_jumping_clock
async def test_a_source_that_fails_backs_off_and_does_not_slow_another() -> None:
    good, bad = FakeBackend(), FakeBackend()
    await good.create_queue("q")
    await bad.create_queue("q")
    bad.always["due_in_queue"] = ServerTrouble("500")
    roster = roster_of(None, lives(1))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        for backend in (good, bad):
            nursery.start_soon(poller_of(Source(work(queues=("q",)), backend), roster, interval_seconds=5.0).run)
        await trio.sleep(600)
        nursery.cancel_scope.cancel()
    assert good.count("due_in_queue") >= 115
    assert 10 <= bad.count("due_in_queue") <= 16  # 5, 10, 20, 40, 60, 60, …


def cancelling(backend: FakeBackend) -> tuple[Canceller, Roster, list[ShortRun]]:
    """A canceller, the roster it asks for, and the runs that are started there, which are long."""
    runs: list[ShortRun] = []

    def start(offered: FlowRun, source: Source) -> ShortRun:
        runs.append(ShortRun(offered, source, 10_000))
        return runs[-1]

    roster = roster_of(None, start)
    pulse: Any = QuietPulse()
    canceller = Canceller(backend, roster, ServerHealth("u"), pulse, poll=Poll(jitter=0.0), turn_seconds=9)
    return canceller, roster, runs


@on_jumping_clock
async def test_a_cancellation_is_asked_of_the_run_with_the_reason_people_gave() -> None:
    backend = FakeBackend(offer())
    canceller, roster, runs = cancelling(backend)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(canceller.run)
        await trio.sleep(20)
        assert backend.count("cancelling") == 0  # nothing to ask for while nothing runs
        roster.admit(offer(), Source(work(pool="p"), backend))
        backend.set_state("r1", StateType.CANCELLING)
        await trio.sleep(6)
        assert runs[0].asked[0][0] is StopReason.CANCEL
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_failing_cancellation_poll_backs_off_and_comes_back() -> None:
    backend = FakeBackend(offer())
    backend.faults["cancelling"] = [ServerTrouble("500")] * 5
    canceller, roster, runs = cancelling(backend)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        roster.admit(offer(), Source(work(pool="p"), backend))
        backend.set_state("r1", StateType.CANCELLING)
        nursery.start_soon(canceller.run)
        await trio.sleep(600)
        assert runs[0].asked
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_run_that_outlives_its_cancellation_is_ended() -> None:
    """A server takes a cancellation that nobody has carried out for done, whatever still runs."""
    backend = FakeBackend(offer())
    canceller, roster, runs = cancelling(backend)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        roster.admit(offer(), Source(work(pool="p"), backend))
        backend.set_state("r1", StateType.CANCELLED)
        nursery.start_soon(canceller.run)
        await trio.sleep(OUTLIVE_SECONDS - 1)
        assert not runs[0].asked  # its engine may be on its way out
        await trio.sleep(30)
        assert runs[0].asked[0][0] is StopReason.CANCEL
        nursery.cancel_scope.cancel()


def test_the_work_of_a_run_is_the_table_it_came_from() -> None:
    table = work(pool="p")
    assert isinstance(table, Work)
    assert ShortRun(offer(), Source(table, FakeBackend()), 0).work is table
