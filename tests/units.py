"""The agent as a unit on a booted machine: how it gets there, and what tests ask of it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from tests.agents import to_toml
from tests.binaries import binary
from tests.machines import Machine
from tests.packages import NEXT, package
from tests.servers import E2E_FLOWS, Api
from tests.waiting import lines, wait_until

UNIT = "flow-agent.service"
USER = "flow-agent"
CONFIG = "/etc/flow-agent/agent.toml"
TRACE = "/srv/trace"  # where flows write what they have done


# --- how it gets onto the machine -------------------------------------------------------------------------------------


class Deb:
    """The package: a folder, one process, in /usr."""

    processes = 1
    start = "cold"

    def install(self, machine: Machine) -> None:
        self._install(machine, package("deb"))

    def upgrade(self, machine: Machine) -> None:
        self._install(machine, package("deb", NEXT))
        said = machine.run("dpkg-query", "--show", "--showformat=${Version}", "flow-agent").stdout
        assert said.startswith(NEXT)

    @staticmethod
    def _install(machine: Machine, file: Path) -> None:
        machine.path(f"/root/{file.name}").write_bytes(file.read_bytes())
        machine.run("dpkg", "--install", f"/root/{file.name}")


class Onefile:
    """The single download, installed by itself: two processes, in /usr/local. Its runs start warm."""

    processes = 2
    start = "warm"

    def install(self, machine: Machine) -> None:
        machine.path("/root/flow-agent").write_bytes(binary("onefile").read_bytes())
        machine.path("/root/flow-agent").chmod(0o755)
        machine.run("/root/flow-agent", "install")

    def upgrade(self, machine: Machine) -> None:
        machine.run("/root/flow-agent", "install")
        machine.run("systemctl", "restart", UNIT)


Form = Deb | Onefile
FORMS: dict[str, type[Form]] = {"deb": Deb, "onefile": Onefile}


def pid_inside(process: psutil.Process) -> int:
    """What its machine calls a process that we know by its pid here; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(re.findall(r"NSpid:.*\t(\d+)\n", Path(f"/proc/{process.pid}/status").read_text())[0])
    return 0


# --- the unit under test ----------------------------------------------------------------------------------------------


class Unit:
    """One machine with the agent on it, and the server that it works for. Owns the run that is always in flight."""

    def __init__(self, machine: Machine, form: Form, api: Api) -> None:
        self.machine = machine
        self.form = form
        self.api = api
        self.pool = api.create_pool()
        self.run_id = ""
        self.run_pid = 0
        self.go = ""  # the file that lets the run go which was held last
        self._deployments: dict[tuple[str, str], str] = {}
        for file in [*E2E_FLOWS.glob("*.py"), *E2E_FLOWS.with_name("units").glob("*.py")]:
            machine.write(f"/srv/flows/{file.name}", file.read_text())
        machine.path(TRACE).mkdir()
        machine.path(TRACE).chmod(0o1777)

    # --- its configuration -------------------------------------------------------------------------------------------

    def config(self, pool: str | None = None, **sections: dict[str, Any]) -> str:
        """agent.toml for tests: quick polls, short grace."""
        values: dict[str, dict[str, Any]] = {
            "agent": {"limit": 8},
            "api": {"url": self.api.server.url},
            "poll": {"interval_seconds": 0.5, "cancel_interval_seconds": 0.5, "heartbeat_seconds": 2},
            "flows": {"python": "/usr/bin/python3", "grace_seconds": 3, "start": self.form.start},
        }
        for name, more in sections.items():
            values[name] = {**values.get(name, {}), **more}
        return to_toml({**values, "work": [{"pool": pool or self.pool}]})

    def configure(self, **sections: dict[str, Any]) -> None:
        self.machine.write(CONFIG, self.config(**sections))

    def drop_in(self, name: str, text: str | None) -> None:
        """Puts a drop-in beside the unit, or takes it away."""
        path = f"/etc/systemd/system/{UNIT}.d/{name}.conf"
        if text is None:
            self.machine.path(path).unlink()
        else:
            self.machine.write(path, text)
        self.systemctl("daemon-reload")

    # --- systemd -----------------------------------------------------------------------------------------------------

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.machine.run("systemctl", *words, check=check)

    def show(self, name: str) -> str:
        return self.machine.show(UNIT, name)

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def wait_active(self) -> None:
        self.machine.wait_for(UNIT, "ActiveState", "active")

    def wait_restarted(self, before: int, restarts: int) -> None:
        """Until systemd has started it again, by itself."""
        wait_until(
            lambda: self.show("ActiveState") == "active" and self.main_pid() not in (0, before),
            60,
            "the agent is started again",
            every=0.2,
            more=lambda: self.machine.status(UNIT),
        )
        assert int(self.show("NRestarts")) == restarts + 1
        self.is_one_agent()

    def wait_status(self, text: str) -> None:
        """Until its line in `systemctl status` has that in it."""
        wait_until(
            lambda: text in self.show("StatusText"),
            20,
            f"the status says {text!r}",
            every=0.1,
            more=lambda: self.machine.status(UNIT),
        )

    def wait_told(self, text: str, *wanted: str) -> None:
        """Until the journal has it: wait_told("started", "FLOW_RUN_ID=…")."""
        wait_until(
            lambda: text in self.machine.messages(*wanted),
            20,
            f"the journal says {text!r}",
            every=0.2,
            more=lambda: self.machine.messages(*wanted),
        )

    # --- its processes -----------------------------------------------------------------------------------------------

    def processes(self, below: str = "") -> list[psutil.Process]:
        return self.machine.processes(f"system.slice/{UNIT}/{below}")

    def is_one_agent(self) -> None:
        """No second one is left beside it, and it is all in its place, its fork server included."""
        wanted = self.form.processes + (self.form.start == "warm")
        wait_until(
            lambda: len(self.processes("supervisor")) == wanted,
            20,
            f"there is one agent, of {wanted} process(es)",
            more=lambda: str([process.cmdline() for process in self.processes("supervisor")]),
        )

    def is_unprivileged(self) -> None:
        """Nothing in the unit has root's rights, or could get them but by a program that gives them to its caller."""
        uid = int(self.machine.run("id", "--user", USER).stdout)
        for process in self.processes():
            try:
                assert set(process.uids()) == {uid}, process.cmdline()
                status = Path(f"/proc/{process.pid}/status").read_text()
                assert re.search(r"CapEff:\s+0+\n", status), f"{process.cmdline()}\n{status}"
            except (psutil.NoSuchProcess, FileNotFoundError):
                continue

    # --- its runs ----------------------------------------------------------------------------------------------------

    def start_run(self, flow: str, file: str = "flows.py", **parameters: Any) -> str:
        """A run that is due now. Returns its id."""
        return self.start_run_in(self.pool, flow, file, **parameters)

    def start_run_in(self, pool: str, flow: str, file: str = "flows.py", **parameters: Any) -> str:
        key = pool, flow
        if key not in self._deployments:
            self._deployments[key] = self.api.create_deployment(flow, pool=pool, file=file, path=Path("/srv/flows"))
        return self.api.create_run(self._deployments[key], parameters)

    def hold(self) -> tuple[str, int]:
        """Starts a run that ends when it is let go. Returns its id and the pid of its body, inside."""
        name = f"held-{time.monotonic_ns()}"
        run_id = self.start_run("held", "held.py", trace=f"{TRACE}/{name}", go=f"{TRACE}/{name}.go")
        trace = self.machine.path(f"{TRACE}/{name}")
        (line,) = wait_until(lambda: lines(trace), 60, "the held run has begun", more=lambda: self.story(run_id))
        assert line.split()[0] == run_id
        self.go = f"{TRACE}/{name}.go"
        return run_id, int(line.split()[1])

    def let_go(self) -> None:
        self.machine.write(self.go, "")

    def is_untouched(self) -> None:
        """The run in flight is the same process, and the server still says so."""
        assert self.machine.path(f"/proc/{self.run_pid}/environ").read_bytes().find(self.run_id.encode()) > 0
        assert self.api.state(self.run_id) == "RUNNING"
        assert [name for name, _ in self.api.states(self.run_id)].count("RUNNING") == 1

    def story(self, run_id: str) -> str:
        """One run's whole story, as its operator reads it, and the server's."""
        return self.machine.messages("-u", UNIT, f"FLOW_RUN_ID={run_id}") + self.api.story(run_id)

    def finished(self, run_id: str) -> None:
        self.api.wait_for_state(run_id, "COMPLETED", 90)
