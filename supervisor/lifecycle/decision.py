"""What to do about a run whose process has ended: the one pure function, and which hook is owed."""

from __future__ import annotations

import msgspec

from supervisor.lifecycle import MAX_STARTS, Exit, Hook, Outcome, Report, StopReason
from supervisor.model import FlowRun, State, StateType


class Relaunch(msgspec.Struct, frozen=True):
    """The user's code never ran: start it again."""


class Done(msgspec.Struct, frozen=True):
    """The server knows already."""

    outcome: Outcome


# A stop for these reasons is no cancellation: a run that has suspended itself stays suspended.
HANDING_OVER = (StopReason.RESCHEDULE, StopReason.SHUTDOWN)

Decision = Relaunch | Report | Done


def wants_cancel(state: State) -> bool:
    """Whether somebody is still to carry the cancellation out: today's form, or that of early Prefect 2."""
    return state.type is StateType.CANCELLING or (state.type is StateType.CANCELLED and state.name == "Cancelling")


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
    if wants_cancel(run.state):
        return _cancelled(why or run.state.message or "Cancelled on request.")
    match run.state:
        case State(type=StateType.CANCELLED) if stopped in (None, StopReason.CANCEL, *HANDING_OVER):
            return Done(Outcome.CANCELLED)
        case State(type=StateType.CRASHED) if stopped is None:
            return Done(Outcome.CRASHED)  # else our own signal made an engine without a control channel call it so
        case State(type=StateType.COMPLETED | StateType.FAILED):
            return Done(Outcome.FINISHED)
        case State(type=StateType.PAUSED, pause_reschedule=True) if stopped in (None, *HANDING_OVER):
            return Done(Outcome.HANDED_BACK)
    return _left_open(how, run, starts) if stopped is None else _ended_by_us(run, stopped, why)


def _ended_by_us(run: FlowRun, stopped: StopReason, why: str) -> Decision:
    match stopped:
        case StopReason.RESCHEDULE if run.state_type is StateType.SCHEDULED:
            return Done(Outcome.HANDED_BACK)
        case StopReason.RESCHEDULE:
            return retry(why or "Handed back.")
        case StopReason.SHUTDOWN:
            message = why or "The machine went down while it ran."
            force = run.state_type is StateType.CRASHED  # by the engine, which does not know why it was signalled
            return Report(
                type=StateType.CRASHED, message=message, outcome=Outcome.CRASHED, force=force, show_output=True
            )
    return _cancelled(why or "Cancelled on request.")


def retry(message: str, *, show_output: bool = False) -> Report:
    """The run is handed back to the server, to be offered again at once, to us or to others."""
    return Report(
        type=StateType.SCHEDULED,
        name="AwaitingRetry",
        message=message,
        outcome=Outcome.HANDED_BACK,
        show_output=show_output,
    )


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
        case Report(type=StateType.CRASHED) if by_engine and run.state_type is StateType.CRASHED:
            return None
        case Report(type=StateType.CRASHED) if run.state_type is not StateType.PENDING:
            return Hook.CRASHED
        case Done(outcome=Outcome.CRASHED) if not by_engine:
            return Hook.CRASHED
    return None
