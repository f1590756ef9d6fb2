"""The end of a run whose process is gone: read what the server says, decide, run the hooks that are owed, report."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from supervisor.config import Flows
from supervisor.errors import NotFound, Refused
from supervisor.failpoints import failpoint
from supervisor.lifecycle import MAX_STARTS, Exit, Exited, Hook, Outcome, Owed, Report, StopReason
from supervisor.lifecycle.decision import Decision, Done, Relaunch, decide, hook_owed, retry
from supervisor.lifecycle.record import SUBMITTING, Record
from supervisor.logs import last_lines
from supervisor.model import Answer, FlowRun, Job, Proposal, State, StateType
from supervisor.runs.claim import claimed_since, taken_over
from supervisor.runs.entry import Entry
from supervisor.runs.kit import Kit

TURNS = 5  # how often a report that the server refuses is thought over again, because the run moved meanwhile


@dataclass(frozen=True)
class Facts:
    """What is known of a run's end on this side. `how` is None when no process was ever started."""

    how: Exit | None = None
    starts: int = 0
    stopped: StopReason | None = None
    why: str = ""
    runs_own_hooks: bool = True
    hooks_seen: bool = False  # the engine has begun to run the hooks of this end itself

    @classmethod
    def of(cls, record: Record, output: Path) -> Facts:
        """What an earlier agent has left in the journal."""
        return cls(
            how=record.phase.how if isinstance(record.phase, Exited) else None,
            starts=record.starts,
            stopped=record.stopped,
            why=record.why,
            runs_own_hooks=record.runs_own_hooks,
            hooks_seen=record.runs_own_hooks and engine_ran_hooks(output),
        )


class Ending:
    """Brings one run to its close."""

    def __init__(
        self, entry: Entry, flows: Flows, kit: Kit, output: Path, log: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._entry = entry
        self._id = entry.record.run.id
        self._flows = flows
        self._kit = kit
        self._output = output
        self._log = log

    async def look(self, facts: Facts) -> tuple[FlowRun | None, Decision]:
        """What the server says of the run now (None: deleted), and what follows from it."""
        failpoint("before look")
        backend, patience = self._kit.backend, self._kit.patience
        try:
            run = await patience.until_answered(lambda: backend.read_run(self._id))
        except (NotFound, Refused):
            run = None
        decision = self._decide(facts, run)
        if run is not None and isinstance(decision, Report | Relaunch):
            run, decision = await self._by_history(facts, run, decision)
        failpoint("after look")
        return run, decision

    def _decide(self, facts: Facts, run: FlowRun | None) -> Decision:
        return decide(facts.how, run, stopped=facts.stopped, starts=facts.starts, why=facts.why)

    async def _by_history(self, facts: Facts, run: FlowRun, decision: Decision) -> tuple[FlowRun, Decision]:
        """What follows when not only the run's state is looked at but all that it has been since our claim."""
        backend, record = self._kit.backend, self._entry.record
        ours = {record.claim_id, record.transition_id(SUBMITTING)}
        try:
            history = await self._kit.patience.until_answered(lambda: backend.history(self._id))
        except (NotFound, Refused):
            return run, decision
        if claimed_since(history, record.claim_id, ours):
            self._log.warning("somebody else has claimed it since; leaving it to them")
            return run, Done(Outcome.HANDED_BACK)
        last = taken_over(history, record.claim_id, ours)
        if last is None or run.state is None or run.state.transition_id not in ours:
            return run, decision
        self._log.warning("the server has stored our claim once more after the run had become %s", last.name)
        run = msgspec.structs.replace(run, state=last, state_id=last.id, state_type=last.type, state_name=last.name)
        decision = self._decide(facts, run)
        return run, _put_back(last, decision.outcome) if isinstance(decision, Done) else decision

    async def settle(self, run: FlowRun | None, decision: Decision, facts: Facts, job: Job | None) -> Outcome:
        """Carries the decision out; returns when the server has heard it and owed hooks have been run."""
        facts = replace(facts, starts=max(facts.starts, MAX_STARTS))  # nothing is started again from here on
        for _ in range(TURNS):
            decision = self._retried(decision, facts)
            hook = hook_owed(decision, run, facts.how, stopped=facts.stopped, by_engine=facts.runs_own_hooks)
            if hook is Hook.CANCELLATION:
                await self._run_hook(hook, facts, job)  # before CANCELLED, as Prefect's own workers do
                hook = None
            match decision:
                case Done(outcome):
                    if outcome is Outcome.HANDED_BACK and run is not None and self._holds(run):
                        await self._kit.teller.gone(self._id)  # the engine has handed it back itself
                    if hook is not None:
                        await self._run_hook(hook, facts, job)
                    return outcome
                case Report() as report:
                    owed = Owed(report=report, hook=hook)
                    await self._entry.owe(owed)
                    if await self._report(report):
                        return await self._after_report(owed, facts, job)
                    run, decision = await self.look(facts)
                case Relaunch():
                    raise AssertionError("internal error: a settled run cannot be started again")
        self._log.error("the server refuses every report of how the run ended; giving up")
        return Outcome.CRASHED

    async def resume(self, owed: Owed, facts: Facts, job: Job | None) -> Outcome:
        """Goes on with a report that an earlier agent had decided upon."""
        if owed.heard or await self._report(owed.report):
            return await self._after_report(owed, facts, job, again=owed.heard)
        run, decision = await self.look(replace(facts, starts=MAX_STARTS))
        return await self.settle(run, decision, facts, job)

    async def force(self, report: Report) -> None:
        """Reports although nothing is known of the run any more."""
        if await self._report(report):
            await self._kit.teller.bad_end(self._id, report.message)

    def _holds(self, run: FlowRun) -> bool:
        """Whether the server takes our process for that of a run that waits to be started."""
        return run.state_type is StateType.SCHEDULED and run.infrastructure_pid == self._entry.record.where

    def _retried(self, decision: Decision, facts: Facts) -> Decision:
        """A crash that the user wants to have retried is no end."""
        crashed = isinstance(decision, Report | Done) and decision.outcome is Outcome.CRASHED
        if not crashed or facts.stopped is not None or facts.how is None:
            return decision
        before = self._kit.journal.crash_retries(self._id)
        if before >= self._flows.crash_retries:
            return decision
        said = decision.message if isinstance(decision, Report) else f"The run crashed: the process {facts.how}."
        message = f"{said} To be retried: crash retry {before + 1} of {self._flows.crash_retries}."
        return retry(message, show_output=isinstance(decision, Report))

    async def _report(self, report: Report) -> bool:
        """Proposes the state until there is an answer. Returns False when the run has moved and must be looked at again."""
        scheduled = report.type is StateType.SCHEDULED
        proposal = Proposal(
            type=report.type,
            name=report.name,
            message=report.message,
            force=report.force,
            data=report.data,
            transition_id=self._entry.record.transition_id(f"report {report.type.value}"),
            scheduled=datetime.now(UTC) if scheduled else None,
        )
        if scheduled:
            await self._entry.note(crash_retry=self._entry.record.stopped is None)
            await self._kit.teller.gone(self._id)
        failpoint("before report")
        try:
            verdict = await self._kit.patience.until_answered(lambda: self._kit.backend.propose(self._id, proposal))
        except NotFound:
            return True  # deleted meanwhile: nobody is left to tell
        except Refused as error:
            self._log.error("the server does not take the state %s: %s", report.type.value, error)
            return True
        failpoint("after report")
        heard = verdict.answer is Answer.ACCEPT or _made_by(proposal, verdict.state) or await self._stored(proposal)
        if not heard:
            self._log.info("the server keeps another state than %s: %s", report.type.value, verdict.reason)
            return False
        self._log.log(_LEVELS.get(report.type, logging.INFO), "reported %s: %s", report.type.value, report.message)
        return True

    async def _after_report(self, owed: Owed, facts: Facts, job: Job | None, *, again: bool = False) -> Outcome:
        """What follows upon a state that the server has. `again`: an earlier agent may have done a part of it."""
        if not owed.heard:
            owed = msgspec.structs.replace(owed, heard=True)
            await self._entry.owe(owed)
        failpoint("before log line")
        if owed.report.type not in (StateType.CANCELLED, StateType.COMPLETED):
            await self._kit.teller.bad_end(self._id, self._words(owed.report), unless_there=again)
        failpoint("after log line")
        if owed.hook is not None:
            await self._run_hook(owed.hook, facts, job)
        return owed.report.outcome

    async def _stored(self, proposal: Proposal) -> bool:
        """Whether the run is in the state we proposed: the server only says "already terminal" when asked again."""
        try:
            run = await self._kit.patience.until_answered(lambda: self._kit.backend.read_run(self._id))
        except (NotFound, Refused):
            return False
        return _made_by(proposal, run.state)

    def _words(self, report: Report) -> str:
        lines = last_lines(self._output) if report.show_output else []
        if not lines:
            return report.message
        return "\n".join([f"{report.message} The last lines of its output ({self._output}):", *lines])

    async def _run_hook(self, hook: Hook, facts: Facts, job: Job | None) -> None:
        if facts.hooks_seen and hook is Hook.CANCELLATION:
            return
        if job is None or not await self._entry.begin_hook(hook):
            return
        failpoint("before hook")
        await self._kit.launcher.run_hook(hook, self._entry.record.run, job, self._flows)
        failpoint("after hook")


def _put_back(end: State, outcome: Outcome) -> Report:
    message = end.message or ""
    return Report(type=end.type, name=end.name, message=message, outcome=outcome, force=True, data=end.data)


_LEVELS = {StateType.CRASHED: logging.ERROR, StateType.FAILED: logging.ERROR}


def _made_by(proposal: Proposal, state: State | None) -> bool:
    """A state with our transition id is our own report, whose answer was lost the first time."""
    return state is not None and state.transition_id == proposal.transition_id


def engine_ran_hooks(output: Path) -> bool:
    """Whether the engine wrote that it began to run hooks for a cancellation.

    Only for the moment between its beginning and the state that would have told us: an engine killed there must not have
    its hooks run a second time. All engines from 3.6.27 on write this line through their run logger.
    """
    return any(
        "in response to entering state 'Cancelling'" in line for line in last_lines(output, lines=200, most_bytes=65536)
    )
