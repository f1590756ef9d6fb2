"""The loop that finds out which of our runs somebody asked to cancel."""

from __future__ import annotations

import logging

import trio

from supervisor.backend.base import Backend
from supervisor.config import Poll
from supervisor.errors import BackendError
from supervisor.lifecycle import StopReason
from supervisor.lifecycle.decision import wants_cancel
from supervisor.runs.backoff import Backoff
from supervisor.runs.health import ServerHealth
from supervisor.runs.pace import Pace
from supervisor.runs.roster import Roster
from supervisor.systemd.watchdog import Pulse

GAP_SECONDS = 0.1  # from poll to poll at least: cancellations within it share one
# How long a run's process may outlive its cancellation: an engine that has reported it itself is on its way out.
OUTLIVE_SECONDS = 60.0

_log = logging.getLogger("flow-agent")


class Canceller:
    """Polls for cancellations of the runs in the roster, and of suspended ones that were ours.

    Owns how often, and since when live runs have been cancelled for the server: it takes a cancellation that nobody has
    carried out for done after five minutes, whoever was away meanwhile.
    """

    def __init__(
        self, backend: Backend, roster: Roster, health: ServerHealth, pulse: Pulse, *, poll: Poll, turn_seconds: float
    ) -> None:
        self._backend = backend
        self._roster = roster
        self._health = health
        self._pulse = pulse
        self._poll = poll
        self._turn_seconds = turn_seconds
        self._over: dict[str, float] = {}  # run id -> since when we have seen it CANCELLED
        self._backoff = Backoff(poll.cancel_interval_seconds, cap=poll.max_backoff_seconds, jitter=poll.jitter)
        self._nap = trio.CancelScope()
        self._called = trio.Event()
        self._pace = Pace(poll.cancel_interval_seconds)
        self._pushed: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Polls until cancelled. Costs no request while there is nothing to cancel."""
        while True:
            self._called = trio.Event()  # before the look: what is said during it may have come too late for it
            began = trio.current_time()
            self._pulse.expect(self._turn_seconds)
            await self._look()
            others = any(str(run.work) not in self._pushed for run in self._roster.all())
            delay = self._backoff.delay(self._pace.next(waiting=others, called=self._called.is_set()))
            self._pulse.expect(delay + self._turn_seconds)
            with trio.move_on_after(delay) as self._nap:
                if self._backoff.failing:
                    await trio.sleep_forever()
                await self._called.wait()
                await trio.sleep_until(began + GAP_SECONDS)

    def wake(self, run_id: str | None = None) -> None:
        """Looks soon: the server says that this run, whosever it is, is to be cancelled, or that any may be."""
        if run_id is None or run_id in self._roster.cancellable():
            self._pace.told()
            self._called.set()
            if run_id is None and self._backoff.failing and not self._backoff.told_to_wait:
                self._nap.cancel()  # it answers again

    def push(self, tables: frozenset[str]) -> None:
        """The runs of these `[[work]]` tables the server says by itself; all there are, or none."""
        self._pushed = tables
        if self._pace.push(bool(tables)):
            self.wake()

    def use(self, poll: Poll, turn_seconds: float) -> None:
        """Polls like this from now on, and at once where that is anything new."""
        self._turn_seconds = turn_seconds
        if poll == self._poll:
            return
        self._poll = poll
        self._backoff.use(poll.cancel_interval_seconds, cap=poll.max_backoff_seconds, jitter=poll.jitter)
        self._pace.use(poll.cancel_interval_seconds)
        self._called.set()
        self._nap.cancel()

    async def _look(self) -> None:
        ids = self._roster.cancellable()
        if not ids:
            return
        try:
            found = await self._backend.cancelling(ids)
        except BackendError as error:
            self._health.failed(error)
            self._backoff.failed(error)
            return
        self._health.answered()
        self._backoff.succeeded()
        over = {run_id for run_id, state in found.items() if not wants_cancel(state)}
        self._over = {run_id: self._over.get(run_id, trio.current_time()) for run_id in over}
        for run_id, state in found.items():
            run = self._roster.get(run_id)
            if run_id not in over:
                if run is None:
                    self._roster.cancel_suspended(run_id)
                else:
                    run.ask_to_stop(StopReason.CANCEL, state.message or "Cancelled on request.")
            elif run is not None and trio.current_time() - self._over[run_id] > OUTLIVE_SECONDS:
                run.ask_to_stop(StopReason.CANCEL, "It had been cancelled on the server and went on.")
