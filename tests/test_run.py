"""One run's own life, where neither a server nor a process decides it."""

from __future__ import annotations

from pathlib import Path

import trio

from supervisor.config import Poll
from supervisor.lifecycle import Outcome, Starting, StopReason
from supervisor.lifecycle.record import Record
from supervisor.model import StateType
from supervisor.runs.health import ServerHealth
from supervisor.runs.kit import Kit
from supervisor.runs.patience import Patience
from supervisor.runs.run import Run
from supervisor.runs.teller import Teller
from tests.fakes import FakeBackend, FakeJournal, NoOutput, offer, on_jumping_clock, record_of, work


class FillingJournal(FakeJournal):
    """One whose disk becomes full between the claim and the start."""

    async def write(self, record: Record, *, durable: bool = True) -> bool:
        self.full |= isinstance(record.phase, Starting)
        return await super().write(record, durable=durable)


class NoLauncher:
    """Nothing can be started; what would be tidied up was never made."""

    def output(self, run_id: str) -> Path:
        return Path("/nowhere")

    def group(self, run_id: str) -> None:
        return None

    async def clean_up(self, run_id: str) -> None:
        pass


@on_jumping_clock
async def test_a_run_that_waits_for_room_on_the_disk_is_cancelled_at_once_and_never_started() -> None:
    backend, journal = FakeBackend(offer()), FillingJournal()
    health = ServerHealth("http://server/api")
    table = work(pool="p")
    patience = Patience(Poll(), health)
    teller = Teller(backend, patience, worker="w", version="0")
    kit = Kit(
        backend=backend,
        health=health,
        patience=patience,
        teller=teller,
        launcher=NoLauncher(),  # type: ignore[arg-type]
        journal=journal,
        output=NoOutput(),
    )
    run = Run(record_of(offer()), table, kit)
    outcomes: list[Outcome] = []

    async def live() -> None:
        outcomes.append(await run.live())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await trio.sleep(100)
        assert run.phase == Starting(attempt=1)
        assert not outcomes
        backend.set_state("r1", StateType.CANCELLING)
        run.ask_to_stop(StopReason.CANCEL, "Cancelled on request.")
        await trio.sleep(10)
        assert outcomes == [Outcome.CANCELLED]
    assert backend.states["r1"].type is StateType.CANCELLED
