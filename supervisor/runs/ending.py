"""The end of a run whose process is gone: read what the server says, decide, run the hooks that are owed, report."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from supervisor.config import Flows
from supervisor.errors import NotFound, Refused
from supervisor.lifecycle import (
    MAX_STARTS,
    Exit,
    Hook,
    Outcome,
    Report,
    StopReason,
)
from supervisor.lifecycle.decision import Decision, Done, Relaunch, decide, hook_owed
from supervisor.logs import last_lines
from supervisor.model import Answer, FlowRun, Job, Proposal, State, StateType
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


class Ending:
    """Brings one run to its close. Owns which of its hooks have been run by us."""

    def __init__(
        self, offer: FlowRun, flows: Flows, kit: Kit, output: Path, log: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._offer = offer
        self._flows = flows
        self._kit = kit
        self._output = output
        self._log = log
        self._hooks_run: set[Hook] = set()

    async def look(self, facts: Facts) -> tuple[FlowRun | None, Decision]:
        """What the server says of the run now (None: deleted), and what follows from it."""
        try:
            run = await self._kit.patience.until_answered(lambda: self._kit.backend.read_run(self._offer.id))
        except (NotFound, Refused):
            run = None
        return run, decide(facts.how, run, stopped=facts.stopped, starts=facts.starts, why=facts.why)

    async def settle(self, run: FlowRun | None, decision: Decision, facts: Facts, job: Job | None) -> Outcome:
        """Carries the decision out; returns when the server has heard it and owed hooks have been run."""
        facts = replace(facts, starts=max(facts.starts, MAX_STARTS))  # nothing is started again from here on
        for _ in range(TURNS):
            owed = hook_owed(decision, run, facts.how, stopped=facts.stopped, by_engine=facts.runs_own_hooks)
            if owed is Hook.CANCELLATION:
                await self._run_hook(owed, facts, job)  # before CANCELLED, as Prefect's own workers do
            match decision:
                case Done(outcome):
                    outcome_now = outcome
                case Report() as report:
                    if not await self._report(report):
                        run, decision = await self.look(facts)
                        continue
                    outcome_now = report.outcome
                case Relaunch():
                    raise AssertionError("internal error: a settled run cannot be started again")
            if owed is Hook.CRASHED:
                await self._run_hook(owed, facts, job)
            return outcome_now
        self._log.error("the server refuses every report of how the run ended; giving up")
        return Outcome.CRASHED

    async def _report(self, report: Report) -> bool:
        """Proposes the state until there is an answer. Returns False when the run has moved and must be looked at again."""
        proposal = Proposal(type=report.type, message=report.message, force=report.force, transition_id=str(uuid4()))
        try:
            verdict = await self._kit.patience.until_answered(
                lambda: self._kit.backend.propose(self._offer.id, proposal)
            )
        except NotFound:
            return True  # deleted meanwhile: nobody is left to tell
        except Refused as error:
            self._log.error("the server does not take the state %s: %s", report.type.value, error)
            return True
        heard = verdict.answer is Answer.ACCEPT or _made_by(proposal, verdict.state) or await self._stored(proposal)
        if not heard:
            self._log.info("the server keeps another state than %s: %s", report.type.value, verdict.reason)
            return False
        self._log.log(_LEVELS.get(report.type, logging.INFO), "reported %s: %s", report.type.value, report.message)
        if report.type is not StateType.CANCELLED:
            await self._kit.teller.bad_end(self._offer.id, self._words(report))
        return True

    async def _stored(self, proposal: Proposal) -> bool:
        """Whether the run is in the state we proposed: the server only says "already terminal" when asked again."""
        run, _ = await self.look(Facts())
        return run is not None and _made_by(proposal, run.state)

    def _words(self, report: Report) -> str:
        lines = last_lines(self._output) if report.show_output else []
        if not lines:
            return report.message
        return "\n".join([f"{report.message} The last lines of its output ({self._output}):", *lines])

    async def _run_hook(self, hook: Hook, facts: Facts, job: Job | None) -> None:
        if job is None or hook in self._hooks_run or (facts.hooks_seen and hook is Hook.CANCELLATION):
            return
        self._hooks_run.add(hook)
        await self._kit.launcher.run_hook(hook, self._offer, job, self._flows)


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
