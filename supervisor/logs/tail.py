"""The end of an output file, for people."""

from __future__ import annotations

import os
from pathlib import Path

from supervisor.logs.space import next_data, next_hole, opened
from supervisor.logs.text import harmless

TAIL_LINES = 30
TAIL_BYTES = 8192


def last_lines(path: Path, *, lines: int = TAIL_LINES, most_bytes: int = TAIL_BYTES) -> list[str]:
    """The end of a run's output, decoded leniently and without control characters; empty when there is none."""
    try:
        with opened(path, os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            start = max(0, size - most_bytes)
            tail = os.pread(descriptor, most_bytes, start)
            # What was cut out of a live run's file is skipped. Asked after reading, as a hole may open at any time.
            begin = start
            while (hole := next_hole(descriptor, begin, size)) < size:
                begin = next_data(descriptor, hole, size)
    except OSError:
        return []
    found = tail[begin - start :].split(b"\n")
    if begin > 0 and len(found) > 1:
        del found[0]  # most likely only the end of a line
    if found and not found[-1]:
        del found[-1]
    return [harmless(line).rstrip() for line in found[-lines:]]
