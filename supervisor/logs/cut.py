"""Takes the middle out of an output file: its head and its tail stay, and one line says what is gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from supervisor.logs.space import hole_span, opened
from supervisor.logs.text import LONGEST_NOTE, cut_count, cut_note, line_end_before, line_start_after

CHUNK = 262144
ROOM_FOR_NOTES = 4 * LONGEST_NOTE  # bytes by which a file that was cut may be over its cap


class Middle(msgspec.Struct, frozen=True):
    """What goes: the bytes from `start` to `end`; `note` is written in their place."""

    start: int
    end: int
    note: bytes


def head_of(cap: int) -> int:
    """How many bytes of the head are kept; the rest of the cap is the tail's."""
    return cap // 2


def middle(descriptor: int, size: int, head: int, tail: int, span: tuple[int, int] | None) -> Middle:
    """What is left out to keep at most `head` and `tail` bytes and none of the holes in `span`, by whole lines."""
    first, last = span or (size, 0)
    start = line_end_before(descriptor, min(head, first, size))
    end = max(start, line_start_after(descriptor, max(size - tail, last), size))
    count = end - start
    # Where output was cut out before, the two cuts become one.
    before = os.pread(descriptor, min(start, LONGEST_NOTE), max(0, start - LONGEST_NOTE))
    line = before.rfind(b"\n", 0, max(0, len(before) - 1)) + 1
    if (earlier := cut_count(before[line:])) is not None:
        start -= len(before) - line
        count += earlier
    elif (earlier := cut_count(os.pread(descriptor, LONGEST_NOTE, start))) is not None:
        count += earlier - len(cut_note(earlier)) - 1
    glue = "" if start == 0 or os.pread(descriptor, 1, start - 1) == b"\n" else "\n"
    return Middle(start, end, f"{glue}{cut_note(count)}\n".encode())


def compact(path: Path, cap: int, checkpoint: Callable[[], None] = lambda: None) -> None:
    """The last shape of a finished run's file: no reserve, no hole, head and tail within `cap` bytes and a note.

    A file that fits stays as it is. A new one takes its place whole or not at all, with the same owner, mode and time.
    `checkpoint` is called every now and then and may raise to give up. Raises `OSError`; then the old file is as it was.
    """
    with opened(path, os.O_RDWR) as source:
        found = os.fstat(source)
        size = found.st_size
        os.ftruncate(source, size)  # what was reserved beyond the end goes back
        os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
        span = hole_span(source, size)
        if span is None and size <= cap + ROOM_FOR_NOTES:
            return
        cut = middle(source, size, head_of(cap), cap - head_of(cap), span)
        fresh = path.with_name(fresh_name(path.name))
        try:
            fresh.unlink(missing_ok=True)
            with opened(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as target:
                _copy(source, target, 0, cut.start, checkpoint)
                _write(target, cut.note)
                _copy(source, target, cut.end, size, checkpoint)
                with contextlib.suppress(PermissionError):
                    os.fchown(target, found.st_uid, found.st_gid)
                os.fchmod(target, found.st_mode & 0o7777)
                os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
                os.fsync(target)  # or a power cut might leave an empty file under the old name
            fresh.replace(path)
        except BaseException:  # given up as well: half a copy is of no use
            fresh.unlink(missing_ok=True)
            raise


def fresh_name(name: str) -> str:
    """Under what name the new file is written that will replace `name`."""
    return f".{name}.cut"


def cut_in_place(descriptor: int, size: int, cap: int) -> Middle:
    """The same for a file that is being written to, where holes cannot be had: the tail is copied down, then the end cut off.

    Keeps a quarter of the cap as the tail. What a writer appends between our last look and the cut is lost. The bytes
    copied come to lie in what is cut out anyway, so that dying half-way loses nothing else.
    """
    head = head_of(cap)
    cut = middle(descriptor, size, head, min(cap // 4, (size - head) // 2), None)
    os.pwrite(descriptor, cut.note, cut.start)
    source, target = cut.end, cut.start + len(cut.note)
    while data := os.pread(descriptor, CHUNK, source):  # up to the end as it is by now
        os.pwrite(descriptor, data, target)
        source += len(data)
        target += len(data)
    os.ftruncate(descriptor, target)
    return cut


def _copy(source: int, target: int, start: int, end: int, checkpoint: Callable[[], None]) -> None:
    while start < end:
        checkpoint()
        data = os.pread(source, min(CHUNK, end - start), start)
        if not data:
            return  # somebody shortened it meanwhile
        _write(target, data)
        start += len(data)


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]
