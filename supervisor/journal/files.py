"""The journal as a file among files: making it, setting it aside, the room around it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from supervisor.errors import ConfigError

MOST_ASIDE = 5  # broken journals are kept for people to look into
_BESIDE = ("-wal", "-shm")  # SQLite's log and the index of it: parts of the journal
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Trouble(Exception):
    """The disk is full, fails or is locked: nothing was written, and it may pass."""


class Damaged(Exception):
    """The file is not, or is no longer, what we wrote."""


def inode(path: Path) -> tuple[int, int] | None:
    """Which file this is; None when there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def make(path: Path, lay_out: Callable[[Path], None]) -> None:
    """An empty journal, there as a whole or not at all: an empty file is always a loss. Raises like `Store.open`."""
    if any(inode(beside) for beside in _beside(path)):
        # SQLite would play it into the new file.
        raise Damaged("the file is missing, but its log is there")
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        lay_out(new)
        new.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise Trouble(error.strerror or str(error)) from error
        raise _unusable(path, error) from error


def check_rights(path: Path) -> None:
    """Raises `ConfigError` where the file is somebody else's: that is no damage, and there may be live runs in it."""
    try:
        # Closed again before SQLite opens it: any close of ours would drop the locks that SQLite holds.
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        path.chmod(0o600)
    except IsADirectoryError:
        raise Damaged("it is a directory") from None
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise Trouble(error.strerror or str(error)) from error
        raise _unusable(path, error) from error


def set_aside(path: Path) -> Path:
    """Renames the journal with all its parts, so that it can still be looked into. Raises `ConfigError`."""
    # To the microsecond: two in a second must neither meet nor sort wrongly.
    aside = path.with_name(f"{path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    try:
        for old, new in zip((path, *_beside(path)), (aside, *_beside(aside)), strict=True):
            if inode(old):
                old.rename(new)
        _sync_directory(path.parent)
        _forget_old(path)
    except OSError as error:
        raise _unusable(path, error) from error
    return aside


def _forget_old(path: Path) -> None:
    """A disk that breaks every journal must not fill up with them. The names sort by time."""
    found = sorted(path.parent.glob(f"{path.name}.corrupt-*"))
    journals = [one for one in found if not one.name.endswith(_BESIDE)]
    for old in journals[:-MOST_ASIDE]:
        for part in (old, *_beside(old)):
            if not part.is_dir():  # somebody else's, whatever it is
                part.unlink(missing_ok=True)


def room(path: Path) -> int:
    """Bytes that may still be written beside it; a lot where the file system does not say."""
    try:
        status = os.statvfs(path.parent)
    except OSError:
        return 1 << 62
    return status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in _BESIDE]


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot use the journal {path}: {error.strerror or error}; "
        "give the file and its directory to the user that runs the agent, or set agent.state_dir to another one"
    )
