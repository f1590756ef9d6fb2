"""The command: its flags and refusals, what it prints and how it ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from typer.testing import CliRunner, Result

from supervisor.cli import app
from supervisor.cli.check import table
from supervisor.cli.survey import Row, survey
from supervisor.config import Agent, Api, Config, Credentials, Flows, Output, Poll, Stop, Work
from supervisor.errors import (
    ConfigError,
    InterpreterError,
    NotFound,
    Refused,
    StateDirectoryHeld,
    Unauthorized,
    Unreachable,
)
from supervisor.model import Deployment, Pool, Queue, Server
from supervisor.process.interpreter import Interpreter

UUID = "9a4f4a7e-2f6f-4f0a-8a3c-0d3f0c1b2a3d"


class FakeApp(types.ModuleType):
    """Stands where `supervisor.app` does: keeps what it was asked to run, and ends as it is told to."""

    def __init__(self) -> None:
        super().__init__("supervisor.app")
        self.runs: list[tuple[Config, bool, bool]] = []
        self.ends_with: int | Exception = 0

    def run(
        self, config: Config, reread: Callable[[], Config], *, run_once: bool = False, hide_welcome: bool = False
    ) -> int:
        self.runs.append((config, run_once, hide_welcome))
        self.reread = reread
        if isinstance(self.ends_with, Exception):
            raise self.ends_with
        return self.ends_with

    @property
    def work(self) -> Work:
        """What it was last asked to work on."""
        (work,) = self.runs[-1][0].work
        return work


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApp:
    """No agent starts, and no configuration of this machine is read."""
    fake = FakeApp()
    monkeypatch.setitem(sys.modules, "supervisor.app", fake)
    for name in [name for name in os.environ if name.startswith(("FLOW_AGENT_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "agent.toml").write_text("[agent]\nlimit = 7\n[[work]]\npool = 'of-the-file'\n")
    (tmp_path / "idle.toml").write_text("[agent]\nlimit = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_AGENT_CONFIG", "idle.toml")
    return fake


def flow_agent(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


# --- start ------------------------------------------------------------------------------------------------------------


def test_every_flag_of_start_reaches_the_agent(agent: FakeApp) -> None:
    result = flow_agent(
        *("start", "--pool", "p", "-q", "a", "--work-queue", "b", "-l", "4", "--prefetch-seconds", "3", "--run-once"),
        *("--hide-welcome", "--api", "https://prefect/api", "--name", "n", "--python", sys.executable),
    )
    assert (result.exit_code, result.output) == (0, "")
    config, run_once, hide_welcome = agent.runs[0]
    assert (run_once, hide_welcome) == (True, True)
    assert (config.agent.limit, config.agent.prefetch_seconds, config.agent.name) == (4, 3.0, "n")
    assert config.api.url == "https://prefect/api"
    assert (agent.work.pool, agent.work.queues) == ("p", ("a", "b"))
    assert agent.work.flows.python == Path(sys.executable)


def test_start_takes_its_work_from_the_file_until_flags_name_some(agent: FakeApp) -> None:
    assert flow_agent("start", "--config", "agent.toml").exit_code == 0
    assert (agent.work.pool, agent.runs[-1][0].agent.limit) == ("of-the-file", 7)
    assert agent.runs[-1][1:] == (False, False)
    assert flow_agent("start", "--config", "agent.toml", "--hide-welcome").exit_code == 0
    assert agent.runs[-1][1:] == (False, True)
    assert flow_agent("start", "--config", "agent.toml", "-m", "dev-", "-m", "ops-").exit_code == 0
    assert (agent.work.pool, agent.work.match, agent.runs[-1][0].agent.limit) == (None, ("dev-", "ops-"), 7)


@pytest.mark.parametrize("named", [True, False], ids=["by a flag", "by the environment"])
def test_the_configuration_is_read_again_from_the_same_file_with_the_same_flags_and_variables(
    agent: FakeApp, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("agent.toml" if named else "idle.toml")
    monkeypatch.setenv("FLOW_AGENT_POLL_JITTER", "0.25")
    work = [] if named else ["--pool", "of-the-flags"]
    assert flow_agent("start", *(["--config", "agent.toml"] if named else []), *work, "-l", "4").exit_code == 0
    assert agent.reread() == agent.runs[-1][0]
    # What the agent does to its own environment meanwhile does not count.
    for name in ("FLOW_AGENT_POLL_JITTER", "FLOW_AGENT_CONFIG"):
        monkeypatch.delenv(name)
    file.write_text("[agent]\nlimit = 9\nprefetch_seconds = 3\n[[work]]\npool = 'new'\n")
    config = agent.reread()
    assert (config.agent.limit, config.agent.prefetch_seconds, config.poll.jitter) == (4, 3.0, 0.25)
    assert [one.pool for one in config.work] == ["new" if named else "of-the-flags"]
    # The flags would do for a configuration without a file, but it is not what was asked for.
    file.unlink()
    with pytest.raises(ConfigError, match="cannot read it"):
        agent.reread()


@pytest.mark.parametrize("queue", ["old", UUID])
def test_the_deprecated_argument_is_a_queue_more_and_says_how_to_name_it(agent: FakeApp, queue: str) -> None:
    result = flow_agent("start", queue, "-q", "new")
    assert result.exit_code == 0
    assert agent.work.queues == ("new", queue)
    assert f"`flow-agent start -q {queue}`" in result.stderr


def test_deprecated_tags_name_the_queue_with_the_legacy_filter(agent: FakeApp) -> None:
    result = flow_agent("start", "-t", "gpu", "--tag", "big")
    assert result.exit_code == 0
    assert (agent.work.queues, agent.work.tags) == (("Agent queue big-gpu",), ("gpu", "big"))
    assert "will create a work queue named `Agent queue big-gpu`" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "No work queues provided!"),
        (("-l", "3"), "No work queues provided!"),
        (("-q", "a", "-m", "b"), "Only one of `work_queues`, `match`, or `tags` can be provided."),
        (("a", "-t", "b"), "Only one of `work_queues`, `match`, or `tags` can be provided."),
        (("-p", "a", "-t", "b"), "`tag` and `pool` options cannot be used together."),
    ],
)
def test_start_refuses_as_the_agent_it_replaces(agent: FakeApp, arguments: Sequence[str], message: str) -> None:
    result = flow_agent("start", *arguments)
    assert (result.exit_code, result.stdout, agent.runs) == (1, "", [])
    assert message in result.stderr


def test_start_names_every_mistake_and_exits_78(agent: FakeApp, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[agent]\nlimt = 1\nname = ''\n[[work]]\npool = 'p'\n")
    result = flow_agent("start", "--config", "wrong.toml", "--limit", "0")
    assert (result.exit_code, result.stdout, agent.runs) == (78, "", [])
    assert [line.partition(": ")[0] for line in result.stderr.splitlines()] == [
        "wrong.toml:2",
        "wrong.toml:3",
        "--limit",
    ]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (3, 3),
        (ConfigError("cannot do it: said"), 78),
        (InterpreterError("cannot do it: said"), 78),
        (StateDirectoryHeld("cannot do it: said"), 75),
    ],
)
def test_start_ends_as_the_agent_does(agent: FakeApp, end: int | Exception, code: int) -> None:
    agent.ends_with = end
    result = flow_agent("start", "-p", "p")
    assert result.exit_code == code
    assert result.stderr == ("" if isinstance(end, int) else "cannot do it: said\n")


# --- check, version, help ---------------------------------------------------------------------------------------------


def test_check_says_ok_and_warns(agent: FakeApp) -> None:
    result = flow_agent("check", "--config", "agent.toml", "--api", "http://x")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "agent.toml: ok",
        "warning: api.url: http://x has no path; Prefect's API is usually at http://x/api",
    ]


def test_a_quiet_check_says_only_what_is_unwise_or_wrong(agent: FakeApp) -> None:
    result = flow_agent("check", "--quiet", "--config", "agent.toml", "--api", "http://x/api")
    assert (result.exit_code, result.output) == (0, "")
    result = flow_agent("check", "--quiet", "--config", "agent.toml", "--api", "http://x")
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert result.stdout.startswith("warning: api.url: ")
    result = flow_agent("check", "--quiet")
    assert (result.exit_code, result.stdout) == (78, "")
    assert "idle.toml: cannot tell what to work on" in result.stderr


def test_check_exits_78_when_no_work_is_named(agent: FakeApp) -> None:
    result = flow_agent("check")
    assert (result.exit_code, result.stdout) == (78, "")
    assert "idle.toml: cannot tell what to work on" in result.stderr


@pytest.mark.parametrize("arguments", [("version",), ("--version",)])
def test_the_version_is_told_in_one_line(arguments: Sequence[str]) -> None:
    result = flow_agent(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("flow-agent 0.1.0 (Python 3.")
    assert f"trio {trio.__version__}, httpx " in result.stdout


def test_a_cheap_command_imports_nothing_heavy() -> None:
    code = "import sys; from supervisor.cli import app; app(['version'], standalone_mode=False); print(*sys.modules, sep=chr(10))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "supervisor.cli.start" in loaded
    assert not {"trio", "httpx", "rich", "msgspec", "psutil", "tomli"} & set(loaded)


@pytest.mark.parametrize("command", ["start", "check", "runs", "install", "version", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    result = flow_agent(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: flow-agent {command}" in result.stdout.replace("root", "flow-agent")


# --- the process: python -m supervisor --------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("FLOW_AGENT_", "PREFECT_"))}
    return {**kept, "NO_PROXY": "127.0.0.1", **more}


def check_server(port: int, *more: str) -> subprocess.Popen[str]:
    """`flow-agent check --server` against that port, started."""
    arguments = ["check", "--server", "--api", f"http://127.0.0.1:{port}/api", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "supervisor", *arguments],
        env=environment(FLOW_AGENT_WORK_POOL="p", FLOW_AGENT_FLOWS_PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_check_of_a_server_that_is_away_says_so_in_a_table_and_exits_1() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        with check_server(closed.getsockname()[1]) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == [
        "WHAT",
        "server",
        "credentials",
        "pool 'p'",
        "flows' python",
    ]


def test_a_quiet_check_of_a_server_that_is_away_shows_the_table_all_the_same() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with check_server(closed.getsockname()[1], "--quiet") as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert out.split()[:3] == ["WHAT", "FOUND", "VERDICT"]


def test_ctrl_c_ends_a_check_with_130_and_no_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, check_server(silent.getsockname()[1]) as process:
        assert select.select([silent], [], [], 60)[0], "the check never called the server"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert out.splitlines() == ["configuration without a file: ok"]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("KeyboardInterrupt()", 130),
        ("BaseExceptionGroup('', [BaseExceptionGroup('', [KeyboardInterrupt()])])", 130),
        ("BaseExceptionGroup('', [KeyboardInterrupt(), ValueError('a bug')])", 1),
    ],
)
def test_ctrl_c_hides_no_bug_and_is_found_where_trio_groups_it(raised: str, code: int) -> None:
    program = f"""
import sys
from supervisor import cli
@cli.app.command()
def interrupted(): raise {raised}
sys.argv[1:] = ["interrupted"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("a bug" in done.stderr) == (code == 1)
    assert done.stderr == "" or code == 1


def test_a_reader_that_has_gone_is_no_error_worth_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "supervisor", "check"],
        env=environment(FLOW_AGENT_WORK_POOL="p", FLOW_AGENT_FLOWS_PYTHON=sys.executable),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


# --- the survey of a server -------------------------------------------------------------------------------------------


class FakeServer:
    """A Prefect server as `Backend` shows it; `trouble` maps a method to the error it raises. It can only be read."""

    def __init__(self, **trouble: Exception) -> None:
        self.trouble = trouble
        self.pools = {"p": Pool(id="1", name="p", type="process"), "push": Pool(id="2", name="push", type="ecs:push")}
        self.queues = [
            Queue(id="3", name="default", pool_name="p"),
            Queue(id="4", name="late", pool_name="p", is_paused=True),
            Queue(id="5", name="dev-a"),
        ]

    async def _answer(self, method: str, answer: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if (error := self.trouble.get(method)) is not None:
            raise error
        if answer is None:
            raise NotFound("404")
        return answer

    async def hello(self) -> Server:
        return await self._answer("hello", Server(version="3.8.8", major=3))

    async def read_pool(self, name: str) -> Pool:
        return await self._answer("read_pool", self.pools.get(name))

    async def pool_queues(self, pool: str, *, names: Sequence[str] = (), prefixes: Sequence[str] = ()) -> list[Queue]:
        mine = [queue for queue in self.queues if queue.pool_name == pool]
        named = [queue for queue in mine if not names or queue.name in names]
        return await self._answer(
            "pool_queues", [q for q in named if not prefixes or q.name.startswith(tuple(prefixes))]
        )

    async def read_queue(self, name_or_id: str) -> Queue:
        found = [queue for queue in self.queues if queue.pool_name is None and queue.name == name_or_id]
        return await self._answer("read_queue", found[0] if found else None)

    async def match_queues(self, prefixes: Sequence[str]) -> list[Queue]:
        mine = [queue for queue in self.queues if queue.pool_name is None and queue.name.startswith(tuple(prefixes))]
        return await self._answer("match_queues", mine)

    async def find_deployment(self, name: str) -> Deployment:
        known = Deployment(id="6", name="nightly", flow_id="7", paused=True)
        return await self._answer("find_deployment", known if name == "etl/nightly" else None)


def look(*work: dict[str, Any], server: FakeServer | None = None, secrets: Credentials | None = None) -> list[Row]:
    """The survey of that work on a fake server, with a Python that has Prefect 3.8.8 in it."""
    flows = Flows(python=Path("/venv/bin/python"))
    config = Config(
        agent=Agent(name="a", state_dir=Path("/s"), log_dir=Path("/l")),
        api=Api(url="http://x/api"),
        poll=Poll(),
        flows=flows,
        output=Output(),
        stop=Stop(),
        work=tuple(Work(**{"flows": flows, **table}) for table in work),
    )

    async def inspect(python: Path) -> Interpreter:
        if "missing" in str(python):
            raise InterpreterError(f"cannot run {python}: no such file")
        return Interpreter(python, "2.20.26" if "old" in str(python) else "3.8.8")

    async def main() -> list[Row]:
        backend: Any = server or FakeServer()
        return await survey(config, backend, inspect=inspect, secrets=secrets or Credentials())

    return trio.run(main)


def test_the_survey_shows_server_credentials_work_and_python_in_a_table() -> None:
    rows = look({"pool": "p"}, secrets=Credentials(api_key="hush"))
    assert all(row.usable for row in rows)
    assert table(rows).splitlines() == [
        "WHAT                FOUND                              VERDICT",
        "server              Prefect 3.8.8 at http://x/api      ok",
        "credentials         API key                            accepted",
        "pool 'p'            type process                       ok",
        "queues of pool 'p'  default, late (paused)             ok",
        "flows' python       Prefect 3.8.8 in /venv/bin/python  ok",
    ]


@pytest.mark.parametrize(
    ("work", "rows"),
    [
        ({"pool": "new"}, [("pool 'new'", "missing", "would be created", True)]),
        ({"pool": "new", "create": False}, [("pool 'new'", "missing", "must be made first", False)]),
        ({"pool": "push"}, [("pool 'push'", "type ecs:push", "is a push pool", False)]),
        (
            {"pool": "p", "queues": ("late", "new")},
            [
                ("pool 'p'", "type process", "ok", True),
                ("queue 'late' of pool 'p'", "found, paused", "when it is resumed", True),
                ("queue 'new' of pool 'p'", "missing", "would be created", True),
            ],
        ),
        (
            {"pool": "new", "queues": ("a",), "create": False},
            [
                ("pool 'new'", "missing", "must be made first", False),
                ("queue 'a' of pool 'new'", "missing", "must be made first", False),
            ],
        ),
        (
            {"pool": "p", "match": ("de",)},
            [
                ("pool 'p'", "type process", "ok", True),
                ("queues 'de*' of pool 'p'", "default", "ok", True),
            ],
        ),
        (
            {"queues": ("dev-a", "new", UUID)},
            [
                ("queue 'dev-a'", "found", "ok", True),
                ("queue 'new'", "missing", "would be created", True),
                (f"queue '{UUID}'", "missing", "must be made first", False),
            ],
        ),
        ({"match": ("dev-", "x-")}, [("queues 'dev-*', 'x-*'", "dev-a", "ok", True)]),
        ({"match": ("x-",)}, [("queues 'x-*'", "none", "taken up when there are any", True)]),
        (
            {"deployments": ("etl/nightly", "etl/gone")},
            [
                ("deployment 'etl/nightly'", "found, paused", "until it is resumed", True),
                ("deployment 'etl/gone'", "missing", "must be made first", False),
            ],
        ),
    ],
)
def test_the_survey_looks_up_what_the_work_names(work: dict[str, Any], rows: list[tuple[str, str, str, bool]]) -> None:
    found = look(work)[2:-1]
    assert [(row.what, row.found, row.usable) for row in found] == [(row[0], row[1], row[3]) for row in rows]
    assert all(words in row.verdict for row, (_, _, words, _) in zip(found, rows, strict=True))


def test_the_survey_tells_a_refused_login_from_a_server_that_tells_everybody_its_version() -> None:
    server = FakeServer(read_pool=Unauthorized("401 from the server"))
    rows = look({"pool": "p"}, server=server, secrets=Credentials(auth_string="u:hush"))
    assert [(row.found, row.usable) for row in rows[:3]] == [
        ("Prefect 3.8.8 at http://x/api", True),
        ("auth string", False),
        ("not shown to us", False),
    ]
    assert rows[1].verdict == "refused (401 from the server)"
    rows = look({"pool": "p"}, server=FakeServer(hello=Unauthorized("401")))
    assert [row.usable for row in rows[:2]] == [False, False]
    assert "set api.api_key_file or api.auth_string_file" in rows[1].verdict


@pytest.mark.parametrize("error", [Unreachable("cannot reach it: refused"), Refused("no: 405", status=405)])
def test_the_survey_asks_a_lost_server_nothing_more_but_still_the_python(error: Exception) -> None:
    rows = look({"pool": "p"}, {"queues": ("a", "b")}, server=FakeServer(hello=error))
    assert str(error) in rows[0].verdict
    assert [(row.found, row.verdict) for row in rows[1:]] == [
        ("none", "unknown"),
        ("not looked up", "unknown"),
        ("not looked up", "unknown"),
        ("Prefect 3.8.8 in /venv/bin/python", "ok"),
    ]
    assert not rows[0].usable


def test_the_survey_judges_each_python_once_and_only_where_it_is_used() -> None:
    pythons = ["/old/python", "/missing/python", "/old/python"]
    work = [{"pool": "p", "flows": Flows(python=Path(python))} for python in pythons]
    own = {"pool": "p", "flows": Flows(python=Path("/unused"), command=("engine",))}
    old, missing = (row for row in look(*work, own) if row.what == "flows' python")
    assert (old.found, old.usable) == ("Prefect 2.20.26 in /old/python", False)
    assert old.verdict == "Prefect 2 flows cannot talk to a Prefect 3 server"
    assert (missing.found, missing.verdict, missing.usable) == (
        "/missing/python",
        "cannot run /missing/python: no such file",
        False,
    )
