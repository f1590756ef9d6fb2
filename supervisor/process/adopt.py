"""Finds and holds processes that an earlier agent has started. They are not our children: how they end, nobody tells us.

A pid alone is never believed: who is held is known by pid, start time and boot.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from supervisor.lifecycle import Exit, ProcessRef
from supervisor.process.environ import MARK, STATE_MARK
from supervisor.process.members import ref_of
from supervisor.process.ref import Stat, alive, read_stat
from supervisor.process.stop import wait_gone

UNSEEN = Exit(note="ended unseen: flow-agent had been restarted while it ran")


class Adopted:
    """A living process that is not our child. It lives on when this object goes."""

    def __init__(self, ref: ProcessRef) -> None:
        self.ref = ref

    def __repr__(self) -> str:
        return f"<Adopted {self.ref.pid}>"

    async def wait(self) -> Exit:
        """Return as soon as it has ended; how, only its parent could know. Any number of tasks may wait or give up.

        The kernel wakes us; where it cannot (before 5.3, or no descriptor is left), we look often.
        """
        await wait_gone([self.ref], math.inf)
        return UNSEEN


def adopt(ref: ProcessRef) -> Adopted | None:
    """Hold that very process. None when it is gone: the number is another's, of another boot, or a zombie's."""
    return Adopted(ref) if alive(ref) else None


def find(run_id: str, *, engine: bool = False) -> ProcessRef | None:
    """The run's own process by its mark: the leader of a session, as we start them; of several the oldest.

    `engine`: it must have been started as Prefect's engine. None when there is none. Children that the run has left behind do
    not count, unless they lead sessions of their own and their parents are gone: then nothing tells them from a process
    that is no engine, nor copies of the engine from itself. Takes a few milliseconds.
    """
    found = [stat for stat, environ in _leaders() if environ.get(MARK) == run_id]
    if engine:
        found = [stat for stat in found if is_engine(ref_of(stat))]
    return ref_of(min(found, key=_age_order)) if found else None


def marked_runs(state_dir: Path) -> dict[str, ProcessRef]:
    """Run id → own process, of all runs whose agent had that state directory: for when the journal is lost.

    Processes of other users and of other containers are left out, for they are other agents' by any name.
    """
    ours = state_dir.resolve()
    oldest: dict[str, Stat] = {}
    for stat, environ in _leaders():
        run_id, theirs = environ.get(MARK), Path(environ.get(STATE_MARK, ""))
        if not run_id or not theirs.is_absolute() or theirs.resolve() != ours or not _at_home(stat.pid):
            continue
        oldest[run_id] = min(oldest.get(run_id, stat), stat, key=_age_order)
    return {run_id: ref_of(stat) for run_id, stat in oldest.items()}


def is_engine(ref: ProcessRef) -> bool:
    """Whether that living process was started as Prefect's engine, or is a copy of one."""
    try:
        words = Path(f"/proc/{ref.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"prefect.engine" in words and alive(ref)


def age_seconds(ref: ProcessRef) -> float:
    """How long ago a process of this boot was started, whoever started it; times in which the machine slept count."""
    started = ref.start_ticks / os.sysconf("SC_CLK_TCK")  # proc(5): since boot
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def _leaders() -> Iterator[tuple[Stat, dict[str, str]]]:
    """Every living process that leads its session and whose environment we may read, but not this one."""
    for pid in psutil.pids():
        stat = read_stat(pid)
        if stat is None or pid == os.getpid() or pid != stat.session:
            continue
        try:
            raw = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue  # gone, or another user's
        if alive(ref_of(stat)):  # asked after reading, so that what was read is this process's; a zombie is none
            pairs = (os.fsdecode(one).partition("=") for one in raw.split(b"\0"))
            yield stat, {name: value for name, equals, value in pairs if equals}


def _age_order(stat: Stat) -> tuple[int, int]:
    return stat.start_ticks, stat.pid


def _at_home(pid: int) -> bool:
    """Whether a process is of our user and of our container. A root agent sees those of all."""
    try:
        same_user = Path(f"/proc/{pid}").stat().st_uid == os.geteuid()
        return same_user and Path(f"/proc/{pid}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    except OSError:
        return False
