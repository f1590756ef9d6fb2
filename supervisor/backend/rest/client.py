"""The `Backend` for Prefect 2.20 and 3.x. What is asked and answered is in the modules by subject; here is the door."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime

from supervisor.backend.rest import events, runs, sources
from supervisor.backend.rest import worker as workers
from supervisor.backend.rest.api import Api
from supervisor.backend.rest.job import Common, read_job
from supervisor.backend.rest.wire import WireRun, decode
from supervisor.errors import NotFound, ServerTrouble
from supervisor.model import Deployment, FlowRun, Job, LogRecord, Pool, Proposal, Queue, Server, State, Verdict

_NEWEST = 3  # the generation assumed where a server does not tell: Prefect Cloud


class RestBackend:
    """One server.

    Mutable state, changed here only: what `{{ $NAME }}` is filled from, which server answered `hello`, and that it has no
    place for events.
    """

    def __init__(self, api: Api, environ: Mapping[str, str] | None = None) -> None:
        """`environ` is what `{{ $NAME }}` in a base job template may be filled from."""
        self._api = api
        self._environ = dict(environ or {})
        self._server: Server | None = None
        self._events = True
        self._common = Common(api)

    def use(self, environ: Mapping[str, str]) -> None:
        """What `{{ $NAME }}` is filled from, from now on."""
        self._environ = dict(environ)

    async def hello(self) -> Server:
        try:
            version = await self._api.get("/admin/version")
        except NotFound:  # Prefect Cloud does not say
            await self._probe()
            self._server = Server(version="cloud", major=_NEWEST)
            return self._server
        if not isinstance(version, str) or not re.match(r"\d+[.+]", version):
            raise ServerTrouble(
                f"cannot tell the server's version: it answered {str(version)[:60]!r}, which is not Prefect 2 or 3; "
                "see api.url"
            )
        # A checkout of Prefect may call itself "0+unknown"; nobody runs one of Prefect 2 any more.
        self._server = Server(version=version, major=int(re.split(r"[.+]", version)[0]) or _NEWEST)
        return self._server

    async def _probe(self) -> None:
        """One question that only a Prefect API answers. Raises `ServerTrouble` when it is not one."""
        try:
            answer = await self._api.post("/flow_runs/filter", {"limit": 1})
        except NotFound:
            raise ServerTrouble(
                "cannot find Prefect's API at api.url: the server knows neither /admin/version nor /flow_runs; "
                "the URL of a server of your own usually ends in /api"
            ) from None
        decode(list[WireRun], answer, "flow runs")

    async def generation(self) -> int:
        return (self._server or await self.hello()).major

    # --- where work comes from -------------------------------------------------------------------------------------

    async def read_pool(self, name: str) -> Pool:
        return await sources.read_pool(self._api, name)

    async def create_pool(self, name: str) -> Pool:
        return await sources.create_pool(self._api, name)

    async def pool_queues(self, pool: str, *, names: Sequence[str] = (), prefixes: Sequence[str] = ()) -> list[Queue]:
        return await sources.pool_queues(self._api, pool, names=names, prefixes=prefixes)

    async def create_pool_queue(self, pool: str, name: str) -> Queue:
        return await sources.create_pool_queue(self._api, pool, name)

    async def read_queue(self, name_or_id: str) -> Queue:
        return await sources.read_queue(self._api, name_or_id)

    async def match_queues(self, prefixes: Sequence[str]) -> list[Queue]:
        return await sources.match_queues(self._api, prefixes)

    async def create_queue(self, name: str, *, tags: Sequence[str] | None = None) -> Queue:
        return await sources.create_queue(self._api, name, tags=tags)

    async def find_deployment(self, name: str) -> Deployment:
        return await sources.find_deployment(self._api, name)

    async def due_in_pool(
        self, pool: str, *, queues: Sequence[str] | None, before: datetime, limit: int
    ) -> list[FlowRun]:
        return await sources.due_in_pool(self._api, pool, queues=queues, before=before, limit=limit)

    async def due_in_queue(self, queue_id: str, *, before: datetime, limit: int) -> list[FlowRun]:
        return await sources.due_in_queue(self._api, queue_id, before=before, limit=limit)

    async def due_in_deployments(self, ids: Sequence[str], *, before: datetime, limit: int) -> list[FlowRun]:
        return await sources.due_in_deployments(self._api, ids, before=before, limit=limit)

    # --- one run ---------------------------------------------------------------------------------------------------

    async def read_run(self, run_id: str) -> FlowRun:
        return await runs.read_run(self._api, run_id)

    async def history(self, run_id: str) -> list[State]:
        return await runs.history(self._api, run_id)

    async def propose(self, run_id: str, proposal: Proposal) -> Verdict:
        return await runs.propose(self._api, run_id, proposal)

    async def job(self, run: FlowRun) -> Job:
        generation = await self.generation()
        return await read_job(self._api, run, generation, environ=self._environ, common=self._common)

    async def patch_infrastructure(self, run_id: str, pid: str | None) -> None:
        await runs.patch_infrastructure(self._api, run_id, pid)

    async def label_run(self, run_id: str, labels: Mapping[str, str]) -> None:
        if await self.generation() >= 3:
            await runs.label_run(self._api, run_id, labels)

    async def renew_lease(self, lease_id: str, seconds: float) -> None:
        await runs.renew_lease(self._api, lease_id, seconds)

    async def cancelling(self, run_ids: Sequence[str]) -> dict[str, State]:
        return await runs.cancelling(self._api, run_ids)

    def listen(self, names: Sequence[str], resources: Sequence[str]) -> AbstractAsyncContextManager[events.Notices]:
        return events.listen(self._api, names, resources)

    # --- about us --------------------------------------------------------------------------------------------------

    async def heartbeat(self, pool: str, worker: str, interval_seconds: float) -> None:
        await workers.heartbeat(self._api, pool, worker, interval_seconds)

    async def sign_off(self, pool: str, worker: str) -> None:
        await workers.sign_off(self._api, pool, worker)

    async def write_logs(self, records: Sequence[LogRecord]) -> None:
        await workers.write_logs(self._api, records)

    async def has_log(self, run_id: str, message: str) -> bool:
        return await workers.has_log(self._api, run_id, message)

    async def emit(
        self,
        event: str,
        *,
        resource: Mapping[str, str],
        related: Sequence[Mapping[str, str]] = (),
        follows: str | None = None,
    ) -> str | None:
        if not self._events:
            return None
        try:
            return await workers.emit(self._api, event, resource=resource, related=related, follows=follows)
        except NotFound:  # Prefect 2 without its experimental events
            self._events = False
            return None
