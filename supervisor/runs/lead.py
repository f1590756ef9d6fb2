"""How long before its time a run must be begun so that its engine asks for Running when it is due.

The engine need not be early: told to wait it does so in whole seconds, since the server rounds what is left to them, and so what
asks half a second or more too early runs up to half a second early or late. So the start itself is aimed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from statistics import median

import trio

from supervisor.config import Flows
from supervisor.model import FlowRun
from supervisor.process.channel import Session
from supervisor.runs.clock import ServerClock

KEPT = 30  # runs that are remembered of each kind
DEPLOYMENTS = 200  # of which that is remembered
LATE_SECONDS = 0.1  # what the slow ones of them may be late
SHORTEST = 0.1
TICK_SECONDS = 1.0  # waits for a time of day are looked at again within it: a clock may be set, a machine sleep
WAITS_FROM = 0.5  # seconds early from which on the server lets an engine wait
PREPARING_SECONDS = 0.5  # guess: from the offer until the run is claimed and its job known
LONGEST_PREPARING = 5.0  # what took longer was an outage
LONGEST_SPAWNING = 1.0  # the same, until there was a process: it waited for its fork server
LONGEST = 60.0  # the same of a start; or a clock was set meanwhile
GUESSES = {("cold", 2): 4.5, ("cold", 3): 1.5}  # seconds from the start until Running, by start and Prefect
WARM_GUESS = 0.6


class Lead:
    """Seconds from the start of an engine until it asks for Running. Owns what the last runs took."""

    def __init__(self, guess: float) -> None:
        self.guess = guess
        self._took: deque[tuple[float, bool]] = deque(maxlen=KEPT)
        self.seconds = guess

    def learn(self, took: float, planned: float, asked: float | None = None) -> None:
        """A run became Running `took` seconds after its start, which was `planned` seconds before it was due.

        `asked`: when its engine was about to ask for that, where we know. Where we do not, it may have been made to wait.
        """
        if asked is not None:
            certain, waited = True, took - asked if planned - asked >= WAITS_FROM else 0.0
        else:
            # Who was made to wait is Running within half a second of the time.
            certain, waited = planned - took < -WAITS_FROM or planned < WAITS_FROM, 0.0
            if not certain:
                waited = took - median([seconds for seconds, sure in self._took if sure] or [self.guess])
        self._took.append((took - max(0, round(waited)), certain))
        self.seconds = aim([seconds for seconds, _ in self._took])


def aim(took: Iterable[float]) -> float:
    """The lead with which the fewest such runs are early, and the slow ones of them no later than `LATE_SECONDS`.

    The slowest does not count: the first engine after an installation reads everything from the disk.
    """
    ordered = sorted(took)
    several = len(ordered) > 1
    low, high = ordered[len(ordered) // 10], ordered[-1 - max(len(ordered) // 20, several)]
    return max(low, high - LATE_SECONDS, SHORTEST)


_Kind = tuple[Path, str, tuple[str, ...] | None]


class Leads:
    """The leads of all deployments. One that is new takes that of its interpreter. Owns them, and how long preparing takes."""

    def __init__(self, major: Callable[[Path], int | None] = lambda _: None) -> None:
        """`major`: which generation of Prefect a Python has, where that is known."""
        self._major = major
        self._of_kind: dict[_Kind, Lead] = {}
        self._own: OrderedDict[tuple[str | None, _Kind], Lead] = OrderedDict()
        self._preparing: deque[float] = deque(maxlen=KEPT)

    def engine(self, deployment_id: str | None, flows: Flows) -> float:
        """Seconds before its time that such a run's process is to be started."""
        kind = _kind(flows)
        own = self._own.get((deployment_id, kind))
        return own.seconds if own is not None else self._general(kind).seconds

    def whole(self, deployment_id: str | None, flows: Flows) -> float:
        """Seconds before its time that such a run is to be taken: the claim and all that comes before the start included."""
        ordered = sorted(self._preparing) or [PREPARING_SECONDS]
        return self.engine(deployment_id, flows) + ordered[-1 - len(ordered) // 20] + SHORTEST / 2

    def most(self, flows: Flows) -> float:
        """The longest of them for these flows."""
        kind = _kind(flows)
        known = (deployment for deployment, of in self._own if of == kind)
        return max(self.whole(deployment, flows) for deployment in (None, *known))

    def prepared(self, seconds: float) -> None:
        """That long a run took from the offer until it could be started."""
        if seconds < LONGEST_PREPARING:
            self._preparing.append(seconds)

    def learn(
        self, deployment_id: str | None, flows: Flows, took: float, planned: float, asked: float | None = None
    ) -> None:
        """As `Lead.learn`, for that deployment and all that have none of their own yet."""
        kind = _kind(flows)
        general = self._general(kind)
        own = self._own.setdefault((deployment_id, kind), Lead(general.guess))
        self._own.move_to_end((deployment_id, kind))
        if len(self._own) > DEPLOYMENTS:
            self._own.popitem(last=False)
        for lead in (own, general):
            lead.learn(took, planned, asked)

    def _general(self, kind: _Kind) -> Lead:
        """Kept from its first run on."""
        python, start, _ = kind
        if kind not in self._of_kind:
            major = 2 if self._major(python) == 2 else 3
            guess = WARM_GUESS if start == "warm" else GUESSES[start, major]
            self._of_kind[kind] = Lead(guess)
        return self._of_kind[kind]


def _kind(flows: Flows) -> _Kind:
    return flows.python, flows.start, flows.command


class Countdown:
    """One run's way to its time. Owns when it was begun."""

    def __init__(self, run: FlowRun, flows: Flows, leads: Leads, clock: ServerClock) -> None:
        self._run = run
        self._flows = flows
        self._leads = leads
        self._clock = clock
        self._taken = trio.current_time()
        self._session: Session | None = None
        self._started: tuple[datetime, float] | None = None  # by the server's clock, and monotonic

    async def wait(self) -> None:
        """Returns when it is time to start the run's process. To be called once."""
        self._leads.prepared(trio.current_time() - self._taken)
        due = self._run.expected_start
        while due is not None:
            lead = self._leads.engine(self._run.deployment_id, self._flows)
            left = self._clock.until(due) - lead
            if left <= 0:
                break
            await trio.sleep(min(left, TICK_SECONDS))
        self._started = self._clock.now(), trio.current_time()

    def spawned(self, session: Session | None) -> None:
        """Its process has been started; `session` will tell when its engine is about to ask for Running."""
        self._session = session
        if self._started is not None and trio.current_time() - self._started[1] > LONGEST_SPAWNING:
            self._started = self._clock.now(), trio.current_time()

    def ended(self, run: FlowRun | None, starts: int) -> None:
        """Learns from what the server says of the run now."""
        due, since = self._run.expected_start, self._started
        if run is None or run.started is None or due is None or since is None or starts != 1 or not self._clock.known:
            return
        began, at = since
        took = (run.started - began).total_seconds()
        if 0 < took < LONGEST:  # below, it was Running before: in an earlier execution
            planned = (due - began).total_seconds()
            connected = None if self._session is None else self._session.connected_at
            asked = None if connected is None else connected - at
            self._leads.learn(self._run.deployment_id, self._flows, took, planned, asked)
