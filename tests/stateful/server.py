"""The server of that world."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from supervisor.errors import BackendError, LostAnswer
from supervisor.model import Answer, FlowRun, LogRecord, Pool, Proposal, State, StateType, Verdict
from tests.fakes import FakeBackend, offer
from tests.stateful.machine import Engine, Life
from tests.stateful.script import BLACK_HOLE, CANCELLING_TIMEOUT, OUTAGES, RUN, SWALLOWED, TRANSIT

if TYPE_CHECKING:
    from tests.stateful.world import World


class FakeServer(FakeBackend):
    """A server of 3.8 as one agent and its engines reach it. Knows what must never happen to a run."""

    def __init__(self, world: World) -> None:
        super().__init__(offer(RUN))
        self.pools["p"] = Pool(id="p", name="p", type="process")
        self.world = world
        self.life = Life()  # of the agent that asks
        self.outage: str | None = None
        self.lose_next = False
        self.cut_off = False  # there was an outage
        self.pid: str | None = None
        self.cancelled = False  # somebody's wish to cancel was taken
        self.cancelled_at: float | None = None  # when it became CANCELLED, if it still is
        self.engines_word: StateType | None = None
        self.log: list[str] = []

    # --- the way there and back ---

    async def _send(self) -> None:
        if (outage := self.outage) is not None:
            await trio.sleep(BLACK_HOLE if outage == SWALLOWED else TRANSIT)
            raise OUTAGES[outage]()
        with trio.CancelScope(shield=True):  # what has been sent arrives, whatever becomes of the sender
            await trio.sleep(TRANSIT)

    async def _call(self, method: str, about: Any = None) -> BackendError | None:
        """All that there is to say of calls of the agent that change nothing here."""
        await self._answer(await self._arrive())
        return None

    async def _arrive(self) -> bool:
        """A call of the agent's arrives. Returns whether its answer is to be lost."""
        self.life.check()
        await self._send()
        lost, self.lose_next = self.lose_next, False
        return lost

    async def _answer(self, lost: bool) -> None:
        await trio.sleep(TRANSIT)
        self.life.check()
        if lost:
            raise LostAnswer("reset")

    async def propose(self, run_id: str, proposal: Proposal) -> Verdict:
        lost = await self._arrive()
        if proposal.type.terminal:
            self.world.expect(not self.world.living(Engine), f"{proposal.type.value} reported while an engine lives")
        verdict = self._orchestrate(run_id, proposal)
        self.world.say(f"the agent proposes {proposal.name or proposal.type.value}: {verdict.answer.value}")
        await self._answer(lost)
        return verdict

    async def patch_infrastructure(self, run_id: str, pid: str | None) -> None:
        lost = await self._arrive()
        self.pid = pid
        await self._answer(lost)

    async def write_logs(self, records: Sequence[LogRecord]) -> None:
        lost = await self._arrive()
        self.log.extend(record.message for record in records)
        await self._answer(lost)

    async def has_log(self, run_id: str, message: str) -> bool:
        await self._call("has_log")
        return message in self.log

    async def read_run(self, run_id: str) -> FlowRun:
        lost = await self._arrive()
        found = msgspec.structs.replace(self._described(), state=self.states[RUN])
        await self._answer(lost)
        return found

    async def hear_engine(self, proposal: Proposal) -> Verdict:
        await self._send()
        verdict = self._orchestrate(RUN, proposal)
        self.world.say(f"the engine proposes {proposal.type.value}: {verdict.answer.value}")
        if proposal.type.terminal and verdict.answer is Answer.ACCEPT:
            self.engines_word = proposal.type
        await trio.sleep(TRANSIT)
        return verdict

    def hear_user(self) -> None:
        """Somebody wants the run cancelled."""
        if self.outage is None:
            verdict = self._orchestrate(RUN, Proposal(type=StateType.CANCELLING, transition_id="user"))
            self.world.say(f"somebody cancels: {verdict.answer.value}")
            self.cancelled |= verdict.answer is not Answer.ABORT

    def _offers(self, limit: int, before: datetime) -> list[FlowRun]:
        found = self._described()
        return [found] if found.state_type is StateType.SCHEDULED else []

    def _described(self) -> FlowRun:
        state = self.states[RUN]
        return msgspec.structs.replace(
            self.runs[RUN],
            state_id=state.id,
            state_type=state.type,
            state_name=state.name,
            infrastructure_pid=self.pid,
        )

    # --- its rules ---

    def _orchestrate(self, run_id: str, proposal: Proposal) -> Verdict:
        now, kind = self.states[RUN], proposal.type
        refusal = None if proposal.force else self._refusal(now, proposal)
        if refusal is not None:
            return refusal
        if (now.type, kind) == (StateType.SCHEDULED, StateType.CANCELLING) and self.pid is None:
            self._store(RUN, self._made(StateType.CANCELLED, proposal))
            return Verdict(answer=Answer.REJECT, state=self.states[RUN], reason="It has not begun.")
        self._store(RUN, self._made(kind, proposal))
        return Verdict(answer=Answer.ACCEPT, state=self.states[RUN])

    def _refusal(self, now: State, proposal: Proposal) -> Verdict | None:
        kind = proposal.type
        if now.transition_id == proposal.transition_id and not now.type.terminal:
            return Verdict(answer=Answer.REJECT, state=now, reason="This run has already made this state transition.")
        reruns = (StateType.PENDING, StateType.SCHEDULED)
        if now.type.terminal and (kind not in reruns or now.type is StateType.CANCELLED):
            return Verdict(answer=Answer.ABORT, reason="This run is already in a terminal state.")
        if now.type is StateType.CANCELLING and kind is not StateType.CANCELLED:
            return Verdict(answer=Answer.REJECT, state=now, reason="This run is being cancelled.")
        renamed = now.type is StateType.PENDING and proposal.name not in (None, now.name)
        if kind is StateType.PENDING and now.type is not StateType.SCHEDULED and not renamed:
            return Verdict(answer=Answer.ABORT, reason="This run is in a PENDING state and cannot transition.")
        return None

    def _made(self, kind: StateType, proposal: Proposal) -> State:
        return State(
            type=kind,
            name=proposal.name or kind.value.title(),
            id=f"s{next(self.world.numbers)}",
            message=proposal.message,
            transition_id=proposal.transition_id,
        )

    async def _enforce(self, cancelling: State) -> None:
        """A cancellation that nobody has carried out by then is taken for done."""
        await trio.sleep(CANCELLING_TIMEOUT)
        if self.states[RUN] is cancelling:
            self.world.say("the server gives up waiting for the cancellation")
            self._store(
                RUN, self._made(StateType.CANCELLED, Proposal(type=StateType.CANCELLED, transition_id="server"))
            )

    def _store(self, run_id: str, state: State) -> None:
        before = self.states[RUN]
        self.cancelled_at = trio.current_time() if state.type is StateType.CANCELLED else None
        if state.type is StateType.CANCELLING:
            self.world.nursery.start_soon(self._enforce, state)
        # A crash that is retried is no end.
        replaced = before.type.terminal and state.type is not before.type
        retried = before.type is StateType.CRASHED and state.name == "AwaitingRetry"
        self.world.expect(retried or not replaced, f"{state.name} put over {before.name}")
        super()._store(run_id, state)
