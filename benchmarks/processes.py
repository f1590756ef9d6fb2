"""What a process and its descendants cost, read from /proc: memory and CPU time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

_GONE = (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError)


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended and nobody has asked how."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def lives(process: psutil.Process) -> bool:
    """Whether it is still there, as that very process, and no zombie."""
    return process.is_running() and not is_zombie(process)


def pss_megabytes(pid: int) -> float:
    """PSS of the process and its descendants, in MB: a page that several processes share counts by its share."""
    return sum(_rollup(process.pid, "Pss") for process in family(pid)) / 1024


def alone_megabytes(pid: int) -> float:
    """What the process and its descendants would take if nobody else on the machine mapped the same files, in MB.

    Their own pages by their share, and of each file the pages that are in memory, once.
    """
    own = 0
    files: dict[tuple[str, ...], int] = {}
    for process in family(pid):
        own += _rollup(process.pid, "Pss_Anon")
        for mapping, kilobytes in _file_pages(process.pid):
            files[mapping] = max(files.get(mapping, 0), kilobytes)
    return (own + sum(files.values())) / 1024


def _rollup(pid: int, field: str) -> int:
    """That field of /proc/PID/smaps_rollup in kB; 0 for a process that has gone."""
    with contextlib.suppress(*_GONE):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0


def _file_pages(pid: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """For each part of a file that is mapped: (offset, device, inode), and how many kB of it are in memory."""
    mapping: tuple[str, ...] = ()
    resident = 0
    with contextlib.suppress(*_GONE):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                mapping = tuple(words[2:5])
            elif words[0] == "Rss:":
                resident = int(words[1])
            elif words[0] == "Anonymous:" and mapping[-1] != "0":  # pages that were written to are the process's own
                yield mapping, resident - int(words[1])


class Cpu:
    """The CPU time that processes have used so far, all threads."""

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        self._own: dict[psutil.Process, float] = {}
        self._reaped = 0.0
        for process in processes:
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                # clock_getcpuclockid(3), which Python has not: nanoseconds, where /proc has clock ticks
                self._own[process] = time.clock_gettime((~process.pid << 3) | 2)
                times = process.cpu_times()
                self._reaped += times.children_user + times.children_system

    def own_since(self, before: Cpu) -> float:
        """Seconds used since then by those of them that were there then and still are."""
        return sum(used - before._own[process] for process, used in self._own.items() if process in before._own)

    def all_since(self, before: Cpu) -> float:
        """The same with all of their descendants that have ended since, and been waited for."""
        return sum(self._own.values()) + self._reaped - sum(before._own.values()) - before._reaped


def processor() -> str:
    """The model of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine
