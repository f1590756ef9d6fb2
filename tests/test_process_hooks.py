"""supervisor/process/hooks.py: the helper in real Prefects, old and new, against real servers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from supervisor.lifecycle import Hook
from supervisor.process.environ import flow_environ
from supervisor.process.hooks import run_hook
from supervisor.process.interpreter import Interpreter
from supervisor.process.members import members
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

FLOWS = Path(__file__).with_name("flows")
ENGINES = ["2.20.26", "3.4.25", "3.6.29", "3.8.8"]


class Stage:
    """A run on a real server, and the helper's call for it."""

    def __init__(self, version: str, python: Path, server: PrefectServer, api: Api, folder: Path) -> None:
        self.interpreter = Interpreter(python, version)
        self.server, self.api, self.folder = server, api, folder
        self.output = folder / "output"
        self.work = folder / "work"
        self.work.mkdir()

    def run(self, flow: str, *states: str, file: str = "process_flows.py") -> str:
        run_id = self.api.create_run(self.api.create_deployment(flow, file=file, path=FLOWS))
        for state in states:
            self.api.set_state(run_id, state, force=True)
        return run_id

    def hook(self, run_id: str, hook: Hook, *, timeout: float = 60, message: str = "", **env: str) -> bool:
        environ = flow_environ(
            run_id=run_id,
            api_url=self.server.url,
            secrets={},
            pass_env=(),
            flows_env={"SAY": str(self.folder / "said"), **env},
            job_env={},
            extra={},
            environ=os.environ,
        )

        async def main() -> bool:
            done = await run_hook(
                self.interpreter,
                hook,
                run_id=run_id,
                env=environ,
                cwd=self.work,
                output=self.output,
                timeout=timeout,
                message=message,
            )
            assert await members(None, run_id) == []
            return done

        return trio.run(main)

    def said(self) -> list[str]:
        said = self.folder / "said"
        return said.read_text().splitlines() if said.exists() else []


@pytest.fixture
def stage(
    request: pytest.FixtureRequest,
    servers: Callable[[str], PrefectServer],
    api_of: Callable[[PrefectServer], Api],
    engine: Callable[[str], Path],
    tmp_path: Path,
) -> Stage:
    version = getattr(request, "param", "3.8.8")
    server = servers("2.20.26" if version.startswith("2") else "3.8.8")
    return Stage(version, engine(version), server, api_of(server), tmp_path)


every_engine = pytest.mark.parametrize("stage", ENGINES, indirect=True)


@every_engine
def test_cancellation_hooks_run_in_order_and_one_that_fails_stops_no_other(stage: Stage) -> None:
    run_id = stage.run("sync_sleeper", "RUNNING", "CANCELLING")
    assert stage.hook(run_id, Hook.CANCELLATION), stage.output.read_text()
    assert stage.said() == [
        "failing CANCELLING Cancelling",
        f"sync sync-sleeper {run_id} CANCELLING Cancelling",
        f"async sync-sleeper {run_id} CANCELLING Cancelling",
    ]
    logged = wait_until(lambda: "finished" in (log := "\n".join(stage.api.logs(run_id))) and log, 15, "the run's log")
    assert "Running hook 'sync_hook' in response to entering state 'Cancelling'" in logged
    assert "An error was encountered while running hook 'failing_hook'" in logged
    assert "this hook fails on purpose" in logged
    assert "Hook 'async_hook' finished running successfully" in logged
    assert stage.api.state(run_id) == "CANCELLING"  # the helper changes no state


@every_engine
def test_crash_hooks_of_an_async_flow_get_the_crashed_state(stage: Stage) -> None:
    run_id = stage.run("async_crasher", "RUNNING", "CRASHED")
    assert stage.hook(run_id, Hook.CRASHED), stage.output.read_text()
    assert stage.said() == [
        "failing CRASHED Crashed",
        f"sync async-crasher {run_id} CRASHED Crashed",
        f"async async-crasher {run_id} CRASHED Crashed",
    ]


@pytest.mark.parametrize("stage", ["2.20.26", "3.8.8"], indirect=True)
def test_a_hook_gets_the_state_it_is_for_when_the_server_holds_another(stage: Stage) -> None:
    run_id = stage.run("sync_sleeper", "RUNNING", "CRASHED")  # our own signal, taken for a crash by the engine
    assert stage.hook(run_id, Hook.CANCELLATION, message="Cancelled on request."), stage.output.read_text()
    assert stage.said()[1] == f"sync sync-sleeper {run_id} CANCELLING Cancelling"


@pytest.mark.parametrize("stage", ["2.20.26", "3.8.8"], indirect=True)
def test_a_flow_without_hooks_is_done_at_once(stage: Stage) -> None:
    run_id = stage.run("hookless", "RUNNING", "CRASHED")
    assert stage.hook(run_id, Hook.CRASHED), stage.output.read_text()
    assert stage.said() == []


@every_engine
def test_a_flow_that_cannot_be_loaded_is_said_in_the_runs_log(stage: Stage) -> None:
    run_id = stage.run("hookless", "RUNNING", "CRASHED", file="no_such_file.py")
    assert not stage.hook(run_id, Hook.CRASHED)
    expected = "Cannot run the on_crashed hooks: the flow could not be loaded."
    wait_until(lambda: any(expected in line for line in stage.api.logs(run_id)), 15, "the warning in the run's log")


def test_an_entrypoint_in_the_environment_is_loaded_where_it_is(stage: Stage) -> None:
    run_id = stage.run("sync_crasher", "RUNNING", "CRASHED", file="no_such_file.py")
    entrypoint = f"{FLOWS / 'process_flows.py'}:sync_crasher"
    assert stage.hook(run_id, Hook.CRASHED, PREFECT__FLOW_ENTRYPOINT=entrypoint), stage.output.read_text()
    assert len(stage.said()) == 3
    assert list(stage.work.iterdir()) == []  # nothing was copied


def test_hooks_that_never_end_are_ended_with_all_their_children(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    run_id = stage.run("hangs_in_hook", "RUNNING", "CRASHED")
    assert not stage.hook(run_id, Hook.CRASHED, timeout=5)
    assert stage.said() == ["hanging"]
    assert "took longer than 5 s and were ended" in caplog.text


def test_a_python_that_cannot_be_started_costs_a_warning(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.interpreter = Interpreter(Path("/nowhere/python"), "3.8.8")
    assert not stage.hook("00000000-0000-0000-0000-000000000000", Hook.CRASHED)
    assert "cannot run the on_crashed hooks: cannot start '/nowhere/python'" in caplog.text


def test_a_helper_whose_agent_goes_is_ended_with_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho begun > {tmp_path}/begun\nexec sleep 600\n")
    python.chmod(0o755)
    run_id = "run-whose-agent-goes"

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await run_hook(
                    Interpreter(python=python, prefect_version="3.8.8"),
                    Hook.CRASHED,
                    run_id=run_id,
                    env={"FLOW_AGENT_RUN_ID": run_id, "PATH": os.environ["PATH"]},
                    cwd=tmp_path,
                    output=tmp_path / "output",
                    timeout=600,
                )

            nursery.start_soon(run)
            with trio.fail_after(30):
                while not (tmp_path / "begun").exists():
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert await members(None, run_id) == []

    trio.run(main)
