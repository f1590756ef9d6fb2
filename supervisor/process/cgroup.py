"""Control groups (v2): a run's processes in a group of their own, which none of them can leave by accident.

    <own>/                what systemd (Delegate=yes) or the user has given us
      supervisor/         the agent itself: a group that has sub-groups with controllers may hold no process
      runs/<run id>/      one run, from its first instruction

The groups outlive the agent, and so does what is in them: a new agent finds the runs where they were.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import trio

from supervisor.errors import ConfigError

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
_SUPERVISOR = "supervisor"
_RUNS = "runs"
_DELEGATE = ("trusted.delegate", "user.delegate")  # systemd's word that the group is ours; older ones know the first
_CONTROLLERS = ("memory", "pids")
_MOVES = 20  # how often the agent's group is emptied: the packed binary's two processes may still be starting others
_LOOK = 0.002, 0.1  # seconds between two looks at a group that is not empty yet: the first, and the longest


class Cgroups:
    """The groups that are ours to make. Immutable; the state is the kernel's."""

    def __init__(self, own: Path) -> None:
        self.own = own

    def __repr__(self) -> str:
        return f"<Cgroups {self.own}>"

    @classmethod
    def find(cls, setting: str = AUTO) -> Cgroups | None:
        """The groups we may use, ready for use; None where there are none.

        "auto": the group we were started in, when it has been delegated to us; the agent moves into its `supervisor/`.
        "off": none. An absolute path: that group, made when it is missing, and the agent stays where it is.
        Raises `ConfigError` for a path that cannot be used.
        """
        if setting == OFF:
            return None
        if setting != AUTO:
            return cls._at(Path(setting))
        here = own_directory(_read(Path("/proc/self/mountinfo")), _read(Path("/proc/self/cgroup")))
        # Whoever has put us into a `supervisor/` of a delegated group (DelegateSubgroup=) has done our first step.
        placed = here is not None and here.name == _SUPERVISOR and delegated(here.parent)
        if here is None or not (placed or delegated(here)):
            return None
        own = cls(here.parent if placed else here)
        try:
            own._settle_in()
            own.prepare(controllers=placed)
        except OSError as error:
            log.warning("cannot use the delegated control group '%s': %s; runs get none", own.own, error.strerror)
            return None
        return own

    @classmethod
    def _at(cls, path: Path) -> Cgroups:
        own = cls(path)
        try:
            if not path.is_absolute():
                raise ConfigError(
                    f"cannot use the control group '{path}': it must be 'auto', 'off' or an absolute path"
                )
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "cgroup.procs").exists():
                raise ConfigError(f"cannot use the control group '{path}': it is not in a cgroup v2 file system")
            own.prepare(controllers=True)
            if not os.access(own.own / _RUNS / "cgroup.procs", os.W_OK):
                raise PermissionError(0, "Permission denied")
        except OSError as error:
            raise ConfigError(f"cannot use the control group '{path}': {error.strerror or error}") from error
        return own

    def _settle_in(self) -> None:
        """Move everything that is in our own group into its `supervisor/`: ourselves, and a packed binary's parent."""
        (self.own / _SUPERVISOR).mkdir(exist_ok=True)
        for _ in range(_MOVES):
            pids = _pids_in(self.own)
            if not pids:
                return
            for pid in pids:
                with suppress(ProcessLookupError):
                    (self.own / _SUPERVISOR / "cgroup.procs").write_text(str(pid))
        raise OSError(0, "it does not become empty")

    def prepare(self, *, controllers: bool) -> None:
        """Make the place for runs. With `controllers` each run's group counts its own OOM kills.

        Not where systemd starts us in `own` itself: it could not start us there again while a run lives below, for
        `own` may hold no process then. A restart that keeps its runs is worth more.
        """
        runs = self.own / _RUNS
        runs.mkdir(exist_ok=True)
        for name in _CONTROLLERS if controllers else ():
            with suppress(OSError):  # not there, or not handed down to us: nothing depends on it
                for group in (self.own, runs):
                    (group / "cgroup.subtree_control").write_text(f"+{name}")

    def group(self, run_id: str) -> RunGroup:
        """The group of that run, whether or not it exists."""
        return RunGroup(self.own / _RUNS / run_id, self.own)

    def runs(self) -> list[str]:
        """The ids of the runs that have a group now: those of an agent before us, too."""
        return sorted(path.name for path in _below(self.own / _RUNS))


class RunGroup:
    """One run's group. Owns nothing but the number of OOM kills that there were before it."""

    def __init__(self, path: Path, service: Path) -> None:
        self.path = path
        self._service = service
        self._before = _count(service / "memory.events", "oom_kill")

    def __repr__(self) -> str:
        return f"<RunGroup {self.path}>"

    def create(self) -> bool:
        """Make it, unless it is there. False, having said why, where it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("cannot make the control group '%s': %s; the run gets none", self.path, error.strerror)
            return False
        return True

    def add(self, pid: int) -> bool:
        """Move the process here; its later children are born here. False where it is gone or may not be moved."""
        try:
            (self.path / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def pids(self) -> list[int]:
        """All processes here and in the groups that the run has made below."""
        return [pid for folder in (self.path, *_all_below(self.path)) for pid in _pids_in(folder)]

    def populated(self) -> bool:
        """Whether a process lives here or below, also one that our own /proc does not show. Zombies do not count."""
        return bool(_count(self.path / "cgroup.events", "populated"))

    def kill(self) -> bool:
        """Have the kernel kill everything here and below at one stroke, whatever forks meanwhile.

        False where the kernel cannot (before 5.14) or there is nothing.
        """
        return self._write("cgroup.kill", "1")

    def freeze(self, frozen: bool) -> None:
        """Hold everything here and below still, so that it cannot fork away from who goes through the list."""
        self._write("cgroup.freeze", "1" if frozen else "0")

    def _write(self, name: str, value: str) -> bool:
        try:
            file = os.open(self.path / name, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            os.write(file, value.encode())
        except OSError:
            return False
        finally:
            os.close(file)
        return True

    async def wait_empty(self) -> None:
        """Wait until nothing lives here or below, however long."""
        pause, longest = _LOOK
        while self.populated():
            await trio.sleep(pause)
            pause = min(pause * 2, longest)
        await trio.lowlevel.checkpoint()

    def oom_kills(self) -> int | None:
        """How many processes of the run the kernel has killed for want of memory; None where nobody counts them.

        Where the run's group has no memory controller, those of the whole agent since this object was made: with
        several runs at once it is then only likely that one of them was this run's.
        """
        own = _count(self.path / "memory.events", "oom_kill")
        if own is not None:
            return own
        now = _count(self._service / "memory.events", "oom_kill")
        return None if now is None or self._before is None else max(0, now - self._before)

    def remove(self) -> bool:
        """Remove it and the groups below. False, having said so, while something is in them."""
        try:
            for folder in (*reversed(_all_below(self.path)), self.path):
                with suppress(FileNotFoundError):
                    folder.rmdir()
        except OSError as error:
            log.warning("cannot remove the control group '%s': %s", self.path, error.strerror)
            return False
        return True


# --- where we are -----------------------------------------------------------------------------------------------------


def own_directory(mountinfo: str, cgroup: str) -> Path | None:
    """The folder of our own group, by what /proc/self/mountinfo and /proc/self/cgroup say; None without cgroup v2.

    v2 may be mounted beside v1 (/sys/fs/cgroup/unified), and in a container only a part of the tree may be visible.
    """
    ours = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::/")), None)
    if ours is None or ours.startswith("/.."):  # outside of what our cgroup namespace shows
        return None
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        if not kind.startswith("cgroup2 "):
            continue
        root, point = (Path(_unescape(field)) for field in mount.split()[3:5])
        if Path(ours).is_relative_to(root):
            return point / Path(ours).relative_to(root)
    return None


def _unescape(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field)


def delegated(group: Path) -> bool:
    """Whether systemd or root has handed this very group to us.

    Never by being able to write alone: root can everywhere, and a user's session has groups that are its manager's.
    """
    for name in _DELEGATE:
        with suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return os.access(group / "cgroup.procs", os.W_OK)
    try:
        owners = {path.stat().st_uid for path in (group, group / "cgroup.procs")}
        above = group.parent.stat().st_uid
    except OSError:
        return False
    return owners == {os.geteuid()} and above != os.geteuid()


# --- the files --------------------------------------------------------------------------------------------------------


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # gone meanwhile, or of a kind that this group does not have
        return ""


def _pids_in(folder: Path) -> list[int]:
    return [int(pid) for pid in _read(folder / "cgroup.procs").split() if pid != "0"]  # 0: outside of our pid namespace


def _count(file: Path, key: str) -> int | None:
    """The number beside `key`, in a file of lines like "oom_kill 2"."""
    pairs = (line.split() for line in _read(file).splitlines())
    return next((int(pair[1]) for pair in pairs if pair[0] == key), None)


def _below(folder: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _all_below(folder: Path) -> list[Path]:
    """Every group below, each before those in it."""
    found = []
    for child in _below(folder):
        found += [child, *_all_below(child)]
    return found
