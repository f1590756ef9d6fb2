"""What is measured, one function a measure. Each is given contenders that are up and idle, and yields its samples.

Times are the server's own, so that neither our polls nor our clock blur them: all runs on one machine, with one clock.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.contenders import VERSION, VERSION_2, Contender, Running, prefect
from benchmarks.processes import Cpu, alone_megabytes, lives, pss_megabytes
from tests import envs
from tests.binaries import FORMS, binary
from tests.servers import TERMINAL, clean_environ
from tests.waiting import wait_until

STILL_SECONDS = 35.0  # nothing has happened for so long when idle begins: more than anybody expects more to come
IDLE_SECONDS = 20.0  # two polls of the worker
GRACE_SECONDS = 3.0  # after CANCELLED, until a process that still lives counts as left behind
LATE_RUNS = 4
APART_SECONDS = 6.0  # between two scheduled runs: more than a cold start and what may be late take
# The longest of the contenders' poll interval and prefetch together.
PREFETCH_SECONDS = {VERSION: 20.0, VERSION_2: 30.0}


class Sample(NamedTuple):
    row: str
    who: str
    value: float


@dataclass(frozen=True)
class Measure:
    """`take` is given one contender, or with `together` all that are up; `every` second, third … round only.

    Each round takes it `times` times, all contenders' turns between. `limit` is the contenders' limit; `seconds` a guess of
    how long one takes, for the first estimate of the end.
    """

    name: str
    take: Callable[[Sequence[Running]], Iterator[Sample]]
    limit: int = 4
    every: int = 1
    times: int = 1
    together: bool = False
    seconds: float = 20


def idle(members: Sequence[Running]) -> Iterator[Sample]:
    """Memory, and CPU time a minute, while nothing is due. Each has executed a run before."""
    for member in members:
        member.settle()
    time.sleep(STILL_SECONDS)
    before = [Cpu(member.residents) for member in members]
    began = time.monotonic()
    time.sleep(IDLE_SECONDS)
    minutes = (time.monotonic() - began) / 60
    for member, cpu in zip(members, before, strict=True):
        used = Cpu(member.residents).all_since(cpu)
        who = member.contender.key
        yield Sample("idle cpu", who, used / minutes)
        yield Sample("idle pss", who, pss_megabytes(member.pid))
        yield Sample("idle alone", who, alone_megabytes(member.pid))


def create_and_cancel(members: Sequence[Running]) -> Iterator[Sample]:
    """One ad-hoc run: from its creation to RUNNING; cancelled, from CANCELLING to CANCELLED and all its processes gone."""
    [member] = members
    api, who = member.api, member.contender.key
    report = member.home / uuid.uuid4().hex
    run_id = member.create("sleeper", report=str(report))
    run = api.wait_for_state(run_id, "RUNNING", 60)
    yield Sample("create", who, _seconds(run["created"], run["start_time"]))
    wait_until(report.exists, 20, "the flow's body has begun")
    processes = [psutil.Process(pid) for pid in json.loads(report.read_text())]
    time.sleep(random.uniform(1, 4))  # or all polls would stand at the same place as they did when it began
    api.cancel(run_id)
    gone, left = _watch(member, run_id, processes)
    records = sorted(api.state_records(run_id), key=lambda state: state["timestamp"], reverse=True)
    first = {state["type"]: _time(state["timestamp"]) for state in records}
    yield Sample("cancel", who, max(gone, first["CANCELLED"]) - first["CANCELLING"])
    yield Sample("left behind", who, left)


def _watch(member: Running, run_id: str, processes: list[psutil.Process]) -> tuple[float, int]:
    """When the last of them that went was gone, looked for each 10 ms, and how many had to be ended by us."""
    gone = ask_at = end_at = 0.0
    living = processes
    deadline = time.time() + 180
    while not end_at or (living and time.time() < end_at):
        still = [process for process in living if lives(process)]
        if len(still) < len(living):
            gone, living = time.time(), still
        if not end_at and time.time() > ask_at:
            state = member.api.state(run_id)
            assert state in {"CANCELLING", "CANCELLED"}, f"a cancelled run became {state}"
            end_at = time.time() + GRACE_SECONDS if state == "CANCELLED" else 0
            ask_at = time.time() + 0.25
        assert time.time() < deadline, f"a cancelled run is not CANCELLED\n{member.log()}"
        time.sleep(0.01)
    for process in living:
        process.kill()
    return gone, len(living)


def late(members: Sequence[Running]) -> Iterator[Sample]:
    """How long after its scheduled time each of some runs is RUNNING. Only one is due at a time, in turn."""
    version = members[0].contender.server
    due = PREFETCH_SECONDS[version]
    runs: list[tuple[Running, str]] = []
    began = time.monotonic()
    for _ in range(LATE_RUNS):
        for member in members:
            runs.append((member, member.create("noop", due_in=began + due - time.monotonic())))
            due += APART_SECONDS
    time.sleep(began + due - time.monotonic())
    for member, run_id in runs:
        run = member.api.wait_for_state(run_id, "COMPLETED", 60)
        yield Sample("late", member.contender.key, _seconds(run["expected_start_time"], run["start_time"]))


def burst(count: dict[str | None, int]) -> Callable[[Sequence[Running]], Iterator[Sample]]:
    """No-op runs, all due at once: how many a minute, from when they are handed out to the last one's end.

    `count` says how many, by the contender's kind of start. At limit 4 also the CPU time of each run. They are made before,
    while the pool or queue is paused: the server would be busy with it, and that is not what is measured.
    """

    def take(members: Sequence[Running]) -> Iterator[Sample]:
        [member] = members
        who, number = member.contender.key, count[member.contender.start]
        member.settle()
        member.pause(True)
        ids = [member.create("noop") for _ in range(number)]
        stay, before = member.residents, Cpu(member.residents)
        began = time.time()
        member.pause(False)
        runs = _ended(member, ids)
        took = max(_time(run["end_time"]) for run in runs) - began
        yield Sample(f"throughput {member.limit}", who, 60 * number / took)
        if member.limit == 4:
            member.settle()
            after = Cpu(stay)
            yield Sample("cpu own", who, after.own_since(before) / number)
            yield Sample("cpu all", who, after.all_since(before) / number)

    return take


def _ended(member: Running, ids: list[str]) -> list[Any]:
    """The runs, when the last has ended; all must have completed."""

    def look() -> list[Any]:
        found = member.api.post("/flow_runs/filter", {"flow_runs": {"id": {"any_": ids}}, "limit": 200})
        return found if all(run["state_type"] in TERMINAL for run in found) else []

    runs = wait_until(look, 200, f"{len(ids)} runs have ended", every=0.5, more=member.log)
    bad = [run["id"] for run in runs if run["state_type"] != "COMPLETED"]
    assert not bad, f"{len(bad)} of {len(ids)} runs did not complete\n{member.api.story(bad[0])}"
    return runs


def command_starts(chosen: Sequence[Contender]) -> Iterator[Sample]:
    """How long `version` takes: of both forms of the binary, and of Prefect's command. Files are in memory by a first try."""
    programs = {form: binary(form) for form in FORMS}
    for contender in chosen:
        if contender.start is None:
            programs[contender.key] = prefect(envs.interpreter(contender.server))
    for who, program in programs.items():
        yield Sample("version", who, start_seconds(program, 1)[0])


def start_seconds(program: Path, rounds: int) -> list[float]:
    """How long `version` takes, each round; one more before them warms up."""
    found = []
    environ = clean_environ(PREFECT_HOME=tempfile.gettempdir())  # Prefect's command makes it
    for _ in range(rounds + 1):
        before = time.perf_counter()
        subprocess.run([program, "version"], check=True, capture_output=True, env=environ)
        found.append(time.perf_counter() - before)
    return found[1:]


def _time(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def _seconds(start: str, end: str) -> float:
    return _time(end) - _time(start)


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("idle", idle, together=True, seconds=60),
        Measure("create", create_and_cancel, times=2, seconds=15),
        Measure("late", late, every=4, together=True, seconds=100),
        Measure("throughput", burst({None: 16, "cold": 16, "warm": 24}), seconds=40),
        Measure("throughput-1", burst({None: 3, "cold": 4, "warm": 8}), limit=1, every=5, seconds=25),
        Measure("throughput-16", burst({None: 16, "cold": 16, "warm": 32}), limit=16, every=5, seconds=35),
    )
}
