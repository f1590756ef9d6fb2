"""Claiming: certain in the end whatever got lost, and never a second execution."""

from __future__ import annotations

from uuid import uuid4

import pytest

from supervisor.config import Poll
from supervisor.errors import LostAnswer, NotFound, Refused, ServerTrouble, Unauthorized, Unreachable
from supervisor.model import FlowRun, Proposal, State, StateType, Verdict
from supervisor.runs.claim import NotOurs, Ours, claim
from supervisor.runs.clock import ServerClock
from supervisor.runs.health import ServerHealth
from supervisor.runs.patience import Patience
from tests.fakes import FakeBackend, offer, on_jumping_clock


async def claim_it(backend: FakeBackend, run: FlowRun) -> Ours | NotOurs:
    health = ServerHealth("http://server/api")
    return await claim(backend, run, "t1", patience=Patience(Poll(), health), health=health, clock=ServerClock())


@on_jumping_clock
async def test_a_fresh_offer_is_claimed_with_one_proposal_between_two_looks() -> None:
    backend = FakeBackend(offer())
    ours = await claim_it(backend, offer())
    assert isinstance(ours, Ours)
    assert not ours.twice
    assert [name for name, _ in backend.calls] == ["read_run", "propose", "history"]
    assert backend.proposals[0][1].transition_id == "t1"


@on_jumping_clock
async def test_a_stale_offer_is_not_claimed_although_the_server_would_accept() -> None:
    backend = FakeBackend(offer())
    backend.set_state("r1", StateType.COMPLETED)  # somebody else ran it since the poll
    assert isinstance(await claim_it(backend, offer()), NotOurs)
    assert not backend.proposals


@on_jumping_clock
async def test_a_run_that_waits_for_its_own_retry_is_left_alone() -> None:
    run = offer(retry_in_process=True)
    backend = FakeBackend(run)
    assert isinstance(await claim_it(backend, run), NotOurs)
    assert not backend.proposals


@on_jumping_clock
async def test_a_claim_whose_answer_was_lost_is_recognised_as_ours() -> None:
    backend = FakeBackend(offer())
    backend.faults["propose"] = [("after", LostAnswer("reset"))]
    assert isinstance(await claim_it(backend, offer()), Ours)
    assert len(backend.proposals) == 1  # reading settled it: nothing was proposed twice


@on_jumping_clock
async def test_a_claim_that_never_arrived_is_made_again_with_the_same_transition_id() -> None:
    backend = FakeBackend(offer())
    backend.faults["propose"] = [ServerTrouble("503"), LostAnswer("reset"), ServerTrouble("502")]
    ours = await claim_it(backend, offer())
    assert isinstance(ours, Ours)
    assert ours.twice
    assert {proposal.transition_id for _, proposal in backend.proposals} == {"t1"}


@on_jumping_clock
async def test_a_claim_in_doubt_is_held_through_an_outage_and_settled_after_it() -> None:
    backend = FakeBackend(offer())
    backend.faults["propose"] = [("after", LostAnswer("reset"))]
    backend.faults["read_run"] = [None, *[Unreachable("refused")] * 50, Unauthorized("401"), ServerTrouble("html")]
    assert isinstance(await claim_it(backend, offer()), Ours)
    assert len(backend.proposals) == 1


@on_jumping_clock
async def test_a_claim_in_doubt_that_somebody_else_won_is_given_up() -> None:
    backend = FakeBackend(offer())
    backend.faults["propose"] = [LostAnswer("reset")]

    real = backend.read_run
    reads = 0

    async def read_run(run_id: str) -> FlowRun:
        nonlocal reads
        reads += 1
        if reads == 2:
            backend.set_state("r1", StateType.COMPLETED)
        return await real(run_id)

    backend.read_run = read_run  # type: ignore[method-assign]
    assert isinstance(await claim_it(backend, offer()), NotOurs)
    assert not backend.proposals


@pytest.mark.parametrize("error", [Unreachable("refused"), Unauthorized("401"), Refused("422", status=422)])
@pytest.mark.parametrize("method", ["read_run", "propose"])
def test_a_claim_that_certainly_did_not_happen_is_forgotten_at_once(method: str, error: Exception) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer())
        backend.faults[method] = [error]
        assert isinstance(await claim_it(backend, offer()), NotOurs)
        assert backend.count("read_run") == 1

    check()


@on_jumping_clock
async def test_a_deleted_run_is_nobodys() -> None:
    backend = FakeBackend(offer())
    backend.faults["propose"] = [NotFound("gone")]
    settled = await claim_it(backend, offer())
    assert isinstance(settled, NotOurs)
    assert settled.expected


@on_jumping_clock
async def test_a_run_another_agent_claimed_first_is_nothing_to_shout_about() -> None:
    backend = FakeBackend(offer())
    real = backend._orchestrate

    def lose(run_id: str, proposal: object) -> object:
        backend.set_state(run_id, StateType.PENDING)
        return real(run_id, proposal)  # type: ignore[arg-type]

    backend._orchestrate = lose  # type: ignore[assignment,method-assign]
    settled = await claim_it(backend, offer())
    assert isinstance(settled, NotOurs)
    assert settled.expected


def overtaken(backend: FakeBackend, *states: StateType) -> None:
    """Others are faster by that much, between our last look and our claim."""
    real = backend._orchestrate

    def late(run_id: str, proposal: Proposal) -> Verdict:
        backend._orchestrate = real  # type: ignore[method-assign]
        for state in states:
            backend._store(
                run_id, State(type=state, name=f"Their{state.value.title()}", id=str(uuid4()), data={"r": 1})
            )
        return real(run_id, proposal)

    backend._orchestrate = late  # type: ignore[method-assign]


DONE = (StateType.PENDING, StateType.RUNNING, StateType.COMPLETED)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("end", [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED])
def test_a_claim_that_came_after_somebody_elses_execution_is_undone(end: StateType, lost: bool) -> None:
    @on_jumping_clock
    async def check() -> None:
        backend = FakeBackend(offer())
        overtaken(backend, StateType.PENDING, StateType.RUNNING, end)
        if lost:
            backend.faults["propose"] = [("after", LostAnswer("reset"))]
            backend.faults["history"] = [Unreachable("refused"), ServerTrouble("503")]
        settled = await claim_it(backend, offer())
        assert isinstance(settled, NotOurs)
        assert "somebody else executed it" in settled.reason
        now = backend.states["r1"]
        assert (now.type, now.name, now.data) == (end, f"Their{end.value.title()}", {"r": 1})

    check()


@on_jumping_clock
async def test_a_run_that_was_executed_and_scheduled_again_is_claimed() -> None:
    backend = FakeBackend(offer())
    overtaken(backend, *DONE, StateType.SCHEDULED)
    assert isinstance(await claim_it(backend, offer()), Ours)
    assert backend.states["r1"].type is StateType.PENDING


@on_jumping_clock
async def test_a_run_whose_own_process_waits_to_retry_it_is_left_to_that() -> None:
    backend = FakeBackend(offer())
    overtaken(backend, StateType.PENDING, StateType.RUNNING, StateType.SCHEDULED)
    real = backend.propose

    async def propose(run_id: str, proposal: Proposal) -> Verdict:
        verdict = await real(run_id, proposal)
        backend.runs[run_id] = offer(run_id, retry_in_process=True)
        return verdict

    backend.propose = propose  # type: ignore[method-assign]
    assert isinstance(await claim_it(backend, offer()), NotOurs)
    assert len(backend.proposals) == 1


@on_jumping_clock
async def test_an_end_that_somebody_has_changed_meanwhile_is_left_as_it_is() -> None:
    backend = FakeBackend(offer())
    overtaken(backend, *DONE)
    real = backend.history

    async def history(run_id: str) -> list[State]:
        states = await real(run_id)
        backend.set_state(run_id, StateType.CANCELLED)
        return states

    backend.history = history  # type: ignore[method-assign]
    assert isinstance(await claim_it(backend, offer()), NotOurs)
    assert backend.states["r1"].type is StateType.CANCELLED


@on_jumping_clock
async def test_a_wish_to_cancel_right_after_the_claim_leaves_the_run_ours() -> None:
    backend = FakeBackend(offer())
    real = backend.history

    async def history(run_id: str) -> list[State]:
        backend.set_state(run_id, StateType.CANCELLING)
        return await real(run_id)

    backend.history = history  # type: ignore[method-assign]
    assert isinstance(await claim_it(backend, offer()), Ours)


@on_jumping_clock
async def test_a_full_deployment_is_told_apart_from_other_refusals() -> None:
    backend = FakeBackend(offer())
    backend.full = {"d1"}
    settled = await claim_it(backend, offer())
    assert isinstance(settled, NotOurs)
    assert settled.deployment_full
