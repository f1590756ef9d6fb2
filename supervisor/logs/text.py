"""Bytes that flows print, made into lines that can be shown to people."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

FOLD = 8192  # bytes after which a line is continued on the next one
FAR = 65536  # bytes within which the end of a line is looked for, before a line is cut where it happens to be
_CUT = re.compile(rb"\[flow-agent: (\d+) bytes cut here\]\n")
LONGEST_NOTE = 64  # bytes of such a line, and to spare

_ESCAPES = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)")  # colours, cursor, titles
_NULS = re.compile("\x00{8,}")
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def cut_note(count: int) -> str:
    """The line that stands where output was cut out."""
    return f"[flow-agent: {count} bytes cut here]"


def cut_count(line: bytes) -> int | None:
    """How many bytes the note at the start of `line` speaks of; None where there is no note."""
    found = _CUT.match(line)
    return int(found[1]) if found else None


def harmless(raw: bytes) -> str:
    """One line for a log: decoded leniently, as a terminal would leave it after carriage returns, without colours.

    Other control characters are spelled out, so that no output can move a reader's cursor or fake a line of ours.
    """
    text = raw.decode("utf-8", "replace")
    if text.isprintable():
        return text
    text = _ESCAPES.sub("", text.rstrip("\r").rpartition("\r")[2])
    text = _NULS.sub(lambda found: f"[{len(found[0])} NUL bytes]", text)
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def pieces(data: bytes, *, ended: bool) -> Iterator[tuple[bytes, int]]:
    """The lines in `data`, each with the number of bytes it took; a line that is too long comes in several.

    What comes after the last line's end is left, unless the output has `ended`.
    """
    at = 0
    while at < len(data):
        newline = data.find(b"\n", at, at + FOLD + 1)
        if newline >= 0:
            yield data[at:newline], newline + 1 - at
            at = newline + 1
        elif len(data) - at > FOLD:
            cut = whole_characters(data, at + FOLD)
            yield data[at:cut], cut - at
            at = cut
        else:
            if ended:
                yield data[at:], len(data) - at
            return


def whole_characters(data: bytes, at: int) -> int:
    """The last place up to `at`, at most three bytes before it, that is not inside a UTF-8 character."""
    for place in range(at, max(0, at - 4), -1):
        if place >= len(data) or data[place] & 0xC0 != 0x80:
            return place
    return at  # not UTF-8


def line_end_before(descriptor: int, at: int) -> int:
    """The end of the last whole line in the file's first `at` bytes; of the last whole character in a huge line."""
    start = max(0, at - FAR)
    data = os.pread(descriptor, at - start + 1, start)
    newline = data.rfind(b"\n", 0, at - start)
    return start + (newline + 1 if newline >= 0 else whole_characters(data, at - start))


def line_start_after(descriptor: int, at: int, size: int) -> int:
    """The start of the first whole line from `at` on; of the first whole character in a huge line."""
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    data = os.pread(descriptor, FAR, at - 1)
    newline = data.find(b"\n")
    if newline >= 0 and at + newline < size:
        return at + newline
    skipped = next((index for index, byte in enumerate(data[1:4]) if byte & 0xC0 != 0x80), 0)
    return at + skipped
