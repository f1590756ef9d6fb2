"""What must never be, whatever was killed: found in the server's history, in /proc, in the bodies' trace and in agents' logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.agents import RUN_MARK
from tests.invariants import executions
from tests.servers import TERMINAL, processes_with
from tests.waiting import lines

SIGNS_OF_BUGS = ("Traceback", "internal error", "giving up")
HOOKED = ("crashes", "is cancelled")  # who have a hook that is run once; what `fails` has is its engine's own business


@dataclass(frozen=True)
class Finding:
    """Something that must never be. `kind` is lost, doubled, stray, bug or harness; `story` is what helps to understand it."""

    kind: str
    where: str
    what: str
    story: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}" + (f"\n{self.story}" if self.story else "")


@dataclass
class Tally:
    """What was done and found. Owns the counts."""

    kills: int = 0
    restarts: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.restarts += other.restarts
        self.runs += other.runs
        self.findings += other.findings

    def of(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)

    def __str__(self) -> str:
        runs = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.runs.items()))
        return (
            f"kills {self.kills}, restarts {self.restarts}, runs {self.runs.total()} ({runs}), lost {self.of('lost')}, "
            f"doubled {self.of('doubled')}, stray processes {self.of('stray')}, findings {len(self.findings)}"
        )


def check_history(states: Sequence[tuple[str, str]], end: str) -> Iterator[tuple[str, str]]:
    """(kind, what) of all that is wrong with the history of a run that should have come to this end."""
    kinds = [kind for kind, _ in states]
    ends = {kind for kind in kinds if kind in TERMINAL}
    if not kinds or kinds[-1] != end:
        yield "lost", f"it is {kinds[-1] if kinds else 'unknown'} and should be {end}"
    if ends - {end}:
        yield "doubled", f"it had the ends {sorted(ends)} and should have had {end} alone"
    if kinds.count("RUNNING") > 1:
        yield "doubled", f"it was RUNNING {kinds.count('RUNNING')} times"


def check_trace(trace: Path, run_id: str) -> Iterator[tuple[str, str]]:
    """(kind, what) when the body was not executed exactly once."""
    count = executions(trace)[run_id]
    if count != 1:
        yield "doubled" if count else "lost", f"its body was executed {count} times"


def check_hooks(hooks: Path, run_id: str, outcome: str, *, at_least: int) -> Iterator[tuple[str, str]]:
    """(kind, what) when a hook was run twice, or one that is owed was not run.

    A hook that has begun is never begun again, for it may have been half done: an agent that dies there may leave it undone
    (`at_least` 0).
    """
    count = sum(run_id in line for line in lines(hooks))
    if count > 1:
        yield "doubled", f"its hooks were run {count} times"
    if outcome in HOOKED and count < at_least:
        yield "lost", "its hook was not run"


def check_processes(run_id: str) -> Iterator[tuple[str, str]]:
    """(kind, what) for each process that bears the run's mark."""
    for process in processes_with(RUN_MARK, run_id):
        yield "stray", f"process {process.pid} is left of it"


def check_log(log: str) -> Iterator[tuple[str, str]]:
    """(kind, what) for each sign of a bug in an agent's log."""
    for sign in SIGNS_OF_BUGS:
        if sign in log:
            yield "bug", f"the agent's log says '{sign}'"
