"""Idle memory of flow-agent beside the real Prefect worker, in the same session, as a ratio.

    make bench        or        .venv/bin/python -m benchmarks.idle_memory [ROUNDS]

Starts one real Prefect 3.8 server, then in each round both agents on the same empty pool, lets them poll for a while, and
reads the proportional set size (PSS) of each with all its children from /proc/PID/smaps_rollup. PSS counts a page that
several processes share by its share, so it is what the machine would get back.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.servers import Api, PrefectServer, clean_environ

VERSION = "3.8.8"
SETTLE_SECONDS = 25.0  # two polls of the worker at its default interval


def pss_megabytes(pid: int) -> float:
    """PSS of the process and its descendants, in MB."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    total = 0
    for process in family:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def idle_megabytes(*commands: tuple[list[str], dict[str, str]]) -> list[float]:
    """PSS of each command, with its environment, when all have run side by side for a while."""
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command, env in commands
    ]
    try:
        time.sleep(SETTLE_SECONDS)
        for process, (command, _) in zip(running, commands, strict=True):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended at once with {process.returncode}")
        return [pss_megabytes(process.pid) for process in running]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(30)


def agent_command(program: list[str], server: PrefectServer, pool: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """An agent on that pool, with its environment."""
    settings = {"FLOW_AGENT_AGENT_STATE_DIR": str(home / "state"), "FLOW_AGENT_FLOWS_PYTHON": str(server.python)}
    return [*program, "start", "--pool", pool, "--api", server.url], clean_environ(**settings)


def measure(server: PrefectServer, pool: str, home: Path) -> tuple[float, float]:
    """One round: (flow-agent, prefect worker) in MB, both idle on the same pool."""
    cli = "from prefect.cli import app; app()"
    theirs = [str(server.python), "-c", cli, "worker", "start", "--pool", pool, "--type", "process"]
    settings = clean_environ(PREFECT_API_URL=server.url, PREFECT_HOME=str(home / "prefect"))
    ours = agent_command([sys.executable, "-m", "supervisor"], server, pool, home)
    agent, worker = idle_megabytes(ours, (theirs, settings))
    return agent, worker


def main(rounds: int) -> None:
    server = PrefectServer(VERSION).start()
    try:
        api = Api(server)
        pool = api.create_pool()
        api.close()
        found = []
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as home:
                found.append(measure(server, pool, Path(home)))
            print(
                f"round {number + 1}: flow-agent {found[-1][0]:.1f} MB, prefect worker {found[-1][1]:.1f} MB",
                flush=True,
            )
    finally:
        server.stop()
    ratio = statistics.median(agent / worker for agent, worker in found)
    print(f"\nidle PSS, median of {rounds} on {os.cpu_count()} cores, prefect {VERSION}")
    print(f"  flow-agent      {statistics.median(agent for agent, _ in found):6.1f} MB")
    print(f"  prefect worker  {statistics.median(worker for _, worker in found):6.1f} MB")
    print(f"  ratio           {ratio:6.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
