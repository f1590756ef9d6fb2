"""What the agent does for the sake of being packed, as far as it can be tried without packing it."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor import frozen
from tests.agents import AgentProcess
from tests.servers import Api, PrefectServer
from tests.waiting import lines, wait_until

# Every import that is not answered from memory asks this first.
_LOOKOUT = """
import os, sys
class Lookout:
    def find_spec(self, name, path=None, target=None):
        with open(os.environ["TEST_IMPORTS"], "a") as file:
            file.write(name + "\\n")
if "supervisor" in sys.orig_argv:
    sys.meta_path.insert(0, Lookout())
"""


def test_an_agent_that_is_ready_imports_nothing_more(
    server_3: PrefectServer,
    api_of: Callable[[PrefectServer], Api],
    agent_process: Callable[..., AgentProcess],
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_LOOKOUT)
    imports = tmp_path / "imports.txt"
    api = api_of(server_3)
    pool = api.create_pool()

    def start(flow: str) -> str:
        return api.create_run(api.create_deployment(flow, pool=pool), {"trace": str(tmp_path / flow)})

    environ = {"PYTHONPATH": str(tmp_path), "TEST_IMPORTS": str(imports)}
    agent = agent_process(server_3, [{"pool": pool}], env=environ, output={"show": True})
    seen = len(lines(imports))
    assert "supervisor.app" in lines(imports), "the lookout is awake"
    hello, crash, failing, sleeper = (start(flow) for flow in ("hello", "kill_self", "failing", "sleeper"))
    for run, state in ((hello, "COMPLETED"), (crash, "CRASHED"), (failing, "FAILED")):
        api.wait_for_state(run, state)
    wait_until(lambda: lines(tmp_path / "sleeper"), 60, "the sleeper sleeps")
    api.cancel(sleeper)
    api.wait_for_state(sleeper, "CANCELLED")
    agent.send(signal.SIGHUP)
    agent.wait_for_log("reloaded")
    assert agent.stop() == 0
    assert lines(imports)[seen:] == []


@pytest.fixture
def leave(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder as the start program with that process id leaves one."""

    def make(pid: int, chance: str = "abcdef", *, marked: bool = True, unpacked: float | None = None) -> Path:
        folder = tmp_path / f"_MEI{pid:08x}{chance}"
        (folder / "share").mkdir(parents=True, mode=0o700)
        if marked:
            (folder / "share" / "agent.toml.example").touch()
        if unpacked is not None:
            os.utime(folder, (unpacked, unpacked))
        return folder

    return make


DEAD = 2**22 + 1  # larger than any process id


def test_what_a_killed_start_program_has_left_is_removed(tmp_path: Path, leave: Callable[..., Path]) -> None:
    dead, reused = leave(DEAD), leave(os.getpid(), unpacked=1e9)
    frozen.sweep({tmp_path, tmp_path / "nowhere"}, keep=tmp_path / "ours")
    assert not dead.exists()
    assert not reused.exists(), "the process that unpacked it ended long before the one with its number began"


def test_a_folder_that_is_in_use_or_not_ours_is_left_alone(tmp_path: Path, leave: Callable[..., Path]) -> None:
    alive, held, keep = leave(os.getpid()), leave(DEAD, "held00"), leave(DEAD, "keep00")
    others = [leave(DEAD, "other0", marked=False), tmp_path / "_MEI_of_somebody"]
    others[1].mkdir()
    if os.geteuid() == 0:
        others.append(leave(DEAD, "theirs"))
        os.chown(others[-1], 65534, 65534)
    link = tmp_path / f"_MEI{DEAD:08x}linked"
    link.symlink_to(alive)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        frozen.sweep({tmp_path}, keep=keep)
    finally:
        os.close(lock)
    assert all(folder.exists() for folder in (alive, held, keep, link, *others))


# In the binary that is the agent itself, and no Python.
MAY_NAME_THE_PROGRAM = {
    "cli/runs.py": "a value for a key that must have one; nothing is started",
    "demo/stage.py": "starts the agent, in the way that fits",
    "install/bundle.py": "copies the binary",
    "process/zygote.py": "is the user's Python, and runs there",
}


def test_nobody_takes_the_program_that_runs_us_for_a_python() -> None:
    house = Path(frozen.__file__).parent
    naming = {str(file.relative_to(house)) for file in house.rglob("*.py") if "sys.executable" in file.read_text()}
    assert naming == MAY_NAME_THE_PROGRAM.keys()
