"""The one map of live runs, and the capacity that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from supervisor.config import Work
from supervisor.lifecycle import Outcome
from supervisor.model import FlowRun
from supervisor.runs.claim import NotOurs
from supervisor.runs.run import Run
from supervisor.runs.sources import Source

REFUSED_SECONDS = (
    30.0  # how long an offer that was refused is not asked for again, nor its deployment's when that was full
)
UNHEARD_SECONDS = 2.0  # the same for an offer whose claim failed because the server could not be asked
SUSPENDED = 200  # how many suspended runs are watched for a cancellation
UNLIMITED = 1_000_000

_Key = tuple[str, str | None]  # a run as it was offered (its id and its state's), or a deployment

_log = logging.getLogger("flow-agent")


class Roster:
    """Every run that has been admitted and is not closed.

    Owns the limit and that map (slots are counted from it, never kept beside it), which offers to leave alone for a while,
    and which suspended runs were ours.
    """

    def __init__(
        self, limit: int | None, start: Callable[[FlowRun, Source], Run], room: Callable[[], bool] = lambda: True
    ) -> None:
        """`room`: whether new runs can be written down. While they cannot, no slot is free."""
        self._limit = limit
        self._start = start
        self._room = room
        self._runs: dict[str, Run] = {}
        self._resting: dict[_Key, float] = {}  # until when (monotonic)
        self._suspended: dict[str, Run] = {}
        self._freed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.closed: dict[Outcome, int] = {}

    def use(self, limit: int | None) -> None:
        """Another limit. Runs beyond it go on; there is no free slot until enough of them have ended."""
        if limit != self._limit:
            self._limit = limit
            self._ring()  # whoever waits for a free slot shall look

    def open(self, nursery: trio.Nursery) -> None:
        """Runs live in this nursery from now on."""
        self._nursery = nursery

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    def all(self) -> list[Run]:
        return list(self._runs.values())

    def free(self, work: Work | None = None) -> int:
        """Free slots: of the agent, and of that `[[work]]` table where it has a limit of its own."""
        if not self._room():
            return 0
        free = UNLIMITED if self._limit is None else self._limit - len(self._runs)
        if work is not None and work.limit is not None:
            # By its name: a run keeps the table as it was when the run began, and counts in what has become of it.
            free = min(free, work.limit - sum(str(run.work) == str(work) for run in self._runs.values()))
        return max(0, free)

    def describe(self) -> str:
        """For the status line."""
        if not self._room():
            return f"{len(self._runs)} running, taking no new ones: there is no room in the state directory"
        free = "no limit" if self._limit is None else f"{self.free()} free"
        return f"{len(self._runs)} running, {free}"

    # --- runs come and go --------------------------------------------------------------------------------------------

    def admit(self, offer: FlowRun, source: Source) -> bool:
        """Starts the run's task, unless it is known, must be left alone for now, or no slot is free for it."""
        if self._nursery is None or offer.id in self._runs or offer.retry_in_process or self._rests(offer):
            return False
        if self.free(source.work) <= 0:
            return False
        self.take(self._start(offer, source))
        return True

    def take(self, run: Run) -> None:
        """Starts the task of a run; of one that an earlier agent has left, whatever the limits say."""
        assert self._nursery is not None
        self._runs[run.id] = run
        self._suspended.pop(run.id, None)
        self._nursery.start_soon(self._live, run, name=f"run {run.id}")

    async def _live(self, run: Run) -> None:
        try:
            outcome = await run.live()
        finally:
            del self._runs[run.id]
            self._ring()
        self.closed[outcome] = self.closed.get(outcome, 0) + 1
        if run.refused is not None:
            self._rest(run, run.refused)
        elif outcome is Outcome.HANDED_BACK and run.suspended:
            self._suspended[run.id] = run
            if len(self._suspended) > SUSPENDED:  # most of them others have resumed long ago, unknown to us
                del self._suspended[next(iter(self._suspended))]

    async def wait_slot_freed(self) -> None:
        """Returns when the next run has closed, or the limit is another."""
        await self._freed.wait()

    def _ring(self) -> None:
        self._freed.set()
        self._freed = trio.Event()

    # --- offers to leave alone ---------------------------------------------------------------------------------------

    def _rest(self, run: Run, refused: NotOurs) -> None:
        now = trio.current_time()
        self._resting = {key: until for key, until in self._resting.items() if until > now}
        of_run, of_deployment = _keys(run.offer)
        key = of_deployment if refused.deployment_full else of_run
        self._resting[key] = now + (UNHEARD_SECONDS if refused.unheard else REFUSED_SECONDS)

    def _rests(self, offer: FlowRun) -> bool:
        now = trio.current_time()
        return any(self._resting.get(key, now) > now for key in _keys(offer))

    # --- cancellation ------------------------------------------------------------------------------------------------

    def cancellable(self) -> list[str]:
        """The ids whose cancellation is ours to notice: live runs, and suspended ones that nobody else has resumed."""
        return [*self._runs, *self._suspended]

    def cancel_suspended(self, run_id: str) -> None:
        """A suspended run of ours is to be cancelled: its process ended long ago, so only the server must be told."""
        run = self._suspended.pop(run_id, None)
        if run is not None and self._nursery is not None:
            self._nursery.start_soon(run.cancel_suspended, name=f"cancel suspended {run_id}")


def _keys(offer: FlowRun) -> tuple[_Key, _Key]:
    """What a refusal of this offer may be about: the run in this state (one that is rescheduled gets another), its deployment."""
    run = (offer.id, offer.state_id)
    return run, run if offer.deployment_id is None else (offer.deployment_id, None)
