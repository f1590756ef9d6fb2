"""WIRING: builds every room once, opens the nurseries, and shuts down in the order of their indentation."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from functools import partial

import trio

from supervisor import __version__, agentlog
from supervisor.backend.base import Backend
from supervisor.backend.http import HttpApi
from supervisor.backend.rest.client import RestBackend
from supervisor.config import Config, Work
from supervisor.config.secrets import credentials, flow_secrets
from supervisor.journal import Journal
from supervisor.lifecycle.record import Record
from supervisor.logs import OutputKeeper
from supervisor.model import FlowRun
from supervisor.process.adopt import marked_runs
from supervisor.process.cgroup import Cgroups
from supervisor.process.channel import ControlChannel
from supervisor.process.environ import inherited
from supervisor.process.interpreter import Interpreters
from supervisor.process.reaper import become_subreaper, reap_strangers
from supervisor.process.ref import boot_id
from supervisor.runs.canceller import Canceller
from supervisor.runs.departure import Departure, exit_status
from supervisor.runs.health import ServerHealth
from supervisor.runs.heartbeat import Heartbeat
from supervisor.runs.kit import Kit
from supervisor.runs.ladder import Ladder, Rung
from supervisor.runs.late import LateClaims
from supervisor.runs.launcher import Launcher
from supervisor.runs.patience import Patience
from supervisor.runs.poller import Poller, turn_seconds
from supervisor.runs.recovery import Recovery
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller
from supervisor.statedir import StateDirectory
from supervisor.systemd.journald import Journald
from supervisor.systemd.manager import Intent, Manager
from supervisor.systemd.notify import Notifier, clear_environment
from supervisor.systemd.watchdog import Watchdog

JOURNAL = "journal.sqlite3"
SWEEP_SECONDS = 3600.0  # how often old output is looked for
BEAT_SECONDS = 5.0  # how often the run loop shows that it is alive

_log = logging.getLogger("flow-agent")


def run(config: Config, *, run_once: bool = False, hide_welcome: bool = False) -> int:
    """Runs the agent until it is told to stop; returns its exit status.

    Raises `StateDirectoryHeld`, `InterpreterError` or `ConfigError` before anything has been started.
    """
    agentlog.configure(config.agent.log_level, config.agent.log_format, journal=Journald)
    return trio.run(partial(_agent, config, run_once=run_once, hide_welcome=hide_welcome))


@asynccontextmanager
async def connect(config: Config) -> AsyncIterator[Backend]:
    """A backend for the configured server. Opens no connection before the first call."""
    async with HttpApi.open(config.api, lambda: credentials(config.api, os.environ)) as api:
        yield RestBackend(api, inherited(os.environ, config.flows.pass_env))


async def _agent(config: Config, *, run_once: bool, hide_welcome: bool) -> int:
    notifier = Notifier.from_environ(os.environ)
    watchdog = Watchdog.from_environ(notifier, os.environ)
    manager = Manager.from_environ(os.environ)
    clear_environment()
    become_subreaper()
    cgroups = Cgroups.find(config.agent.cgroup)
    interpreters = Interpreters()
    with StateDirectory(config.agent.state_dir, name=config.agent.name) as state:
        await _check_interpreters(config, interpreters)
        with closing(Journal.open(state.path / JOURNAL)) as journal:
            async with connect(config) as backend:
                agent = _Agent(config, backend, state, journal, interpreters, notifier, watchdog, manager, cgroups)
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
        journal: Journal,
        interpreters: Interpreters,
        notifier: Notifier,
        watchdog: Watchdog,
        manager: Manager,
        cgroups: Cgroups | None,
    ) -> None:
        poll = config.poll
        self._config = config
        self._state = state
        self._journal = journal
        self._notifier = notifier
        self._watchdog = watchdog
        self._manager = manager
        self._ladder = Ladder()
        self._departure: Departure | None = None
        self._health = ServerHealth(config.api.url)
        self._channel = ControlChannel()
        self._output = OutputKeeper(config.agent.log_dir, config.output)
        patience = Patience(poll, self._health)
        teller = Teller(backend, patience, worker=config.agent.name, version=__version__)
        self._late = LateClaims(backend, patience)
        self._cgroups = cgroups
        launcher = Launcher(
            api_url=config.api.url,
            secrets=lambda: flow_secrets(config, os.environ),
            worker=config.agent.name,
            state_dir=state.path,
            work_dir=state.work,
            output=self._output,
            interpreters=interpreters,
            channel=self._channel,
            cgroups=cgroups,
        )
        kit = Kit(
            backend=backend,
            health=self._health,
            patience=patience,
            teller=teller,
            launcher=launcher,
            journal=journal,
            output=self._output,
            claimed_twice=self._late.claimed_twice,
        )

        def new_run(offer: FlowRun, source: Source) -> Run:
            record = Record.claiming(offer, str(source.work), boot_id(), datetime.now(UTC))
            return Run(record, source.work, kit)

        def earlier_run(record: Record, work: Work) -> Run:
            return Run(record, work, kit, recovered=True)

        self._roster = Roster(config.agent.limit, new_run, room=lambda: not journal.full)
        self._recovery = Recovery(self._roster, earlier_run, config.work, config.flows, kit)
        sources = [Source(work, backend) for work in config.work]
        self._pollers = [
            Poller(
                source,
                self._roster,
                self._health,
                watchdog.pulse(f"poll of {source}"),
                poll=poll,
                prefetch_seconds=config.agent.prefetch_seconds,
                turn_seconds=turn_seconds(source.work, config.api.timeout_seconds),
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
        doing = f"{self._departure.doing}: " if self._departure is not None and self._departure.doing else ""
        return f"{doing}{self._roster.describe()}, {self._health.describe()}"

    async def work(self, *, run_once: bool) -> int:
        """Everything the agent does between its start and its end. The indentation is the order of shutdown."""
        asked = True
        async with trio.open_nursery() as services:
            await services.start(self._channel.serve)
            for service in (self._watchdog.run, self._canceller.run, self._heartbeat.run, self._beat, self._late.run):
                services.start_soon(service)
            for keeper in (self._journal.run, self._keep_house, reap_strangers):
                services.start_soon(keeper)
            services.start_soon(self._notifier.run_status, self.describe)
            async with trio.open_nursery() as runs:
                self._roster.open(runs)
                self._go_on(runs)
                async with trio.open_nursery() as polls:
                    departure = Departure(
                        self._roster,
                        self._config.stop,
                        polls.cancel_scope,
                        runs.cancel_scope,
                        lambda: self._health.lost,
                    )
                    self._departure = departure
                    services.start_soon(departure.leave_debts)
                    await services.start(self._signals, departure, services)
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
        return exit_status(self._ladder.rung, asked)

    def _go_on(self, runs: trio.Nursery) -> None:
        """With what an earlier agent has left, before anything new is asked for."""
        records = self._journal.open_records()
        self._recovery.take(records)
        marked = marked_runs(self._state.path)
        known = {record.run.id for record in records}
        # With a sound journal everything that bears our mark is in it.
        if lost := {run_id: ref for run_id, ref in marked.items() if run_id not in known}:
            runs.start_soon(self._recovery.take_marked, lost)
        open_runs = known | marked.keys()
        self._state.sweep(keep=open_runs)
        if self._cgroups is not None:
            runs.start_soon(self._recovery.clear_groups, set(self._cgroups.runs()) - open_runs)

    async def _keep_house(self) -> None:
        while True:
            await self._output.sweep({run_.id for run_ in self._roster.all()})
            await trio.sleep(SWEEP_SECONDS)

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
        departure: Departure,
        services: trio.Nursery,
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
                rung, name = self._ladder.push(signum, trio.current_time()), signal.Signals(signum).name
                if rung is Rung.DRAIN:
                    services.start_soon(self._depart, departure, name)
                elif rung is Rung.CANCEL:
                    departure.cancel_all(name)
                elif rung is Rung.KILL:
                    departure.kill_all(name)

    async def _depart(self, departure: Departure, name: str) -> None:
        """The first signal to stop: what it means depends on what systemd is about to do with us."""
        stop = self._config.stop
        match await self._manager.intent():
            case Intent.SHUTDOWN:
                await departure.shut_down(name)
            case Intent.RESTART:
                await departure.act(stop.on_restart, name)
            case Intent.STOP:
                await departure.act(stop.on_stop, name)
