"""What the house may ask of a Prefect server, whatever its generation.

One method is one call (or, where a generation needs several, one question). No method retries, waits or remembers
failures: a call that fails raises a `BackendError` at once and the caller decides. Every method may raise any of
`Unreachable`, `LostAnswer`, `ServerTrouble`, `Unauthorized`, `NotFound`, `Refused`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from supervisor.model import Deployment, FlowRun, Job, LogRecord, Notice, Pool, Proposal, Queue, Server, State, Verdict


class Notices(Protocol):
    """What a server says by itself."""

    async def next(self) -> Notice:
        """Waits for the next one. Raises a `BackendError` when no more will come; a clean end is one, too."""


class Backend(Protocol):
    """One server. All times are UTC."""

    async def hello(self) -> Server:
        """Who answers there, asked anew."""

    async def generation(self) -> int:
        """2 or 3: the major version of the server, asked for once."""

    # --- where work comes from -------------------------------------------------------------------------------------

    async def read_pool(self, name: str) -> Pool:
        """The work pool of that name. Raises `NotFound`."""

    async def create_pool(self, name: str) -> Pool:
        """Creates a pool of type process with the default base job template; when somebody was faster, reads theirs."""

    async def pool_queues(self, pool: str, *, names: Sequence[str] = (), prefixes: Sequence[str] = ()) -> list[Queue]:
        """The pool's queues: all, those with these names, or those whose names start with one of these prefixes."""

    async def create_pool_queue(self, pool: str, name: str) -> Queue:
        """Creates a queue in a pool; when somebody was faster, reads theirs."""

    async def read_queue(self, name_or_id: str) -> Queue:
        """The agent-style queue with that name, or with that UUID. Raises `NotFound`."""

    async def match_queues(self, prefixes: Sequence[str]) -> list[Queue]:
        """The agent-style queues whose names start with one of the prefixes."""

    async def create_queue(self, name: str, *, tags: Sequence[str] | None = None) -> Queue:
        """Creates an agent-style queue; when somebody was faster, reads theirs.

        With `tags` it gets the legacy tag filter, also when it exists without one.
        """

    async def find_deployment(self, name: str) -> Deployment:
        """The deployment called `flow/deployment`, or with that UUID. Raises `NotFound`."""

    async def due_in_pool(
        self, pool: str, *, queues: Sequence[str] | None, before: datetime, limit: int
    ) -> list[FlowRun]:
        """Runs due before that time, in the server's order. Raises `NotFound` when the pool or a queue is gone."""

    async def due_in_queue(self, queue_id: str, *, before: datetime, limit: int) -> list[FlowRun]:
        """Runs due in one agent-style queue, in the server's order."""

    async def due_in_deployments(self, ids: Sequence[str], *, before: datetime, limit: int) -> list[FlowRun]:
        """Runs due of these deployments, in the server's order."""

    # --- one run ---------------------------------------------------------------------------------------------------

    async def read_run(self, run_id: str) -> FlowRun:
        """The run with its state. Raises `NotFound` when it has been deleted."""

    async def history(self, run_id: str) -> list[State]:
        """Every state the run has been in, oldest first by the time its proposal arrived."""

    async def propose(self, run_id: str, proposal: Proposal) -> Verdict:
        """Proposes a state. Raises `NotFound` when the run has been deleted."""

    async def job(self, run: FlowRun) -> Job:
        """How to start this run: deployment, template, blocks and variables read and merged.

        Raises `JobError` when they describe something that cannot be started here, and `NotFound` when the run's
        deployment has been deleted.
        """

    async def patch_infrastructure(self, run_id: str, pid: str | None) -> None:
        """Stores `infrastructure_pid`."""

    async def label_run(self, run_id: str, labels: Mapping[str, str]) -> None:
        """Adds labels to the run, where the server has labels; elsewhere does nothing."""

    async def renew_lease(self, lease_id: str, seconds: float) -> None:
        """Renews a deployment concurrency lease. Raises `Refused` (status 410) when it is gone."""

    async def cancelling(self, run_ids: Sequence[str]) -> dict[str, State]:
        """Which of these runs are CANCELLING or CANCELLED, with that state."""

    def listen(self, names: Sequence[str], resources: Sequence[str]) -> AbstractAsyncContextManager[Notices]:
        """Has the server say what happens from now on, by these names, to any of these resources or what belongs to them.

        Only for servers of generation 3. Entering raises as every call does, also where a proxy has no websockets.
        """

    # --- about us --------------------------------------------------------------------------------------------------

    async def heartbeat(self, pool: str, worker: str, interval_seconds: float) -> None:
        """Tells the pool that this worker lives."""

    async def sign_off(self, pool: str, worker: str) -> None:
        """Takes this worker off the pool's list."""

    async def write_logs(self, records: Sequence[LogRecord]) -> None:
        """Appends lines to runs' logs. Splits what the server would refuse as too large."""

    async def has_log(self, run_id: str, message: str) -> bool:
        """Whether the end of the run's log holds that line."""

    async def emit(
        self,
        event: str,
        *,
        resource: Mapping[str, str],
        related: Sequence[Mapping[str, str]] = (),
        follows: str | None = None,
    ) -> str | None:
        """Sends one event and returns its id, where the server takes events; elsewhere does nothing and returns None."""
