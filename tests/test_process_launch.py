"""supervisor/process/launch.py: real children, what they inherit, how they are waited for, and their folders."""

from __future__ import annotations

import gc
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from supervisor.errors import JobError
from supervisor.lifecycle import Exit
from supervisor.process.cgroup import RunGroup
from supervisor.process.launch import Child, launch, private_directory, remove_directory
from supervisor.process.reaper import reap
from supervisor.process.ref import alive, identify
from tests.waiting import wait_until

ENV = {"PATH": os.environ["PATH"], "ONLY": "this"}


async def python(script: str, folder: Path, **env: str) -> Child:
    return await launch([sys.executable, "-c", script], env=ENV | env, cwd=folder, output=folder / "output")


def said(folder: Path) -> str:
    return (folder / "output").read_text()


def open_files() -> set[str]:
    return {f"{fd}" for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def test_a_child_has_its_own_session_no_input_and_exactly_its_environment(tmp_path: Path) -> None:
    script = (
        "import json, os, sys\n"
        "print(json.dumps([os.getpid(), os.getsid(0), os.getpgid(0), sys.stdin.read(), dict(os.environ), os.getcwd(),"
        " sorted(map(int, os.listdir('/proc/self/fd')))]))\n"
    )

    async def main() -> None:
        read, write = os.pipe()
        stdin_of_ours = os.dup(0)
        os.set_inheritable(write, True)
        os.dup2(read, 0)  # a child that had our input would wait for it for ever
        try:
            child = await python(script, tmp_path)
            with trio.fail_after(30):
                assert await child.wait() == Exit(code=0)
        finally:
            os.dup2(stdin_of_ours, 0)
            for descriptor in (read, write, stdin_of_ours):
                os.close(descriptor)
        pid, session, group, stdin, environ, cwd, descriptors = json.loads(said(tmp_path))
        assert pid == session == group == child.ref.pid
        assert stdin == ""
        assert {name: environ[name] for name in ENV} == ENV
        assert environ.keys() - ENV.keys() <= {"LC_CTYPE"}  # Python's own doing in the C locale
        assert cwd == os.fspath(tmp_path)
        assert [fd for fd in descriptors if fd > 2] == descriptors[3:4]  # the one that lists the folder

    trio.run(main)


def test_output_is_appended_to_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    async def main() -> None:
        for word in ("first", "second"):
            child = await python(f"import sys; print({word!r}); print('error', file=sys.stderr)", tmp_path)
            await child.wait()

    old = os.umask(0)
    try:
        trio.run(main)
    finally:
        os.umask(old)
    assert sorted(said(tmp_path).split()) == ["error", "error", "first", "second"]
    assert said(tmp_path).index("first") < said(tmp_path).index("second")
    assert stat.S_IMODE((tmp_path / "output").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("", Exit(code=0)),
        ("raise SystemExit(7)", Exit(code=7)),
        ("import os; os.kill(os.getpid(), 9)", Exit(signal=9)),
        ("import os; os.kill(os.getpid(), 15)", Exit(signal=15)),
    ],
)
def test_the_way_it_ended_is_told_to_everybody_who_waits(tmp_path: Path, script: str, how: Exit) -> None:
    async def main() -> None:
        child = await python(script, tmp_path)
        heard = []

        async def listen() -> None:
            heard.append(await child.wait())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(listen)
        assert [*heard, await child.wait()] == [how] * 4
        assert not alive(child.ref)

    trio.run(main)


def test_the_kernel_wakes_us_when_it_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_sleep(_: float) -> None:
        raise AssertionError("it polls")

    async def main() -> None:
        child = await python("import time; time.sleep(60)", tmp_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.wait)
                await trio.testing.wait_all_tasks_blocked()
                psutil.Process(child.ref.pid).kill()
            assert await child.wait() == Exit(signal=9)

    monkeypatch.setattr("trio.sleep", no_sleep)
    trio.run(main)


@contextmanager
def oom_score(score: int) -> Iterator[None]:
    """Our own, as a unit would set it."""
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    own.write_text(str(score))
    try:
        yield
    finally:
        own.write_text(before)


@pytest.fixture
def spared(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """We are spared when memory runs out; the score of everybody else. Who may not go below 0 plays it a step higher."""
    try:
        with oom_score(-500):
            yield 0
    except PermissionError:
        monkeypatch.setattr("supervisor.process.launch._OOM_SCORE", 200)
        with oom_score(100):
            yield 200


SCORES = "import os, subprocess; os.system('cat /proc/self/oom_score_adj; ' * 2); print(open('/proc/self/oom_score_adj').read())"


@pytest.mark.parametrize("grouped", [False, True])
def test_a_child_is_not_spared_with_us_when_memory_runs_out_nor_are_its_children(
    tmp_path: Path, spared: int, grouped: bool
) -> None:
    group = RunGroup(tmp_path / "group", tmp_path) if grouped else None

    async def main() -> None:
        output = tmp_path / "output"
        child = await launch([sys.executable, "-c", SCORES], env=ENV, cwd=tmp_path, output=output, group=group)
        assert await child.wait() == Exit(code=0)
        assert said(tmp_path).split() == [str(spared)] * 3
        assert not grouped or (tmp_path / "group" / "cgroup.procs").read_text() == f"{child.ref.pid}\n"

    trio.run(main)


def test_a_child_that_no_shell_can_start_is_not_spared_either(tmp_path: Path, spared: int) -> None:
    async def main() -> None:
        os.mkfifo(tmp_path / "gate")
        child = await python(f"open('gate').read(); {SCORES}", tmp_path, **{"not.a.name": "1"})
        (tmp_path / "gate").write_text("go on")
        assert await child.wait() == Exit(code=0)
        assert said(tmp_path).split() == [str(spared)] * 3

    trio.run(main)


def test_a_score_that_is_worse_for_us_is_worse_for_our_children(tmp_path: Path) -> None:
    async def main() -> None:
        with oom_score(300):
            child = await python(SCORES, tmp_path)
            await child.wait()
        assert said(tmp_path).split() == ["300"] * 3

    trio.run(main)


def test_waiting_can_be_given_up_and_the_child_lives_on(tmp_path: Path) -> None:
    async def main() -> None:
        os.mkfifo(tmp_path / "gate")
        child = await python("print(open('gate').read())", tmp_path)
        with trio.move_on_after(0.05) as given_up:
            await child.wait()
        assert given_up.cancelled_caught
        assert alive(child.ref)
        (tmp_path / "gate").write_text("go on")
        assert await child.wait() == Exit(code=0)
        assert "go on" in said(tmp_path)

    trio.run(main)


def test_a_child_that_ended_before_it_was_looked_at_still_has_an_identity(tmp_path: Path) -> None:
    async def main() -> None:
        for _ in range(20):
            child = await launch(["/bin/true"], env=ENV, cwd=tmp_path, output=tmp_path / "output")
            assert child.ref.start_ticks > 0
            assert await child.wait() == Exit(code=0)
            assert identify(child.ref.pid) != child.ref

    trio.run(main)


def test_the_status_of_a_child_is_not_thrown_away_with_those_of_strangers(tmp_path: Path) -> None:
    async def main() -> None:
        child = await python("raise SystemExit(7)", tmp_path)
        await trio.to_thread.run_sync(lambda: wait_until(lambda: not alive(child.ref), 30, "ended"))
        assert child.ref not in reap()
        assert await child.wait() == Exit(code=7)

    trio.run(main)


def test_cancelled_or_refused_starts_leave_no_descriptor_and_no_child(tmp_path: Path) -> None:
    async def main() -> None:
        await (await python("", tmp_path)).wait()  # trio's threads and whatever is opened once
        before = open_files()
        for _ in range(5):
            await (await python("", tmp_path)).wait()
            with pytest.raises(JobError):
                await launch(["/nowhere/at/all"], env=ENV, cwd=tmp_path, output=tmp_path / "output")
            with trio.CancelScope() as scope:
                scope.cancel()
                await launch(["/bin/true"], env=ENV, cwd=tmp_path, output=tmp_path / "output")
        gc.collect()
        assert open_files() == before

    children = set(psutil.Process().children())  # the session's servers, perhaps
    trio.run(main)
    assert set(psutil.Process().children()) <= children


# Variables that one shell or another drops or gives a value of its own.
ODD = {"odd.name": "1", "0": "2", "IFS": "3", "PWD": "/4", "OPTIND": "5", "SHLVL": "6", "_": "7", "PPID": "8", "": "9"}


@pytest.mark.parametrize("name", [None, *ODD])
def test_a_child_in_a_group_has_exactly_its_environment_too(tmp_path: Path, name: str | None) -> None:
    env = ENV | {"QUOTES": "'\"$(true)`\\\n ", "EMPTY": "", "NEITHER": "\udcff"}
    if name is not None:
        env[name] = ODD[name]
    script = (
        "import json, os; print(json.dumps([dict(os.environ), os.getsid(0), os.getpid(), os.listdir('/proc/self/fd')]))"
    )

    async def main() -> None:
        group = RunGroup(tmp_path / "group", tmp_path)
        argv = [sys.executable, "-S", "-c", script]
        child = await launch(argv, env=env, cwd=tmp_path, output=tmp_path / "output", group=group)
        assert await child.wait() == Exit(code=0), said(tmp_path)
        environ, session, pid, descriptors = json.loads(said(tmp_path))
        # The locale is Python's own doing; a bash in the place of sh says in `_` what it has started.
        assert environ.keys() - env.keys() <= {"LC_CTYPE", "_"}
        assert {key: environ[key] for key in env} == env
        assert session == pid == child.ref.pid
        assert (tmp_path / "group" / "cgroup.procs").read_text().strip() == str(pid)
        assert sorted(map(int, descriptors))[:-1] == [0, 1, 2]

    trio.run(main)


@pytest.fixture(params=["with a group", "without"])
def grouped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "with a group")


def refusal(
    folder: Path, *argv: str, cwd: Path | None = None, env: dict[str, str] | None = None, grouped: bool = False
) -> str:
    group = RunGroup(folder / "group", folder) if grouped else None

    async def main() -> None:
        await launch(argv, env=env or ENV, cwd=cwd or folder, output=folder / "output", group=group)

    with pytest.raises(JobError) as caught:
        trio.run(main)
    return str(caught.value)


def test_what_cannot_be_started_is_said_in_words(tmp_path: Path, grouped: bool) -> None:
    refused = partial(refusal, tmp_path, grouped=grouped)
    plain = tmp_path / "plain"
    plain.write_text("")
    script = tmp_path / "script"  # as in a virtual environment whose Python has been removed
    script.write_text("#!/nowhere/python -u\n")
    script.chmod(0o755)
    missing = "No such file or directory"
    assert refused("/nowhere/python") == f"cannot start '/nowhere/python': {missing}"
    assert refused("no-such-program") == f"cannot start 'no-such-program': {missing}"
    assert refused("./no-such-program") == f"cannot start './no-such-program': {missing}"
    assert refused(str(script)) == f"cannot start '{script}': {missing}"
    assert refused(str(plain)) == f"cannot start '{plain}': Permission denied"
    assert refused("plain", env={"PATH": f"/nowhere:{tmp_path}"}) == "cannot start 'plain': Permission denied"
    assert refused("/usr") == "cannot start '/usr': Permission denied"
    for program in ("true", "./true"):
        assert refused(program, cwd=tmp_path / "gone") == (
            f"cannot start '{program}' in '{tmp_path / 'gone'}': No such file or directory"
        )
    assert refused() == "cannot start the run: its command is empty"
    assert "null byte" in refused("true", "a\0b")
    assert "null byte" in refused("true", env=ENV | {"A": "a\0b"})
    assert "illegal environment variable name" in refused("true", env=ENV | {"A=B": "c"})


@pytest.mark.parametrize("program", ["true", "/bin/true", "./here", "here"])
def test_what_can_be_started_is_started_in_a_group_too(tmp_path: Path, grouped: bool, program: str) -> None:
    script = tmp_path / "here"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    group = RunGroup(tmp_path / "group", tmp_path) if grouped else None

    async def main() -> None:
        env = {"PATH": f"{tmp_path / 'nowhere'}:.:{os.environ['PATH']}"}
        child = await launch([program], env=env, cwd=tmp_path, output=tmp_path / "output", group=group)
        assert await child.wait() == Exit(code=0)
        assert said(tmp_path) == ""

    trio.run(main)


def test_output_that_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "output").symlink_to("/etc/passwd")
    said = refusal(tmp_path, "true")
    assert said.startswith(f"cannot write the run's output to '{tmp_path / 'output'}'")


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_private_directory_is_the_runs_own_and_found_again(tmp_path: Path) -> None:
    first = private_directory(tmp_path / "made" / "too", "run-1")
    (first / "code").touch()
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert private_directory(tmp_path / "made" / "too", "run-1") == first
    assert (first / "code").exists()
    assert private_directory(tmp_path / "made" / "too", "run-2") != first


def test_a_directory_that_somebody_else_has_put_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run-1").symlink_to("/etc")
    with pytest.raises(JobError, match="it is a link or another user's"):
        private_directory(tmp_path, "run-1")
    (tmp_path / "run-2").touch()
    with pytest.raises(JobError, match="remove it"):
        private_directory(tmp_path, "run-2")
    with pytest.raises(JobError, match="cannot make the working directory"):
        private_directory(tmp_path / "run-2", "run-3")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach and write, which those of pytest are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture
def other_user() -> Iterator[None]:
    """Permissions mean nothing to root: as root, be somebody else for the length of a test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_directory_is_removed_whatever_permissions_the_flow_gave_it(open_folder: Path, other_user: None) -> None:
    kept = open_folder / "kept"
    kept.mkdir(mode=0o500)
    top = open_folder / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "link").symlink_to(kept)
    (top / "a" / "b" / "file").write_text("x")
    (top / "a" / "b" / "file").chmod(0o400)
    (top / "a" / "b").chmod(0o500)
    (top / "a").chmod(0)
    trio.run(remove_directory, top)
    assert not top.exists()
    trio.run(remove_directory, top)  # gone already
    assert stat.S_IMODE(kept.stat().st_mode) == 0o500  # a link is no way to change what it points to


def test_links_are_removed_and_never_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o500)
    (kept / "file").touch()
    top = tmp_path / "top"
    top.mkdir()
    (top / "link").symlink_to(kept)
    (top / "dangling").symlink_to("/nowhere")
    trio.run(remove_directory, top)
    assert not top.exists()
    assert (kept / "file").exists()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o500
    assert caplog.text == ""
    top.symlink_to(kept)
    trio.run(remove_directory, top)
    assert (kept / "file").exists()
    assert "cannot remove the working directory" in caplog.text
