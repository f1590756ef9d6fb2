"""A run's mark that no process of it can lose by accident: it is born with it, whatever it does to its environment.

A resource limit is handed on by fork and by exec, and stays through setsid, a double fork and an emptied environment.
The kernel has ignored RLIMIT_LOCKS since 2.4, so its soft value is free to say whose a process is. Where the limit is
already narrower than our numbers (systemd's LimitLOCKS=, a sandbox) there is no brand, and the other ways must do.
"""

from __future__ import annotations

import hashlib
import re
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

_LOCKS = 10  # RLIMIT_LOCKS, on every architecture; Python has no name for it
_LINE = re.compile(r"^Max file locks\s+(\d+)", re.MULTILINE)
_LEAST = 1 << 58  # far above what anybody sets by hand

# The limit is the whole agent's while a child is born, so only one child at a time.
_birth = trio.Lock()


def brand(run_id: str) -> int:
    """The number that stands for the run; two runs have the same one once in 2**56."""
    return _LEAST + int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=7).digest(), "big")


def limit_for(run_id: str) -> tuple[int, int] | None:
    """What a process sets to brand itself: which limit, and its soft value. None when there is no run."""
    return (_LOCKS, brand(run_id)) if run_id else None


@asynccontextmanager
async def birth(run_id: str | None) -> AsyncIterator[None]:
    """Around the start of one process: it bears the run's brand, or none of ours when there is no run.

    Whatever starts a process of the agent's own beside this takes the lock too, or it may be born with a run's brand.
    """
    async with _birth:
        soft = _put_on(run_id) if run_id else None
        try:
            yield
        finally:
            if soft is not None:
                resource.prlimit(0, _LOCKS, (soft, resource.prlimit(0, _LOCKS)[1]))


def _put_on(run_id: str) -> int | None:
    """The limit that was there before; None when none could be set."""
    try:
        soft, hard = resource.prlimit(0, _LOCKS)
        resource.prlimit(0, _LOCKS, (brand(run_id), hard))
    except (OSError, ValueError):
        return None
    return soft


def brand_of(pid: int) -> int | None:
    """The brand that a process bears, if any; also of another user's process."""
    try:
        soft = resource.prlimit(pid, _LOCKS)[0]
    except PermissionError:
        soft = _read(pid)
    except OSError:
        return None  # gone
    return soft if soft >= _LEAST else None


def _read(pid: int) -> int:
    try:
        found = _LINE.search(Path(f"/proc/{pid}/limits").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0  # "unlimited"
