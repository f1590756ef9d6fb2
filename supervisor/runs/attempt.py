"""One process of a run: from its start, or from its adoption, until nothing of it lives any more."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from supervisor.config import Work
from supervisor.errors import BackendError, InterpreterError, JobError, NotFound, Refused
from supervisor.failpoints import failpoint
from supervisor.lifecycle import Exit, Outcome, ProcessRef, Report, Running, Starting, Stopping, StopReason
from supervisor.model import Job, StateType, log_extra
from supervisor.process.adopt import adopt, age_seconds, find, is_engine
from supervisor.process.forkserver import Forked
from supervisor.process.members import look, ref_of
from supervisor.process.ref import boot_id
from supervisor.process.stop import end, end_leftovers, wait_gone
from supervisor.runs.ending import Facts, engine_ran_hooks
from supervisor.runs.entry import Entry
from supervisor.runs.kit import Kit
from supervisor.runs.launcher import HOOK_SECONDS, Launched
from supervisor.runs.lead import Countdown
from supervisor.runs.stopper import Stopper
from supervisor.runs.wish import StopWish

LEASE_SECONDS = 150.0  # half of the shortest lease that servers give (300 s)
LEFTOVER_GRACE_SECONDS = 5.0
SECOND_LOOK_SECONDS = 0.5  # for a process that was being started when an earlier agent died

AWAY = Exit(note="ended unseen while flow-agent was not running")
REBOOTED = Exit(note="ended when the machine went down")

_output_log = logging.getLogger("flow-agent.output")


@dataclass(frozen=True)
class Claimed:
    """What the claim has given us beside the run."""

    lease_id: str | None = None  # of the deployment's concurrency slot, until the engine renews it


class Attempt:
    """Starts or adopts the run's process, stays with it, and ends it when that is wished."""

    def __init__(
        self,
        entry: Entry,
        wish: StopWish,
        kit: Kit,
        work: Work,
        countdown: Countdown,
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self._entry = entry
        self._wish = wish
        self._kit = kit
        self._work = work
        self._countdown = countdown
        self._log = log
        self._id = entry.record.run.id
        self._output = kit.launcher.output(self._id)
        self.group = kit.launcher.group(self._id)  # None where the kernel's groups are not ours to use
        self._stopper = Stopper(entry, wish, kit, work.flows.grace_seconds, self.group, log)

    async def start(self, job: Job, claimed: Claimed, told: trio.Nursery) -> Facts | Report:
        """Starts the process, and returns how it ended when nothing of it lives any more."""
        record = self._entry.record
        attempt = record.starts + 1
        launcher, flows = self._kit.launcher, self._work.flows
        try:
            plan = await launcher.plan(job, flows, again=attempt > 1)
            # Should we die before it is written that it runs, whoever finds it must know what it is.
            await self._entry.note(job=job, runs_own_hooks=plan.runs_own_hooks, is_engine=plan.is_engine)
            failpoint("before spawn")
            launched = await launcher.launch(record.run, job, flows, plan, self.group)
        except (JobError, InterpreterError) as error:
            return Report(type=StateType.CRASHED, message=str(error), outcome=Outcome.CRASHED)
        failpoint("after spawn")
        self._countdown.spawned(launched.session)
        await self._entry.to(
            Running(process=launched.child.ref, attempt=attempt),
            starts=attempt,
            shown=launched.output_from if attempt == 1 else record.shown,
        )
        how = " (warm)" if isinstance(launched.child, Forked) else ""
        self._log.info("started, process %d%s", launched.child.ref.pid, how)
        told.start_soon(self._tell_start, job, launched.child.ref.pid, attempt)
        return await self._stay(launched, claimed)

    async def pick_up(self) -> Facts | None:
        """Goes on with the process that an earlier agent has started; None when there is none and never was, as far as we see."""
        phase = self._entry.phase
        same_boot = self._entry.record.boot_id == boot_id()
        if isinstance(phase, Starting):
            ref = await self._find() if same_boot else None
            if ref is None:  # it may have come and gone unseen
                await end_leftovers(self._id, None, grace=LEFTOVER_GRACE_SECONDS, group=self.group)
                return None
            await self._entry.to(Running(process=ref, attempt=phase.attempt), starts=phase.attempt)
        else:
            assert isinstance(phase, Running | Stopping)
            ref = phase.process
        by_mark = isinstance(phase, Starting)
        child = adopt(ref)
        if child is None:
            await end_leftovers(self._id, ref, grace=LEFTOVER_GRACE_SECONDS, group=self.group)
            return self._facts(self.unseen(), self._entry.record.runs_own_hooks)
        self._log.info("still running as process %d; going on with it", ref.pid)
        record = self._entry.record
        launched = Launched(child, None, record.runs_own_hooks, record.is_engine, output_from=record.shown)
        return await self._stay(launched, Claimed(), by_mark=by_mark)

    def unseen(self) -> Exit:
        """How a process has ended that is gone since an earlier agent was here."""
        return AWAY if self._entry.record.boot_id == boot_id() else REBOOTED

    async def _find(self) -> ProcessRef | None:
        engine = self._entry.record.is_engine
        ref = find(self._id, engine=engine)
        if ref is None:
            await trio.sleep(SECOND_LOOK_SECONDS)  # it may have been between fork and exec
            ref = find(self._id, engine=engine)
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

    async def _stay(self, launched: Launched, claimed: Claimed, *, by_mark: bool = False) -> Facts:
        child = launched.child
        stopped = trio.Event()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._stopper.stop_when_asked, launched, stopped)
            beside.start_soon(self._time_out, child.ref)
            beside.start_soon(self._keep_lease, claimed)
            if by_mark:
                beside.start_soon(self._end_if_over, child.ref)
            beside.start_soon(self._kit.output.watch, self._id, self._entry.record.shown, self._show)
            how = await child.wait()
            if self._wish.asked.is_set():
                await stopped.wait()  # the stop goes on until nothing of the run lives
            beside.cancel_scope.cancel()
        if launched.session is not None:
            launched.session.close()
        await end_leftovers(self._id, child.ref, grace=LEFTOVER_GRACE_SECONDS, group=self.group)
        how = self._explained(how)
        self._log.info("process %d %s", child.ref.pid, how)
        return self._facts(how, launched.runs_own_hooks)

    def _explained(self, how: Exit) -> Exit:
        """With what we know of a signal beyond what people usually find behind it."""
        if self._wish.asked.is_set():
            return how.as_told()
        if how.signal == signal.SIGKILL and self.group is not None and self.group.oom_kills():
            return Exit(signal=how.signal, note="was killed by the kernel because memory ran out (OOM)")
        return how

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
        """The run's output in our own log. Said first and noted then: only an agent that is killed in between says it again."""
        about = log_extra(self._entry.record.run)
        for line in lines:
            _output_log.info("%s", line, extra=about)
        with trio.CancelScope(shield=True):  # an agent that leaves would have the next one say it again
            await self._entry.note(shown=shown)

    async def show_rest(self) -> None:
        """The end of the output, once nothing of the run lives."""
        await self._entry.note(shown=await self._kit.output.finish(self._id, self._entry.record.shown, self._show))

    async def see_off_hooks(self) -> None:
        """The helper of an earlier agent may still be running hooks: lets it end, and ends it when it does not."""
        if self._entry.record.hooks_run:
            left = await look(None, self._id, group=self.group)
            await wait_gone([ref_of(stat) for stat in left], HOOK_SECONDS)
            await end_leftovers(self._id, None, group=self.group)

    async def _time_out(self, ref: ProcessRef) -> None:
        limit = self._work.flows.timeout_seconds
        if limit is not None:
            await trio.sleep(max(0.0, limit - age_seconds(ref)))
            why = f"Ended by flow-agent: it ran longer than timeout_seconds = {limit:g}."
            if self._wish.ask(StopReason.TIMEOUT, why):
                self._log.info("stopping: %s", why)

    async def _end_if_over(self, ref: ProcessRef) -> None:
        """What was found by its mark may not be the run's own process but what that has left behind: then the run is over."""
        with suppress(NotFound, Refused):
            run = await self._kit.patience.until_answered(lambda: self._kit.backend.read_run(self._id))
            if run.state_type is not None and run.state_type.terminal:
                # An engine runs its on_completion hooks when the run is over.
                await wait_gone([ref], HOOK_SECONDS if is_engine(ref) else LEFTOVER_GRACE_SECONDS)
                await end(ref, self._id, grace=LEFTOVER_GRACE_SECONDS, group=self.group)

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
