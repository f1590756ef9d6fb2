"""The state directory: one agent's own place on disk, held by a lock for as long as the agent lives."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from supervisor.errors import ConfigError, StateDirectoryHeld

_log = logging.getLogger("flow-agent")


class StateDirectory:
    """The directory, ours between `__enter__` and `__exit__`.

    `work` is where runs get their private directories. Owns the file descriptor that holds the lock: the kernel lets go
    of it however we die, and no child inherits it.
    """

    def __init__(self, path: Path, *, name: str) -> None:
        self.path = path
        self.work = path / "runs"
        self._name = name
        self._lock: int | None = None

    def __enter__(self) -> StateDirectory:
        """Raises `ConfigError` when it cannot be used, `StateDirectoryHeld` when another agent uses it."""
        try:
            self.path.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self.work.mkdir(mode=0o750, exist_ok=True)
        except OSError as error:
            self._release()
            raise ConfigError(
                f"cannot use the state directory {self.path}: {error.strerror or error}; "
                "give this user a directory it may write to, or set agent.state_dir to one"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _take_lock(self) -> int:
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # a full disk: only the name for a second agent to tell is missing
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()} {self._name}\n".encode(), 0)
        except BlockingIOError:
            pid, _, name = os.pread(lock, 1000, 0).decode(errors="replace").strip().partition(" ")
            os.close(lock)
            # Between lock and line there is a moment without a name.
            who = f"flow-agent '{name}' (pid {pid})" if name else "another flow-agent"
            raise StateDirectoryHeld(
                f"cannot use the state directory {self.path}: {who} is using it; stop it or set agent.state_dir"
            ) from None
        except OSError:
            os.close(lock)
            raise
        return lock

    def _release(self) -> None:
        # The file stays: to remove it would give a third agent a lock of its own beside the second one's.
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child on its way to exec may share it for a moment longer
            os.close(self._lock)
            self._lock = None

    def sweep(self, keep: Collection[str]) -> None:
        """Removes the private directories of runs that are over; `keep` are the ids of those that are not."""
        in_use = set(_working_directories())
        for leftover in self.work.iterdir():
            if leftover.name in keep:
                continue
            if any(path.is_relative_to(leftover.resolve()) for path in in_use):
                _log.warning("left %s alone: a process of an earlier agent's run still works in it", leftover)
                continue
            try:
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            except OSError as error:
                _log.warning("cannot remove %s, left by an earlier agent: %s", leftover, error)


def _working_directories() -> Iterable[Path]:
    """Where the processes that we may look at are."""
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            yield process.readlink()
        except OSError:  # it has ended, or is somebody else's
            continue
