"""`make torture`: kills agents at every failpoint and at random moments, on real servers, and reports what that has cost.

    python -m tests.torture [--seed N] [--kills 200] [--minutes M] [--jobs 2] [--servers 3.8.8 2.20.26]

Every failpoint and each way a run can end, with runs that start cold and warm, that end while no agent is there and that outlive
it, and with agents of which the second dies there, too; the most telling of them with real engines; `--kills` kills at random
moments under a load of 20 short runs, shared by the servers; half as many harms to fork servers; ten kills in a row around
long runs. Exit status 1 when anything was lost, doubled or left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.killchecks import Tally
from tests.killsuite import (
    ENDS,
    Case,
    agent_sees_it_alive,
    failpoints_of,
    harm_fork_servers,
    kill_around_long_runs,
    kill_at,
    kill_at_random,
)
from tests.servers import Api, PrefectServer

TELLING = (
    "before go",
    "after spawn",
    "before journal Running",
    "before journal Stopping",
    "after others ended",
    "before report",
    "after report",
)
PROGRESS_SECONDS = 15.0

Task = Callable[[PrefectServer, Api], Tally]


def tasks_of(server: PrefectServer, seed: int, kills: int, enough: Callable[[], bool]) -> list[tuple[str, Task]]:
    """(part, task) of all that is done on that server."""
    major = server.major
    ways = [(outcome, warm) for outcome in ENDS for warm in (False, True)]
    cases = [
        Case(name, outcome, held=held, warm=warm)
        for outcome, warm in ways
        for name in failpoints_of(outcome, major, warm=warm)
        for held in ([False, True] if agent_sees_it_alive(name) and outcome != "is cancelled" else [False])
    ]
    cases += [
        Case(name, outcome, twice=True, warm=warm)
        for outcome, warm in ways
        for name in failpoints_of(outcome, major, warm=warm)
    ]
    real = [
        Case(name, outcome, real=True, warm=warm)
        for outcome, warm in ways
        for name in TELLING
        if name in failpoints_of(outcome, major, warm=warm)
    ]
    dice = random.Random(seed)
    harms = [dice.choice(("kill", "kill", "stop", "fail", "mend", "mend", "kill agent")) for _ in range(kills // 2)]
    return [
        *(("failpoints", lambda s, a, case=case: kill_at(case, s, a)) for case in cases),
        *(("real engines", lambda s, a, case=case: kill_at(case, s, a)) for case in real),
        *(
            ("long runs", lambda s, a, warm=warm: kill_around_long_runs(s, a, seed=seed, warm=warm))
            for warm in (False, True)
        ),
        *(
            (
                "random kills",
                lambda s, a, warm=warm: kill_at_random(seed, kills // 2, s, a, warm=warm, say=say, enough=enough),
            )
            for warm in (False, True)
        ),
        ("harm to fork servers", lambda s, a: harm_fork_servers(seed, harms, s, a, enough=enough)),
    ]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def torture(servers: Sequence[PrefectServer], *, seed: int, kills: int, minutes: float | None, jobs: int) -> Tally:
    """All parts on all servers. After `minutes` nothing more is begun, which the report tells."""
    begun, interrupted = time.monotonic(), threading.Event()
    total, parts, left_out = Tally(), dict[str, Tally](), 0

    def enough() -> bool:
        return interrupted.is_set() or (minutes is not None and time.monotonic() - begun > minutes * 60)

    share = kills // len(servers)
    work = [(server, part, task) for server in servers for part, task in tasks_of(server, seed, share, enough)]
    work.sort(key=lambda item: item[1] != "random kills")  # the longest first: the others fill the time beside it

    def one(item: tuple[PrefectServer, str, Task]) -> tuple[str, Tally] | None:
        server, part, task = item
        if enough():
            return None
        api = Api(server)
        try:
            return f"{server.version} {part}", task(server, api)
        finally:
            api.close()

    said = begun
    with ThreadPoolExecutor(jobs) as pool:
        signal.signal(signal.SIGINT, lambda *_: interrupted.set())  # what has been begun is brought to its end
        for done, finished in enumerate(as_completed([pool.submit(one, item) for item in work]), 1):
            if (result := finished.result()) is None:
                left_out += 1
                continue
            part, tally = result
            parts.setdefault(part, Tally()).add(tally)
            total.add(tally)
            for finding in tally.findings:
                say(str(finding))
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                say(f"{done} of {len(work)} done: {total}")
    _report(parts, total, f"seed {seed}, {time.monotonic() - begun:.0f} s, left out {left_out} of {len(work)}")
    return total


def _report(parts: Mapping[str, Tally], total: Tally, head: str) -> None:
    print(f"\n{head}")
    for part, tally in sorted(parts.items()):
        print(f"  {part}: {tally}")
    print(f"all: {total}")
    for finding in total.findings:
        print(f"  {finding.kind}: {finding.where}: {finding.what}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=200, help="at random moments, shared by the servers")
    parser.add_argument("--minutes", type=float, help="begin nothing more after that")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="how many agents at once")
    parser.add_argument("--servers", nargs="+", default=["3.8.8", "2.20.26"], metavar="VERSION")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="torture-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(home)
    servers: list[PrefectServer] = []
    try:
        say(f"seed {options.seed}")
        for version in options.servers:
            servers.append(PrefectServer(version).start())
        total = torture(servers, seed=options.seed, kills=options.kills, minutes=options.minutes, jobs=options.jobs)
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(home, ignore_errors=True)
    return 1 if total.findings else 0


if __name__ == "__main__":
    sys.exit(main())
