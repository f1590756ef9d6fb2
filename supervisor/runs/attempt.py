"""One process of a run: from its start, or from its adoption, until nothing of it lives any more."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from supervisor.config import Work
from supervisor.errors import BackendError, InterpreterError, JobError
from supervisor.failpoints import failpoint
from supervisor.lifecycle import Exit, Outcome, ProcessRef, Report, Running, Starting, Stopping, StopReason
from supervisor.model import Answer, Job, Proposal, StateType
from supervisor.process.adopt import Adopted, adopt, age_seconds, find
from supervisor.process.channel import Intent, Session
from supervisor.process.members import ref_of, sweep
from supervisor.process.ref import boot_id
from supervisor.process.stop import end, end_leftovers, end_others, let_go_on, wait_gone
from supervisor.runs.ending import Facts, engine_ran_hooks
from supervisor.runs.entry import Entry
from supervisor.runs.kit import Kit
from supervisor.runs.launcher import HOOK_SECONDS, Launched
from supervisor.runs.wish import StopWish

CONNECT_SECONDS = 1.0  # an engine that is not on its control channel by then will not be asked through it
CANCELLING_SECONDS = 5.0  # the longest that telling the server of our own stop may delay the stop
LEASE_SECONDS = 150.0  # half of the shortest lease that servers give (300 s)
LEFTOVER_GRACE_SECONDS = 5.0
SECOND_LOOK_SECONDS = 0.5  # for a process that was being started when an earlier agent died

AWAY = Exit(note="ended unseen while flow-agent was not running")
REBOOTED = Exit(note="ended when the machine went down")

_output_log = logging.getLogger("flow-agent.output")


def _is_mute(launched: Launched, reason: StopReason) -> bool:
    """Whether a polite signal would make a lie: an engine whose channel went with its agent calls SIGTERM a crash.

    It would force CRASHED over what the run is and run the hooks for that. Where the machine goes down, that is the truth.
    """
    adopted_engine = isinstance(launched.child, Adopted) and launched.is_engine and launched.runs_own_hooks
    return adopted_engine and reason is not StopReason.SHUTDOWN


@dataclass(frozen=True)
class Claimed:
    """What the claim has given us beside the run."""

    lease_id: str | None = None  # of the deployment's concurrency slot, until the engine renews it


class Attempt:
    """Starts or adopts the run's process, stays with it, and ends it when that is wished."""

    def __init__(
        self, entry: Entry, wish: StopWish, kit: Kit, work: Work, log: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._entry = entry
        self._wish = wish
        self._kit = kit
        self._work = work
        self._log = log
        self._id = entry.record.run.id
        self._output = kit.launcher.output(self._id)
        self.group = kit.launcher.group(self._id)  # None where the kernel's groups are not ours to use

    async def start(self, job: Job, claimed: Claimed, told: trio.Nursery) -> Facts | Report:
        """Starts the process, and returns how it ended when nothing of it lives any more."""
        record = self._entry.record
        attempt = record.starts + 1
        failpoint("before spawn")
        try:
            launched = await self._kit.launcher.launch(record.run, job, self._work.flows, self.group)
        except (JobError, InterpreterError) as error:
            return Report(type=StateType.CRASHED, message=str(error), outcome=Outcome.CRASHED)
        failpoint("after spawn")
        await self._entry.to(
            Running(process=launched.child.ref, attempt=attempt),
            starts=attempt,
            job=job,
            runs_own_hooks=launched.runs_own_hooks,
            is_engine=launched.is_engine,
            shown=launched.output_from if attempt == 1 else record.shown,
        )
        self._log.info("started, process %d", launched.child.ref.pid)
        told.start_soon(self._tell_start, job, launched.child.ref.pid, attempt)
        return await self._stay(launched, claimed)

    async def pick_up(self) -> Facts | None:
        """Goes on with the process that an earlier agent has started; None when there is none and never was, as far as we see."""
        phase = self._entry.phase
        same_boot = self._entry.record.boot_id == boot_id()
        if isinstance(phase, Starting):
            ref = await self._find() if same_boot else None
            if ref is None:
                return None
            await self._entry.to(Running(process=ref, attempt=phase.attempt), starts=phase.attempt)
        else:
            assert isinstance(phase, Running | Stopping)
            ref = phase.process
        child = adopt(ref)
        if child is None:
            await end_leftovers(self._id, ref, grace=LEFTOVER_GRACE_SECONDS, group=self.group)
            return self._facts(self.unseen(), self._entry.record.runs_own_hooks)
        self._log.info("still running as process %d; going on with it", ref.pid)
        record = self._entry.record
        launched = Launched(child, None, record.runs_own_hooks, record.is_engine, output_from=record.shown)
        return await self._stay(launched, Claimed())

    def unseen(self) -> Exit:
        """How a process has ended that is gone since an earlier agent was here."""
        return AWAY if self._entry.record.boot_id == boot_id() else REBOOTED

    async def _find(self) -> ProcessRef | None:
        ref = find(self._id)
        if ref is None:
            await trio.sleep(SECOND_LOOK_SECONDS)  # it may have been between fork and exec
            ref = find(self._id)
        return ref

    async def _tell_start(self, job: Job, pid: int, attempt: int) -> None:
        run = self._entry.record.run
        failpoint("before pid")
        where = await self._kit.teller.pid(run.id, pid)
        failpoint("after pid")
        await self._entry.note(where=where)
        if attempt == 1:
            await self._entry.note(event=await self._kit.teller.started(run, job, pid))

    # --- beside the process ------------------------------------------------------------------------------------------

    async def _stay(self, launched: Launched, claimed: Claimed) -> Facts:
        child = launched.child
        stopped = trio.Event()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._stop_when_asked, launched, stopped)
            beside.start_soon(self._time_out, child.ref)
            beside.start_soon(self._keep_lease, claimed)
            beside.start_soon(self._kit.output.watch, self._id, self._entry.record.shown, self._show)
            how = await child.wait()
            if self._wish.asked.is_set():
                await stopped.wait()  # the stop goes on until nothing of the run lives
            beside.cancel_scope.cancel()
        if launched.session is not None:
            launched.session.close()
        await end_leftovers(self._id, child.ref, grace=LEFTOVER_GRACE_SECONDS, group=self.group)
        how = self._killed_for_memory(how)
        self._log.info("process %d %s", child.ref.pid, how)
        return self._facts(how, launched.runs_own_hooks)

    def _killed_for_memory(self, how: Exit) -> Exit:
        """Tells the kernel's OOM killer apart from everybody else who may have killed the process."""
        killed = how.signal == signal.SIGKILL and not self._wish.asked.is_set()
        if not killed or self.group is None or not self.group.oom_kills():
            return how
        return Exit(signal=how.signal, note="was killed by the kernel because memory ran out (OOM)")

    def _facts(self, how: Exit, runs_own_hooks: bool) -> Facts:
        return Facts(
            how=how,
            starts=self._entry.record.starts,
            stopped=self._wish.reason,
            why=self._wish.why,
            runs_own_hooks=runs_own_hooks,
            hooks_seen=runs_own_hooks and engine_ran_hooks(self._output),
        )

    async def _show(self, lines: Sequence[str], shown: int) -> None:
        """The run's output in our own log. Said first and noted then: an agent killed in between says them again."""
        run = self._entry.record.run
        for line in lines:
            _output_log.info("%s", line, extra={"run": run.id, "run_name": run.name})
        await self._entry.note(shown=shown)

    async def show_rest(self) -> None:
        """The end of the output, once nothing of the run lives."""
        await self._entry.note(shown=await self._kit.output.finish(self._id, self._entry.record.shown, self._show))

    async def see_off_hooks(self) -> None:
        """The helper of an earlier agent may still be running hooks: lets it end, and ends it when it does not."""
        if self._entry.record.hooks_run:
            left = await trio.to_thread.run_sync(sweep, None, self._id, (), self.group)
            await wait_gone([ref_of(stat) for stat in left], HOOK_SECONDS)
            await end_leftovers(self._id, None, group=self.group)

    async def _time_out(self, ref: ProcessRef) -> None:
        limit = self._work.flows.timeout_seconds
        if limit is not None:
            await trio.sleep(max(0.0, limit - age_seconds(ref)))
            why = f"Ended by flow-agent: it ran longer than timeout_seconds = {limit:g}."
            if self._wish.ask(StopReason.TIMEOUT, why):
                self._log.info("stopping: %s", why)

    async def _keep_lease(self, claimed: Claimed) -> None:
        """The engine renews its deployment's concurrency lease once it runs; until then nobody else would."""
        while claimed.lease_id is not None:
            await trio.sleep(LEASE_SECONDS)
            try:
                run = await self._kit.backend.read_run(self._id)
                if run.state_type is not StateType.PENDING:
                    return
                await self._kit.backend.renew_lease(claimed.lease_id, LEASE_SECONDS * 2)
            except BackendError as error:
                self._log.debug("lease of the deployment's concurrency slot not renewed: %s", error)

    # --- stopping ----------------------------------------------------------------------------------------------------

    async def _stop_when_asked(self, launched: Launched, stopped: trio.Event) -> None:
        await self._wish.asked.wait()
        reason = self._wish.reason
        assert reason is not None
        child = launched.child
        if not isinstance(self._entry.phase, Stopping):  # an earlier agent may have begun
            await self._entry.to(Stopping(process=child.ref, reason=reason), stopped=reason, why=self._wish.why)
        grace = self._work.flows.grace_seconds
        with trio.CancelScope() as politeness:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._when_hurried, politeness)
                killed = await self._stop_politely(launched, reason, grace)
                nursery.cancel_scope.cancel()
            if killed:
                self._log.warning("killed %d process(es) that outlived the grace of %g s", killed, grace)
        if politeness.cancelled_caught:
            await end(child.ref, self._id, grace=0.0, group=self.group)
        stopped.set()

    async def _stop_politely(self, launched: Launched, reason: StopReason, grace: float) -> int:
        """How many processes had to be killed all the same."""
        child, killed = launched.child, 0
        ours = reason in (StopReason.TIMEOUT, StopReason.OPERATOR)  # cancellations that nobody else has wished for
        leaving = ours and not await self._say_cancelling()
        failpoint("before ask engine")
        asked = not (leaving or self._hooks_begun(launched)) and await self._ask_engine(launched.session, reason)
        failpoint("after ask engine")
        mute = _is_mute(launched, reason)
        if (asked and launched.is_engine) or mute:
            # It will write CANCELLED itself, and nothing else of the run may live by then.
            failpoint("before others ended")
            killed = await end_others(child.ref, self._id, grace=grace, group=self.group)
            failpoint("after others ended")
        if leaving or self._hooks_begun(launched):
            # An engine on its way out would take the signal for the run's: it would put CANCELLED or CRASHED over
            # what it has reported, or run once more the hooks it began when the server refused its COMPLETED.
            let_go_on(child.ref)
            with trio.move_on_after(grace):
                await child.wait()
        failpoint("before signal")
        if mute:
            self._log.info("killing process %d: it cannot be told that this is no crash", child.ref.pid)
            await end(child.ref, self._id, grace=0.0, group=self.group)
        else:
            killed += await end(child.ref, self._id, grace=grace, group=self.group)
        failpoint("after signal")
        return killed

    def _hooks_begun(self, launched: Launched) -> bool:
        return launched.runs_own_hooks and engine_ran_hooks(self._output)

    async def _ask_engine(self, session: Session | None, reason: StopReason) -> bool:
        """Tells the engine what the signal to come means; without a channel, it would call it a crash.

        Returns whether it has understood, and so will act on it itself.
        """
        if session is None or reason is StopReason.SHUTDOWN:
            return False
        with trio.move_on_after(CONNECT_SECONDS):
            await session.wait_connected()
        intent = Intent.RESCHEDULE if reason is StopReason.RESCHEDULE else Intent.CANCEL
        return session.connected and await session.ask(intent)

    async def _when_hurried(self, politeness: trio.CancelScope) -> None:
        await self._wish.hurry.wait()
        politeness.cancel()

    async def _say_cancelling(self) -> bool:
        """Our own stop is a cancellation to everybody else: the engine runs its hooks, and people see why.

        Returns False when the server says that the run has ended already.
        """
        proposal = Proposal(
            type=StateType.CANCELLING,
            name="Cancelling",
            message=self._wish.why,
            transition_id=self._entry.record.transition_id("cancelling"),
        )
        with trio.move_on_after(CANCELLING_SECONDS):
            try:
                verdict = await self._kit.backend.propose(self._id, proposal)
            except BackendError as error:
                self._log.debug("not told that it is being stopped: %s", error)
            else:
                return verdict.answer is not Answer.ABORT
        return True
