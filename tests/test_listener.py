"""Push: who is woken by what the server says, how often it is asked beside that, and what a websocket's troubles cost."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import pytest
import trio

from supervisor.config import Poll, Work
from supervisor.errors import BackendError, LostAnswer, ServerTrouble, Unreachable
from supervisor.model import FlowRun, Notice, Pool, Queue, StateType
from supervisor.runs.canceller import Canceller
from supervisor.runs.health import ServerHealth
from supervisor.runs.listener import Listener
from supervisor.runs.pollers import Pollers
from supervisor.runs.roster import Roster
from supervisor.runs.sources import Source
from tests.fakes import FakeBackend, QuietPulse, ShortRun, offer, on_jumping_clock, poller_of, roster_of, work

SLOW = 30.0  # between polls beside a websocket that works


class Ear:
    """One websocket that a test says things by."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Notice | BackendError](10_000)

    def say(self, name: str, run: str, *about: str) -> None:
        subject = f"prefect.flow-run.{run}"
        self._send.send_nowait(Notice(name=f"prefect.flow-run.{name}", subject=subject, about={subject, *about}))  # type: ignore[arg-type]

    def end(self, error: BackendError | None = None) -> None:
        self._send.send_nowait(error or LostAnswer("the server closed it (1000)"))

    async def next(self) -> Notice:
        said = await self._receive.receive()
        if isinstance(said, BackendError):
            raise said
        return said


class TalkingBackend(FakeBackend):
    """A server that says by itself what happens, when a test makes it. Keeps what was listened for."""

    def __init__(self, *runs: FlowRun) -> None:
        super().__init__(*runs)
        self.ears: list[tuple[Ear, set[str], set[str]]] = []  # with names and resources
        self.major = 3

    async def generation(self) -> int:
        return self.major

    @asynccontextmanager
    async def listen(self, names: Sequence[str], resources: Sequence[str]) -> AsyncIterator[Ear]:
        await self._call("listen")
        self.ears.append((Ear(), set(names), set(resources)))
        yield self.ears[-1][0]

    async def due_in_pool(self, pool: str, *, before: datetime, **values: Any) -> list[FlowRun]:
        found = self._offers(200, before)  # as it was when the server looked, which is before the answer has arrived
        await super().due_in_pool(pool, before=before, **values)
        return found

    @property
    def ear(self) -> Ear:
        return self.ears[-1][0]

    def asked(self, pool: str) -> int:
        return sum(method == "due_in_pool" and about[0] == pool for method, about in self.calls)


class Scene:
    """A listener with all that it wakes, for the time of a block. Runs live until the test ends."""

    def __init__(self, backend: TalkingBackend, tables: Sequence[Work], limit: int | None = None, **poll: Any) -> None:
        self.backend = backend
        self.poll = Poll(**{"jitter": 0.0, "interval_seconds": 5.0, "cancel_interval_seconds": 5.0, **poll})
        self.runs: list[ShortRun] = []
        self.roster: Roster = roster_of(limit, self._start)
        for table in tables:
            if table.pool is not None:
                backend.pools.setdefault(table.pool, Pool(id=f"id-{table.pool}", name=table.pool, type="process"))
        self.pollers = Pollers(tables, self._poller)
        pulse: Any = QuietPulse()
        health = ServerHealth("http://server/api")
        self.canceller = Canceller(backend, self.roster, health, pulse, poll=self.poll, turn_seconds=9)
        self.listener = Listener(backend, self.roster, self.pollers, self.canceller, poll=self.poll)

    def _start(self, offered: FlowRun, source: Source) -> ShortRun:
        self.backend.set_state(offered.id, StateType.RUNNING)
        self.runs.append(ShortRun(offered, source, 1e6))
        return self.runs[-1]

    def _poller(self, table: Work) -> Any:
        poll: Any = {name: getattr(self.poll, name) for name in ("interval_seconds", "max_backoff_seconds")}
        return poller_of(Source(table, self.backend), self.roster, **poll)

    @asynccontextmanager
    async def acted(self, settle: float = 100.0) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            self.roster.open(nursery)
            for service in (self.pollers.run, self.canceller.run, self.listener.run):
                nursery.start_soon(service)
            await trio.sleep(settle)
            self.backend.calls.clear()
            yield
            nursery.cancel_scope.cancel()


def add_run(backend: FakeBackend, name: str) -> None:
    """A run that is due from now on."""
    other = FakeBackend(offer(name))
    backend.runs |= other.runs
    backend.states |= other.states
    backend.histories |= other.histories


POOL_A, POOL_B = "prefect.work-pool.id-a", "prefect.work-pool.id-b"


@on_jumping_clock
async def test_what_the_server_says_wakes_the_table_it_concerns_at_once_and_no_other() -> None:
    backend = TalkingBackend()
    scene = Scene(backend, [work(pool="a"), work(pool="b")], interval_seconds=3600.0)
    async with scene.acted():
        add_run(backend, "r1")
        backend.ear.say("Scheduled", "r1", POOL_A, "prefect.flow.x")
        await trio.sleep(0.01)
        assert [run.id for run in scene.runs] == ["r1"]
        await trio.sleep(60)
        assert (backend.asked("a"), backend.asked("b")) == (2, 0), "and once more, for a database that was late"
        assert backend.ears[-1][2] == {POOL_A, POOL_B}
        assert len(backend.ears) == 1
        assert scene.listener.describe() == ", push"


@on_jumping_clock
async def test_a_hundred_words_at_once_cost_a_few_polls() -> None:
    backend = TalkingBackend()
    async with Scene(backend, [work(pool="a")], interval_seconds=3600.0).acted():
        for number in range(100):
            backend.ear.say("Scheduled", f"r{number}", POOL_A)
            await trio.sleep(0.01)
        await trio.sleep(30)
        assert 6 <= backend.asked("a") <= 10


@on_jumping_clock
async def test_a_word_that_comes_in_the_middle_of_a_poll_is_not_lost() -> None:
    backend = TalkingBackend()
    scene = Scene(backend, [work(pool="a")], limit=10, interval_seconds=3600.0)
    async with scene.acted():
        backend.delay = 2.0
        for name, happens in (
            ("r1", lambda: backend.ear.say("Scheduled", "r1", POOL_A)),
            ("r2", lambda: scene.roster.use(12)),  # a slot is freed
        ):
            scene.roster.use(11 if name == "r2" else None)  # polls
            await trio.sleep(1)  # the answer is under way
            add_run(backend, name)
            happens()
            await trio.sleep(10)
            assert scene.runs[-1].id == name


@on_jumping_clock
async def test_a_cancellation_that_the_server_says_is_looked_for_at_once_if_it_is_ours() -> None:
    backend = TalkingBackend(offer("r1"))
    scene = Scene(backend, [work(pool="a")], cancel_interval_seconds=3600.0)
    async with scene.acted():
        backend.ear.say("Cancelling", "somebody-elses", POOL_A)
        await trio.sleep(10)
        assert backend.count("cancelling") == 0
        assert backend.asked("a") == 0, "there is no limit that it makes room in"
        backend.set_state("r1", StateType.CANCELLING)
        backend.ear.say("Cancelling", "r1", POOL_A)
        await trio.sleep(0.01)
        assert [run.asked[0][1] for run in scene.runs] == ["Cancelled on request."]


@on_jumping_clock
async def test_beside_a_websocket_that_works_polls_are_slow_and_never_quicker_than_they_shall_be() -> None:
    backend = TalkingBackend(offer("r1"))
    async with Scene(backend, [work(pool="a")], interval_seconds=5.0, cancel_interval_seconds=100.0).acted():
        await trio.sleep(600)
        assert backend.asked("a") == pytest.approx(600 / SLOW, abs=1)
        assert backend.count("cancelling") == 6


@on_jumping_clock
async def test_what_the_server_would_not_say_is_asked_for_as_often_as_without_a_websocket() -> None:
    """Queues that may come to match, pools that are paused, offers that were left alone for a while."""
    backend = TalkingBackend()
    backend.queues["q-1"] = Queue(id="id-q-1", name="q-1")
    backend.pools["paused"] = Pool(id="x", name="paused", type="process", is_paused=True)
    tables = [work(match=("q-",)), work(pool="paused"), work(queues=("missing",), create=False)]
    async with Scene(backend, tables, interval_seconds=5.0).acted():
        await trio.sleep(100)
        assert backend.count("due_in_queue") == pytest.approx(20, abs=1)
        assert backend.asked("paused") == pytest.approx(20, abs=1)
        assert backend.ears[-1][2] == {"prefect.work-queue.id-q-1", "prefect.work-pool.x"}


@on_jumping_clock
async def test_a_limit_of_the_pool_makes_the_ends_of_others_runs_a_reason_to_ask() -> None:
    backend = TalkingBackend()
    backend.pools["a"] = Pool(id="id-a", name="a", type="process", concurrency_limit=2)
    async with Scene(backend, [work(pool="a"), work(pool="b")], interval_seconds=3600.0).acted():
        assert "prefect.flow-run.Completed" in backend.ears[-1][1]
        backend.ear.say("Completed", "somebody-elses", POOL_A)
        backend.ear.say("Completed", "another", POOL_B)
        await trio.sleep(0.01)
        assert (backend.asked("a"), backend.asked("b")) == (1, 0)


@on_jumping_clock
async def test_after_any_end_of_the_websocket_all_is_asked_for_as_before_until_it_is_back() -> None:
    backend = TalkingBackend()
    scene = Scene(backend, [work(pool="a")])
    async with scene.acted():
        backend.always["listen"] = LostAnswer("hang")
        backend.ear.end()
        await trio.sleep(1)
        assert backend.asked("a") >= 1, "nobody knows what has been missed"
        assert scene.listener.describe() == ""
        await trio.sleep(60)
        backend.calls.clear()
        await trio.sleep(100)
        assert backend.asked("a") == pytest.approx(20, abs=1)
        del backend.always["listen"]
        await trio.sleep(200)
        assert scene.listener.describe() == ", push"
        add_run(backend, "r1")
        backend.ear.say("Late", "r1", POOL_A)
        await trio.sleep(0.01)
        assert len(scene.runs) == 1


@on_jumping_clock
async def test_a_connection_is_made_again_at_once_after_a_long_one_and_less_and_less_often_after_short_ones() -> None:
    backend = TalkingBackend()
    async with Scene(backend, [work(pool="a")]).acted():
        for _ in range(12):
            backend.ear.end()
            await trio.sleep(100)
        assert backend.count("listen") == 12
        backend.calls.clear()
        for _ in range(600):
            if len(backend.ears) and backend.ear._send.statistics().current_buffer_used == 0:
                backend.ear.end()
            await trio.sleep(1)
        assert backend.count("listen") <= 10


@on_jumping_clock
async def test_where_there_are_no_websockets_it_costs_a_try_now_and_then_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flow-agent")
    backend = TalkingBackend()
    backend.always["listen"] = ServerTrouble("cannot open a websocket: 500")
    async with Scene(backend, [work(pool="a")]).acted(settle=0):
        await trio.sleep(3600)
        assert 10 <= backend.count("listen") <= 15
        assert backend.asked("a") >= 720
    said = [record.message for record in caplog.records if "by itself" in record.message]
    assert len(said) == 1
    assert "what is due: cannot open a websocket: 500. It is asked every 5 s instead" in said[0]


@on_jumping_clock
async def test_a_server_that_is_away_is_looked_for_as_often_as_the_polls_do_and_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flow-agent")
    backend = TalkingBackend()
    scene = Scene(backend, [work(pool="a")])
    async with scene.acted():
        caplog.clear()
        backend.always = {method: Unreachable("refused") for method in ("listen", "due_in_pool", "read_pool")}
        backend.ear.end()
        await trio.sleep(3600)
        assert 55 <= backend.count("listen") <= 70
        backend.always.clear()
        await trio.sleep(61)
        assert scene.listener.describe() == ", push"
    assert not [
        record.message for record in caplog.records if "says" in record.message or "by itself" in record.message
    ]


@on_jumping_clock
async def test_a_server_of_prefect_2_is_not_tried_and_asked_more_often_while_something_happens() -> None:
    backend = TalkingBackend()
    backend.major = 2
    scene = Scene(backend, [work(pool="a")], interval_seconds=5.0)
    async with scene.acted():
        await trio.sleep(100)
        assert backend.asked("a") == pytest.approx(20, abs=1)
        add_run(backend, "r1")
        await trio.sleep(6)
        assert len(scene.runs) == 1
        backend.calls.clear()
        await trio.sleep(20)
        assert 19 <= backend.asked("a") <= 21, "one run is seldom alone"
        await trio.sleep(30)
        backend.calls.clear()
        await trio.sleep(100)
        assert backend.asked("a") == pytest.approx(20, abs=1)
        assert backend.count("listen") == 0


@on_jumping_clock
async def test_what_the_server_says_does_not_press_it_while_it_fails() -> None:
    backend = TalkingBackend()
    async with Scene(backend, [work(pool="a")]).acted():
        backend.always["due_in_pool"] = ServerTrouble("503")
        for _ in range(100):
            backend.ear.say("Scheduled", "r", POOL_A)
            await trio.sleep(1)
        assert backend.asked("a") <= 6


@on_jumping_clock
async def test_other_tables_and_pools_that_come_and_go_are_listened_for_anew() -> None:
    backend = TalkingBackend()
    scene = Scene(backend, [work(pool="a")])
    async with scene.acted():
        backend.pools["a"] = Pool(id="other", name="a", type="process")  # deleted, and made anew
        await trio.sleep(100)
        assert backend.ears[-1][2] == {"prefect.work-pool.other"}
        backend.pools["b"] = Pool(id="id-b", name="b", type="process")
        scene.pollers.use([work(pool="b")], scene.poll, 10.0)
        await trio.sleep(10)
        assert backend.ears[-1][2] == {POOL_B}
        assert len(backend.ears) == 3


@on_jumping_clock
async def test_push_can_be_turned_off_and_on_by_a_reload() -> None:
    backend = TalkingBackend()
    scene = Scene(backend, [work(pool="a")], push=False)

    async def use(*, push: bool) -> None:
        poll = Poll(jitter=0.0, interval_seconds=5.0, push=push)
        scene.pollers.use([work(pool="a")], poll, 10.0)
        scene.canceller.use(poll, 9)
        scene.listener.use(poll)
        await trio.sleep(100)
        backend.calls.clear()
        await trio.sleep(120)
        assert backend.asked("a") == pytest.approx(120 / (SLOW if push else 5.0), abs=1)

    async with scene.acted():
        await use(push=False)
        assert len(backend.ears) == 0
        await use(push=True)
        assert scene.listener.describe() == ", push"
        await use(push=False)
        assert scene.listener.describe() == ""
        assert len(backend.ears) == 1


@on_jumping_clock
async def test_cancellations_are_asked_for_as_before_while_a_run_lives_whose_table_is_gone() -> None:
    backend = TalkingBackend(offer("r1"))
    scene = Scene(backend, [work(pool="a")])
    async with scene.acted():
        backend.pools["b"] = Pool(id="id-b", name="b", type="process")
        scene.pollers.use([work(pool="b")], scene.poll, 10.0)
        await trio.sleep(100)
        backend.calls.clear()
        await trio.sleep(100)
        assert backend.count("cancelling") == pytest.approx(20, abs=1)


@on_jumping_clock
async def test_a_websocket_that_opens_is_a_sign_that_a_server_that_failed_answers_again() -> None:
    backend = TalkingBackend(offer("r1"))
    scene = Scene(backend, [work(pool="a")], interval_seconds=3600.0, cancel_interval_seconds=3600.0)
    async with scene.acted():
        backend.always = {method: Unreachable("refused") for method in ("listen", "due_in_pool", "cancelling")}
        backend.ear.end()
        await trio.sleep(100)
        backend.always.clear()
        add_run(backend, "r2")
        await trio.sleep(61)
        assert [run.id for run in scene.runs] == ["r1", "r2"]
        assert backend.count("cancelling") >= 2


@on_jumping_clock
async def test_a_websocket_that_opens_is_no_reason_to_ask_before_the_time_that_the_server_has_named() -> None:
    backend = TalkingBackend()
    async with Scene(backend, [work(pool="a")]).acted():
        backend.always = {"due_in_pool": ServerTrouble("429", retry_after=300.0)}
        asked = backend.asked("a")
        backend.ear.end()
        await trio.sleep(250)
        assert backend.asked("a") == asked + 1
        await trio.sleep(100)
        assert backend.asked("a") == asked + 2
