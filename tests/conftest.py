"""Fixtures shared by all tests, and the watch that nothing is left behind.

Every process and file of a test session is below one temporary directory, named in TMPDIR. Flows inherit that variable
from the agent like any other, so at the end it tells whether a process of ours is still alive.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio.testing

from tests import envs
from tests.agents import AgentProcess, config_for
from tests.machines import Machine
from tests.releases import VERSIONS
from tests.servers import Api, PrefectServer, processes_with

_SESSION = Path(tempfile.mkdtemp(prefix="fat-"))
os.environ["TMPDIR"] = tempfile.tempdir = str(_SESSION)


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], PrefectServer]]:
    """The shared server of a release, started when it is first asked for. Tests that stop a server start their own."""
    running: dict[str, PrefectServer] = {}

    def get(version: str) -> PrefectServer:
        if version not in running:
            running[version] = PrefectServer(version).start()
        return running[version]

    yield get
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session", params=VERSIONS.values(), ids=VERSIONS.keys())
def prefect_server(request: pytest.FixtureRequest, servers: Callable[[str], PrefectServer]) -> PrefectServer:
    """The shared server, once for each generation."""
    return servers(request.param)


@pytest.fixture(scope="session")
def server_3(servers: Callable[[str], PrefectServer]) -> PrefectServer:
    return servers("3.8.8")


@pytest.fixture(scope="session")
def server_2(servers: Callable[[str], PrefectServer]) -> PrefectServer:
    return servers("2.20.26")


@pytest.fixture
def own_server() -> Iterator[Callable[..., PrefectServer]]:
    """Starts servers for one test only: own_server("3.8.8", {"PREFECT_…": "…"}). They may be stopped and killed."""
    started: list[PrefectServer] = []

    def start(version: str, settings: Mapping[str, str] | None = None) -> PrefectServer:
        started.append(PrefectServer(version, settings))
        return started[-1].start()

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def api(prefect_server: PrefectServer) -> Iterator[Api]:
    client = Api(prefect_server)
    yield client
    client.close()


@pytest.fixture
def api_of() -> Iterator[Callable[[PrefectServer], Api]]:
    """A client for any server."""
    clients: list[Api] = []

    def make(server: PrefectServer) -> Api:
        clients.append(Api(server))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture(scope="session")
def engine() -> Callable[[str], Path]:
    """engine("3.4.25") is the Python of an environment with that Prefect."""
    return envs.interpreter


@pytest.fixture
def agent_process() -> Iterator[Callable[..., AgentProcess]]:
    """Starts real agents: agent_process(server, work=[{"pool": "p"}], flows={…}, agent={…}, poll={…}, args=[…]).

    With `config` (a mapping or TOML text) that is used as it is; `wait=False` does not wait for READY=1. At the end each
    agent still alive is told to cancel its runs, and a process of a run that is left fails the test.
    """
    agents: list[AgentProcess] = []

    def start(
        server: PrefectServer | None = None,
        work: Sequence[Mapping[str, Any]] = (),
        *,
        config: Mapping[str, Any] | str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        wait: bool = True,
        **sections: Mapping[str, Any],
    ) -> AgentProcess:
        if config is None:
            assert server is not None
            config = config_for(server, work, **sections)
        agents.append(AgentProcess(config, args, env))
        return agents[-1].start(wait=wait)

    yield start
    errors = []
    for agent in agents:
        try:
            agent.close()
        except AssertionError as error:
            errors.append(str(error))
    assert not errors, "\n".join(errors)


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """boot("bookworm") is a machine that is up. At the end nothing of it is left."""
    machines: list[Machine] = []

    def start(suite: str) -> Machine:
        machines.append(Machine(suite, tmp_path))
        return machines[-1].boot()

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """A clock that jumps over every wait: trio.run(main, clock=autojump_clock)."""
    return trio.testing.MockClock(autojump_threshold=0)


def _is_ours(process: psutil.Process) -> bool:
    try:
        return Path(process.environ()["TMPDIR"]).is_relative_to(_SESSION)
    except (psutil.Error, KeyError):
        return False


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the last test of a session (with several at once: of each worker) when a process of ours is left.

    Set up before every other fixture of the session, so that it looks when the last server has been stopped.
    """
    yield
    strays = [process for process in processes_with("TMPDIR") if _is_ours(process)]
    seen = [f"{process.pid} {' '.join(process.cmdline())}" for process in strays]
    for process in strays:
        process.kill()
    assert not strays, f"left behind by the tests: {seen}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Removes the session's files and, in CI, fails the session when anything was skipped."""
    shutil.rmtree(_SESSION, ignore_errors=True)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if skipped and os.environ.get("CI"):
        print(f"\n{skipped} tests were skipped, which is a failure here", file=sys.stderr)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
