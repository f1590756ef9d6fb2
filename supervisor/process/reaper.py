"""What becomes of processes whose parent has ended before them: they are ours to bury.

As child subreaper (or as process 1 of a container) the agent becomes the parent of every orphan among its descendants.
It never asked for them, so nobody waits for them; without this they would stay as zombies until the agent ends.
Whose they are is told by session, mark, brand and group (`supervisor.process.members`), not by their new parent.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import trio

from supervisor.lifecycle import ProcessRef
from supervisor.process.ref import identify, read_stat, same

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two looks
_PR_SET_CHILD_SUBREAPER = 36


class _Expected:
    """The children whose status somebody is going to fetch; owner of that set.

    Nobody tells when a status has been fetched. To look through the set at every start would make each cost as much as there
    are live runs, so that is done when it has doubled.
    """

    _FEW = 64

    def __init__(self) -> None:
        self._refs: set[ProcessRef] = set()
        self._enough = self._FEW

    def __contains__(self, ref: ProcessRef) -> bool:
        return ref in self._refs

    def __len__(self) -> int:
        return len(self._refs)

    def add(self, ref: ProcessRef) -> None:
        if len(self._refs) >= self._enough:
            self._refs = {old for old in self._refs if same(old) is not None}
            self._enough = max(self._FEW, 2 * len(self._refs))
        self._refs.add(ref)


# A process has one set of children, so there is one of these.
_expected = _Expected()


def become_subreaper() -> bool:
    """Make orphaned descendants our children instead of process 1's, from now until we end. False where that cannot be.

    To be called once, before any process is started; it is not inherited by our children.
    """
    try:
        done = bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        done = False
    if not done:
        log.warning("cannot become a subreaper; processes that a run leaves behind may be harder to find")
    return done


def expect(ref: ProcessRef) -> None:
    """Somebody will wait for this child of ours: its status is not to be thrown away."""
    _expected.add(ref)


async def reap_strangers() -> None:
    """For ever: bury orphans that have come to us and ended, within some twenty seconds.

    Only such as nobody waits for, one by one and never "any child": a status that trio or subprocess is about to fetch
    cannot be given back. A child that did not pass through `launch` is waited for by whoever started it, at once; so it
    is a stranger's when it is still a zombie at the next look.
    """
    known: frozenset[ProcessRef] = frozenset()
    while True:
        await trio.sleep(EVERY)
        known = await trio.to_thread.run_sync(reap, known)


def reap(known: Collection[ProcessRef] = ()) -> frozenset[ProcessRef]:
    """One look: bury the ended strangers that are already `known`, and return those that are new."""
    new = set()
    for pid in _children():
        stat = read_stat(pid)
        if stat is None or stat.living or stat.parent != os.getpid():
            continue
        ref = identify(pid)
        if ref is None or ref in _expected:
            continue
        if ref not in known:
            new.add(ref)
            continue
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    return frozenset(new)


def _children() -> list[int]:
    """Our children's pids, from the lists that the kernel keeps for each of our threads."""
    found: list[int] = []
    with suppress(OSError):  # no descriptor is left for a look
        for task in list(Path("/proc/self/task").iterdir()):
            with suppress(OSError):  # the thread has ended
                found += map(int, (task / "children").read_text().split())
    return found
