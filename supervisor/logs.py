"""EARS: the file that a run's processes write their output to.

Children never write into a pipe of ours: an agent that dies must not break a flow's next `print` (docs/architecture.md).
"""

from __future__ import annotations

from pathlib import Path

TAIL_LINES = 30
TAIL_BYTES = 8192


def output_file(log_dir: Path, run_id: str) -> Path:
    """Where the output of that run goes. The folder is made when it is missing."""
    log_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    return log_dir / f"{run_id}.log"


def last_lines(path: Path, *, lines: int = TAIL_LINES, most_bytes: int = TAIL_BYTES) -> list[str]:
    """The end of a run's output, decoded leniently; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most_bytes))
            tail = file.read(most_bytes)
    except OSError:
        return []
    found = tail.decode("utf-8", "replace").splitlines()
    if size > most_bytes and len(found) > 1:
        del found[0]  # most likely only the end of a line
    return [line.rstrip() for line in found[-lines:]]
