"""What an agent says about itself and for its runs: heartbeats, log lines, events."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from supervisor.backend.rest.api import Api
from supervisor.backend.rest.wire import WireLog, clean, decode, segment
from supervisor.errors import NotFound
from supervisor.model import LogRecord

BATCH_BYTES = 500_000  # of messages in one request; servers and proxies refuse bodies of a few megabytes
MESSAGE_BYTES = 900_000  # of one message; Prefect's own clients stop at 1 MB
_BATCH_RECORDS = 500
_LAST_RECORDS = 200
_CUT = "\n… (cut here by flow-agent: the line was too long for the server)"


async def heartbeat(api: Api, pool: str, worker: str, interval_seconds: float) -> None:
    body = {"name": worker, "heartbeat_interval_seconds": max(1, math.ceil(interval_seconds))}
    await api.post(f"/work_pools/{segment(pool)}/workers/heartbeat", body)


async def sign_off(api: Api, pool: str, worker: str) -> None:
    try:
        await api.delete(f"/work_pools/{segment(pool)}/workers/{segment(worker)}")
    except NotFound:
        return  # it is off the list, which is what we want


async def write_logs(api: Api, records: Sequence[LogRecord]) -> None:
    """Stores the records in order, in as many requests as their size needs.

    When one of several requests fails, those before it are stored: a caller that sends all again repeats lines.
    """
    for batch in _batches(records):
        await api.post("/logs/", batch)


async def has_log(api: Api, run_id: str, message: str) -> bool:
    """Whether one of the last lines of the run's log says exactly this."""
    body = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": _LAST_RECORDS, "sort": "TIMESTAMP_DESC"}
    lines = decode(list[WireLog], await api.post("/logs/filter", body), "a flow run's log")
    wanted, _ = _fit(clean(message))
    return any(line.message == wanted for line in lines)


def _batches(records: Sequence[LogRecord]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for record in records:
        message, length = _fit(clean(record.message))
        if batch and (size + length > BATCH_BYTES or len(batch) == _BATCH_RECORDS):
            yield batch
            batch, size = [], 0
        # No other keys: servers of one's own refuse a `worker_id`.
        batch.append(
            {
                "name": record.logger,
                "level": record.level,
                "message": message,
                "timestamp": record.at,
                "flow_run_id": record.run_id,
            }
        )
        size += length
    if batch:
        yield batch


def _fit(message: str) -> tuple[str, int]:
    """The message, cut when it is too long, and its size in bytes."""
    raw = message.encode()
    if len(raw) <= MESSAGE_BYTES:
        return message, len(raw)
    return raw[: MESSAGE_BYTES - len(_CUT.encode())].decode(errors="ignore") + _CUT, MESSAGE_BYTES


async def emit(
    api: Api,
    event: str,
    *,
    resource: Mapping[str, str],
    related: Sequence[Mapping[str, str]],
    follows: str | None,
) -> str:
    """Sends one event and returns its id. Raises `NotFound` when the server takes no events."""
    event_id = str(uuid.uuid4())
    body = {
        "id": event_id,
        "occurred": datetime.now(UTC),
        "event": event,
        "resource": dict(resource),
        "related": [dict(one) for one in related],
        "payload": {},
        "follows": follows,
    }
    await api.post("/events", [body])
    return event_id
