"""The loop that tells each work pool that this worker lives, and the good-bye when it stops."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import trio

from supervisor.backend.base import Backend
from supervisor.config import Poll
from supervisor.errors import BackendError, NotFound, ServerTrouble
from supervisor.model import Pool
from supervisor.runs.backoff import Backoff
from supervisor.runs.health import ServerHealth
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller

SIGN_OFF_SECONDS = 5.0  # the longest that saying good-bye may delay the agent's end
AGAIN_SECONDS = 0.5

_log = logging.getLogger("flow-agent")


class Heartbeat:
    """Speaks for the agent as a worker of the pools it serves.

    Owns which pools these are, how often they hear of us, which have heard that we started, and that we have said good-bye.
    """

    def __init__(
        self,
        backend: Backend,
        sources: Sequence[Source],
        teller: Teller,
        health: ServerHealth,
        *,
        worker: str,
        poll: Poll,
    ) -> None:
        self._backend = backend
        self._sources = sources
        self._teller = teller
        self._health = health
        self._worker = worker
        self._poll = poll
        self._interval = poll.heartbeat_seconds
        self._backoff = Backoff(poll.heartbeat_seconds, cap=poll.max_backoff_seconds, jitter=0.0)
        self._known: dict[str, tuple[Pool, str | None]] = {}  # by name, with the event that said we started
        self._nap = trio.CancelScope()
        self._speaking = trio.Lock()
        self._is_over = False

    def use(self, sources: Sequence[Source], poll: Poll) -> None:
        """Speaks to the pools of these sources from now on. Those that are no longer among them hear a good-bye."""
        if (list(sources), poll) == (list(self._sources), self._poll):
            return
        self._sources, self._poll = sources, poll
        self._interval = poll.heartbeat_seconds
        self._backoff.use(poll.heartbeat_seconds, cap=poll.max_backoff_seconds, jitter=0.0)
        self._nap.cancel()

    def _pools(self) -> list[Pool]:
        return list({source.pool.name: source.pool for source in self._sources if source.pool is not None}.values())

    async def run(self) -> None:
        """Beats until cancelled; goes on while the agent drains, so that the pool stays ready to be told of its runs."""
        while True:
            pools = self._pools()
            # By what the tables name: a pool that has not been read yet is not one that we have left.
            await self._leave({source.work.pool for source in self._sources})
            for pool in pools:
                await self._beat(pool)
            # A pool is known only after its first poll: look again soon, not a whole interval later.
            wait = self._backoff.delay() if pools else min(1.0, self._interval)
            with trio.move_on_after(wait) as self._nap:
                await trio.sleep_forever()

    async def _beat(self, pool: Pool) -> None:
        async with self._speaking:
            if not self._is_over:
                await self._say_we_live(pool)

    async def _say_we_live(self, pool: Pool) -> None:
        try:
            await self._backend.heartbeat(pool.name, self._worker, self._interval)
        except NotFound:
            self._known.pop(pool.name, None)  # deleted: the poller says so, and makes it again where it may
        except BackendError as error:
            self._health.failed(error)
            self._backoff.failed(error)
        else:
            self._health.answered()
            self._backoff.succeeded()
            if pool.name not in self._known:
                self._known[pool.name] = pool, await self._teller.worker("prefect.worker.started", pool)

    async def sign_off(self) -> None:
        """Takes the worker off its pools' lists, so that nobody takes it for lost. Bounded, and silent about failures.

        It is the last that they hear of us: a heartbeat after it would put us on the list again.
        """
        self._is_over = True
        with trio.move_on_after(SIGN_OFF_SECONDS):
            async with self._speaking:  # one may be on its way
                pass
        await self._leave(set())

    async def _leave(self, keep: Collection[str | None]) -> None:
        with trio.move_on_after(SIGN_OFF_SECONDS):
            for name in [name for name in self._known if name not in keep]:
                pool, started = self._known.pop(name)
                await self._teller.worker("prefect.worker.stopped", pool, started)
                await self._sign_off(name)

    async def _sign_off(self, pool: str) -> None:
        """A server that has no time just now is asked again; one that is away is not."""
        while True:
            try:
                await self._backend.sign_off(pool, self._worker)
            except BackendError as error:
                _log.debug("not signed off from work pool '%s': %s", pool, error)
                if not isinstance(error, ServerTrouble):
                    return
            else:
                return
            await trio.sleep(AGAIN_SECONDS)
