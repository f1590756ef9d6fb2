"""How often a server is asked for what it may also say by itself."""

from __future__ import annotations

import trio

SLOW_SECONDS = 30.0  # between polls while the server says what happens: it may have failed to
ECHO_SECONDS = 1.0  # after what it has said we ask twice: it may say so before its database does
STIRRED_SECONDS = 30.0  # for how long after something happened more is expected
QUICKER = 5.0  # how many times quicker polls are then, where they are all there is
QUICKEST_SECONDS = 1.0


class Pace:
    """The waits between the polls of one loop, in seconds, before jitter. Owns what they depend on.

    Without push: the interval; a fifth of it, but at least a second, while something has happened lately. With push: half a
    minute, or the interval if that is longer; the interval where something has happened lately or is known to wait.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._pushed = False
        self._stirred_at = float("-inf")
        self._echo = False

    def use(self, interval: float) -> None:
        self._interval = interval

    def push(self, on: bool) -> bool:
        """Whether the server says by itself what happens. Returns whether that is news."""
        news, self._pushed = on != self._pushed, on
        return news

    def told(self) -> None:
        """The server has said that something happened."""
        self._echo = True
        self.stir()

    def stir(self) -> None:
        """Something has happened after which more is to be expected."""
        self._stirred_at = trio.current_time()

    def next(self, *, waiting: bool = False, called: bool = False) -> float:
        """How long to wait now. `waiting`: there is something to be had of which the server would not say when.

        `called`: the wait will be none at all.
        """
        stirred = trio.current_time() - self._stirred_at < STIRRED_SECONDS
        if self._echo:
            self._echo = called
            return min(self._interval, ECHO_SECONDS)
        if self._pushed:
            return self._interval if stirred or waiting else self.longest
        return max(self._interval / QUICKER, min(self._interval, QUICKEST_SECONDS)) if stirred else self._interval

    @property
    def longest(self) -> float:
        """What the next wait will be at most."""
        return max(self._interval, SLOW_SECONDS) if self._pushed else self._interval
