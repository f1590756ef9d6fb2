"""The rules of a run's life: its phases, the legal steps between them, and what to report when its process has ended.

Pure: no I/O, no clock, no trio. Two rules. All steps are in `STEPS`; this file does not know who carries them out.

A phase is a value that carries only what is true then. The -ing phases are intents, stated before the deed.

    Claiming ──> Starting ──> Running ──> Exited ──> Closed
       │            │            └─> Stopping ─┘        ↑
       └────────────┴───────────────────────────────────┘

`Starting` and `Running` may also go back: an engine that ended before it took the run over is started again, a bounded
number of times.
"""

from __future__ import annotations

import enum
import signal

import msgspec

from supervisor.model import FlowRun, State, StateType

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


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: exactly one of code and signal, or neither where nobody could see it."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def from_returncode(cls, returncode: int) -> Exit:
        """From the convention of Python's subprocess: negative means a signal."""
        return cls(signal=-returncode) if returncode < 0 else cls(code=returncode)

    def __str__(self) -> str:
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


# --- phases ---------------------------------------------------------------------------------------------------------


class Claiming(msgspec.Struct, frozen=True, tag=True):
    """We are asking the server for the run. `transition_id` is what makes the claim recognisable as ours."""

    transition_id: str


class Starting(msgspec.Struct, frozen=True, tag=True):
    """The run is ours and its process is about to be started, for the `attempt`-th time (from 1)."""

    attempt: int


class Running(msgspec.Struct, frozen=True, tag=True):
    """The process lives."""

    process: ProcessRef
    attempt: int


class Stopping(msgspec.Struct, frozen=True, tag=True):
    """The process is being ended by us."""

    process: ProcessRef
    reason: StopReason


class Exited(msgspec.Struct, frozen=True, tag=True):
    """No process of the run lives. `how` is None when none was ever started; `stopped` when we ended it."""

    how: Exit | None
    stopped: StopReason | None = None


class Outcome(enum.StrEnum):
    """How our part in a run ended."""

    NOT_OURS = "not ours"  # the server refused the claim, or the offer was stale
    FINISHED = "finished"  # the engine reported the end itself
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    FAILED = "failed"  # it could not be started as described
    HANDED_BACK = "handed back"  # suspended or rescheduled: it will be offered again
    DELETED = "deleted"


class Closed(msgspec.Struct, frozen=True, tag=True):
    """We are done with the run and its slot is free."""

    outcome: Outcome


Phase = Claiming | Starting | Running | Stopping | Exited | Closed

STEPS: dict[type[Phase], frozenset[type[Phase]]] = {
    Claiming: frozenset({Starting, Exited, Closed}),  # Exited: cancelled after the claim and before the start
    Starting: frozenset({Running, Exited}),
    Running: frozenset({Starting, Stopping, Exited}),  # Starting: the engine never took over, once more
    Stopping: frozenset({Exited}),
    Exited: frozenset({Closed}),
    Closed: frozenset(),
}


def step(old: Phase, new: Phase) -> Phase:
    """`new`, when it may follow `old`; otherwise raises `ValueError`: a bug of ours."""
    if type(new) not in STEPS[type(old)]:
        raise ValueError(f"internal error: {type(old).__name__} cannot become {type(new).__name__}")
    return new


# --- the end of a run -----------------------------------------------------------------------------------------------


class Hook(enum.StrEnum):
    """Which of the flow's hooks is owed when a run ended badly."""

    CANCELLATION = "on_cancellation"
    CRASHED = "on_crashed"


class Relaunch(msgspec.Struct, frozen=True):
    """The user's code never ran: start it again."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the server this. `force` only where orchestration would refuse the truth."""

    type: StateType
    message: str
    outcome: Outcome
    force: bool = False
    show_output: bool = False  # put the last lines of the output into the run's log


class Done(msgspec.Struct, frozen=True):
    """The server knows already."""

    outcome: Outcome


Decision = Relaunch | Report | Done


def decide(
    how: Exit | None, run: FlowRun | None, *, stopped: StopReason | None, starts: int, why: str = ""
) -> Decision:
    """What to do about a run whose process has ended, by what the server says of it (reference table 2.5).

    Exit codes prove nothing (they differ by engine version), so the server's state decides. `run` is None when it
    has been deleted; `how` is None when no process was ever started; `stopped` is our reason when we ended it, told
    in words by `why`; `starts` is how often it was started.
    """
    if run is None or run.state is None:
        return Done(Outcome.DELETED)
    match run.state:
        case State(type=StateType.CANCELLING) | State(type=StateType.CANCELLED, name="Cancelling"):
            return _cancelled(why or run.state.message or "Cancelled on request.")
        case State(type=StateType.CANCELLED) if stopped in (None, StopReason.CANCEL):
            return Done(Outcome.CANCELLED)
        case State(type=StateType.CRASHED) if stopped is not None:
            # Our own signal made an engine without a control channel call it a crash.
            return _cancelled(why or "Cancelled on request.")
        case State(type=StateType.CRASHED):
            return Done(Outcome.CRASHED)
        case State(type=StateType.COMPLETED | StateType.FAILED):
            return Done(Outcome.FINISHED)
        case State(type=StateType.PAUSED, pause_reschedule=True) if stopped is None:
            return Done(Outcome.HANDED_BACK)
    if stopped is not None:
        return _cancelled(why or "Cancelled on request.")
    return _left_open(how, run, starts)


def _cancelled(message: str) -> Report:
    return Report(type=StateType.CANCELLED, message=message, outcome=Outcome.CANCELLED, force=True)


def _left_open(how: Exit | None, run: FlowRun, starts: int) -> Decision:
    """The engine left the run in a state that nobody else will end."""
    ended = f"the process {how}" if how is not None else "no process was started"
    match run.state_type:
        case StateType.PENDING if how is not None and starts < MAX_STARTS:
            return Relaunch()
        case StateType.PENDING:
            said = f"The engine never took the run over: {ended}" + (f", {starts} times." if starts > 1 else ".")
        case StateType.SCHEDULED if not run.retry_in_process:
            return Done(Outcome.HANDED_BACK)
        case StateType.SCHEDULED:
            said = f"The process that was waiting to retry the run is gone: {ended}."
        case StateType.PAUSED:
            said = f"The process of the paused run is gone: {ended}."
        case _:
            said = f"The process did not report how the run ended: {ended}."
    return Report(type=StateType.CRASHED, message=said, outcome=Outcome.CRASHED, show_output=True)


# The engine has run on_cancellation, or took our signal for a crash and has run on_crashed.
_SEEN_BY_ENGINE = frozenset({StateType.CANCELLED, StateType.CRASHED})


def hook_owed(
    decision: Decision, run: FlowRun | None, how: Exit | None, *, stopped: StopReason | None, by_engine: bool
) -> Hook | None:
    """Which hook of the flow has not been run although the way the run ended calls for it.

    `run` is the run as it was when its process had ended, before our report. `by_engine` tells engines that run their
    own hooks when they can (3.6.27 and later, told through the control channel) from older ones, whose hooks we switch
    off because nothing would tell us afterwards whether they ran (reference 2.4).
    """
    if how is None or run is None or run.state_type is None:
        return None  # nothing of the user's was ever started, or nobody is left to tell
    match decision:
        case Report(type=StateType.CANCELLED) if by_engine and run.state_type in _SEEN_BY_ENGINE:
            return None
        case Report(type=StateType.CANCELLED):
            return Hook.CANCELLATION
        case Done(outcome=Outcome.CANCELLED) if stopped is not None and not by_engine:
            return Hook.CANCELLATION
        case Report(type=StateType.CRASHED) if run.state_type is not StateType.PENDING:
            return Hook.CRASHED
        case Done(outcome=Outcome.CRASHED) if not by_engine:
            return Hook.CRASHED
    return None
