"""supervisor/process/cgroup.py: where we are, what is ours, and one run's group; with real groups wherever it can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from supervisor.errors import ConfigError
from supervisor.lifecycle import Exit
from supervisor.process.cgroup import Cgroups, RunGroup, delegated, own_directory
from supervisor.process.environ import MARK
from supervisor.process.launch import Child, launch
from supervisor.process.ref import alive
from supervisor.process.stop import end
from tests.groups import group_of_our_own, need_groups
from tests.waiting import wait_until

# --- where we are -----------------------------------------------------------------------------------------------------

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
UNIFIED = "35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
CONTAINER = "35 24 0:30 /docker/abc /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
V1_ONLY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
BLANKS = r"35 24 0:30 / /odd\040place rw - cgroup2 cgroup2 rw" + "\n"
SERVICE = "0::/system.slice/flow-agent.service\n"


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "where"),
    [
        pytest.param(HYBRID, "4:memory:/x\n0::/\n", "/sys/fs/cgroup/unified", id="beside v1"),
        pytest.param(UNIFIED, SERVICE, "/sys/fs/cgroup/system.slice/flow-agent.service", id="a service"),
        pytest.param(CONTAINER, "0::/docker/abc/agent\n", "/sys/fs/cgroup/agent", id="a part of the tree"),
        pytest.param(CONTAINER, "0::/docker/abcdef\n", None, id="outside of the part that is shown"),
        pytest.param(UNIFIED, "0::/../other\n", None, id="outside of our namespace"),
        pytest.param(V1_ONLY, "4:memory:/x\n", None, id="v1 only"),
        pytest.param(V1_ONLY, SERVICE, None, id="v2 not mounted"),
        pytest.param(BLANKS, "0::/a b\n", "/odd place/a b", id="blanks in names"),
        pytest.param("", "", None, id="no /proc"),
    ],
)
def test_our_own_group_is_found(mountinfo: str, cgroup: str, where: str | None) -> None:
    assert own_directory(mountinfo, cgroup) == (Path(where) if where else None)


def test_a_folder_that_is_ours_like_all_around_it_is_not_taken_for_delegated(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "cgroup.procs").touch()
    assert not delegated(tmp_path / "group")
    assert not delegated(tmp_path / "nowhere")


# --- what is ours -----------------------------------------------------------------------------------------------------


@pytest.fixture
def top() -> Iterator[Path]:
    """A real group to play in."""
    with group_of_our_own() as path:
        yield path


AGENT = """
import json, os, pathlib, sys
from supervisor.process.cgroup import Cgroups
here, user = sys.argv[1:]
pathlib.Path(here, "cgroup.procs").write_text("0")
if int(user):
    os.setresgid(int(user), int(user), int(user))
    os.setresuid(int(user), int(user), int(user))
found = Cgroups.find()
own = [line for line in open("/proc/self/cgroup") if line.startswith("0::")][0].strip()
print(json.dumps([str(found.own) if found else None, own.rpartition("/")[2], found.runs() if found else []]))
"""


def agent_in(group: Path, *, user: int = 0) -> tuple[str | None, str, list[str]]:
    """What an agent finds that is started in that group, where it is afterwards, and which runs it sees."""
    done = subprocess.run(
        [sys.executable, "-c", AGENT, str(group), str(user)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    own, name, runs = json.loads(done.stdout)
    return own, name, runs


def test_a_group_that_nobody_gave_us_is_left_alone(top: Path) -> None:
    assert agent_in(top) == (None, top.name, [])
    assert not (top / "runs").exists()
    os.setxattr(top, "user.delegate", b"0")
    assert agent_in(top) == (None, top.name, [])


@pytest.mark.parametrize("by", ["trusted.delegate", "user.delegate"])
def test_a_delegated_group_is_used_and_the_runs_in_it_are_found_again(top: Path, by: str) -> None:
    os.setxattr(top, by, b"1")
    assert agent_in(top) == (str(top), "supervisor", [])
    with subprocess.Popen(["sleep", "60"]) as run:
        group = Cgroups(top).group("run-1")
        assert group.create()
        assert group.add(run.pid)
        assert agent_in(top) == (str(top), "supervisor", ["run-1"])  # restarted while the run lives
        assert agent_in(top / "supervisor") == (
            str(top),
            "supervisor",
            ["run-1"],
        )  # DelegateSubgroup=, or executed anew
        assert group.pids() == [run.pid]
        assert group.kill()
        assert run.wait() == -9


def test_everything_that_was_in_the_delegated_group_moves_with_the_agent(top: Path) -> None:
    os.setxattr(top, "trusted.delegate", b"1")
    with subprocess.Popen(["sleep", "60"]) as parent:  # a packed binary's own parent
        (top / "cgroup.procs").write_text(str(parent.pid))
        assert agent_in(top)[1] == "supervisor"
        assert (top / "cgroup.procs").read_text() == ""
        assert (top / "supervisor" / "cgroup.procs").read_text().split() == [str(parent.pid)]
        parent.kill()


def test_a_group_of_ours_below_somebody_elses_is_used_without_being_root(top: Path) -> None:
    need_groups(possible=os.geteuid() == 0)
    for path in (top, top / "cgroup.procs", top / "cgroup.subtree_control"):
        os.chown(path, 65534, 65534)
    assert agent_in(top, user=65534) == (str(top), "supervisor", [])
    assert agent_in(top, user=65533) == (None, top.name, [])


def test_no_controller_is_enabled_where_systemd_must_start_us_again_while_runs_live(tmp_path: Path) -> None:
    """A group that hands controllers down may hold no process (EBUSY): a restart that keeps its runs would fail."""
    Cgroups(tmp_path).prepare(controllers=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
    Cgroups(tmp_path).prepare(controllers=True)
    for group in (tmp_path, tmp_path / "runs"):
        assert (group / "cgroup.subtree_control").read_text() == "+pids"  # the last of them; in a real one they add up


def test_what_the_user_asks_for_is_taken_or_refused_in_words(top: Path, tmp_path: Path) -> None:
    assert Cgroups.find("off") is None
    found = Cgroups.find(str(top / "made"))
    assert found is not None
    assert found.runs() == []
    assert found.group("run-1").path == top / "made" / "runs" / "run-1"
    with pytest.raises(ConfigError, match=r"cannot use the control group '.*': it is not in a cgroup v2 file system"):
        Cgroups.find(str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match="it must be 'auto', 'off' or an absolute path"):
        Cgroups.find("relative")
    with pytest.raises(ConfigError, match="cannot use the control group '/proc/nowhere': No such file or directory"):
        Cgroups.find("/proc/nowhere")


# --- one run's group --------------------------------------------------------------------------------------------------


async def python(script: str, folder: Path, group: RunGroup, **env: str) -> Child:
    env = {"PATH": os.environ["PATH"], MARK: folder.name} | env
    return await launch([sys.executable, "-S", "-c", script], env=env, cwd=folder, output=folder / "out", group=group)


def said(folder: Path) -> list[str]:
    return (folder / "out").read_text().splitlines()


@pytest.mark.parametrize("odd", [{}, {"odd.name": "x"}])
def test_a_process_is_in_its_group_and_stays_itself(top: Path, tmp_path: Path, odd: dict[str, str]) -> None:
    group = Cgroups(top).group("run-1")
    script = "import os; print(os.getpid(), os.getsid(0)); print(open('/proc/self/cgroup').read())"

    async def main() -> None:
        # With a variable that no shell hands on it is moved a moment after its start; so let it start slowly.
        slow = "import time\nwhile 'run-1' not in open('/proc/self/cgroup').read(): time.sleep(0.01)\n" if odd else ""
        child = await python(slow + script, tmp_path, group, **odd)
        with trio.fail_after(60):
            assert await child.wait() == Exit(code=0)
        assert said(tmp_path)[0] == f"{child.ref.pid} {child.ref.pid}"
        assert f"0::/{top.name}/runs/run-1" in said(tmp_path)

    trio.run(main)
    assert not group.populated()
    assert group.remove()


def test_a_group_that_cannot_be_made_costs_the_run_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    group = RunGroup(tmp_path / "file" / "run-1", tmp_path)

    async def main() -> None:
        child = await python("print('ran')", tmp_path, group)
        assert await child.wait() == Exit(code=0)

    trio.run(main)
    assert said(tmp_path) == ["ran"]
    assert "cannot make the control group" in caplog.text
    assert group.pids() == []
    assert not group.populated()
    assert not group.kill()
    assert group.oom_kills() is None


def test_a_group_is_known_with_those_that_the_run_has_made_below(top: Path, tmp_path: Path) -> None:
    group = Cgroups(top).group("run-1")
    script = """
import os, sys, time
deep = sys.argv[1] if len(sys.argv) > 1 else os.environ["DEEP"]
os.makedirs(deep)
if os.fork() == 0:
    open(deep + "/cgroup.procs", "w").write(str(os.getpid()))
    print("deep", flush=True)
time.sleep(600)
"""

    async def main() -> None:
        child = await python(script, tmp_path, group, DEEP=str(group.path / "a" / "b"))
        await trio.to_thread.run_sync(lambda: wait_until(lambda: "deep" in said(tmp_path), 30, "deep"))
        assert len(group.pids()) == 2
        assert group.populated()
        assert not group.remove()  # somebody is in it
        with trio.move_on_after(0.05) as waiting:
            await group.wait_empty()
        assert waiting.cancelled_caught
        assert group.kill()
        with trio.fail_after(60):
            await group.wait_empty()
            assert await child.wait() == Exit(signal=9)
        assert group.pids() == []
        assert group.remove()
        assert not group.path.exists()
        assert group.remove()  # gone already

    trio.run(main)


class OldKernel(RunGroup):
    """Before 5.14 there was no cgroup.kill. Remembers how it was held still instead."""

    def __init__(self, path: Path, service: Path) -> None:
        super().__init__(path, service)
        self.frozen: list[str] = []

    def kill(self) -> bool:
        return False

    def freeze(self, frozen: bool) -> None:
        super().freeze(frozen)
        self.frozen.append((self.path / "cgroup.freeze").read_text().strip())


def test_without_cgroup_kill_a_bomb_is_held_still_and_shot(top: Path, tmp_path: Path) -> None:
    group = OldKernel(top / "runs" / "run-1", top)
    script = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for n in range(60):
    if os.fork() == 0:
        os.setsid()
        break
    print("born", flush=True)
    time.sleep(0.005)
time.sleep(600)
"""

    async def main() -> None:
        child = await python(script, tmp_path, group)
        await trio.to_thread.run_sync(lambda: wait_until(lambda: len(said(tmp_path)) > 4, 30, "born", every=0.01))
        await end(child.ref, tmp_path.name, grace=0, group=group)
        assert group.frozen[:2] == ["1", "0"]
        assert not group.populated()
        assert not alive(child.ref)
        assert await child.wait() == Exit(signal=9)
        assert group.remove()

    trio.run(main)


class Hidden(RunGroup):
    """Somebody lives here whom our /proc does not show: he is in another pid namespace, and dies slowly."""

    looks_after_kill = -1

    def kill(self) -> bool:
        self.looks_after_kill = max(0, self.looks_after_kill)
        return True

    def populated(self) -> bool:
        if self.looks_after_kill >= 0:
            self.looks_after_kill += 1
        return self.looks_after_kill < 3


def test_a_run_has_not_ended_before_the_kernel_says_that_its_group_is_empty(tmp_path: Path) -> None:
    group = Hidden(tmp_path, tmp_path)

    async def main() -> None:
        assert await end(None, tmp_path.name, grace=0, group=group) == 0

    trio.run(main)
    assert group.looks_after_kill == 3


def test_oom_kills_are_read_from_the_runs_own_group_or_else_from_all(tmp_path: Path) -> None:
    """Recorded files: where this is tested, the memory controller may belong to cgroup v1."""
    own = tmp_path / "runs" / "run-1"
    own.mkdir(parents=True)
    service, run = tmp_path / "memory.events", own / "memory.events"
    recorded = "low 0\nhigh 0\nmax 31\noom 2\noom_kill {}\noom_group_kill 0\n"
    assert RunGroup(own, tmp_path).oom_kills() is None  # nobody counts
    service.write_text(recorded.format(3))
    group = RunGroup(own, tmp_path)
    assert group.oom_kills() == 0
    service.write_text(recorded.format(5))
    assert group.oom_kills() == 2
    run.write_text(recorded.format(1))
    assert group.oom_kills() == 1
    run.write_text(recorded.format(0))
    assert group.oom_kills() == 0  # somebody else's, then
