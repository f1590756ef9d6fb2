"""What systemd is about to do with us: asked when it has told us to stop, for a SIGTERM does not say why.

And asked again while we stop, for another order replaces the first one in its queue and no second signal tells us.
"""

from __future__ import annotations

import enum
import logging
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import trio

ASKING_SECONDS = 2.0  # the longest that a stop may be delayed by asking what it means

_STARTED_BY_SYSTEMD = ("INVOCATION_ID", "SYSTEMD_EXEC_PID")  # the second since 248
# What systemctl needs to find the manager. No library path: in a one-file binary it would lead into our own bundle.
_NEEDED = ("PATH", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS")
# A manager that works towards one of these leaves no process alive. A user's manager ends by exit.target, at logout.
_ENDS = frozenset(
    f"{name}.target"
    for name in ("shutdown", "poweroff", "reboot", "soft-reboot", "halt", "kexec", "final", "umount", "exit")
)
_RESTARTS = frozenset({"restart", "try-restart", "reload-or-restart"})
_START = ("start", "waiting")  # of our own unit: it takes the place of the stop that we were told of
_log = logging.getLogger("flow-agent")


class Intent(enum.StrEnum):
    """Why we are told to stop."""

    STOP = "stop"  # somebody wants us to be stopped, or there is no systemd to ask
    RESTART = "restart"  # another agent follows at once
    SHUTDOWN = "shutdown"  # the machine goes down, or all that this user runs on it is ended


class Manager:
    """The systemd that started us, the machine's or a user's; without one, every stop is just a stop.

    `unit` is our service's name, None where the control groups do not tell it.
    """

    def __init__(self, environ: Mapping[str, str] | None, unit: str | None = None, *, of_user: bool = False) -> None:
        self._environ = environ
        self._command = ("systemctl", *(("--user",) if of_user else ()))
        self.unit = unit

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], cgroup: Path = Path("/proc/self/cgroup")) -> Manager:
        """As this process was started. Read early: the agent may move to another control group inside its unit."""
        if not any(environ.get(name) for name in _STARTED_BY_SYSTEMD):
            return cls(None)
        units = _units(cgroup)
        of_user = any(name.startswith("user@") for name in units)
        kept = {name: environ[name] for name in _NEEDED if name in environ}
        return cls(kept, units[-1] if units else None, of_user=of_user)

    async def intent(self) -> Intent:
        """Why we are told to stop, within two seconds; what cannot be found out is `STOP`."""
        if self._environ is None:
            return Intent.STOP
        found = Intent.STOP
        with trio.move_on_after(ASKING_SECONDS) as asking:
            found = read_jobs(await self._ask("list-jobs", "--no-legend", "--plain", "--full"), self.unit)
            if found is not Intent.SHUTDOWN and await self._ask("is-system-running") == "stopping":
                found = Intent.SHUTDOWN
        if asking.cancelled_caught:
            _log.debug("cannot ask systemd why we are stopped: no answer within %g s", ASKING_SECONDS)
        return found

    async def _ask(self, *words: str) -> str:
        """What systemctl says, empty when it cannot be asked. Its exit code is 1 also where the answer is "stopping"."""
        try:
            done = await trio.run_process(
                [*self._command, *words],
                env={**(self._environ or {}), "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        except OSError as error:
            _log.debug("cannot ask systemd why we are stopped: %s", error)
            return ""
        said = done.stdout.decode(errors="replace").strip()
        if done.returncode and not said:
            complaint = done.stderr.decode(errors="replace").strip()
            _log.debug(
                "cannot ask systemd why we are stopped: systemctl exited with %d: %s", done.returncode, complaint
            )
        return said


def read_jobs(text: str, unit: str | None) -> Intent:
    """What the manager's queue means for us: lines of number, unit, type and state."""
    found = Intent.STOP
    for line in text.splitlines():
        match line.split():
            case [number, name, "start", _] if number.isdigit() and name in _ENDS:
                return Intent.SHUTDOWN
            case [number, name, kind, state] if number.isdigit() and name == unit:
                if kind in _RESTARTS or (kind, state) == _START:
                    found = Intent.RESTART
    return found


def _units(cgroup: Path) -> list[str]:
    """The services that this process is inside of, outermost first; empty where that cannot be read.

    Two lines can tell it, of which one says nothing more than "/": systemd's own, and that of cgroup v2.
    """
    try:
        lines = cgroup.read_text().splitlines()
    except OSError as error:
        _log.debug("cannot read the name of our unit: %s", error)
        return []
    for line in lines:
        hierarchy, _, path = line.partition(":")[2].partition(":")
        if hierarchy in ("", "name=systemd"):
            parts = PurePosixPath(path).parts
            # What the kernel would take for a file of its own bears an underscore more.
            if units := [part.removeprefix("_") for part in parts if part.endswith(".service")]:
                return units
    return []
