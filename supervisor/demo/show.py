"""The show: what happens on the stage, told as it happens."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from supervisor.config.file import load
from supervisor.demo.flows import CANCELLED_ON_THE_WAY, EXPECTED, SOURCE
from supervisor.demo.history import History, table
from supervisor.demo.stage import POOL, DemoFailed, Stage, Tell
from supervisor.demo.user import User
from supervisor.errors import BackendError, InterpreterError
from supervisor.process.interpreter import Interpreters

RUN_SECONDS = 60.0  # for all three runs to end

Say = Callable[[str], object]


def run(python: Path | None, say: Say) -> int:
    """Runs the demonstration, a line at a time to `say`, and returns its exit status: 0 when each run ended as expected.

    Raises `InterpreterError` or `ConfigError`, before anything is started, where there is no Python with Prefect 3.
    Ctrl-C and SIGTERM end it early, with everything removed.
    """
    if python is None:
        python = load(None, environ=os.environ, flags={"work": [{"pool": POOL}]}).flows.python
    else:
        python = Path(shutil.which(python) or python).absolute()
    return trio.run(_demo, python, say)


async def _demo(python: Path, say: Say) -> int:
    found = await Interpreters().get(python)
    if found.version[:1] != (3,):
        raise InterpreterError(
            f"cannot show the demo with '{python}': it has Prefect {found.prefect_version} and the demo's server is a "
            "Prefect 3; name another Python with --python"
        )
    code = 1
    async with trio.open_nursery() as nursery:
        await nursery.start(_end_early, nursery.cancel_scope, say)
        code = await _on_stage(python, say)
        nursery.cancel_scope.cancel()
    return code


async def _end_early(
    scope: trio.CancelScope, say: Say, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as arriving:
        task_status.started()
        async for signum in arriving:
            say(f"{signal.Signals(signum).name}: ending early and removing everything")
            scope.cancel()


async def _on_stage(python: Path, say: Say) -> int:
    """Builds the stage, plays, and takes the stage down again, whatever happens."""
    began = trio.current_time()

    def tell(what: str) -> None:
        say(f"{trio.current_time() - began:5.1f} s  {what}")

    histories: Sequence[History] = ()
    stage = Stage(python, tell)
    try:
        histories = await _play(stage, tell)
    except (DemoFailed, BackendError) as error:
        say(f"\n{error}")
    finally:
        last_words = await stage.end()
    if histories:
        say("\n" + "\n".join(table(histories)))
    if {one.name: one.end.type for one in histories if one.end} == EXPECTED:
        say("\nAll three ended as they should have, and everything has been removed again.")
        return 0
    say(f"\nThat is not how it should have been.\n{last_words}")
    return 1


async def _play(stage: Stage, tell: Tell) -> Sequence[History]:
    """The whole show. Raises `DemoFailed` and `BackendError`."""
    async with AsyncExitStack() as stack:
        tell("starting a Prefect server on SQLite")
        user = await stage.start_server(stack)
        tell(f"Prefect {await user.server_version()} answers at {stage.url}")
        await user.create_pool(POOL)
        folder = stage.home / "flows"
        await trio.to_thread.run_sync(_write_flows, folder)
        deployments = {name: await user.deploy(name, folder, POOL) for name in EXPECTED}
        tell(f"there are a work pool '{POOL}' and deployments {', '.join(EXPECTED)}; starting the agent")
        await stage.start_agent(user)
        tell("flow-agent waits for work; creating three runs")
        return await _follow(user, {name: await user.create_run(one) for name, one in deployments.items()}, tell)


def _write_flows(folder: Path) -> None:
    folder.mkdir()
    (folder / "flows.py").write_text(SOURCE)


async def _follow(user: User, runs: Mapping[str, str], tell: Tell) -> Sequence[History]:
    """Tells every step of the runs until all have ended or the time is up, and cancels one on the way."""
    told = dict.fromkeys(runs, 0)
    to_cancel = {CANCELLED_ON_THE_WAY}
    deadline = trio.current_time() + RUN_SECONDS
    while True:
        histories = [await user.history(name, run_id) for name, run_id in runs.items()]
        for one in histories:
            for state in one.states[told[one.name] :]:
                tell(f"{one.name:<8} {state.name}")
            told[one.name] = len(one.states)
            if one.name in to_cancel and one.started:
                to_cancel.remove(one.name)
                tell(f"{one.name:<8} asking the server to cancel it")
                await user.cancel(runs[one.name])
        if all(one.end for one in histories) or trio.current_time() > deadline:
            return histories
        await trio.sleep(0.2)
