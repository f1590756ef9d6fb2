"""One flow run, from claim to close; or from where an earlier agent has left it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from uuid import uuid4

import trio

from supervisor.config import Work
from supervisor.errors import BackendError, JobError, NotFound, Refused
from supervisor.failpoints import failpoint
from supervisor.lifecycle import (
    MAX_STARTS,
    Claiming,
    Closed,
    Exited,
    Outcome,
    Phase,
    ProcessRef,
    Report,
    Running,
    Starting,
    Stopping,
    StopReason,
)
from supervisor.lifecycle.decision import Decision, Relaunch, wants_cancel
from supervisor.lifecycle.record import SUBMITTING, Record
from supervisor.model import FlowRun, Job, Proposal, StateType, log_extra
from supervisor.process.ref import boot_id
from supervisor.process.stop import end
from supervisor.runs.attempt import Attempt, Claimed
from supervisor.runs.claim import NotOurs, claim
from supervisor.runs.ending import Ending, Facts
from supervisor.runs.entry import Entry
from supervisor.runs.kit import Kit
from supervisor.runs.lead import Countdown
from supervisor.runs.wish import StopWish

RELAUNCH_SECONDS = 1.0  # before the second start; longer before each further one
ASIDE_SECONDS = 5.0  # the longest that courtesies to the server may outlast the run


class Run:
    """One flow run. What is known of it is in its entry of the journal, that it shall stop in its wish."""

    def __init__(self, record: Record, work: Work, kit: Kit, *, recovered: bool = False) -> None:
        """`recovered`: the record is an earlier agent's, and the run goes on from there."""
        self.offer = record.run
        self._kit = kit
        self._recovered = recovered
        self.work = work
        self.refused: NotOurs | None = None
        self.suspended = False
        run = record.run
        self._log = logging.LoggerAdapter(logging.getLogger("flow-agent"), log_extra(run))
        self._entry = Entry(record, kit.journal, boot_id(), self._log)
        self._wish = StopWish(record.stopped, record.why)
        self._countdown = Countdown(run, work.flows, kit.leads, kit.clock)
        self._attempt = Attempt(self._entry, self._wish, kit, work, self._countdown, self._log)
        self._ending = Ending(self._entry, work.flows, kit, kit.launcher.output(run.id), self._log)

    @property
    def id(self) -> str:
        return self.offer.id

    @property
    def phase(self) -> Phase:
        return self._entry.phase

    def ask_to_stop(self, reason: StopReason, why: str, *, hurry: bool = False) -> None:
        """Ends the run at whatever stage it is; the first reason counts. With `hurry` nothing is asked and no grace given."""
        if self._wish.ask(reason, why, hurry=hurry):
            self._log.info("stopping: %s", why)

    async def live(self) -> Outcome:
        """From the claim to the end. Never raises for anything that concerns only this run."""
        try:
            claimed = await self._claim() if isinstance(self.phase, Claiming) else Claimed()
        except Exception:  # noqa: BLE001 - as below; without a settled claim the run is not ours to report on
            self._log.exception("internal error while claiming it")
            claimed = None
        if claimed is None:
            return Outcome.NOT_OURS
        try:
            return await self._own(claimed)
        except Exception:  # noqa: BLE001 - a bug of ours may cost this run, never the agent and the other runs
            self._log.exception("internal error; ending this run")
            return await self._after_fault()

    # --- the claim ---------------------------------------------------------------------------------------------------

    async def _claim(self) -> Claimed | None:
        """None when the run is not ours; why is in `refused` then."""
        kit, closed = self._kit, Closed(outcome=Outcome.NOT_OURS)
        if not (self._recovered or await self._entry.open()):
            self._refuse(NotOurs(reason="there is no room in the state directory", unheard=True))
            self._entry.abandon(closed)
            return None
        id_, doubt = self._entry.record.claim_id, self._recovered
        settled = await claim(
            kit.backend, self.offer, id_, patience=kit.patience, health=kit.health, clock=kit.clock, in_doubt=doubt
        )
        if isinstance(settled, NotOurs):
            self._refuse(settled)
            await self._entry.close(closed)
            return None
        if settled.twice:
            kit.claimed_twice(self._entry.record)
        return Claimed(settled.state.lease_id if settled.state is not None else None)

    def _refuse(self, why: NotOurs) -> None:
        self.refused = why
        self._log.log(logging.DEBUG if why.expected else logging.INFO, "not started: %s", why.reason)

    # --- the run is ours ---------------------------------------------------------------------------------------------

    async def _own(self, claimed: Claimed) -> Outcome:
        found: FlowRun | None = None
        phase = self.phase
        async with trio.open_nursery() as aside:
            if isinstance(phase, Exited) and phase.owed is not None:
                await self._attempt.see_off_hooks()
                facts = Facts.of(self._entry.record, self._kit.launcher.output(self.id))
                outcome = await self._ending.resume(phase.owed, facts, await self._job_of(facts))
            else:
                found, decision, facts = await self._execute(claimed, aside)
                # Whoever kills has seconds: the report matters more than hooks that take as long.
                hooks_seen = facts.hooks_seen or self._wish.hurry.is_set()
                facts = replace(facts, stopped=self._wish.reason, why=self._wish.why, hooks_seen=hooks_seen)
                if isinstance(decision, Relaunch):  # stopped between two deeds
                    found, decision = await self._ending.look(replace(facts, starts=MAX_STARTS))
                self._countdown.ended(found, facts.starts)
                await self._exited(facts)
                outcome = await self._ending.settle(found, decision, facts, await self._job_of(facts))
            await self._attempt.show_rest()
            aside.start_soon(self._tell_end, facts)
            aside.cancel_scope.deadline = trio.current_time() + ASIDE_SECONDS
        self.suspended = found is not None and found.state_type is StateType.PAUSED
        failpoint("before clean up")
        await self._kit.launcher.clean_up(self.id)
        failpoint("after clean up")
        await self._entry.close(Closed(outcome=outcome))
        return outcome

    async def _exited(self, facts: Facts) -> None:
        """Nothing of the run lives, and it may be a long time until the server hears of it."""
        phase = Exited(how=facts.how, stopped=facts.stopped)
        if self.phase != phase:
            await self._entry.to(phase, stopped=facts.stopped, why=facts.why)

    async def _execute(self, claimed: Claimed, aside: trio.Nursery) -> tuple[FlowRun | None, Decision, Facts]:
        """Until its process has ended for good. A `Relaunch` is decided upon only when it is to stop instead."""
        facts, ended = Facts(starts=self._entry.record.starts), None
        if isinstance(self.phase, Exited):
            await self._attempt.see_off_hooks()
            ended = Facts.of(self._entry.record, self._kit.launcher.output(self.id))
        elif not isinstance(self.phase, Claiming):
            ended = await self._attempt.pick_up() or await self._never_started()
        while ended is not None or not self._wish.asked.is_set():
            if ended is None:
                job, refusal = await self._unless_stopped(partial(self._prepare, facts.starts + 1))
                if refusal is not None:
                    return None, refusal, facts
                if job is None:
                    break
                started = await self._attempt.start(job, claimed, aside)
                if isinstance(started, Report):
                    return None, started, facts
                ended = started
            facts, ended = ended, None
            await self._exited(facts)
            found, decision = await self._ending.look(facts)
            if not isinstance(decision, Relaunch):
                return found, decision, facts
            self._log.warning("the engine ended before it took the run over (%s); starting it again", facts.how)
            with trio.move_on_after(RELAUNCH_SECONDS * facts.starts):
                await self._wish.asked.wait()
        return None, Relaunch(), facts

    async def _never_started(self) -> Facts | None:
        """A run that was about to be started when an earlier agent died, without a process now: None when it never had one."""
        assert isinstance(self.phase, Starting)
        gone = Facts(how=self._attempt.unseen(), starts=self.phase.attempt - 1)
        _, decision = await self._ending.look(gone)
        return None if isinstance(decision, Relaunch) else replace(gone, starts=self.phase.attempt)

    async def _prepare(self, attempt: int) -> tuple[Job | None, Report | None]:
        """How to start the run, or why it cannot be; meanwhile the server is told that somebody is about to start it.

        Waits for room on the disk, however long, until it is time, and for the fork server.
        """
        if self.phase != Starting(attempt=attempt):  # an earlier agent may have got as far
            await self._entry.to(Starting(attempt=attempt))
        if self._entry.record.job is not None:
            return self._entry.record.job, None  # started before
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_submitting)
            failpoint("before job")
            try:
                job = await self._kit.patience.until_answered(lambda: self._kit.backend.job(self.offer))
            except NotFound:
                gone = "Its deployment has been deleted."
                return None, Report(type=StateType.CANCELLED, message=gone, outcome=Outcome.CANCELLED, force=True)
            except (JobError, Refused) as error:
                return None, _cannot_start(StateType.FAILED, Outcome.FAILED, error)
            failpoint("after job")
        await self._countdown.wait()
        await self._kit.launcher.ready(self.offer, job, self.work.flows)
        return job, None

    async def _say_submitting(self) -> None:
        proposal = Proposal(
            type=StateType.PENDING, name="Submitting", transition_id=self._entry.record.transition_id(SUBMITTING)
        )
        try:
            if await self._kit.backend.generation() < 3:
                return  # 2.x refuses it
            failpoint("before submitting")
            verdict = await self._kit.backend.propose(self.id, proposal)
            failpoint("after submitting")
        except BackendError as error:
            self._log.debug("not told that it is being submitted: %s", error)
            return
        if verdict.state is not None and verdict.state.type is StateType.CANCELLING:
            self.ask_to_stop(StopReason.CANCEL, verdict.state.message or "Cancelled on request.")

    async def _job_of(self, facts: Facts) -> Job | None:
        """The job, for the hooks of a run whose process has lived; asked for again where the journal that held it was lost."""
        job = self._entry.record.job
        if job is None and facts.how is not None:
            try:
                return await self._kit.patience.until_answered(lambda: self._kit.backend.job(self.offer))
            except (NotFound, JobError, Refused) as error:
                self._log.debug("cannot learn how it was started: %s", error)
        return job

    async def _tell_end(self, facts: Facts) -> None:
        record, how = self._entry.record, facts.how
        if record.job is None or how is None or record.where is None:
            return
        code = -how.signal if how.signal is not None else how.code or 0
        pid = int(record.where.rpartition(":")[2])
        await self._kit.teller.ended(self.offer, record.job, pid, code, record.event)

    async def _unless_stopped(
        self, call: Callable[[], Awaitable[tuple[Job | None, Report | None]]]
    ) -> tuple[Job | None, Report | None]:
        """What `call` returns, or nothing at all when the run is asked to stop first."""
        result: tuple[Job | None, Report | None] = None, None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self._wish.asked.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            result = await call()
            nursery.cancel_scope.cancel()
        return result

    # --- the end -----------------------------------------------------------------------------------------------------

    async def cancel_suspended(self) -> None:
        """Answers the cancellation of a run that was suspended under us: its process ended when it was suspended."""
        backend, patience = self._kit.backend, self._kit.patience
        proposal = Proposal(
            type=StateType.CANCELLED,
            message="Cancelled while it was suspended; no process of it was alive.",
            transition_id=str(uuid4()),
            force=True,
        )
        try:
            run = await patience.until_answered(lambda: backend.read_run(self.id))
            if run.state is not None and wants_cancel(run.state) and run.infrastructure_pid == self._entry.record.where:
                await patience.until_answered(lambda: backend.propose(self.id, proposal))
                self._log.info("cancelled while it was suspended")
        except (NotFound, Refused) as error:
            self._log.debug("not cancelled: %s", error)

    async def _after_fault(self) -> Outcome:
        """A bug of ours has left the run without anybody: nothing of it may live, and the server must know."""
        await end(self._process(), self.id, grace=0.0, group=self._attempt.group)
        report = _cannot_start(StateType.CRASHED, Outcome.CRASHED, "flow-agent failed while it supervised the run")
        await self._ending.force(report)
        await self._kit.launcher.clean_up(self.id)
        await self._entry.close_anyhow(Closed(outcome=Outcome.CRASHED))
        return Outcome.CRASHED

    def _process(self) -> ProcessRef | None:
        return self.phase.process if isinstance(self.phase, Running | Stopping) else None


def _cannot_start(state: StateType, outcome: Outcome, error: object) -> Report:
    return Report(type=state, message=str(error), outcome=outcome)
