"""Signals to processes of ours. The only module that sends any.

Each is held by a pidfd and looked at again before it is signalled: a pid alone may be somebody else's by then.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from supervisor.lifecycle import ProcessRef
from supervisor.process.ref import alive, same

_HOLD = 1.0  # seconds; a process in the kernel's hands stops only when it comes back from there
_SOON = 0.001  # seconds
_NO_PIDFD = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EMFILE, errno.ENFILE})


def interrupt_group(ref: ProcessRef, signum: int = signal.SIGTERM) -> bool:
    """Send the signal to all of the process group that `ref` leads, at one stroke.

    False when nothing was sent: the leader is gone or the number is another's by now. A leader that nobody has waited
    for yet still counts.
    """
    if same(ref) is None or ref.pid == os.getpgrp():
        return False
    try:
        os.killpg(ref.pid, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def send(ref: ProcessRef, signum: int) -> bool:
    """Send the signal to that very process. False when it is gone or not ours to signal."""
    try:
        with held(ref) as pidfd:
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signum)
            elif alive(ref):
                os.kill(ref.pid, signum)
            else:
                return False
    except (ProcessLookupError, PermissionError):
        return False
    return True


def kill(ref: ProcessRef) -> bool:
    """End a process of our own that is no run. False when it is gone."""
    return send(ref, signal.SIGKILL)


@contextmanager
def held(ref: ProcessRef) -> Iterator[int | None]:
    """A pidfd of that very process; None where the kernel gives none. Raises `ProcessLookupError` when it is gone."""
    try:
        pidfd = os.pidfd_open(ref.pid)
    except AttributeError:  # a Python built for kernels before 5.3
        yield None
        return
    except OSError as error:
        if error.errno not in _NO_PIDFD:
            raise
        yield None
        return
    try:
        if not alive(ref):  # asked after the handle was opened: now the answer holds for what the handle holds
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        yield pidfd
    finally:
        os.close(pidfd)


async def hold(ref: ProcessRef) -> None:
    """Stop a process where it is, so that it does nothing between a look at it and the signal that follows upon that look.

    `end` or `let_go_on` must follow. Gives up after a second.
    """
    send(ref, signal.SIGSTOP)
    with trio.move_on_after(_HOLD):
        while (stat := same(ref)) is not None and stat.living and stat.state not in "Tt":  # noqa: ASYNC110 - the kernel wakes nobody
            await trio.sleep(_SOON)


def let_go_on(ref: ProcessRef) -> None:
    """Let a process go on that `hold` or `end_others` has stopped."""
    send(ref, signal.SIGCONT)
