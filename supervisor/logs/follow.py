"""Reads on in an output file that grows: every line once, whoever reads and however often the reader is replaced."""

from __future__ import annotations

import os
from pathlib import Path

from supervisor.logs.cut import Middle
from supervisor.logs.space import next_data, next_hole, opened
from supervisor.logs.text import cut_note, harmless, line_start_after, pieces

BATCH = 200  # lines at once
CHUNK = 32768  # bytes read at once
MOST = 262144  # bytes looked at for one batch
MOST_BEHIND = 4 << 20  # bytes; a reader that is further behind goes on nearer to the end


class Follower:
    """Where one reader is in the file at `path`; owner of `offset`, up to which it has delivered. Blocking.

    A new one with the same offset goes on without a gap. Bytes that were cut out, and those left out because the flow writes
    faster than anybody reads, are told in a line of their own.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self.offset = offset
        self._looked = False

    def read(self) -> list[str]:
        """The next lines that are whole, at most 200; none when there is nothing new. Raises `OSError`."""
        return self._read(ended=False)

    def finish(self) -> list[str]:
        """The same once nobody writes any more: the last line need not be whole. Call it until it returns none."""
        return self._read(ended=True)

    def moved(self, cut: Middle) -> None:
        """The file's middle was cut out in place, so that what followed lies nearer to the start."""
        if self.offset >= cut.end:
            self.offset -= cut.end - cut.start - len(cut.note)
        else:
            self.offset = min(self.offset, cut.start)

    def _read(self, *, ended: bool) -> list[str]:
        try:
            with opened(self._path, os.O_RDONLY) as descriptor:
                size = os.fstat(descriptor).st_size
                if size < self.offset:
                    # At first sight: cut to its last shape after all was delivered. Later: emptied by somebody.
                    self.offset = 0 if self._looked else size
                self._looked = True
                return self._lines(descriptor, size, ended=ended)
        except FileNotFoundError:
            if self._looked:
                self.offset = 0  # removed by somebody; what takes its place is new from its start
            return []

    def _lines(self, descriptor: int, size: int, *, ended: bool) -> list[str]:
        lines: list[str] = []
        if size - self.offset > MOST_BEHIND:
            lines.append(self._skip_to(line_start_after(descriptor, size - MOST, size), f"not shown, see {self._path}"))
        start = self.offset
        while len(lines) < BATCH and self.offset < size and self.offset - start < MOST:
            at = self.offset
            data = os.pread(descriptor, min(CHUNK, size - at), at)
            # Asked after reading, as a hole may open at any time: what is data now was data then.
            hole = next_hole(descriptor, at, size)
            data = data[: hole - at]
            for line, length in pieces(data, ended=ended and at + len(data) == size):
                lines.append(harmless(line))
                self.offset += length
                if len(lines) == BATCH:
                    return lines
            if self.offset == at:
                if hole >= min(size, at + CHUNK):
                    break  # the start of a line whose end is yet to come
                after = line_start_after(descriptor, next_data(descriptor, hole, size), size)
                lines.append(self._skip_to(after, None))
        return lines

    def _skip_to(self, offset: int, why: str | None) -> str:
        count = offset - self.offset
        self.offset = offset
        return cut_note(count) if why is None else f"[flow-agent: {count} bytes {why}]"
