"""One run's place in the journal: every step is written there before the deed it announces."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from supervisor.failpoints import failpoint
from supervisor.lifecycle import Claiming, Closed, Exited, Hook, Owed, Phase, Starting, step
from supervisor.lifecycle.record import Record


class Memory(Protocol):
    """What a run needs of the journal (`supervisor.journal.Journal`)."""

    @property
    def full(self) -> bool: ...

    async def write(self, record: Record, *, durable: bool = True) -> bool: ...

    async def write_patiently(self, record: Record) -> None: ...

    def forget(self, claim_id: str) -> None: ...

    def crash_retries(self, run_id: str) -> int: ...


class Entry:
    """Owns the run's record. Nobody else changes its phase."""

    def __init__(
        self, record: Record, journal: Memory, boot_id: str, log: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self.record = record
        self._journal = journal
        self._boot_id = boot_id
        self._log = log

    @property
    def phase(self) -> Phase:
        return self.record.phase

    async def open(self) -> bool:
        """Writes that the run is about to be claimed. False when there is no room for that: then it must not be."""
        failpoint("before journal Claiming")
        # What was written into the last of the room is no better: starting the run needs some, too.
        written = await self._write(self.record.phase) and not self._journal.full
        failpoint("after journal Claiming")
        if not written:
            self._journal.forget(self.record.claim_id)
        return written

    def abandon(self, closed: Closed) -> None:
        """Closes a run of which nothing has been written."""
        self._become(closed)

    async def to(self, phase: Phase, **changes: Any) -> None:
        """Takes that step. Waits for room on the disk only where the next deed would be beyond recovery."""
        phase = step(self.record.phase, phase)
        name = _name(phase)
        failpoint(f"before journal {name}")
        if isinstance(phase, Starting):
            # Without this line nobody would find the process, should we die while we start it.
            self._become(phase, **changes)
            if not await self._journal.write(self.record):
                self._log.warning("not started yet: there is no room in the state directory")
                await self._journal.write_patiently(self.record)
        else:
            await self._write(phase, **changes)
        failpoint(f"after journal {name}")

    async def owe(self, owed: Owed) -> None:
        """What the server must still hear has been decided, or has been heard."""
        exited = self.record.phase
        assert isinstance(exited, Exited)
        await self.to(Exited(how=exited.how, stopped=exited.stopped, owed=owed))

    async def begin_hook(self, hook: Hook) -> bool:
        """Notes that the hook is about to be run. False when it was begun before, by us or by an agent before us."""
        if hook in self.record.hooks_run:
            return False
        await self._write(self.record.phase, hooks_run=(*self.record.hooks_run, hook))
        return True

    async def note(self, **changes: Any) -> None:
        """Facts beside the phase. Lost with the machine, not with the agent."""
        await self._write(self.record.phase, durable=False, **changes)

    async def close(self, closed: Closed) -> None:
        """The last step. A claim that came to nothing needs not survive a power cut: it would be asked for again."""
        durable = not isinstance(self.record.phase, Claiming)
        failpoint("before journal Closed")
        await self._write(step(self.record.phase, closed), durable=durable)
        failpoint("after journal Closed")

    async def close_anyhow(self, closed: Closed) -> None:
        """After a fault of ours: from whatever phase it has left the run in."""
        await self._write(closed)

    async def _write(self, phase: Phase, *, durable: bool = True, **changes: Any) -> bool:
        self._become(phase, **changes)
        return await self._journal.write(self.record, durable=durable)

    def _become(self, phase: Phase, **changes: Any) -> None:
        changed = self.record.changed if phase == self.record.phase else datetime.now(UTC)
        self.record = msgspec.structs.replace(
            self.record, phase=phase, changed=changed, boot_id=self._boot_id, **changes
        )


def _name(phase: Phase) -> str:
    if isinstance(phase, Exited) and phase.owed is not None:
        return "heard" if phase.owed.heard else "owed"
    return type(phase).__name__
