"""What may not grow: requests with the number of live runs, and nothing at all with the number of those that have ended."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import trio

from supervisor.config import Output, Poll
from supervisor.journal import Journal
from supervisor.lifecycle import Outcome
from supervisor.lifecycle.record import Record
from supervisor.logs import Follower, OutputKeeper
from supervisor.logs.live import LiveFile
from supervisor.model import FlowRun, Job, Pool, StateType
from supervisor.process.channel import ControlChannel, Session
from supervisor.process.interpreter import Interpreter
from supervisor.process.launch import Child
from supervisor.runs.canceller import Canceller
from supervisor.runs.entry import Entry
from supervisor.runs.health import ServerHealth
from supervisor.runs.kit import Kit
from supervisor.runs.launcher import Launcher
from supervisor.runs.patience import Patience
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller
from tests.fakes import (
    FakeBackend,
    QuietPulse,
    lives,
    offer,
    on_jumping_clock,
    poller_of,
    record_of,
    roster_of,
    work,
)


@on_jumping_clock
async def test_three_hundred_live_runs_cost_two_requests_a_poll() -> None:
    backend = FakeBackend(*(offer(f"r{number}") for number in range(300)))
    backend.pools["p"] = Pool(id="p", name="p", type="process")
    roster = roster_of(None, lives(10_000))
    source = Source(work(pool="p"), backend)
    pulse: Any = QuietPulse()
    canceller = Canceller(backend, roster, ServerHealth("u"), pulse, poll=Poll(jitter=0.0), turn_seconds=9)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        for run_id in backend.runs:
            assert roster.admit(offer(run_id), source)
        nursery.start_soon(poller_of(source, roster).run)
        nursery.start_soon(canceller.run)
        await trio.sleep(100.5)  # polls at 0, 5, … 100
        nursery.cancel_scope.cancel()
    looked_up = backend.count("read_pool")  # every half minute, however many live
    assert backend.count("due_in_pool") == 21
    assert backend.count("cancelling") == 21
    assert len(backend.calls) == 42 + looked_up
    assert looked_up <= 4


class EndedAtOnce(FakeBackend):
    """A server whose runs are commands that have said COMPLETED by the time they end."""

    async def job(self, run: FlowRun) -> Job:
        self.set_state(run.id, StateType.COMPLETED)
        return Job(command=("true",))


class OnePython:
    """An interpreter that nobody starts."""

    async def get(self, python: Path) -> Interpreter:
        return Interpreter(python, "3.8.8")


def kit_in(home: Path, backend: FakeBackend, journal: Journal) -> Kit:
    """All that runs need, with real processes, files and journal, and a server that is not there."""
    health = ServerHealth("http://server/api")
    patience = Patience(Poll(), health)
    output = OutputKeeper(home / "logs", Output())
    interpreters: Any = OnePython()
    cold: Any = None
    launcher = Launcher(
        api_url="http://server/api",
        secrets=dict,
        worker="w",
        state_dir=home,
        work_dir=home / "work",
        output=output,
        interpreters=interpreters,
        channel=ControlChannel(),
        cgroups=None,
        warm=cold,
    )
    return Kit(
        backend=backend,
        health=health,
        patience=patience,
        teller=Teller(backend, patience, worker="w", version="0"),
        launcher=launcher,
        journal=journal,
        output=output,
    )


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_of_runs_that_have_ended_nothing_is_left_in_the_agent(tmp_path: Path) -> None:
    """Not one of the objects that a run is made of, no task, no descriptor, no folder."""
    backend = EndedAtOnce(*(offer(f"r{number}") for number in range(40)))
    backend.pools["p"] = Pool(id="p", name="p", type="process")
    journal = Journal.open(tmp_path / "journal.sqlite3")
    kit = kit_in(tmp_path, backend, journal)
    roster = Roster(None, lambda offered, source: Run(record_of(offered), source.work, kit))
    source = Source(work(pool="p"), backend)
    counts: list[tuple[int, int]] = []

    async def main() -> None:
        with trio.fail_after(120):
            async with trio.open_nursery() as runs:
                roster.open(runs)
                ids = list(backend.runs)
                for part in (ids[:8], ids[8:]):
                    for run_id in part:
                        assert roster.admit(offer(run_id), source)
                    while len(roster):
                        await roster.wait_slot_freed()
                    await trio.testing.wait_all_tasks_blocked()
                    counts.append((trio.lowlevel.current_statistics().tasks_living, descriptors()))

    trio.run(main)
    assert roster.closed == {Outcome.FINISHED: 40}
    assert counts[0] == counts[1]
    gc.collect()
    made_for_a_run = (Run, Entry, Record, Child, Session, Follower, LiveFile)
    assert [thing for thing in gc.get_objects() if isinstance(thing, made_for_a_run)] == []
    assert list((tmp_path / "work").iterdir()) == []
    journal.close()
