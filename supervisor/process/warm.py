"""Warm starts: which fork servers there are, when one is made anew, and which runs cannot begin as a copy.

A warm start is never needed: whatever is wrong with it, the run starts cold, and the log says so once.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import trio

from supervisor.errors import InterpreterError
from supervisor.process.cgroup import RunGroup
from supervisor.process.forkserver import Forked, ForkServer, NoCopy, WarmError
from supervisor.process.interpreter import Interpreter, Interpreters

log = logging.getLogger("flow-agent")

PATIENCE_SECONDS = 30.0  # for a fork server that is being made: a cold start would import the same
MAX_COPIES = 2000  # then it is made anew, whatever it looks like
MAX_GROWTH = 1.5  # times the size it had at first
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0  # seconds between two tries to make one that fails

# What acts when an interpreter, or a library that it has imported, begins. A copy is past that.
_AT_START = re.compile(
    r"(PYTHON(?!UNBUFFERED$)|LD_|MALLOC_|GLIBC_|OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|BLIS_|NUMEXPR_|VECLIB_|LC_|CUDA_|TF_|JAX_|XLA_).*"
    r"|LANG|LANGUAGE|TZDIR"
)


class Warmth(msgspec.Struct, frozen=True):
    """What a fork server has begun with, and so what runs of it have in common."""

    python: Path
    preload: tuple[str, ...]
    cwd: Path | None  # where all of its runs start, if they have one place
    env: Mapping[str, str]  # what a run has at least


Key = tuple[Path, tuple[str, ...], Path | None, frozenset[tuple[str, str]]]


def _key(warmth: Warmth) -> Key:
    return warmth.python, warmth.preload, warmth.cwd, frozenset(warmth.env.items())


def why_cold(warmth: Warmth, env: Mapping[str, str]) -> str | None:
    """What of these variables a copy could not honour."""
    for name in sorted({*warmth.env, *env}):
        if _AT_START.fullmatch(name) and warmth.env.get(name) != env.get(name):
            return f"{name} counts only when a Python starts"
    return None


class Place:
    """Where the one fork server of a kind stands: none yet, one that is ready, or none because it cannot be made."""

    def __init__(self) -> None:
        self.server: ForkServer | None = None
        self.interpreter: Interpreter | None = None  # as it was before the server imported anything
        self.stamps: tuple[_Stamp, ...] = ()
        self.failed = False
        self.retired = trio.Event()
        self.life = trio.CancelScope()
        self._changed = trio.Event()

    def become(self, server: ForkServer | None, *, failed: bool = False, began: int = 0) -> None:
        """`began`: when the server began to import, by the clock of file systems (ns)."""
        self.server, self.failed = server, failed
        if server is not None:
            self.stamps = _stamps(server, began)
            self.retired = trio.Event()
        self._changed.set()
        self._changed = trio.Event()

    async def settled(self) -> ForkServer | None:
        """The server, once it is known whether there is one; None when it takes too long."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while self.server is None and not self.failed:
                await self._changed.wait()
        return self.server

    def fits(self, interpreter: Interpreter) -> bool:
        """Whether what the server has imported is what a run would import now."""
        return self.server is not None and self.interpreter is interpreter and self.stamps == _stamps(self.server)

    def retire(self, why: str, *, fault: bool = False) -> None:
        """No further copies of this one. The next one is made at once, or after a while when it is at `fault`."""
        if self.server is not None:
            log.info("the fork server (process %d) is made anew: %s", self.server.ref.pid, why)
            self.become(None, failed=fault)
            self.retired.set()


class WarmStarts:
    """Owns the fork servers: one for each kind that the configuration names, made at once and kept."""

    def __init__(self, interpreters: Interpreters) -> None:
        self._interpreters = interpreters
        self._places: dict[Key, Place] = {}
        self._nursery: trio.Nursery | None = None
        self._wanted: Sequence[Warmth] = ()
        self._said: set[str] = set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the fork servers until cancelled; then they end, and their copies go on."""
        async with trio.open_nursery() as self._nursery:
            for warmth in self._wanted:
                self._place(warmth)
            task_status.started()
            await trio.sleep_forever()

    def use(self, wanted: Sequence[Warmth]) -> None:
        """These kinds from now on. Those that are as they were are not disturbed."""
        self._wanted = wanted
        keys = {_key(warmth) for warmth in wanted}
        for key in [key for key in self._places if key not in keys]:
            self._places.pop(key).life.cancel()
        if self._nursery is not None:
            for warmth in wanted:
                self._place(warmth)

    async def ready(self, warmth: Warmth, interpreter: Interpreter, env: Mapping[str, str]) -> None:
        """Waits while the fork server is made from which such a run would begin. What follows is up to `start`."""
        place = self._places.get(_key(warmth))
        if place is not None and why_cold(warmth, env) is None:
            self._up_to_date(place, interpreter)
            await place.settled()

    def _up_to_date(self, place: Place, interpreter: Interpreter) -> None:
        if place.server is not None and not place.fits(interpreter):
            place.retire("what it has imported has changed")

    async def start(
        self,
        warmth: Warmth,
        interpreter: Interpreter,
        *,
        env: Mapping[str, str],
        cwd: Path,
        output: Path,
        group: RunGroup | None,
    ) -> Forked | None:
        """A copy that runs the engine with exactly these; None when the run must start cold.

        `interpreter` is as it was just found. Raises `JobError` when nobody can write to `output`.
        """
        if (reason := why_cold(warmth, env)) is not None:
            self._say(f"a run starts cold: {reason}, and the run sets it to something else than [flows] does")
            return None
        place = self._places.get(_key(warmth))
        if place is None:
            return None  # of a configuration that is no longer in force
        known = place.server
        self._up_to_date(place, interpreter)
        server = await place.settled()
        if server is None or (server is not known and not place.fits(interpreter)):
            return None
        if group is not None and not group.create():
            group = None
        try:
            return await server.copy(env=env, cwd=cwd, output=output, group=group)
        except WarmError as error:
            log.warning("a run starts cold: %s", error)
            if not isinstance(error, NoCopy) and place.server is server:
                place.retire("it gave no copy", fault=True)
            return None
        finally:
            if place.server is server and (server.copies >= MAX_COPIES or server.grown() > MAX_GROWTH):
                place.retire("it has become old or large")

    def _place(self, warmth: Warmth) -> Place:
        assert self._nursery is not None, "runs live within the services"
        key = _key(warmth)
        if key not in self._places:
            place = self._places[key] = Place()
            self._nursery.start_soon(self._keep, warmth, place, name=f"fork server of {warmth.python}")
        return self._places[key]

    async def _keep(self, warmth: Warmth, place: Place) -> None:
        """One fork server after the other."""
        pause = _FIRST_PAUSE
        with place.life:
            while True:
                began, began_ns = trio.current_time(), time.time_ns()
                try:
                    interpreter = await self._interpreters.get(warmth.python)
                    server = await ForkServer.open(
                        warmth.python, env=warmth.env, cwd=warmth.cwd or Path("/"), modules=warmth.preload
                    )
                except (WarmError, InterpreterError) as error:
                    self._say(f"no warm starts with '{warmth.python}': {error}")
                    place.become(None, failed=True)
                else:
                    log.info(
                        "warm starts with '%s': Prefect %s imported in %.1f s by process %d",
                        warmth.python,
                        interpreter.prefect_version,
                        trio.current_time() - began,
                        server.ref.pid,
                    )
                    place.interpreter = interpreter
                    place.become(server, began=began_ns)
                    try:
                        if await _died(server, place.retired):
                            log.warning("the fork server (process %d) has ended", server.ref.pid)
                        elif not place.failed:
                            began = -math.inf  # no fault of its own: the next one at once
                    finally:
                        if place.server is server:
                            place.become(None, failed=True)  # until there is another, nobody waits for it
                        await server.close()
                if trio.current_time() - began < _LONGEST_PAUSE:
                    await trio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                else:
                    pause = _FIRST_PAUSE
        place.become(None, failed=True)  # no longer of the configuration: nobody waits for it

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            log.warning("%s", sentence)


async def _died(server: ForkServer, retired: trio.Event) -> bool:
    """Waits until it has ended, or shall be replaced."""
    died = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal died
            await server.wait()
            died = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await retired.wait()
        nursery.cancel_scope.cancel()
    return died


_Stamp = tuple[int, int] | None
_CHANGED_MEANWHILE = (0, 0)


def _stamps(server: ForkServer, began: int | None = None) -> tuple[_Stamp, ...]:
    """Of each of its files. One that has changed since it `began` to import may have been imported as it was before."""
    now = time.time_ns()

    def look(file: Path) -> _Stamp:
        try:
            found = file.stat()
        except OSError:
            return None
        if began is not None and began <= found.st_ctime_ns <= now:
            return _CHANGED_MEANWHILE
        return found.st_ino, found.st_mtime_ns

    return tuple(look(file) for file in server.files)
