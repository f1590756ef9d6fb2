"""Debian machines that boot a real systemd in a container, for the tests of packages and units.

    python -m tests.machines bookworm trixie        # makes what is missing in the cache, prints one path a line

A machine is a root directory from the cache, never written to (an overlay in memory takes every change), and shares the
loopback interface, so that it reaches the servers of the tests. It needs root, cgroup v2, systemd-nspawn and mmdebstrap here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from supervisor.process.cgroup import own_directory
from tests import envs
from tests.waiting import SLOWEST, wait_until

SUITES = {"bookworm": "3.11", "trixie": "3.13"}  # and the Python of each; systemd 252 and 257
PREFECT = "3.8.8"
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "sudo", "curl")
_IDLE = ("console-getty.service", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer")
_SITE = Path("opt/prefect")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_COMMANDS = ("systemd-nspawn", "mmdebstrap", "nsenter")


def why_not() -> str | None:
    """What this host lacks for booting machines, in words; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "only root can boot a machine"
    if missing := [command for command in _COMMANDS if shutil.which(command) is None]:
        return f"not installed: {', '.join(missing)} (apt install systemd-container mmdebstrap)"
    if _own_group() is None:
        return "no cgroup v2 is mounted"
    return None


# --- root directories -------------------------------------------------------------------------------------------------


def root_directory(suite: str) -> Path:
    """The root directory of that Debian release, with Python and Prefect; made first when it is missing.

    Raises `subprocess.CalledProcessError` when a step fails. Safe against a second caller at the same time.
    """
    recipe = [inspect.getsource(step) for step in (_bootstrap, _add_prefect)] + [envs.CONSTRAINTS.read_text()]
    recipe += [*_PACKAGES, *_IDLE, PREFECT, SUITES[suite]]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:8]
    root = envs.cache() / f"machine-{suite}-{digest}"
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.exists():  # whole, as it got its name last; a machine that runs on it shares the lock for minutes
        return root
    with _locked(root, fcntl.LOCK_EX):
        if root.exists():
            return root
        print(f"making the root directory of a {suite} machine in {root} (once)", file=sys.stderr, flush=True)
        _remove_older(suite, root)
        part = root.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        _bootstrap(suite, part)
        _add_prefect(suite, part)
        part.rename(root)
    return root


@contextlib.contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, how)
        yield


def _remove_older(suite: str, root: Path) -> None:
    """What an earlier recipe has made, unless a machine runs on it."""
    for older in root.parent.glob(f"machine-{suite}-*"):
        if older.is_dir() and older.suffix != ".part" and older != root:
            with contextlib.suppress(BlockingIOError), _locked(older, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(older)


def _bootstrap(suite: str, root: Path) -> None:
    """Debian's smallest system that boots."""
    keyring = [f"--keyring={_KEYRING}"] if _KEYRING.exists() else []
    wanted = ["--variant=minbase", f"--include={','.join(_PACKAGES)}"]
    subprocess.run(
        ["mmdebstrap", "--quiet", "--mode=root", *keyring, *wanted, suite, root], check=True, stdout=sys.stderr
    )
    # With an id of its own it is no first boot, which would ask questions and switch everything on.
    (root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    for unit in _IDLE:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _add_prefect(suite: str, root: Path) -> None:
    """Prefect for the system's own Python, compiled: who runs flows there may not write to it."""
    site = root / _SITE
    elsewhere = ["--target", str(site), "--python-version", SUITES[suite], "--only-binary", ":all:"]
    what = ["--constraint", str(envs.CONSTRAINTS), f"prefect=={PREFECT}"]
    envs.install(Path(sys.executable), *elsewhere, *what, only_uv=["--link-mode", "copy"])
    (root / "usr/lib/python3/dist-packages/prefect.pth").write_text(f"/{_SITE}\n")
    imports = "import prefect.engine, prefect.flow_engine, sqlite3, ssl"
    subprocess.run(["/usr/sbin/chroot", root, "/usr/bin/python3", "-c", imports], env={}, check=True, stdout=sys.stderr)


# --- machines ---------------------------------------------------------------------------------------------------------


def _own_group() -> Path | None:
    """Our control group (v2) on this host."""
    return own_directory(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())


# Waits until the machine is closed or its owner has died, whoever is first: both end the pipe. Then it ends everything in the
# control group and removes it, and what the container has made of that name for cgroup v1. $1 is the group's name, $2 the group.
_GUARD = """
read -r _
tries=0
while [ -d "$2" ] && [ "$tries" -lt 300 ]; do
    find "$2" -name cgroup.procs -exec cat {} + 2>/dev/null | while read -r pid; do kill -KILL "$pid" 2>/dev/null; done
    find /sys/fs/cgroup -depth -type d \\( -name "$1" -o -path "*/$1/*" \\) -exec rmdir {} + 2>/dev/null
    tries=$((tries + 1))
    sleep 0.1
done
"""


class Machine:
    """A booted machine. Owns the container, the guard of its control group, and what it has written to its console.

    `close` leaves nothing of it, and neither does the guard when this process dies without calling it.
    """

    def __init__(self, suite: str, home: Path) -> None:
        self.suite = suite
        self.name = f"fat-{suite}-{uuid.uuid4().hex[:6]}"
        self.console = home / f"{self.name}.console"
        self._root = root_directory(suite)
        own = _own_group()
        assert own is not None
        self._group = own / self.name
        self._lock: contextlib.AbstractContextManager[None] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._container: subprocess.Popen[bytes] | None = None
        self._init: psutil.Process | None = None

    def boot(self) -> Machine:
        """Starts it and waits until systemd has started everything; fails when a unit has failed."""
        self._lock = _locked(self._root, fcntl.LOCK_SH)
        self._lock.__enter__()
        guard = ["sh", "-c", _GUARD, "guard", self.name, self._group]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        self._group.mkdir()
        nspawn = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--volatile=overlay"]
        # A group of its own: two containers in one group would share everything below it.
        join = 'echo $$ >"$0" && exec "$@"'
        command = [
            *("sh", "-c", join, self._group / "cgroup.procs"),
            *nspawn,
            *(f"--machine={self.name}", f"--directory={self._root}", "--console=pipe"),
        ]
        with self.console.open("wb") as console:
            self._container = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._init = wait_until(self._find_init, 30, f"{self.name} has a process 1", more=self.console.read_text)
        wait_until(self._is_up, 60, f"{self.name} is up", every=0.2, more=self.console.read_text)
        failed = self.run("systemctl", "--failed", "--plain", "--no-legend").stdout
        assert not failed, f"units that fail on an empty machine:\n{failed}"
        return self

    def _find_init(self) -> psutil.Process | None:
        assert self._container is not None
        if self._container.poll() is not None:
            raise AssertionError(f"the container has ended:\n{self.console.read_text()}")
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._container.pid).children(recursive=True):
                status = Path(f"/proc/{child.pid}/status").read_text()
                ids = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
                if len(ids) > 1 and ids[-1] == "1" and child.name() == "systemd":
                    return child
        return None

    def _is_up(self) -> bool:
        asked = self.run("systemctl", "is-system-running", check=False)
        return asked.stdout.strip() in ("running", "degraded")

    # --- inside ------------------------------------------------------------------------------------------------------

    def run(
        self, *command: str | Path, check: bool = True, user: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command inside, as root or that user. With `check` a bad end fails the test, with all that was said."""
        assert self._init is not None
        become = ["runuser", "-u", user, "--"] if user else []
        done = subprocess.run(
            # nsenter's own --wd=/ is the root directory of the host.
            ["nsenter", "--target", str(self._init.pid), "--all", "env", "--chdir=/", *become, *map(str, command)],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout * SLOWEST,
        )
        if check and done.returncode:
            said = f"{done.stdout}{done.stderr}"
            raise AssertionError(f"{self.name}: `{shlex.join(map(str, command))}`: exit {done.returncode}\n{said}")
        return done

    def path(self, inside: str | Path) -> Path:
        """Where a path inside is found from here, as long as no symbolic link inside is absolute."""
        assert self._init is not None
        return Path(f"/proc/{self._init.pid}/root") / str(inside).lstrip("/")

    def write(self, inside: str | Path, text: str, mode: int = 0o644) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def group(self, name: str) -> Path:
        """A control group inside, as "system.slice/flow-agent.service"."""
        return self._group / "payload" / name

    def processes(self, group: str) -> list[psutil.Process]:
        """The living processes in that control group and below, by their pids here."""
        found = []
        for file in self.group(group).rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                for pid in file.read_text().split():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.append(psutil.Process(int(pid)))
        return found

    # --- systemd -----------------------------------------------------------------------------------------------------

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def wait_for(self, unit: str, name: str, value: str, timeout: float = 30) -> None:
        """Waits until that property of the unit is that value."""
        wait_until(
            lambda: self.show(unit, name) == value,
            timeout,
            f"{name} of {unit} is {value}",
            every=0.2,
            more=lambda: self.status(unit),
        )

    def status(self, unit: str) -> str:
        """What a person would look at."""
        status = self.run("systemctl", "status", "--full", "--no-pager", "--lines=30", unit, check=False)
        return f"{status.stdout}{status.stderr}"

    def journal(self, *wanted: str) -> list[dict[str, Any]]:
        """The journal's records with all their fields, oldest first: journal("-u", "flow-agent", "FLOW_RUN_ID=…")."""
        said = self.run("journalctl", "--quiet", "--no-pager", "--output=json", "--all", *wanted).stdout
        return [json.loads(line) for line in said.splitlines()]

    def messages(self, *wanted: str) -> str:
        """Their messages, a line each."""
        return self.run("journalctl", "--quiet", "--no-pager", "--output=cat", *wanted).stdout

    # --- the end -----------------------------------------------------------------------------------------------------

    def power_off(self, timeout: float = 60, *, wait: bool = True) -> None:
        """`systemctl poweroff`; with `wait`, until it is off."""
        self.run("systemctl", "--no-block", "poweroff")
        if wait:
            self.wait_off(timeout)

    def wait_off(self, timeout: float = 60) -> None:
        container = self._container
        assert container is not None
        try:
            container.wait(timeout * SLOWEST)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} is not off after {timeout} s\n{self.console.read_text()}") from None

    def close(self) -> None:
        """Ends it, however it is, and removes what is left of it here."""
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait(60)
        if self._container is not None:
            self._container.wait(10)
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None
        assert not self._group.exists(), f"{self._group} is left, with processes in it"


def main(suites: Sequence[str]) -> int:
    if reason := why_not():  # the tests that need them say so as well
        print(f"no machines are made: {reason}", file=sys.stderr)
        return 0
    for suite in suites:
        print(root_directory(suite))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
