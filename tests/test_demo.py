"""`flow-agent demo` as a user calls it, and the parts of it that can be looked at alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from supervisor.demo.flows import EXPECTED, SOURCE
from supervisor.demo.history import Entered, History, table
from supervisor.model import StateType
from tests.servers import clean_environ, processes_with
from tests.waiting import wait_until

CHECKOUT = Path(__file__).parent.parent


def start_demo(python: Path, folder: Path) -> subprocess.Popen[str]:
    """The command, with its temporary folder below `folder`; its output goes to folder/output."""
    environ = clean_environ(TMPDIR=str(folder), PYTHONPATH=str(CHECKOUT))
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "supervisor", "demo", "--python", str(python)],
            env=environ,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def assert_nothing_is_left(folder: Path) -> None:
    """Whatever the demo starts inherits its TMPDIR or has it for a home."""
    left = [process for process in processes_with("TMPDIR", str(folder)) if process.is_running()]
    assert not left, [process.cmdline() for process in left]
    assert [path.name for path in folder.iterdir() if path.name != "output"] == []


def test_the_demo_shows_three_runs_ending_as_they_should_and_removes_all(
    engine: Callable[[str], Path], tmp_path: Path
) -> None:
    with start_demo(engine("3.8.8"), tmp_path) as demo:
        code = demo.wait(240)
    said = (tmp_path / "output").read_text()
    assert code == 0, said
    shown = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(tuple(EXPECTED))}
    assert {name: row[0] for name, row in shown.items()} == {
        "quick": "Completed",
        "failing": "Failed",
        "endless": "Cancelled",
    }
    assert all(float(row[1]) > 0 and float(row[3]) > 0 for row in shown.values()), said
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_removes_all(
    engine: Callable[[str], Path], tmp_path: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "output"
    moment = "endless  Running" if signum == signal.SIGTERM else "starting a Prefect server"
    with start_demo(engine("3.8.8"), tmp_path) as demo:
        wait_until(lambda: moment in output.read_text(), 240, f"the demo says {moment}", more=output.read_text)
        demo.send_signal(signum)
        assert demo.wait(60) == 1, output.read_text()
    assert f"{signum.name}: ending early and removing everything" in output.read_text()
    assert_nothing_is_left(tmp_path)


def test_a_server_that_cannot_start_is_told_with_its_last_words(engine: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && {{ echo "no database for you"; exit 3; }}\nexec {engine("3.8.8")} "$@"\n'
    )
    broken.chmod(0o755)
    folder = tmp_path / "demo"
    folder.mkdir()
    with start_demo(broken, folder) as demo:
        code = demo.wait(60)
    said = (folder / "output").read_text()
    assert code == 1
    assert "cannot start a Prefect server" in said
    assert "exited with code 3" in said
    assert "no database for you" in said
    assert_nothing_is_left(folder)


def test_a_python_of_another_generation_is_refused_in_words(engine: Callable[[str], Path], tmp_path: Path) -> None:
    with start_demo(engine("2.20.26"), tmp_path) as demo:
        code = demo.wait(60)
    assert code == 1
    assert "it has Prefect 2.20.26 and the demo's server is a Prefect 3" in (tmp_path / "output").read_text()
    assert_nothing_is_left(tmp_path)


def test_a_python_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with start_demo(Path("/no/such/python"), tmp_path) as demo:
        code = demo.wait(60)
    assert code == 1
    assert "cannot run flows with '/no/such/python'" in (tmp_path / "output").read_text()


def test_the_flows_of_the_demo_are_those_in_the_examples() -> None:
    assert (CHECKOUT / "examples" / "flows.py").read_text() == SOURCE


def test_the_table_shows_what_is_known_of_each_run() -> None:
    created = datetime(2026, 1, 1, tzinfo=UTC)

    def entered(kind: str, name: str, after: float) -> Entered:
        return Entered(StateType(kind), name, created + timedelta(seconds=after))

    running = entered("RUNNING", "Running", 1.5)
    done = History("done", created, (entered("PENDING", "Pending", 1), running, entered("COMPLETED", "Completed", 4)))
    never = History("never", created, (entered("PENDING", "Pending", 1), entered("CRASHED", "Crashed", 2)))
    assert table([done, History("stuck", created, (running,)), never, History("new", created, ())]) == [
        "flow   ended as              started after  ran for",
        "done   Completed             1.50 s         2.50 s",
        "stuck  not ended (Running)   1.50 s         -",
        "never  Crashed               -              -",
        "new    not ended (no state)  -              -",
    ]
