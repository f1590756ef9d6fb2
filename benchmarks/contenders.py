"""Who is measured, and how each is started: as its documentation says, with nothing set but server, place and limit."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import family, is_zombie
from tests.agents import AgentProcess
from tests.servers import Api, PrefectServer, clean_environ, processes_with
from tests.waiting import wait_until

FLOWS = Path(__file__).parent / "flows"
VERSION, VERSION_2 = "3.8.8", "2.20.26"
_MARK = "FLOW_AGENT_BENCHMARK"


@dataclass(frozen=True)
class Contender:
    """`reference` is the key of the one it is compared with; `start` is flow-agent's [flows] start, None for Prefect's own."""

    key: str
    title: str
    server: str
    reference: str
    start: str | None = None


CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender("worker", "prefect worker", VERSION, "worker"),
        Contender("cold", "flow-agent", VERSION, "worker", "cold"),
        Contender("warm", "flow-agent, warm", VERSION, "worker", "warm"),
        Contender("agent", "prefect agent", VERSION_2, "agent"),
        Contender("cold2", "flow-agent", VERSION_2, "agent", "cold"),
        Contender("warm2", "flow-agent, warm", VERSION_2, "agent", "warm"),
    )
}


class Running(ABC):
    """A contender at work, in a pool (2.20: queue) of its own. Owns its process and a home for its files."""

    def __init__(self, contender: Contender, server: PrefectServer, api: Api, limit: int) -> None:
        self.contender = contender
        self.server = server
        self.api = api
        self.limit = limit
        self.home = Path(tempfile.mkdtemp(prefix=f"{contender.key}-"))
        self.residents: list[psutil.Process] = []
        self.place: dict[str, Any] = {"pool": api.create_pool()} if server.major > 2 else {"queue": api.create_queue()}
        self._deployments = {
            flow: api.create_deployment(flow, path=FLOWS, **self.place) for flow in ("noop", "sleeper")
        }

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None:
        """Ends it and whatever is left of its runs."""

    @abstractmethod
    def log(self) -> str: ...

    def create(self, flow: str, *, due_in: float = 0, **parameters: Any) -> str:
        """A run that is due in that many seconds. Returns its id."""
        return self.api.create_run(self._deployments[flow], parameters, due_in=due_in)

    def pause(self, on: bool) -> None:
        """Whether its pool or queue hands out nothing for now."""
        if "pool" in self.place:
            path = f"/work_pools/{self.place['pool']}"
        else:
            path = f"/work_queues/{self.api.get('/work_queues/name/' + self.place['queue'])['id']}"
        self.api.patch(path, {"is_paused": on})

    def settle(self) -> None:
        """Waits until no process of a run is left, and notes which processes stay: `residents`."""
        wait_until(
            lambda: not any(map(_executes, self.residents_and_runs()[1:])),
            30,
            f"the processes of {self.contender.key}'s runs are gone",
            more=self.log,
        )
        self.residents = family(self.pid)

    def residents_and_runs(self) -> list[psutil.Process]:
        try:
            return family(self.pid)
        except psutil.NoSuchProcess:
            raise AssertionError(f"{self.contender.key} has ended:\n{self.log()}") from None


class Prefects(Running):
    """`prefect worker start` or `prefect agent start`."""

    def __init__(self, contender: Contender, server: PrefectServer, api: Api, limit: int) -> None:
        super().__init__(contender, server, api, limit)
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        where = (
            ["worker", "start", "--type", "process", "--pool", self.place["pool"]]
            if self.server.major > 2
            else ["agent", "start", "--work-queue", self.place["queue"]]
        )
        environ = clean_environ(
            PREFECT_API_URL=self.server.url, PREFECT_HOME=str(self.home / "prefect"), **{_MARK: self._mark}
        )
        with (self.home / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                [prefect(self.server.python), *where, "--limit", str(self.limit)],
                env=environ,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            for process in processes_with(_MARK, self._mark):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait(10)

    def log(self) -> str:
        return (self.home / "output.txt").read_text(errors="replace")


class Ours(Running):
    """`flow-agent start`, by the Python that runs this."""

    def __init__(self, contender: Contender, server: PrefectServer, api: Api, limit: int) -> None:
        super().__init__(contender, server, api, limit)
        work = {"queues": [self.place["queue"]]} if "queue" in self.place else self.place
        flows = {
            "python": server.python,
            "start": contender.start,
            "env": {"PREFECT_HOME": str(self.home / "prefect")},
        }
        self._agent = AgentProcess(
            {"agent": {"limit": limit}, "api": {"url": server.url}, "flows": flows, "work": [work]}
        )

    @property
    def pid(self) -> int:
        return self._agent.pid

    def start(self) -> None:
        self._agent.start()

    def stop(self) -> None:
        self._agent.close()

    def log(self) -> str:
        return self._agent.log()


def enter(contender: Contender, server: PrefectServer, api: Api, limit: int) -> Running:
    """That contender, ready to be started."""
    kind = Prefects if contender.start is None else Ours
    return kind(contender, server, api, limit)


def prefect(python: Path) -> Path:
    """The command `prefect` of that environment."""
    return python.with_name("prefect")


def _executes(process: psutil.Process) -> bool:
    """Whether it belongs to a run; one that has ended and was not waited for does."""
    try:
        return is_zombie(process) or "PREFECT__FLOW_RUN_ID" in process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
