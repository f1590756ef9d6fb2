"""Which processes belong to a run.

They are found in several ways, because each alone has a hole: by session and process group (a child may leave them), by
descent (the tree breaks when a parent dies), by the run's mark in the environment (a program may have been started
without), by its brand (which may be none), and by its control group (there may be none; who is root may leave it).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import psutil
import trio

from supervisor.lifecycle import ProcessRef
from supervisor.process.brand import brand, brand_of
from supervisor.process.cgroup import RunGroup
from supervisor.process.environ import MARK
from supervisor.process.ref import Stat, boot_id, read_stat


async def members(ref: ProcessRef | None, run_id: str, group: RunGroup | None = None) -> list[psutil.Process]:
    """Every living process of the run: of the session or group that `ref` leads, descended from it, marked, or inside."""
    found = []
    for member in await trio.to_thread.run_sync(sweep, ref, run_id, (), group):
        try:
            found.append(psutil.Process(member.pid))
        except psutil.NoSuchProcess:
            continue
    return found


def sweep(
    ref: ProcessRef | None, run_id: str, known: Collection[ProcessRef] = (), group: RunGroup | None = None
) -> list[Stat]:
    """One look at all of /proc. Zombies are left out, and so is this process.

    `known` are those that an earlier look found: one of them may have lost, with its parent, all that showed whose it is.
    Who is in `group` belongs to the run, whatever else it is.
    """
    inside = set(group.pids()) if group is not None else set()
    pids = inside.union(psutil.pids())
    table = {pid: stat for pid in pids if (stat := read_stat(pid)) is not None and stat.living}
    table.pop(os.getpid(), None)
    mark, number = f"{MARK}={run_id}".encode(), brand(run_id)
    ours = {
        pid
        for pid, stat in table.items()
        if pid in inside or _led_by(ref, stat) or brand_of(pid) == number or _marked(pid, mark)
    }
    ours.update(old.pid for old in known if old.pid in table and ref_of(table[old.pid]) == old)
    children: dict[int, list[int]] = {}
    for stat in table.values():
        children.setdefault(stat.parent, []).append(stat.pid)
    todo = list(ours)
    while todo:
        new = [pid for pid in children.get(todo.pop(), ()) if pid not in ours]
        ours.update(new)
        todo.extend(new)
    return [table[pid] for pid in sorted(ours)]


def _led_by(ref: ProcessRef | None, stat: Stat) -> bool:
    if ref is None or ref.boot_id != boot_id() or ref.pid not in (stat.pid, stat.group, stat.session):
        return False
    leader = read_stat(ref.pid)
    # The kernel gives the number of a group or session to nobody else while a member lives; so when the number has a
    # new owner, the group is the new owner's, too.
    return leader is None or leader.start_ticks == ref.start_ticks


def _marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # gone, or another user's and so not started by us


def ref_of(stat: Stat) -> ProcessRef:
    """The identity of a process that was seen in this boot."""
    return ProcessRef(pid=stat.pid, start_ticks=stat.start_ticks, boot_id=boot_id())
