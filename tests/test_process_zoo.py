"""Everything that ever got away from a supervisor, with a control group and without: the same test for both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from supervisor.lifecycle import ProcessRef
from supervisor.process.brand import brand, brand_of
from supervisor.process.cgroup import Cgroups, RunGroup
from supervisor.process.environ import MARK
from supervisor.process.launch import Child, launch
from supervisor.process.members import members
from supervisor.process.ref import alive, identify
from supervisor.process.stop import end, end_leftovers
from tests.groups import group_of_our_own
from tests.waiting import wait_until

# A process writes its name into the book once it is what it is meant to be. Nobody leaves the zoo by himself.
KEEPER = """
import os, signal, sys, time

BOOK, ESCAPE = os.environ["BOOK"], os.environ.get("ESCAPE", "")

def ready(name):
    with open(BOOK, "a") as book:
        book.write(f"{name} {os.getpid()}\\n")

def live(name):
    ready(name)
    while True:
        time.sleep(60)

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid

def forget():
    "Lose the environment, as `env -i` does; the script goes on."
    os.execve(sys.executable, [sys.executable, "-S", "-c", LOST], {"BOOK": BOOK})

LOST = '''
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ["BOOK"], "a").write(f"lost {os.getpid()}\\\\n")
time.sleep(600)
'''

def daemon(work):
    "Fork twice with a session between: the parent is gone before anybody can have looked."
    def middle():
        os.setsid()
        child(work)
        os._exit(0)
    os.waitpid(child(middle), 0)
"""

DEAF = "child(lambda: (deaf(), live('deaf')))"
SETSID = "child(lambda: (deaf(), os.setsid(), live('setsid')))"
DAEMON = "daemon(lambda: (deaf(), live('daemon')))"
LOST_DAEMON = "daemon(lambda: (os.chdir('/'), os.closerange(0, 3), forget()))"
BOMB = """
def bomb():
    deaf()
    os.setsid()
    ready('bomb')
    for n in range(19):
        child(lambda: (os.setsid() if n % 2 else os.setpgid(0, 0), live('shard')))
        time.sleep(0.01)
    live('burnt')
for n in range(3):
    child(bomb)
"""
MOVER = """
def move():
    deaf()
    os.setpgid(0, 0)
    if ESCAPE:
        open(ESCAPE + "/cgroup.procs", "w").write(str(os.getpid()))
    live('mover')
child(move)
"""
STOPPED = "child(lambda: (deaf(), ready('stopped'), os.kill(os.getpid(), signal.SIGSTOP), time.sleep(600)))"
PIPE = """
read, write = os.pipe()
child(lambda: (os.setsid(), os.close(read), live('writer')))
child(lambda: (deaf(), os.close(write), ready('reader'), os.read(read, 1), live('reader at the end')))
os.close(read), os.close(write)
"""
NESTED = """
def nest():
    deaf()
    own = [line[3:].strip() for line in open("/proc/self/cgroup") if line.startswith("0::")][0]
    if ESCAPE:
        below = os.path.join(os.path.dirname(ESCAPE), "runs", os.path.basename(own), "below")
        os.makedirs(below)
        open(below + "/cgroup.procs", "w").write(str(os.getpid()))
    live('nested')
child(nest)
"""

ZOO = {
    "deaf to SIGTERM": (DEAF, 1),
    "own session": (SETSID, 1),
    "daemon, forked twice": (DAEMON, 1),
    "daemon, forked twice, nothing in its environment": (LOST_DAEMON, 1),
    "fork bomb of 60 that goes on": (BOMB, 4),
    "moves itself to another group": (MOVER, 1),
    "makes a group of its own": (NESTED, 1),
    "stopped": (STOPPED, 1),
    "in another's pipe": (PIPE, 2),
    "all of them": ("\n".join((DEAF, SETSID, DAEMON, LOST_DAEMON, BOMB, MOVER, NESTED, STOPPED, PIPE)), 13),
}


@dataclass
class Zoo:
    """A run, and the book in which its processes have entered themselves."""

    folder: Path
    cgroups: Cgroups | None
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def group(self) -> RunGroup | None:
        return self.cgroups.group(self.run_id) if self.cgroups is not None else None

    async def open(self, script: str, ready: int) -> Child:
        """Starts it, and waits until so many have said that they are ready."""
        env = {"PATH": os.environ["PATH"], MARK: self.run_id, "BOOK": str(self.book), "TMPDIR": os.environ["TMPDIR"]}
        if self.cgroups is not None:
            env["ESCAPE"] = str(self.cgroups.own / "escape")
        argv = ["/usr/bin/env", "python3", "-S", "-c", f"{KEEPER}\n{script}"]
        output = self.folder / f"{self.run_id}.output"
        child = await launch(argv, env=env, cwd=self.folder, output=output, group=self.group)

        def come() -> bool:
            return len(self.told()) >= ready

        await trio.to_thread.run_sync(
            lambda: wait_until(come, 30, f"{ready} processes ready", every=0.01, more=output.read_text)
        )
        return child

    @property
    def book(self) -> Path:
        return self.folder / f"{self.run_id}.book"

    def told(self) -> list[tuple[str, int]]:
        if not self.book.exists():
            return []
        lines = [line.split() for line in self.book.read_text().splitlines()]
        return [(" ".join(words[:-1]), int(words[-1])) for words in lines]

    def refs(self) -> dict[ProcessRef, str]:
        """Those who are in the book and still there. To be taken before they are ended: a number may come again."""
        return {ref: name for name, pid in self.told() if (ref := identify(pid)) is not None}


@pytest.fixture(params=["with a control group", "without"])
def cgroups(request: pytest.FixtureRequest) -> Iterator[Cgroups | None]:
    """Groups below one of the test's own, or none."""
    if request.param == "without":
        yield None
        return
    with group_of_our_own() as path:
        groups = Cgroups.find(str(path))
        assert groups is not None
        (path / "escape").mkdir()
        yield groups


def visit(zoo: Zoo, guide: Callable[[Zoo], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(120):
            await guide(zoo)

    try:
        trio.run(main)
    finally:  # whatever the test has shown, nothing of it may live on
        for book in zoo.folder.glob("*.book"):
            for ref in Zoo(zoo.folder, None, book.stem).refs():
                if alive(ref):
                    os.kill(ref.pid, signal.SIGKILL)


@pytest.mark.parametrize("animal", ZOO)
def test_nothing_gets_away(tmp_path: Path, cgroups: Cgroups | None, animal: str) -> None:
    script, ready = ZOO[animal]

    async def guide(zoo: Zoo) -> None:
        child = await zoo.open(script + "\nlive('leader')", ready + 1)
        before = zoo.refs()
        await end(child.ref, zoo.run_id, grace=0.3, group=zoo.group)
        after = zoo.refs() | before
        assert [name for ref, name in after.items() if alive(ref)] == []
        told = zoo.told()
        assert await members(child.ref, zoo.run_id, zoo.group) == []
        await child.wait()
        assert zoo.told() == told  # nobody was born since
        if zoo.group is not None:
            assert not zoo.group.populated()
            assert zoo.group.remove()
            assert not zoo.group.path.exists()

    visit(Zoo(tmp_path, cgroups), guide)


@pytest.mark.parametrize("animal", ZOO)
def test_nothing_gets_away_after_its_leader_has_left(tmp_path: Path, cgroups: Cgroups | None, animal: str) -> None:
    script, ready = ZOO[animal]

    async def guide(zoo: Zoo) -> None:
        child = await zoo.open(script + "\nready('leader')", ready + 1)
        before = zoo.refs()
        await child.wait()
        left = await end_leftovers(zoo.run_id, child.ref, grace=0.3, group=zoo.group)
        assert left >= ready
        assert [name for ref, name in (zoo.refs() | before).items() if alive(ref)] == []
        if zoo.group is not None:
            assert zoo.group.remove()

    visit(Zoo(tmp_path, cgroups), guide)


def test_another_run_is_left_alone(tmp_path: Path, cgroups: Cgroups | None) -> None:
    async def guide(zoo: Zoo) -> None:
        other = Zoo(tmp_path, cgroups)
        child = await zoo.open(LOST_DAEMON + "\nlive('leader')", 2)
        neighbour = await other.open("\n".join((LOST_DAEMON, SETSID, MOVER)) + "\nlive('leader')", 4)
        await end(child.ref, zoo.run_id, grace=0, group=zoo.group)
        assert {name for ref, name in other.refs().items() if alive(ref)} == {"lost", "setsid", "mover", "leader"}
        await end(neighbour.ref, other.run_id, grace=0, group=other.group)
        assert [name for ref, name in other.refs().items() if alive(ref)] == []
        await child.wait()
        await neighbour.wait()
        for group in (zoo.group, other.group):
            assert group is None or group.remove()

    visit(Zoo(tmp_path, cgroups), guide)


def test_a_brand_is_born_with_and_not_lost(tmp_path: Path) -> None:
    async def guide(zoo: Zoo) -> None:
        ours = brand_of(os.getpid())
        child = await zoo.open(LOST_DAEMON + "\nlive('leader')", 2)
        assert {brand_of(pid) for _, pid in zoo.told()} == {brand(zoo.run_id)}
        assert brand_of(os.getpid()) == ours  # and nothing of it stays with us
        plain = await launch(["sleep", "60"], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, output=tmp_path / "o")
        assert brand_of(plain.ref.pid) == ours
        await end(plain.ref, "no run", grace=10)
        await end(child.ref, zoo.run_id, grace=0)
        await child.wait()
        await plain.wait()

    visit(Zoo(tmp_path, None), guide)


# --- orphans that come to us ------------------------------------------------------------------------------------------

UNDERTAKER = """
import os, subprocess, sys
import trio, trio.testing
from supervisor.process.reaper import become_subreaper, expect, reap, reap_strangers
from supervisor.process.ref import identify, read_stat
from tests.waiting import wait_until

def leave_orphan():
    return int(subprocess.run(["sh", "-c", "sleep 0.05 >&- & echo $!"], stdout=subprocess.PIPE, check=True).stdout)

assert become_subreaper()
orphan = leave_orphan()
assert read_stat(orphan).parent == os.getpid()
own = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
expect(identify(own.pid))
other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(8)"])  # did not pass through launch
for pid in (orphan, own.pid, other.pid):
    wait_until(lambda: not read_stat(pid).living, 10, "ended")
seen = reap()
assert {ref.pid for ref in seen} == {orphan, other.pid}, seen
assert read_stat(orphan) is not None  # not at the first look
assert other.wait() == 8
assert reap(seen) == frozenset()
assert read_stat(orphan) is None
assert reap(reap()) == frozenset()
orphan = leave_orphan()

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reap_strangers)
        while read_stat(orphan) is not None:
            await trio.sleep(1)
        nursery.cancel_scope.cancel()

trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
assert own.wait() == 7
print("buried")
"""


def test_orphans_are_buried_and_no_status_that_somebody_waits_for_is_taken() -> None:
    """In a process of its own: being a subreaper cannot be tried on without keeping it."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(UNDERTAKER)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("buried\n", "")
