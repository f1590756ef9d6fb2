"""What one [[work]] table finds on the server, makes there, and says about it."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import pytest
import trio

from supervisor.errors import LostAnswer, NotFound, Refused, Unreachable
from supervisor.model import FlowRun, Pool, Queue
from supervisor.runs.sources import REREAD_SECONDS, Source, refuse_pool
from tests.fakes import FakeBackend, offer, on_jumping_clock, work


async def due(source: Source) -> list[FlowRun]:
    return await source.due(before=datetime.now(UTC), limit=10)


async def later(source: Source) -> list[FlowRun]:
    await trio.sleep(REREAD_SECONDS)
    return await due(source)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@on_jumping_clock
async def test_a_missing_pool_is_made_and_polled_with_all_its_queues() -> None:
    backend = FakeBackend(offer())
    assert [run.id for run in await due(Source(work(pool="etl"), backend))] == ["r1"]
    assert backend.count("create_pool") == 1
    assert ("due_in_pool", ("etl", None, 10)) in backend.calls


def test_a_missing_pool_is_not_made_when_the_user_said_so(said: pytest.LogCaptureFixture) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer())
        source = Source(work(pool="etl", create=False), backend)
        assert await due(source) == []
        assert await later(source) == []
        assert backend.count("create_pool") == 0
        backend.pools["etl"] = Pool(id="i", name="etl", type="process")
        assert len(await later(source)) == 1

    check()
    assert sum("there is no work pool 'etl'" in line for line in said.messages) == 1


@pytest.mark.parametrize("kind", ["prefect-agent", "ecs:push", "prefect:managed", "kubernetes"])
def test_a_pool_that_needs_something_else_is_refused_in_words_once(kind: str, said: pytest.LogCaptureFixture) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer())
        backend.pools["p"] = Pool(id="i", name="p", type=kind)
        source = Source(work(pool="p"), backend)
        for _ in range(3):
            assert await later(source) == []
        assert backend.count("due_in_pool") == 0

    check()
    assert sum(f"of type '{kind}'" in line for line in said.messages) == 1


def test_process_pools_are_not_refused() -> None:
    assert refuse_pool(Pool(id="i", name="p", type="process")) is None


def test_a_pause_is_said_once_and_its_end_once(said: pytest.LogCaptureFixture) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend()
        source = Source(work(pool="p"), backend)
        for paused in (False, True, True, True, False, False):
            backend.pools["p"] = Pool(id="i", name="p", type="process", is_paused=paused)
            await later(source)

    check()
    assert [line for line in said.messages if "paused" in line] == [
        "work pool 'p' is paused; its runs start when it is resumed",
        "work pool 'p' is no longer paused",
    ]


def test_matching_follows_queues_that_come_and_go_and_makes_none(said: pytest.LogCaptureFixture) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer())
        source = Source(work(match=("dev-",)), backend)
        assert await due(source) == []
        backend.queues = {name: Queue(id=f"id-{name}", name=name) for name in ("dev-1", "dev-2", "prod")}
        assert await due(source) == []  # not re-read yet
        await later(source)
        del backend.queues["dev-2"]
        await later(source)
        assert backend.count("create_queue") == 0
        asked = [about for name, about in backend.calls if name == "due_in_queue"]
        assert asked == ["id-dev-1", "id-dev-2", "id-dev-1"]

    check()
    assert "Matched new work queues: dev-1, dev-2" in said.messages
    assert "Work queues no longer matched: dev-2" in said.messages


@on_jumping_clock
async def test_named_queues_of_a_pool_are_made_when_missing() -> None:
    backend = FakeBackend()
    backend.pools["p"] = Pool(id="i", name="p", type="process")
    backend.queues["a"] = Queue(id="id-a", name="a", pool_name="p")
    await due(Source(work(pool="p", queues=("a", "b")), backend))
    assert backend.count("create_pool_queue") == 1
    assert backend.calls[-1] == ("due_in_pool", ("p", ["a", "b"], 10))


def test_one_failing_queue_does_not_stop_the_others(said: pytest.LogCaptureFixture) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer("r1", work_queue_name="good"))
        for name in ("bad", "good"):
            await backend.create_queue(name)
        backend.always["due_in_queue id-bad"] = LostAnswer("timed out")
        source = Source(work(queues=("bad", "good")), backend)
        for _ in range(3):
            assert [run.id for run in await due(source)] == ["r1"]

    check()
    assert sum("cannot ask work queue 'bad'" in line for line in said.messages) == 1


@on_jumping_clock
async def test_a_server_that_is_away_is_not_asked_once_for_each_queue() -> None:
    backend = FakeBackend()
    for name in "abc":
        await backend.create_queue(name)
    backend.always["due_in_queue"] = Unreachable("refused")
    with pytest.raises(Unreachable):
        await due(Source(work(queues=("a", "b", "c")), backend))
    assert backend.count("due_in_queue") == 1


@on_jumping_clock
async def test_a_pool_deleted_under_us_is_looked_up_again_and_made_anew() -> None:
    backend = FakeBackend()
    source = Source(work(pool="p"), backend)
    await due(source)
    backend.pools.clear()
    backend.faults["due_in_pool"] = [NotFound("gone")]
    with pytest.raises(NotFound):
        await due(source)
    await due(source)
    assert backend.count("create_pool") == 2


def test_a_queue_that_may_not_be_made_is_said_and_the_rest_goes_on(said: pytest.LogCaptureFixture) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer())
        await backend.create_queue("there")
        backend.faults["create_queue"] = [Refused("name too long", status=422)]
        assert len(await due(Source(work(queues=("new", "there")), backend))) == 1

    check()
    assert any("cannot create work queue 'new'" in line for line in said.messages)


@on_jumping_clock
async def test_legacy_tags_make_their_queue_with_the_tag_filter() -> None:
    backend = FakeBackend()
    await due(Source(work(queues=("Agent queue a-b",), tags=("a", "b")), backend))
    assert ("create_queue", ("Agent queue a-b", ("a", "b"))) in backend.calls


@on_jumping_clock
async def test_deployments_that_do_not_exist_yet_are_found_later() -> None:
    backend = FakeBackend(offer())
    assert await due(Source(work(deployments=("missing/one",)), backend)) == []
    assert len(await due(Source(work(deployments=("flow/one",)), backend))) == 1
