"""Where what the server says of a job meets this machine: which command, in which directory, with which environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from supervisor.config import Flows
from supervisor.errors import InterpreterError, JobError
from supervisor.lifecycle import Hook
from supervisor.model import FlowRun, Job
from supervisor.process.adopt import Adopted
from supervisor.process.cgroup import Cgroups, RunGroup
from supervisor.process.channel import ControlChannel, Session
from supervisor.process.environ import MARK, RUN_ID, STATE_MARK, flow_environ
from supervisor.process.forkserver import Forked
from supervisor.process.hooks import run_hook
from supervisor.process.interpreter import Interpreter, Interpreters
from supervisor.process.launch import Child, launch, private_directory, remove_directory
from supervisor.process.warm import WarmStarts, Warmth

HOOK_SECONDS = 60.0  # the longest a flow's hooks may take when we have to run them

_log = logging.getLogger("flow-agent")


@dataclass(frozen=True)
class Launched:
    """A process of a run, and what is known of the engine in it.

    `session` is None where the engine has no channel. `is_engine` is false where the process may only be the engine's
    parent, because the job has a command of its own.
    """

    child: Child | Forked | Adopted
    session: Session | None
    runs_own_hooks: bool
    is_engine: bool
    output_from: int  # where in the run's file the output of this process begins


@dataclass(frozen=True)
class Plan:
    """What is known of a run's process before it is started. `interpreter` is None where a command does without ours."""

    argv: Sequence[str]
    is_engine: bool
    interpreter: Interpreter | None
    warmth: Warmth | None = None  # None: it starts cold

    @property
    def runs_own_hooks(self) -> bool:
        return self.interpreter is None or self.interpreter.runs_own_hooks


class OutputFiles(Protocol):
    """What is needed of the keeper of the output files (`supervisor.logs`)."""

    def path(self, run_id: str) -> Path: ...

    async def prepare(self, run_id: str) -> int: ...


class Launcher:
    """Starts the processes of runs: their engines, and the helper that runs their hooks."""

    def __init__(
        self,
        *,
        api_url: str,
        secrets: Callable[[], Mapping[str, str]],
        worker: str,
        state_dir: Path,
        work_dir: Path,
        output: OutputFiles,
        interpreters: Interpreters,
        channel: ControlChannel,
        cgroups: Cgroups | None,
        warm: WarmStarts,
    ) -> None:
        self._api_url = api_url
        self._secrets = secrets
        self._worker = worker
        self._state_dir = state_dir
        self._work_dir = work_dir
        self._output = output
        self._interpreters = interpreters
        self._channel = channel
        self._cgroups = cgroups
        self._warm = warm

    def output(self, run_id: str) -> Path:
        """The file that holds the run's output."""
        return self._output.path(run_id)

    def group(self, run_id: str) -> RunGroup | None:
        """The run's control group; None where we have none to give."""
        return None if self._cgroups is None else self._cgroups.group(run_id)

    def warmth(self, flows: Flows) -> Warmth | None:
        """The fork server from which such runs begin; None where they start cold."""
        if flows.start != "warm" or flows.command is not None:
            return None
        env = flow_environ(
            run_id="",
            api_url=self._api_url,
            secrets={},
            pass_env=flows.pass_env,
            flows_env=flows.env,
            job_env={},
            extra={},
            environ=os.environ,
        )
        own = {name: value for name, value in env.items() if name not in (MARK, RUN_ID)}
        return Warmth(flows.python, flows.preload, flows.working_dir, own)

    async def plan(self, job: Job, flows: Flows, *, again: bool = False) -> Plan:
        """What `launch` will start; cold when it is `again`. Raises `InterpreterError` with a sentence for the owner."""
        command = job.command or flows.command
        interpreter = await self._interpreter(flows, needed=command is None)
        if command is not None:
            return Plan(command, False, interpreter)
        warmth = None if again else self.warmth(flows)
        return Plan((str(flows.python), "-m", "prefect.engine"), True, interpreter, warmth)

    async def ready(self, run: FlowRun, job: Job, flows: Flows) -> None:
        """Waits while a fork server is made from which the run would begin. What is wrong with it, `launch` will say."""
        with suppress(InterpreterError):
            plan = await self.plan(job, flows)
            if plan.warmth is not None and plan.interpreter is not None:
                env = self._environ(run, job, flows, plan.interpreter, None)
                await self._warm.ready(plan.warmth, plan.interpreter, env)

    async def launch(self, run: FlowRun, job: Job, flows: Flows, plan: Plan, group: RunGroup | None = None) -> Launched:
        """Starts the run's process. Raises `JobError` with a sentence for the run's owner."""
        has_channel = plan.interpreter is None or plan.interpreter.has_control_channel
        session = self._channel.expect() if has_channel else None
        env = self._environ(run, job, flows, plan.interpreter, session)
        try:
            began = await self._output.prepare(run.id)
            directory = self._directory(run, job, flows)
            child = await self._start(plan, env, directory, self.output(run.id), group)
        except JobError:
            if session is not None:
                session.close()
            raise
        return Launched(child, session, plan.runs_own_hooks, plan.is_engine, output_from=began)

    async def _start(
        self, plan: Plan, env: Mapping[str, str], cwd: Path, output: Path, group: RunGroup | None
    ) -> Child | Forked:
        if plan.warmth is not None and plan.interpreter is not None:
            copy = await self._warm.start(plan.warmth, plan.interpreter, env=env, cwd=cwd, output=output, group=group)
            if copy is not None:
                return copy
        return await launch(plan.argv, env=env, cwd=cwd, output=output, group=group)

    async def run_hook(self, hook: Hook, run: FlowRun, job: Job, flows: Flows) -> bool:
        """Runs the flow's hooks of that kind in a process of their own. Returns False, having said why, when that failed."""
        try:
            interpreter = await self._interpreters.get(flows.python)
            directory = self._directory(run, job, flows)
        except (InterpreterError, JobError) as error:
            _log.warning("cannot run the %s hooks of flow run %s: %s", hook.value, run.id, error)
            return False
        return await run_hook(
            interpreter,
            hook,
            run_id=run.id,
            env=self._environ(run, job, flows, interpreter, None),
            cwd=directory,
            output=self.output(run.id),
            timeout=HOOK_SECONDS,
        )

    async def clean_up(self, run_id: str) -> None:
        """Removes the run's private directory and control group, if it had them."""
        if (group := self.group(run_id)) is not None:
            await trio.to_thread.run_sync(group.remove)
        await remove_directory(self._work_dir / run_id)

    async def _interpreter(self, flows: Flows, *, needed: bool) -> Interpreter | None:
        """The interpreter for flows. A job with a command of its own may do without one."""
        try:
            return await self._interpreters.get(flows.python)
        except InterpreterError:
            if needed:
                raise
            return None

    def _directory(self, run: FlowRun, job: Job, flows: Flows) -> Path:
        if job.working_dir is None and flows.working_dir is None:
            return private_directory(self._work_dir, run.id)
        directory = Path(job.working_dir) if job.working_dir is not None else flows.working_dir
        assert directory is not None
        if not directory.is_dir():
            raise JobError(
                f"cannot start in the working directory '{directory}': there is no such directory on this machine"
            )
        return directory

    def _environ(
        self, run: FlowRun, job: Job, flows: Flows, interpreter: Interpreter | None, session: Session | None
    ) -> dict[str, str]:
        own_hooks = interpreter is None or interpreter.runs_own_hooks
        extra = {
            STATE_MARK: str(self._state_dir),
            "PREFECT__FLOW_RUN_ID": run.id,
            "PREFECT__FLOW_ID": run.flow_id,
            "PREFECT__WORKER_NAME": self._worker,
            # Older engines do not tell afterwards whether they ran their hooks, so we run them (reference 2.4).
            "PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS": "true" if own_hooks else "false",
            **({"PREFECT__FLOW_NAME": job.flow_name} if job.flow_name else {}),
            **({"PREFECT__DEPLOYMENT_ID": job.deployment_id} if job.deployment_id else {}),
            **({"PREFECT__DEPLOYMENT_NAME": job.deployment_name} if job.deployment_name else {}),
            **(session.environ if session is not None else {}),
        }
        return flow_environ(
            run_id=run.id,
            api_url=self._api_url,
            secrets=self._secrets(),
            pass_env=flows.pass_env,
            flows_env=flows.env,
            job_env=job.env,
            extra=extra,
            environ=os.environ,
        )
