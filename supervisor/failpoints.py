"""Places where a test can have the agent die by SIGKILL, to prove that whatever it was doing is made good afterwards.

Armed by one environment variable that nothing else reads and no flow inherits: `FAILPOINT=NAME` dies the first time that
place is reached, `FAILPOINT=NAME:3` the third time; `FAILPOINT=NAME:hang` blocks the event loop there for ever, to prove
what the watchdog does. Unset, as always outside of such tests, a failpoint is one comparison.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "FAILPOINT"

# In the order in which a run comes by. "journal X" is the write of phase X; "go" is the word to a copy of a fork server, within
# "spawn". Each has a moment before and one after it.
STEPS = (
    "journal Claiming",
    "claim",
    "journal Starting",
    "submitting",
    "job",
    "spawn",
    "go",
    "journal Running",
    "pid",
    "journal Stopping",
    "ask engine",
    "others ended",
    "signal",
    "journal Exited",
    "look",
    "hook",
    "journal owed",
    "report",
    "journal heard",
    "log line",
    "clean up",
    "journal Closed",
)
FAILPOINTS = tuple(f"{when} {step}" for step in STEPS for when in ("before", "after"))

_name, _, _how = os.environ.get(VARIABLE, "").partition(":")
_hangs = _how == "hang"
_left = 1 if _hangs else int(_how or 1)


def failpoint(name: str) -> None:
    """Dies or hangs here when this is the armed place."""
    if name == _name:
        global _left
        _left -= 1
        while _left == 0 and _hangs:
            time.sleep(3600)
        if _left == 0:
            signal.raise_signal(signal.SIGKILL)
