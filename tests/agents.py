"""Real agents, started as a user would start them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.servers import PrefectServer, clean_environ, processes_with
from tests.waiting import SLOWEST, wait_until

RUN_MARK = "FLOW_AGENT_RUN_ID"
_TEST_START = "FLOW_AGENT_TEST_START"
_AGENT_MARK = "FLOW_AGENT_TEST_AGENT"  # put into its flows' environment, so that we know whose they are


def to_toml(document: Mapping[str, Any]) -> str:
    """A configuration as TOML: tables of values, and lists of such tables."""
    lines: list[str] = []
    for name, table in document.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {_value(value)}" for key, value in one.items() if value is not None]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


class NotifySocket:
    """A service manager's ear: a datagram socket that keeps every message it is sent. Owns the list."""

    def __init__(self) -> None:
        self.address = f"@flow-agent-test-{uuid.uuid4().hex}"
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind("\0" + self.address[1:])
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(65536):
            self.messages.append(message.decode())

    def lines(self, key: str) -> list[str]:
        """Every value that was sent for this key, in order: lines("STATUS")."""
        every = [line for message in list(self.messages) for line in message.splitlines()]
        return [line.partition("=")[2] for line in every if line.startswith(f"{key}=")]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as closer:
            closer.sendto(b"", "\0" + self.address[1:])  # an empty datagram ends the listener
        self._thread.join(10)
        self._socket.close()


class AgentProcess:
    """One `python -m supervisor start` with its own configuration, state directory and log directory.

    Owns the process. `home` holds agent.toml, state/, logs/ and what the agent wrote to stderr. `behind` is a command
    that becomes the one it is given: `unshare --mount` and the like.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        behind: Sequence[str] = (),
    ):
        self.home = Path(tempfile.mkdtemp(prefix="agent-"))
        self.config_file = self.home / "agent.toml"
        self._mark = uuid.uuid4().hex
        self.args = list(args)
        self.env = dict(env or {})
        self.behind = list(behind)
        self.notify = NotifySocket()
        self.process: subprocess.Popen[bytes] | None = None
        self.write_config(config)

    def write_config(self, config: Mapping[str, Any] | str) -> None:
        """Puts a configuration into agent.toml; what a mapping leaves out of [agent] and [flows] env is filled in."""
        if not isinstance(config, str):
            agent = {"state_dir": self.state_dir, "log_dir": self.log_dir, **config.get("agent", {})}
            flows = dict(config.get("flows", {}))
            flows["env"] = {_AGENT_MARK: self._mark, **flows.get("env", {})}
            config = to_toml({**config, "agent": agent, "flows": flows})
        self.config_file.write_text(config)

    @property
    def state_dir(self) -> Path:
        return self.home / "state"

    @property
    def log_dir(self) -> Path:
        return self.home / "logs"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *, wait: bool = True) -> AgentProcess:
        """Starts it; with `wait` returns when it has told the service manager READY=1."""
        seen = len(self.notify.lines("READY"))
        start = ["-m", "supervisor", "start", "--config", str(self.config_file)]
        command = [*self.behind, sys.executable, *start, *self.args]
        environ = clean_environ(NOTIFY_SOCKET=self.notify.address, **self.env)
        with (self.home / "stderr.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        if wait:
            wait_until(
                lambda: len(self.notify.lines("READY")) > seen or self.returncode is not None,
                30,
                "the agent says READY=1",
                more=self.log,
            )
            if self.returncode is not None and len(self.notify.lines("READY")) == seen:
                raise AssertionError(f"the agent ended at once with {self.returncode}:\n{self.log()}")
            self._warm_up()
        return self

    def _warm_up(self) -> None:
        """Where all shall be warm, no run starts cold because it comes early; otherwise that takes too long."""
        if os.environ.get(_TEST_START) == "warm" and 'start = "warm"' in self.config_file.read_text():
            wait_until(
                lambda: "warm starts with" in self.log() or self.returncode is not None,
                60,
                "it can start runs warm",
                more=self.log,
            )

    @property
    def returncode(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def log(self) -> str:
        """All that the agent wrote to stdout and stderr so far."""
        path = self.home / "stderr.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_log(self, text: str, timeout: float = 30) -> None:
        wait_until(lambda: text in self.log(), timeout, f"the agent's log says {text!r}", more=self.log)

    def send(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def wait(self, timeout: float = 60) -> int:
        """Waits for its end and returns the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout * SLOWEST)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the agent still runs after {timeout} s:\n{self.log()}") from None

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Asks it to end (SIGTERM: drain; SIGQUIT: cancel its runs), waits, and returns the exit code."""
        self.send(signum)
        return self.wait(timeout)

    def kill(self) -> None:
        """SIGKILL: its runs stay behind."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def run_processes(self) -> list[psutil.Process]:
        """Every living process of the runs it has started."""
        return [process for process in self._processes() if not _is_fork_server(process)]

    def fork_servers(self) -> list[psutil.Process]:
        """The processes from which its warm runs are copied."""
        return [process for process in self._processes() if _is_fork_server(process)]

    def _processes(self) -> list[psutil.Process]:
        return processes_with(_AGENT_MARK, self._mark)

    def kill_runs(self) -> None:
        """Kills what runs it left behind: for tests that kill the agent on purpose."""
        for process in self.run_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not self.run_processes(), 10, "the runs' processes are gone")

    def kill_fork_servers(self) -> None:
        """Kills those that should have ended with the agent, and have not."""
        for process in self.fork_servers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it if it still runs, and fails when processes of its runs are left, or the one from which they were copied."""
        stuck = ""
        if self.process is not None and self.returncode is None:
            self.send(signal.SIGQUIT)
            try:
                self.process.wait(30 * SLOWEST)
            except subprocess.TimeoutExpired:
                stuck = "the agent did not end within 30 s of SIGQUIT; "
                self.kill()
        left = [" ".join(process.cmdline()) for process in self.run_processes()]
        try:
            wait_until(lambda: not self.fork_servers(), 10, "the fork servers have ended")
        except AssertionError as error:
            stuck += f"{error}; "
        self.kill_fork_servers()
        self.kill_runs()
        self.notify.close()
        if stuck or left:
            raise AssertionError(f"{stuck}processes left behind: {left}\n{self.log()}")


def _is_fork_server(process: psutil.Process) -> bool:
    try:
        return "FLOW_AGENT_ROOM" in process.environ()
    except psutil.Error:
        return False


# Tests in which an agent has many runs: on 2.20, where each cold one imports for four seconds, these are the warm ones.
_MANY_RUNS = {
    "test_a_random_fifth_of_all_requests_going_wrong_costs_no_run_and_doubles_none",
    "test_each_way_to_end_runs_the_one_right_hook_once",
    "test_runs_that_run_pause_or_wait_are_ended_by_either_form_of_cancelling",
    "test_when_the_server_shows_cancelled_no_child_of_the_run_lives",
    "test_no_more_runs_at_once_than_the_limits_and_a_freed_slot_is_used_at_once",
}


def start_mode() -> str:
    """How runs of real engines start where a test does not say: "cold" or "warm".

    By turns: each test has one on one generation of Prefect and the other on the other. FLOW_AGENT_TEST_START names one for all.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    name = test.partition("[")[0]
    first = 0 if name.rpartition("::")[2] in _MANY_RUNS else zlib.crc32(name.encode())
    turn = (first + ("2.20" in test)) % 2
    return os.environ.get(_TEST_START) or ("cold", "warm")[turn]


def config_for(
    server: PrefectServer, work: Sequence[Mapping[str, Any]], **sections: Mapping[str, Any]
) -> dict[str, Any]:
    """A configuration for tests: quick polls, short grace. `sections` add to or replace values by section."""
    defaults: dict[str, Mapping[str, Any]] = {
        "agent": {"name": "test-agent", "log_level": "debug"},
        "api": {"url": server.url},
        "poll": {"interval_seconds": 0.5, "cancel_interval_seconds": 0.5, "heartbeat_seconds": 2},
        "flows": {"python": server.python, "grace_seconds": 5},
        "output": {"show": False},  # what flows print has tracebacks of its own
    }
    names = [*defaults, *(name for name in sections if name not in defaults)]
    merged: dict[str, Any] = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}
    # Scripts that play an engine cannot be imported.
    if merged["flows"]["python"] == server.python and "command" not in merged["flows"]:
        merged["flows"].setdefault("start", start_mode())
    return {**merged, "work": [dict(one) for one in work]}
