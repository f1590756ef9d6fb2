"""Records for journals, and what has to happen to a journal in a process of its own.

python -m tests.journals fixture FILE    makes tests/fixtures/journal-v1.sqlite3 again, should it ever be lost. A new
                                         format gets a file of its own; the old one is never made anew.
python -m tests.journals write FILE      writes until it is killed, and says on standard output what has been kept
python -m tests.journals small-disk DIR  lives on a full disk; DIR is mounted for it alone
python -m tests.journals small-files DIR the same, where files may not grow
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import trio
from trio.testing import MockClock

from supervisor.journal import Journal, read
from supervisor.lifecycle import (
    Claiming,
    Closed,
    Exit,
    Exited,
    Hook,
    Outcome,
    Owed,
    Phase,
    ProcessRef,
    Report,
    Running,
    Starting,
    Stopping,
    StopReason,
)
from supervisor.lifecycle.record import Record
from supervisor.model import FlowRun, Job, Pool, State, StateType

LONG_AGO = datetime(2026, 11, 1, 12, 30, tzinfo=UTC)
PROCESS = ProcessRef(pid=4711, start_ticks=123456, boot_id="boot-1")


def record(number: int, phase: Phase | None = None, *, payload: int = 0, **fields: Any) -> Record:
    """The `number`-th claim, of a run of its own; `payload` bytes longer than it would be."""
    run = FlowRun(
        id=f"run-{number}",
        name=f"curious-otter-{number}",
        flow_id="flow-1",
        deployment_id="deployment-1",
        state_id=f"state-{number}",
        state_type=StateType.SCHEDULED,
        state_name="Late",
        state=State(type=StateType.SCHEDULED, name="Late", data={"type": "unpersisted"}),
        expected_start=LONG_AGO,
        tags=("nightly",),
        job_variables={"env": {"A": "1"}, "fill": "x" * payload},
    )
    at = LONG_AGO + timedelta(minutes=number)
    claim_id = f"00000000-0000-0000-0000-{number:012d}"
    given: dict[str, Any] = {"opened": at, "changed": at + timedelta(seconds=5), **fields}
    return Record(
        claim_id=claim_id,
        run=run,
        work="pool 'local'",
        phase=phase or Claiming(transition_id=claim_id),
        boot_id="boot-1",
        **given,
    )


def one_of_each() -> list[Record]:
    """Every phase, and every field filled in somewhere. What the checked-in journal holds: never to be changed."""
    job = Job(
        command=("sh", "-c", "true"),
        env={"KEPT": "ü", "UNSET": None},
        working_dir="/srv/flows",
        flow_name="etl",
        deployment_id="deployment-1",
        deployment_name="nightly",
        pool=Pool(id="pool-1", name="local", type="process", concurrency_limit=3),
    )
    report = Report(type=StateType.CRASHED, message="It was killed.", outcome=Outcome.CRASHED, show_output=True)
    return [
        record(1),
        record(2, Starting(attempt=1), job=job, starts=1),
        record(
            3, Running(process=PROCESS, attempt=2), job=job, starts=2, where="host:4711", event="event-1", shown=999
        ),
        record(
            4, Stopping(process=PROCESS, reason=StopReason.TIMEOUT), stopped=StopReason.TIMEOUT, why="It took 60 s."
        ),
        record(5, Exited(how=None)),
        record(
            6,
            Exited(
                how=Exit(signal=9, note="killed for memory"),
                stopped=StopReason.CANCEL,
                owed=Owed(report=report, hook=Hook.CRASHED, heard=True),
            ),
            hooks_run=(Hook.CANCELLATION,),
            runs_own_hooks=False,
            is_engine=False,
        ),
        record(7, Closed(outcome=Outcome.FINISHED)),
        record(8, Closed(outcome=Outcome.HANDED_BACK), crash_retry=True),
        record(9, Closed(outcome=Outcome.NOT_OURS), why="Another agent has it."),
    ]


def later(old: Record, phase: Phase, **fields: Any) -> Record:
    return msgspec.structs.replace(old, phase=phase, changed=old.changed + timedelta(seconds=1), **fields)


async def write_all(journal: Journal, *records: Record) -> None:
    """At once, in any order."""
    async with trio.open_nursery() as nursery:
        for one in records:
            nursery.start_soon(journal.write, one)


def made(path: Path, *records: Record) -> Path:
    """A journal that holds these, closed in order."""
    journal = Journal.open(path)
    for one in records:
        assert trio.run(journal.write, one)
    journal.close()
    return path


# --- in a process of its own ----------------------------------------------------------------------------------------------


async def write_until_killed(path: Path, writers: int = 8) -> None:
    journal = Journal.open(path)

    async def writer(number: int) -> None:
        for count in itertools.count():
            phase = Closed(outcome=Outcome.FINISHED) if count % 10 == 9 else None
            one = record(os.getpid() * 100_000 + number * 10_000 + count // 10, phase, starts=count)
            assert await journal.write(one, durable=count % 3 > 0)
            os.write(1, f"{one.claim_id} {count}\n".encode())

    async with trio.open_nursery() as nursery:
        for number in range(writers):
            nursery.start_soon(writer, number)


class FullDisk:
    """A disk, or a limit, that can be used up and given back."""

    def __init__(self, folder: Path) -> None:
        self.ballast = folder / "ballast"

    def fill(self) -> None:
        """To the last byte."""
        with self.ballast.open("ab", buffering=0) as ballast:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        ballast.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        self.ballast.unlink()


class SmallFiles(FullDisk):
    """No file may grow beyond 128 KB."""

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, resource.RLIM_INFINITY))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


async def live_without_room(path: Path, disk: FullDisk) -> None:
    journal = Journal.open(path)
    first = record(1)
    assert await journal.write(first)
    assert not journal.full
    disk.fill()
    numbers = itertools.count(2)
    refused = await use_up(journal, numbers)
    assert journal.full
    assert refused not in read(path)

    held = later(refused, Starting(attempt=1))
    given_up = record(next(numbers), payload=20_000)
    assert not await journal.write(held)
    assert not await journal.write(given_up)
    journal.forget(given_up.claim_id)
    patient = record(next(numbers), payload=20_000)
    superseding = later(patient, Closed(outcome=Outcome.FINISHED))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.run)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(journal.write_patiently, patient)
            await until(lambda: journal._owes(patient.claim_id))
            assert not await journal.write(superseding)
            await trio.sleep(60)
            assert waiting.child_tasks, "it did not wait for the disk"
            disk.free()
        await until(lambda: not journal.full)
        nursery.cancel_scope.cancel()
    found = read(path)
    assert all(one in found for one in (held, superseding, first))
    assert given_up.claim_id not in [one.claim_id for one in found]

    disk.fill()
    journal.forget((await use_up(journal, numbers)).claim_id)
    disk.free()
    assert journal.full
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.run)
        await until(lambda: not journal.full)  # nothing is unwritten: it has to ask
        nursery.cancel_scope.cancel()
    journal.close()


async def use_up(journal: Journal, numbers: Iterator[int]) -> Record:
    """Writes until there is no room; what could not be written. SQLite still has some pages of its own."""
    for _ in range(500):
        one = record(next(numbers), payload=20_000)
        if not await journal.write(one):
            return one
    raise AssertionError("it never said that it is full")


async def start_without_room(path: Path, disk: FullDisk) -> None:
    made_before = [record(1), record(2, Closed(outcome=Outcome.FINISHED))]
    journal = Journal.open(path)
    for one in made_before:
        assert await journal.write(one)
    journal.close()
    disk.fill()
    assert [one.claim_id for one in read(path)] == [one.claim_id for one in reversed(made_before)]
    again = Journal.open(path)
    assert again.set_aside is None
    assert [one.claim_id for one in again.open_records()] == [made_before[0].claim_id]
    assert again.full
    await again.write(later(made_before[0], Starting(attempt=1)))

    new = Journal.open(path.with_name("new.sqlite3"))
    assert new.full
    assert not await new.write(record(3))
    disk.free()
    for journal, wanted in ((again, later(made_before[0], Starting(attempt=1))), (new, record(3))):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.run)
            await until(lambda journal=journal: not journal.full)  # type: ignore[misc]
            nursery.cancel_scope.cancel()
        journal.close()
        assert wanted in read(journal._path)


async def until(condition: Callable[[], bool]) -> None:
    """On a clock that jumps, so the limit is no real time."""
    for _ in range(10_000):
        if condition():
            return
        await trio.sleep(0.1)
    raise AssertionError("it never came true")


def _run(main: Callable[[Path, FullDisk], Awaitable[None]], path: Path, disk: FullDisk) -> None:
    trio.run(main, path, disk, clock=MockClock(autojump_threshold=0.001))


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    match what:
        case "fixture":
            made(where, *one_of_each())
        case "write":
            trio.run(write_until_killed, where)
        case "small-disk":
            _run(live_without_room, where / "journal.sqlite3", FullDisk(where))
            _run(start_without_room, where / "second.sqlite3", FullDisk(where))
        case "small-files":
            _run(live_without_room, where / "journal.sqlite3", SmallFiles(where))
    print("done")
