"""Calls that must get through: repeated through any outage until the server answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from supervisor.config import Poll
from supervisor.errors import BackendError, NotFound, Refused
from supervisor.runs.backoff import Backoff
from supervisor.runs.health import ServerHealth

T = TypeVar("T")


class Patience:
    """How reports wait out an outage: quick at first, then up to `max_backoff_seconds` apart, for as long as it takes."""

    def __init__(self, poll: Poll, health: ServerHealth) -> None:
        self._poll = poll
        self._health = health

    def use(self, poll: Poll) -> None:
        """How long calls that begin from now on wait between two tries."""
        self._poll = poll

    def backoff(self) -> Backoff:
        return Backoff(0.25, cap=self._poll.max_backoff_seconds, jitter=self._poll.jitter)

    async def until_answered(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns, however long that takes.

        Raises `NotFound` and `Refused` at once: those are answers. The call must be safe to repeat.
        """
        backoff = self.backoff()
        while True:
            try:
                result = await call()
            except (NotFound, Refused):
                self._health.answered()
                raise
            except BackendError as error:
                self._health.failed(error)
                backoff.failed(error)
                await trio.sleep(backoff.delay())
            else:
                self._health.answered()
                return result
