"""The blocks of a file, asked of Linux directly: holes that give room back, and reserves for a writer of ours."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

KEEP_SIZE = 1
PUNCH_HOLE = 2
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
NOT_HERE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}  # the file system cannot do it at all

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate  # 64-bit offsets whatever the platform
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of that file, never through a symbolic link; made, others cannot read it. Raises `OSError`."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def punch(descriptor: int, start: int, end: int) -> None:
    """Give the blocks of these bytes back; they read as NULs then, and no offset changes. Raises `OSError`."""
    _call(descriptor, PUNCH_HOLE | KEEP_SIZE, start, end - start)


def reserve(descriptor: int, start: int, length: int) -> None:
    """Blocks for bytes that are yet to be written; the file looks no longer than it is. Raises `OSError`."""
    _call(descriptor, KEEP_SIZE, start, length)


def _call(descriptor: int, mode: int, start: int, length: int) -> None:
    while _fallocate(descriptor, mode, start, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def next_data(descriptor: int, at: int, size: int) -> int:
    """Where the first byte that is not in a hole lies, from `at` on; `size` when there is none."""
    return _seek(descriptor, at, os.SEEK_DATA, otherwise=at, size=size)


def next_hole(descriptor: int, at: int, size: int) -> int:
    """Where the first hole begins, from `at` on; `size` when there is none."""
    return _seek(descriptor, at, os.SEEK_HOLE, otherwise=size, size=size)


def _seek(descriptor: int, at: int, whence: int, *, otherwise: int, size: int) -> int:
    if at >= size:
        return size
    try:
        return min(size, os.lseek(descriptor, at, whence))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size  # nothing but a hole up to the end
        if error.errno in NOT_HERE:
            return otherwise
        raise


def hole_span(descriptor: int, size: int) -> tuple[int, int] | None:
    """From the start of the first hole to the end of the last; None for a file without."""
    first = hole = next_hole(descriptor, 0, size)
    if hole >= size:
        return None
    while hole < size:
        last = next_data(descriptor, hole, size)
        hole = next_hole(descriptor, last, size)
    return first, last


def block_size(descriptor: int) -> int:
    """What holes must be aligned to, so that no byte beside them is touched."""
    return max(4096, os.fstat(descriptor).st_blksize)
