"""The machine that something is installed on: its files below a root, who we are on it, and why it may refuse us."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from supervisor.install.bundle import CONFIG, PROGRAMS, SYSUSERS, TMPFILES, UNITS, CannotInstall
from supervisor.install.plan import HIDDEN, LINK
from supervisor.process.environ import inherited

_USER = "flow-agent"
_USERADD = ("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", f"/var/lib/{_USER}", "--shell")
_MAKE_FOLDER = ("install", "--directory", "--mode=0750", f"--group={_USER}")
_PACKAGED_UNITS = ("usr/lib/systemd/system/flow-agent.service", "lib/systemd/system/flow-agent.service")


def run(command: Sequence[str]) -> None:
    """Runs a command of the machine and waits for it. Raises `CannotInstall` with what it said when it fails."""
    # Not in our own environment: a library path of the bundle would have it load our libraries.
    try:
        done = subprocess.run(
            command, env=inherited(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CannotInstall(f"`{' '.join(command)}` cannot be run: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise CannotInstall(f"`{' '.join(command)}` failed: {said}")


class Machine(msgspec.Struct, frozen=True):
    """Where things are put. Paths given to it are those of the machine, whatever its root is here."""

    root: Path = Path("/")
    uid: int = msgspec.field(default_factory=os.geteuid)
    run: Callable[[Sequence[str]], None] = run
    find: Callable[[str], str | None] = shutil.which

    def at(self, path: PurePosixPath) -> Path:
        return self.root / path.relative_to("/")

    def read(self, path: PurePosixPath) -> bytes:
        """What is in it; nothing where it is not."""
        try:
            return self.at(path).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise CannotInstall(f"cannot read {path}: {error.strerror}") from error

    def digest(self, path: PurePosixPath) -> str | None:
        """Of what lies there: None for nothing, `LINK` for a link, `HIDDEN` for what this user may not see."""
        there = self.at(path)
        try:
            return LINK if there.is_symlink() else hashlib.sha256(there.read_bytes()).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            return HIDDEN
        except OSError as error:
            raise CannotInstall(f"cannot read {path}: {error.strerror}") from error

    def refusal(self, program: Path) -> str | None:
        """Why nothing can be installed here, as a sentence; None when it can."""
        if self.uid != 0:
            return f"this changes /usr/local and /etc, so it needs root: sudo {program} install"
        if not (self.root / "run/systemd/system").is_dir():
            return "systemd does not run this machine; run `flow-agent start` under the init that does"
        if packaged := next((unit for unit in _PACKAGED_UNITS if (self.root / unit).exists()), None):
            is_deb = (self.root / "var/lib/dpkg/info/flow-agent.list").exists()
            command = "apt install ./flow-agent_….deb" if is_deb else "dnf install ./flow-agent-….rpm"
            return (
                f"the flow-agent package is here already (/{packaged}); upgrade it with `{command}`, or remove it first"
            )
        return None

    def commands(self) -> tuple[tuple[str, ...], ...]:
        """What is run when the files are in place: for the user, the directories, and systemd to see the units."""
        if self.find("systemd-sysusers"):
            user: list[tuple[str, ...]] = [("systemd-sysusers", str(SYSUSERS))]
        elif f"\n{_USER}:" in "\n" + self.read(PurePosixPath("/etc/passwd")).decode():
            user = []
        else:
            user = [(*_USERADD, self.find("nologin") or "/bin/false", _USER)]
        # Keeps keys and the like from other users, whatever mode they are given. Another group was somebody's wish.
        folder = self.at(CONFIG.parent)
        make = not folder.exists() or folder.stat().st_gid == 0
        return (
            *user,
            *([(*_MAKE_FOLDER, str(CONFIG.parent))] if make else []),
            ("systemd-tmpfiles", "--create", str(TMPFILES)),
            ("systemctl", "daemon-reload"),
        )

    def enabled(self) -> list[str]:
        """Our units that systemd starts when the machine does."""
        return sorted(link.name for link in self.at(UNITS).glob("*.wants/flow-agent*.service"))

    def idle_builds(self, current: str) -> list[PurePosixPath]:
        """Folders of earlier builds from which no process runs. A running one still reads from its own."""
        executed = set()
        for link in Path("/proc").glob("[0-9]*/exe"):
            try:
                executed.add(link.readlink().parent)
            except OSError:  # ended meanwhile, or a thread of the kernel
                continue
        folders = [folder for folder in self.at(PROGRAMS).iterdir() if folder.is_dir() and folder.name != current]
        return [PROGRAMS / folder.name for folder in sorted(folders) if folder not in executed]
