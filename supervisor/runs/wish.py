"""That a run shall end before its time: who wants it, and how urgently."""

from __future__ import annotations

import trio

from supervisor.lifecycle import StopReason


class StopWish:
    """Owns whether one run has been asked to stop. The first reason counts."""

    def __init__(self, reason: StopReason | None = None, why: str = "") -> None:
        """With a reason: an earlier agent was asked already."""
        self.asked = trio.Event()
        self.hurry = trio.Event()  # no questions, no grace
        self.reason = reason
        self.why = why
        if reason is not None:
            self.asked.set()

    def ask(self, reason: StopReason, why: str, *, hurry: bool = False) -> bool:
        """Whether this was the first to ask."""
        if hurry:
            self.hurry.set()
        if self.asked.is_set():
            return False
        self.reason, self.why = reason, why
        self.asked.set()
        return True
