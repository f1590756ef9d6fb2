"""flow-agent beside what it replaces, in one session, as ratios.

    make bench        or        .venv/bin/python -m benchmarks [--rounds N]

Writes docs/benchmarks.json (every sample), docs/benchmarks.md, docs/benchmarks.svg and the figures in README.md. With only a
part of the measures or contenders it prints them and writes nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from typing import TypeVar

from benchmarks import figures, report, session
from benchmarks.contenders import CONTENDERS
from benchmarks.measures import MEASURES

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--only", metavar="MEASURE,…", help=", ".join(MEASURES))
    parser.add_argument("--contenders", metavar="WHO,…", help=", ".join(CONTENDERS))
    parser.add_argument("--no-write", action="store_true", help="print the tables, and write no file")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: write the pages from docs/benchmarks.json"
    )
    asked = parser.parse_args()
    if asked.render:
        report.write(figures.load())
        return 0
    measures = _chosen(parser, asked.only, MEASURES)
    contenders = _chosen(parser, asked.contenders, CONTENDERS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        results = session.run(asked.rounds, measures, contenders)
    except KeyboardInterrupt:
        print("given up; nothing was written", file=sys.stderr)
        return 130
    found = figures.Figures(results.machine, results.samples, tuple(results.failures))
    print("\n" + report.tables(found))
    print(report.aims(found))
    whole = len(measures) == len(MEASURES) and len(contenders) == len(CONTENDERS)
    if whole and not asked.no_write:
        figures.save(found)
        report.write(found)
    else:
        print("nothing was written: " + ("--no-write" if whole else "only a part was measured"))
    return 0


def _chosen(parser: argparse.ArgumentParser, names: str | None, known: Mapping[str, T]) -> list[T]:
    wanted = set(names.split(",") if names else known)
    if unknown := wanted - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    return [known[name] for name in known if name in wanted]  # in their order: an ad-hoc run comes after an idle time


if __name__ == "__main__":
    sys.exit(main())
