"""One flow run, from claim to close."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from uuid import uuid4

import trio

from supervisor.errors import BackendError, InterpreterError, JobError, NotFound, Refused
from supervisor.lifecycle import (
    MAX_STARTS,
    Claiming,
    Closed,
    Exited,
    Outcome,
    Phase,
    Report,
    Running,
    Starting,
    Stopping,
    StopReason,
    step,
)
from supervisor.lifecycle.decision import Decision, Relaunch
from supervisor.model import Answer, FlowRun, Job, Proposal, StateType
from supervisor.process.channel import Intent, Session
from supervisor.process.launch import Child
from supervisor.process.stop import end, end_leftovers, end_others, let_go_on
from supervisor.runs.claim import NotOurs, Ours, claim
from supervisor.runs.ending import Ending, Facts, engine_ran_hooks
from supervisor.runs.kit import Kit
from supervisor.runs.launcher import Launched
from supervisor.runs.sources import Source

RELAUNCH_SECONDS = 1.0  # before the second start; longer before each further one
CONNECT_SECONDS = 1.0  # an engine that is not on its control channel by then will not be asked through it
CANCELLING_SECONDS = 5.0  # the longest that telling the server of our own stop may delay the stop
ASIDE_SECONDS = 5.0  # the longest that courtesies to the server may outlast the run
LEASE_SECONDS = 150.0  # half of the shortest lease that servers give (300 s)
LEFTOVER_GRACE_SECONDS = 5.0


class Run:
    """One flow run. Owns its phase (only `_to` changes it) and whether it has been asked to stop."""

    def __init__(self, offer: FlowRun, source: Source, kit: Kit) -> None:
        self._offer = offer
        self._source = source
        self._kit = kit
        self.work = source.work
        self.refused: NotOurs | None = None
        self.suspended = False
        self._phase: Phase = Claiming(transition_id=str(uuid4()))
        self._stop = trio.Event()
        self._stopped: StopReason | None = None
        self._why = ""
        self._hurry = trio.Event()
        self._output = kit.launcher.output(offer.id)
        self._child: Child | None = None
        self._where: str | None = None  # what the server was told of where its process is
        self._event: str | None = None  # the event that said it was submitted
        self._log = logging.LoggerAdapter(logging.getLogger("flow-agent"), {"run": offer.id, "run_name": offer.name})

    @property
    def id(self) -> str:
        return self._offer.id

    @property
    def deployment_id(self) -> str | None:
        return self._offer.deployment_id

    @property
    def phase(self) -> Phase:
        return self._phase

    def ask_to_stop(self, reason: StopReason, why: str, *, hurry: bool = False) -> None:
        """Ends the run at whatever stage it is; the first reason counts. With `hurry` nothing is asked and no grace given."""
        if hurry:
            self._hurry.set()
        if self._stop.is_set():
            return
        self._log.info("stopping: %s", why)
        self._stopped, self._why = reason, why
        self._stop.set()

    async def live(self) -> Outcome:
        """From the claim to the end. Never raises for anything that concerns only this run."""
        assert isinstance(self._phase, Claiming)
        kit = self._kit
        try:
            settled = await claim(
                kit.backend, self._offer, self._phase.transition_id, patience=kit.patience, health=kit.health
            )
        except Exception:  # noqa: BLE001 - as below; without a settled claim the run is not ours to report on
            self._log.exception("internal error while claiming it")
            settled = NotOurs(reason="flow-agent failed while it claimed the run")
        if isinstance(settled, NotOurs):
            self.refused = settled
            self._log.log(logging.DEBUG if settled.expected else logging.INFO, "not started: %s", settled.reason)
            return self._close(Outcome.NOT_OURS)
        try:
            return await self._own(settled)
        except Exception:  # noqa: BLE001 - a bug of ours may cost this run, never the agent and the other runs
            self._log.exception("internal error; ending this run")
            return await self._after_fault()

    # --- the run is ours ---------------------------------------------------------------------------------------------

    async def _own(self, claimed: Ours) -> Outcome:
        ending = Ending(self._offer, self.work.flows, self._kit, self._output, self._log)
        facts, found = Facts(), None
        async with trio.open_nursery() as aside:
            job, decision = await self._unless_stopped(self._prepare)
            while job is not None and not self._stop.is_set():
                ended = await self._one_process(job, claimed, facts.starts + 1, aside)
                if isinstance(ended, Report):
                    decision = ended
                    break
                facts = ended
                found, decision = await ending.look(facts)
                if not isinstance(decision, Relaunch):
                    break
                self._log.warning("the engine ended before it took the run over (%s); starting it again", facts.how)
                with trio.move_on_after(RELAUNCH_SECONDS * facts.starts):
                    await self._stop.wait()
            # Whoever kills has seconds: the report matters more than hooks that take as long.
            hooks_seen = facts.hooks_seen or self._hurry.is_set()
            facts = replace(facts, stopped=self._stopped, why=self._why, hooks_seen=hooks_seen)
            if decision is None or isinstance(decision, Relaunch):  # stopped between two deeds
                found, decision = await ending.look(replace(facts, starts=MAX_STARTS))
            self._to(Exited(how=facts.how, stopped=self._stopped))
            outcome = await ending.settle(found, decision, facts, job)
            if job is not None and self._child is not None:
                aside.start_soon(self._tell_end, job, self._child, facts)
            aside.cancel_scope.deadline = trio.current_time() + ASIDE_SECONDS
        self.suspended = found is not None and found.state_type is StateType.PAUSED
        await self._kit.launcher.clean_up(self.id)
        return self._close(outcome)

    async def _prepare(self) -> tuple[Job | None, Report | None]:
        """How to start the run, or why it cannot be; meanwhile the server is told that somebody is about to start it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_submitting)
            backend = self._kit.backend
            try:
                return await self._kit.patience.until_answered(lambda: backend.job(self._offer)), None
            except NotFound:
                gone = "Its deployment has been deleted."
                return None, Report(type=StateType.CANCELLED, message=gone, outcome=Outcome.CANCELLED, force=True)
            except (JobError, Refused) as error:
                return None, _cannot_start(StateType.FAILED, Outcome.FAILED, error)

    async def _say_submitting(self) -> None:
        proposal = Proposal(type=StateType.PENDING, name="Submitting", transition_id=str(uuid4()))
        try:
            if await self._kit.backend.generation() < 3:
                return  # 2.x refuses it
            verdict = await self._kit.backend.propose(self.id, proposal)
        except BackendError as error:
            self._log.debug("not told that it is being submitted: %s", error)
            return
        if verdict.state is not None and verdict.state.type is StateType.CANCELLING:
            self.ask_to_stop(StopReason.CANCEL, verdict.state.message or "Cancelled on request.")

    async def _one_process(self, job: Job, claimed: Ours, attempt: int, aside: trio.Nursery) -> Facts | Report:
        """Starts the process, and returns how it ended when nothing of it lives any more."""
        self._to(Starting(attempt=attempt))
        try:
            launched = await self._kit.launcher.launch(self._offer, job, self.work.flows)
        except (JobError, InterpreterError) as error:
            return _cannot_start(StateType.CRASHED, Outcome.CRASHED, error)
        child = self._child = launched.child
        self._to(Running(process=child.ref, attempt=attempt))
        self._log.info("started, process %d", child.ref.pid)
        aside.start_soon(self._tell_start, job, child, attempt)
        stopped = trio.Event()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._stop_when_asked, launched, stopped)
            beside.start_soon(self._time_out)
            beside.start_soon(self._keep_lease, claimed)
            how = await child.wait()
            if isinstance(self._phase, Stopping):
                await stopped.wait()  # the stop goes on until nothing of the run lives
            beside.cancel_scope.cancel()
        if launched.session is not None:
            launched.session.close()
        await end_leftovers(self.id, child.ref, grace=LEFTOVER_GRACE_SECONDS)
        self._log.info("process %d %s", child.ref.pid, how)
        return Facts(
            how=how,
            starts=attempt,
            stopped=self._stopped,
            why=self._why,
            runs_own_hooks=launched.runs_own_hooks,
            hooks_seen=self._hooks_begun(launched),
        )

    async def _tell_start(self, job: Job, child: Child, attempt: int) -> None:
        self._where = await self._kit.teller.pid(self.id, child.ref.pid)
        if attempt == 1:
            self._event = await self._kit.teller.started(self._offer, job, child.ref.pid)

    async def _tell_end(self, job: Job, child: Child, facts: Facts) -> None:
        how = facts.how
        code = 0 if how is None else (-how.signal if how.signal is not None else how.code or 0)
        await self._kit.teller.ended(self._offer, job, child.ref.pid, code, self._event)

    async def _unless_stopped(
        self, call: Callable[[], Awaitable[tuple[Job | None, Report | None]]]
    ) -> tuple[Job | None, Decision | None]:
        """What `call` returns, or nothing at all when the run is asked to stop first."""
        result: tuple[Job | None, Decision | None] = None, None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self._stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            result = await call()
            nursery.cancel_scope.cancel()
        return result

    # --- beside the process ------------------------------------------------------------------------------------------

    async def _stop_when_asked(self, launched: Launched, stopped: trio.Event) -> None:
        await self._stop.wait()
        assert self._stopped is not None
        child = launched.child
        self._to(Stopping(process=child.ref, reason=self._stopped))
        grace = self.work.flows.grace_seconds
        with trio.CancelScope() as politeness:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._when_hurried, politeness)
                killed = 0
                leaving = not (self._stopped is StopReason.CANCEL or await self._say_cancelling())
                asked = not (leaving or self._hooks_begun(launched)) and await self._ask_engine(launched.session)
                if asked and launched.is_engine:
                    # It will write CANCELLED itself, and nothing else of the run may live by then.
                    killed = await end_others(child.ref, self.id, grace=grace)
                if leaving or self._hooks_begun(launched):
                    # An engine on its way out would take the signal for the run's: it would put CANCELLED or CRASHED over
                    # what it has reported, or run once more the hooks it began when the server refused its COMPLETED.
                    let_go_on(child.ref)
                    with trio.move_on_after(grace):
                        await child.wait()
                killed += await end(child.ref, self.id, grace=grace)
                nursery.cancel_scope.cancel()
            if killed:
                self._log.warning("killed %d process(es) that outlived the grace of %g s", killed, grace)
        if politeness.cancelled_caught:
            await end(child.ref, self.id, grace=0.0)
        stopped.set()

    async def _ask_engine(self, session: Session | None) -> bool:
        """Tells the engine that the signal to come means cancellation; without a channel, it would call it a crash.

        Returns whether it has understood, and so will report the end itself.
        """
        if session is None:
            return False
        with trio.move_on_after(CONNECT_SECONDS):
            await session.wait_connected()
        return session.connected and await session.ask(Intent.CANCEL)

    def _hooks_begun(self, launched: Launched) -> bool:
        return launched.runs_own_hooks and engine_ran_hooks(self._output)

    async def _when_hurried(self, politeness: trio.CancelScope) -> None:
        await self._hurry.wait()
        politeness.cancel()

    async def _say_cancelling(self) -> bool:
        """Our own stop is a cancellation to everybody else: the engine runs its hooks, and people see why.

        Returns False when the server says that the run has ended already.
        """
        proposal = Proposal(
            type=StateType.CANCELLING, name="Cancelling", message=self._why, transition_id=str(uuid4()), force=False
        )
        with trio.move_on_after(CANCELLING_SECONDS):
            try:
                verdict = await self._kit.backend.propose(self.id, proposal)
            except BackendError as error:
                self._log.debug("not told that it is being stopped: %s", error)
            else:
                return verdict.answer is not Answer.ABORT
        return True

    async def _time_out(self) -> None:
        limit = self.work.flows.timeout_seconds
        if limit is not None:
            await trio.sleep(limit)
            self.ask_to_stop(
                StopReason.TIMEOUT, f"Ended by flow-agent: it ran longer than timeout_seconds = {limit:g}."
            )

    async def _keep_lease(self, claimed: Ours) -> None:
        """The engine renews its deployment's concurrency lease once it runs; until then nobody else would."""
        lease = claimed.state.lease_id if claimed.state is not None else None
        while lease is not None:
            await trio.sleep(LEASE_SECONDS)
            try:
                run = await self._kit.backend.read_run(self.id)
                if run.state_type is not StateType.PENDING:
                    return
                await self._kit.backend.renew_lease(lease, LEASE_SECONDS * 2)
            except BackendError as error:
                self._log.debug("lease of the deployment's concurrency slot not renewed: %s", error)

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
            wanted = run.state_type is StateType.CANCELLING or run.state_name == "Cancelling"  # the form of early 2.x
            if wanted and run.infrastructure_pid == self._where:
                await patience.until_answered(lambda: backend.propose(self.id, proposal))
                self._log.info("cancelled while it was suspended")
        except (NotFound, Refused) as error:
            self._log.debug("not cancelled: %s", error)

    async def _after_fault(self) -> Outcome:
        """A bug of ours has left the run without anybody: nothing of it may live, and the server must know."""
        await end(self._child.ref if self._child is not None else None, self.id, grace=0.0)
        report = _cannot_start(StateType.CRASHED, Outcome.CRASHED, "flow-agent failed while it supervised the run")
        ending = Ending(self._offer, self.work.flows, self._kit, self._output, self._log)
        await ending.settle(None, report, Facts(), None)
        await self._kit.launcher.clean_up(self.id)
        self._phase = Closed(outcome=Outcome.CRASHED)  # from wherever the fault has left it
        return Outcome.CRASHED

    def _close(self, outcome: Outcome) -> Outcome:
        self._to(Closed(outcome=outcome))
        return outcome

    def _to(self, phase: Phase) -> None:
        self._phase = step(self._phase, phase)


def _cannot_start(state: StateType, outcome: Outcome, error: object) -> Report:
    return Report(type=state, message=str(error), outcome=outcome)
