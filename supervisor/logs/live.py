"""Keeps a live run's output file within its cap, and room on the disk ahead of its writer.

The flow writes through a descriptor of its own and knows nothing of us, so nothing here may move a byte that it has written
or will write: the middle is given back as a hole, and room is reserved beyond the end (docs/decisions/0008-output.md).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from supervisor.logs.cut import Middle, cut_in_place, head_of
from supervisor.logs.space import NO_ROOM, NOT_HERE, block_size, hole_span, opened, punch, reserve
from supervisor.logs.text import LONGEST_NOTE

RESERVE = 1 << 20  # bytes ahead of the writer
STEP = 65536  # bytes reserved, or given back to make room, at once
NEVER = 1 << 62

log = logging.getLogger(__name__)


class LiveFile:
    """The file at `path`, which may hold `cap` bytes. Blocking; one thread at a time.

    Its state is only what saves work (how far is reserved and cut): a new agent starts without it.
    """

    def __init__(self, path: Path, cap: int) -> None:
        self._path = path
        self._cap = cap
        self._ahead = min(cap, RESERVE)
        self._reserved = 0  # up to which offset
        self._cut = 0  # up to which offset the middle is gone
        self._size = 0  # at the last look
        self._punches = True
        self._in_need = False

    @property
    def ahead(self) -> int:
        """How many bytes the flow can write without a look of ours, whatever the disk."""
        return self._ahead

    def needs(self, size: int) -> bool:
        """Whether there is something to do, now that the file has that size. Costs nothing."""
        return size < self._size or self._reserved - size < self._ahead * 3 // 4 or self._is_over(size)

    def keep(self) -> Middle | None:
        """Does it: some system calls. Returns what was moved, where the file system has no holes. Never raises `OSError`."""
        try:
            with opened(self._path, os.O_RDWR) as descriptor:
                size = os.fstat(descriptor).st_size
                if size < self._size:  # somebody else has emptied it
                    self._reserved = self._cut = 0
                self._size = size
                moved = self._keep_cap(descriptor, size) if self._is_over(size) else None
                if moved is None:
                    self._keep_reserve(descriptor, size)
                return moved
        except FileNotFoundError:
            return None  # removed by hand: its writer goes on, and nobody sees it
        except OSError as error:
            self._complain(f"cannot keep the output of a run small: {error.strerror}")
            return None

    def _is_over(self, size: int) -> bool:
        kept = min(size, head_of(self._cap)) + size - max(self._cut, head_of(self._cap))
        return kept > self._cap + self._cap // 8  # not for every line anew

    def _keep_cap(self, descriptor: int, size: int) -> Middle | None:
        if self._punches:
            block = block_size(descriptor)
            # An earlier cut's note, which ends the head of a run that is taken up again, is not cut in two.
            start = _up(head_of(self._cap) + LONGEST_NOTE, block)
            end = _down(size - (self._cap - head_of(self._cap)), block)
            try:
                if end > start:
                    punch(descriptor, start, end)
                self._cut = max(start, end)
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise
                self._punches = False
            else:
                return None
        moved = cut_in_place(descriptor, size, self._cap)
        self._size = os.fstat(descriptor).st_size
        self._reserved = self._cut = 0
        return moved

    def _keep_reserve(self, descriptor: int, size: int) -> None:
        at = max(self._reserved, _down(size, block_size(descriptor)))
        while at < size + self._ahead:
            # In steps: one that fails may take back what it found reserved already.
            try:
                reserve(descriptor, at, STEP)
            except OSError as error:
                if error.errno in NOT_HERE:
                    at = NEVER
                    break
                if error.errno not in NO_ROOM:
                    raise
                if not self._make_room(descriptor, size):
                    self._reserved = at
                    if at - size >= self._ahead // 2:
                        return  # a longer file will have a middle to give back
                    self._complain(
                        f"cannot reserve room for the output of a run ({error.strerror}): "
                        f"after {max(0, at - size)} more bytes its writes may fail; free some space"
                    )
                    return
            else:
                at += STEP
        self._reserved = at
        self._in_need = False

    def _make_room(self, descriptor: int, size: int) -> bool:
        """Gives back a step of the middle, the head's end when the tail is at its least; False when both are."""
        if not self._punches:
            return False
        block = block_size(descriptor)
        step, least = _up(STEP, block), min(STEP, self._cap // 4)
        span = hole_span(descriptor, size)
        start, end = span or (_up(min(head_of(self._cap) + LONGEST_NOTE, size // 2), block),) * 2
        if end + step <= _down(size - least, block):
            end += step
        elif start - step >= least:
            start -= step
        else:
            return False
        try:
            punch(descriptor, start, end)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            self._punches = False
            return False
        return True

    def _complain(self, message: str) -> None:
        if not self._in_need:
            log.warning("%s: '%s'", message, self._path)
        self._in_need = True


def _up(number: int, block: int) -> int:
    return -(-number // block) * block


def _down(number: int, block: int) -> int:
    return max(0, number // block * block)
