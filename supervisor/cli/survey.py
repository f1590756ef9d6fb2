"""What `flow-agent check --server` finds: each thing the configuration names, looked up and never made.

A look-up that fails is a row of the table, not the end of it: people want to see everything that is wrong at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from uuid import UUID

import msgspec

from supervisor.backend.base import Backend
from supervisor.config import Config, Credentials, Work
from supervisor.errors import BackendError, InterpreterError, NotFound, Unauthorized
from supervisor.model import Pool, Queue, Server
from supervisor.process.interpreter import Interpreter
from supervisor.runs.sources import refuse_pool


class Row(msgspec.Struct, frozen=True):
    """One line of the table."""

    what: str
    found: str
    verdict: str = "ok"
    usable: bool = True


Inspect = Callable[[Path], Awaitable[Interpreter]]


async def survey(config: Config, backend: Backend, *, inspect: Inspect, secrets: Credentials) -> list[Row]:
    """Every row, in the order people read: the server, whether it lets us in, what work there is, the interpreters."""
    asked = _Survey(backend)
    server = await asked.server(config.api.url)
    if asked.server_lost:
        work = [Row(str(work), "not looked up", "unknown") for work in config.work]
    else:
        work = [row for work in config.work for row in await asked.work(work)]
    # Where a command of the user's own starts the flows, that Python is not used.
    pythons = dict.fromkeys(work.flows.python for work in config.work if work.flows.command is None)
    return [server, asked.login(secrets), *work, *[await _interpreter(one, inspect, asked.who) for one in pythons]]


class _Survey:
    """Asks one server. Owns what it has learned of it: who it is, whether it answers, whether it lets us in."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.who: Server | None = None
        self.server_lost = False
        self._refusal: str | None = None  # why it does not let us in

    async def server(self, url: str) -> Row:
        try:
            self.who = await self._backend.hello()
        except Unauthorized as error:
            self._refusal = str(error)
            return Row("server", url, "answers, but does not let us in", usable=False)
        except BackendError as error:
            self.server_lost = True
            return Row("server", url, str(error), usable=False)
        return Row("server", f"Prefect {self.who.version} at {url}")

    def login(self, secrets: Credentials) -> Row:
        """Whether the calls made so far were let in: some servers tell their version to everybody."""
        shown = " and ".join(
            name for name, value in (("API key", secrets.api_key), ("auth string", secrets.auth_string)) if value
        )
        if self._refusal is not None:
            advice = "refused" if shown else "refused: set api.api_key_file or api.auth_string_file"
            return Row("credentials", shown or "none", f"{advice} ({self._refusal})", usable=False)
        if self.server_lost:
            return Row("credentials", shown or "none", "unknown")
        return Row("credentials", shown or "none", "accepted" if shown else "none needed")

    async def work(self, work: Work) -> list[Row]:
        if work.deployments:
            return [await self._deployment(name) for name in work.deployments]
        if work.pool is not None:
            return await self._pool(work.pool, work)
        if work.match:
            return [await self._matching(work.match, "", lambda: self._backend.match_queues(work.match))]
        return [await self._queue(name, create=work.create) for name in work.queues]

    async def _deployment(self, name: str) -> Row:
        what = f"deployment '{name}'"
        try:
            found = await self._backend.find_deployment(name)
        except BackendError as error:
            return self._failed(what, error, create=False)
        if found.paused:
            return Row(what, "found, paused", "ok; its schedules make no runs until it is resumed")
        return Row(what, "found")

    async def _pool(self, name: str, work: Work) -> list[Row]:
        what = f"pool '{name}'"
        try:
            pool = await self._backend.read_pool(name)
        except BackendError as error:
            inside = (_queue_title(queue, name) for queue in work.queues)
            missing = self._failed(what, error, create=work.create)
            return [missing, *(self._failed(title, error, create=work.create) for title in inside)]
        if refusal := refuse_pool(pool):
            return [Row(what, _pool_words(pool), refusal, usable=False)]
        verdict = "ok; its runs start when it is resumed" if pool.is_paused else "ok"
        return [Row(what, _pool_words(pool), verdict), *await self._pool_queues(name, work)]

    async def _pool_queues(self, pool: str, work: Work) -> list[Row]:
        inside = f" of pool '{pool}'"
        if work.match:
            return [
                await self._matching(work.match, inside, lambda: self._backend.pool_queues(pool, prefixes=work.match))
            ]
        try:
            found = {queue.name: queue for queue in await self._backend.pool_queues(pool, names=work.queues)}
        except BackendError as error:
            return [self._failed(f"queues{inside}", error, create=work.create)]
        if not work.queues:
            return [Row(f"queues{inside}", _names(found.values()))]
        return [
            _queue_row(_queue_title(name, pool), found[name])
            if name in found
            else _missing(_queue_title(name, pool), create=work.create)
            for name in work.queues
        ]

    async def _queue(self, name: str, *, create: bool) -> Row:
        try:
            return _queue_row(_queue_title(name), await self._backend.read_queue(name))
        except BackendError as error:
            return self._failed(_queue_title(name), error, create=create and not _is_uuid(name))

    async def _matching(self, prefixes: Iterable[str], inside: str, ask: Callable[[], Awaitable[list[Queue]]]) -> Row:
        what = "queues " + ", ".join(f"'{prefix}*'" for prefix in prefixes) + inside
        try:
            found = await ask()
        except BackendError as error:
            return self._failed(what, error, create=False)
        return Row(what, _names(found), "ok" if found else "ok; taken up when there are any")

    def _failed(self, what: str, error: BackendError, *, create: bool) -> Row:
        if isinstance(error, NotFound):
            return _missing(what, create=create)
        if isinstance(error, Unauthorized):
            self._refusal = self._refusal or str(error)
            return Row(what, "not shown to us", "see credentials", usable=False)
        return Row(what, "unknown", str(error), usable=False)


def _missing(what: str, *, create: bool) -> Row:
    if create:
        return Row(what, "missing", "ok; would be created")
    return Row(what, "missing", "must be made first, or its name corrected", usable=False)


def _queue_title(name: str, pool: str | None = None) -> str:
    return f"queue '{name}'" + (f" of pool '{pool}'" if pool else "")


def _queue_row(what: str, queue: Queue) -> Row:
    if queue.is_paused:
        return Row(what, "found, paused", "ok; its runs start when it is resumed")
    return Row(what, "found")


def _pool_words(pool: Pool) -> str:
    limit = "" if pool.concurrency_limit is None else f", limit {pool.concurrency_limit}"
    return f"type {pool.type}{', paused' if pool.is_paused else ''}{limit}"


def _names(queues: Iterable[Queue]) -> str:
    return ", ".join(queue.name + (" (paused)" if queue.is_paused else "") for queue in queues) or "none"


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


async def _interpreter(python: Path, inspect: Inspect, server: Server | None) -> Row:
    what = "flows' python"
    try:
        found = await inspect(python)
    except InterpreterError as error:
        return Row(what, str(python), str(error), usable=False)
    shown = f"Prefect {found.prefect_version} in {python}"
    major = found.prefect_version.partition(".")[0]
    if server is not None and major != str(server.major):
        return Row(what, shown, f"Prefect {major} flows cannot talk to a Prefect {server.major} server", usable=False)
    return Row(what, shown)
