"""The Python that runs flows: whether it is one, which Prefect it has, and what that Prefect's engine can do."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import msgspec
import trio

from supervisor.errors import InterpreterError
from supervisor.process.brand import birth
from supervisor.process.environ import inherited

DEADLINE = 30.0  # seconds; a cold disk or a network file system can make even this small question slow

# The engine connects back, takes an intent before the SIGTERM, and runs its own on_cancellation hooks.
_CONTROL_CHANNEL = (3, 6, 27)

# Asks the installed metadata and does not import Prefect, which would take seconds. prefect-client is the same engine
# without the server. A line of its own, because a site's sitecustomize may print, too.
_QUESTION = """
import glob, json, re, sys
from importlib import metadata
def version():
    for name in ("prefect", "prefect-client"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
paths = [p for p in sys.path if p]
installs = [p for p in paths if re.search("(site|dist)-packages$", p) or glob.glob(glob.escape(p) + "/*.dist-info")]
print("\\nflow-agent:" + json.dumps({"prefect": version(), "paths": paths, "installs": installs}))
"""
_ANSWER = re.compile(rb"^flow-agent:(\{.*\})$", re.MULTILINE)


class Interpreter(msgspec.Struct, frozen=True):
    """A Python that has Prefect."""

    python: Path
    prefect_version: str  # "3.8.8"

    @property
    def version(self) -> tuple[int, ...]:
        """The numbers of the release: (3, 8, 8). What follows them (rc1, .dev4, +local) does not count."""
        found = re.match(r"\d+(\.\d+)*", self.prefect_version)
        return tuple(int(part) for part in found[0].split(".")) if found else (0,)

    @property
    def has_control_channel(self) -> bool:
        """Whether the engine can be asked to cancel natively (`supervisor.process.channel`)."""
        return self.version >= _CONTROL_CHANNEL

    @property
    def runs_own_hooks(self) -> bool:
        """Whether the engine runs its cancellation and crash hooks itself whenever it can (reference 2.4)."""
        return self.version >= _CONTROL_CHANNEL


async def inspect(python: Path) -> Interpreter:
    """Ask that Python which Prefect it has. Raises `InterpreterError` with a sentence that says what to do."""
    return (await _ask(python))[0]


class Interpreters:
    """The interpreters asked so far.

    Owns the cache: an answer holds as long as neither the executable nor a folder that packages are installed in has changed,
    so an upgraded Prefect is noticed at the next run and an unchanged one costs a few `stat` calls.
    """

    def __init__(self) -> None:
        self._answers: dict[Path, tuple[_Stamp, Interpreter, _Places]] = {}
        # Ten runs at once ask one question; one Python that hangs does not keep the others from being asked.
        self._asking: defaultdict[Path, trio.Lock] = defaultdict(trio.Lock)

    async def get(self, python: Path) -> Interpreter:
        """As `inspect`, but asks again only after a change. Refusals are not kept: the user may just be mending it."""
        async with self._asking[python]:
            if (known := self._answers.get(python)) is not None and known[0] == _stamp(python, known[2]):
                return known[1]
            interpreter, places = await _ask(python)
            self._answers[python] = (_stamp(python, places), interpreter, places)
            return interpreter

    def major(self, python: Path) -> int | None:
        """The generation of Prefect it had when it was last asked."""
        answer = self._answers.get(python)
        return None if answer is None else answer[1].version[0]


_Stamp = tuple[tuple[int, int] | None, ...]
_Places = Mapping[Path, bool]  # a Python's path: whether packages are installed there


def _stamp(python: Path, places: _Places) -> _Stamp:
    """Inode and time of change of the executable and of every folder on its path; None for what is not there.

    Where nothing is installed the inode alone: flows may well write their files beside their modules.
    """

    def look(path: Path, installs: bool) -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns if installs else 0

    return look(python, True), *(look(path, installs) for path, installs in places.items())


class _Answer(msgspec.Struct):
    prefect: str | None
    paths: list[str]
    installs: list[str]


async def _ask(python: Path) -> tuple[Interpreter, _Places]:
    answer = _understand(python, await _run(python, inherited(os.environ)))
    if answer.prefect is None:
        raise InterpreterError(
            f"'{python}' has no Prefect: install it there with '{python} -m pip install prefect', "
            "or set flows.python to a Python that has it"
        )
    return Interpreter(python, answer.prefect), {Path(path): path in answer.installs for path in answer.paths}


async def _run(python: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    # Not -I: Prefect may well be installed in the user's own site-packages, where the engine will find it.
    question = [os.fspath(python), "-c", _QUESTION]
    answer: list[subprocess.CompletedProcess[bytes]] = []

    async def ask(*, task_status: trio.TaskStatus[object]) -> None:
        whole = await trio.run_process(
            question,
            check=False,
            capture_stdout=True,
            capture_stderr=True,
            env=dict(env),
            cwd="/",  # -c imports from the current folder first: not from wherever the agent was started
            start_new_session=True,
            task_status=task_status,
        )
        answer.append(whole)

    problem: OSError | None = None
    try:
        with trio.fail_after(DEADLINE):
            # Of no run: born with the brand of one that is being started just now, it would be ended as a part of it.
            async with trio.open_nursery() as nursery, birth(None):
                try:
                    await nursery.start(ask)
                except OSError as error:
                    problem = error
    except trio.TooSlowError:
        raise InterpreterError(f"'{python}' did not say within {DEADLINE:.0f} s which Prefect it has") from None
    if problem is not None:
        raise InterpreterError(_refusal(python, problem)) from problem
    return answer[0]


def _refusal(python: Path, error: OSError) -> str:
    match error:
        case FileNotFoundError():
            why = "there is no such file"
        case PermissionError():
            why = "it is a folder" if python.is_dir() else "it is not executable"
        case _:
            why = error.strerror or str(error)
    return f"cannot run flows with '{python}': {why}; set flows.python to the Python of your flows"


def _understand(python: Path, said: subprocess.CompletedProcess[bytes]) -> _Answer:
    found = _ANSWER.search(said.stdout)
    if found is not None:
        try:
            return msgspec.json.decode(found[1], type=_Answer)
        except msgspec.MsgspecError as error:
            raise InterpreterError(f"cannot understand what '{python}' says of its Prefect: {error}") from error
    lines = said.stderr.decode(errors="replace").strip().splitlines()
    raise InterpreterError(
        f"'{python}' is not a Python that works (it exited with code {said.returncode}"
        + (f": {lines[-1][:200]}" if lines else "")
        + "); set flows.python to the Python of your flows"
    )
