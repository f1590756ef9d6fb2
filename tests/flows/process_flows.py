"""Flows for the tests of supervisor/process: they wait to be ended, and their hooks say what they were given."""

import asyncio
import os
import subprocess
import time
from pathlib import Path

from prefect import flow


def say(what: str) -> None:
    """Appends a line to the file that the test reads."""
    with Path(os.environ["SAY"]).open("a") as out:
        out.write(what + "\n")


def failing_hook(flow, flow_run, state):
    say(f"failing {state.type.value} {state.name}")
    raise RuntimeError("this hook fails on purpose")


def sync_hook(flow, flow_run, state):
    say(f"sync {flow.name} {flow_run.id} {state.type.value} {state.name}")


async def async_hook(flow, flow_run, state):
    await asyncio.sleep(0)
    say(f"async {flow.name} {flow_run.id} {state.type.value} {state.name}")


def wrong_hook(flow, flow_run, state):
    say(f"wrong {state.type.value} {state.name}")


ON_BOTH = [failing_hook, sync_hook, async_hook]


@flow(name="sync-sleeper", on_cancellation=ON_BOTH, on_crashed=[wrong_hook])
def sync_sleeper():
    say("body")
    time.sleep(600)


@flow(name="async-sleeper", on_cancellation=ON_BOTH, on_crashed=[wrong_hook])
async def async_sleeper():
    say("body")
    await asyncio.sleep(600)


@flow(name="sync-crasher", on_cancellation=[wrong_hook], on_crashed=ON_BOTH)
def sync_crasher():
    say("body")
    time.sleep(600)


@flow(name="async-crasher", on_cancellation=[wrong_hook], on_crashed=ON_BOTH)
async def async_crasher():
    say("body")
    await asyncio.sleep(600)


@flow(name="hookless")
def hookless():
    say("body")


def hanging_hook(flow, flow_run, state):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    say("hanging")
    time.sleep(600)


@flow(name="hangs-in-hook", on_crashed=[hanging_hook])
def hangs_in_hook():
    say("body")
