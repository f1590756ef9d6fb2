"""What time it is on the server: runs are due by its clock, and it lets none become Running earlier."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import inf

import trio

KEPT = 8  # claims
SLOW_SECONDS = 1.0  # an answer that took longer tells little about the clock
JUMP_SECONDS = 0.5
ROUGH_SECONDS = 2.0  # clocks that differ by less may be the same by what a header tells, which has no fractions

Said = tuple[datetime, float]  # what the server said the time was, and when we heard it (monotonic)


def _wall() -> datetime:
    return datetime.now(UTC)


class ServerClock:
    """Owns how far the server's clock is ahead of ours, learnt from when it says to have received our claims.

    Until a claim has told, the two are taken for the same; unless they are seconds apart by the `Date` of its answers. What has
    been learnt is forgotten when our own clock is set, or the machine has slept.
    """

    def __init__(self, wall: Callable[[], datetime] = _wall, roughly: Callable[[], Said | None] = lambda: None) -> None:
        """`roughly`: the `Date` of the server's last answer."""
        self._wall = wall
        self._roughly = roughly
        self._ahead: deque[float] = deque(maxlen=KEPT)
        self._running: float | None = None  # our wall clock less the monotonic one, as last seen
        self._since = -inf  # when that last jumped

    @property
    def known(self) -> bool:
        """Whether it is more than our own clock."""
        self._look()
        return bool(self._ahead)

    def now(self) -> datetime:
        """The time on the server, in UTC."""
        wall = self._look()
        if not self._ahead and (said := self._roughly()) is not None and said[1] >= self._since:
            rough = said[0] + timedelta(seconds=0.5 + trio.current_time() - said[1])
            return rough if abs((rough - wall).total_seconds()) > ROUGH_SECONDS else wall
        # What delays a request on its way only makes the server seem ahead.
        return wall + timedelta(seconds=min(self._ahead, default=0.0))

    def until(self, when: datetime) -> float:
        """Seconds from now to then; negative when it has passed."""
        return (when - self.now()).total_seconds()

    def heard(self, at: datetime, *, sent: float) -> None:
        """The server says that it was `at` when it received what we sent at `sent` (monotonic) and have the answer to now."""
        wall, ago = self._look(), trio.current_time() - sent
        if ago <= SLOW_SECONDS or not self._ahead:
            self._ahead.append((at - wall).total_seconds() + ago)

    def _look(self) -> datetime:
        wall = self._wall()
        running = wall.timestamp() - trio.current_time()
        if self._running is not None and abs(running - self._running) > JUMP_SECONDS:
            self._ahead.clear()
            self._since = trio.current_time()
        self._running = running
        return wall
