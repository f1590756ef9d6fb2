"""Waiting for a condition, with a deadline and a sentence for when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
SLOWEST = (
    3.0  # how many times slower than ours a machine may be before a wait is given up; costs nothing where it is not
)


def wait_until(
    condition: Callable[[], T], timeout: float, what: str, *, every: float = 0.05, more: Callable[[], str] | None = None
) -> T:
    """Asks again and again until the condition is true, and returns what it said.

    Raises `AssertionError` naming `what` after `timeout` seconds of a machine like ours (`SLOWEST`); `more` may add what
    helps to understand it.
    """
    deadline = time.monotonic() + timeout * SLOWEST
    while True:
        if said := condition():
            return said
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}" + (f"\n{more()}" if more else ""))
        time.sleep(every)


def lines(path: Path) -> list[str]:
    """The lines of a file that flows append to; none while it does not exist."""
    return path.read_text().splitlines() if path.exists() else []
