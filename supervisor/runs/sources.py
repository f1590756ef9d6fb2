"""Where runs come from: one `[[work]]` table, looked up on the server and asked for what is due.

A source re-reads its pool and queues every 30 s, makes what is missing and may be made, and says once what changed: paused,
no longer paused, matched, no longer matched, refused. It never retries: a failed look-up is made again at the next poll.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

import trio

from supervisor.backend.base import Backend
from supervisor.config import Work
from supervisor.errors import BackendError, NotFound, Refused, Unauthorized, Unreachable
from supervisor.model import FlowRun, Pool, Queue

ALONE_AFTER = 2  # failed polls in a row before it is said that one queue cannot be asked
REREAD_SECONDS = 30.0  # the cache of today's agents: users expect a new queue to be seen within it

T = TypeVar("T")

_log = logging.getLogger("flow-agent")


class Source:
    """One `[[work]]` table. Owns how it stands now, what was last read of it, and what has been said about it."""

    def __init__(self, work: Work, backend: Backend) -> None:
        self.work = work
        self._backend = backend
        self._queues: list[Queue] = []
        self._deployments: list[str] = []
        self._pool: Pool | None = None
        self._read_at: float | None = None
        self._said: dict[str, str] = {}
        self._alone: dict[str, int] = {}  # queue id -> polls in a row that failed for it while others were answered

    def __str__(self) -> str:
        return str(self.work)

    def use(self, work: Work) -> None:
        """The same table with other limits or flows. It is looked up again: it may now say that what is missing be made."""
        if work != self.work:
            self.work = work
            self._read_at = None

    @property
    def pool(self) -> Pool | None:
        """The work pool, once it has been read and found usable."""
        return self._pool

    @property
    def resources(self) -> frozenset[str]:
        """The server's names for what runs of ours belong to, as far as it has been read: what its events are about."""
        work = self.work
        if work.deployments:
            return frozenset(f"prefect.deployment.{deployment}" for deployment in self._deployments)
        if work.pool is not None and not work.queues:  # with `match`, too: a queue that is new is in there
            return frozenset() if self._pool is None else frozenset({f"prefect.work-pool.{self._pool.id}"})
        return frozenset(f"prefect.work-queue.{queue.id}" for queue in self._queues)

    @property
    def is_known(self) -> bool:
        """Whether `resources` is all there is to it. With `match` there may be more at any time, and tags are no place."""
        work = self.work
        if work.match or work.tags:
            return False
        named = len(work.deployments) or len(work.queues)
        return (work.pool is None or self._pool is not None) and len(self._deployments or self._queues) == named

    @property
    def is_limited(self) -> bool:
        """Whether runs wait there for others to end that need not be ours."""
        limited = (self._pool, *self._queues)
        return any(one is not None and one.concurrency_limit is not None for one in limited)

    @property
    def holds_back(self) -> bool:
        """Whether runs may wait there of which the server would not say when they can be had: a pause, a queue that fails."""
        return bool(self._alone) or any(one is not None and one.is_paused for one in (self._pool, *self._queues))

    async def due(self, *, before: datetime, limit: int) -> list[FlowRun]:
        """The runs due before that time, in the server's order. Raises `BackendError` when the server could not be asked."""
        if self._read_at is None or trio.current_time() - self._read_at >= REREAD_SECONDS:
            await self._read()
            self._read_at = trio.current_time()
        try:
            return await self._ask(before, limit)
        except NotFound:
            self._read_at = None  # a pool or queue was deleted under us: look again next time
            raise

    async def _ask(self, before: datetime, limit: int) -> list[FlowRun]:
        work = self.work
        if work.pool is not None:
            named = bool(work.queues or work.match)
            if self._pool is None or (named and not self._queues):
                return []
            queues = [queue.name for queue in self._queues] if named else None
            return await self._backend.due_in_pool(work.pool, queues=queues, before=before, limit=limit)
        if work.deployments:
            if not self._deployments:
                return []
            return await self._backend.due_in_deployments(self._deployments, before=before, limit=limit)
        return await self._ask_each_queue(before, limit)

    async def _ask_each_queue(self, before: datetime, limit: int) -> list[FlowRun]:
        """Agent-style queues are asked one by one, so that one that fails does not stop the others."""
        found: list[FlowRun] = []
        failures: list[tuple[Queue, BackendError]] = []
        for queue in self._queues:
            try:
                found += await self._backend.due_in_queue(queue.id, before=before, limit=limit)
            except (Unreachable, Unauthorized):
                raise  # about the server, not about this queue
            except BackendError as error:
                failures.append((queue, error))
                if isinstance(error, NotFound):
                    self._read_at = None
            else:
                self._alone.pop(queue.id, None)
                if self._unsay(queue.id):
                    _log.info("work queue '%s' can be asked again", queue.name)
        if failures and len(failures) == len(self._queues):
            raise failures[0][1]  # likely about the server, too: the caller says so
        for queue, failure in failures:
            times = self._alone[queue.id] = self._alone.get(queue.id, 0) + 1
            # Once may be a busy server, or the first moment of an outage; and it is said once, whatever the next words are.
            if times >= ALONE_AFTER and queue.id not in self._said:
                self._say(queue.id, f"cannot ask work queue '{queue.name}': {failure}", logging.WARNING)
        return found

    # --- looking things up -------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        if self.work.pool is not None:
            await self._read_pool(self.work.pool)
        elif self.work.deployments:
            await self._read_deployments()
        elif self.work.match:
            self._matched(await self._backend.match_queues(self.work.match))
        else:
            self._queues = await self._named_queues()
        for queue in self._queues:
            self._announce_pause(f"work queue '{queue.name}'", paused=queue.is_paused)

    async def _read_pool(self, name: str) -> None:
        pool = await self._found(
            f"work pool '{name}'", lambda: self._backend.read_pool(name), lambda: self._backend.create_pool(name)
        )
        refusal = None if pool is None else refuse_pool(pool)
        if refusal is not None:
            self._say("pool", refusal, logging.ERROR)
        if pool is None or refusal is not None:
            self._pool, self._queues = None, []
            return
        self._unsay("pool")
        self._pool = pool
        self._announce_pause(f"work pool '{name}'", paused=pool.is_paused)
        if self.work.match:
            self._matched(await self._backend.pool_queues(name, prefixes=self.work.match))
        elif self.work.queues:
            self._queues = await self._named_pool_queues(name)

    async def _named_pool_queues(self, pool: str) -> list[Queue]:
        there = {queue.name: queue for queue in await self._backend.pool_queues(pool, names=self.work.queues)}
        found = []
        for name in self.work.queues:
            if name in there:
                self._unsay(f"work queue '{name}' in work pool '{pool}'")
                found.append(there[name])
            elif (made := await self._make_pool_queue(pool, name)) is not None:
                found.append(made)
        return found

    async def _make_pool_queue(self, pool: str, name: str) -> Queue | None:
        async def missing() -> Queue:
            raise NotFound(name)

        what = f"work queue '{name}' in work pool '{pool}'"
        return await self._found(what, missing, lambda: self._backend.create_pool_queue(pool, name))

    async def _named_queues(self) -> list[Queue]:
        """Looked up one by one: one that cannot be looked up stays as it was, and does not stop the others."""
        known = {queue.name: queue for queue in self._queues}
        found: list[Queue | None] = []
        failures: list[tuple[str, BackendError]] = []
        for name in self.work.queues:
            try:
                found.append(await self._named_queue(name))
                self._unsay(f"look-up of {name}")
            except (Unreachable, Unauthorized):
                raise  # about the server, not about this queue
            except BackendError as error:
                failures.append((name, error))
                found.append(known.get(name))
        if len(failures) == len(self.work.queues):
            raise failures[0][1]
        for name, failure in failures:
            if f"look-up of {name}" not in self._said:
                self._say(f"look-up of {name}", f"cannot look up work queue '{name}': {failure}", logging.WARNING)
        return [queue for queue in found if queue is not None]

    async def _named_queue(self, name: str) -> Queue | None:
        if self.work.tags:
            return await self._backend.create_queue(name, tags=self.work.tags)
        return await self._found(
            f"work queue '{name}'", lambda: self._backend.read_queue(name), lambda: self._backend.create_queue(name)
        )

    async def _found(self, what: str, read: Callable[[], Awaitable[T]], create: Callable[[], Awaitable[T]]) -> T | None:
        """What `read` finds, else what `create` makes where that is allowed; None, said once, where it is not there."""
        try:
            found = await read()
        except NotFound:
            if not self.work.create:
                self._say(what, f"there is no {what}; make it, or set create = true in [[work]]", logging.WARNING)
                return None
        else:
            self._unsay(what)
            return found
        try:
            made = await create()
        except Refused as error:
            self._say(what, f"cannot create {what}: {error}", logging.ERROR)
            return None
        _log.info("created %s", what)
        self._unsay(what)
        return made

    async def _read_deployments(self) -> None:
        found = []
        for name in self.work.deployments:
            try:
                found.append((await self._backend.find_deployment(name)).id)
            except NotFound:
                self._say(
                    name, f"there is no deployment '{name}' (yet); deploy it, or correct [[work]]", logging.WARNING
                )
            else:
                self._unsay(name)
        self._deployments = found

    def _matched(self, queues: list[Queue]) -> None:
        before = {queue.name for queue in self._queues}
        now = {queue.name for queue in queues}
        if new := now - before:
            _log.info("Matched new work queues: %s", ", ".join(sorted(new)))
        if gone := before - now:
            _log.info("Work queues no longer matched: %s", ", ".join(sorted(gone)))
        if not now and not before:
            self._say("match", f"no work queue matches {self} yet; looking again every 30 s", logging.INFO)
        self._queues = queues

    # --- saying things once ------------------------------------------------------------------------------------------

    def _announce_pause(self, what: str, *, paused: bool) -> None:
        if paused:
            self._say(f"pause of {what}", f"{what} is paused; its runs start when it is resumed", logging.WARNING)
        elif self._unsay(f"pause of {what}"):
            _log.info("%s is no longer paused", what)

    def _say(self, about: str, sentence: str, level: int) -> None:
        if self._said.get(about) != sentence:
            self._said[about] = sentence
            _log.log(level, "%s", sentence)

    def _unsay(self, about: str) -> bool:
        return self._said.pop(about, None) is not None


def refuse_pool(pool: Pool) -> str | None:
    """Why an agent that runs processes cannot serve this pool, as a sentence; None when it can."""
    if pool.type == "process":
        return None
    if pool.type == "prefect-agent":
        reason = "only serves agent-style work queues; name them with queues = [...] and leave pool out"
    elif pool.type.endswith(":push"):
        reason = "is a push pool: the server submits its runs itself and offers them to nobody"
    elif pool.type.endswith(":managed"):
        reason = "is a managed pool: Prefect Cloud runs its flows itself and offers them to nobody"
    else:
        reason = "needs a worker of its own type; use a pool of type 'process' for this agent"
    return f"cannot take runs from work pool '{pool.name}': it is of type '{pool.type}' and {reason}"
