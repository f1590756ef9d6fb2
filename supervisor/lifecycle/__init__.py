"""The rules of a run's life: its phases and the legal steps between them; what to report at its end is in `decision.py`.

Pure: no I/O, no clock, no trio. All steps are in `STEPS`; this room does not know who carries them out.

A phase is a value that carries only what is true then. The -ing phases are intents, stated before the deed.

    Claiming ──> Starting ──> Running ──> Exited ──> Closed
       │            │            └─> Stopping ─┘        ↑
       └────────────┴───────────────────────────────────┘

`Exited` may also go back: an engine that ended before it took the run over is started again, a bounded number of times.
"""

from __future__ import annotations

import enum
import signal
from typing import Any

import msgspec

from supervisor.model import StateType

MAX_STARTS = 3  # how often a run is started whose engine ends before it has taken the run over


class ProcessRef(msgspec.Struct, frozen=True, kw_only=True):
    """A process that cannot be mistaken for another: a pid is unique only with its start time and boot."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    boot_id: str


class StopReason(enum.StrEnum):
    """Why we end a run."""

    CANCEL = "cancel"  # somebody asked the server to cancel it
    TIMEOUT = "timeout"  # flows.timeout_seconds
    OPERATOR = "operator"  # the agent was told to stop its runs
    RESCHEDULE = "reschedule"  # the agent was told to hand its runs back, for another machine to take
    SHUTDOWN = "shutdown"  # the machine is going down


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: exactly one of code and signal, or neither where nobody could see it.

    `note` is what else is known of it: that the kernel killed it for memory, or why nobody saw the end.
    """

    code: int | None = None
    signal: int | None = None
    note: str = ""

    @classmethod
    def from_returncode(cls, returncode: int) -> Exit:
        """From the convention of Python's subprocess: negative means a signal."""
        return cls(signal=-returncode) if returncode < 0 else cls(code=returncode)

    def as_told(self) -> Exit:
        """Of a process that we have told to end: without what people usually find behind such a signal."""
        if self.signal is None or self.note:
            return self
        return Exit(signal=self.signal, note=f"ended by {_signal_name(self.signal)}")

    def __str__(self) -> str:
        if self.note:
            return self.note
        if self.signal is not None:
            return f"ended by {_signal_name(self.signal)}{_meaning(_SIGNALS, self.signal)}"
        if self.code is not None:
            return f"exited with code {self.code}{_meaning(_CODES, self.code)}"
        return "ended unseen"


# What people usually find behind these; the wording follows what Prefect's own workers tell their users.
_SIGNALS = {
    int(signal.SIGKILL): "killed from outside; on a machine short of memory this is the kernel's OOM killer",
    int(signal.SIGTERM): "somebody asked the process to end",
    int(signal.SIGINT): "interrupted",
    int(signal.SIGSEGV): "an invalid memory access, usually in a compiled extension",
    int(signal.SIGABRT): "aborted by its own runtime",
    int(signal.SIGBUS): "a memory mapping failed, usually a full disk or a truncated file",
    int(signal.SIGILL): "a compiled extension uses instructions this CPU does not have",
    int(signal.SIGHUP): "hung up",
    int(signal.SIGPIPE): "wrote into a closed pipe",
    int(signal.SIGXCPU): "a CPU limit was reached",
}
_CODES = {
    1: "an error before or outside the flow; see the output",
    125: "the command itself failed",
    126: "the command was found but could not be executed",
    127: "the command was not found",
    137: "a child was killed, usually for memory",
    139: "a child crashed on an invalid memory access",
    143: "a child was asked to end",
    247: "usually out of memory",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _meaning(table: dict[int, str], key: int) -> str:
    return f" ({table[key]})" if key in table else ""


class Outcome(enum.StrEnum):
    """How our part in a run ended."""

    NOT_OURS = "not ours"  # the server refused the claim, or the offer was stale
    FINISHED = "finished"  # the engine reported the end itself
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    FAILED = "failed"  # it could not be started as described
    HANDED_BACK = "handed back"  # suspended or rescheduled: it will be offered again
    DELETED = "deleted"


class Hook(enum.StrEnum):
    """Which of the flow's hooks is owed when a run ended badly."""

    CANCELLATION = "on_cancellation"
    CRASHED = "on_crashed"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the server this. `force` only where orchestration would refuse the truth."""

    type: StateType
    message: str
    outcome: Outcome
    name: str | None = None
    force: bool = False
    show_output: bool = False  # put the last lines of the output into the run's log
    data: Any = None  # the server's record of the result, where an end is put back


class Owed(msgspec.Struct, frozen=True, kw_only=True):
    """A report on its way: the state first, then the line in the run's log, then the crash hook."""

    report: Report
    hook: Hook | None = None  # to be run once the state has been heard
    heard: bool = False  # the server has the state


# --- phases ---------------------------------------------------------------------------------------------------------


class Claiming(msgspec.Struct, frozen=True, tag=True):
    """We are asking the server for the run. `transition_id` is what makes the claim recognisable as ours."""

    transition_id: str


class Starting(msgspec.Struct, frozen=True, tag=True):
    """The run is ours and its process is about to be started, for the `attempt`-th time (from 1)."""

    attempt: int


class Running(msgspec.Struct, frozen=True, tag=True):
    """The process lives, as far as we know."""

    process: ProcessRef
    attempt: int


class Stopping(msgspec.Struct, frozen=True, tag=True):
    """The process is being ended by us."""

    process: ProcessRef
    reason: StopReason


class Exited(msgspec.Struct, frozen=True, tag=True):
    """No process of the run lives. `how` is None when none was ever started; `stopped` when we ended it.

    `owed` is what the server must still hear, once that has been decided.
    """

    how: Exit | None
    stopped: StopReason | None = None
    owed: Owed | None = None


class Closed(msgspec.Struct, frozen=True, tag=True):
    """We are done with the run and its slot is free."""

    outcome: Outcome


Phase = Claiming | Starting | Running | Stopping | Exited | Closed

STEPS: dict[type[Phase], frozenset[type[Phase]]] = {
    Claiming: frozenset({Starting, Exited, Closed}),  # Exited: cancelled after the claim and before the start
    Starting: frozenset({Running, Exited}),
    Running: frozenset({Stopping, Exited}),
    Stopping: frozenset({Exited}),
    # Starting: the engine never took over, once more. Exited: it has been decided what to report, or the server has heard it.
    Exited: frozenset({Starting, Exited, Closed}),
    Closed: frozenset(),
}


def step(old: Phase, new: Phase) -> Phase:
    """`new`, when it may follow `old`; otherwise raises `ValueError`: a bug of ours."""
    if type(new) not in STEPS[type(old)]:
        raise ValueError(f"internal error: {type(old).__name__} cannot become {type(new).__name__}")
    return new
