"""WIRING: builds every room once, opens the nurseries, and shuts down in the order of their indentation."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import trio

from supervisor import __version__, agentlog
from supervisor.backend.base import Backend
from supervisor.backend.http import HttpApi
from supervisor.backend.rest.client import RestBackend
from supervisor.config import Config, Work
from supervisor.config.secrets import credentials
from supervisor.lifecycle import StopReason
from supervisor.model import FlowRun
from supervisor.process.channel import ControlChannel
from supervisor.process.environ import inherited
from supervisor.process.interpreter import Interpreters
from supervisor.runs.canceller import Canceller
from supervisor.runs.health import ServerHealth
from supervisor.runs.heartbeat import Heartbeat
from supervisor.runs.kit import Kit
from supervisor.runs.ladder import Ladder, Rung
from supervisor.runs.launcher import Launcher
from supervisor.runs.patience import Patience
from supervisor.runs.poller import Poller
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller
from supervisor.statedir import StateDirectory
from supervisor.systemd.notify import Notifier, clear_environment
from supervisor.systemd.watchdog import Watchdog

KILL_SECONDS = 5.0  # the longest that reports may delay the end of an agent that was told to kill and go
BEAT_SECONDS = 5.0  # how often the run loop shows that it is alive

_log = logging.getLogger("flow-agent")


def run(config: Config, *, run_once: bool = False, hide_welcome: bool = False) -> int:
    """Runs the agent until it is told to stop; returns its exit status.

    Raises `StateDirectoryHeld`, `InterpreterError` or `ConfigError` before anything has been started.
    """
    agentlog.configure(config.agent.log_level)
    return trio.run(partial(_agent, config, run_once=run_once, hide_welcome=hide_welcome))


@asynccontextmanager
async def connect(config: Config) -> AsyncIterator[Backend]:
    """A backend for the configured server. Opens no connection before the first call."""
    async with HttpApi.open(config.api, lambda: credentials(config.api, os.environ)) as api:
        yield RestBackend(api, inherited(os.environ, config.flows.pass_env))


async def _agent(config: Config, *, run_once: bool, hide_welcome: bool) -> int:
    notifier = Notifier.from_environ(os.environ)
    watchdog = Watchdog.from_environ(notifier, os.environ)
    clear_environment()
    interpreters = Interpreters()
    with StateDirectory(config.agent.state_dir, name=config.agent.name) as state:
        await _check_interpreters(config, interpreters)
        async with connect(config) as backend:
            agent = _Agent(config, backend, state, interpreters, notifier, watchdog)
            if not hide_welcome:
                agent.welcome()
            return await agent.work(run_once=run_once)


async def _check_interpreters(config: Config, interpreters: Interpreters) -> None:
    """Raises `InterpreterError` now rather than failing every run later."""
    for flows in {work.flows.python: work.flows for work in config.work if work.flows.command is None}.values():
        found = await interpreters.get(flows.python)
        _log.debug("%s has Prefect %s", found.python, found.prefect_version)


class _Agent:
    """The rooms of one running agent. Owns how far the signals have pushed it."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        state: StateDirectory,
        interpreters: Interpreters,
        notifier: Notifier,
        watchdog: Watchdog,
    ) -> None:
        poll = config.poll
        self._config = config
        self._notifier = notifier
        self._watchdog = watchdog
        self._ladder = Ladder()
        self._health = ServerHealth(config.api.url)
        self._channel = ControlChannel()
        patience = Patience(poll, self._health)
        teller = Teller(backend, patience, worker=config.agent.name, version=__version__)
        launcher = Launcher(
            api_url=config.api.url,
            secrets=lambda: flow_secrets(config, os.environ),
            worker=config.agent.name,
            work_dir=state.work,
            log_dir=config.agent.log_dir,
            interpreters=interpreters,
            channel=self._channel,
        )
        kit = Kit(backend=backend, health=self._health, patience=patience, teller=teller, launcher=launcher)

        def new_run(offer: FlowRun, source: Source) -> Run:
            return Run(offer, source, kit)

        self._roster = Roster(config.agent.limit, new_run)
        sources = [Source(work, backend) for work in config.work]
        self._pollers = [
            Poller(
                source,
                self._roster,
                self._health,
                watchdog.pulse(f"poll of {source}"),
                poll=poll,
                prefetch_seconds=config.agent.prefetch_seconds,
                turn_seconds=_turn_seconds(source.work, config.api.timeout_seconds),
            )
            for source in sources
        ]
        self._canceller = Canceller(
            backend,
            self._roster,
            self._health,
            watchdog.pulse("poll for cancellations"),
            poll=poll,
            turn_seconds=config.api.timeout_seconds * 2 * (1 + len(sources)),
        )
        self._heartbeat = Heartbeat(backend, sources, teller, self._health, worker=config.agent.name, poll=poll)

    def welcome(self) -> None:
        """Says who started and where it looks for work."""
        name, url = self._config.agent.name, self._config.api.url
        _log.info("flow-agent %s '%s' connected to %s", __version__, name, url)
        for work in self._config.work:
            _log.info("looking for work from %s", work)

    def describe(self) -> str:
        """The status line."""
        doing = {Rung.WORK: "", Rung.DRAIN: "draining: ", Rung.CANCEL: "cancelling: ", Rung.KILL: "killing: "}
        return f"{doing[self._ladder.rung]}{self._roster.describe()}, {self._health.describe()}"

    async def work(self, *, run_once: bool) -> int:
        """Everything the agent does between its start and its end. The indentation is the order of shutdown."""
        asked = True
        async with trio.open_nursery() as services:
            await services.start(self._channel.serve)
            for service in (self._watchdog.run, self._canceller.run, self._heartbeat.run, self._beat):
                services.start_soon(service)
            services.start_soon(self._notifier.run_status, self.describe)
            async with trio.open_nursery() as runs:
                self._roster.open(runs)
                async with trio.open_nursery() as polls:
                    await services.start(self._signals, polls.cancel_scope, runs.cancel_scope)
                    self._notifier.ready(self.describe())
                    if run_once:
                        asked = all([await poller.poll_once() for poller in self._pollers])
                    else:
                        for poller in self._pollers:
                            polls.start_soon(poller.run)
                # No new runs from here on.
                self._watchdog.dismiss("poll of ")
                self._notifier.stopping(self.describe())
            # No live runs from here on.
            await self._heartbeat.sign_off()
            services.cancel_scope.cancel()
        self._say_goodbye()
        return 1 if self._ladder.rung is Rung.KILL or not asked else 0

    def _say_goodbye(self) -> None:
        counts = ", ".join(f"{count} {outcome.value}" for outcome, count in sorted(self._roster.closed.items()))
        _log.info("stopped%s", f"; runs: {counts}" if counts else "")

    async def _beat(self) -> None:
        """The run loop's sign of life: a run that blocks the event loop silences it, an idle one does not."""
        pulse = self._watchdog.pulse("run loop")
        while True:
            pulse.expect(BEAT_SECONDS * 3)
            await trio.sleep(BEAT_SECONDS)

    # --- signals -----------------------------------------------------------------------------------------------------

    async def _signals(
        self,
        polls: trio.CancelScope,
        runs: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
        with trio.open_signal_receiver(*signals) as arriving:
            task_status.started()
            async for signum in arriving:
                if signum == signal.SIGHUP:
                    _log.warning("SIGHUP: this version cannot reload its configuration; restart it instead")
                    continue
                rung = self._ladder.push(signum, trio.current_time())
                if rung is not None:
                    self._climb(rung, signal.Signals(signum).name, polls, runs)

    def _climb(self, rung: Rung, name: str, polls: trio.CancelScope, runs: trio.CancelScope) -> None:
        live = len(self._roster)
        polls.cancel()
        if rung is Rung.DRAIN:
            wait = f"; waiting for {live} live run(s), signal again to cancel them" if live else ""
            _log.info("%s: taking no new runs%s", name, wait)
        elif rung is Rung.CANCEL:
            _log.warning("%s: cancelling %d live run(s), signal again to kill them", name, live)
            for run_ in self._roster.all():
                run_.ask_to_stop(StopReason.OPERATOR, f"Cancelled by flow-agent: it was told to stop ({name}).")
        else:
            _log.error("%s: killing %d live run(s)", name, live)
            for run_ in self._roster.all():
                run_.ask_to_stop(StopReason.OPERATOR, f"Killed by flow-agent: it was told to go ({name}).", hurry=True)
            runs.deadline = trio.current_time() + KILL_SECONDS


def _turn_seconds(work: Work, timeout: float) -> float:
    """The longest one poll may honestly take: every request of it at its deadline, and some for the machine."""
    queues = max(len(work.queues), 20 if work.match else 0, len(work.deployments))
    return timeout * (4 + 3 * queues) + 10.0


def flow_secrets(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """What a flow needs to speak to the same server as we do, as Prefect's own settings."""
    api = config.api
    found = credentials(api, environ)
    settings: dict[str, str] = {}
    if found.auth_string is not None:
        settings["PREFECT_API_AUTH_STRING"] = found.auth_string
    elif found.api_key is not None:
        settings["PREFECT_API_KEY"] = found.api_key
    if api.ca_file is not None:
        settings["PREFECT_API_SSL_CERT_FILE"] = str(api.ca_file)
    if not api.verify:
        settings["PREFECT_API_TLS_INSECURE_SKIP_VERIFY"] = "true"
    if api.headers:
        settings["PREFECT_CLIENT_CUSTOM_HEADERS"] = json.dumps(dict(api.headers))
    return settings
