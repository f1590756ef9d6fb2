"""The words that the rooms share: frozen values, no behaviour that needs the outside world.

Names are Prefect's for runs, states, pools, queues and deployments. These are *our* values: `supervisor.backend` makes
them from whatever a server's generation puts on the wire, so that nobody else needs to know the generations apart.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec


class StateType(enum.StrEnum):
    """Prefect's state types, the same in 2.x and 3.x."""

    SCHEDULED = "SCHEDULED"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CRASHED = "CRASHED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    PAUSED = "PAUSED"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED})


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One state of a flow run, as the server holds it."""

    type: StateType
    name: str
    id: str | None = None
    message: str | None = None
    transition_id: str | None = None  # the proposal that made it, where the proposer named one
    lease_id: str | None = None  # deployment concurrency lease (3.x), to be renewed until the engine does
    pause_reschedule: bool = False  # PAUSED because suspended: the process has ended on purpose
    data: Any = None  # the server's record of the result, only ever handed back to it as it came
    at: datetime | None = None  # when the server was told of it, in UTC by its own clock


class FlowRun(msgspec.Struct, frozen=True, kw_only=True):
    """A flow run as the server describes it. `state` is None in offers: servers leave it out there."""

    id: str
    name: str
    flow_id: str
    deployment_id: str | None
    state_id: str | None
    state_type: StateType | None
    state_name: str | None
    state: State | None = None
    expected_start: datetime | None = None  # when it is due, in UTC
    started: datetime | None = None  # when it first became RUNNING, in UTC
    retry_in_process: bool = False  # its own engine is waiting to retry it: never ours to claim
    work_queue_name: str | None = None
    work_pool_name: str | None = None
    infrastructure_pid: str | None = None
    tags: tuple[str, ...] = ()
    job_variables: Mapping[str, Any] = {}
    run_count: int = 0


def log_extra(run: FlowRun) -> dict[str, str | None]:
    """What log records about a run carry beside their text."""
    return {"run": run.id, "run_name": run.name, "deployment": run.deployment_id}


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """A state we propose for a run. `transition_id` stays the same when the same proposal is sent again."""

    type: StateType
    transition_id: str
    name: str | None = None
    message: str | None = None
    force: bool = False
    data: Any = None
    scheduled: datetime | None = None  # for SCHEDULED: when it is due, in UTC


class Answer(enum.StrEnum):
    """What the server's orchestration said to a proposal."""

    ACCEPT = "ACCEPT"
    REJECT = "REJECT"
    WAIT = "WAIT"
    ABORT = "ABORT"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The server's answer to a proposal; `state` is the run's state after it, where the server says."""

    answer: Answer
    state: State | None = None
    reason: str | None = None
    delay_seconds: float | None = None


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers at the configured URL."""

    version: str  # "3.8.8"
    major: int  # 2 or 3: the generation


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """A work pool."""

    id: str
    name: str
    type: str  # "process", "prefect-agent", "ecs:push", …
    is_paused: bool = False
    concurrency_limit: int | None = None
    status: str | None = None


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A work queue: of a pool, or agent-style (in the pool that old agents share)."""

    id: str
    name: str
    is_paused: bool = False
    pool_name: str | None = None
    priority: int | None = None
    concurrency_limit: int | None = None


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What we need to know of a deployment beyond its job."""

    id: str
    name: str
    flow_id: str
    paused: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """How the server's records say one run is to be started: template, blocks and variables already merged.

    `env` maps a name to None where the user asked for that variable to be unset.
    """

    command: tuple[str, ...] | None = None  # None: the engine of the flow's interpreter
    env: Mapping[str, str | None] = {}
    working_dir: str | None = None  # None: a private directory, removed afterwards
    flow_name: str | None = None
    deployment_id: str | None = None
    deployment_name: str | None = None
    pool: Pool | None = None


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that has happened, as the server says by itself."""

    name: str  # "prefect.flow-run.Scheduled"
    subject: str  # what it happened to: "prefect.flow-run.ID"
    about: frozenset[str]  # that, and what it belongs to: "prefect.work-pool.ID", …


class LogRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A line for a run's log on the server. `level` is the number of Python's logging module."""

    run_id: str
    level: int
    message: str
    at: datetime
    logger: str = "prefect.flow-agent"
