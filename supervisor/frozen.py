"""What the packed binary needs of us that a Python does not.

Of its two forms one is a single file: its start program unpacks into a folder of its own, starts us as its child, waits for
our end and removes the folder. The other is a folder beside the program, which an upgrade replaces while we run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import logging
import os
import pkgutil
import re
import shutil
import signal
import stat
import sys
from pathlib import Path

import psutil

import supervisor

_PR_SET_PDEATHSIG = 1
# As the start program names it: its process id in eight hexadecimal digits, and six characters of chance.
_UNPACKED = re.compile(r"_MEI([0-9a-f]{8})[A-Za-z0-9]{6}")
_OURS = "share/agent.toml.example"  # a file that is in every folder that we unpack
# Imported by libraries, and by Python, only when they come to need it.
_LATER = (
    *("encodings.idna", "encodings.latin_1", "encodings.ascii", "encodings.utf_8_sig", "encodings.punycode"),
    *("httpcore._backends.trio", "httpcore._async.socks_proxy", "httpcore._async.http_proxy", "certifi"),
    *("traceback", "linecache", "tokenize", "stringprep", "unicodedata", "faulthandler"),
)
_log = logging.getLogger("flow-agent")
_held: list[int] = []  # open for as long as this process lives


def is_frozen() -> bool:
    """Whether this is the packed binary, in either form."""
    return bool(getattr(sys, "frozen", False))


def guard() -> None:
    """For the agent, before it starts anything: an end with the start program, a clean temporary folder, no import left.

    Where a Python runs us there is nothing but imports: its packages may be upgraded just as well.
    """
    here = Path(getattr(sys, "_MEIPASS", ""))
    if is_frozen() and (named := _UNPACKED.fullmatch(here.name)):
        _end_with(int(named[1], 16))
        _hold(here)
        sweep({here.parent, Path("/tmp"), Path("/var/tmp")}, keep=here)  # noqa: S108 - where start programs unpack
    preload()


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when its start program dies.

    Otherwise whoever kills that would have a second agent started beside this one. SIGKILL and no SIGTERM: what the runs need
    is in the journal, and the next agent takes them up; a stop would first wait for them.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"cannot start: process {parent}, which has unpacked this program, is gone")


def _hold(folder: Path) -> None:
    """Locks our own folder: systemd-tmpfiles leaves alone what is locked, and so does `sweep`."""
    _held.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    fcntl.flock(_held[-1], fcntl.LOCK_SH)


def sweep(places: set[Path], keep: Path) -> None:
    """Removes the folders in `places` that our start programs have left there by dying, other than `keep`."""
    for place in places:
        with contextlib.suppress(OSError):
            for folder in place.iterdir():
                if folder != keep and _is_stale(folder):
                    _log.debug("removing %s, left by a flow-agent that was killed", folder)
                    shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    """Whether that is our user's, was unpacked by a flow-agent, and neither its start program nor its agent lives."""
    named = _UNPACKED.fullmatch(folder.name)
    if named is None:
        return False
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or not (folder / _OURS).is_file():
            return False
        return not _lives(int(named[1], 16), found.st_mtime) and not _is_held(folder)
    except OSError:
        return False


def _lives(pid: int, unpacked: float) -> bool:
    """Whether the process that unpacked a folder then (wall time, seconds) still lives; a later one has only its number."""
    try:
        return bool(psutil.Process(pid).create_time() < unpacked + 1)
    except psutil.NoSuchProcess:
        return False


def _is_held(folder: Path) -> bool:
    look = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(look, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(look)
    return False


def preload() -> None:
    """Imports all that the agent may come to need.

    An import reads files by their names, and an upgrade puts other ones there while we run.
    """
    for found in pkgutil.walk_packages(supervisor.__path__, "supervisor."):
        if found.name.split(".")[1] not in ("__main__", "cli", "demo", "install"):
            importlib.import_module(found.name)
    for name in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
