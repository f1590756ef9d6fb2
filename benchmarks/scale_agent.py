"""A real agent that takes down figures of itself while it works, for `benchmarks.scale`.

    python -m benchmarks.scale_agent FIGURES python -m supervisor start --config agent.toml

Does what the command behind FIGURES would do. One JSON line a second goes to FIGURES: how late the event loop woke a task that
only sleeps, how many requests were sent and what for, tasks, threads and descriptors; and for each run, how much of the time
from its claim to its start was the agent's own, and how much CPU it took.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from supervisor import app
from supervisor.backend.http import HttpApi
from supervisor.cli import main
from supervisor.runs import launcher, run

PERIOD = 0.05  # seconds between two looks at the loop: often enough to be hit by what blocks it, too seldom to cost
FLUSH_SECONDS = 1.0

KINDS = {
    "/get_scheduled_flow_runs": "due",
    "/get_runs": "due",
    "/flow_runs/filter": "cancelling",
    "/set_state": "states",
}


class OwnTime:
    """How long the agent itself has been at work, were it alone with instant answers.

    While no request is under way every second counts, waiting for the disk included; while one is, only the CPU that we
    used meanwhile. What runs beside a single run counts as that run's, so runs are to be measured one at a time.
    """

    def __init__(self) -> None:
        self._flights = 0
        self._total = 0.0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def now(self) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        self._total += cpu - self._cpu if self._flights else wall - self._wall
        self._wall, self._cpu = wall, cpu
        return self._total

    def flight(self, number: int) -> None:
        """A request has left (1) or come back (-1)."""
        self.now()
        self._flights += number


class Figures:
    """Owns the file, and what has been seen since its last line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._late: list[float] = []
        self._starts: list[tuple[float, float]] = []
        self._claimed: dict[str, tuple[float, float]] = {}
        self.requests: Counter[str] = Counter()
        self.own = OwnTime()

    async def watch(self) -> None:
        """Until the agent ends."""
        flush_at = trio.current_time() + FLUSH_SECONDS
        while True:
            due = trio.current_time() + PERIOD
            await trio.sleep_until(due)
            now = trio.current_time()
            self._late.append(now - due)
            if now >= flush_at:
                self._flush()
                flush_at = now + FLUSH_SECONDS

    def claimed(self, run_id: str) -> None:
        self._claimed[run_id] = self.own.now(), time.process_time()

    def started(self, run_id: str) -> None:
        since = self._claimed.pop(run_id, None)
        if since is not None:  # not on a second start
            self._starts.append((self.own.now() - since[0], time.process_time() - since[1]))

    def _flush(self) -> None:
        line = {
            "at": time.monotonic(),
            "late": self._late,
            "starts": self._starts,
            "requests": self.requests,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "threads": threading.active_count(),
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._late, self._starts = [], []


def instrument(figures: Figures) -> None:
    """Has the rooms of the agent that is about to start in this process tell the figures what they do."""

    def wrapped(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        setattr(owner, name, around(getattr(owner, name)))

    def agent(original: Any) -> Any:
        async def begin(*args: Any, **kwargs: Any) -> Any:
            trio.lowlevel.spawn_system_task(figures.watch)
            return await original(*args, **kwargs)

        return begin

    def send(original: Any) -> Any:
        async def counted(self: HttpApi, method: str, path: str, *rest: Any) -> Any:
            kind = next((kind for end, kind in KINDS.items() if path.endswith(end)), "other")
            figures.requests[kind] += 1
            figures.own.flight(1)
            try:
                return await original(self, method, path, *rest)
            finally:
                figures.own.flight(-1)

        return counted

    def claim(original: Any) -> Any:
        async def claimed(backend: Any, offer: Any, *args: Any, **kwargs: Any) -> Any:
            settled = await original(backend, offer, *args, **kwargs)
            figures.claimed(offer.id)
            return settled

        return claimed

    def launch(original: Any) -> Any:
        async def launched(self: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
            child = await original(self, run, *args, **kwargs)
            figures.started(run.id)
            return child

        return launched

    wrapped(app, "_agent", agent)
    wrapped(HttpApi, "_send", send)
    wrapped(run, "claim", claim)
    wrapped(launcher.Launcher, "launch", launch)


if __name__ == "__main__":
    instrument(Figures(Path(sys.argv[1])))
    sys.argv[1:] = sys.argv[sys.argv.index("start") :]
    main()
