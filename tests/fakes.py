"""A Prefect server at the seam of `Backend`: for faults and timings that a real one will not produce on demand.

Everything that a real server can show is tested against real servers (test_e2e_*.py).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
import trio
import trio.testing

from supervisor.config import Flows, Poll, Work
from supervisor.errors import BackendError, NotFound
from supervisor.lifecycle import Outcome, Phase, StopReason
from supervisor.lifecycle.record import Record
from supervisor.model import (
    Answer,
    Deployment,
    FlowRun,
    Job,
    LogRecord,
    Pool,
    Proposal,
    Queue,
    Server,
    State,
    StateType,
    Verdict,
)
from supervisor.runs.claim import NotOurs
from supervisor.runs.clock import ServerClock
from supervisor.runs.health import ServerHealth
from supervisor.runs.lead import Leads
from supervisor.runs.poller import Poller
from supervisor.runs.roster import Roster
from supervisor.runs.sources import Source
from supervisor.runs.timetable import Timetable


def on_jumping_clock(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test on a clock that jumps to the next deadline whenever every task waits."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            with trio.fail_after(100_000):
                await test(*args, **kwargs)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    # pytest must not take the inner test's coroutine for the thing to run.
    return run


EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def wall() -> datetime:
    """A wall clock that goes with the jumping one, which begins at EPOCH."""
    return EPOCH + timedelta(seconds=trio.current_time())


def work(**values: Any) -> Work:
    """A `[[work]]` table with flows that nobody starts."""
    from pathlib import Path

    return Work(flows=Flows(python=Path("/nowhere/python")), **values)


def offer(run_id: str = "r1", *, deployment: str | None = "d1", name: str = "Scheduled", **values: Any) -> FlowRun:
    """A run as servers offer it."""
    return FlowRun(
        id=run_id,
        name=f"name-of-{run_id}",
        flow_id="f1",
        deployment_id=deployment,
        state_id=f"{run_id}-s0",
        state_type=StateType.SCHEDULED,
        state_name=name,
        **values,
    )


class FakeJournal:
    """Keeps the latest record of each claim, and every step."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.steps: list[tuple[str, Phase]] = []
        self.full = False
        self.retries = 0

    async def write(self, record: Record, *, durable: bool = True) -> bool:
        await trio.lowlevel.checkpoint()
        self.records[record.claim_id] = record
        self.steps.append((record.claim_id, record.phase))
        return not self.full

    async def write_patiently(self, record: Record) -> None:
        while not await self.write(record):
            await trio.sleep(1)

    def forget(self, claim_id: str) -> None:
        self.records.pop(claim_id, None)

    def crash_retries(self, run_id: str) -> int:
        return self.retries


class NoOutput:
    """A run without output."""

    async def watch(self, run_id: str, shown: int, show: Any) -> None:
        await trio.sleep_forever()

    async def finish(self, run_id: str, shown: int, show: Any) -> int:
        return shown


def record_of(run: FlowRun, phase: Phase | None = None, **values: Any) -> Record:
    """A record, by default of a run that is about to be claimed."""
    record = Record.claiming(run, "pool 'p'", "boot", datetime(2026, 1, 1, tzinfo=UTC))
    return msgspec.structs.replace(record, **{**({} if phase is None else {"phase": phase}), **values})


class FakeBackend:
    """Runs in a map, claims as a real server orchestrates them, and faults as the test orders them.

    `faults` maps a method's name to errors that its next calls raise, first come first served. A fault of the form
    `("after", error)` is raised after the call has been carried out: the answer is lost.
    """

    def __init__(self, *runs: FlowRun) -> None:
        self.runs = {run.id: run for run in runs}
        self.states: dict[str, State] = {
            run.id: State(
                type=run.state_type or StateType.SCHEDULED, name=run.state_name or "Scheduled", id=run.state_id
            )
            for run in runs
        }
        self.histories = {run_id: [state] for run_id, state in self.states.items()}
        self.faults: dict[str, list[Any]] = {}
        self.always: dict[str, BackendError] = {}
        self.calls: list[tuple[str, Any]] = []
        self.proposals: list[tuple[str, Proposal]] = []
        self.full: set[str] = set()  # deployments whose concurrency limit is reached
        self.pools: dict[str, Pool] = {}
        self.queues: dict[str, Queue] = {}
        self.delay = 0.0

    def set_state(self, run_id: str, kind: StateType, name: str | None = None) -> None:
        """What somebody else did."""
        self._store(run_id, State(type=kind, name=name or kind.value.title(), id=str(uuid4())))

    def _store(self, run_id: str, state: State) -> None:
        self.states[run_id] = state
        self.histories[run_id].append(state)

    def count(self, method: str) -> int:
        return sum(called == method for called, _ in self.calls)

    async def _call(self, method: str, about: Any = None) -> BackendError | None:
        """Notes the call and raises what the test ordered; returns an error to raise once the deed is done."""
        self.calls.append((method, about))
        await trio.sleep(self.delay)
        if method in self.always:
            raise self.always[method]
        if self.faults.get(method):
            fault = self.faults[method].pop(0)
            if isinstance(fault, tuple):
                return fault[1]  # type: ignore[no-any-return]
            if fault is not None:
                raise fault
        return None

    async def hello(self) -> Server:
        await self._call("hello")
        return Server(version="3.8.8", major=3)

    async def generation(self) -> int:
        return 3

    async def read_pool(self, name: str) -> Pool:
        await self._call("read_pool", name)
        if name not in self.pools:
            raise NotFound(f"Work pool {name!r} not found.")
        return self.pools[name]

    async def create_pool(self, name: str) -> Pool:
        await self._call("create_pool", name)
        self.pools[name] = Pool(id=f"id-{name}", name=name, type="process")
        return self.pools[name]

    async def pool_queues(self, pool: str, *, names: Sequence[str] = (), prefixes: Sequence[str] = ()) -> list[Queue]:
        await self._call("pool_queues", pool)
        found = [queue for queue in self.queues.values() if queue.pool_name == pool]
        if names:
            found = [queue for queue in found if queue.name in names]
        if prefixes:
            found = [queue for queue in found if queue.name.startswith(tuple(prefixes))]
        return found

    async def create_pool_queue(self, pool: str, name: str) -> Queue:
        await self._call("create_pool_queue", name)
        self.queues[name] = Queue(id=f"id-{name}", name=name, pool_name=pool)
        return self.queues[name]

    async def read_queue(self, name_or_id: str) -> Queue:
        await self._call("read_queue", name_or_id)
        if name_or_id not in self.queues:
            raise NotFound("work queue not found")
        return self.queues[name_or_id]

    async def match_queues(self, prefixes: Sequence[str]) -> list[Queue]:
        await self._call("match_queues", prefixes)
        return [queue for queue in self.queues.values() if queue.name.startswith(tuple(prefixes))]

    async def create_queue(self, name: str, *, tags: Sequence[str] | None = None) -> Queue:
        await self._call("create_queue", (name, tags))
        self.queues[name] = Queue(id=f"id-{name}", name=name)
        return self.queues[name]

    async def find_deployment(self, name: str) -> Deployment:
        await self._call("find_deployment", name)
        if name == "missing/one":
            raise NotFound("Deployment not found")
        return Deployment(id=f"id-{name}", name=name, flow_id="f1")

    def _offers(self, limit: int, before: datetime) -> list[FlowRun]:
        scheduled = [run for run in self.runs.values() if self.states[run.id].type is StateType.SCHEDULED]
        return [run for run in scheduled if run.expected_start is None or run.expected_start <= before][:limit]

    async def due_in_pool(
        self, pool: str, *, queues: Sequence[str] | None, before: datetime, limit: int
    ) -> list[FlowRun]:
        await self._call("due_in_pool", (pool, queues, limit))
        return self._offers(limit, before)

    async def due_in_queue(self, queue_id: str, *, before: datetime, limit: int) -> list[FlowRun]:
        await self._call("due_in_queue", queue_id)
        if f"due_in_queue {queue_id}" in self.always:
            raise self.always[f"due_in_queue {queue_id}"]
        return [
            run for run in self._offers(limit, before) if run.work_queue_name in (None, queue_id.removeprefix("id-"))
        ]

    async def due_in_deployments(self, ids: Sequence[str], *, before: datetime, limit: int) -> list[FlowRun]:
        await self._call("due_in_deployments", ids)
        return self._offers(limit, before)

    async def read_run(self, run_id: str) -> FlowRun:
        await self._call("read_run", run_id)
        if run_id not in self.runs:
            raise NotFound("Flow run not found")
        run, state = self.runs[run_id], self.states[run_id]
        return FlowRun(
            id=run.id,
            name=run.name,
            flow_id=run.flow_id,
            deployment_id=run.deployment_id,
            state_id=state.id,
            state_type=state.type,
            state_name=state.name,
            state=state,
            retry_in_process=run.retry_in_process,
        )

    async def history(self, run_id: str) -> list[State]:
        await self._call("history", run_id)
        return list(self.histories[run_id])

    async def propose(self, run_id: str, proposal: Proposal) -> Verdict:
        lost = await self._call("propose", proposal)
        if run_id not in self.runs:
            raise NotFound("Flow run not found")
        self.proposals.append((run_id, proposal))
        verdict = self._orchestrate(run_id, proposal)
        if lost is not None:
            raise lost
        return verdict

    def _orchestrate(self, run_id: str, proposal: Proposal) -> Verdict:
        now = self.states[run_id]
        if now.transition_id == proposal.transition_id and not now.type.terminal:
            return Verdict(answer=Answer.REJECT, state=now, reason="This run has already made this state transition.")
        if now.type.terminal and proposal.type is not StateType.PENDING and not proposal.force:
            return Verdict(answer=Answer.ABORT, reason="This run is already in a terminal state.")
        if now.type is StateType.CANCELLING and proposal.type is not StateType.CANCELLED:
            return Verdict(answer=Answer.REJECT, state=now, reason="This run is being cancelled.")
        if proposal.type is StateType.PENDING and not proposal.force:
            if now.type in (StateType.PENDING, StateType.RUNNING):
                return Verdict(answer=Answer.ABORT, reason="This run is in a PENDING state and cannot transition.")
            if self.runs[run_id].deployment_id in self.full:
                full = State(type=StateType.SCHEDULED, name="AwaitingConcurrencySlot", id=str(uuid4()))
                self._store(run_id, full)
                return Verdict(answer=Answer.REJECT, state=full, reason="Deployment concurrency limit reached.")
        new = State(
            type=proposal.type,
            name=proposal.name or proposal.type.value.title(),
            id=str(uuid4()),
            message=proposal.message,
            transition_id=proposal.transition_id,
            data=proposal.data,
        )
        self._store(run_id, new)
        return Verdict(answer=Answer.ACCEPT, state=new)

    async def job(self, run: FlowRun) -> Job:
        await self._call("job", run.id)
        return Job()

    async def patch_infrastructure(self, run_id: str, pid: str | None) -> None:
        await self._call("patch_infrastructure", (run_id, pid))

    async def label_run(self, run_id: str, labels: Mapping[str, str]) -> None:
        await self._call("label_run", run_id)

    async def renew_lease(self, lease_id: str, seconds: float) -> None:
        await self._call("renew_lease", lease_id)

    async def cancelling(self, run_ids: Sequence[str]) -> dict[str, State]:
        await self._call("cancelling", tuple(run_ids))
        return {
            run_id: self.states[run_id]
            for run_id in run_ids
            if run_id in self.states and self.states[run_id].type in (StateType.CANCELLING, StateType.CANCELLED)
        }

    async def heartbeat(self, pool: str, worker: str, interval_seconds: float) -> None:
        await self._call("heartbeat", pool)

    async def sign_off(self, pool: str, worker: str) -> None:
        await self._call("sign_off", pool)

    async def write_logs(self, records: Sequence[LogRecord]) -> None:
        await self._call("write_logs", tuple(records))

    async def has_log(self, run_id: str, message: str) -> bool:
        await self._call("has_log", run_id)
        return False

    async def emit(
        self,
        event: str,
        *,
        resource: Mapping[str, str],
        related: Sequence[Mapping[str, str]] = (),
        follows: str | None = None,
    ) -> str | None:
        await self._call("emit", event)
        return str(uuid4())


# --- a roster of runs that are nothing but time ---------------------------------------------------------------------------


class QuietPulse:
    """A pulse that nobody watches."""

    def expect(self, within: float | None) -> None:
        self.within = within


class ShortRun:
    """Lives as long as the test says."""

    def __init__(self, offered: FlowRun, source: Source, seconds: float, refused: NotOurs | None = None) -> None:
        self.id = offered.id
        self.offer = offered
        self.work = source.work
        self.refused = refused
        self.suspended = False
        self.asked: list[tuple[StopReason, str]] = []
        self._seconds = seconds

    async def live(self) -> Outcome:
        await trio.sleep(self._seconds)
        return Outcome.NOT_OURS if self.refused else Outcome.FINISHED

    def ask_to_stop(self, reason: StopReason, why: str, *, hurry: bool = False) -> None:
        self.asked.append((reason, why))

    async def cancel_suspended(self) -> None:
        self.asked.append((StopReason.CANCEL, "suspended"))


Starter = Callable[[FlowRun, Source], ShortRun]


def roster_of(limit: int | None, start: Starter) -> Roster:
    return Roster(limit, start)  # type: ignore[arg-type]


def poller_of(source: Source, roster: Roster, timetable: Timetable | None = None, **poll: float) -> Poller:
    return Poller(
        source,
        roster,
        Timetable(roster.admit, ServerClock()) if timetable is None else timetable,
        Leads(),
        ServerHealth("http://server/api"),
        QuietPulse(),  # type: ignore[arg-type]
        poll=Poll(jitter=0.0, **poll),
        prefetch_seconds=10.0,
        turn_seconds=100.0,
    )


def lives(seconds: float, started: list[tuple[str, float]] | None = None) -> Starter:
    def start(offered: FlowRun, source: Source) -> ShortRun:
        if started is not None:
            started.append((offered.id, trio.current_time()))
        return ShortRun(offered, source, seconds)

    return start


class QuietTeller:
    """A teller whose events nobody hears; keeps them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    async def worker(self, event: str, pool: Any, follows: str | None = None) -> str | None:
        self.events.append((event.rpartition(".")[2], pool.name))
        return None
