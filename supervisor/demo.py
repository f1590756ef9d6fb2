"""The demonstration: a real Prefect 3 server, an agent and three flow runs in a temporary folder, all removed again.

It plays the user of both: it speaks to the server over REST as anybody would, and it starts the agent by its command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from supervisor.backend.http import HttpApi
from supervisor.config import Api, Credentials
from supervisor.configfile import load
from supervisor.errors import BackendError, FlowAgentError, InterpreterError
from supervisor.lifecycle import Exit
from supervisor.model import StateType
from supervisor.process import stop
from supervisor.process.environ import MARK, inherited
from supervisor.process.interpreter import Interpreters
from supervisor.process.launch import Child, launch

SERVER_SECONDS = 60.0  # for the server to make its database and answer
AGENT_SECONDS = 20.0
RUN_SECONDS = 90.0  # for all three runs to end
POOL = "demo"

# The same as examples/flows.py: a one-file binary has no folder of examples beside it.
FLOWS = '''\
"""The three flows that `flow-agent demo` runs: one does its work, one fails, one is cancelled while it runs."""

import time

from prefect import flow


@flow
def quick(name: str = "world"):
    print(f"hello {name}")


@flow
def failing():
    raise RuntimeError("this flow fails to show what that looks like")


@flow
def endless():
    while True:
        print("working")
        time.sleep(1)
'''
EXPECTED = {"quick": StateType.COMPLETED, "failing": StateType.FAILED, "endless": StateType.CANCELLED}
CANCELLED_ON_THE_WAY = "endless"

Say = Callable[[str], object]


class DemoFailed(FlowAgentError):
    """The demonstration could not go on; the sentence says why."""


class Passed(msgspec.Struct, frozen=True):
    """One run's history: its states with the times they were entered."""

    name: str
    created: datetime
    states: tuple[tuple[StateType, str, datetime], ...]

    @property
    def ended(self) -> StateType | None:
        return self.states[-1][0] if self.states and self.states[-1][0].terminal else None

    @property
    def started(self) -> datetime | None:
        return next((at for state, _, at in self.states if state is StateType.RUNNING), None)


def run(python: Path | None, say: Say) -> int:
    """Runs the demonstration and returns its exit status: 0 when every run ended as it should have.

    Raises `InterpreterError` or `ConfigError` where there is no Python with Prefect 3 to be found, before anything is
    started. Ctrl-C and SIGTERM end it early, with everything removed.
    """
    return trio.run(_demo, python, say)


async def _demo(python: Path | None, say: Say) -> int:
    chosen = await _interpreter(python)
    code = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_early, nursery.cancel_scope, say)
        code = await _on_stage(chosen, say)
        nursery.cancel_scope.cancel()
    return code


async def _end_early(scope: trio.CancelScope, say: Say) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as arriving:
        async for signum in arriving:
            say(f"{signal.Signals(signum).name}: ending early, removing everything")
            scope.cancel()


async def _interpreter(python: Path | None) -> Path:
    """The Python for server and flows: the given one, or the one that the configuration names."""
    if python is None:
        python = load(None, environ=os.environ, flags={"work": [{"pool": POOL}]}).flows.python
    else:
        python = Path(shutil.which(python) or python).absolute()
    found = await Interpreters().get(python)
    if found.version[:1] != (3,):
        raise InterpreterError(
            f"cannot show the demo with '{python}': it has Prefect {found.prefect_version}, and the demo's server is "
            "Prefect 3; name another Python with --python"
        )
    return python


async def _on_stage(python: Path, say: Say) -> int:
    """Builds the stage, plays, and takes the stage down again, whatever happens."""
    stage = _Stage(python, say)
    try:
        passed = await stage.play()
    except (DemoFailed, BackendError) as error:
        say(f"\n{error}")
        passed = []
    finally:
        with trio.CancelScope(shield=True):
            await stage.end_processes()
        tail = stage.tail()
        stage.remove()
    say("")
    for line in table(passed):
        say(line)
    if {one.name: one.ended for one in passed} == EXPECTED:
        say("\nAll three ended as they should have; everything has been removed again.")
        return 0
    say(f"\nThis is not how it should have been.\n{tail}")
    return 1


class _Stage:
    """The temporary folder and the processes of one demonstration. Owns both."""

    def __init__(self, python: Path, say: Say) -> None:
        self._python = python
        self._say = say
        self._began = trio.current_time()
        self._home = Path(tempfile.mkdtemp(prefix="flow-agent-demo-"))
        self._mark = f"demo-{uuid.uuid4().hex}"  # whatever our processes start can be found by it
        self._server: Child | None = None
        self._agent: Child | None = None

    async def play(self) -> list[Passed]:
        """The whole show. Raises `DemoFailed` and `BackendError`."""
        async with AsyncExitStack() as stack:
            api, url = await self._start_server(stack)
            self._tell(f"a Prefect {await api.get('/admin/version')} server answers at {url}")
            await api.post("/work_pools/", {"name": POOL, "type": "process"})
            deployments = {name: await self._deploy(api, name) for name in EXPECTED}
            self._tell(f"work pool '{POOL}' and the deployments {', '.join(EXPECTED)} are there")
            await self._start_agent(api, url)
            self._tell("flow-agent waits for work")
            runs = {name: await _create_run(api, deployment) for name, deployment in deployments.items()}
            return await self._follow(api, runs)

    async def _start_server(self, stack: AsyncExitStack) -> tuple[HttpApi, str]:
        """Another one on another port when somebody was faster on the first."""
        for _ in range(3):
            port = _free_port()
            url = f"http://127.0.0.1:{port}/api"
            command = [
                str(self._python),
                "-m",
                "prefect",
                "server",
                "start",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            settings = {
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_UI_ENABLED": "false",
                "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
            }
            self._tell("starting a Prefect server on SQLite")
            self._server = await self._launch("server", command, settings)
            api = await stack.enter_async_context(HttpApi.open(Api(url=url, timeout_seconds=10), Credentials))
            if await self._until(partial(_healthy, api), self._server, SERVER_SECONDS):
                return api, url
        raise DemoFailed("cannot start a Prefect server; its last words are below")

    async def _deploy(self, api: HttpApi, name: str) -> str:
        folder = self._home / "flows"
        folder.mkdir(exist_ok=True)
        (folder / "flows.py").write_text(FLOWS)
        flow = await api.post("/flows/", {"name": name})
        body = {
            "name": "demo",
            "flow_id": flow["id"],
            "entrypoint": f"flows.py:{name}",
            "path": str(folder),
            "work_pool_name": POOL,
        }
        return str((await api.post("/deployments/", body))["id"])

    async def _start_agent(self, api: HttpApi, url: str) -> None:
        config = self._home / "agent.toml"
        config.write_text(
            toml(
                agent={"name": "demo", "state_dir": self._home / "state", "log_dir": self._home / "logs"},
                api={"url": url},
                poll={"interval_seconds": 1.0, "cancel_interval_seconds": 1.0},
                flows={"python": self._python, "grace_seconds": 5.0},
            )
        )
        # A frozen binary is the command itself; from source it is this Python's module.
        command = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "supervisor"]
        arguments = ["start", "--config", str(config), "--pool", POOL]
        self._agent = await self._launch("agent", [*command, *arguments], {})
        if not await self._until(partial(_has_worker, api), self._agent, AGENT_SECONDS):
            raise DemoFailed("cannot start the agent; its last words are below")

    async def _launch(self, name: str, command: Sequence[str], settings: Mapping[str, str]) -> Child:
        environ = {key: value for key, value in inherited(os.environ).items() if not key.startswith("PREFECT_")}
        if "PYTHONPATH" in os.environ and name == "agent":
            environ["PYTHONPATH"] = os.environ["PYTHONPATH"]
        environ |= {MARK: self._mark, "PREFECT_HOME": str(self._home / "prefect"), **settings}
        # The agent must find itself where we were found; the server must not find a prefect.toml of the user's.
        cwd = Path.cwd() if name == "agent" else self._home
        return await launch(command, env=environ, cwd=cwd, output=self._home / f"{name}.log")

    async def _until(self, condition: Callable[[], Any], child: Child, seconds: float) -> bool:
        """Whether the condition came true in time and before the process ended."""
        true = False
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                exit_: Exit = await child.wait()
                self._tell(f"process {child.ref.pid} {exit_}")
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            with trio.move_on_after(seconds):
                while not (true := await condition()):  # noqa: ASYNC110 - the condition is another program's
                    await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        return true

    async def _follow(self, api: HttpApi, runs: Mapping[str, str]) -> list[Passed]:
        """Tells every step of the runs until all have ended, and cancels one on the way."""
        told: set[tuple[str, int]] = set()
        cancelled = False
        passed: list[Passed] = []
        with trio.move_on_after(RUN_SECONDS):
            while True:
                passed = [await _read(api, name, run_id) for name, run_id in runs.items()]
                for one in passed:
                    for number, (_, state, _) in enumerate(one.states):
                        if (one.name, number) not in told:
                            told.add((one.name, number))
                            self._tell(f"{one.name:<8} {state}")
                    if one.name == CANCELLED_ON_THE_WAY and one.started and not cancelled:
                        cancelled = True
                        self._tell(f"{one.name:<8} asking the server to cancel it")
                        await api.post(f"/flow_runs/{runs[one.name]}/set_state", {"state": {"type": "CANCELLING"}})
                if all(one.ended for one in passed):
                    break
                await trio.sleep(0.2)
        return passed

    def _tell(self, what: str) -> None:
        self._say(f"{trio.current_time() - self._began:5.1f} s  {what}")

    async def end_processes(self) -> None:
        """Nothing of ours lives when this returns, unless not even SIGKILL could end it."""
        with trio.move_on_after(30):
            if self._agent is not None and stop.interrupt_group(self._agent.ref, signal.SIGQUIT):
                with trio.move_on_after(10):  # it ends its own runs
                    await self._agent.wait()
            for child in (self._agent, self._server):
                if child is not None:
                    await stop.end(child.ref, self._mark, grace=5)
                    await child.wait()

    def tail(self) -> str:
        """The last words of server and agent."""
        said = []
        for log in sorted(self._home.glob("*.log")):
            last = log.read_text(errors="replace").splitlines()[-20:]
            said.append("\n".join([f"--- {log.stem} ---", *last]))
        return "\n".join(said)

    def remove(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)


def table(passed: Sequence[Passed]) -> list[str]:
    """What ran, for people: how it ended, how long until it started, how long it ran."""
    rows = [("flow", "ended as", "started after", "ran for")]
    for one in passed:
        end = one.states[-1][2] if one.ended else None
        ended = one.states[-1][1] if one.ended else f"not at all ({one.states[-1][1] if one.states else 'no state'})"
        rows.append((one.name, ended, _span(one.created, one.started), _span(one.started, end)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _span(start: datetime | None, end: datetime | None) -> str:
    return "-" if start is None or end is None else f"{(end - start).total_seconds():.2f} s"


def toml(**sections: Mapping[str, object]) -> str:
    """Tables of plain values as TOML, whose strings and numbers are JSON's."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            lines.append(f"{key} = {json.dumps(str(value) if isinstance(value, Path) else value)}")
    return "\n".join(lines) + "\n"


async def _healthy(api: HttpApi) -> bool:
    try:
        return await api.get("/health") is True
    except BackendError:
        return False


async def _has_worker(api: HttpApi) -> bool:
    return bool(await api.post(f"/work_pools/{POOL}/workers/filter", {}))


async def _create_run(api: HttpApi, deployment: str) -> str:
    body = {"state": {"type": "SCHEDULED", "name": "Scheduled"}}
    return str((await api.post(f"/deployments/{deployment}/create_flow_run", body))["id"])


async def _read(api: HttpApi, name: str, run_id: str) -> Passed:
    run_ = await api.get(f"/flow_runs/{run_id}")
    states = await api.get("/flow_run_states/", {"flow_run_id": run_id})
    history = sorted((_time(state["timestamp"]), StateType(state["type"]), str(state["name"])) for state in states)
    return Passed(name, _time(run_["created"]), tuple((kind, state, at) for at, kind, state in history))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
