"""The fork server's own program. It runs in the *user's* Python (3.9 or later), not in ours: it imports nothing of this house.

`supervisor.process.forkserver` feeds this file to that Python and says the other side of the talk. Here: import once what every
run imports, then become one run after the other, each in a copy (fork) that looks like `python -m prefect.engine` from
outside and from inside.

A copy has no parent but the agent: the process that forks it ends at once, so the agent (a subreaper) inherits it, and sees
how it ends whatever becomes of this one. It does nothing of the run's before the agent says "go", so an agent that dies, or
has lost patience and started the run in another way, leaves nothing behind.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import re
import resource
import runpy
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOM = "FLOW_AGENT_ROOM"  # a long variable: room for the variables of runs in the memory that /proc/PID/environ shows
ENGINE = "prefect.engine"
GO = b"g"
MESSAGE = 32 * 1024  # bytes

# What an engine imports only once it runs a flow, found by comparing sys.modules; a release may not have all of them.
LATE = """
prefect.flow_engine prefect.new_flow_engine prefect.task_engine prefect.flow_runs prefect.results prefect.runtime
prefect.filesystems prefect.deployments.steps.core prefect.input.run_input prefect.task_runners prefect.utilities.visualization
prefect.client.orchestration prefect.events.clients prefect.events.worker prefect.events.related prefect.logging.handlers
prefect.logging.formatters prefect.logging.highlighters prefect.logging.filters prefect.concurrency.context
prefect.telemetry.run_telemetry prefect.telemetry._metrics prefect._internal.metrics prefect._internal.control_listener
prefect._internal.websockets prefect._internal.concurrency.calls prefect._internal.concurrency.threads pydantic.v1
pydantic.root_model pydantic.deprecated.copy_internals rich.console rich.highlighter rich.theme rich._emoji_codes
concurrent.futures.thread multiprocessing.connection asyncio.unix_events anyio._backends._asyncio httpcore._async.http11
httpcore._async.connection_pool h11 websockets.asyncio.client websockets.extensions.permessage_deflate zoneinfo
"""


class Memory:
    """Where the kernel looks when somebody asks what we are called and which variables we were started with.

    A copy would show this process's for ever. They are written over in place: the run's mark must be found there
    (`supervisor.process.members`), and people shall see in `ps` what runs.
    """

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        self._arguments = int(fields[45]), int(fields[46])  # proc(5): arg_start, arg_end
        self._variables = int(fields[47]), int(fields[48])  # env_start, env_end

    def call_it(self, words: Iterable[str]) -> None:
        """Be shown as started by these words."""
        self._write(self._arguments, [os.fsencode(word) for word in words])

    def show(self, variables: dict[str, str]) -> None:
        """Be shown as started with these variables; with the first of them where there is no room for all."""
        # The rest as one more variable: as thousands of empty ones it would cost whoever reads them (`process.members`) dear.
        self._write(self._variables, [os.fsencode(f"{name}={value}") for name, value in variables.items()], b"_=")

    def _write(self, place: tuple[int, int], words: list[bytes], rest: bytes = b"") -> None:
        start, end = place
        room, text = end - start, b""
        for word in words:
            if len(text) + len(word) + 1 > room:
                break
            text += word + b"\0"
        if rest and len(text) + len(rest) < room:
            text += rest.ljust(room - len(text) - 1)
        # Opened each time: a copy that wrote to what was opened before it was made would write into the fork server.
        own = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.pwrite(own, text.ljust(room, b"\0"), start) != room:
                raise OSError("the memory that shows our variables cannot be written")
        finally:
            os.close(own)


class Conversation:
    """The run's own line to the agent: one request, one answer, "go"."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def request(self) -> dict[str, Any]:
        (length,) = struct.unpack("!I", self._read(4))
        asked: dict[str, Any] = json.loads(self._read(length))
        return asked

    def answer(self, **what: Any) -> None:
        self._socket.sendall(json.dumps(what).encode() + b"\n")

    def wait_for_go(self) -> None:
        if self._read(1) != GO:
            os._exit(1)
        self._socket.close()

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self._socket.recv(count - len(found))
            if not more:  # the agent is gone, or has given us up
                os._exit(1)
            found += more
        return found


def preload(modules: Iterable[str]) -> None:
    """Import what every run imports. Raises what the user's own modules raise."""
    for name in ("prefect", ENGINE, *modules):
        importlib.import_module(name)
    for name in LATE.split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # Touched now, so that a release in which they are called otherwise is found out before there is a run.
    _ = sys.modules["prefect.context"].root_settings_context, sys.modules["prefect.logging.configuration"].setup_logging


def refuse_threads() -> None:
    """Raise when a copy would lack threads of ours. Numerical libraries have some, and put them away before a fork."""
    trial = os.fork()
    if trial == 0:
        os._exit(0)
    os.waitpid(trial, 0)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("a module that it imports has started a thread, which a copy would not have")


def own_files() -> list[str]:
    """What the next run shall see changes of: the files of modules that are not installed, and folders packages are in."""
    found = {place for place in sys.path if re.search("/(site|dist)-packages$", place)}
    for module in list(sys.modules.values()):
        with contextlib.suppress(Exception):  # what stands there need not be a module
            file = vars(module)["__file__"]
            if file.startswith("/") and not re.search("/(site|dist)-packages/", file):
                found.add(file)
    return sorted(file for file in found if not file.startswith(f"{Path(os.__file__).parent}/"))


def refresh() -> None:
    """What Prefect and Python have read or drawn once at import, and each run must have of its own."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    tempfile.tempdir = None
    time.tzset()
    context = sys.modules["prefect.context"]
    context.GLOBAL_SETTINGS_CONTEXT = context.root_settings_context()  # type: ignore[attr-defined]
    logging = sys.modules["prefect.logging.configuration"]
    if logging.PROCESS_LOGGING_CONFIG:
        # Not as an increment to what the fork server's settings had said.
        if isinstance(logging.PROCESS_LOGGING_CONFIG, dict):
            logging.PROCESS_LOGGING_CONFIG.clear()
        logging.setup_logging(incremental=False)


def become(talk: Conversation, memory: Memory, output: int) -> None:
    """Turn this copy into the run's process, up to the agent's "go"."""
    asked = talk.request()
    os.setsid()
    if asked["limit"]:
        with contextlib.suppress(OSError, ValueError):
            number, soft = asked["limit"]
            resource.prlimit(0, number, (soft, resource.prlimit(0, number)[1]))
    if asked["group"]:
        with contextlib.suppress(OSError):  # a group that cannot be joined is no reason not to run
            Path(asked["group"], "cgroup.procs").write_text(f"{os.getpid()}")
    try:
        os.chdir(asked["cwd"])
    except OSError as error:
        talk.answer(error=f"cannot change to '{asked['cwd']}': {error.strerror}")
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, place)
    for descriptor in (nothing, output):
        os.close(descriptor)
    os.environ.clear()  # all of it, before the memory that holds what we were started with is written over
    os.environ.update(asked["env"])
    memory.show(asked["env"])
    talk.answer(pid=os.getpid())
    talk.wait_for_go()
    # Not before: by these words the next agent knows a run that has begun (`supervisor.process.adopt`).
    memory.call_it([sys.executable, "-m", ENGINE])


def run_engine() -> None:
    """As `python -m prefect.engine` does."""
    gc.enable()
    if sys.path and sys.path[0] == "":
        sys.path[0] = str(Path.cwd())
    if hasattr(sys, "orig_argv"):
        sys.orig_argv[:] = [sys.executable, "-m", ENGINE]
    sys.argv[:] = [ENGINE]
    refresh()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{ENGINE}.* found in sys.modules", category=RuntimeWarning)
        runpy.run_module(ENGINE, run_name="__main__", alter_sys=True)


def say(control: socket.socket, **what: Any) -> None:
    """To the agent, in messages none of which is too long for the kernel."""
    text = json.dumps(what).encode() + b"\n"
    for start in range(0, len(text), MESSAGE):
        control.sendall(text[start : start + MESSAGE])


def take(control: socket.socket) -> list[int] | None:
    """The descriptors of the next order; None when the agent has closed its end."""
    size = array.array("i").itemsize
    text, ancillary, _, _ = control.recvmsg(1, socket.CMSG_SPACE(2 * size))
    if not text:
        return None
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % size])
    for descriptor in found:
        os.set_inheritable(descriptor, False)
    return list(found)


def copied(descriptors: list[int]) -> bool:
    """Fork twice: True in the copy that nobody here is the parent of, False in this process."""
    between = os.fork()
    if between == 0:
        between = os.getpid()
        if os.fork() != 0:
            os._exit(0)
        while os.getppid() == between:  # what ended before the agent has inherited it would end unseen
            time.sleep(0.0005)
        return True
    os.waitpid(between, 0)
    for descriptor in descriptors:
        os.close(descriptor)
    return False


def serve(control: socket.socket, memory: Memory) -> None:
    """Take orders until the agent is gone. Returns in a copy, which has become a run."""
    while True:
        descriptors = take(control)
        if descriptors is None:
            os._exit(0)
        if len(descriptors) == 2 and copied(descriptors):
            control.close()
            try:
                become(Conversation(descriptors[0]), memory, descriptors[1])
            except BaseException:  # noqa: BLE001 - the agent hears nothing, and starts the run in another way
                os._exit(1)
            return


def die_with_the_agent(line: int) -> None:
    """Have the kernel end us when the agent's end of this silent line goes, whatever hangs: by SIGIO, whose default that is."""
    os.set_inheritable(line, False)
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)


def main(line: int, modules: list[str]) -> None:
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a module that reads its input must not read what is said to us
    os.close(nothing)
    die_with_the_agent(line)
    os.environ.pop(ROOM, None)
    try:
        memory = Memory()
        memory.call_it([sys.executable, "(flow-agent: imported once, copied for each run)"])
        preload(modules)
        refuse_threads()
        files = own_files()
    except BaseException as error:  # noqa: BLE001 - whatever a user's module does; the agent says it
        say(control, error=f"{type(error).__name__}: {error}"[:2000])
        os._exit(1)
    gc.collect()
    gc.freeze()
    say(control, files=files)
    serve(control, memory)
    os.close(line)
    run_engine()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
