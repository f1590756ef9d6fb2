"""Runs the hooks that a flow's engine could not run itself: a short script in the user's own interpreter.

The agent never imports Prefect or a flow. The script reads the run, loads the flow as the engine does, and calls the
hooks as Prefect's own runner does; what they log stands in the run's log on the server.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import trio

from supervisor.errors import JobError
from supervisor.lifecycle import Exit, Hook
from supervisor.process import stop
from supervisor.process.interpreter import Interpreter
from supervisor.process.launch import launch

log = logging.getLogger(__name__)

GRACE = 2.0  # seconds between SIGTERM and SIGKILL for a hook that takes too long

# Works on Prefect 2.20 to 3.8. A string and not a module, because it must be at hand inside a packed binary, too.
HELPER = '''\
"""flow-agent's helper: runs the on_cancellation or on_crashed hooks of a flow run whose engine is gone."""
import asyncio
import inspect
import os
import sys
import uuid


async def load(run):
    """The flow, by the road the engine takes: the entrypoint it was given, else what the deployment says."""
    from prefect.flows import load_flow_from_entrypoint

    if entrypoint := os.environ.get("PREFECT__FLOW_ENTRYPOINT"):
        return await asyncio.to_thread(load_flow_from_entrypoint, entrypoint, use_placeholder_flow=False)
    try:
        from prefect.flows import load_flow_from_flow_run
    except ImportError:
        from prefect.deployments.deployments import load_flow_from_flow_run
    return await load_flow_from_flow_run(run, use_placeholder_flow=False)


def hooks_of(flow, kind):
    """A list attribute of its own in 3.x, where `flow.on_crashed` is a decorator; in 2.x that is the list."""
    found = getattr(flow, kind + "_hooks", None)
    if found is None and not callable(getattr(flow, kind, None)):
        found = getattr(flow, kind, None)
    return found or []


def state_for(run, kind, message):
    """The run's own state where it is the one the hook is for; else the one it would have been."""
    from prefect.client.schemas.objects import State, StateType

    if run.state is not None and (run.state.is_cancelling() if kind == "on_cancellation" else run.state.is_crashed()):
        return run.state
    if kind == "on_cancellation":
        return State(type=StateType.CANCELLING, name="Cancelling", message=message or None)
    return State(type=StateType.CRASHED, name="Crashed", message=message or None)


def call(hook, flow, run, state):
    """By place, as the engines of 3.x do; by name, as 2.x's do, where the hook can be called in no other way."""
    try:
        inspect.signature(hook).bind(flow, run, state)
    except TypeError:
        return hook(flow=flow, flow_run=run, state=state)
    except ValueError:
        pass  # it has no signature
    return hook(flow, run, state)


async def main(kind, message):
    from prefect.client.orchestration import get_client
    from prefect.logging.configuration import setup_logging
    from prefect.logging.loggers import flow_run_logger

    setup_logging()  # otherwise done only when a flow is entered, and the run's log would stay silent
    async with get_client() as client:
        run = await client.read_flow_run(uuid.UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
    logger = flow_run_logger(run)
    try:
        flow = await load(run)
    except Exception:
        logger.warning("Cannot run the %s hooks: the flow could not be loaded.", kind, exc_info=True)
        return 1
    logger = flow_run_logger(run, flow)
    state = state_for(run, kind, message)
    for hook in hooks_of(flow, kind):
        name = getattr(hook, "__name__", None) or getattr(getattr(hook, "func", None), "__name__", repr(hook))
        logger.info("Running hook %r in response to entering state %r", name, state.name)
        try:
            # In a thread, where Prefect's own sync calls work; a coroutine function only makes its coroutine there.
            result = await asyncio.to_thread(call, hook, flow, run, state)
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.error("An error was encountered while running hook %r", name, exc_info=True)
        else:
            logger.info("Hook %r finished running successfully", name)
    return 0


sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2])))
'''


async def run_hook(
    interpreter: Interpreter,
    hook: Hook,
    *,
    run_id: str,
    env: Mapping[str, str],
    cwd: Path,
    output: Path,
    timeout: float,  # noqa: ASYNC109 - bounds the hooks, and ends them
    message: str = "",
) -> bool:
    """Run all hooks of that kind: whether the helper came to its end. A hook that raises is logged in the run's log.

    `env`, `cwd` and `output` are the run's own. A hook gets the state the server holds when it fits (a cancelling state
    for on_cancellation, a crashed one for on_crashed), otherwise one made of `message`. After `timeout` seconds the
    helper is ended; nothing of it lives on in any case. Never raises for what a hook does.
    """
    argv = [os.fspath(interpreter.python), "-c", HELPER, hook.value, message]
    ours = {name: value for name, value in env.items() if not name.startswith("PREFECT__CONTROL_")}
    try:
        child = await launch(argv, env=ours, cwd=cwd, output=output)
    except JobError as error:
        log.warning("cannot run the %s hooks: %s", hook, error, extra={"run_id": run_id})
        return False
    how: Exit | None = None
    try:
        with trio.move_on_after(timeout):
            how = await child.wait()
    except trio.Cancelled:
        # The agent was told to kill and go: the helper may not outlive it.
        with trio.CancelScope(shield=True):
            await stop.end(child.ref, run_id, grace=0)
            await child.wait()
        raise
    await stop.end(child.ref, run_id, grace=GRACE)
    if how is None:
        await child.wait()
        log.warning("the %s hooks took longer than %g s and were ended", hook, timeout, extra={"run_id": run_id})
        return False
    if how != Exit(code=0):
        log.warning("the %s hooks were not run: their process %s", hook, how, extra={"run_id": run_id})
        return False
    return True
