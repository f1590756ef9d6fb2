"""supervisor/process/interpreter.py: what a Python says of its Prefect, and the sentences for those that have none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor.errors import InterpreterError
from supervisor.process.brand import birth, brand
from supervisor.process.interpreter import Interpreter, Interpreters, inspect


def fake_python(folder: Path, script: str) -> Path:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def python_with(folder: Path, **versions: str) -> Path:
    """A Python that imports from `folder`, where distributions of these versions stand."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    return fake_python(folder, f'echo asked >> "{folder}/count"; PYTHONPATH="{folder}" exec "{sys.executable}" "$@"')


def asked(folder: Path) -> int:
    return (folder / "count").read_text().count("asked")


def refusal(python: Path) -> str:
    with pytest.raises(InterpreterError) as caught:
        trio.run(inspect, python)
    return str(caught.value)


@pytest.mark.parametrize(
    ("version", "numbers", "channel"),
    [
        ("2.20.26", (2, 20, 26), False),
        ("3.4.25", (3, 4, 25), False),
        ("3.6.26", (3, 6, 26), False),
        ("3.6.27", (3, 6, 27), True),
        ("3.7.0rc1", (3, 7, 0), True),
        ("3.8.8.dev3+12.gabcdef", (3, 8, 8), True),
        ("4.0", (4, 0), True),
        ("unknown", (0,), False),
    ],
)
def test_the_version_tells_what_the_engine_can_do(version: str, numbers: tuple[int, ...], channel: bool) -> None:
    interpreter = Interpreter(Path("/python"), version)
    assert interpreter.version == numbers
    assert interpreter.has_control_channel is channel
    assert interpreter.runs_own_hooks is channel


def test_a_python_with_prefect_says_which(tmp_path: Path) -> None:
    python = python_with(tmp_path, prefect="3.8.8")
    assert trio.run(inspect, python) == Interpreter(python, "3.8.8")


def test_prefect_client_counts_as_prefect(tmp_path: Path) -> None:
    assert trio.run(inspect, python_with(tmp_path, prefect_client="3.4.25")).prefect_version == "3.4.25"


def test_a_python_without_prefect_says_how_to_install_it() -> None:
    said = refusal(Path(sys.executable))
    assert "has no Prefect" in said
    assert f"{sys.executable} -m pip install prefect" in said


def test_the_agents_own_python_variables_do_not_reach_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_with(tmp_path, prefect="3.8.8")
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    assert "has no Prefect" in refusal(Path(sys.executable))


def test_what_a_sitecustomize_prints_does_not_disturb_the_answer(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('hello {} from the site', end='')")
    assert trio.run(inspect, python_with(tmp_path, prefect="2.20.26")).prefect_version == "2.20.26"


def test_a_missing_python_is_said_so(tmp_path: Path) -> None:
    assert "there is no such file; set flows.python" in refusal(tmp_path / "python")


def test_a_folder_and_a_file_without_permission_are_told_apart(tmp_path: Path) -> None:
    assert "it is a folder" in refusal(tmp_path)
    plain = tmp_path / "plain"
    plain.write_text("")
    plain.chmod(0o644)
    assert "it is not executable" in refusal(plain)


def test_a_program_that_is_no_python_is_said_so(tmp_path: Path) -> None:
    assert "is not a Python that works (it exited with code 0)" in refusal(Path("/bin/true"))
    broken = fake_python(tmp_path, "echo 'no such library' >&2; exit 127")
    assert "it exited with code 127: no such library" in refusal(broken)
    text = tmp_path / "text"
    text.write_bytes(b"\x7fnot a program")
    text.chmod(0o755)
    assert "Exec format error" in refusal(text)


def test_a_python_that_never_answers_is_given_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async def main() -> None:
        with pytest.raises(InterpreterError, match="did not say within 30 s"):
            await inspect(fake_python(tmp_path, "exec sleep 600"))

    trio.run(main, clock=autojump_clock)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.2)


def test_an_unchanged_python_is_asked_once_however_many_runs_ask(tmp_path: Path) -> None:
    python = python_with(tmp_path, prefect="3.8.8")
    interpreters = Interpreters()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(interpreters.get, python)
        assert (await interpreters.get(python)).prefect_version == "3.8.8"

    trio.run(main)
    assert asked(tmp_path) == 1


def test_an_upgraded_prefect_is_noticed(tmp_path: Path) -> None:
    python = python_with(tmp_path, prefect="3.8.8")

    async def main() -> None:
        interpreters = Interpreters()
        await interpreters.get(python)
        (tmp_path / "prefect-3.8.8.dist-info").rename(tmp_path / "elsewhere")
        python_with(tmp_path, prefect="3.9.0")
        assert (await interpreters.get(python)).prefect_version == "3.9.0"

    trio.run(main)


def test_a_folder_where_nothing_is_installed_may_change(tmp_path: Path) -> None:
    project = tmp_path / "project"
    site = tmp_path / "site"
    for folder in (project, site):
        folder.mkdir()
    python = python_with(site, prefect="3.8.8")
    python.write_text(python.read_text().replace(f'PYTHONPATH="{site}"', f'PYTHONPATH="{site}:{project}"'))

    async def main() -> None:
        interpreters = Interpreters()
        first = await interpreters.get(python)
        (project / "result.csv").write_text("1,2")
        assert await interpreters.get(python) is first
        project.rename(tmp_path / "release-1")  # as the next release takes its place
        project.mkdir()
        assert await interpreters.get(python) is not first

    trio.run(main)
    assert asked(site) == 2


def test_a_python_that_hangs_does_not_keep_others_from_being_asked(tmp_path: Path) -> None:
    (tmp_path / "hung").mkdir()
    hung = fake_python(tmp_path / "hung", "exec sleep 600")
    python = python_with(tmp_path, prefect="3.8.8")

    async def main() -> None:
        interpreters = Interpreters()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interpreters.get, hung)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(20):
                assert (await interpreters.get(python)).prefect_version == "3.8.8"
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_question_is_asked_without_the_brand_of_a_run_that_is_being_started(tmp_path: Path) -> None:
    python = python_with(tmp_path, prefect="3.8.8")
    python.write_text(
        python.read_text().replace("#!/bin/sh", f'#!/bin/sh\ngrep "file locks" /proc/self/limits > "{tmp_path}/limit"')
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery, birth("a run"):
            nursery.start_soon(inspect, python)
            await trio.testing.wait_all_tasks_blocked(0.1)

    trio.run(main)
    assert str(brand("a run")) not in (tmp_path / "limit").read_text()


def test_a_refusal_is_not_kept(tmp_path: Path) -> None:
    python = tmp_path / "python"

    async def main() -> None:
        interpreters = Interpreters()
        with pytest.raises(InterpreterError):
            await interpreters.get(python)
        python_with(tmp_path, prefect="3.8.8")
        assert (await interpreters.get(python)).prefect_version == "3.8.8"

    trio.run(main)
