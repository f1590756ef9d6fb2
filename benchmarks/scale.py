"""What one agent costs when nothing happens, with 500 live runs, and after 2,000.

    .venv/bin/python -m benchmarks.scale [RUNS] [SLEEPERS]

Starts one real Prefect 3.8 server on SQLite and real agents with real processes, and prints what was found beside what was asked
for. No engine takes part, for its start would be all that is seen: a sleeper is `sleep`, and a no-op run a shell that tells the
server COMPLETED and ends. Memory is the agent's own process: PSS while idle, and where it is to grow or not to grow, what is the
process's alone (USS). CPU is the agent's without its runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contenders import VERSION
from benchmarks.processes import Cpu, pss_megabytes
from tests.agents import AgentProcess, config_for
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

RUNS = 2000
SLEEPERS = 500
ONE_BY_ONE = 20  # runs whose way from claim to start is measured, one at a time
BATCH = (
    50  # sleepers that are offered at once: a server on SQLite answers too late to those at the end of a longer line
)
SETTLE_SECONDS = 15.0
WATCH_SECONDS = 60.0
LIMIT = 16  # of the no-op runs at once
CALLERS = 3  # that create runs at once: more only wait for each other's locks
CREATE_SECONDS = 180.0  # how long a server that says 503 may be busy

# Plays an engine that has nothing to do, at the cost of a shell.
NOOP = """\
exec 3<>"/dev/tcp/127.0.0.1/$1"
body='{"state": {"type": "COMPLETED"}, "force": true}'
printf 'POST /api/flow_runs/%s/set_state HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n' \
    "$PREFECT__FLOW_RUN_ID" >&3
printf 'Content-Length: %d\\r\\nConnection: close\\r\\n\\r\\n%s' "${#body}" "$body" >&3
cat <&3 >/dev/null
"""


@dataclass
class Seen:
    """What an agent with figures has written of itself."""

    late: list[float] = field(default_factory=list)
    starts: list[tuple[float, float]] = field(default_factory=list)  # seconds of its own, and of CPU
    requests: Counter[str] = field(default_factory=Counter)
    tasks: int = 0
    threads: int = 0
    descriptors: int = 0


class MeasuredAgent(AgentProcess):
    """An agent that takes down figures of itself (`benchmarks.scale_agent`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.figures = self.home / "figures.jsonl"
        self.behind = [sys.executable, "-m", "benchmarks.scale_agent", str(self.figures)]

    def seen(self, since: float = 0.0) -> Seen:
        """What it saw from that moment (monotonic) until now."""
        seen, before = Seen(), Counter[str]()
        for text in self.figures.read_text().splitlines() if self.figures.exists() else []:
            line = json.loads(text)
            if line["at"] < since:
                before = Counter(line["requests"])
                continue
            seen.late += line["late"]
            seen.starts += line["starts"]
            seen.requests = Counter(line["requests"])
            seen.tasks, seen.threads, seen.descriptors = line["tasks"], line["threads"], line["descriptors"]
        seen.requests -= before
        return seen


def uss_kilobytes(pid: int) -> float:
    """Memory that is this process's alone."""
    return float(psutil.Process(pid).memory_full_info().uss) / 1024


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def show(what: str, found: str, asked: str = "") -> None:
    print(f"  {what:56} {found:>14}   {asked}", flush=True)


class Bench:
    """One server, and the pools and deployments that the parts share."""

    def __init__(self, server: PrefectServer, stack: ExitStack) -> None:
        self.server = server
        self.api = Api(server)
        self._stack = stack
        stack.callback(self.api.close)

    def pool(self, command: str) -> tuple[str, str]:
        """A pool, and a deployment in it whose runs are that command."""
        pool = self.api.create_pool()
        return pool, self.api.create_deployment("noop", pool=pool, job_variables={"command": command})

    def noop(self, home: Path) -> str:
        script = home / "noop.sh"
        script.write_text(NOOP)
        return f"bash {script} {self.server.port}"

    def create(self, pool: str, deployment: str, count: int) -> None:
        """So many runs that are due now, all offered at once: a server that is asked meanwhile refuses to make more."""
        self.api.patch(f"/work_pools/{pool}", {"is_paused": True})
        with ThreadPoolExecutor(CALLERS) as callers:
            list(callers.map(lambda _: self._create_one(deployment), range(count)))
        self.api.patch(f"/work_pools/{pool}", {"is_paused": False})

    def _create_one(self, deployment: str) -> None:
        deadline = time.monotonic() + CREATE_SECONDS
        while True:
            try:
                self.api.create_run(deployment)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def count(self, deployment: str, *states: str) -> int:
        found: int = self.api.post(
            "/flow_runs/count",
            {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": list(states)}}}},
        )
        return found

    @contextmanager
    def agent(self, pool: str, *, measured: bool, defaults: bool = False, **sections: Any) -> Iterator[MeasuredAgent]:
        """An agent that polls often, or has only `defaults`, with figures when it is `measured`.

        Killed in the end with all that it has started.
        """
        config = config_for(self.server, [{"pool": pool}], **sections)
        if defaults:
            config = {"api": config["api"], "flows": {"python": self.server.python}, "work": config["work"]}
        else:
            config["agent"] = {**config["agent"], "log_level": "info"}
            config["flows"] = {**config["flows"], "start": "cold"}  # nothing is started from a fork server here
        agent = MeasuredAgent(config)
        if not measured:
            agent.behind = []
        try:
            agent.start()
            yield agent
        finally:
            with contextlib.suppress(ProcessLookupError):
                agent.kill()
            agent.kill_runs()
            agent.close()
            shutil.rmtree(agent.home, ignore_errors=True)


def claim_to_exec(bench: Bench, home: Path) -> None:
    pool, deployment = bench.pool(bench.noop(home))
    with bench.agent(pool, measured=True) as agent:
        for _ in range(ONE_BY_ONE + 1):
            bench.api.wait_for_state(bench.api.create_run(deployment), "COMPLETED")
        wait_until(lambda: len(agent.seen().starts) > ONE_BY_ONE, 10, "the starts are written down")
        starts = agent.seen().starts[1:]  # the first loads modules
        own, cpu = ([start[part] * 1000 for start in starts] for part in (0, 1))
        print(f"\nClaim granted -> process started, one run at a time, {len(starts)} runs")
        show("all but waiting for the server, median", f"{percentile(own, 0.5):.1f} ms", "<= 30 ms")
        show("all but waiting for the server, slowest", f"{max(own):.1f} ms")
        show("CPU of it, median", f"{percentile(cpu, 0.5):.1f} ms")


def many_sleepers(bench: Bench, count: int) -> None:
    pool, deployment = bench.pool("sleep 3600")
    idle_pool = bench.api.create_pool()
    with (
        bench.agent(idle_pool, measured=False, defaults=True) as idle,
        bench.agent(pool, measured=True, defaults=True) as agent,
    ):
        bench.create(pool, deployment, 1)
        wait_until(lambda: len(agent.run_processes()) == 1, 60, "the first run lives")
        time.sleep(SETTLE_SECONDS)
        memory = uss_kilobytes(agent.pid)
        bench.create(pool, deployment, count)
        wait_until(
            lambda: len(agent.run_processes()) >= count + 1, 300, f"{count} runs live", every=1.0, more=agent.log
        )
        time.sleep(SETTLE_SECONDS)
        began = time.monotonic()
        processes = [psutil.Process(one.pid) for one in (agent, idle)]
        before = [Cpu([process]) for process in processes]
        time.sleep(WATCH_SECONDS)
        took = time.monotonic() - began
        used, idle_used = (Cpu([one]).own_since(then) for one, then in zip(processes, before, strict=True))
        seen = agent.seen(began)
        late = [seconds * 1000 for seconds in seen.late]
        polls = max(1, seen.requests["due"])
        print(f"\nIdle, with the default configuration, over {took:.0f} s")
        show("PSS", f"{pss_megabytes(idle.pid):.1f} MB", "<= 0.45 of the worker's (make bench)")
        show("CPU a minute", f"{idle_used / took * 60:.2f} s", "<= 0.1 s")
        print(f"\n{count} sleepers, over {took:.0f} s")
        grown = (uss_kilobytes(agent.pid) - memory) / count
        show("memory a run", f"{grown:.1f} KB", "<= 60 KB")
        show("CPU", f"{used / took:.1%}", "<= 5 % of a core")
        show("event loop late, median", f"{percentile(late, 0.5):.1f} ms")
        show("event loop late, p99", f"{percentile(late, 0.99):.1f} ms", "< 100 ms")
        show("event loop late, most", f"{max(late):.1f} ms")
        show(
            "requests a poll",
            f"{(polls + seen.requests['cancelling']) / polls:.2f}",
            "2: what is due, what is cancelled",
        )
        show("other requests a minute", f"{(seen.requests['other'] + seen.requests['states']) / took * 60:.0f}")
        show("tasks a run", f"{seen.tasks / count:.1f}")
        show("descriptors a run", f"{seen.descriptors / count:.1f}")


def many_runs(bench: Bench, home: Path, count: int) -> None:
    pool, deployment = bench.pool(bench.noop(home))
    print(f"\n{count} no-op runs through one agent, {LIMIT} at once; memory when all of them have ended")
    print(
        f"  {'runs':>6} {'s':>7} {'USS':>10} {'descriptors':>12} {'threads':>8} {'tasks':>6} {'CPU a run':>10} {'late p99':>9}"
    )
    with bench.agent(pool, measured=True, agent={"limit": LIMIT}) as agent:
        done, process = 0, psutil.Process(agent.pid)
        for part in [min(100, count), *range(500, count + 1, 500)]:
            began, before = time.monotonic(), Cpu([process])
            bench.create(pool, deployment, part - done)
            wait_until(
                lambda part=part: bench.count(deployment, "COMPLETED") >= part and not agent.run_processes(),
                300,
                f"{part} runs have ended",
                every=0.5,
                more=lambda: agent.log()[-3000:],
            )
            took, used = time.monotonic() - began, Cpu([process]).own_since(before)
            time.sleep(12.0)  # idle threads end after ten seconds, and connections before
            seen = agent.seen(began)
            print(
                f"  {part:6d} {took:7.1f} {uss_kilobytes(agent.pid) / 1024:7.1f} MB {seen.descriptors:12d} "
                f"{seen.threads:8d} {seen.tasks:6d} {used / (part - done) * 1000:7.1f} ms "
                f"{percentile(seen.late, 0.99) * 1000:6.1f} ms",
                flush=True,
            )
            done = part


def main(runs: int, sleepers: int) -> None:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    with ExitStack() as stack:
        server = PrefectServer(VERSION)
        stack.callback(server.stop)
        bench = Bench(server.start(), stack)
        print(f"{os.cpu_count()} cores, prefect {VERSION} on SQLite")
        claim_to_exec(bench, server.home)
        many_sleepers(bench, sleepers)
        many_runs(bench, server.home, runs)
    print(f"\nin {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else RUNS, int(sys.argv[2]) if len(sys.argv) > 2 else SLEEPERS)
