"""What happens to the run, and when: the words that a script is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from hypothesis import strategies as st

from supervisor.errors import BackendError, LostAnswer, ServerTrouble, Unreachable
from supervisor.failpoints import FAILPOINTS

RUN = "r1"
TRANSIT = 0.05  # seconds from here to the server, and the same back
DISK = 0.001  # seconds for a write
BLACK_HOLE = 10.0  # seconds after which an answer is given up
SPAWN = 0.01
IMPORT = 2.0  # seconds until an engine asks for RUNNING
HOOK = 3.0
CANCELLING_TIMEOUT = 300.0  # after which a server of 3.8 calls a run Cancelled that is Cancelling
LONGEST = 7200.0  # seconds after which the run must have ended, whatever has happened
ENDLESS = 1800.0  # seconds that a body takes which nobody ends
OUTLIVES = 200.0  # seconds that a cancelled run may run on while all is well: a minute's wait, the polls, the grace
AFTERMATH = 100.0  # seconds, all well, in which nothing may happen to it any more

DIES, REBOOTS = "the agent dies", "the machine reboots"
STOPS = {f"the agent is told to {action}": action for action in ("drain", "cancel", "keep", "reschedule")}
OUTAGES: Mapping[str, Callable[[], BackendError]] = {
    "the server refuses connections": lambda: Unreachable("refused"),
    "the network swallows all": lambda: LostAnswer("timed out"),
    "the server answers 503": lambda: ServerTrouble("503"),
}
SWALLOWED = "the network swallows all"
LOSES, CANCEL, KILLED, FULL = "an answer is lost", "somebody cancels", "the process is killed", "the disk is full"
LASTING = (DIES, *OUTAGES, REBOOTS, *STOPS, FULL)
SUDDEN = (CANCEL, LOSES, KILLED)
FATES = ("completes", "is cancelled", "exits", "is killed", "fails")


class Deed(msgspec.Struct, frozen=True):
    """What happens, and how long it lasts: an outage, or the time until there is an agent again."""

    what: str
    seconds: float = 0.0


class Step(msgspec.Struct, frozen=True):
    """The deed happens when an agent comes by that failpoint for the `nth` time, or at that second."""

    when: str | float
    nth: int
    deed: Deed


class Script(msgspec.Struct, frozen=True):
    """What happens to the run, how it would go by itself, and how the agent is configured."""

    steps: tuple[Step, ...] = ()
    fate: str = "completes"  # one of `FATES`: how the body ends
    body: float = 8.0  # after so many seconds
    modern: bool = True  # its engine has a control channel and runs its own hooks
    deaf: bool = False  # its engine ignores SIGTERM
    timeout: float | None = None
    crash_retries: int = 0


spans = st.sampled_from([1.0, 20.0, 400.0])
counts = st.sampled_from([1, 1, 1, 2])
moments = st.sampled_from([*FAILPOINTS, 0.0, 0.2, 0.6, 2.6, 2.7, 5.0, 12.0, 30.0, 200.0])
lasting = st.builds(Deed, st.sampled_from(LASTING), spans)
sudden = st.builds(Deed, st.sampled_from(SUDDEN))
deaths = st.builds(Step, st.sampled_from(FAILPOINTS), counts, st.builds(Deed, st.just(DIES), spans))
steps = deaths | st.builds(Step, moments, counts, lasting | sudden)  # to die is what it is about
scripts = st.builds(
    Script,
    steps=st.lists(steps, max_size=6).map(tuple),
    fate=st.sampled_from(FATES),
    body=st.sampled_from([8.0, 0.02, 60.0, ENDLESS]),
    modern=st.booleans(),
    deaf=st.sampled_from([False, False, True]),
    timeout=st.sampled_from([None, None, None, 30.0]),
    crash_retries=st.sampled_from([0, 0, 1]),
)
