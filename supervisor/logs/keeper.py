"""Looks after the output files of all runs: makes, watches, shows, cuts, and in the end removes them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import trio

from supervisor.config import Output
from supervisor.errors import JobError
from supervisor.logs.cut import compact
from supervisor.logs.follow import Follower
from supervisor.logs.live import LiveFile
from supervisor.logs.quiet import QuietFiles, size_of
from supervisor.logs.space import NO_ROOM, opened
from supervisor.logs.sweep import sweep_old

# Is given lines and the offset after them, in this order: what was shown before must be on record when it returns.
Show = Callable[[Sequence[str], int], Awaitable[None]]
T = TypeVar("T")

SMALLEST_CAP = 65536  # bytes
# Seconds between looks: at a flow that writes fast, one that writes, one that is still.
BRISK, SLOW, IDLE = 0.02, 0.5, 2.0
TIGHT = 0.2  # seconds between looks at most, while the disk is nearly full and a flow has little but its reserve
NEARLY_FULL = 64 << 20  # bytes left on the disk
PACE = 0.02  # seconds between batches of lines: at most 10,000 lines a second are shown of one run
FINISH_SECONDS = 5.0  # how long showing the rest may take
THREADS = 8

log = logging.getLogger(__name__)


def output_file(log_dir: Path, run_id: str) -> Path:
    """Where the output of that run goes. The folder is made when it is missing."""
    log_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    return log_dir / f"{run_id}.log"


class OutputKeeper:
    """The output files in `log_dir`.

    Owns what `[output]` says, what it said when each live run was first watched, and what was last seen of the disk: runs are
    tasks of its callers.
    """

    def __init__(self, log_dir: Path, output: Output) -> None:
        self._log_dir = log_dir
        self._output = output
        self._began_with: dict[str, Output] = {}
        self._is_tight = False
        self._room_seen = -math.inf  # when the disk was asked
        self._quiet = QuietFiles(lambda: self._pause(IDLE))
        self._threads = trio.CapacityLimiter(THREADS)  # ours: a hung disk must not take the threads of everybody else

    def use(self, output: Output) -> None:
        """What `[output]` says from now on. A run that is being watched keeps what it began with."""
        self._output = output

    def path(self, run_id: str) -> Path:
        """The file that holds the run's output."""
        return self._log_dir / f"{run_id}.log"

    async def prepare(self, run_id: str) -> int:
        """Makes the file, with room reserved for what the run will write, and returns the offset at which its output begins.

        A run that was claimed before goes on in the file it has. Raises `JobError` when it cannot be written.
        """
        return await self._in_thread(lambda: self._prepare(self.path(run_id)))

    async def watch(self, run_id: str, shown: int, show: Show) -> None:
        """Keeps the live run's file within its cap, room ahead of its writer, and shows new lines. Runs until cancelled.

        `shown` is the offset up to which lines were shown already. Cancelled while `show` is at work, those lines count as
        shown only if `show` has put their offset on record.
        """
        output = self._began_with.setdefault(run_id, self._output)
        path = self.path(run_id)
        live = LiveFile(path, _cap(output))
        follower = Follower(path, shown)
        # Showing must not disturb keeping: `show` may take as long as it likes. The lock is for the reads in between.
        lock = trio.Lock()
        async with trio.open_nursery() as nursery:
            grew = _Bell()
            if output.show:
                nursery.start_soon(self._show_new, follower, show, lock, grew)
            size, wait = -1, SLOW
            while True:
                found = size_of(path)
                if live.needs(found):
                    async with lock:
                        # Not abandoned when cancelled: it must not come to the file after `finish`.
                        cut = await trio.to_thread.run_sync(live.keep, limiter=self._threads)
                        if cut is not None:
                            follower.moved(cut)
                if found != size:
                    grew.ring()
                wait = _next_wait(wait, found - size if size >= 0 else 0, live.ahead)
                size = found
                if wait >= IDLE and not live.needs(size):
                    await self._quiet.wait_changed(path, size)
                else:
                    await trio.sleep(self._pause(wait))

    async def finish(self, run_id: str, shown: int, show: Show) -> int:
        """Shows the rest once nothing of the run lives (5 s at most), and gives the file its last shape.

        Returns the offset to go on from, should the run be started once more.
        """
        output = self._began_with.pop(run_id, self._output)
        path = self.path(run_id)
        follower = Follower(path, shown)
        if output.show:
            with trio.move_on_after(FINISH_SECONDS) as limit:
                await self._show_rest(follower, show)
            if limit.cancelled_caught:
                # As it is, with its offsets: what was shown is told by them alone. The sweep cuts it later.
                log.warning("cannot show the last output of a run in time; it is in '%s'", path)
                return follower.offset
        try:
            await trio.to_thread.run_sync(
                lambda: compact(path, _cap(output), trio.from_thread.check_cancelled), limiter=self._threads
            )
        except FileNotFoundError:
            return 0
        except OSError as error:
            log.warning("cannot cut the middle out of '%s' for good: %s; tried again later", path, error.strerror)
        return max(0, size_of(path))

    async def sweep(self, in_use: Collection[str]) -> None:
        """Removes the files of finished runs that are older than the configuration says, and cuts what could not be cut.

        `in_use` are the ids of all open runs; it is asked from a thread, file by file.
        """
        output = self._output
        await self._in_thread(lambda: sweep_old(self._log_dir, output.keep_days, in_use, cap=_cap(output)))

    def _prepare(self, path: Path) -> int:
        try:
            output_file(self._log_dir, path.stem)
            with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
                size = os.fstat(descriptor).st_size
                os.utime(descriptor)  # not an old file any more
        except OSError as error:
            hint = "free some space" if error.errno in NO_ROOM else "see `log_dir` in [agent]"
            raise JobError(f"cannot write the run's output to '{path}': {error.strerror or error}; {hint}") from error
        LiveFile(path, _cap(self._output)).keep()
        return size

    async def _show_new(self, follower: Follower, show: Show, lock: trio.Lock, grew: _Bell) -> None:
        said = follower.offset
        troubled = False
        while True:
            rung = grew.next()
            lines: list[str] = []
            try:
                async with lock:
                    lines = await self._in_thread(follower.read)
                troubled = False
            except OSError as error:
                if not troubled:
                    log.warning("cannot read the output of a run: %s", error)
                troubled = True
            offset = follower.offset
            if lines or offset != said:
                await show(lines, offset)
                said = offset
                await trio.sleep(PACE)
            else:
                await rung.wait()

    def _pause(self, wait: float) -> float:
        """That many seconds, or fewer while the disk is nearly full."""
        return min(wait, TIGHT) if self._tight() else wait

    def _tight(self) -> bool:
        """Whether the disk is nearly full; asked once a second for all runs."""
        if trio.current_time() - self._room_seen >= 1.0:
            self._room_seen = trio.current_time()
            try:
                room = os.statvfs(self._log_dir)
                self._is_tight = room.f_bavail * room.f_frsize < NEARLY_FULL
            except OSError:
                self._is_tight = False
        return self._is_tight

    async def _show_rest(self, follower: Follower, show: Show) -> None:
        try:
            while lines := await self._in_thread(follower.finish):
                await show(lines, follower.offset)
        except OSError as error:
            log.warning("cannot read the output of a run: %s", error)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)


class _Bell:
    """Wakes who waits for the next ring."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def next(self) -> trio.Event:
        return self._event

    def ring(self) -> None:
        self._event.set()
        self._event = trio.Event()


def _cap(output: Output) -> int:
    """In bytes."""
    return max(SMALLEST_CAP, int(output.max_mb * 1_000_000))


def _next_wait(wait: float, grown: int, ahead: int) -> float:
    """How long until the next look: before a flow that goes on like this has written a quarter of its reserve."""
    if grown <= 0:
        return min(IDLE, max(wait, SLOW / 2) * 1.5)
    return min(SLOW, max(BRISK, wait * (ahead / 4) / grown))
