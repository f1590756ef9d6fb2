"""One session: rounds in which all contenders take their turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.contenders import Contender, Running, enter
from benchmarks.measures import Measure, Sample, command_starts
from benchmarks.processes import processor
from supervisor import __version__
from tests import envs
from tests.servers import Api, PrefectServer

TOP = Path(__file__).parents[1]
FAILED = (AssertionError, psutil.Error, httpx.HTTPError)
_START_SECONDS = 18.0  # a server, the contenders, and the run that each executes before it is measured


@dataclass
class Results:
    """Raw samples by row and contender, and what could not be measured, with the reason's first line."""

    machine: dict[str, Any]
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.samples.setdefault(sample.row, {}).setdefault(sample.who, []).append(round(sample.value, 5))

    def fail(self, name: str, error: Exception) -> None:
        told = str(error).splitlines() or [type(error).__name__]
        print(f"{name}:", *told[:20], sep="\n  ", flush=True)
        self.failures.append(f"{name}: {told[0]}")


class Progress:
    """Lines that say what was found, and how long it will yet take. Each kind of step is as long as it last was."""

    def __init__(self, steps: Sequence[tuple[str, float]]) -> None:
        self._ahead = list(steps)
        self._known: dict[str, float] = {}
        self._began = self._last = time.monotonic()

    def minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def skip(self, names: Sequence[str]) -> None:
        """The next steps of these names are not ahead any more."""
        for name in names:
            if found := [step for step in self._ahead if step[0] == name]:
                self._ahead.remove(found[0])

    def step(self, name: str, found: str) -> None:
        now = time.monotonic()
        self._known[name] = now - self._last
        self._last = now
        self.skip([name])
        left = sum(self._known.get(step, guess) for step, guess in self._ahead)
        spent = int(60 * self.minutes())
        print(f"{spent // 60:3d}:{spent % 60:02d}  {left / 60:4.1f} min left  {name}: {found}", flush=True)


def run(rounds: int, measures: Sequence[Measure], contenders: Sequence[Contender]) -> Results:
    """Measures all of that. Leaves neither a process nor a file behind, however it ends."""
    results = Results(machine())
    turns = list(plan(rounds, measures, contenders))
    progress = Progress(
        [step for turn in turns for step in turn.ahead()] + [("version", 2.0 * len(contenders))] * rounds
    )
    with own_folder():
        for number in range(rounds):
            for turn in (turn for turn in turns if turn.round == number):
                try:
                    turn.take(results, progress)
                except FAILED as error:  # what has been measured so far is worth half an hour
                    results.fail(turn.name("start"), error)
                    progress.skip([name for name, _ in turn.ahead()])
            found = list(command_starts(contenders))
            for sample in found:
                results.add(sample)
            progress.step("version", _words(found))
    results.machine |= {"rounds": rounds, "minutes": round(progress.minutes(), 1)}
    return results


@dataclass(frozen=True)
class Turn:
    """The measures of one round that need the same server and the same limit."""

    round: int
    limit: int
    version: str
    measures: list[Measure]
    contenders: list[Contender]

    def steps(self) -> Iterator[tuple[Measure, list[Contender]]]:
        """Each measure with those that it is taken of at once."""
        for measure in self.measures:
            if measure.together:
                yield measure, self.contenders
            else:
                for _ in range(measure.times):
                    yield from ((measure, [contender]) for contender in self.contenders)

    def ahead(self) -> Iterator[tuple[str, float]]:
        yield self.name("start"), _START_SECONDS
        for measure, group in self.steps():
            yield self.name(measure.name, group), measure.seconds

    def take(self, results: Results, progress: Progress) -> None:
        with ExitStack() as stack:
            server = PrefectServer(self.version)
            stack.callback(server.stop)
            server.start()
            api = Api(server)
            stack.callback(api.close)
            running: dict[Contender, Running] = {}

            @stack.callback
            def end() -> None:
                for member in running.values():
                    _stop(member)

            def begin(contenders: Sequence[Contender]) -> None:
                running.update({contender: enter(contender, server, api, self.limit) for contender in contenders})
                _warm_up([running[contender] for contender in contenders])

            begin(self.contenders)
            progress.step(self.name("start"), "all are up")
            for measure, group in self.steps():
                name = self.name(measure.name, group)
                found: list[Sample] = []
                try:
                    for sample in measure.take([running[contender] for contender in group]):
                        found.append(sample)
                        results.add(sample)
                except FAILED as error:
                    results.fail(name, error)
                    for contender in group:  # what is left of these runs must not meet the next measure
                        _stop(running.pop(contender))
                    begin(group)
                progress.step(name, _words(found))

    def name(self, what: str, group: Sequence[Contender] = ()) -> str:
        who = f" {group[0].key}" if len(group) == 1 else ""
        return f"{self.version} limit {self.limit}, {what}{who}"


def plan(rounds: int, measures: Sequence[Measure], contenders: Sequence[Contender]) -> Iterator[Turn]:
    """All turns of a session. Who begins goes round, and so does the server that is first."""
    versions = list(dict.fromkeys(contender.server for contender in contenders))
    for number in range(rounds):
        due = [measure for measure in measures if number % measure.every == 0]
        for version in _rotated(versions, number):
            members = _rotated([contender for contender in contenders if contender.server == version], number)
            for limit in dict.fromkeys(measure.limit for measure in due):
                yield Turn(number, limit, version, [measure for measure in due if measure.limit == limit], members)


def _rotated(items: list[Any], by: int) -> list[Any]:
    by %= len(items)
    return items[by:] + items[:by]


def _warm_up(members: Sequence[Running]) -> None:
    """Starts them and has each execute a run: all have polled, and what they keep ready for the next one is ready."""
    first = [(member, member.create("noop")) for member in members]
    for member in members:
        member.start()
    for member, run_id in first:
        member.api.wait_for_state(run_id, "COMPLETED", 60)
    for member in members:
        if member.contender.start == "warm":  # the first may have been quicker than its fork server
            member.api.wait_for_state(member.create("noop"), "COMPLETED", 60)
    for member in members:
        member.settle()


def _stop(member: Running) -> None:
    try:
        member.stop()
    except AssertionError as error:
        print(f"{member.contender.key} did not end as it should: {error}", flush=True)


def _words(found: Sequence[Sample]) -> str:
    shown: dict[str, list[str]] = {}
    for sample in found:
        shown.setdefault(f"{sample.row} {sample.who}", []).append(f"{sample.value:.3g}")
    return "; ".join(f"{name} {' '.join(values)}" for name, values in shown.items()) or "not measured"


@contextlib.contextmanager
def own_folder() -> Iterator[None]:
    """A folder on a disk, not in a memory that syncs for nothing, for all files; removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=envs.cache()))
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before[0]
        os.environ.pop("TMPDIR")
        if before[1] is not None:
            os.environ["TMPDIR"] = before[1]
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> dict[str, Any]:
    """Where and when, and what is measured."""

    def git(*words: str) -> str:
        asked = subprocess.run(["git", "-C", TOP, *words], capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    changed = git("status", "--porcelain", "--", "supervisor", "benchmarks")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "flow-agent": __version__,
        "commit": git("rev-parse", "--short", "HEAD") + (", and changes that are not committed" if changed else ""),
        "cores": os.cpu_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "load before": round(os.getloadavg()[0], 2),
    }
