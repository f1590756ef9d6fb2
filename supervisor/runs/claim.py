"""Asking the server for a run, so that it is certain afterwards whether we have it.

The server has no compare-and-set, and a claim is accepted even for a run that somebody else has finished meanwhile
(reference 1.4). So: re-read the run just before, require the very state that was offered, and after an answer was lost read again
before asking again. The transition id makes our own claim recognisable.

Another agent may still claim the run, execute it and finish between our reading and our claim. So an accepted claim counts
only when the run's history shows that it came upon a scheduled run; else the end that it overwrote is put back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from uuid import uuid4

import msgspec
import trio

from supervisor.backend.base import Backend
from supervisor.errors import BackendError, NotFound, Refused
from supervisor.failpoints import failpoint
from supervisor.model import Answer, FlowRun, Proposal, State, StateType, Verdict
from supervisor.runs.clock import ServerClock
from supervisor.runs.health import ServerHealth
from supervisor.runs.patience import Patience


class NotOurs(msgspec.Struct, frozen=True, kw_only=True):
    """The run is not ours to execute."""

    reason: str
    deployment_full: bool = False  # its deployment's concurrency limit is reached
    expected: bool = False  # everyday life, such as another agent being faster: not worth a line above debug
    unheard: bool = False  # the server could not be asked: nothing is known against the run


class Ours(msgspec.Struct, frozen=True):
    """The run is PENDING and waits for us."""

    state: State | None
    twice: bool = False  # the claim may have been sent before: nobody knows what became of that one


async def claim(
    backend: Backend,
    offer: FlowRun,
    transition_id: str,
    *,
    patience: Patience,
    health: ServerHealth,
    clock: ServerClock,
    in_doubt: bool = False,
) -> Ours | NotOurs:
    """Claims the offered run. Returns once it is certain; until then it holds on through any outage.

    `in_doubt` from the start: a claim of ours may have been stored without our having heard so, by an earlier agent.
    """
    backoff = patience.backoff()
    while True:
        try:
            settled = await _turn(backend, offer, transition_id, clock, in_doubt=in_doubt)
        except NotFound:
            health.answered()
            return NotOurs(reason="it has been deleted", expected=True)
        except _InDoubt as doubt:
            health.failed(doubt.error)
            in_doubt = True
            error = doubt.error
        except BackendError as failure:
            health.failed(failure)
            if not in_doubt:
                unheard = not isinstance(failure, Refused)
                return NotOurs(reason=f"the server did not take the claim: {failure}", unheard=unheard)
            error = failure
        else:
            health.answered()
            return settled
        backoff.failed(error)
        await trio.sleep(backoff.delay())


class _InDoubt(Exception):
    """The claim went out and its answer did not come back."""

    def __init__(self, error: BackendError) -> None:
        super().__init__(str(error))
        self.error = error


async def _turn(
    backend: Backend, offer: FlowRun, transition_id: str, clock: ServerClock, *, in_doubt: bool
) -> Ours | NotOurs:
    run = await backend.read_run(offer.id)
    if in_doubt and run.state is not None and run.state.transition_id == transition_id:
        if run.state.type is StateType.PENDING:
            return await _unless_too_late(backend, offer, transition_id, Ours(run.state))
        return NotOurs(reason=f"it became {run.state.name} while its claim was in doubt")
    if in_doubt and run.state_type is StateType.CANCELLING and run.infrastructure_pid == offer.infrastructure_pid:
        # Only a run that was claimed becomes Cancelling, and nobody has started a process for it since: most likely our
        # claim was stored and cancelled before we heard of it. Who else would end it?
        return Ours(run.state)
    if run.state_id != offer.state_id:
        return NotOurs(reason=f"it is {run.state_name} by now", expected=True)
    if run.retry_in_process:
        return NotOurs(reason="its own process is waiting to retry it", expected=True)
    failpoint("before claim")
    sent = trio.current_time()
    try:
        verdict = await backend.propose(offer.id, Proposal(type=StateType.PENDING, transition_id=transition_id))
    except BackendError as error:
        if error.ambiguous:
            raise _InDoubt(error) from error
        raise
    if verdict.answer is Answer.ACCEPT and verdict.state is not None and verdict.state.at is not None:
        clock.heard(verdict.state.at, sent=sent)
    failpoint("after claim")
    settled = judge(verdict, transition_id)
    if isinstance(settled, Ours):
        ours = msgspec.structs.replace(settled, twice=in_doubt)
        return await _unless_too_late(backend, offer, transition_id, ours)
    return settled


async def _unless_too_late(backend: Backend, offer: FlowRun, transition_id: str, ours: Ours) -> Ours | NotOurs:
    """`ours`, unless the claim came upon a run that somebody else has executed: then their end is put back."""
    try:
        before = claimed_from(await backend.history(offer.id), transition_id)
        if before is None or before.id == offer.state_id or before.type is StateType.CANCELLING:
            return ours  # a wish to cancel may follow upon our claim
        run = await backend.read_run(offer.id)
        if before.type is StateType.SCHEDULED:
            if run.retry_in_process:  # its process asks for RUNNING when the time has come, from PENDING as well
                return NotOurs(reason="its own process is waiting to retry it", expected=True)
            return ours
        if run.state is not None and run.state.transition_id == transition_id:
            await backend.propose(offer.id, put_back(before))
    except NotFound:
        return ours  # deleted, or a server that does not show histories: who executes it will be told
    except BackendError as error:
        raise _InDoubt(error) from error  # our claim stands: hold on until this is known
    return NotOurs(reason=f"somebody else executed it while we claimed it: it is {before.name}")


def claimed_from(history: Sequence[State], transition_id: str) -> State | None:
    """The state that our claim has replaced.

    States are ordered by when they were proposed and not by when they were stored, and a claim can have waited for the
    server's database: so it is the last one that is not ours, wherever our own stands.
    """
    return next((state for state in reversed(history) if state.transition_id != transition_id), None)


def claimed_since(history: Sequence[State], claim_id: str, ours: Collection[str]) -> bool:
    """Whether somebody else's claim follows upon that claim of ours in the run's history."""
    place = next((place for place, state in enumerate(history) if state.transition_id == claim_id), None)
    if place is None:
        return False
    # An engine whose upstream has failed also says PENDING, under this name.
    return any(
        state.type is StateType.PENDING and state.transition_id not in ours and state.name != "NotReady"
        for state in history[place + 1 :]
    )


def taken_over(history: Sequence[State], claim_id: str, ours: Collection[str]) -> State | None:
    """The last that others have said of the run since that claim of ours, if its engine has ever taken it over.

    A claim whose answer was lost can be stored again when the run has long been executed, if the server's database was
    busy for so long: then the run only looks as if nobody had begun it.
    """
    place = next((place for place, state in enumerate(history) if state.transition_id == claim_id), len(history))
    theirs = [state for state in history[place:] if state.transition_id not in ours]
    begun = any(state.type is StateType.RUNNING or state.type.terminal for state in theirs)
    return theirs[-1] if begun else None


def put_back(state: State) -> Proposal:
    """What makes a state the run's again that a claim of ours has overwritten."""
    return Proposal(
        type=state.type,
        name=state.name,
        message=state.message,
        data=state.data,
        transition_id=str(uuid4()),
        force=True,
    )


def judge(verdict: Verdict, transition_id: str) -> Ours | NotOurs:
    """What the server's answer to a claim means."""
    state = verdict.state
    pending = state is None or state.type is StateType.PENDING
    if verdict.answer is Answer.ACCEPT and pending:
        return Ours(state)
    if verdict.answer is Answer.REJECT and state is not None and pending and state.transition_id == transition_id:
        return Ours(state)  # "already made this transition": the answer to an earlier try of ours was lost
    why = verdict.reason or f"the server answered {verdict.answer.value}"
    if state is not None and state.name == "AwaitingConcurrencySlot":
        return NotOurs(reason=why, deployment_full=True)
    if verdict.answer is Answer.ABORT:
        return NotOurs(reason=why, expected="PENDING" in why)
    if state is not None and state.type is not StateType.PENDING:
        why = f"{why} (it is {state.name})"
    return NotOurs(reason=why)
