"""The rules of a run's life, exhaustively and by property."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import lifecycle
from supervisor.lifecycle import (
    MAX_STARTS,
    STEPS,
    Claiming,
    Closed,
    Exit,
    Exited,
    Hook,
    Outcome,
    Phase,
    ProcessRef,
    Report,
    Running,
    Starting,
    Stopping,
    StopReason,
    step,
)
from supervisor.lifecycle.decision import Done, Relaunch, decide, hook_owed
from supervisor.model import FlowRun, State, StateType

REF = ProcessRef(pid=42, start_ticks=7, boot_id="boot")
PHASES: dict[type, Phase] = {
    Claiming: Claiming(transition_id="t"),
    Starting: Starting(attempt=1),
    Running: Running(process=REF, attempt=1),
    Stopping: Stopping(process=REF, reason=StopReason.CANCEL),
    Exited: Exited(how=Exit(code=0)),
    Closed: Closed(outcome=Outcome.FINISHED),
}

names = st.sampled_from(["Pending", "Running", "Cancelling", "Cancelled", "AwaitingRetry", "Suspended", "Late", "x"])
states = st.builds(State, type=st.sampled_from(StateType), name=names, id=st.just("s"), pause_reschedule=st.booleans())


def run_in(state: State, *, in_process: bool = False) -> FlowRun:
    return FlowRun(
        id="r",
        name="n",
        flow_id="f",
        deployment_id="d",
        state_id=state.id,
        state_type=state.type,
        state_name=state.name,
        state=state,
        retry_in_process=in_process,
    )


runs = st.one_of(st.none(), st.builds(run_in, states, in_process=st.booleans()))
exits = st.one_of(
    st.none(),
    st.just(Exit()),
    st.builds(lambda code: Exit(code=code), st.integers(0, 255)),
    st.builds(lambda number: Exit(signal=number), st.integers(1, 64)),
)
reasons = st.one_of(st.none(), st.sampled_from(StopReason))


def in_state(kind: StateType, name: str = "x", *, in_process: bool = False, reschedule: bool = False) -> FlowRun:
    return run_in(State(type=kind, name=name, id="s", pause_reschedule=reschedule), in_process=in_process)


def test_the_table_of_steps_names_every_phase() -> None:
    assert set(STEPS) == set(PHASES)
    assert set().union(*STEPS.values()) <= set(PHASES)


def test_every_phase_can_reach_closed_and_closed_goes_nowhere() -> None:
    for phase in STEPS:
        seen, todo = set(), [phase]
        while todo:
            here = todo.pop()
            if here not in seen:
                seen.add(here)
                todo.extend(STEPS[here])
        assert Closed in seen, f"{phase.__name__} is a dead end"
    assert not STEPS[Closed]


@pytest.mark.parametrize(("old", "new"), list(itertools.product(PHASES, PHASES)))
def test_a_step_is_taken_exactly_when_the_table_has_it(old: type, new: type) -> None:
    if new in STEPS[old]:  # type: ignore[index]
        assert step(PHASES[old], PHASES[new]) is PHASES[new]
    else:
        with pytest.raises(ValueError, match="cannot become"):
            step(PHASES[old], PHASES[new])


@given(st.lists(st.sampled_from(list(PHASES)), max_size=30))
def test_every_walk_of_legal_steps_ends_in_closed_once_relaunches_are_used_up(wishes: list[type]) -> None:
    phase, starts = PHASES[Claiming], 0
    for wish in wishes:
        if wish is Starting and starts == MAX_STARTS:
            continue
        if wish in STEPS[type(phase)]:
            starts += wish is Starting
            phase = step(phase, PHASES[wish])
    order: list[type] = [Closed, Exited]
    while not isinstance(phase, Closed):
        phase = step(phase, PHASES[next(kind for kind in order if kind in STEPS[type(phase)])])
    assert isinstance(phase, Closed)


@given(exits, runs, reasons, st.integers(0, MAX_STARTS + 1))
def test_every_end_has_a_decision_and_none_overwrites_a_truth(
    how: Exit | None, run: FlowRun | None, stopped: StopReason | None, starts: int
) -> None:
    decision = decide(how, run, stopped=stopped, starts=starts, why="because" if stopped else "")
    assert isinstance(decision, Relaunch | Report | Done)
    if run is not None and run.state_type in (StateType.COMPLETED, StateType.FAILED):
        assert decision == Done(Outcome.FINISHED)
    if isinstance(decision, Report):
        handed_back = decision.type is StateType.SCHEDULED and stopped is StopReason.RESCHEDULE
        assert handed_back or decision.type in (StateType.CRASHED, StateType.CANCELLED)
        assert decision.message
        # Force is only for what orchestration would refuse although it is true.
        unexplained = stopped is StopReason.SHUTDOWN and run is not None and run.state_type is StateType.CRASHED
        assert decision.force == (decision.type is StateType.CANCELLED or unexplained)
    if isinstance(decision, Relaunch):
        assert stopped is None
        assert how is not None
        assert run is not None
        assert run.state_type is StateType.PENDING
        assert starts < MAX_STARTS


@given(exits, runs, reasons, st.booleans())
def test_at_most_one_kind_of_hook_is_owed_and_only_for_a_bad_end(
    how: Exit | None, run: FlowRun | None, stopped: StopReason | None, by_engine: bool
) -> None:
    decision = decide(how, run, stopped=stopped, starts=MAX_STARTS)
    owed = hook_owed(decision, run, how, stopped=stopped, by_engine=by_engine)
    if owed is not None:
        assert how is not None
        assert decision.outcome in (Outcome.CANCELLED, Outcome.CRASHED)  # type: ignore[union-attr]
        assert (owed is Hook.CANCELLATION) == (decision.outcome is Outcome.CANCELLED)  # type: ignore[union-attr]


KILLED, TERMED, CLEAN = Exit(signal=9), Exit(signal=15), Exit(code=0)
CANCEL, DOWN = StopReason.CANCEL, StopReason.SHUTDOWN

# Reference table 2.5, row by row: what the server says, how it ended, whether we stopped it -> what we do.
TABLE = [
    ("completed", in_state(StateType.COMPLETED), CLEAN, None, Done(Outcome.FINISHED)),
    ("failed", in_state(StateType.FAILED), Exit(code=1), None, Done(Outcome.FINISHED)),
    ("failed although we stopped it", in_state(StateType.FAILED), TERMED, CANCEL, Done(Outcome.FINISHED)),
    ("crashed by its engine", in_state(StateType.CRASHED), Exit(code=4), None, Done(Outcome.CRASHED)),
    ("cancelled by its engine", in_state(StateType.CANCELLED, "Cancelled"), CLEAN, CANCEL, Done(Outcome.CANCELLED)),
    ("pending once", in_state(StateType.PENDING), Exit(code=1), None, Relaunch()),
    ("suspended", in_state(StateType.PAUSED, "Suspended", reschedule=True), CLEAN, None, Done(Outcome.HANDED_BACK)),
    ("rescheduled", in_state(StateType.SCHEDULED, "AwaitingRetry"), CLEAN, None, Done(Outcome.HANDED_BACK)),
    ("deleted", None, Exit(code=1), None, Done(Outcome.DELETED)),
    ("cancelled as the machine went down", in_state(StateType.CANCELLED), TERMED, DOWN, Done(Outcome.CANCELLED)),
]
REPORTED = [
    ("running", in_state(StateType.RUNNING), KILLED, None, StateType.CRASHED),
    ("cancelling", in_state(StateType.CANCELLING), TERMED, CANCEL, StateType.CANCELLED),
    ("cancelling, and gone before we could stop it", in_state(StateType.CANCELLING), CLEAN, None, StateType.CANCELLED),
    ("the old form of cancelling", in_state(StateType.CANCELLED, "Cancelling"), TERMED, CANCEL, StateType.CANCELLED),
    ("our signal taken for a crash", in_state(StateType.CRASHED), TERMED, CANCEL, StateType.CANCELLED),
    ("crashed by its engine as the machine went down", in_state(StateType.CRASHED), TERMED, DOWN, StateType.CRASHED),
    ("stopped while running", in_state(StateType.RUNNING), TERMED, StopReason.TIMEOUT, StateType.CANCELLED),
    (
        "cancelled by its engine for our timeout",
        in_state(StateType.CANCELLED),
        CLEAN,
        StopReason.TIMEOUT,
        StateType.CANCELLED,
    ),
    ("paused process gone", in_state(StateType.PAUSED, "Paused"), KILLED, None, StateType.CRASHED),
    (
        "waiting for its own retry",
        in_state(StateType.SCHEDULED, "AwaitingRetry", in_process=True),
        KILLED,
        None,
        StateType.CRASHED,
    ),
]


@pytest.mark.parametrize(("run", "how", "stopped", "wanted"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_an_end_the_server_knows_of(
    run: FlowRun | None, how: Exit, stopped: StopReason | None, wanted: lifecycle.Decision
) -> None:
    assert decide(how, run, stopped=stopped, starts=1) == wanted


@pytest.mark.parametrize(
    ("run", "how", "stopped", "wanted"), [row[1:] for row in REPORTED], ids=[row[0] for row in REPORTED]
)
def test_an_end_the_server_must_be_told_of(
    run: FlowRun, how: Exit, stopped: StopReason | None, wanted: StateType
) -> None:
    decision = decide(how, run, stopped=stopped, starts=1, why="why" if stopped else "")
    assert isinstance(decision, Report)
    assert decision.type is wanted


def test_a_run_whose_engine_never_takes_over_is_crashed_after_the_last_start_with_its_output() -> None:
    decision = decide(Exit(code=1), in_state(StateType.PENDING), stopped=None, starts=MAX_STARTS)
    assert isinstance(decision, Report)
    assert decision.type is StateType.CRASHED
    assert decision.show_output
    assert f"{MAX_STARTS} times" in decision.message


def test_a_crash_says_the_signal_and_what_it_usually_means() -> None:
    decision = decide(KILLED, in_state(StateType.RUNNING), stopped=None, starts=1)
    assert isinstance(decision, Report)
    assert "SIGKILL" in decision.message
    assert "OOM" in decision.message


def test_our_own_reason_is_the_message_of_the_last_state() -> None:
    why = "Ended by flow-agent: too long."
    for state in (StateType.RUNNING, StateType.CANCELLING, StateType.CANCELLED):
        decision = decide(TERMED, in_state(state), stopped=StopReason.TIMEOUT, starts=1, why=why)
        assert isinstance(decision, Report)
        assert decision.message == why


HOOKS = [
    # state at exit, stopped, engine runs its own hooks, owed
    (StateType.CANCELLING, CANCEL, True, Hook.CANCELLATION),  # killed before it could
    (StateType.CANCELLED, CANCEL, True, None),
    (StateType.CANCELLED, StopReason.TIMEOUT, True, None),
    (StateType.CRASHED, CANCEL, True, None),  # it has run on_crashed
    (StateType.CRASHED, None, True, None),
    (StateType.CRASHED, DOWN, True, None),
    (StateType.RUNNING, DOWN, True, Hook.CRASHED),
    (StateType.RUNNING, None, True, Hook.CRASHED),
    (StateType.PENDING, None, True, None),  # nothing of the user's ever ran
    (StateType.COMPLETED, None, True, None),
    (StateType.CANCELLING, CANCEL, False, Hook.CANCELLATION),
    (StateType.CANCELLED, CANCEL, False, Hook.CANCELLATION),  # the server forced it after its own time-out
    (StateType.CRASHED, CANCEL, False, Hook.CANCELLATION),
    (StateType.CRASHED, None, False, Hook.CRASHED),
    (StateType.RUNNING, None, False, Hook.CRASHED),
    (StateType.FAILED, None, False, None),
]


@pytest.mark.parametrize(("state", "stopped", "by_engine", "owed"), HOOKS)
def test_the_hook_that_is_owed(
    state: StateType, stopped: StopReason | None, by_engine: bool, owed: Hook | None
) -> None:
    run = in_state(state)
    decision = decide(TERMED, run, stopped=stopped, starts=MAX_STARTS, why="why" if stopped else "")
    assert hook_owed(decision, run, TERMED, stopped=stopped, by_engine=by_engine) is owed


def test_no_hook_is_owed_when_no_process_was_ever_started() -> None:
    run = in_state(StateType.CANCELLING)
    assert hook_owed(decide(None, run, stopped=CANCEL, starts=0), run, None, stopped=CANCEL, by_engine=False) is None
