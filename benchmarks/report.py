"""The page, the chart and the README's part, all made from the figures and from nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import chart
from benchmarks.contenders import CONTENDERS, VERSION
from benchmarks.figures import AIMS, PROGRAMS, ROWS, Figures, digits, figure, gain, ratio

TOP = Path(__file__).parents[1]
PAGE, CHART, README = (TOP / name for name in ("docs/benchmarks.md", "docs/benchmarks.svg", "README.md"))
_MARKED = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
MISSING = "-"


def tables(figures: Figures) -> str:
    """A table for each server, and one of the commands."""
    parts = []
    for version in dict.fromkeys(contender.server for contender in CONTENDERS.values()):
        members = [contender for contender in CONTENDERS.values() if contender.server == version]
        columns = [(member.key, member.title, member.reference) for member in members]
        parts.append(_table(f"On a Prefect {version} server", figures, columns, set(ROWS) - {"version"}))
    columns = [(key, title, reference) for key, (title, reference) in PROGRAMS.items()]
    parts.append(_table("The command", figures, columns, {"version"}))
    return "\n".join(filter(None, parts))


def _table(title: str, figures: Figures, columns: list[tuple[str, str, str]], rows: set[str]) -> str:
    """Of (key, title, reference) columns; empty when nothing of it was measured."""
    heads = [""]
    for key, who, reference in columns:
        heads += [who] if key == reference else [who, "ratio"]
    lines = []
    for name in (name for name in ROWS if name in rows):
        cells = [", ".join(filter(None, [ROWS[name].title, ROWS[name].unit]))]
        for key, _, reference in columns:
            cells.append(_cell(figures, name, key))
            if key != reference:
                found = ratio(figures, name, key, reference)
                cells.append(MISSING if found is None else f"**{digits(found)}**")
        if any(cell != MISSING for cell in cells[1:]):
            lines.append(f"| {' | '.join(cells)} |")
    head = [f"### {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*head, *lines]) + "\n" if lines else ""


def _cell(figures: Figures, row: str, who: str) -> str:
    found = figure(figures, row, who)
    if found is None:
        return MISSING
    values, show = [value * ROWS[row].factor for value in figures.samples[ROWS[row].of][who]], ROWS[row].show
    spread = f"{show(min(values))} to {show(max(values))}, " if len(values) > 1 else ""
    return f"{show(found)} ({spread}n {len(values)})"


def aims(figures: Figures) -> str:
    """One sentence for each aim: the figure, the bound, and whether it was reached."""
    lines = []
    for aim in AIMS:
        row, contender = ROWS[aim.row], CONTENDERS[aim.who]
        found = (
            ratio(figures, aim.row, aim.who, contender.reference) if aim.ratio else figure(figures, aim.row, aim.who)
        )
        if found is None:
            verdict = "**not measured**"
        else:
            reached = found >= aim.bound if row.more_is_better else found <= aim.bound
            said = digits(found, 3) + ("" if aim.ratio else f" {row.unit}")
            verdict = f"found {said}: **{'reached' if reached else 'not reached'}**"
        unit = " times the worker's" if aim.ratio else f" {row.unit}"
        wanted = f"{'at least' if row.more_is_better else 'at most'} {digits(aim.bound)}{unit}"
        lines.append(f"- {contender.title}, {row.title}: wanted {wanted}; {verdict}")
    return "\n".join(lines) + "\n"


CHARTED = ["create", "throughput 1", "throughput 4", "throughput 16", "cancel", "idle alone", "cpu all"]


def panels(figures: Figures) -> list[chart.Panel]:
    """What the chart shows: one panel for each reference."""
    found = []
    for reference in (contender for contender in CONTENDERS.values() if contender.start is None):
        ours = [other for other in CONTENDERS.values() if other.reference == reference.key and other is not reference]
        bars = [(ROWS[row].title, [gain(figures, row, contender) for contender in ours]) for row in CHARTED]
        title = f"How many times better than {reference.title}, Prefect {reference.server}"
        found.append(chart.Panel(title, [contender.title for contender in ours], bars))
    return found


def page(figures: Figures) -> str:
    """docs/benchmarks.md."""
    told = figures.machine
    where = f"{told['cores']} cores ({told['processor']}), {told['system']}, Python {told['python']}"
    what = f"flow-agent {told['flow-agent']} (commit {told['commit']})"
    failures = "".join(f"- {failure}\n" for failure in figures.failures)
    meanings = "".join(f"| {row.title} | {row.meaning} |\n" for row in ROWS.values())
    return f"""# Benchmarks

flow-agent beside what it replaces, in one session on one machine. This page and its chart are written by

```console
$ make bench
```

from the samples in [benchmarks.json](benchmarks.json), not by hand. It needs what `make test` needs, and a machine that does
nothing else meanwhile, for {told["minutes"]:.0f} minutes in this case; `make bench ROUNDS=1` is shorter.

![How many times better than Prefect's own](benchmarks.svg)

Measured on {told["date"]}: {where}; {what}.
Number of rounds: {told["rounds"]}. Load before it began: {told["load before"]}.

{tables(figures)}
A cell has the median, in brackets the smallest and the largest value and how many there are. A ratio is flow-agent's figure by
that of the worker or agent in the same table: less than 1 is better, and for runs a minute, more than 1. Lateness below 0 is that
of a run which was RUNNING before it was due.

## Aims

{aims(figures)}{f"{chr(10)}## What could not be measured{chr(10) * 2}{failures}" if failures else ""}
## How it is measured

Each contender is started as its documentation says; only server, place of work and limit are set (4, where no other is named).
So each asks for work as often as it does by default: the worker every 10 s, the 2.20 agent every 15 s and for cancelled runs
every 30 s, flow-agent every 5 s, and on 3.x when the server says so. flow-agent runs from its source; "warm" has
`start = "warm"` in `[flows]`.

All contenders of one server are up side by side, each with a pool or queue of its own, and take turns: while one is measured the
others are idle. Before that, each executes a run. Each round has a new server (SQLite, on the same machine), and another
contender begins. A slow contender is given fewer runs than a quick one, and what takes long is not measured in each round:
`benchmarks/measures.py` says how many and how often. Times are the server's own; processes are looked at every 10 ms.

| row | what it says |
|---|---|
{meanings}
To measure a part of it and write nothing: `python -m benchmarks --only create --contenders worker,warm --rounds 2`. What 500 live
runs cost the agent, and what 2,000 leave behind in it, is measured by `make scale`.
"""


def readme(figures: Figures) -> str:
    """What stands between the marks in README.md."""
    lines = ["| | prefect worker | flow-agent | flow-agent, warm |", "|---|---|---|---|"]
    for row in ("create", "throughput 4", "cancel", "late 95", "idle alone"):
        cells = []
        for who in ("worker", "cold", "warm"):
            found = figure(figures, row, who)
            cells.append(MISSING if found is None else digits(found))
            better = gain(figures, row, CONTENDERS[who])
            if who != "worker" and better:
                cells[-1] += f" ({digits(better)} times)"
        lines.append(f"| {', '.join([ROWS[row].title, ROWS[row].unit])} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    where = f"{figures.machine['cores']} cores, a Prefect {VERSION} server"
    return f"""![How many times better than Prefect's own](docs/benchmarks.svg)

{table}

Medians (p95: what 95 % of the runs keep) on {where}; in brackets, how many times better. `make bench`
measures all of it anew, and Prefect 2.20 as well: [docs/benchmarks.md](docs/benchmarks.md).
"""


def with_figures(text: str, figures: Figures) -> str:
    """README.md with what stands between its marks made anew."""
    new, count = _MARKED.subn(lambda _: readme(figures), text)
    if count != 1:
        raise ValueError("cannot write the figures: README.md has no <!-- bench --> … <!-- /bench -->")
    return new


def chart_of(figures: Figures) -> str:
    """docs/benchmarks.svg."""
    return chart.draw(panels(figures))


def write(figures: Figures) -> None:
    """The page, the chart and the README's part."""
    PAGE.write_text(page(figures))
    CHART.write_text(chart_of(figures))
    README.write_text(with_figures(README.read_text(), figures))
