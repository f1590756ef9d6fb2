"""The one ear at the server: has it say at once what is due or to be cancelled, and wakes whom that concerns.

Nothing depends on it. What the server says is a reason to ask, never an answer, and the polls go on beside it, slower while
it works. So whatever befalls the websocket costs some seconds of delay, and is tried again.
"""

from __future__ import annotations

import logging

import msgspec
import trio

from supervisor.backend.base import Backend
from supervisor.config import Poll
from supervisor.errors import BackendError, Unreachable
from supervisor.model import Notice
from supervisor.runs.backoff import Backoff
from supervisor.runs.canceller import Canceller
from supervisor.runs.pollers import Pollers
from supervisor.runs.roster import Roster

MAJOR = 3  # Prefect 2 has no such websocket
SETTLE_SECONDS = 0.2  # what becomes known of several sources within it is one subscription
FIRST_SECONDS = 1.0  # from a loss until the first attempt; doubled with each that fails, up to
RETRY_SECONDS = 600.0  # where a server or proxy has no websockets for us; a server that is away is looked for sooner
HELD_SECONDS = 60.0  # a websocket that was open for longer had no trouble worth remembering
SAID_AFTER = 3  # failures in a row: fewer are a server that was restarted

_RUN = "prefect.flow-run."
CANCELLING = f"{_RUN}Cancelling"
# After which there may be something to take: runs; deployments with other schedules, whose runs come without a word;
# pools and queues that were paused.
DUE = (
    *(f"{_RUN}{name}" for name in ("Scheduled", "Late", "Resuming", "AwaitingRetry")),
    *(f"prefect.deployment.{what}" for what in ("created", "updated")),
    *(f"prefect.{place}.{what}" for place in ("work-pool", "work-queue") for what in ("ready", "updated")),
)
# After which the limit of a pool or queue may let another run in.
ENDED = frozenset(
    {CANCELLING}
    | {f"{_RUN}{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Paused", "Suspended")}
)

_log = logging.getLogger("flow-agent")


class Wanted(msgspec.Struct, frozen=True):
    """What is to be heard: the events with these names of these resources."""

    names: frozenset[str] = frozenset()
    resources: frozenset[str] = frozenset()


class Listener:
    """Keeps a websocket open while there is something to listen for.

    Owns its life: what it was opened for, whether it works, how it has failed, what has been said about that.
    """

    def __init__(self, backend: Backend, roster: Roster, pollers: Pollers, canceller: Canceller, *, poll: Poll) -> None:
        self._backend = backend
        self._roster = roster
        self._pollers = pollers
        self._canceller = canceller
        self._poll = poll
        self._wanted = Wanted()  # at the last attempt
        self._attempt = trio.CancelScope()
        self._changed = trio.Event()
        self._open_since: float | None = None
        self._backoff = Backoff(FIRST_SECONDS / 2, cap=RETRY_SECONDS, jitter=poll.jitter)
        self._failures = 0
        self._said: bool | None = None  # whether it works, as it was said last

    def describe(self) -> str:
        """For the status line."""
        return "" if self._open_since is None else ", push"

    def use(self, poll: Poll) -> None:
        """Listens from now on, or does not any more."""
        self._poll = poll
        self._look()

    async def run(self) -> None:
        """Listens until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                self._changed = trio.Event()
                with trio.move_on_after(await self._listen()):
                    await self._changed.wait()
                await trio.sleep(SETTLE_SECONDS)

    async def _watch(self) -> None:
        while True:
            await self._pollers.wait_news()
            self._look()

    def _look(self) -> None:
        """Begins anew when there is something else to listen for."""
        if self._wants() != self._wanted:
            self._attempt.cancel()
            self._changed.set()
        else:
            self._spread()

    def _wants(self) -> Wanted:
        sources = self._pollers.sources if self._poll.push else []
        resources = frozenset[str]().union(*(source.resources for source in sources))
        limited = ENDED if any(source.is_limited for source in sources) else ()
        return Wanted(frozenset({*DUE, CANCELLING, *limited}), resources)

    async def _listen(self) -> float:
        """Listens until there is something else to listen for, or it ends. Returns how long to wait then for a change."""
        wanted = self._wanted = self._wants()
        if not wanted.resources:
            self._closed()
            return float("inf")
        with trio.CancelScope() as self._attempt:
            try:
                if await self._backend.generation() < MAJOR:
                    return RETRY_SECONDS
                async with self._backend.listen(sorted(wanted.names), sorted(wanted.resources)) as notices:
                    self._opened()
                    while True:
                        self._hear(await notices.next())
            except BackendError as error:
                self._failed(error)
                self._closed()
                wait = self._backoff.delay()
                # That a server is away is no sign of what it can do.
                return min(wait, self._poll.max_backoff_seconds) if isinstance(error, Unreachable) else wait
        return 0.0

    def _hear(self, notice: Notice) -> None:
        run_id = notice.subject.removeprefix(_RUN)
        if notice.name == CANCELLING:
            self._canceller.wake(run_id)
        if self._roster.get(run_id) is not None:
            return  # ours: when it has ended, its slot says so
        for poller in self._pollers:
            if poller.source.resources & notice.about and (notice.name not in ENDED or poller.source.is_limited):
                poller.wake()

    def _opened(self) -> None:
        if self._said is not True:
            _log.info(
                "the server says at once what is due or to be cancelled%s", "" if self._said is None else " again"
            )
        self._said, self._open_since = True, trio.current_time()
        self._spread()
        # Nobody has said what happened before.
        self._canceller.wake()
        for poller in self._pollers:
            poller.wake(in_any_case=True)

    def _failed(self, error: BackendError) -> None:
        _log.debug("no push: %s", error)
        if self._open_since is not None and trio.current_time() - self._open_since > HELD_SECONDS:
            self._backoff.succeeded()
            self._failures = 0
        self._backoff.failed(error)
        self._failures += 1
        # An outage is said by the polls.
        if self._failures >= SAID_AFTER and self._said is not False and not isinstance(error, Unreachable):
            self._said = False
            _log.info(
                "the server does not say by itself what is due: %s. It is asked every %g s instead; push is tried again "
                "now and then",
                error,
                self._poll.interval_seconds,
            )

    def _closed(self) -> None:
        self._open_since = None
        self._spread()

    def _spread(self) -> None:
        """Tells all loops whether they are told of what concerns them."""
        all_of_them = self._open_since is not None
        for poller in self._pollers:
            is_known, resources = poller.known
            told = self._open_since is not None and is_known and resources <= self._wanted.resources
            all_of_them = all_of_them and told
            poller.push(told)
        tables = {str(source.work) for source in self._pollers.sources}
        self._canceller.push(frozenset(tables) if all_of_them else frozenset())
