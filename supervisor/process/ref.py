"""Identity of a process: pid + kernel start time + boot. A bare pid names whoever holds the number by now."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import msgspec

from supervisor.lifecycle import ProcessRef

_MUCH = 131072  # bytes: more than most environments


class Stat(msgspec.Struct, frozen=True):
    """What `/proc/PID/stat` says of a process: the parts that tell us whose it is and whether it lives."""

    pid: int
    state: str  # one letter: R, S, D, T, Z, …
    parent: int
    group: int
    session: int
    threads: int
    start_ticks: int

    @property
    def living(self) -> bool:
        """False for a zombie: all that is left is an exit status nobody has fetched.

        A process whose main thread has ended while others work on also shows as Z, but with more than one thread.
        """
        return self.state not in "ZXx" or self.threads > 1


def read_proc(pid: int, name: str) -> bytes:
    """The whole of `/proc/PID/name`. Raises `OSError`.

    Without the layers of `open`: they cost ten times as much as the reading, and one look at all of /proc reads thousands.
    """
    descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = b""
        while part := os.read(descriptor, _MUCH):
            whole += part
    finally:
        os.close(descriptor)
    return whole


def read_stat(pid: int) -> Stat | None:
    """The process with that number now, zombies included; None when there is none, or /proc hides it from us (hidepid)."""
    try:
        raw = read_proc(pid, "stat")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name stands in parentheses and may itself hold blanks and parentheses: the last one counts.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return Stat(
        pid=pid,
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


@functools.cache
def boot_id() -> str:
    """The kernel's name for this boot; empty where a sandbox hides it (then pid and start time must do)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def identify(pid: int) -> ProcessRef | None:
    """The lasting identity of the process that has this pid now (a zombie has one too); None when there is none."""
    stat = read_stat(pid)
    return None if stat is None else ProcessRef(pid=pid, start_ticks=stat.start_ticks, boot_id=boot_id())


def alive(ref: ProcessRef) -> bool:
    """Whether that very process still runs. A zombie does not."""
    stat = same(ref)
    return stat is not None and stat.living


def same(ref: ProcessRef) -> Stat | None:
    """What `/proc` says of that very process, zombies included; None when it is gone or the number is another's."""
    if ref.boot_id != boot_id():
        return None
    stat = read_stat(ref.pid)
    return stat if stat is not None and stat.start_ticks == ref.start_ticks else None
