"""One fork server: a process of the user's Python that has imported Prefect, and gives us copies of itself.

What runs over there, and why nothing is lost when either side dies at any moment, stands in `supervisor.process.zygote`.
"""

from __future__ import annotations

import array
import json
import logging
import math
import os
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from supervisor.failpoints import failpoint
from supervisor.lifecycle import Exit, ProcessRef
from supervisor.process.brand import birth, limit_for
from supervisor.process.cgroup import RunGroup
from supervisor.process.environ import MARK, STATE_MARK
from supervisor.process.launch import is_spared, open_output, unspare
from supervisor.process.reaper import expect
from supervisor.process.ref import identify, read_stat
from supervisor.process.signals import kill
from supervisor.process.stop import wait_gone

log = logging.getLogger(__name__)

# Read when we start: a one-file binary's folder may be gone later.
PROGRAM = Path(__file__).with_name("zygote.py").read_text()

IMPORT_SECONDS = 120.0  # a cold disk, and modules of the user's that take their time
ANSWER_SECONDS = 10.0  # a fork takes milliseconds; a machine that is out of memory may need longer
END_SECONDS = 5.0
_AT_ONCE = 4  # copies that are being made; more would only wait over there, and be taken for those that are not given
_ROOM = "FLOW_AGENT_ROOM"  # as in zygote.py
_ROOM_BYTES = 32 * 1024
_MESSAGE = 64 * 1024  # more than any of its messages


class WarmError(Exception):
    """The fork server cannot be made, or gives no copies any more; the sentence says why."""


class NoCopy(WarmError):
    """It could not make this one copy; others it can."""


class Forked:
    """A run's process that is a copy. It lives on when this object goes, and when the fork server goes."""

    def __init__(self, ref: ProcessRef) -> None:
        self.ref = ref
        self._exit: Exit | None = None

    def __repr__(self) -> str:
        return f"<Forked {self.ref.pid}>"

    async def wait(self) -> Exit:
        """How it ended, as soon as it has. Any number of tasks may wait, and waiting can be given up."""
        await wait_gone([self.ref], math.inf)
        if self._exit is None:
            self._exit = _status(self.ref)
        return self._exit


def _status(ref: ProcessRef) -> Exit:
    try:
        found = os.waitid(os.P_PID, ref.pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        found = None
    if found is None:  # only where the kernel would not let us inherit orphans (`supervisor.process.reaper`)
        return Exit(note="ended unseen: it was no child of flow-agent")
    return Exit(code=found.si_status) if found.si_code == os.CLD_EXITED else Exit(signal=found.si_status)


class Ready(msgspec.Struct, frozen=True):
    """What the fork server says when it has imported all: which of the user's own files that took."""

    files: list[str]


class ForkServer:
    """A fork server that is ready. Owns its process and the line to it."""

    def __init__(
        self,
        process: trio.Process,
        ref: ProcessRef,
        control: trio.socket.SocketType,
        life: socket.socket,
        ready: Ready,
    ) -> None:
        """`life` is the end that we hold of the line with which it dies."""
        self._process = process
        self._control = control
        self._life = life
        self._turns = trio.Semaphore(_AT_ONCE)
        self._given_up = False
        self._first_size = resident_bytes(ref)
        self.ref = ref
        self.files = tuple(Path(file) for file in ready.files)
        self.copies = 0

    @classmethod
    async def open(cls, python: Path, *, env: Mapping[str, str], cwd: Path, modules: Sequence[str]) -> ForkServer:
        """Starts it, and returns when it has imported all. Raises `WarmError`."""
        near, far = _line_to_elsewhere(socket.SOCK_SEQPACKET)
        try:
            life, its_life = _pair(socket.SOCK_STREAM)
        except NoCopy:
            near.close()
            far.close()
            raise
        with far, its_life:
            try:
                # Of no run: it may not be born with the mark of the one whose process is being started just now.
                async with birth(None):
                    process = await trio.lowlevel.open_process(
                        [os.fspath(python), "-c", PROGRAM, str(its_life.fileno()), *modules],
                        pass_fds=[its_life.fileno()],
                        stdin=far.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env={**env, _ROOM: " " * _ROOM_BYTES},
                        cwd=os.fspath(cwd),
                        start_new_session=True,
                    )
            except (OSError, ValueError) as error:
                near.close()
                life.close()
                raise WarmError(f"cannot start '{python}': {error}") from error
        ref = identify(process.pid)
        assert ref is not None  # nobody but us can have fetched its status
        expect(ref)
        if is_spared():
            unspare(ref.pid)
        try:
            return cls(process, ref, near, life, await _hear(near))
        except BaseException:
            near.close()
            life.close()
            with trio.CancelScope(shield=True):
                kill(ref)
                await process.wait()
            raise

    async def copy(self, *, env: Mapping[str, str], cwd: Path, output: Path, group: RunGroup | None) -> Forked:
        """A copy that has become `python -m prefect.engine` with exactly these, and runs from now on.

        Raises `WarmError` when it did not come to that, and then it never will; `JobError` when nobody can write to `output`.
        """
        async with self._turns:
            if self._given_up:
                raise WarmError("the fork server has ended")
            descriptor = open_output(output)
            try:
                line, far = _line_to_elsewhere(socket.SOCK_STREAM)
                with line:
                    with far:
                        await self._order(far.fileno(), descriptor)
                    return await self._talk(line, env, cwd, group)
            except NoCopy:
                raise
            except WarmError:
                self._given_up = True
                kill(self.ref)  # it hangs, or is dead: nobody else shall wait for it
                raise
            finally:
                os.close(descriptor)

    async def _order(self, *descriptors: int) -> None:
        rights = array.array("i", descriptors)
        try:
            await self._control.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except (OSError, trio.ClosedResourceError) as error:
            raise WarmError("the fork server has ended") from error
        self.copies += 1

    async def _talk(
        self, line: trio.socket.SocketType, env: Mapping[str, str], cwd: Path, group: RunGroup | None
    ) -> Forked:
        run_id = env.get(MARK, "")
        # Where there is not room for all, the marks are what must be seen from outside.
        first = {name: env[name] for name in (MARK, STATE_MARK) if name in env}
        request = {
            "env": {**first, **env},
            "cwd": os.fspath(cwd),
            "group": os.fspath(group.path) if group is not None else None,
            "limit": limit_for(run_id),
        }
        stream = trio.SocketStream(line)
        try:
            with trio.fail_after(ANSWER_SECONDS):
                text = json.dumps(
                    request
                ).encode()  # msgspec refuses bytes that are no UTF-8, and variables may hold such
                await stream.send_all(struct.pack("!I", len(text)) + text)
                answer = await _line(stream)
        except trio.TooSlowError:
            raise WarmError(f"no copy within {ANSWER_SECONDS:g} s") from None
        except trio.BrokenResourceError:
            raise WarmError("the fork server has ended") from None
        if "error" in answer:
            raise NoCopy(str(answer["error"]))
        if "pid" not in answer:
            raise WarmError("the fork server has ended")
        ref = identify(int(answer["pid"]))
        stat = read_stat(int(answer["pid"]))
        if ref is None or stat is None or stat.session != ref.pid:
            raise NoCopy("its copy ended at once")
        expect(ref)
        # Not before it is known who it is: from here on it executes the flow.
        failpoint("before go")
        try:
            await stream.send_all(b"g")
        except trio.BrokenResourceError:
            await Forked(ref).wait()
            raise NoCopy("its copy ended at once") from None
        failpoint("after go")
        return Forked(ref)

    def grown(self) -> float:
        """How many times as large it is as at first. Copies cost it nothing; what grows is what their requests leave behind."""
        return resident_bytes(self.ref) / max(1, self._first_size)

    async def wait(self) -> None:
        """Returns when its process has ended."""
        await self._process.wait()

    async def close(self) -> None:
        """Ends it. Its copies are not touched."""
        self._control.close()
        self._life.close()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(END_SECONDS):
                await self._process.wait()
            if self._process.returncode is None:
                kill(self.ref)
                await self._process.wait()


def _line_to_elsewhere(kind: socket.SocketKind) -> tuple[trio.socket.SocketType, socket.socket]:
    """Our end, and one for a process that waits when it reads."""
    near, far = _pair(kind)
    return trio.socket.from_stdlib_socket(near), far


def _pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair(type=kind)
    except OSError as error:  # there are no more descriptors
        raise NoCopy(f"cannot talk to a fork server: {error.strerror}") from error


async def _hear(control: trio.socket.SocketType) -> Ready:
    try:
        with trio.fail_after(IMPORT_SECONDS):
            text = part = await control.recv(_MESSAGE)
            while part and not text.endswith(b"\n"):
                part = await control.recv(_MESSAGE)
                text += part
    except trio.TooSlowError:
        raise WarmError(f"its imports took longer than {IMPORT_SECONDS:g} s") from None
    except OSError as error:
        raise WarmError(f"it ended while it imported: {error.strerror}") from error
    if not text.endswith(b"\n"):
        raise WarmError("it ended while it imported")
    said: dict[str, Any] = json.loads(text)
    if "error" in said:
        raise WarmError(str(said["error"]))
    return msgspec.convert(said, Ready)


async def _line(stream: trio.SocketStream) -> dict[str, Any]:
    text = b""
    while not text.endswith(b"\n"):
        more = await stream.receive_some()
        if not more:
            return {}
        text += more
    answer: dict[str, Any] = json.loads(text)
    return answer


def resident_bytes(ref: ProcessRef) -> int:
    """What it occupies, or 0 when it is gone."""
    try:
        return int(Path(f"/proc/{ref.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
