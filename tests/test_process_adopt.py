"""supervisor/process/adopt.py with real processes: whose they are, that they are held, and that their end is noticed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
import trio

from supervisor.lifecycle import Exit, ProcessRef
from supervisor.process.adopt import UNSEEN, Adopted, adopt, age_seconds, find, marked_runs
from supervisor.process.environ import MARK, STATE_MARK
from supervisor.process.ref import alive, identify, same
from tests.waiting import wait_until

LIVE = "import sys; print('up', flush=True); sys.stdin.read()"
# A process that is started by another, which says the pid and leaves.
ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
"""
WITH_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, start_new_session=len(sys.argv) > 2)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


class Stable:
    """Real processes. All of them end when their input does, at the latest with the test."""

    def __init__(self) -> None:
        self._open: list[subprocess.Popen[str]] = []

    def start(self, *argv: str, environ: Mapping[str, str]) -> tuple[subprocess.Popen[str], int]:
        """A Python process that is ready, and what it said: its own number or its child's."""
        process = subprocess.Popen(
            [sys.executable, "-c", *argv],
            env={"PATH": os.environ["PATH"], **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._open.append(process)
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        return process, process.pid if said == "up" else int(said)

    def run(self, run_id: str, environ: Mapping[str, str] = {}) -> subprocess.Popen[str]:
        return self.start(LIVE, environ={MARK: run_id, **environ})[0]

    def orphan(self, run_id: str) -> tuple[ProcessRef, Callable[[], None]]:
        """A run's process whose parent is gone, as after the agent's death; and what ends it."""
        parent, pid = self.start(ORPHAN, LIVE, environ={MARK: run_id})
        parent.wait()
        assert parent.stdin is not None
        return ref_of(pid), parent.stdin.close

    def close(self) -> None:
        for process in self._open:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        for process in self._open:
            process.communicate()


def ref_of(pid: int) -> ProcessRef:
    ref = identify(pid)
    assert ref is not None
    return ref


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def stable() -> Iterator[Stable]:
    made = Stable()
    yield made
    made.close()


@pytest.fixture
def run_id() -> str:
    return str(uuid.uuid4())


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_mark_while_it_lives(stable: Stable, run_id: str) -> None:
    assert find(run_id) is None
    process = stable.run(run_id)
    stable.run(str(uuid.uuid4()))
    assert find(run_id) == ref_of(process.pid)
    end(process)
    assert find(run_id) is None


def test_a_run_is_found_whose_parent_is_gone(stable: Stable, run_id: str) -> None:
    ref, _ = stable.orphan(run_id)
    assert find(run_id) == ref


def test_an_engine_is_not_mistaken_for_a_child_that_it_has_left_behind(stable: Stable, run_id: str) -> None:
    child, _ = stable.orphan(run_id)
    assert find(run_id, engine=True) is None
    assert find(run_id) == child
    engine, _ = stable.start(LIVE, "-m", "prefect.engine", environ={MARK: run_id})
    assert find(run_id, engine=True) == ref_of(engine.pid)


def test_a_zombie_is_not_found(stable: Stable, run_id: str) -> None:
    process = stable.run(run_id)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert same(ref_of(process.pid)) is not None
    assert find(run_id) is None


def test_one_that_ends_while_we_look_is_not_found(stable: Stable, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    process = stable.run(run_id)
    real = Path.read_bytes

    def read_and_end(path: Path) -> bytes:
        raw = real(path)
        if path == Path(f"/proc/{process.pid}/environ"):
            end(process)
        return raw

    monkeypatch.setattr(Path, "read_bytes", read_and_end)
    assert find(run_id) is None


def test_only_the_whole_mark_counts(stable: Stable, run_id: str) -> None:
    stable.run(run_id + "0")
    stable.run("", {"X" + MARK: run_id, "OTHER": f"{MARK}={run_id}"})
    stable.run(run_id[:-1])
    assert find(run_id) is None


def test_the_child_is_not_taken_for_the_run_whether_it_leads_a_session_or_not(stable: Stable, run_id: str) -> None:
    parent, child = stable.start(WITH_CHILD, LIVE, environ={MARK: run_id})
    other = str(uuid.uuid4())
    second, leader = stable.start(WITH_CHILD, LIVE, "own session", environ={MARK: other})
    assert os.getsid(leader) == leader
    assert os.getsid(child) == parent.pid
    assert find(run_id) == ref_of(parent.pid)
    assert find(other) == ref_of(second.pid)


def test_marked_children_without_their_leader_are_not_a_run(stable: Stable, run_id: str, tmp_path: Path) -> None:
    parent, child = stable.start(WITH_CHILD, LIVE, environ={MARK: run_id, STATE_MARK: str(tmp_path)})
    assert list(marked_runs(tmp_path)) == [run_id]
    end(parent)
    assert alive(ref_of(child))
    assert find(run_id) is None
    assert marked_runs(tmp_path) == {}


def test_this_process_is_no_run_of_ours(stable: Stable, run_id: str) -> None:
    asks = "import sys; from supervisor.process.adopt import find; print(0 if find(sys.argv[1]) is None else 1)"
    folder = Path(__file__).parent.parent
    _, found = stable.start(asks, run_id, environ={MARK: run_id, "PYTHONPATH": str(folder)})
    assert found == 0


def test_all_runs_of_one_state_directory_are_found_and_nobody_elses(stable: Stable, tmp_path: Path) -> None:
    ours, theirs, link = tmp_path / "ours", tmp_path / "theirs", tmp_path / "link"
    ours.mkdir()
    theirs.mkdir()
    link.symlink_to(ours)
    one, two, foreign, unsaid, relative = (str(uuid.uuid4()) for _ in range(5))
    expected = {
        one: ref_of(stable.run(one, {STATE_MARK: str(ours)}).pid),
        two: ref_of(stable.run(two, {STATE_MARK: str(link)}).pid),
    }
    other = ref_of(stable.run(foreign, {STATE_MARK: str(theirs)}).pid)
    stable.run(unsaid)
    stable.run(relative, {STATE_MARK: os.path.relpath(ours)})
    stable.start(LIVE, environ={STATE_MARK: str(ours)})
    stable.start(WITH_CHILD, LIVE, "own session", environ={MARK: foreign, STATE_MARK: str(theirs)})
    assert marked_runs(ours) == expected
    assert marked_runs(link) == expected
    assert marked_runs(theirs) == {foreign: other}


def test_a_daemon_of_a_run_does_not_hide_the_run(stable: Stable, run_id: str, tmp_path: Path) -> None:
    parent, _ = stable.start(WITH_CHILD, LIVE, "own session", environ={MARK: run_id, STATE_MARK: str(tmp_path)})
    assert marked_runs(tmp_path) == {run_id: ref_of(parent.pid)}


def test_a_process_of_another_user_or_container_is_not_ours(
    stable: Stable, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable.run(run_id, {STATE_MARK: str(tmp_path)})
    assert list(marked_runs(tmp_path)) == [run_id]
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert marked_runs(tmp_path) == {}
    real = os.readlink
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "pid:[1]" if path == Path("/proc/self/ns/pid") else real(path))
        assert marked_runs(tmp_path) == {}


# --- holding --------------------------------------------------------------------------------------------------------


def test_only_that_very_process_is_adopted(stable: Stable, run_id: str) -> None:
    process = stable.run(run_id)
    ref = ref_of(process.pid)
    held = adopt(ref)
    assert held is not None
    assert held.ref == ref
    assert adopt(msgspec.structs.replace(ref, start_ticks=ref.start_ticks - 1)) is None
    assert adopt(msgspec.structs.replace(ref, boot_id="another")) is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert adopt(ref) is None, "a zombie"
    process.wait()
    assert adopt(ref) is None


def test_the_end_of_an_orphan_is_noticed_by_all_who_wait_and_can_be_given_up(stable: Stable, run_id: str) -> None:
    ref, let_end = stable.orphan(run_id)
    seen: list[Exit] = []

    async def wait(held: Adopted) -> None:
        seen.append(await held.wait())

    async def main() -> None:
        held = adopt(ref)
        assert held is not None
        with trio.move_on_after(0) as given_up:
            await held.wait()
        assert given_up.cancelled_caught
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait, held)
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(10_000)
            await trio.testing.wait_all_tasks_blocked()
            assert seen == [], "however long it takes"
            let_end()
        assert seen == [UNSEEN] * 3
        assert await held.wait() == UNSEEN, "also of those who come later"

    clock = trio.testing.MockClock(rate=1)
    trio.run(within(10_030, main), clock=clock)
    assert str(UNSEEN).startswith("ended unseen")
    assert (UNSEEN.code, UNSEEN.signal) == (None, None)


def test_the_kernel_wakes_us_so_that_nothing_is_asked_while_it_runs(
    stable: Stable, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = stable.run(run_id)

    async def no_sleep(_: float) -> None:
        raise AssertionError("it polls")

    async def main() -> None:
        held = adopt(ref_of(process.pid))
        assert held is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(held.wait)
            await trio.testing.wait_all_tasks_blocked()
            process.kill()

    monkeypatch.setattr("supervisor.process.stop.trio.sleep", no_sleep)
    trio.run(within(30, main))
    assert not alive(ref_of(process.pid))


@pytest.mark.parametrize("why", [errno.ENOSYS, errno.EPERM, errno.EMFILE])
def test_without_pidfds_the_end_is_noticed_all_the_same(
    stable: Stable, run_id: str, why: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = stable.run(run_id)
    asked = 0

    def refuse(_: int) -> int:
        nonlocal asked
        asked += 1
        raise OSError(why, os.strerror(why))

    async def main() -> None:
        held = adopt(ref_of(process.pid))
        assert held is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(held.wait)
            while asked < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert nursery.child_tasks
            process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(os, "pidfd_open", refuse)
    trio.run(within(30, main))
    assert not alive(ref_of(process.pid))


def test_a_number_given_to_another_after_the_adoption_is_not_waited_for(stable: Stable, run_id: str) -> None:
    process = stable.run(run_id)
    ref = ref_of(process.pid)
    held = Adopted(msgspec.structs.replace(ref, start_ticks=ref.start_ticks - 1))

    async def main() -> None:
        assert await held.wait() == UNSEEN

    trio.run(within(30, main))
    assert alive(ref)


def test_waiting_leaves_no_descriptor_behind(stable: Stable, run_id: str) -> None:
    process = stable.run(run_id)

    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        held = adopt(ref_of(process.pid))
        assert held is not None
        for _ in range(5):
            with trio.move_on_after(0):
                await held.wait()
        assert len(os.listdir("/proc/self/fd")) == len(before)

    trio.run(within(30, main))


def test_the_age_is_the_time_since_the_process_was_started(stable: Stable, run_id: str) -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    process = stable.run(run_id)
    ref = ref_of(process.pid)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    first = age_seconds(ref)
    assert -tick <= first <= time.clock_gettime(time.CLOCK_BOOTTIME) - before + tick
    wait_until(lambda: age_seconds(ref) >= first + 0.1, 5, "it grows older")
    assert age_seconds(msgspec.structs.replace(ref, start_ticks=1 << 62)) == 0.0


def within(seconds: float, main: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await main()

    return bounded
