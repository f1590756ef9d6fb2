"""Which processes belong to a run.

They are found in several ways, because each alone has a hole: by session and process group (a child may leave them), by
descent (the tree breaks when a parent dies), by the run's mark in the environment (a program may have been started
without), by its brand (which may be none), and by its control group (there may be none; who is root may leave it).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence

import psutil
import trio

from supervisor.lifecycle import ProcessRef
from supervisor.process.brand import brand, brand_of
from supervisor.process.cgroup import RunGroup
from supervisor.process.environ import MARK
from supervisor.process.ref import Stat, boot_id, read_proc, read_stat

_MARK = f"{MARK}=".encode()


async def members(ref: ProcessRef | None, run_id: str, group: RunGroup | None = None) -> list[psutil.Process]:
    """Every living process of the run: of the session or group that `ref` leads, descended from it, marked, or inside."""
    found = []
    for member in await look(ref, run_id, group=group):
        try:
            found.append(psutil.Process(member.pid))
        except psutil.NoSuchProcess:
            continue
    return found


async def look(
    ref: ProcessRef | None, run_id: str, known: Collection[ProcessRef] = (), group: RunGroup | None = None
) -> list[Stat]:
    """The run's processes by one look at all of /proc that begins now or later. Zombies are left out, and so is this process.

    `known` are those that an earlier look found: one of them may have lost, with its parent, all that showed whose it is.
    Who is in `group` belongs to the run, whatever else it is.
    """
    return await _looks.share(_Question(ref, run_id, known, group))


class _Question:
    """Whose processes are asked for, and in the end who they are."""

    def __init__(
        self, ref: ProcessRef | None, run_id: str, known: Collection[ProcessRef], group: RunGroup | None
    ) -> None:
        self.ref = ref
        self.run_id = run_id
        self.known = frozenset(known)
        self.group = group
        self.found: list[Stat] | None = None


class _Looks:
    """One look at a time, for all who have asked before it begins: with 500 live runs each reads a thousand files.

    Whoever asks while it goes on gets the next one, for the question is who lives now. Owns the questions that wait. Looks rest
    in between for as long as the last one took: many ends at once shall not take up the machine.
    """

    def __init__(self) -> None:
        self._waiting: list[_Question] = []
        self._idle: trio.Event | None = None  # set, and None again, when nobody looks
        self._rested = 0.0  # from when on (`time.monotonic`) there may be another look
        self._took = 0.0  # seconds

    async def share(self, question: _Question) -> list[Stat]:
        self._waiting.append(question)
        while question.found is None:
            if self._idle is None:
                await self._look()
            else:
                await self._idle.wait()
        return question.found

    async def _look(self) -> None:
        self._idle = idle = trio.Event()
        try:
            await trio.sleep(min(self._took, max(0.0, self._rested - time.monotonic())))
            questions, self._waiting = self._waiting, []
            began = time.monotonic()
            try:
                with trio.CancelScope(shield=True):  # others wait for it, too
                    await trio.to_thread.run_sync(_answer, questions)
            finally:
                self._waiting[:0] = [question for question in questions if question.found is None]
            self._rested = time.monotonic()
            self._took = self._rested - began
            self._rested += self._took
        finally:
            self._idle = None
            idle.set()


# A machine has one /proc, so there is one of these.
_looks = _Looks()


def _answer(questions: Sequence[_Question]) -> None:
    """One look at all of /proc; blocking."""
    # The groups before /proc: who is in one may be hidden there.
    inside = [set(question.group.pids()) if question.group is not None else set() for question in questions]
    census = _Census(set(psutil.pids()).union(*inside))
    for question, pids in zip(questions, inside, strict=True):
        question.found = census.of(question, pids)


class _Census:
    """Who lived during one look, and by what each shows whose it is."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._table: dict[int, Stat] = {}
        self._by_number: dict[int, list[int]] = {}  # pid, process group or session -> pids
        self._by_brand: dict[int, list[int]] = {}
        self._by_mark: dict[bytes, list[int]] = {}
        self._children: dict[int, list[int]] = {}
        for pid in pids:
            stat = read_stat(pid)
            if stat is None or not stat.living or pid == os.getpid():
                continue
            self._table[pid] = stat
            self._children.setdefault(stat.parent, []).append(pid)
            for number in {pid, stat.group, stat.session}:
                self._by_number.setdefault(number, []).append(pid)
            if (branded := brand_of(pid)) is not None:
                self._by_brand.setdefault(branded, []).append(pid)
            for mark in _marks(pid):
                self._by_mark.setdefault(mark, []).append(pid)

    def of(self, question: _Question, inside: Collection[int]) -> list[Stat]:
        """The processes of that run, with all that descend from them."""
        ours = {pid for pid in inside if pid in self._table}
        ours.update(self._by_brand.get(brand(question.run_id), ()))
        ours.update(self._by_mark.get(question.run_id.encode(), ()))
        ours.update(self._led_by(question.ref))
        ours.update(old.pid for old in question.known if old.pid in self._table and ref_of(self._table[old.pid]) == old)
        todo = list(ours)
        while todo:
            new = [pid for pid in self._children.get(todo.pop(), ()) if pid not in ours]
            ours.update(new)
            todo.extend(new)
        return [self._table[pid] for pid in sorted(ours)]

    def _led_by(self, ref: ProcessRef | None) -> Sequence[int]:
        if ref is None or ref.boot_id != boot_id():
            return ()
        found = self._by_number.get(ref.pid, ())
        leader = read_stat(ref.pid) if found else None
        # The kernel gives the number of a group or session to nobody else while a member lives; so when the number has a
        # new owner, the group is the new owner's, too.
        return found if leader is None or leader.start_ticks == ref.start_ticks else ()


def _marks(pid: int) -> list[bytes]:
    """The ids of the runs whose mark the process bears: one at most, unless somebody plays with us."""
    try:
        environ = read_proc(pid, "environ")
    except OSError:
        return []  # gone, or another user's and so not started by us
    if _MARK not in environ:
        return []
    return [one.removeprefix(_MARK) for one in environ.split(b"\0") if one.startswith(_MARK)]


def ref_of(stat: Stat) -> ProcessRef:
    """The identity of a process that was seen in this boot."""
    return ProcessRef(pid=stat.pid, start_ticks=stat.start_ticks, boot_id=boot_id())
