"""A claim that was sent twice may also be stored twice: the second time when the run has been executed and closed.

It takes a server whose database is busy for longer than the run lasts, and an answer to the first claim that nobody waits for
any more. Such a run would stand as PENDING for ever. So it is looked at once more when no request can be waiting any longer.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import trio

from supervisor.backend.base import Backend
from supervisor.errors import NotFound, Refused
from supervisor.lifecycle.record import SUBMITTING, Record
from supervisor.runs.claim import put_back, taken_over
from supervisor.runs.patience import Patience

# Seconds after which a server has given up on a request that waits for its database (SQLite's busy_timeout in Prefect 3).
WAITING = 60.0
MOST = 1000  # of which so many are remembered, the latest

_log = logging.getLogger("flow-agent")


class LateClaims:
    """Looks again at runs whose claim was sent twice. Owns which these are; they are forgotten when the agent ends."""

    def __init__(self, backend: Backend, patience: Patience) -> None:
        self._backend = backend
        self._patience = patience
        self._send, self._receive = trio.open_memory_channel[tuple[float, Record]](MOST)

    def claimed_twice(self, record: Record) -> None:
        """To be said when the second claim has been accepted."""
        with suppress(trio.WouldBlock):
            self._send.send_nowait((trio.current_time() + WAITING, record))

    async def run(self) -> None:
        """Service: one after the other, as all wait for the same time."""
        async for when, record in self._receive:
            await trio.sleep_until(when)
            with suppress(NotFound, Refused):
                await self._patience.until_answered(lambda record=record: self._look(record))  # type: ignore[misc]

    async def _look(self, record: Record) -> None:
        run = await self._backend.read_run(record.run.id)
        ours = {record.claim_id, record.transition_id(SUBMITTING)}
        if run.state is None or run.state.transition_id not in ours:
            return
        last = taken_over(await self._backend.history(run.id), record.claim_id, ours)
        if last is not None and last.type.terminal:
            _log.warning(
                "flow run '%s' (%s): our claim was stored once more after it had ended; putting %s back",
                run.name,
                run.id,
                last.name,
            )
            await self._backend.propose(run.id, put_back(last))
