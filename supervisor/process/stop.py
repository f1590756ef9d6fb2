"""Ends runs.

Whose processes they are is known in `members.py`; how one is signalled, in `signals.py`.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import trio

from supervisor.lifecycle import ProcessRef
from supervisor.process.cgroup import RunGroup
from supervisor.process.members import look, ref_of
from supervisor.process.ref import Stat, alive, identify
from supervisor.process.signals import held, interrupt_group, send

log = logging.getLogger(__name__)

LEFTOVER_GRACE = 5.0  # seconds for what a finished run left behind: its work is done, it only has to go
_SETTLE = 0.05  # seconds; the shortest pause between two looks where nothing wakes us
_PATIENCE = 5.0  # seconds; the longest pause while something does not die of SIGKILL
_WATCHED = 64  # how many ends are awaited at once: a run with thousands of processes must not eat our descriptors


async def end(ref: ProcessRef | None, run_id: str, *, grace: float, group: RunGroup | None = None) -> int:
    """End every process of the run and return when none lives: how many had to be killed.

    SIGTERM to all of them, up to `grace` seconds for them to go, then SIGKILL until two looks in a row find nobody. Without
    grace there is no SIGTERM either: nobody is to act upon it. Of a run with a `group` the kernel kills all at one stroke,
    and says itself when that is empty.
    A process that not even SIGKILL ends (waiting for a dead disk or file server) is waited for, however long: nobody
    may say that a run has ended while a process of it lives. Give up by cancelling.
    """
    asked: set[ProcessRef] = set()
    gone = grace > 0 and await _ask_to_go(ref, run_id, grace, asked, group)
    if gone and not (group is not None and group.populated()):
        return 0
    return await _kill(ref, run_id, asked, group)


async def end_others(ref: ProcessRef, run_id: str, *, grace: float, group: RunGroup | None = None) -> int:
    """End everything of the run but its own process: how many had to be killed. `end` or `let_go_on` must follow.

    For an engine that reports the run's end itself once it is signalled: nothing else may live by then. It is stopped
    meanwhile (`end` lets it go on after its SIGTERM), so that it cannot take the loss of a child for the flow's failure.
    Who ignores SIGTERM is given no grace, for it does not know that it should go; Python's own resource tracker does.
    """
    if not await _others(ref, run_id, group=group):
        return 0
    send(ref, signal.SIGSTOP)
    asked: set[ProcessRef] = set()
    killed: set[ProcessRef] = set()
    deadline = trio.current_time() + grace
    while others := await _others(ref, run_id, asked, group):
        for stat in others:
            if (member := ref_of(stat)) not in asked:
                asked.add(member)
                send(member, signal.SIGTERM)
                if stat.state == "T":
                    send(member, signal.SIGCONT)
        hearing = [ref_of(stat) for stat in others if not _ignores(stat.pid, signal.SIGTERM)]
        left = deadline - trio.current_time()
        if hearing and left > 0:
            await wait_gone(hearing, left)
            continue
        for stat in others:
            killed.add(ref_of(stat))
            send(ref_of(stat), signal.SIGKILL)
        await wait_gone(killed, _PATIENCE)
    return len(killed)


async def _others(
    ref: ProcessRef, run_id: str, known: Collection[ProcessRef] = (), group: RunGroup | None = None
) -> Sequence[Stat]:
    """As `_look`, without the run's own process."""
    for _ in range(2):
        found = await look(ref, run_id, known, group)
        if others := [stat for stat in found if ref_of(stat) != ref]:
            return others
    return ()


def _ignores(pid: int, signum: int) -> bool:
    """Whether the process has set that signal to be ignored (proc(5): SigIgn is a mask, its lowest bit is signal 1)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")), "0")
    return bool(int(mask, 16) >> (signum - 1) & 1)


async def end_leftovers(
    run_id: str, ref: ProcessRef | None, *, grace: float = LEFTOVER_GRACE, group: RunGroup | None = None
) -> int:
    """End what a run has left behind after its own process has ended: how many processes there were."""
    left = await _look(ref, run_id, group=group)
    if not left and not (group is not None and group.populated()):
        return 0
    if left:
        names = ", ".join(sorted({_name(stat.pid) for stat in left}))
        log.info("ending %d process(es) that the run left behind: %s", len(left), names, extra={"run_id": run_id})
    await end(ref, run_id, grace=grace, group=group)
    return len(left)


async def wait_gone(refs: Iterable[ProcessRef], timeout: float) -> bool:  # noqa: ASYNC109 - bounds the waiting
    """Wait until none of these processes lives, at most `timeout` seconds: whether that came about."""
    refs = list(refs)
    with trio.move_on_after(timeout):
        while refs:
            await _wait_some(refs[:_WATCHED])
            refs = [ref for ref in refs if alive(ref)]
    return not any(alive(ref) for ref in refs)


async def _ask_to_go(
    ref: ProcessRef | None, run_id: str, grace: float, asked: set[ProcessRef], group: RunGroup | None
) -> bool:
    """SIGTERM to all, also to those that turn up meanwhile, each once. Whether all were gone within `grace` seconds.

    Who was asked is added to `asked`.
    """
    deadline = trio.current_time() + grace
    while True:
        living = await _look(ref, run_id, asked, group)
        if not living:
            return True
        new = [stat for stat in living if ref_of(stat) not in asked]
        by_group = bool(new) and not asked and ref is not None and interrupt_group(ref)
        for stat in new:
            if not (by_group and ref is not None and stat.group == ref.pid):
                send(ref_of(stat), signal.SIGTERM)
            # A stopped process takes no signal but this and SIGKILL. Sent to all: one that `end_others` has just stopped, or
            # an agent that died then, may not show it yet.
            send(ref_of(stat), signal.SIGCONT)
            asked.add(ref_of(stat))
        left = deadline - trio.current_time()
        if left <= 0:
            return False
        await wait_gone([ref_of(stat) for stat in living], left)


async def _kill(
    ref: ProcessRef | None, run_id: str, known: Collection[ProcessRef], group: RunGroup | None = None
) -> int:
    killed: set[ProcessRef] = set()
    pause = _SETTLE
    said = False
    while (living := await _look(ref, run_id, {*known, *killed}, group)) or (group is not None and group.populated()):
        refs = [ref_of(stat) for stat in living]
        _shoot(ref, refs, group)
        again = killed.issuperset(refs)
        killed.update(refs)
        if not living:
            await trio.sleep(pause)  # in the group, and not in our /proc: nobody whose end could be awaited
        elif await wait_gone(refs, pause) or not again:
            continue
        if not said and pause >= 1.0:
            said = True
            log.error(
                "cannot end process %s: it does not react to SIGKILL or is another user's; waiting",
                ", ".join(f"{stat.pid} ({_name(stat.pid)}, state {stat.state})" for stat in living) or f"in {group}",
                extra={"run_id": run_id},
            )
        pause = min(pause * 2, _PATIENCE)
    return len(killed)


def _shoot(ref: ProcessRef | None, refs: Iterable[ProcessRef], group: RunGroup | None) -> None:
    """SIGKILL: first to all at one stroke, for nobody can fork away from under it, then to each that was seen."""
    by_list = group is not None and not group.kill()
    if group is not None and by_list:
        group.freeze(True)
        refs = [*refs, *(inside for pid in group.pids() if (inside := identify(pid)) is not None)]
    if ref is not None:
        interrupt_group(ref, signal.SIGKILL)
    for member in refs:
        send(member, signal.SIGKILL)
    if group is not None and by_list:
        group.freeze(False)


async def _look(
    ref: ProcessRef | None, run_id: str, known: Collection[ProcessRef] = (), group: RunGroup | None = None
) -> Sequence[Stat]:
    """The run's living processes. Nobody is there only when two looks in a row find nobody.

    A look takes a few milliseconds; a process that forks and exits meanwhile can have its child at a place already
    passed, once. Looks are shared with other runs that end at the same time.
    """
    for _ in range(2):
        if found := await look(ref, run_id, known, group):
            return found
    return ()


async def _wait_some(refs: Sequence[ProcessRef]) -> None:
    """Return when all of these have ended; or soon, where the kernel cannot wake us."""
    with ExitStack() as stack:
        pidfds = []
        for ref in refs:
            try:
                pidfd = stack.enter_context(held(ref))
            except ProcessLookupError:
                continue
            if pidfd is None:
                await trio.sleep(_SETTLE)
                return
            pidfds.append(pidfd)
        for pidfd in pidfds:  # one after the other is as good: the last one decides
            await trio.lowlevel.wait_readable(pidfd)
    await trio.lowlevel.checkpoint()


def _name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "gone"
