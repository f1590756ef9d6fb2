"""Puts the agent's own rooms into that world, and plays a script."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import trio
import trio.testing

from tests.stateful.machine import Engine
from tests.stateful.script import Script
from tests.stateful.world import World


async def at_once(function: Any, *args: Any, **_: Any) -> Any:
    """Instead of a thread: the clock here must not jump meanwhile."""
    await trio.lowlevel.checkpoint()
    return function(*args)


class Ears(logging.Handler):
    """Hears the agent tell of bugs of its own."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._world.say(f"log: {message}")
        if record.exc_info is not None:
            self._world.story.append(logging.Formatter().formatException(record.exc_info))
        for sign in ("internal error", "giving up"):
            self._world.expect(sign not in message, f"the log says: {message}")


LAUNCHER = "supervisor.runs.launcher"


def heart() -> list[ModuleType]:
    """The modules of supervisor.runs. The launcher is not among them: what it does is done by `Starter`."""
    return [
        sys.modules[name] for name in sorted(sys.modules) if name.startswith("supervisor.runs.") and name != LAUNCHER
    ]


def stand_ins(world: World) -> Mapping[str, Any]:
    """What stands in for that which acts upon the machine, by the name by which it is known there."""
    return {
        "failpoint": world.failpoint,
        "boot_id": lambda: world.boot,
        "adopt": world.adopt,
        "find": world.find,
        "is_engine": lambda ref: any(isinstance(one, Engine) and one.ref == ref for one in world.processes),
        "age_seconds": world.age_seconds,
        "end": world.end,
        "end_others": world.end_others,
        "end_leftovers": world.end_leftovers,
        "hold": world.hold,
        "let_go_on": world.let_go_on,
        "wait_gone": world.wait_gone,
        "look": world.look,
        "ref_of": lambda process: process.ref,
        "engine_ran_hooks": lambda _: world.output_tells_of_hooks,
    }


@contextmanager
def stage(world: World) -> Iterator[None]:
    """The agent's rooms act upon this world alone."""
    fakes = stand_ins(world)
    log = logging.getLogger("flow-agent")
    ears, level, propagates = Ears(world), log.level, log.propagate
    with ExitStack() as patches:
        patches.enter_context(patch.object(trio.to_thread, "run_sync", at_once))
        for module in heart():
            for name in sorted(fakes.keys() & vars(module).keys()):
                patches.enter_context(patch.object(module, name, fakes[name]))
        log.addHandler(ears)
        log.setLevel(logging.INFO)
        log.propagate = False  # pytest would keep the lines of all examples
        try:
            yield
        finally:
            log.setLevel(level)
            log.propagate = propagates
            log.removeHandler(ears)


def play(script: Script) -> World:
    """What becomes of the run in that script."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    worlds = []

    async def main() -> None:
        world = World(script)
        worlds.append(world)
        with stage(world):
            await world.play()

    trio.run(main, clock=clock)
    worlds[0].judge()
    return worlds[0]
