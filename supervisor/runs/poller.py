"""The loop that asks one source for due runs and hands them to the roster."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import trio

from supervisor.config import Poll, Work
from supervisor.errors import BackendError, NotFound, Refused
from supervisor.runs.backoff import Backoff
from supervisor.runs.health import ServerHealth
from supervisor.runs.roster import Roster
from supervisor.runs.sources import Source
from supervisor.systemd.watchdog import Pulse

MAX_OFFERS = 200  # the servers' page limit
SPARE_OFFERS = 10  # asked for beyond the free slots, so that offers we must drop do not hide those we may take
WAKE_SECONDS = 0.1  # slots freed within it share one poll
ALONE_AFTER = 3  # polls in a row that failed although others were answered: it is about this source, not the server

_log = logging.getLogger("flow-agent")


class Poller:
    """Polls one source. Owns how the last poll went, and how often it polls."""

    def __init__(
        self,
        source: Source,
        roster: Roster,
        health: ServerHealth,
        pulse: Pulse,
        *,
        poll: Poll,
        prefetch_seconds: float,
        turn_seconds: float,
    ) -> None:
        self.source = source
        self._roster = roster
        self._health = health
        self._pulse = pulse
        self._poll = poll
        self._prefetch = timedelta(seconds=prefetch_seconds)
        self._turn_seconds = turn_seconds  # the longest a poll may honestly take
        self._life = trio.CancelScope()
        self._nap = trio.CancelScope()
        self._backoff = Backoff(poll.interval_seconds, cap=poll.max_backoff_seconds, jitter=poll.jitter)
        self._dropped = 0
        self._said: str | None = None
        self._alone = 0  # failures in a row between which the server answered something else
        self._answers = 0  # how often it had answered at the last of them

    async def run(self) -> None:
        """Polls until cancelled, or told to end."""
        try:
            with self._life:
                while True:
                    await self.poll_once()
                    delay = self._backoff.delay()
                    self._pulse.expect(delay + self._turn_seconds)
                    with trio.move_on_after(delay) as self._nap:
                        await self._wait_freed()
        finally:
            self._pulse.expect(None)  # it cannot be late any more

    async def _wait_freed(self) -> None:
        if self._backoff.failing:
            await trio.sleep_forever()  # a freed slot is no reason to press a server that is in trouble
        await self._roster.wait_slot_freed()
        await trio.sleep(WAKE_SECONDS)

    def end(self) -> None:
        """Polls no more: its `[[work]]` table is gone. The runs it has handed on are not its own."""
        self._life.cancel()

    def use(self, work: Work, poll: Poll, prefetch_seconds: float) -> None:
        """Polls like this from now on, and at once where that is anything new."""
        prefetch = timedelta(seconds=prefetch_seconds)
        if (work, poll, prefetch) == (self.source.work, self._poll, self._prefetch):
            return
        self.source.use(work)
        self._poll, self._prefetch = poll, prefetch
        self._backoff.use(poll.interval_seconds, cap=poll.max_backoff_seconds, jitter=poll.jitter)
        self._nap.cancel()  # it may be an hour long

    async def poll_once(self) -> bool:
        """Asks once and admits what is offered. Returns False, having said why, when the server could not be asked."""
        self._pulse.expect(self._turn_seconds)
        free = self._roster.free(self.source.work)
        if free <= 0:
            self._backoff.succeeded()
            return True
        before = datetime.now(UTC) + self._prefetch
        limit = min(MAX_OFFERS, free + self._dropped + SPARE_OFFERS)
        try:
            offers = await self.source.due(before=before, limit=limit)
        except BackendError as error:
            self._failed(error)
            return False
        if self._said is not None:
            _log.info("taking runs from %s again", self.source)
        self._health.polled()
        self._backoff.succeeded()
        self._said, self._alone = None, 0
        # Dropped offers come back at every poll; the next one must look past them.
        self._dropped = sum(not self._roster.admit(offer, self.source) for offer in offers)
        return True

    def _failed(self, error: BackendError) -> None:
        """Outages are said by `ServerHealth`; what the server has against this source alone is said here, once."""
        others_were_answered = self._health.answers > self._answers
        self._alone = self._alone + 1 if others_were_answered or not self._backoff.failing else 0
        self._backoff.failed(error)
        if isinstance(error, NotFound | Refused):
            self._health.failed(error)
            if self._said != str(error):
                self._say(error)
        elif self._alone < ALONE_AFTER:
            self._health.failed(error)
        elif self._said is None:  # the next failure's words may be others
            self._say(error)
        self._answers = self._health.answers

    def _say(self, error: BackendError) -> None:
        self._said = str(error)
        _log.warning("cannot take runs from %s: %s", self.source, error)


def turn_seconds(work: Work, timeout: float) -> float:
    """The longest one poll may honestly take: every request of it at its deadline, and some for the machine."""
    queues = max(len(work.queues), 20 if work.match else 0, len(work.deployments))
    return timeout * (4 + 3 * queues) + 10.0
