"""How long a loop waits before its next turn."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.errors import BackendError


class Backoff:
    """The waits of one loop: its interval while things go well, doubling up to `cap` seconds while they do not.

    Owns those times and the number of failures in a row. Every wait is multiplied by a random factor of 1 ± `jitter`, so that
    many agents that lost their server together do not come back together.
    """

    def __init__(self, interval: float, *, cap: float, jitter: float, rng: random.Random | None = None) -> None:
        self.use(interval, cap=cap, jitter=jitter)
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._failures = 0
        self._at_least = 0.0

    def use(self, interval: float, *, cap: float, jitter: float) -> None:
        """Waits like this from now on; failures count as before."""
        self._interval = interval
        self._cap = cap
        self._jitter = jitter

    @property
    def failing(self) -> bool:
        return self._failures > 0

    @property
    def told_to_wait(self) -> bool:
        """Whether the server itself has said how long it wants to be left alone."""
        return self._at_least > 0

    def succeeded(self) -> None:
        self._failures = 0
        self._at_least = 0.0

    def failed(self, error: BackendError | None = None) -> None:
        """Counts a failure. The server's own Retry-After, where it sent one, is the least to wait."""
        self._failures += 1
        self._at_least = (error.retry_after if error is not None else None) or 0.0

    def delay(self, every: float | None = None) -> float:
        """Seconds until the next turn. `every` is in place of the interval while things go well."""
        # The exponent is bounded because a float is not: 2.0**1024 raises.
        plain = self._interval * 2.0 ** min(self._failures, 30)
        going_well = self._interval if every is None else every
        wait = min(plain, max(self._cap, self._interval)) if self._failures else going_well
        return max(self._at_least, wait * self._rng.uniform(1 - self._jitter, 1 + self._jitter))
