"""The loop that asks one source for due runs and hands them to the roster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

import trio

from supervisor.config import Poll, Work
from supervisor.errors import BackendError, NotFound, Refused
from supervisor.model import FlowRun
from supervisor.runs.backoff import Backoff
from supervisor.runs.health import ServerHealth
from supervisor.runs.lead import Leads
from supervisor.runs.pace import Pace
from supervisor.runs.roster import Roster
from supervisor.runs.sources import Source
from supervisor.runs.timetable import Timetable
from supervisor.systemd.watchdog import Pulse

MAX_OFFERS = 200  # the servers' page limit
SPARE_OFFERS = 10  # asked for beyond the free slots, so that offers we must drop do not hide those we may take
GAP_SECONDS = 0.15  # from poll to poll at least, whoever calls for one: what happens within it shares the next
ALONE_AFTER = 3  # polls in a row that failed although others were answered: it is about this source, not the server

_log = logging.getLogger("flow-agent")


class Poller:
    """Polls one source. Owns how the last poll went, how often it polls, and whether it has been called to."""

    def __init__(
        self,
        source: Source,
        roster: Roster,
        timetable: Timetable,
        leads: Leads,
        health: ServerHealth,
        pulse: Pulse,
        *,
        poll: Poll,
        prefetch_seconds: float,
        turn_seconds: float,
    ) -> None:
        self.source = source
        self._roster = roster
        self._timetable = timetable
        self._leads = leads
        self._health = health
        self._pulse = pulse
        self._poll = poll
        self._prefetch = prefetch_seconds
        self._took = 0.0  # seconds, by the last poll
        self._turn_seconds = turn_seconds  # the longest a poll may honestly take
        self._life = trio.CancelScope()
        self._nap = trio.CancelScope()
        self._called = trio.Event()
        self._pace = Pace(poll.interval_seconds)
        self._waiting = False  # something was due at the last poll that it could not begin
        self._backoff = Backoff(poll.interval_seconds, cap=poll.max_backoff_seconds, jitter=poll.jitter)
        self._dropped = 0
        self._said: str | None = None
        self._alone = 0  # failures in a row between which the server answered something else
        self._answers = 0  # how often it had answered at the last of them

    async def run(self, on_news: Callable[[], None] = lambda: None) -> None:
        """Polls until cancelled, or told to end. `on_news` is called when the source knows other `resources` than before."""
        try:
            with self._life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_slots)
                    await self._poll_for_ever(on_news)
        finally:
            self._timetable.forget(self.source)
            self._pulse.expect(None)  # it cannot be late any more

    async def _poll_for_ever(self, on_news: Callable[[], None]) -> None:
        while True:
            self._called = trio.Event()  # before the poll: it may be called to another while this one is under way
            began, known = trio.current_time(), self.known
            await self.poll_once()
            took = trio.current_time() - began
            if self.known != known:
                on_news()
            waiting = self._waiting or self.source.holds_back
            delay = self._backoff.delay(self._pace.next(waiting=waiting, called=self._called.is_set()))
            self._pulse.expect(delay + self._turn_seconds)
            with trio.move_on_after(delay) as self._nap:
                if self._backoff.failing:
                    await trio.sleep_forever()  # nothing is a reason to press a server that is in trouble
                await self._called.wait()
                # A server that is slow to answer is asked less often.
                await trio.sleep_until(began + max(GAP_SECONDS, 2 * took))

    async def _watch_slots(self) -> None:
        while True:
            await self._roster.wait_slot_freed()
            self._pace.stir()
            self._called.set()

    @property
    def known(self) -> tuple[bool, frozenset[str]]:
        """Whether all that the source names is known, and the server's names for it."""
        return self.source.is_known, self.source.resources

    @property
    def longest_wait(self) -> float:
        """Seconds from one poll to the next at most, while the server answers."""
        return self._pace.longest * (1 + self._poll.jitter)

    def wake(self, *, in_any_case: bool = False) -> None:
        """Polls soon: the server says that there may be something new. Calls that come together share a poll.

        A server that has failed is let alone for now, unless `in_any_case`: there is a sign that it answers again. One that
        has said for how long is let alone for so long.
        """
        self._pace.told()
        self._called.set()
        if in_any_case and self._backoff.failing and not self._backoff.told_to_wait:
            self._nap.cancel()

    def push(self, on: bool) -> None:
        """Whether the server says from now on when there is something new."""
        if self._pace.push(on):
            self.wake()

    def end(self) -> None:
        """Polls no more: its `[[work]]` table is gone. The runs it has handed on are not its own."""
        self._life.cancel()

    def use(self, work: Work, poll: Poll, prefetch_seconds: float) -> None:
        """Polls like this from now on, and at once where that is anything new."""
        if (work, poll, prefetch_seconds) == (self.source.work, self._poll, self._prefetch):
            return
        self.source.use(work)
        self._timetable.forget(self.source)
        self._poll, self._prefetch = poll, prefetch_seconds
        self._backoff.use(poll.interval_seconds, cap=poll.max_backoff_seconds, jitter=poll.jitter)
        self._pace.use(poll.interval_seconds)
        self._called.set()
        self._nap.cancel()  # it may be an hour long

    async def poll_once(self, *, hold: bool = True) -> bool:
        """Asks once, and admits what is offered: when it is time, or with no `hold` now; its own task then waits for its time.

        Returns False, having said why, when the server could not be asked.
        """
        self._pulse.expect(self._turn_seconds)
        free = self._roster.free(self.source.work)
        self._waiting = free <= 0
        if free <= 0:
            self._backoff.succeeded()
            return True
        asked_at = trio.current_time()
        try:
            offers, whole = await self._ask(
                free + self._dropped + SPARE_OFFERS, self._ahead() if hold else self._prefetch
            )
        except BackendError as error:
            self._failed(error)
            return False
        if self._said is not None:
            _log.info("taking runs from %s again", self.source)
        self._health.polled()
        if self._backoff.failing:
            self._pace.stir()
        self._backoff.succeeded()
        self._said, self._alone = None, 0
        self._took = trio.current_time() - asked_at
        lead = self._lead if hold else lambda _: float("inf")
        begun, held = self._timetable.offered(self.source, offers, lead, whole=whole)
        # What is not begun comes back at every poll; the next one must look past it.
        self._dropped = len(offers) - begun
        self._waiting = self._dropped > held
        if begun:
            self._pace.stir()
        return True

    async def _ask(self, limit: int, ahead: float) -> tuple[list[FlowRun], bool]:
        """What is due within `ahead` seconds, and whether that is all of it."""
        now = self._timetable.now()
        soon, before = (now + timedelta(seconds=seconds) for seconds in (self._due_within(), ahead))
        for most in sorted({min(limit, MAX_OFFERS), MAX_OFFERS}):
            offers = await self.source.due(before=before, limit=most)
            if len(offers) < most:
                return offers, True
            if all(_is_due(offer, soon) for offer in offers):
                return offers, False
        # The server puts priority before time, so what is due now may be hidden behind what is to come.
        due = await self.source.due(before=soon, limit=MAX_OFFERS)
        known = {offer.id for offer in due}
        return [*due, *(offer for offer in offers if offer.id not in known)], False

    def _ahead(self) -> float:
        """Seconds to look ahead, so that no run is to be begun before the next poll tells of it; nor when one poll fails."""
        return self.longest_wait + 2 * self._poll.interval_seconds + self._took + self._due_within()

    def _due_within(self) -> float:
        return min(self._prefetch, self._leads.most(self.source.work.flows))

    def _lead(self, offer: FlowRun) -> float:
        return min(self._prefetch, self._leads.whole(offer.deployment_id, self.source.work.flows))

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


def _is_due(offer: FlowRun, by: datetime) -> bool:
    return offer.expected_start is None or offer.expected_start <= by


def turn_seconds(work: Work, timeout: float) -> float:
    """The longest one poll may honestly take: every request of it at its deadline, and some for the machine."""
    queues = max(len(work.queues), 20 if work.match else 0, len(work.deployments))
    return timeout * (4 + 3 * queues) + 10.0
