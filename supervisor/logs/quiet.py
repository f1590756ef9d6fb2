"""Looks at the files that nobody has written to for a while: at all of them at one go, in one of the tasks that wait for them.

A flow that sleeps costs its own task nothing. To wake 500 tasks every two seconds took as much of the machine as all else that
500 live runs need.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio


class QuietFiles:
    """Owner of the list of those files. The first who waits looks for all; when it is done, it hands that on to another."""

    def __init__(self, pause: Callable[[], float]) -> None:
        """`pause`: how many seconds there are between two looks, from now on."""
        self._pause = pause
        self._waiting: dict[Path, _File] = {}
        self._sentry: _File | None = None  # whose task looks

    async def wait_changed(self, path: Path, size: int) -> None:
        """Returns when the file is not of that size any more. One waiter for each file."""
        file = self._waiting[path] = _File(size)
        try:
            if self._sentry is not None:
                await file.wake.wait()
            if not file.changed:  # nobody looks (any more)
                self._sentry = file
                await self._look_until_changed(file)
        finally:
            del self._waiting[path]
            if self._sentry is file:
                self._sentry = next(iter(self._waiting.values()), None)
                if self._sentry is not None:
                    self._sentry.wake.set()

    async def _look_until_changed(self, own: _File) -> None:
        while not own.changed:
            await trio.sleep(self._pause())
            for path, file in self._waiting.items():
                if not file.changed and size_of(path) != file.size:
                    file.changed = True
                    file.wake.set()


class _File:
    """One file that is waited for, and its waiter's bell: it has changed, or it is that waiter's turn to look."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = False
        self.wake = trio.Event()


def size_of(path: Path) -> int:
    """In bytes; -1 when there is no such file, or it cannot be looked at."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
