"""The packed binary in figures: size, time to start, memory while idle, oldest glibc.

    .venv/bin/python -m benchmarks.binary [ROUNDS]

Builds what `make binary` builds. Start is the median time of `flow-agent version` with the file in memory; idle is the
proportional set size (PSS) of all processes of an agent that polls an empty pool of a real Prefect server.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from benchmarks.contenders import VERSION
from benchmarks.measures import IDLE_SECONDS, start_seconds
from benchmarks.processes import pss_megabytes
from benchmarks.session import own_folder
from tests.binaries import FORMS, binary, dist, packed_agent, recipe
from tests.servers import Api, PrefectServer


def size_megabytes(path: Path) -> float:
    """Of the one file, or of all files of the folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink()) / 1e6


def idle(program: Path, server: PrefectServer, pool: str) -> float:
    """PSS in MB of the agent and its start program after it has polled for a while."""
    agent = packed_agent(
        program, {"api": {"url": server.url}, "flows": {"python": server.python}, "work": [{"pool": pool}]}
    )
    try:
        agent.start()
        time.sleep(IDLE_SECONDS)
        return pss_megabytes(agent.pid)
    finally:
        agent.close()


def main(rounds: int) -> None:
    server = PrefectServer(VERSION).start()
    try:
        api = Api(server)
        pool = api.create_pool()
        api.close()
        print(f"{'':10} {'size':>9} {'start':>8} {'fastest':>8} {'idle PSS':>10} {'glibc':>6}")
        for form, name in FORMS.items():
            program = binary(form)
            path = dist() / Path(name).parts[0]
            starts = start_seconds(program, rounds)
            floor = ".".join(map(str, recipe().glibc.floor(path)))
            print(
                f"{form:10} {size_megabytes(path):6.1f} MB {statistics.median(starts):6.3f} s {min(starts):6.3f} s "
                f"{idle(program, server, pool):7.1f} MB {floor:>6}",
                flush=True,
            )
    finally:
        server.stop()


if __name__ == "__main__":
    with own_folder():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
