"""What each signal to the agent means: drain, then cancel, then kill (docs/architecture.md, "Signals")."""

from __future__ import annotations

import enum
import signal

DEBOUNCE_SECONDS = 0.1  # a one-file binary is handed the same signal twice, within a millisecond


class Rung(enum.IntEnum):
    """How far the agent has been told to go. Only ever climbed."""

    WORK = 0
    DRAIN = 1  # take no new runs, let the live ones end
    CANCEL = 2  # cancel the live ones, with their grace
    KILL = 3  # kill them and go


class Ladder:
    """Where the agent is on the ladder, and when it was last pushed."""

    def __init__(self) -> None:
        self.rung = Rung.WORK
        self._last: dict[int, float] = {}

    def push(self, signum: int, now: float) -> Rung | None:
        """The rung this signal leads to; None when it changes nothing. `now` is monotonic, in seconds."""
        if now - self._last.get(signum, float("-inf")) < DEBOUNCE_SECONDS:
            return None
        self._last[signum] = now
        if signum in (signal.SIGTERM, signal.SIGINT) and self.rung < Rung.KILL:
            self.rung = Rung(self.rung + 1)
        elif signum == signal.SIGQUIT and self.rung < Rung.CANCEL:
            self.rung = Rung.CANCEL
        else:
            return None
        return self.rung
