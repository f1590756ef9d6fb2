"""The figures: raw samples, and what is made of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contenders import VERSION, VERSION_2, Contender

DATA = Path(__file__).parents[1] / "docs" / "benchmarks.json"


class Figures(NamedTuple):
    """Samples by row and contender, where they are from, and what could not be measured."""

    machine: dict[str, Any]
    samples: dict[str, dict[str, list[float]]]
    failures: tuple[str, ...] = ()


def percentile_95(values: list[float]) -> float:
    """The smallest value that 95 % of them do not exceed."""
    return sorted(values)[math.ceil(len(values) * 0.95) - 1]


def distance(values: list[float]) -> float:
    """The median of how far they are from 0, on either side of it."""
    return statistics.median(abs(value) for value in values)


def digits(value: float, meant: int = 2) -> str:
    """So many digits that mean something, and no more after the point than that takes."""
    if value == 0:
        return "0"
    places = max(0, meant - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


class Row(NamedTuple):
    """One line of the tables. `of` names the samples, `factor` brings them to the unit."""

    title: str
    unit: str
    of: str
    meaning: str
    more_is_better: bool = False
    factor: float = 1
    figure: Callable[[list[float]], float] = statistics.median
    show: Callable[[float], str] = digits


ROWS = {
    "create": Row("create → RUNNING", "s", "create", "An ad-hoc run: from its creation to RUNNING."),
    "late": Row(
        "off its time, median",
        "s",
        "late",
        "A scheduled run: how much earlier or later than due it is RUNNING. One is due at a time.",
        figure=distance,
    ),
    "late 95": Row(
        "lateness, p95",
        "s",
        "late",
        "A scheduled run: from the time it is due to RUNNING; 95 % of the runs are not later.",
        figure=percentile_95,
    ),
    "throughput 1": Row(
        "no-op runs at limit 1",
        "a minute",
        "throughput 1",
        "Runs that do nothing, all due at once: from when the pool or queue hands them out to the last one's end.",
        more_is_better=True,
    ),
    "throughput 4": Row("no-op runs at limit 4", "a minute", "throughput 4", "The same.", more_is_better=True),
    "throughput 16": Row("no-op runs at limit 16", "a minute", "throughput 16", "The same.", more_is_better=True),
    "cancel": Row(
        "cancel",
        "s",
        "cancel",
        "A flow that sleeps and has a child process: from CANCELLING until the server says CANCELLED and its processes are gone.",
    ),
    "left behind": Row(
        "processes left by a cancel",
        "",
        "left behind",
        "How many processes of that run still lived 3 s after CANCELLED. The line above does not wait for them.",
        show="{:g}".format,
    ),
    "idle pss": Row(
        "idle memory, PSS",
        "MB",
        "idle pss",
        "Of all its processes, nothing being due, after a first run. What several processes map counts by its share, and "
        "here the server and the other contenders map much of the same.",
    ),
    "idle alone": Row(
        "idle memory, alone",
        "MB",
        "idle alone",
        "The same as it would be with nobody else on the machine: its own pages, and every file's pages once.",
    ),
    "idle cpu": Row(
        "idle CPU", "s a minute", "idle cpu", "Of all its processes, nothing having been due for half a minute."
    ),
    "cpu own": Row(
        "own CPU a run",
        "ms",
        "cpu own",
        "Of the processes that are there when nothing runs, during the no-op runs at limit 4.",
        factor=1000,
    ),
    "cpu all": Row("all CPU a run", "s", "cpu all", "The same with the processes of the runs."),
    "version": Row("`version`", "s", "version", "How long the command `version` takes, its files being in memory."),
}

PROGRAMS = {
    "worker": (f"prefect {VERSION}", "worker"),
    "agent": (f"prefect {VERSION_2}", "agent"),
    "onefile": ("flow-agent, one file", "worker"),
    "onedir": ("flow-agent, folder", "worker"),
}


class Aim(NamedTuple):
    """What was promised: a ratio to the worker's figure, or with `ratio` false the figure itself."""

    row: str
    who: str
    bound: float
    ratio: bool = True


AIMS = [
    Aim("create", "warm", 1 / 15),
    Aim("create", "cold", 1 / 6),
    Aim("throughput 4", "warm", 8),
    Aim("throughput 4", "cold", 2),
    Aim("cancel", "warm", 1 / 4),
    Aim("cancel", "cold", 1 / 4),
    Aim("late 95", "warm", 0.2, ratio=False),
    Aim("late 95", "cold", 0.2, ratio=False),
    Aim("idle pss", "cold", 0.45),
    Aim("idle alone", "cold", 0.45),
    Aim("idle cpu", "cold", 0.1, ratio=False),
]


def figure(figures: Figures, row: str, who: str) -> float | None:
    """The median (or what the row says) of those samples; None when there are none."""
    values = figures.samples.get(ROWS[row].of, {}).get(who)
    return ROWS[row].figure(values) * ROWS[row].factor if values else None


def ratio(figures: Figures, row: str, who: str, reference: str) -> float | None:
    """The contender's figure by the reference's; None when one is missing, below 0 (who is early is not so many times less
    late), or the reference's is 0."""
    own, other = figure(figures, row, who), figure(figures, row, reference)
    return own / other if own is not None and own >= 0 and other is not None and other > 0 else None


def gain(figures: Figures, row: str, contender: Contender) -> float | None:
    """How many times better than its reference."""
    found = ratio(figures, row, contender.key, contender.reference)
    if not found:
        return None
    return found if ROWS[row].more_is_better else 1 / found


def save(figures: Figures) -> None:
    """Writes docs/benchmarks.json, with all samples of a contender in one line."""
    text = json.dumps(figures._asdict(), indent=1, ensure_ascii=False)
    numbers = re.compile(r"\[([-\d.,e\s]+)\]")
    DATA.write_text(numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def load() -> Figures:
    found = json.loads(DATA.read_text())
    return Figures(found["machine"], found["samples"], tuple(found["failures"]))
