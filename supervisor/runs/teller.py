"""What is told about a run beside its states: pid, labels, lines in its log, events. The words are those of Prefect's workers.

All of it is courtesy: tried a few times, and a server that does not listen changes nothing. Only the pid is worth more
patience: a run without one is taken for not started when somebody cancels it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import trio

from supervisor.backend.base import Backend
from supervisor.errors import BackendError, NotFound, Refused
from supervisor.model import FlowRun, Job, LogRecord, Pool
from supervisor.runs.patience import Patience

_log = logging.getLogger("flow-agent")

WORKER_TYPE = "process"
COURTESY_TRIES = 3
T = TypeVar("T")


class Teller:
    """Speaks of runs on behalf of this agent."""

    def __init__(self, backend: Backend, patience: Patience, *, worker: str, version: str) -> None:
        self._backend = backend
        self._patience = patience
        self._worker = worker
        self._version = version

    async def started(self, run: FlowRun, job: Job, pid: int) -> str | None:
        """The run's process has started. Returns the id of the event that said so, where the server takes events."""
        lines = (
            f"Worker '{self._worker}' submitting flow run '{run.id}'",
            f"Completed submission of flow run '{run.id}': process {pid} on {socket.gethostname()}",
        )
        now = datetime.now(UTC)
        records = [LogRecord(run_id=run.id, level=logging.INFO, message=line, at=now) for line in lines]
        await self._courtesy(lambda: self._backend.write_logs(records))
        labels = {"prefect.worker.name": self._worker, "prefect.worker.type": WORKER_TYPE}
        if job.pool is not None:
            labels |= {"prefect.work-pool.name": job.pool.name, "prefect.work-pool.id": job.pool.id}
        await self._courtesy(lambda: self._backend.label_run(run.id, labels))
        return await self._event("prefect.worker.submitted-flow-run", self._related(run, job, {}))

    async def pid(self, run_id: str, pid: int) -> str:
        """Stores where the run's process is, in the form of the server's generation; returns that."""
        try:
            generation = await self._patience.until_answered(self._backend.generation)
            where = f"{socket.gethostname()}:{pid}" if generation < 3 else str(pid)
            await self._patience.until_answered(lambda: self._backend.patch_infrastructure(run_id, where))
        except (NotFound, Refused) as error:
            _log.debug("cannot store the pid of flow run %s: %s", run_id, error)
            return str(pid)
        return where

    async def gone(self, run_id: str) -> None:
        """No process of the run lives and it will be offered again: cancelled meanwhile, it is nobody's to end."""
        with contextlib.suppress(NotFound, Refused):
            await self._patience.until_answered(lambda: self._backend.patch_infrastructure(run_id, None))

    async def ended(self, run: FlowRun, job: Job, pid: int, code: int, follows: str | None) -> None:
        """The run's process has ended."""
        facts = {"prefect.infrastructure.identifier": str(pid), "prefect.infrastructure.status-code": str(code)}
        await self._event("prefect.worker.executed-flow-run", self._related(run, job, facts), follows)

    async def bad_end(self, run_id: str, message: str, *, unless_there: bool = False) -> None:
        """A line of ours in the run's log that must get through; `unless_there`: it may have been written before."""
        record = LogRecord(run_id=run_id, level=logging.ERROR, message=message, at=datetime.now(UTC))
        try:
            if unless_there and await self._patience.until_answered(lambda: self._backend.has_log(run_id, message)):
                return
            await self._patience.until_answered(lambda: self._backend.write_logs([record]))
        except (NotFound, Refused) as error:
            _log.warning("cannot write to the log of flow run %s: %s", run_id, error)

    async def worker(self, event: str, pool: Pool, follows: str | None = None) -> str | None:
        """An event about this agent itself: `prefect.worker.started` or `prefect.worker.stopped`."""
        return await self._event(event, [_resource("work-pool", pool.id, pool.name)], follows)

    async def _event(self, event: str, related: list[Mapping[str, str]], follows: str | None = None) -> str | None:
        slug = "".join(letter if letter.isalnum() else "-" for letter in self._worker.lower()).strip("-")
        resource = {
            "prefect.resource.id": f"prefect.worker.{WORKER_TYPE}.{slug}",
            "prefect.resource.name": self._worker,
            "prefect.version": self._version,
            "prefect.worker-type": WORKER_TYPE,
        }
        return await self._courtesy(
            lambda: self._backend.emit(event, resource=resource, related=related, follows=follows)
        )

    def _related(self, run: FlowRun, job: Job, facts: Mapping[str, str]) -> list[Mapping[str, str]]:
        related: list[Mapping[str, str]] = []
        if job.deployment_id is not None:
            related.append(_resource("deployment", job.deployment_id, job.deployment_name))
        related.append(_resource("flow", run.flow_id, job.flow_name))
        related.append({**_resource("flow-run", run.id, run.name), **facts})
        if job.pool is not None:
            related.append(_resource("work-pool", job.pool.id, job.pool.name))
        related += [
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in sorted(run.tags)
        ]
        return related

    async def _courtesy(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """The call, tried a few times: a server on SQLite answers 503 just when many runs start at once."""
        backoff = self._patience.backoff()
        for _ in range(COURTESY_TRIES):
            try:
                return await call()
            except (NotFound, Refused) as error:
                _log.debug("not told: %s", error)
                break
            except BackendError as error:
                _log.debug("not told yet: %s", error)
                backoff.failed(error)
                await trio.sleep(backoff.delay())
        return None


def _resource(role: str, identity: str, name: str | None) -> dict[str, str]:
    found = {"prefect.resource.id": f"prefect.{role}.{identity}", "prefect.resource.role": role}
    return found | ({"prefect.resource.name": name} if name else {})
