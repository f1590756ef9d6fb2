"""supervisor/process/stop.py against real processes that do all they can to live on."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import trio

from supervisor.lifecycle import Exit, ProcessRef
from supervisor.process.environ import MARK
from supervisor.process.launch import Child, launch
from supervisor.process.members import members
from supervisor.process.ref import alive, identify
from supervisor.process.signals import hold, interrupt_group, let_go_on
from supervisor.process.stop import end, end_leftovers, end_others, wait_gone
from tests.servers import processes_with
from tests.waiting import wait_until

# What the scripts below share. A process says its number once it is ready to be shot at.
PRELUDE = """
import os, signal, subprocess, sys, time

def ready():
    with open(os.environ["PIDS"], "a") as out:
        out.write(f"{os.getpid()}\\n")

def live():
    ready()
    while True:
        time.sleep(60)

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def child(work):
    if os.fork() == 0:
        try:
            work()
        finally:
            os._exit(1)

def bare(script):
    "A child that has lost the environment, and so the mark."
    subprocess.Popen([sys.executable, "-c", PRELUDE + script], env={"PIDS": os.environ["PIDS"]}, start_new_session=True)
"""


async def until(condition: Callable[[], bool], what: str) -> None:
    await trio.to_thread.run_sync(lambda: wait_until(condition, 30, what, every=0.01))


@dataclass
class Zoo:
    """One run whose processes are `script`'s."""

    folder: Path
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    children: list[Child] = field(default_factory=list)

    async def open(self, script: str, ready: int) -> Child:
        """Starts the script and waits until so many of its processes have said that they are ready."""
        whole = f"PRELUDE = {PRELUDE!r}\n{PRELUDE}\n{script}"
        env = {"PATH": os.environ["PATH"], MARK: self.run_id, "PIDS": str(self.pids)}
        output = self.folder / f"{self.run_id}.output"
        child = await launch([sys.executable, "-c", whole], env=env, cwd=self.folder, output=output)
        self.children.append(child)
        await until(lambda: len(self.told()) >= ready, f"{ready} processes ready")
        return child

    @property
    def pids(self) -> Path:
        return self.folder / f"{self.run_id}.pids"

    def told(self) -> list[int]:
        return [int(line) for line in self.pids.read_text().splitlines()] if self.pids.exists() else []

    def living(self) -> list[int]:
        """Those that have said they were ready and are still there."""
        return [pid for pid in self.told() if (ref := identify(pid)) is not None and alive(ref)]

    def left(self) -> list[psutil.Process]:
        """Those that carry its mark and live, also such as have not come to say anything."""
        return processes_with(MARK, self.run_id)


def zoo(folder: Path, visit: Callable[[Zoo], Awaitable[None]]) -> None:
    async def main() -> None:
        z = Zoo(folder)
        with trio.fail_after(60):
            await visit(z)
        for child in z.children:
            await child.wait()

    try:
        trio.run(main)
    finally:  # whatever the test has shown, nothing of it may live on
        for path in folder.glob("*.pids"):
            for line in path.read_text().split():
                if (ref := identify(int(line))) is not None and alive(ref):
                    psutil.Process(int(line)).kill()


PLAIN = "live()"
DEAF = "deaf(); live()"
OWN_GROUP = "deaf(); child(lambda: (os.setpgid(0, 0), live())); live()"
OWN_SESSION = "deaf(); child(lambda: (os.setsid(), live())); live()"
DAEMON = """
def daemon():
    os.setsid()
    child(live)
    os._exit(0)
deaf()
child(daemon)
live()
"""
ORPHANED_DAEMON = DAEMON.replace("\nlive()", "\ntime.sleep(0.2)")
BARE = "deaf(); bare('deaf(); live()'); live()"
BARE_GRANDCHILD = "deaf(); bare('deaf(); child(lambda: (os.setsid(), live())); live()'); live()"
STOPPED = "deaf(); child(lambda: (ready(), os.kill(os.getpid(), signal.SIGSTOP), time.sleep(600))); live()"
STOPPED_LEADER = "deaf(); ready(); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(600)"
FAMILY = "\n".join(f"child(lambda: (deaf(), {own}, live()))" for own in ("os.setsid()", "os.setpgid(0, 0)", "1"))
TREE = """
deaf()
def grow(depth):
    if depth:
        for _ in range(2):
            child(lambda: grow(depth - 1))
    os.setsid() if os.getpid() % 2 and os.getpgid(0) != os.getpid() else None
    live()
grow(4)
"""
BOMB = """
deaf()
def bomb(left):
    os.setsid()
    ready()
    for n in range(left):
        child(lambda: bomb(0))
        time.sleep(0.002)
    while True:
        time.sleep(60)
for _ in range(5):
    child(lambda: bomb(9))
live()
"""


@pytest.mark.parametrize(
    ("script", "processes", "killed"),
    [
        pytest.param(PLAIN, 1, 0, id="plain"),
        pytest.param(DEAF, 1, 1, id="deaf to SIGTERM"),
        pytest.param(OWN_GROUP, 2, 2, id="own process group"),
        pytest.param(OWN_SESSION, 2, 2, id="own session"),
        pytest.param(DAEMON, 2, 2, id="forked twice"),
        pytest.param(ORPHANED_DAEMON, 1, 1, id="forked twice, leader gone"),
        pytest.param(BARE, 2, 2, id="own session, without the mark"),
        pytest.param(BARE_GRANDCHILD, 3, 3, id="grandchild in its own session, without the mark"),
        pytest.param(STOPPED, 2, 2, id="stopped child"),
        pytest.param(STOPPED_LEADER, 1, 1, id="stopped leader"),
        pytest.param(FAMILY + "\nlive()", 4, 3, id="a family"),
        pytest.param(TREE, 31, 31, id="a tree of 31, half of them in their own sessions"),
        pytest.param(BOMB, 51, 51, id="a fork bomb of 51"),
    ],
)
def test_nothing_of_a_run_lives_on(tmp_path: Path, script: str, processes: int, killed: int) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open(script, processes)
        if script == ORPHANED_DAEMON:
            await child.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            assert await end(child.ref, z.run_id, grace=0.2) == killed
            assert z.living() == []
        assert len(z.told()) == processes
        assert await members(child.ref, z.run_id) == []

    zoo(tmp_path, visit)


def test_a_bomb_that_goes_on_while_it_is_ended_is_ended(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open(BOMB, 3)  # some fifty more are on their way
        await end(child.ref, z.run_id, grace=0)
        assert z.left() == []

    zoo(tmp_path, visit)


def test_a_process_that_leaves_a_child_behind_when_asked_to_go_is_no_way_out(tmp_path: Path) -> None:
    script = """
def leave(signum, frame):
    child(lambda: (os.setsid(), live()))
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
live()
"""

    async def visit(z: Zoo) -> None:
        child = await z.open(script, 1)
        await end(child.ref, z.run_id, grace=0.5)
        assert z.left() == []

    zoo(tmp_path, visit)


def test_those_who_go_when_asked_are_waited_for_no_longer_than_they_take(tmp_path: Path) -> None:
    script = """
def bye(signum, frame):
    time.sleep(0.1)
    print("bye", flush=True)
    os._exit(3)
signal.signal(signal.SIGTERM, bye)
child(lambda: (os.setsid(), live()))
live()
"""

    async def visit(z: Zoo) -> None:
        child = await z.open(script, 2)
        before = trio.current_time()
        assert await end(child.ref, z.run_id, grace=30) == 0
        assert trio.current_time() - before < 5
        assert await child.wait() == Exit(code=3)
        output = (tmp_path / f"{z.run_id}.output").read_text()
        assert output.count("bye") == 2  # in another session, too, and each was asked only once

    zoo(tmp_path, visit)


def test_a_stopped_run_still_gets_its_chance_to_end_itself(tmp_path: Path) -> None:
    script = "signal.signal(signal.SIGTERM, lambda *_: os._exit(3)); ready(); os.kill(os.getpid(), signal.SIGSTOP)"

    async def visit(z: Zoo) -> None:
        child = await z.open(script, 1)
        await until(lambda: psutil.Process(child.ref.pid).status() == psutil.STATUS_STOPPED, "stopped")
        assert await end(child.ref, z.run_id, grace=10) == 0
        assert await child.wait() == Exit(code=3)

    zoo(tmp_path, visit)


def test_other_runs_and_their_children_are_not_touched(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        other = Zoo(tmp_path, run_id=z.run_id + "0")  # one mark is the beginning of the other
        child, neighbour = await z.open(TREE, 31), await other.open(FAMILY + "\nlive()", 4)
        await end(child.ref, z.run_id, grace=0)
        assert z.living() == []
        assert sorted(other.living()) == sorted(other.told())
        assert sorted(process.pid for process in await members(neighbour.ref, other.run_id)) == sorted(other.told())
        await end(neighbour.ref, other.run_id, grace=0)
        assert other.living() == []
        await neighbour.wait()

    zoo(tmp_path, visit)


def test_a_number_that_is_somebody_elses_by_now_is_not_signalled(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open("child(live); live()", 2)
        earlier = ProcessRef(pid=child.ref.pid, start_ticks=child.ref.start_ticks - 1, boot_id=child.ref.boot_id)
        other_boot = ProcessRef(pid=child.ref.pid, start_ticks=child.ref.start_ticks, boot_id="before the restart")
        for stranger in (earlier, other_boot):
            assert not interrupt_group(stranger, signal.SIGKILL)
            assert await members(stranger, "another run") == []
            assert await end(stranger, "another run", grace=0) == 0
        assert len(z.living()) == 2
        await end(child.ref, z.run_id, grace=0)

    zoo(tmp_path, visit)


def test_a_run_without_a_known_leader_is_found_by_its_mark(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        await z.open(OWN_SESSION, 2)
        assert await end(None, z.run_id, grace=0) == 2
        assert z.living() == []

    zoo(tmp_path, visit)


def test_a_run_that_is_gone_already_costs_no_wait(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open("ready()", 1)
        await child.wait()
        before = trio.current_time()
        assert await end(child.ref, z.run_id, grace=30) == 0
        assert await end_leftovers(z.run_id, child.ref) == 0
        assert not interrupt_group(child.ref)
        assert trio.current_time() - before < 5

    zoo(tmp_path, visit)


def test_a_leader_that_nobody_has_waited_for_hangs_nothing_and_its_group_is_reached(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open("child(lambda: (deaf(), live())); ready()", 2)
        await until(lambda: psutil.Process(child.ref.pid).status() == psutil.STATUS_ZOMBIE, "ended")
        assert len(await members(child.ref, "known by its group alone")) == 1
        assert interrupt_group(child.ref, signal.SIGCONT)
        assert await end(child.ref, z.run_id, grace=0.1) == 1
        assert z.living() == []
        assert await child.wait() == Exit(code=0)

    zoo(tmp_path, visit)


def test_we_ourselves_are_never_a_member_even_with_the_mark(tmp_path: Path) -> None:
    script = """
import trio
from supervisor.process.members import members
from supervisor.process.stop import end
ready()
async def main():
    assert await members(None, os.environ["FLOW_AGENT_RUN_ID"]) == []
    assert await end(None, os.environ["FLOW_AGENT_RUN_ID"], grace=0) == 0
    print("alive")
trio.run(main)
"""

    async def visit(z: Zoo) -> None:
        script_here = f"sys.path.insert(0, {os.fspath(Path(__file__).parents[1])!r})\n{script}"
        child = await z.open(script_here, 1)
        assert await child.wait() == Exit(code=0)
        assert "alive" in (tmp_path / f"{z.run_id}.output").read_text()

    zoo(tmp_path, visit)


def test_leftovers_of_a_finished_run_are_ended_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def visit(z: Zoo) -> None:
        child = await z.open(ORPHANED_DAEMON, 1)
        assert await child.wait() == Exit(code=0)
        assert len(z.living()) == 1
        assert await end_leftovers(z.run_id, child.ref, grace=0.1) == 1
        assert z.living() == []

    zoo(tmp_path, visit)
    assert "ending 1 process(es) that the run left behind: python" in caplog.text


def test_waiting_for_the_end_is_bounded_and_ends_with_the_last(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open("signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); child(live); live()", 2)
        refs = [ref for pid in z.told() if (ref := identify(pid)) is not None]
        assert not await wait_gone(refs, 0.05)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            assert interrupt_group(child.ref)
            assert await wait_gone(refs, math.inf)
        assert z.living() == []
        assert await wait_gone([], 0)

    zoo(tmp_path, visit)


def test_ending_can_be_given_up(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open(DEAF, 1)
        with trio.move_on_after(0.1) as given_up:
            await end(child.ref, z.run_id, grace=60)
        assert given_up.cancelled_caught
        assert z.living() == [child.ref.pid]
        await end(child.ref, z.run_id, grace=0)

    zoo(tmp_path, visit)


FAMILY_OF_AN_ENGINE = "\n".join(
    f"child(lambda: ({own}, live()))"
    for own in ("os.setsid()", "os.setpgid(0, 0)", "1", "(deaf(), os.setsid())", "deaf()")
)


def test_everything_but_the_runs_own_process_is_ended_while_that_is_held_still(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open(FAMILY_OF_AN_ENGINE + "\nlive()", 6)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            with trio.fail_after(20):  # far less than the grace: who ignores SIGTERM is not waited for
                assert await end_others(child.ref, z.run_id, grace=600) == 2
            assert [process.pid for process in await members(child.ref, z.run_id)] == [child.ref.pid]
            assert psutil.Process(child.ref.pid).status() == psutil.STATUS_STOPPED
            assert await end(child.ref, z.run_id, grace=600) == 0  # it goes on, and obeys
        assert await members(child.ref, z.run_id) == []

    zoo(tmp_path, visit)


def test_a_process_without_others_is_not_even_stopped(tmp_path: Path) -> None:
    async def visit(z: Zoo) -> None:
        child = await z.open(PLAIN, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            assert await end_others(child.ref, z.run_id, grace=5) == 0
            assert psutil.Process(child.ref.pid).status() != psutil.STATUS_STOPPED
            await end(child.ref, z.run_id, grace=5)

    zoo(tmp_path, visit)


def test_a_process_that_is_held_does_nothing_until_it_is_let_go_on(tmp_path: Path) -> None:
    counter = tmp_path / "counter"

    def size() -> int:
        return counter.stat().st_size if counter.exists() else -1  # it may be stopped between open and write

    async def visit(z: Zoo) -> None:
        count = f"ready()\nwhile True:\n    open({str(counter)!r}, 'a').write('x')"
        child = await z.open(count, 1)
        for _ in range(20):
            await hold(child.ref)
            assert psutil.Process(child.ref.pid).status() == psutil.STATUS_STOPPED
            before = size()
            await trio.sleep(0.005)
            assert size() == before
            let_go_on(child.ref)
            with trio.fail_after(20):
                while size() == before:
                    await trio.sleep(0.001)
        await end(child.ref, z.run_id, grace=0)
        with trio.fail_after(5):
            await hold(child.ref)  # it is gone

    zoo(tmp_path, visit)


def test_an_agent_that_died_while_it_held_the_engine_still_costs_the_engine_nothing(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
child(lambda: (os.setsid(), live()))
live()
"""

    async def visit(z: Zoo) -> None:
        child = await z.open(script, 2)
        await end_others(child.ref, z.run_id, grace=600)
        assert psutil.Process(child.ref.pid).status() == psutil.STATUS_STOPPED
        # Nothing but the reference and the id is left of what the agent knew.
        ref = ProcessRef(pid=child.ref.pid, start_ticks=child.ref.start_ticks, boot_id=child.ref.boot_id)
        with trio.fail_after(30):
            assert await end(ref, z.run_id, grace=600) == 0
        assert await child.wait() == Exit(code=3)

    zoo(tmp_path, visit)


def test_a_process_of_which_the_kernel_gives_no_handle_is_waited_for_without_haste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def refuse(_: int) -> int:  # a security module
        nonlocal asked
        asked += 1
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    async def main() -> None:
        child = await launch(
            ["sleep", "60"], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, output=tmp_path / "output"
        )
        with monkeypatch.context() as without:
            without.setattr(os, "pidfd_open", refuse)
            assert not await wait_gone([child.ref], 0.5)
            assert 1 <= asked <= 20
        await end(child.ref, "run", grace=0)
        await child.wait()

    trio.run(main)
