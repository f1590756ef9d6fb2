"""What a durable commit of the journal costs, and what the event loop feels of it.

    .venv/bin/python -m benchmarks.journal_commit [SECONDS] [DIRECTORY]

The directory should be on the disk that state_dir would be on: a tmpfs syncs for nothing. Each writer takes its runs
through the phases of a real life, one durable write after the other, on a journal with a full history in it. Meanwhile a
task that does nothing but sleep for 5 ms tells how late the loop woke it.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trio

from supervisor.journal import HISTORY_RUNS, Journal
from supervisor.lifecycle import Closed, Exit, Exited, Outcome, Phase, ProcessRef, Running, Starting
from supervisor.lifecycle.record import Record
from supervisor.model import FlowRun, Job, StateType

PERIOD = 0.005


def life() -> Iterator[Record]:
    """Every value that a run's record takes on its way, about 1.5 KB each."""
    run = FlowRun(
        id=os.urandom(16).hex(),
        name="curious-otter",
        flow_id="f" * 36,
        deployment_id="d" * 36,
        state_id="s" * 36,
        state_type=StateType.SCHEDULED,
        state_name="Scheduled",
        job_variables={"env": {f"NAME_{number}": "x" * 20 for number in range(20)}},
    )
    process = ProcessRef(pid=4711, start_ticks=123456789, boot_id="b" * 36)
    record = Record.claiming(run, "pool 'local'", "b" * 36, datetime.now(UTC))
    job = Job(env={f"PREFECT_{number}": "y" * 20 for number in range(10)})
    phases: list[Phase] = [
        record.phase,
        Starting(attempt=1),
        Running(process=process, attempt=1),
        Exited(how=Exit(code=0)),
        Closed(outcome=Outcome.FINISHED),
    ]
    for phase in phases:
        yield msgspec.structs.replace(record, phase=phase, job=job, changed=datetime.now(UTC))


async def measure(path: Path, writers: int, seconds: float) -> str:
    journal = Journal.open(path)
    taken: list[float] = []
    late: list[float] = []

    async def writer() -> None:
        while True:
            for record in life():
                began = trio.current_time()
                assert await journal.write(record)
                taken.append(trio.current_time() - began)
                await trio.lowlevel.checkpoint()

    async def ticker() -> None:
        while True:
            due = trio.current_time() + PERIOD
            await trio.sleep_until(due)
            late.append(trio.current_time() - due)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticker)
            for _ in range(writers):
                nursery.start_soon(writer)
    await journal.prune(datetime.now(UTC))
    journal.close()
    return (
        f"{writers:7d}  {len(taken) / seconds:8.0f}  {_ms(statistics.median(taken))}  {_ms(_p99(taken))}  "
        f"{_ms(statistics.median(late))}  {_ms(_p99(late))}  {_ms(max(late))}"
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:8.2f}"


async def fill(path: Path) -> None:
    journal = Journal.open(path)
    async with trio.open_nursery() as nursery:
        for _ in range(HISTORY_RUNS):
            nursery.start_soon(journal.write, list(life())[-1])
    journal.close()


def main(seconds: float, base: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=base) as directory:
        path = Path(directory, "journal.sqlite3")
        trio.run(fill, path)
        print(f"{os.cpu_count()} cores, {seconds:g} s each, {HISTORY_RUNS} runs of history; milliseconds")
        print("writers  writes/s    median       p99  lag med.   lag p99   lag max")
        for writers in (1, 16, 64):
            print(trio.run(measure, path, writers, seconds), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0, sys.argv[2] if len(sys.argv) > 2 else None)
