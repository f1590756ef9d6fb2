"""The state directory and its lock."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.errors import ConfigError, StateDirectoryHeld
from supervisor.statedir import StateDirectory

HOLD = """
import sys, pathlib
from supervisor.statedir import StateDirectory
with StateDirectory(pathlib.Path(sys.argv[1]), name="the first"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another agent that holds the directory until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_it_is_made_when_missing_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with StateDirectory(path, name="me") as state:
        assert state.work.is_dir()
        assert not stat.S_IMODE(path.stat().st_mode) & 0o027
        assert (path / "lock").read_text() == f"{os.getpid()} me\n"


def test_a_second_agent_is_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        with pytest.raises(StateDirectoryHeld) as refused, StateDirectory(tmp_path, name="me"):
            pass
        assert str(refused.value) == (
            f"cannot use the state directory {tmp_path}: flow-agent 'the first' (pid {first.pid}) is using it; "
            "stop it or set agent.state_dir"
        )
        first.communicate()


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_it_is_free_again_when_its_agent(tmp_path: Path, how: str) -> None:
    with holder(tmp_path) as first:
        if how == "is killed":
            first.send_signal(signal.SIGKILL)
        first.communicate()
    with StateDirectory(tmp_path, name="me"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} me\n"


def test_the_same_process_may_take_it_again_after_it_let_go(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, name="me"):
        pass
    with StateDirectory(tmp_path, name="a longer name than before"):
        pass
    with StateDirectory(tmp_path, name="me"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} me\n"


def test_a_child_that_outlives_the_agent_does_not_hold_the_lock(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, name="me"):
        child = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False, check=True
        )
    assert "pipe:" in child.stdout
    assert str(tmp_path / "lock") not in child.stdout


def test_leftover_directories_of_dead_agents_are_removed(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one" / "deep").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "deep" / "file").write_text("x")
    (tmp_path / "runs" / "stray file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    with StateDirectory(tmp_path, name="me") as state:
        state.sweep(keep=set())
        assert list(state.work.iterdir()) == []
    assert (tmp_path / "elsewhere").is_dir()


def test_the_directory_of_a_run_that_goes_on_is_kept(tmp_path: Path) -> None:
    for run in ("open", "over"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    with StateDirectory(tmp_path, name="me") as state:
        state.sweep(keep={"open"})
        assert [left.name for left in state.work.iterdir()] == ["open"]


def test_a_directory_in_which_somebody_still_works_is_left_alone(tmp_path: Path) -> None:
    busy = tmp_path / "runs" / "busy" / "inside"
    busy.mkdir(parents=True)
    (tmp_path / "runs" / "idle").mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=busy) as worker:
        with StateDirectory(tmp_path, name="me") as state:
            state.sweep(keep=set())
            assert [left.name for left in state.work.iterdir()] == ["busy"]
        worker.communicate(b"\n")


def test_a_path_that_cannot_be_a_directory_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot use the state directory .*file/state: Not a directory; give"):
        StateDirectory(tmp_path / "file" / "state", name="me").__enter__()
    with pytest.raises(ConfigError, match="cannot use the state directory /proc/flow-agent"):
        StateDirectory(Path("/proc/flow-agent"), name="me").__enter__()
