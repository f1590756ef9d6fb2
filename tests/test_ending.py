"""The end of a run on this side: what is reported, in which order, through lost answers and moved states."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from supervisor.config import Flows, Poll
from supervisor.errors import LostAnswer, ServerTrouble, Unreachable
from supervisor.lifecycle import Exit, Exited, Hook, Outcome, StopReason
from supervisor.model import FlowRun, Job, State, StateType
from supervisor.runs.ending import Ending, Facts, engine_ran_hooks
from supervisor.runs.entry import Entry
from supervisor.runs.health import ServerHealth
from supervisor.runs.kit import Kit
from supervisor.runs.patience import Patience
from supervisor.runs.teller import Teller
from tests.fakes import FakeBackend, FakeJournal, NoOutput, offer, on_jumping_clock, record_of

KILLED = Exit(signal=9)
CLAIM = "7d7f66b5-9f3c-4ad4-9d6a-0a1f3a3f6f0e"


class HookRunner:
    """Stands in for the launcher: notes which hook was run, and in which state the run was then."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend
        self.ran: list[tuple[Hook, StateType]] = []

    async def run_hook(self, hook: Hook, run: FlowRun, job: Job, flows: Flows) -> bool:
        self.ran.append((hook, self._backend.states[run.id].type))
        return True


async def end(backend: FakeBackend, facts: Facts, output: Path = Path("/nowhere")) -> tuple[Outcome, HookRunner]:
    health = ServerHealth("http://server/api")
    patience = Patience(Poll(), health)
    hooks = HookRunner(backend)
    kit = Kit(
        backend=backend,
        health=health,
        patience=patience,
        teller=Teller(backend, patience, worker="w", version="0"),
        launcher=hooks,  # type: ignore[arg-type]
        journal=FakeJournal(),
        output=NoOutput(),
    )
    log = logging.LoggerAdapter(logging.getLogger("test"), {})
    record = record_of(offer(), Exited(how=facts.how, stopped=facts.stopped), claim_id=CLAIM)
    entry = Entry(record, kit.journal, "boot", log)
    ending = Ending(entry, Flows(python=Path("/nowhere")), kit, output, log)
    run, decision = await ending.look(facts)
    return await ending.settle(run, decision, facts, Job()), hooks


def ended(state: StateType, name: str | None = None) -> FakeBackend:
    backend = FakeBackend(offer())
    backend.set_state("r1", state, name)
    return backend


def said(backend: FakeBackend) -> list[str]:
    return [record.message for name, records in backend.calls if name == "write_logs" for record in records]


@on_jumping_clock
async def test_a_crash_is_reported_then_told_in_the_log_and_then_its_hook_runs() -> None:
    backend = ended(StateType.RUNNING)
    outcome, hooks = await end(backend, Facts(how=KILLED, starts=1))
    assert outcome is Outcome.CRASHED
    assert backend.states["r1"].type is StateType.CRASHED
    assert "SIGKILL" in said(backend)[0]
    assert hooks.ran == [(Hook.CRASHED, StateType.CRASHED)]


@on_jumping_clock
async def test_cancellation_hooks_run_before_cancelled_is_written() -> None:
    backend = ended(StateType.CANCELLING)
    facts = Facts(how=KILLED, starts=1, stopped=StopReason.CANCEL, why="asked", runs_own_hooks=False)
    outcome, hooks = await end(backend, facts)
    assert outcome is Outcome.CANCELLED
    assert (backend.states["r1"].type, backend.states["r1"].message) == (StateType.CANCELLED, "asked")
    assert hooks.ran == [(Hook.CANCELLATION, StateType.CANCELLING)]


@on_jumping_clock
async def test_hooks_that_the_engine_had_begun_are_not_run_again() -> None:
    backend = ended(StateType.CANCELLING)
    facts = Facts(how=KILLED, starts=1, stopped=StopReason.CANCEL, hooks_seen=True)
    _, hooks = await end(backend, facts)
    assert hooks.ran == []
    assert backend.states["r1"].type is StateType.CANCELLED


@on_jumping_clock
async def test_a_report_whose_answer_was_lost_is_recognised_and_not_refused() -> None:
    """The server only says "already terminal" then, without the state; the hook and the log line are still owed."""
    backend = ended(StateType.RUNNING)
    backend.faults["propose"] = [("after", LostAnswer("reset"))]
    outcome, hooks = await end(backend, Facts(how=KILLED, starts=1))
    assert outcome is Outcome.CRASHED
    assert len(backend.proposals) == 2
    assert len({proposal.transition_id for _, proposal in backend.proposals}) == 1
    assert said(backend)
    assert hooks.ran == [(Hook.CRASHED, StateType.CRASHED)]


@on_jumping_clock
async def test_a_report_is_repeated_through_an_outage_however_long() -> None:
    backend = ended(StateType.RUNNING)
    backend.faults["read_run"] = [Unreachable("refused")] * 100
    backend.faults["propose"] = [ServerTrouble("503")] * 100
    outcome, _ = await end(backend, Facts(how=KILLED, starts=1))
    assert outcome is Outcome.CRASHED
    assert backend.states["r1"].type is StateType.CRASHED


@on_jumping_clock
async def test_a_run_that_is_handed_back_has_no_process_for_the_server_any_more() -> None:
    """Cancelled before anybody starts it again, it must be over at once: nobody would look after it."""
    backend = ended(StateType.RUNNING)
    outcome, _ = await end(backend, Facts(how=KILLED, starts=1, stopped=StopReason.RESCHEDULE))
    assert outcome is Outcome.HANDED_BACK
    names = [name for name, _ in backend.calls if name in ("patch_infrastructure", "propose")]
    assert names == ["patch_infrastructure", "propose"]
    assert ("patch_infrastructure", ("r1", None)) in backend.calls


@on_jumping_clock
async def test_a_run_that_its_engine_has_handed_back_has_no_process_either() -> None:
    backend = ended(StateType.SCHEDULED, "AwaitingRetry")
    outcome, _ = await end(backend, Facts(how=KILLED, starts=1, stopped=StopReason.RESCHEDULE))
    assert outcome is Outcome.HANDED_BACK
    assert ("patch_infrastructure", ("r1", None)) in backend.calls


def behind_a_late_claim(end: State) -> FakeBackend:
    """The run has been executed, and then a claim of ours was stored that had waited for the server's database."""
    backend = FakeBackend(offer())
    claim = State(type=StateType.PENDING, name="Pending", id="claim", transition_id=CLAIM)
    running = State(type=StateType.RUNNING, name="Running", id="running")
    backend.histories["r1"] += [claim, claim, running, end]  # ordered by proposal, as servers do
    backend.states["r1"] = claim
    return backend


@pytest.mark.parametrize("stopped", [None, StopReason.CANCEL])
@pytest.mark.parametrize("state", [StateType.COMPLETED, StateType.FAILED])
def test_an_end_that_our_own_late_claim_has_overwritten_is_put_back(
    state: StateType, stopped: StopReason | None
) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = behind_a_late_claim(State(type=state, name="Own name", id="end", message="all well", data={"x": 1}))
        outcome, hooks = await end(backend, Facts(how=KILLED, starts=1, stopped=stopped))
        now = backend.states["r1"]
        assert (outcome, now.type, now.name, now.message) == (Outcome.FINISHED, state, "Own name", "all well")
        assert now.data == {"x": 1}
        assert hooks.ran == []

    check()


@on_jumping_clock
async def test_a_run_that_was_begun_is_not_begun_again_because_of_a_late_claim() -> None:
    backend = behind_a_late_claim(State(type=StateType.RUNNING, name="Running", id="running"))
    outcome, hooks = await end(backend, Facts(how=KILLED, starts=1))
    assert outcome is Outcome.CRASHED
    assert "did not report how the run ended" in (backend.states["r1"].message or "")
    assert hooks.ran == [(Hook.CRASHED, StateType.CRASHED)]


@pytest.mark.parametrize("state", [StateType.COMPLETED, StateType.FAILED])
def test_an_end_that_arrives_between_the_look_and_the_report_is_left_alone(state: StateType) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = ended(StateType.RUNNING)
        real = backend.propose

        async def late(run_id: str, proposal: Any) -> Any:
            backend.set_state(run_id, state)
            return await real(run_id, proposal)

        backend.propose = late  # type: ignore[method-assign]
        outcome, hooks = await end(backend, Facts(how=KILLED, starts=1))
        assert outcome is Outcome.FINISHED
        assert backend.states["r1"].type is state
        assert hooks.ran == []

    check()


@on_jumping_clock
async def test_a_cancellation_that_overtakes_a_crash_report_ends_as_cancelled() -> None:
    backend = ended(StateType.RUNNING)
    real, moved = backend.propose, []

    async def late(run_id: str, proposal: Any) -> Any:
        if not moved:
            moved.append(True)
            backend.set_state(run_id, StateType.CANCELLING)
        return await real(run_id, proposal)

    backend.propose = late  # type: ignore[method-assign]
    outcome, hooks = await end(backend, Facts(how=KILLED, starts=1))
    assert outcome is Outcome.CANCELLED
    assert hooks.ran == [(Hook.CANCELLATION, StateType.CANCELLING)]


@on_jumping_clock
async def test_a_deleted_run_is_nobodys_any_more() -> None:
    backend = FakeBackend()
    outcome, hooks = await end(backend, Facts(how=KILLED, starts=1))
    assert outcome is Outcome.DELETED
    assert hooks.ran == []


def test_the_engines_own_hooks_are_seen_in_its_output(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert not engine_ran_hooks(output)
    output.write_text("Flow run 'a' - Running hook 'x' in response to entering state 'Cancelling'\n" + "more\n" * 50)
    assert engine_ran_hooks(output)
