"""What Prefect 2.20 and 3.x put on the wire, and our values made from it.

Lenient where the rest of the house is strict: unknown keys are ignored and almost everything may be missing or null,
because servers grow. Both forms of time (`…Z` and `…+00:00`) are RFC 3339, which msgspec reads by itself.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from supervisor.errors import ServerTrouble
from supervisor.model import Answer, Deployment, FlowRun, Pool, Queue, State, StateType, Verdict

PAGE = 200  # servers refuse to give more at once
AGENT_POOL = "default-agent-pool"  # where agent-style queues live
_STATE_TYPES = {str(known): known for known in StateType}

T = TypeVar("T")


def decode(kind: type[T], answer: Any, what: str) -> T:
    """`answer` as that type. Raises `ServerTrouble` when it is something else: then Prefect is not what answers."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as problem:
        raise ServerTrouble(
            f"cannot read {what}: the server answered something that is not Prefect's API: {problem}"
        ) from None


def segment(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def is_uuid(text: str) -> bool:
    """Whether this is an id rather than a name."""
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def clean(text: str) -> str:
    """Text that every server can store: PostgreSQL takes no NUL, and JSON no half of a surrogate pair."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _utc(when: datetime | None) -> datetime | None:
    if when is None:
        return None
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


class WireStateDetails(msgspec.Struct):
    transition_id: str | None = None
    pause_reschedule: bool | None = None
    deployment_concurrency_lease_id: str | None = None


class WireState(msgspec.Struct):
    type: str
    name: str | None = None
    id: str | None = None
    message: str | None = None
    state_details: WireStateDetails | None = None
    data: Any = None
    timestamp: datetime | None = None

    def model(self) -> State:
        kind = _STATE_TYPES.get(self.type)
        if kind is None:
            raise ServerTrouble(f"cannot read a state: its type {self.type!r} is newer than this agent")
        details = self.state_details or WireStateDetails()
        return State(
            type=kind,
            name=self.name or kind.capitalize(),
            id=self.id,
            message=self.message,
            transition_id=details.transition_id,
            lease_id=details.deployment_concurrency_lease_id,
            pause_reschedule=bool(details.pause_reschedule),
            data=self.data,
            at=_utc(self.timestamp),
        )


class WireLog(msgspec.Struct):
    message: str


class WirePolicy(msgspec.Struct):
    retry_type: str | None = None


class WireRun(msgspec.Struct):
    id: str
    flow_id: str
    name: str | None = None
    deployment_id: str | None = None
    state_id: str | None = None
    state_type: str | None = None
    state_name: str | None = None
    state: WireState | None = None
    expected_start_time: datetime | None = None
    next_scheduled_start_time: datetime | None = None
    start_time: datetime | None = None
    empirical_policy: WirePolicy | None = None
    work_queue_name: str | None = None
    work_pool_name: str | None = None
    infrastructure_pid: str | None = None
    tags: list[str] | None = None
    job_variables: dict[str, Any] | None = None
    run_count: int | None = None

    def model(self, *, pool: str | None = None) -> FlowRun:
        """Our value; `pool` where the question named it and the answer does not."""
        return FlowRun(
            id=self.id,
            name=self.name or self.id,
            flow_id=self.flow_id,
            deployment_id=self.deployment_id,
            state_id=self.state_id,
            state_type=_STATE_TYPES.get(self.state_type or ""),
            state_name=self.state_name,
            state=None if self.state is None else self.state.model(),
            # A retry or a resumed run is due later than it was first expected to be.
            expected_start=_utc(self.next_scheduled_start_time or self.expected_start_time),
            started=_utc(self.start_time),
            retry_in_process=self.empirical_policy is not None and self.empirical_policy.retry_type == "in_process",
            work_queue_name=self.work_queue_name,
            work_pool_name=self.work_pool_name or pool,
            infrastructure_pid=self.infrastructure_pid,
            tags=tuple(self.tags or ()),
            job_variables=self.job_variables or {},
            run_count=self.run_count or 0,
        )


class WireOffer(msgspec.Struct):
    """One entry of a pool's answer."""

    flow_run: WireRun


class WireVerdictDetails(msgspec.Struct):
    reason: str | None = None
    delay_seconds: float | None = None


class WireVerdict(msgspec.Struct):
    status: Answer
    state: WireState | None = None
    details: WireVerdictDetails | None = None

    def model(self) -> Verdict:
        details = self.details or WireVerdictDetails()
        return Verdict(
            answer=self.status,
            state=None if self.state is None else self.state.model(),
            reason=details.reason,
            delay_seconds=details.delay_seconds,
        )


class WirePool(msgspec.Struct):
    id: str
    name: str
    type: str
    is_paused: bool | None = None
    concurrency_limit: int | None = None
    status: str | None = None

    def model(self) -> Pool:
        return Pool(
            id=self.id,
            name=self.name,
            type=self.type,
            is_paused=bool(self.is_paused),
            concurrency_limit=self.concurrency_limit,
            status=self.status,
        )


class WireFilter(msgspec.Struct):
    """The deprecated filter of a queue made with `--tag`."""

    tags: list[str] | None = None


class WireQueue(msgspec.Struct):
    id: str
    name: str
    is_paused: bool | None = None
    work_pool_name: str | None = None
    priority: int | None = None
    concurrency_limit: int | None = None
    filter: WireFilter | None = None

    def model(self) -> Queue:
        return Queue(
            id=self.id,
            name=self.name,
            is_paused=bool(self.is_paused),
            pool_name=self.work_pool_name,
            priority=self.priority,
            concurrency_limit=self.concurrency_limit,
        )


class WireDeployment(msgspec.Struct):
    id: str
    name: str
    flow_id: str
    paused: bool | None = None

    def model(self) -> Deployment:
        return Deployment(id=self.id, name=self.name, flow_id=self.flow_id, paused=bool(self.paused))
