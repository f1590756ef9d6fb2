"""The stage: a temporary folder, the server's and the agent's processes in it, and how all of it goes away again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from supervisor.backend.http import HttpApi
from supervisor.config import Api, Credentials
from supervisor.demo.user import User
from supervisor.errors import FlowAgentError
from supervisor.process import signals, stop
from supervisor.process.environ import MARK, inherited
from supervisor.process.launch import Child, launch

POOL = "demo"
SERVER_SECONDS = 120.0  # for the server to make its database and answer
AGENT_SECONDS = 60.0
LAST_LINES = 20

Tell = Callable[[str], None]


class DemoFailed(FlowAgentError):
    """The demonstration could not go on; the sentence says why."""


class Stage:
    """Owns the folder and the processes of one demonstration."""

    def __init__(self, python: Path, tell: Tell) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flow-agent-demo-"))
        self._python = python
        self._tell = tell
        self._mark = f"demo-{uuid.uuid4().hex}"  # whatever our processes start can be found by it
        self._server: Child | None = None
        self._agent: Child | None = None
        self.url = ""  # the server's, once there is one

    async def start_server(self, stack: AsyncExitStack) -> User:
        """Starts a server and returns its user once it answers. Raises `DemoFailed`."""
        settings = {
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_ENABLED": "false",
            "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        }
        for _ in range(3):  # somebody may be faster than we on a port that was free
            port = _free_port()
            self.url = f"http://127.0.0.1:{port}/api"
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
            self._server = await self._launch("server", command, settings, self.home)
            api = await stack.enter_async_context(HttpApi.open(Api(url=self.url, timeout_seconds=10), Credentials))
            user = User(api)
            if await self._until(user.healthy, self._server, SERVER_SECONDS):
                return user
            await stop.end(self._server.ref, self._mark, grace=5)
        raise DemoFailed("cannot start a Prefect server: it ended, or did not answer in time")

    async def start_agent(self, user: User) -> None:
        """Starts the agent by its own command and returns when the server knows it. Raises `DemoFailed`."""
        config = self.home / "agent.toml"
        config.write_text(
            _toml(
                agent={"name": "demo", "state_dir": self.home / "state", "log_dir": self.home / "logs"},
                api={"url": self.url},
                poll={"interval_seconds": 1.0, "cancel_interval_seconds": 1.0},
                flows={"python": self._python, "grace_seconds": 5.0},
            )
        )
        # A frozen binary is the command itself; otherwise it is this Python's module, found where we were found.
        command = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "supervisor"]
        here = Path(__file__).parents[2]
        arguments = ["start", "--config", str(config), "--pool", POOL]
        self._agent = await self._launch("agent", [*command, *arguments], {"PYTHONPATH": str(here)}, self.home)

        if not await self._until(partial(user.has_worker, POOL), self._agent, AGENT_SECONDS):
            raise DemoFailed("cannot start the agent: it ended, or the server has not heard of it in time")

    async def end(self) -> str:
        """Ends every process, removes the folder, and returns the last words of server and agent.

        Bounded: a process that not even SIGKILL ends is left after half a minute.
        """
        with trio.CancelScope(shield=True):
            with trio.move_on_after(30):
                if self._agent is not None and signals.interrupt_group(self._agent.ref, signal.SIGQUIT):
                    with trio.move_on_after(10):  # QUIT: it ends its own runs first
                        await self._agent.wait()
                for child in (self._agent, self._server):
                    if child is not None:
                        await stop.end(child.ref, self._mark, grace=5)
                        await child.wait()
            words = await trio.to_thread.run_sync(self._last_words)
            await trio.to_thread.run_sync(lambda: shutil.rmtree(self.home, ignore_errors=True))
        return words

    async def _launch(self, name: str, command: Sequence[str], settings: Mapping[str, str], cwd: Path) -> Child:
        theirs = {key: value for key, value in inherited(os.environ).items() if not key.startswith("PREFECT_")}
        ours = {MARK: self._mark, "PREFECT_HOME": str(self.home / "prefect")}
        return await launch(command, env={**theirs, **ours, **settings}, cwd=cwd, output=self.home / f"{name}.log")

    async def _until(self, condition: Callable[[], Awaitable[bool]], child: Child, seconds: float) -> bool:
        """Whether the condition came true in time and before the process ended."""
        true = False
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                self._tell(f"process {child.ref.pid} {await child.wait()}")
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            with trio.move_on_after(seconds):
                while not (true := await condition()):  # noqa: ASYNC110 - what changes is in another process
                    await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        return true

    def _last_words(self) -> str:
        said: list[str] = []
        for log in sorted(self.home.glob("*.log")):
            said += [f"--- {log.stem} ---", *log.read_text(errors="replace").splitlines()[-LAST_LINES:]]
        return "\n".join(said)


def _toml(**sections: Mapping[str, object]) -> str:
    """Tables of plain values as TOML, where strings and numbers are written as in JSON."""
    lines: list[str] = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, default=str)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
