"""supervisor/process/{zygote,forkserver,warm}.py: real fork servers and real copies, of a Prefect that is only played.

What real engines make of being a copy is in the end-to-end tests, which start runs in both ways.
"""

from __future__ import annotations

import ast
import errno
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from supervisor.errors import JobError
from supervisor.lifecycle import Exit
from supervisor.process import forkserver, warm
from supervisor.process.adopt import is_engine
from supervisor.process.brand import brand, brand_of
from supervisor.process.cgroup import RunGroup
from supervisor.process.environ import MARK, STATE_MARK
from supervisor.process.forkserver import Forked, ForkServer, NoCopy, WarmError
from supervisor.process.interpreter import Interpreters
from supervisor.process.reaper import become_subreaper
from supervisor.process.ref import alive, identify, read_stat
from supervisor.process.warm import WarmStarts, Warmth, why_cold
from tests.fake_prefect import fake_prefect
from tests.groups import group_of_our_own
from tests.waiting import lines, wait_until

PYTHON = Path(sys.executable)
BASE = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}
SHOW = """
import json, os, random, resource, sys
import prefect.context, prefect.logging.configuration
print(json.dumps({
    "name": __name__, "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "path": sys.path[0], "cwd": os.getcwd(),
    "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "group": os.getpgid(0), "stdin": sys.stdin.read(),
    "env": dict(os.environ), "fds": [fd for fd in range(64) if os.path.lexists(f"/proc/self/fd/{fd}")],
    "settings": prefect.context.GLOBAL_SETTINGS_CONTEXT, "logging": prefect.logging.configuration.PROCESS_LOGGING_CONFIG,
    "random": random.random(), "main": sys.modules["__main__"].__spec__.name,
}))
"""

Test = Callable[[], Awaitable[None]]


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs it as the agent would: as the one who inherits orphans."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        become_subreaper()

        async def main() -> None:
            with trio.fail_after(120):
                await test(**fixtures)

        trio.run(main)

    return run


def site_env(folder: Path, engine: str = SHOW) -> dict[str, str]:
    return BASE | {"PYTHONPATH": str(fake_prefect(folder, engine))}


@asynccontextmanager
async def serving(folder: Path, engine: str = SHOW, *modules: str) -> AsyncIterator[ForkServer]:
    server = await ForkServer.open(PYTHON, env=site_env(folder, engine), cwd=Path("/"), modules=modules)
    try:
        yield server
    finally:
        await server.close()
        assert not alive(server.ref)


async def copy(server: ForkServer, folder: Path, run: str = "run-1", **env: str) -> Forked:
    return await server.copy(
        env=BASE | {MARK: run, STATE_MARK: "/home"} | env, cwd=folder, output=folder / f"{run}.log", group=None
    )


def said(folder: Path, run: str = "run-1") -> Any:
    return json.loads((folder / f"{run}.log").read_text().splitlines()[-1])


def environ_of(pid: int) -> list[str]:
    return [os.fsdecode(one) for one in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if one]


def test_its_program_is_understood_by_the_oldest_python_that_prefect_2_20_runs_on() -> None:
    ast.parse(forkserver.PROGRAM, feature_version=(3, 9))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]  # type: ignore[union-attr]
        for node in ast.walk(ast.parse(forkserver.PROGRAM))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= set(sys.stdlib_module_names), "it runs in the user's Python, which has nothing of ours"


# --- what a copy is ---------------------------------------------------------------------------------------------------


@in_trio
async def test_a_copy_is_to_itself_what_a_new_python_would_be(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        child = await copy(server, tmp_path, ONLY="this")
        assert await child.wait() == Exit(code=0)
        found = said(tmp_path)
        assert (found["name"], found["main"]) == ("__main__", "prefect.engine")
        assert found["argv"] == [str(tmp_path / "site/prefect/engine.py")]
        assert found["orig_argv"] == ["-m", "prefect.engine"]
        assert found["path"] == found["cwd"] == str(tmp_path)
        assert found["pid"] == found["session"] == found["group"] == child.ref.pid
        assert found["parent"] == os.getpid(), "we see how it ends, whatever becomes of the fork server"
        assert (found["stdin"], found["fds"]) == ("", [0, 1, 2])
        assert found["env"] == BASE | {MARK: "run-1", STATE_MARK: "/home", "ONLY": "this"}
        assert found["settings"] == found["env"], "Prefect's settings are those of the run"
        assert found["logging"] == {"incremental": False}, "nothing is left of the fork server's"


@in_trio
async def test_a_copy_shows_its_own_mark_command_and_brand_to_the_outside(tmp_path: Path) -> None:
    async with serving(tmp_path, "import time; time.sleep(600)") as server:
        copies = {run: await copy(server, tmp_path, run) for run in ("run-1", "run-2")}
        try:
            for run, child in copies.items():
                shown = environ_of(child.ref.pid)
                assert shown[:2] == [f"{MARK}={run}", f"{STATE_MARK}=/home"]
                assert len([one for one in shown if one.startswith(MARK)]) == 1
                with trio.fail_after(20):
                    while not is_engine(child.ref):
                        await trio.sleep(0.01)
                assert brand_of(child.ref.pid) == brand(run)
            assert not [one for one in environ_of(server.ref.pid) if one.startswith(MARK)]
            assert brand_of(server.ref.pid) is None
            assert not is_engine(server.ref)
        finally:
            for child in copies.values():
                os.kill(child.ref.pid, signal.SIGKILL)
                assert await child.wait() == Exit(signal=signal.SIGKILL)


@in_trio
async def test_variables_that_find_no_room_where_others_look_reach_the_run_all_the_same(tmp_path: Path) -> None:
    odd = {"LARGE": "x" * 100_000, "NOT_UTF8": os.fsdecode(b"\xff\xfe"), "LAST": "y"}
    async with serving(tmp_path, SHOW + "\nimport time; time.sleep(600)") as server:
        child = await copy(server, tmp_path, **odd)
        try:
            assert environ_of(child.ref.pid)[:2] == [f"{MARK}=run-1", f"{STATE_MARK}=/home"]
            wait_until(lambda: (tmp_path / "run-1.log").read_text().endswith("\n"), 20, "it has said all")
            assert said(tmp_path)["env"].items() >= odd.items()
        finally:
            os.kill(child.ref.pid, signal.SIGKILL)
            await child.wait()


@in_trio
async def test_copies_do_not_draw_the_same_random_numbers(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for run in ("run-1", "run-2"):
            await (await copy(server, tmp_path, run)).wait()
    assert said(tmp_path, "run-1")["random"] != said(tmp_path, "run-2")["random"]


def test_a_copy_is_in_its_control_group_before_the_flow_begins(tmp_path: Path) -> None:
    @in_trio
    async def look(path: Path) -> None:
        async with serving(tmp_path, "import json; print(json.dumps(open('/proc/self/cgroup').read()))") as server:
            group = RunGroup(path, path)
            await (
                await server.copy(env=BASE | {MARK: "run-1"}, cwd=tmp_path, output=tmp_path / "run-1.log", group=group)
            ).wait()
        assert path.name in said(tmp_path)

    with group_of_our_own() as path:
        look(path=path)


@pytest.mark.parametrize(
    ("engine", "how"),
    [
        ("raise SystemExit(4)", Exit(code=4)),
        ("import os; os._exit(3)", Exit(code=3)),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Exit(signal=signal.SIGKILL)),
        ("raise ValueError('no')", Exit(code=1)),
    ],
)
@in_trio
async def test_how_a_copy_ends_is_known_as_of_any_child(tmp_path: Path, engine: str, how: Exit) -> None:
    async with serving(tmp_path, engine) as server:
        child = await copy(server, tmp_path)
        assert await child.wait() == how
        assert await child.wait() == how, "any number of tasks may ask"
        assert read_stat(child.ref.pid) is None, "nothing of it is left"
    if how == Exit(code=1):
        assert (tmp_path / "run-1.log").read_text().splitlines()[-1] == "ValueError: no"


@in_trio
async def test_a_copy_begins_only_when_the_agent_has_inherited_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = "if os.fork() != 0:\n"
    assert at_once in forkserver.PROGRAM
    slow = forkserver.PROGRAM.replace(at_once, at_once + "            time.sleep(0.5)\n")
    monkeypatch.setattr(forkserver, "PROGRAM", slow)
    async with serving(tmp_path, "import os; os._exit(os.getppid() % 251)") as server:
        assert await (await copy(server, tmp_path)).wait() == Exit(code=os.getpid() % 251)


@in_trio
async def test_what_is_registered_for_the_end_of_a_python_is_done(tmp_path: Path) -> None:
    site = fake_prefect(tmp_path, "import atexit; atexit.register(print, '1', flush=True)")
    (site / "early.py").write_text("import atexit; atexit.register(print, '2', flush=True)")
    async with serving(tmp_path, (site / "prefect/engine.py").read_text(), "early") as server:
        await (await copy(server, tmp_path)).wait()
    assert lines(tmp_path / "run-1.log") == ["1", "2"]


# --- whatever dies ----------------------------------------------------------------------------------------------------


@in_trio
async def test_a_copy_outlives_its_fork_server_and_its_end_is_seen(tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)\nraise SystemExit(7)"
    async with serving(tmp_path, wait) as server:
        child = await copy(server, tmp_path)
        os.kill(server.ref.pid, signal.SIGKILL)
        await server.wait()
        with pytest.raises(WarmError, match="the fork server has ended"):
            await copy(server, tmp_path, "run-2")
    assert alive(child.ref)
    go.touch()
    assert await child.wait() == Exit(code=7)


@in_trio
async def test_a_copy_that_comes_too_late_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace"
    async with serving(tmp_path, f"open({str(trace)!r}, 'a').write('executed')") as server:
        with monkeypatch.context() as patched:

            async def too_late(_: object) -> None:
                raise trio.TooSlowError

            patched.setattr(forkserver, "_line", too_late)  # the order has gone out, and the copy is on its way
            patched.setattr(forkserver, "kill", lambda _: None)
            with pytest.raises(WarmError, match="no copy within"):
                await copy(server, tmp_path)
        server._given_up = False
        assert await (await copy(server, tmp_path, "run-2")).wait() == Exit(code=0)  # made after the late one
    assert trace.read_text() == "executed"


@in_trio
async def test_a_fork_server_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "ANSWER_SECONDS", 0.3)
    async with serving(tmp_path) as server:
        os.kill(server.ref.pid, signal.SIGSTOP)
        with pytest.raises(WarmError, match="no copy within"):
            await copy(server, tmp_path)
        await server.wait()
        with pytest.raises(WarmError, match="has ended"):
            await copy(server, tmp_path)


AGENT = """
import sys, time, trio
from pathlib import Path
from supervisor.process.forkserver import ForkServer
from supervisor.process.reaper import become_subreaper
site, folder, module = sys.argv[1:]
async def main():
    become_subreaper()
    env = {"PYTHONPATH": site, "PATH": "/usr/bin:/bin"}
    server = await ForkServer.open(Path(sys.executable), env=env, cwd=Path(folder), modules=[module])
    run = {"FLOW_AGENT_RUN_ID": "run-1"}
    child = await server.copy(env=env | run, cwd=Path(folder), output=Path(folder, "out"), group=None)
    print(server.ref.pid, child.ref.pid, flush=True)
    await trio.sleep_forever()
trio.run(main)
"""


def agent(folder: Path, engine: str, module: str) -> subprocess.Popen[str]:
    arguments = [str(fake_prefect(folder, engine)), str(folder), module]
    return subprocess.Popen([sys.executable, "-c", AGENT, *arguments], stdout=subprocess.PIPE, text=True)


def test_when_the_agent_dies_the_fork_server_ends_and_its_copies_go_on(tmp_path: Path) -> None:
    with agent(tmp_path, "import time; time.sleep(600)", "json") as process:
        assert process.stdout is not None
        server, child = map(int, process.stdout.readline().split())
        process.kill()
        process.wait()
    try:
        wait_until(lambda: (stat := read_stat(server)) is None or not stat.living, 20, "the fork server ends")
        assert (ref := identify(child)) is not None
        assert alive(ref)
    finally:
        os.kill(child, signal.SIGKILL)


def test_when_the_agent_dies_a_fork_server_that_still_imports_ends_too(tmp_path: Path) -> None:
    site = fake_prefect(tmp_path, "")
    note = tmp_path / "note"
    (site / "slow.py").write_text(f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with agent(tmp_path, "", "slow") as process:
        wait_until(lambda: lines(note), 30, "it imports")
        process.kill()
        process.wait()
    server = int(note.read_text())
    wait_until(lambda: (stat := read_stat(server)) is None or not stat.living, 20, "the fork server ends")


# --- what it cannot do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("raise ImportError('libfoo is missing')", "ImportError: libfoo is missing"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "started a thread"),
        ("import os; os._exit(0)", "it ended while it imported"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
    ],
)
@in_trio
async def test_modules_that_cannot_be_preloaded_are_told_with_the_reason(tmp_path: Path, module: str, why: str) -> None:
    site = fake_prefect(tmp_path, SHOW)
    (site / "mine.py").write_text(module)
    with pytest.raises(WarmError, match=why):
        async with serving(tmp_path, SHOW, "mine"):
            pytest.fail("it is ready")


@in_trio
async def test_a_prefect_whose_settings_cannot_be_made_anew_is_refused(tmp_path: Path) -> None:
    (fake_prefect(tmp_path, SHOW) / "prefect/context.py").write_text("")
    with pytest.raises(WarmError, match="root_settings_context"):
        await ForkServer.open(PYTHON, env=BASE | {"PYTHONPATH": str(tmp_path / "site")}, cwd=Path("/"), modules=())


@in_trio
async def test_a_python_that_is_none_is_told(tmp_path: Path) -> None:
    for program, why in ((tmp_path / "missing", "cannot start"), (Path("/bin/true"), "ended while it imported")):
        with pytest.raises(WarmError, match=why):
            await ForkServer.open(program, env=BASE, cwd=Path("/"), modules=())


@in_trio
async def test_one_run_that_cannot_be_is_no_reason_to_give_the_server_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        with pytest.raises(NoCopy, match=r"cannot change to .*: No such file"):
            await server.copy(env=BASE, cwd=tmp_path / "missing", output=tmp_path / "out", group=None)
        with pytest.raises(JobError, match="cannot write the run's output"):
            await server.copy(env=BASE, cwd=tmp_path, output=tmp_path, group=None)
        assert await (await copy(server, tmp_path)).wait() == Exit(code=0)


@pytest.mark.parametrize(
    ("name", "cold"),
    [
        ("PYTHONPATH", True),
        ("PYTHONHASHSEED", True),
        ("PYTHONUNBUFFERED", False),
        ("LD_PRELOAD", True),
        ("OMP_NUM_THREADS", True),
        ("OPENBLAS_NUM_THREADS", True),
        ("LC_ALL", True),
        ("LANG", True),
        ("PREFECT_LOGGING_LEVEL", False),
        ("TZ", False),
        ("MY_OWN", False),
        ("LANGUAGES", False),
    ],
)
def test_only_variables_that_count_at_the_start_keep_a_run_from_being_a_copy(name: str, cold: bool) -> None:
    plain = Warmth(PYTHON, (), None, BASE)
    assert (why_cold(plain, BASE | {name: "x"}) is not None) == cold
    with_it = Warmth(PYTHON, (), None, BASE | {name: "x"})
    assert why_cold(with_it, BASE | {name: "x"}) is None
    assert (why_cold(with_it, {one: text for one, text in BASE.items() if one != name}) is not None) == cold


# --- which fork servers there are -------------------------------------------------------------------------------------


class Starts:
    """Warm starts of one kind, as a launcher makes them."""

    def __init__(self, folder: Path, engine: str = "") -> None:
        self.folder = folder
        self.interpreters = Interpreters()
        self.warm = WarmStarts(self.interpreters)
        self.python = folder / "python"
        self.site = fake_prefect(folder, engine)
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH={self.site} exec {sys.executable} "$@"\n')
        self.python.chmod(0o755)
        self.warmth = Warmth(self.python, (), None, BASE)

    def add(self, name: str) -> Path:
        """A folder that it imports from, where nothing is installed."""
        folder = self.folder / name
        folder.mkdir()
        self.python.write_text(
            self.python.read_text().replace(f"PYTHONPATH={self.site}", f"PYTHONPATH={self.site}:{folder}")
        )
        return folder

    async def start(self, run: str = "run-1", **env: str) -> Forked | None:
        child = await self.warm.start(
            self.warmth,
            await self.interpreters.get(self.python),
            env=BASE | {MARK: run} | env,
            cwd=self.folder,
            output=self.folder / f"{run}.log",
            group=None,
        )
        if child is not None:
            assert await child.wait() == Exit(code=0)
        return child

    async def server(self, besides: int = 0) -> int:
        """The pid of the fork server there is, once there is one."""
        while True:
            (place,) = self.warm._places.values()
            if place.server is not None and place.server.ref.pid != besides:
                return place.server.ref.pid
            await trio.sleep(0.01)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.warm.use([self.warmth])
        async with trio.open_nursery() as nursery:
            await nursery.start(self.warm.run)
            yield
            nursery.cancel_scope.cancel()


@in_trio
async def test_a_fork_server_is_made_once_and_ends_with_the_agent(tmp_path: Path) -> None:
    starts = Starts(tmp_path)
    async with starts.running():
        assert await starts.start() is not None
        server = await starts.server()
        assert await starts.start("run-2") is not None
        assert await starts.server() == server
        starts.warm.use([Warmth(starts.python, (), None, dict(BASE))])
        assert await starts.server() == server, "a reload that changes nothing disturbs nothing"
    assert read_stat(server) is None


@in_trio
async def test_it_is_made_anew_when_a_package_is_installed_or_a_module_is_edited(tmp_path: Path) -> None:
    starts = Starts(tmp_path, "import sys, mine; print(mine.VALUE)")
    mine = tmp_path / "site/mine.py"
    mine.write_text("VALUE = 1")
    starts.warmth = Warmth(starts.python, ("mine",), None, BASE)
    async with starts.running():
        await starts.start()
        seen = [await starts.server()]
        mine.write_text("VALUE = 2222")
        os.utime(mine, ns=(1, 1))
        await starts.start("run-2")
        seen.append(await starts.server())
        (tmp_path / "site/other-1.0.dist-info").mkdir()
        await starts.start("run-3")
        seen.append(await starts.server())
        assert len(set(seen)) == 3
    assert [lines(tmp_path / f"run-{number}.log") for number in (1, 2, 3)] == [["1"], ["2222"], ["2222"]]


@in_trio
async def test_a_module_counts_as_the_users_wherever_it_lies_beside_or_below_a_python(tmp_path: Path) -> None:
    site = fake_prefect(tmp_path, SHOW)
    installed = tmp_path / "more/site-packages"
    installed.mkdir(parents=True)
    (installed / "library.py").write_text("")
    # As a flow's folder does that the virtual environment is in, or one whose name begins as that one's does.
    (site / "mine.py").write_text("import sys, library; sys.prefix = sys.base_prefix = sys.exec_prefix = __file__[:-5]")
    (site / "odd.py").write_text(
        "import sys\n"
        "class Lazy:\n"
        "    def __getattribute__(self, name): raise ImportError(name)\n"
        "sys.modules['lazy'] = Lazy()\n"
    )
    env = BASE | {"PYTHONPATH": f"{site}:{installed}"}
    server = await ForkServer.open(PYTHON, env=env, cwd=Path("/"), modules=("mine", "odd"))
    await server.close()
    assert {site / "mine.py", site / "odd.py", installed} <= set(server.files)
    assert not [file for file in server.files if file.is_relative_to(Path(os.__file__).parent) or file.suffix == ".so"]
    assert installed / "library.py" not in server.files


@in_trio
async def test_a_module_that_is_edited_while_it_is_being_imported_is_imported_again(tmp_path: Path) -> None:
    starts = Starts(tmp_path, "import mine; print(mine.VALUE)")
    mine = starts.add("project") / "mine.py"
    # The first to import it finds that a deployment has gone on meanwhile.
    mine.write_text("VALUE = 1\nfrom pathlib import Path\nPath(__file__).write_text('VALUE = 2')\n")
    starts.warmth = Warmth(starts.python, ("mine",), None, BASE)
    async with starts.running():
        first = await starts.server()
        assert await starts.start() is not None
        assert await starts.server() != first
        settled = await starts.server()
        assert await starts.start("run-2") is not None
        assert await starts.server() == settled
    assert lines(tmp_path / "run-1.log") == ["2"]


@in_trio
async def test_files_that_flows_write_beside_their_modules_do_not_make_it_anew(tmp_path: Path) -> None:
    starts = Starts(tmp_path)
    project = starts.add("project")
    async with starts.running():
        assert await starts.start() is not None
        server = await starts.server()
        (project / "result.csv").write_text("1,2")
        assert await starts.start("run-2") is not None
        assert await starts.server() == server


@in_trio
async def test_a_run_waits_for_its_fork_server_before_it_is_started(tmp_path: Path) -> None:
    starts = Starts(tmp_path)
    (tmp_path / "site/slow.py").write_text(
        "import os, time\nwhile not os.path.exists('/proc/self/cwd/go'): time.sleep(0.01)"
    )
    starts.warmth = Warmth(starts.python, ("slow",), tmp_path, BASE)
    ready = trio.Event()

    async def wait() -> None:
        await starts.warm.ready(starts.warmth, await starts.interpreters.get(starts.python), BASE)
        ready.set()

    async with starts.running(), trio.open_nursery() as nursery:
        # Nobody waits for what will not be used.
        await starts.warm.ready(starts.warmth, await starts.interpreters.get(starts.python), BASE | {"LANG": "x"})
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not ready.is_set()
        (tmp_path / "go").touch()
        await ready.wait()
        assert await starts.server()


@in_trio
async def test_nobody_waits_for_a_fork_server_that_a_reload_has_ended_before_it_was_ready(tmp_path: Path) -> None:
    starts = Starts(tmp_path)
    (tmp_path / "site/slow.py").write_text("import time; time.sleep(600)")
    starts.warmth = Warmth(starts.python, ("slow",), None, BASE)
    async with starts.running(), trio.open_nursery() as nursery:
        with trio.fail_after(warm.PATIENCE_SECONDS / 2):
            async with trio.open_nursery() as waiting:
                waiting.start_soon(starts.start)
                await trio.testing.wait_all_tasks_blocked(0.1)
                starts.warm.use([])
        nursery.cancel_scope.cancel()


@in_trio
async def test_an_agent_without_descriptors_left_starts_runs_cold_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    starts = Starts(tmp_path)
    async with starts.running():
        assert await starts.start() is not None
        server = await starts.server()
        with monkeypatch.context() as patched:
            patched.setattr(forkserver.socket, "socketpair", none_left)
            assert await starts.start("run-2") is None
            assert "cannot talk to a fork server: Too many open files" in caplog.text
            os.kill(server, signal.SIGKILL)
            while "no warm starts with" not in caplog.text:
                await trio.sleep(0.01)
        assert await starts.server(besides=server)


@in_trio
async def test_it_is_made_anew_when_it_has_become_old_or_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(tmp_path)
    async with starts.running():
        for name, value in (("MAX_COPIES", 1), ("MAX_GROWTH", 0.5)):
            before = await starts.server()
            with monkeypatch.context() as patched:
                patched.setattr(warm, name, value)
                assert await starts.start() is not None
            assert await starts.server(besides=before) != before


@in_trio
async def test_a_fork_server_that_dies_is_replaced_and_runs_start_cold_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(tmp_path)
    async with starts.running():
        first = await starts.server()
        os.kill(first, signal.SIGKILL)
        while "has ended" not in caplog.text:
            await trio.sleep(0.01)
        assert await starts.start() is None
        assert await starts.server(besides=first)
        assert await starts.start("run-2") is not None
    assert f"the fork server (process {first}) has ended" in caplog.text


@in_trio
async def test_what_cannot_start_warm_starts_cold_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(tmp_path)
    async with starts.running():
        for number in range(3):
            assert await starts.start(f"run-{number}", PYTHONHASHSEED="0") is None
        starts.warmth = Warmth(starts.python, ("no_such_module",), None, BASE)
        starts.warm.use([starts.warmth])
        for number in range(3):
            assert await starts.start(f"run-{number}") is None
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2, said
    assert "PYTHONHASHSEED counts only when a Python starts" in said[0]
    assert "no_such_module" in said[1]


@in_trio
async def test_a_hung_fork_server_costs_a_run_its_warm_start_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver, "END_SECONDS", 0.2)
    starts = Starts(tmp_path)
    async with starts.running():
        await starts.start()
        hung = await starts.server()
        os.kill(hung, signal.SIGSTOP)
        with monkeypatch.context() as patched:
            patched.setattr(forkserver, "ANSWER_SECONDS", 0.3)
            assert await starts.start("run-2") is None
        assert await starts.server(besides=hung)
        assert await starts.start("run-3") is not None
    assert read_stat(hung) is None


@in_trio
async def test_a_reload_that_no_longer_names_a_kind_ends_its_fork_server(tmp_path: Path) -> None:
    starts = Starts(tmp_path)
    async with starts.running():
        await starts.start()
        server = await starts.server()
        starts.warm.use([])
        while read_stat(server) is not None:
            await trio.sleep(0.01)
