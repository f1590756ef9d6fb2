"""Real Prefect servers, and a small client with which tests play the user of one."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests import envs
from tests.waiting import wait_until

E2E_FLOWS = Path(__file__).parent / "flows" / "e2e"
TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
_START_SECONDS = 120
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def clean_environ(**more: str) -> dict[str, str]:
    """Our environment without anything that speaks to Prefect or to an agent."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "FLOW_AGENT_", "NOTIFY_", "WATCHDOG_", "LISTEN_"))
    }
    return kept | more


def processes_with(name: str, value: str | None = None) -> list[psutil.Process]:
    """The living processes that carry that environment variable (with that value)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            environ = process.environ()
            if (name in environ if value is None else environ.get(name) == value) and process.pid != os.getpid():
                found.append(process)
    return found


class PrefectServer:
    """A Prefect server of one release, on SQLite, on a loopback port, in a home of its own.

    Its database starts as a copy of a migrated one: the first start of a release takes nine seconds, the others three.
    Owns the process; `stop` leaves neither a process nor a file.
    """

    def __init__(self, version: str, settings: Mapping[str, str] | None = None) -> None:
        self.version = version
        self.major = int(version.partition(".")[0])
        self.python = envs.interpreter(version)
        self.home = Path(tempfile.mkdtemp(prefix=f"prefect-{version}-"))
        self.port = free_port()
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def output(self) -> Path:
        return self.home / "output.txt"

    def start(self) -> PrefectServer:
        """Starts it and waits until it is healthy; takes another port when somebody was faster on the first."""
        if not (self.home / "prefect.db").exists():
            shutil.copy(_migrated_database(self.version), self.home / "prefect.db")
        for _ in range(5):
            self._spawn()
            if self._wait_healthy():
                return self
            self._end(signal.SIGKILL)
            self.port = free_port()
        raise AssertionError(f"the Prefect {self.version} server does not start:\n{self.output.read_text()}")

    def stop(self) -> None:
        """Ends the server and removes its home."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.home, ignore_errors=True)

    def pause(self) -> None:
        """Freezes the server: connections are accepted by the kernel and never answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Ends the server politely; its home and port stay for `start`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the server; its home and port stay for `start`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kills it and starts it again on the same port, with the same database."""
        self.kill()
        self._spawn()
        if not self._wait_healthy():
            raise AssertionError(f"the Prefect {self.version} server does not come back:\n{self.output.read_text()}")

    def _spawn(self) -> None:
        # On 2.x `prefect server start` is a second Python that starts exactly this uvicorn and waits for it.
        command = (
            ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--timeout-keep-alive", "5"]
            if self.major == 2
            else ["-m", "prefect", "server", "start"]
        )
        environ = clean_environ(
            PREFECT_HOME=str(self.home),
            PREFECT_API_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{self.home}/prefect.db",
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_UI_ENABLED="false",
            PREFECT_LOGGING_SERVER_LEVEL="WARNING",
            **self._settings,
        )
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [self.python, *command, "--host", "127.0.0.1", "--port", str(self.port)],
                env=environ,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _wait_healthy(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    return self._process.poll() is None
            time.sleep(0.05)
        return False

    def _signal(self, signum: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signum)

    def _end(self, signum: int) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        wait_until(lambda: not _group_exists(process.pid), 10, f"process group {process.pid} of the server is gone")


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _migrated_database(version: str) -> Path:
    """A database of that release after its first start, kept in the cache beside the environments."""
    python = envs.interpreter(version)
    cached = python.parent.parent / "migrated.db"
    with cached.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cached.exists():
            server = PrefectServer(version)
            try:
                (server.home / "prefect.db").touch()  # a file that is there is not replaced by the copy
                server.start()
                server.terminate()
                part = cached.with_suffix(".part")
                part.unlink(missing_ok=True)
                with (
                    contextlib.closing(sqlite3.connect(server.home / "prefect.db")) as source,
                    contextlib.closing(sqlite3.connect(part)) as target,
                ):
                    source.backup(target)
                part.rename(cached)
            finally:
                server.stop()
    return cached


class Api:
    """What a user does with `prefect deploy`, `prefect deployment run`, `prefect flow-run cancel` and the UI.

    Over plain REST, for both generations. Calls are repeated while a busy SQLite server answers 503 or "locked".
    """

    def __init__(self, server: PrefectServer, headers: Mapping[str, str] | None = None) -> None:
        self.server = server
        self.client = httpx.Client(headers=dict(headers or {}), timeout=30, trust_env=False)

    def close(self) -> None:
        self.client.close()

    def call(self, method: str, path: str, json: Any = None, **query: Any) -> httpx.Response:
        """One request, repeated for 30 s through 503, a locked database and dropped connections. Other errors raise."""
        deadline = time.monotonic() + 30
        while True:
            try:
                answer = self.client.request(method, f"{self.server.url}{path}", json=json, params=query or None)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            else:
                busy = answer.status_code == 503 or (answer.status_code == 500 and time.monotonic() < deadline - 20)
                if not busy or time.monotonic() > deadline:
                    if answer.is_error:
                        raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text}")
                    return answer
            time.sleep(0.2)

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, **query).json()

    def post(self, path: str, json: Any = None) -> Any:
        answer = self.call("POST", path, {} if json is None else json)
        return answer.json() if answer.content else None

    def patch(self, path: str, json: Any) -> None:
        self.call("PATCH", path, json)

    def delete(self, path: str) -> None:
        self.call("DELETE", path)

    # --- pools and queues ------------------------------------------------------------------------------------------

    def create_pool(self, name: str | None = None, **fields: Any) -> str:
        """A work pool, of type process unless `type` says otherwise. Returns its name."""
        name = name or f"pool-{uuid.uuid4().hex[:8]}"
        self.post("/work_pools/", {"name": name, "type": "process", **fields})
        return name

    def create_pool_queue(self, pool: str, name: str, **fields: Any) -> Any:
        return self.post(f"/work_pools/{pool}/queues", {"name": name, **fields})

    def create_queue(self, name: str | None = None, **fields: Any) -> str:
        """An agent-style queue. Returns its name."""
        name = name or f"queue-{uuid.uuid4().hex[:8]}"
        self.post("/work_queues/", {"name": name, **fields})
        return name

    # --- deployments -----------------------------------------------------------------------------------------------

    def create_flow(self, name: str) -> str:
        flow_id: str = self.post("/flows/", {"name": name})["id"]
        return flow_id

    def create_deployment(
        self,
        flow: str,
        *,
        name: str | None = None,
        pool: str | None = None,
        queue: str | None = None,
        file: str = "flows.py",
        path: Path | None = E2E_FLOWS,
        job_variables: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        tags: Collection[str] = (),
        concurrency_limit: int | None = None,
        **fields: Any,
    ) -> str:
        """A deployment of `flow` in `path`/`file`, in a pool, a pool's queue, or an agent-style queue. Returns its id.

        `flow` is the function's name; it is also the flow's name on the server, with dashes.
        """
        body: dict[str, Any] = {
            "name": name or f"deployment-{uuid.uuid4().hex[:8]}",
            "flow_id": self.create_flow(flow.replace("_", "-")),
            "entrypoint": f"{file}:{flow}",
            "path": str(path) if path else None,
            "parameters": dict(parameters or {}),
            "tags": list(tags),
            "enforce_parameter_schema": False,
            "infra_overrides" if self.server.major == 2 else "job_variables": dict(job_variables or {}),
            **fields,
        }
        if pool:
            body["work_pool_name"] = pool
        if queue:
            body["work_queue_name"] = queue
        if concurrency_limit is not None:
            body["concurrency_limit"] = concurrency_limit
        deployment_id: str = self.post("/deployments/", body)["id"]
        return deployment_id

    # --- flow runs -------------------------------------------------------------------------------------------------

    def create_run(
        self, deployment_id: str, parameters: Mapping[str, Any] | None = None, *, due_in: float = 0, **fields: Any
    ) -> str:
        """A scheduled run of a deployment, due in that many seconds. Returns its id."""
        due = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=due_in)
        state = {"type": "SCHEDULED", "name": "Scheduled", "state_details": {"scheduled_time": due.isoformat()}}
        body = {
            "parameters": dict(parameters or {}),
            "state": state,
            "idempotency_key": uuid.uuid4().hex,  # so that a repeated call makes no second run
            **fields,
        }
        run_id: str = self.post(f"/deployments/{deployment_id}/create_flow_run", body)["id"]
        return run_id

    def read_run(self, run_id: str) -> Any:
        return self.get(f"/flow_runs/{run_id}")

    def state(self, run_id: str) -> str:
        """The type of the run's state now."""
        state_type: str = self.read_run(run_id)["state_type"]
        return state_type

    def states(self, run_id: str) -> list[tuple[str, str]]:
        """(type, name) of every state the run has had, oldest first."""
        found = sorted(self.state_records(run_id), key=lambda state: state["timestamp"])
        return [(state["type"], state["name"]) for state in found]

    def state_records(self, run_id: str) -> list[Any]:
        records: list[Any] = self.get("/flow_run_states/", flow_run_id=run_id)
        return records

    def logs(self, run_id: str) -> list[str]:
        """The messages in the run's log, oldest first."""
        found = self.post(
            "/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        )
        return [line["message"] for line in found]

    def set_state(self, run_id: str, state: str, name: str | None = None, *, force: bool = False, **fields: Any) -> Any:
        """Proposes a state; returns the server's whole answer ({status, state, details})."""
        return self.post(
            f"/flow_runs/{run_id}/set_state", {"state": {"type": state, "name": name, **fields}, "force": force}
        )

    def cancel(self, run_id: str) -> Any:
        """What `prefect flow-run cancel` does."""
        return self.set_state(run_id, "CANCELLING")

    def resume(self, run_id: str) -> Any:
        return self.post(f"/flow_runs/{run_id}/resume")

    def wait_for_state(self, run_id: str, types: str | Collection[str] = TERMINAL, timeout: float = 60) -> Any:
        """Waits until the run's state has one of these types and returns the run.

        A terminal state that was not asked for ends the wait at once with an `AssertionError`.
        """
        wanted = {types} if isinstance(types, str) else set(types)

        def arrived() -> Any:
            run = self.read_run(run_id)
            if run["state_type"] in wanted:
                return run
            if run["state_type"] in TERMINAL:
                raise AssertionError(
                    f"run {run_id} ended as {run['state']}, not {sorted(wanted)}\n{self.story(run_id)}"
                )
            return None

        return wait_until(
            arrived, timeout, f"run {run_id} in state {sorted(wanted)}", every=0.1, more=lambda: self.story(run_id)
        )

    def story(self, run_id: str) -> str:
        """The run's states and log, for a failed test's message."""
        return f"states: {self.states(run_id)}\nlog:\n" + "\n".join(self.logs(run_id))
