"""Where every task stands: written down when we make no progress, and when somebody asks by SIGUSR1.

Places in the code only, never values: a variable may hold a secret.
"""

from __future__ import annotations

import _thread
import logging
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import trio

LIMIT = 64_000  # characters; an agent with hundreds of runs has thousands of tasks
_SURE = 0.1  # of its patience is waited once more: after a SIGSTOP the sentry may be the first to run

# What is in front of a package's own folder says nothing.
_PACKAGES = re.compile(r".*/(?:(?:site|dist)-packages|python3\.\d+|lib|_internal|_MEI\w+)/|.*/(?=supervisor/)")
_EVERYWHERE = "trio/_core/_traps.py"  # where every task that waits comes to rest
_log = logging.getLogger("flow-agent")


def describe(root: trio.lowlevel.Task, loop: int) -> str:
    """What the thread `loop` does now and where each task below `root` waits, outermost call first.

    May be called from any thread, and while tasks run.
    """
    lines = ["event loop", *_thread_stack(loop), *_task(root, "")]
    size = 0
    for number, line in enumerate(lines):
        size += len(line) + 1
        if size > LIMIT:
            return "\n".join([*lines[:number], f"and {len(lines) - number} more lines"])
    return "\n".join(lines)


def _thread_stack(thread: int) -> list[str]:
    frame = sys._current_frames().get(thread)
    found = []
    while frame is not None:
        found.append(_place(frame, frame.f_lineno))
        frame = frame.f_back
    return [f"    {place}" for place in reversed(found)]


def _task(task: trio.lowlevel.Task, indent: str) -> list[str]:
    lines = [f"{indent}- {task.name}", *(f"{indent}    {place}" for place in _places(task))]
    for nursery in task.child_nurseries:
        below = [_task(child, f"{indent}  ") for child in sorted(nursery.child_tasks, key=lambda child: child.name)]
        for text, count in Counter("\n".join(child) for child in below).items():
            first, *rest = text.split("\n")
            lines += [f"{first} ({count} of them)" if count > 1 else first, *rest]
    return lines


def _places(task: trio.lowlevel.Task) -> Iterator[str]:
    if getattr(task.coro, "cr_running", False):
        yield "(running, see the event loop)"
        return
    try:
        for frame, line in task.iter_await_frames():
            if not frame.f_code.co_filename.endswith(_EVERYWHERE):
                yield _place(frame, line)
    except AttributeError:  # it has gone on meanwhile
        yield "(going on)"


def _place(frame: FrameType, line: int | None) -> str:
    code = frame.f_code
    return f"{_PACKAGES.sub('', code.co_filename, count=1)}:{line} {code.co_qualname}"


async def on_request() -> None:
    """Service: SIGUSR1 has it all written to the log, also while the event loop stands still in code of ours."""
    root, loop = trio.lowlevel.current_root_task(), threading.get_ident()
    assert root is not None

    def say() -> None:
        _log.warning("SIGUSR1: where every task stands\n%s", describe(root, loop))

    def answer(_: int, __: FrameType | None) -> None:
        # From a thread: whom the signal has interrupted may be writing to the log just now, or starting a thread itself.
        _thread.start_new_thread(say, ())

    before = signal.signal(signal.SIGUSR1, answer)
    try:
        await trio.sleep_forever()
    finally:
        signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)


class Sentry:
    """A thread that says once where every task stands when the event loop stands still. Owns the time of its last turn.

    To be entered by a task of the loop, which calls `turned` more often than every `patience` seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._over = threading.Event()
        self._last = time.monotonic()

    def __enter__(self) -> Sentry:
        self.turned()
        root, loop = trio.lowlevel.current_root_task(), threading.get_ident()
        threading.Thread(target=self._watch, args=(root, loop), name="sentry", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def turned(self) -> None:
        """The loop goes round."""
        self._last = time.monotonic()

    def _watch(self, root: trio.lowlevel.Task, loop: int) -> None:
        suspicious, said = False, 0.0
        while True:
            last = self._last
            still = time.monotonic() - last
            late = still >= self._patience
            if late and suspicious and not said:
                said = last
                _log.error(
                    "the event loop has stood still for %.0f s; where every task stands\n%s",
                    still,
                    describe(root, loop),
                )
            elif not late and said:
                _log.warning("the event loop goes round again")
                said = 0.0
            suspicious = late
            if self._over.wait(self._patience * _SURE if late else self._patience - still):
                return
