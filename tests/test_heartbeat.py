"""supervisor/runs/heartbeat.py: what a pool hears of its worker, on a clock that jumps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import trio

from supervisor.config import Poll
from supervisor.errors import BackendError, ServerTrouble, Unreachable
from supervisor.runs.health import ServerHealth
from supervisor.runs.heartbeat import Heartbeat
from supervisor.runs.sources import Source
from tests.fakes import FakeBackend, QuietTeller, on_jumping_clock, work


@pytest.mark.parametrize(
    ("error", "calls"), [(ServerTrouble("503"), 3), (Unreachable("refused"), 1)], ids=["busy", "away"]
)
@on_jumping_clock
async def test_a_server_that_is_busy_is_told_again_that_we_leave_and_one_that_is_away_is_not(
    error: BackendError, calls: int
) -> None:
    backend = FakeBackend()
    source = Source(work(pool="p"), backend)
    await source.due(before=datetime(2026, 1, 1, tzinfo=UTC), limit=1)
    told: Any = QuietTeller()
    heartbeat = Heartbeat(backend, [source], told, ServerHealth("u"), worker="w", poll=Poll())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heartbeat.run)
        await trio.sleep(1)
        backend.faults["sign_off"] = [error, error]
        await heartbeat.sign_off()
        nursery.cancel_scope.cancel()
    assert backend.count("sign_off") == calls


@on_jumping_clock
async def test_nothing_is_heard_after_the_good_bye() -> None:
    """Neither a heartbeat that was on its way nor the next one puts a worker on the list again that has left."""
    backend, teller = FakeBackend(), QuietTeller()
    source = Source(work(pool="p"), backend)
    await source.due(before=datetime(2026, 1, 1, tzinfo=UTC), limit=1)
    poll, quiet = Poll(heartbeat_seconds=2.0, jitter=0.0), ServerHealth("u")
    told: Any = teller
    heartbeat = Heartbeat(backend, [source], told, quiet, worker="w", poll=poll)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heartbeat.run)
        await trio.sleep(1)
        backend.delay = 1.5  # the server is busy
        await trio.sleep(2)
        assert backend.calls[-1] == ("heartbeat", "p")  # on its way
        before = trio.current_time()
        await heartbeat.sign_off()
        assert 1.5 < trio.current_time() - before < 3  # it has waited for that one
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert [call for call, _ in backend.calls if call in ("heartbeat", "sign_off")][-1] == "sign_off"
