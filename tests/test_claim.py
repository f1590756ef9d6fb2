"""Claiming: certain in the end whatever got lost, and never a second execution."""

from __future__ import annotations

import pytest

from supervisor.config import Poll
from supervisor.errors import LostAnswer, NotFound, Refused, ServerTrouble, Unauthorized, Unreachable
from supervisor.model import FlowRun, StateType
from supervisor.runs.claim import NotOurs, Ours, claim
from supervisor.runs.health import ServerHealth
from supervisor.runs.patience import Patience
from tests.fakes import FakeBackend, offer, on_jumping_clock


async def claim_it(backend: FakeBackend, run: FlowRun) -> Ours | NotOurs:
    health = ServerHealth("http://server/api")
    return await claim(backend, run, "t1", patience=Patience(Poll(), health), health=health)


@on_jumping_clock
async def test_a_fresh_offer_is_claimed_with_one_read_and_one_proposal() -> None:
    backend = FakeBackend(offer())
    assert isinstance(await claim_it(backend, offer()), Ours)
    assert [name for name, _ in backend.calls] == ["read_run", "propose"]
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
    assert isinstance(await claim_it(backend, offer()), Ours)
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


@on_jumping_clock
async def test_a_full_deployment_is_told_apart_from_other_refusals() -> None:
    backend = FakeBackend(offer())
    backend.full = {"d1"}
    settled = await claim_it(backend, offer())
    assert isinstance(settled, NotOurs)
    assert settled.deployment_full
