"""What is remembered of one claimed run, across the death of the agent: one frozen value, replaced at every step."""

from __future__ import annotations

import uuid
from datetime import datetime

import msgspec

from supervisor.lifecycle import Claiming, Hook, Phase, StopReason
from supervisor.model import FlowRun, Job

SUBMITTING = "submitting"  # the proposal that follows upon the claim on servers that know it


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One claim of one run by this agent. A run that is suspended or rescheduled and claimed again gets a new one.

    `changed` and `opened` are wall-clock times in UTC, for people; durations are never taken from them.
    """

    claim_id: str  # the transition id of the claim: what makes the run recognisable as ours on the server
    run: FlowRun  # as it was offered
    work: str  # str() of the [[work]] table it came by
    phase: Phase
    boot_id: str  # of the boot in which this was written
    opened: datetime
    changed: datetime
    job: Job | None = None
    starts: int = 0  # how often its process has been started
    runs_own_hooks: bool = True  # the engine's part; see `hook_owed`
    is_engine: bool = True  # its process is the engine itself, not a command that may start one
    where: str | None = None  # what the server was told of where its process is
    event: str | None = None  # the event that said it was submitted
    stopped: StopReason | None = None  # it was asked to stop
    why: str = ""  # in words
    hooks_run: tuple[Hook, ...] = ()  # begun by us: never begun twice
    shown: int = 0  # how many bytes of its output have been shown in the agent's own log
    crash_retry: bool = False  # it crashed and was handed back to be retried

    @classmethod
    def claiming(cls, run: FlowRun, work: str, boot_id: str, now: datetime) -> Record:
        """A run that is about to be claimed, under a new claim id."""
        claim_id = str(uuid.uuid4())
        phase = Claiming(transition_id=claim_id)
        return cls(claim_id=claim_id, run=run, work=work, phase=phase, boot_id=boot_id, opened=now, changed=now)

    def transition_id(self, of: str) -> str:
        """The transition id of that proposal: the same after a restart, so that a repeated proposal is recognised."""
        return str(uuid.uuid5(uuid.UUID(self.claim_id), of))

    @property
    def short(self) -> str:
        """The name of the phase."""
        return type(self.phase).__name__
