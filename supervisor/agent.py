"""The rooms of one running agent: who is handed what, when each begins, in which order they end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime

import trio

from supervisor import __version__
from supervisor.backend.http import HttpApi
from supervisor.backend.rest.client import RestBackend
from supervisor.config import Config, Credentials, Work
from supervisor.config.secrets import flow_secrets
from supervisor.journal import Journal
from supervisor.lifecycle.record import Record
from supervisor.logs import OutputKeeper
from supervisor.model import FlowRun
from supervisor.process.adopt import marked_runs
from supervisor.process.cgroup import Cgroups
from supervisor.process.channel import ControlChannel
from supervisor.process.environ import inherited
from supervisor.process.interpreter import Interpreters
from supervisor.process.reaper import reap_strangers
from supervisor.process.ref import boot_id
from supervisor.process.warm import WarmStarts, Warmth
from supervisor.runs.canceller import Canceller
from supervisor.runs.clock import ServerClock
from supervisor.runs.departure import Departure, exit_status
from supervisor.runs.health import ServerHealth
from supervisor.runs.heartbeat import Heartbeat
from supervisor.runs.kit import Kit
from supervisor.runs.late import LateClaims
from supervisor.runs.launcher import Launcher
from supervisor.runs.lead import Leads
from supervisor.runs.listener import Listener
from supervisor.runs.patience import Patience
from supervisor.runs.poller import Poller, turn_seconds
from supervisor.runs.pollers import Pollers
from supervisor.runs.recovery import Recovery
from supervisor.runs.reload import Reload
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run
from supervisor.runs.signals import Signals
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller
from supervisor.runs.timetable import Timetable
from supervisor.statedir import StateDirectory
from supervisor.systemd import stacks
from supervisor.systemd.manager import Manager
from supervisor.systemd.notify import Notifier
from supervisor.systemd.watchdog import Watchdog

SWEEP_SECONDS = 3600.0  # how often old output is looked for
BEAT_SECONDS = 5.0  # how often the run loop shows that it is alive

_log = logging.getLogger("flow-agent")


class Agent:
    """The rooms of one running agent, and who is told when the configuration changes."""

    def __init__(
        self,
        reload: Reload,
        http: HttpApi,
        backend: RestBackend,
        state: StateDirectory,
        journal: Journal,
        interpreters: Interpreters,
        notifier: Notifier,
        watchdog: Watchdog,
        manager: Manager,
        cgroups: Cgroups | None,
        configure_log: Callable[[Config], None],
    ) -> None:
        config, poll = reload.config, reload.config.poll
        self._reload = reload
        self._configure_log = configure_log
        self._http = http
        self._backend = backend
        self._state = state
        self._journal = journal
        self._notifier = notifier
        self._watchdog = watchdog
        self._manager = manager
        self._departure: Departure | None = None
        self._health = ServerHealth(config.api.url)
        self._channel = ControlChannel()
        self._output = OutputKeeper(config.agent.log_dir, config.output)
        self._patience = patience = Patience(poll, self._health)
        teller = Teller(backend, patience, worker=config.agent.name, version=__version__)
        self._late = LateClaims(backend, patience)
        self._cgroups = cgroups
        self._warm = WarmStarts(interpreters)
        self._launcher = launcher = Launcher(
            api_url=config.api.url,
            secrets=lambda: flow_secrets(reload.config, os.environ),
            worker=config.agent.name,
            state_dir=state.path,
            work_dir=state.work,
            output=self._output,
            interpreters=interpreters,
            channel=self._channel,
            cgroups=cgroups,
            warm=self._warm,
        )
        self._warm.use(self._warmths(config))
        clock, leads = ServerClock(roughly=lambda: http.said), Leads(interpreters.major)
        kit = Kit(
            backend=backend,
            health=self._health,
            patience=patience,
            teller=teller,
            launcher=launcher,
            journal=journal,
            output=self._output,
            clock=clock,
            leads=leads,
            claimed_twice=self._late.claimed_twice,
        )

        def new_run(offer: FlowRun, source: Source) -> Run:
            record = Record.claiming(offer, str(source.work), boot_id(), datetime.now(UTC))
            return Run(record, source.work, kit)

        def earlier_run(record: Record, work: Work) -> Run:
            return Run(record, work, kit, recovered=True)

        self._roster = Roster(config.agent.limit, new_run, room=lambda: not journal.full)
        self._timetable = Timetable(self._roster.admit, clock)
        self._recovery = Recovery(self._roster, earlier_run, config.work, config.flows, kit)

        def new_poller(work: Work) -> Poller:
            return Poller(
                Source(work, backend),
                self._roster,
                self._timetable,
                leads,
                self._health,
                watchdog.pulse(f"poll of {work}"),
                poll=reload.config.poll,
                prefetch_seconds=reload.config.agent.prefetch_seconds,
                turn_seconds=turn_seconds(work, config.api.timeout_seconds),
            )

        self._pollers = Pollers(config.work, new_poller)
        self._canceller = Canceller(
            backend,
            self._roster,
            self._health,
            watchdog.pulse("poll for cancellations"),
            poll=poll,
            turn_seconds=self._cancel_turn(config),
        )
        self._listener = Listener(backend, self._roster, self._pollers, self._canceller, poll=poll)
        sources = self._pollers.sources
        self._heartbeat = Heartbeat(backend, sources, teller, self._health, worker=config.agent.name, poll=poll)

    def welcome(self) -> None:
        """Says who started and where it looks for work."""
        config = self._reload.config
        _log.info("flow-agent %s '%s' works for %s", __version__, config.agent.name, config.api.url)
        for work in config.work:
            _log.info("looking for work from %s", work)

    @staticmethod
    def _cancel_turn(config: Config) -> float:
        return config.api.timeout_seconds * 2 * (1 + len(config.work))

    def _warmths(self, config: Config) -> list[Warmth]:
        found = (self._launcher.warmth(work.flows) for work in config.work)
        return [warmth for warmth in found if warmth is not None]

    def describe(self) -> str:
        """The status line."""
        doing = self._departure.describe() if self._departure is not None else ""
        left = f"; {self._reload.describe()}" if self._reload.describe() else ""
        heard = f"{self._health.describe()}{self._listener.describe()}"
        return f"{doing or self._roster.describe()}{self._timetable.describe()}, {heard}{left}"

    def use(self, config: Config, secrets: Credentials | None) -> None:
        """Hands another configuration to everybody whom it concerns. Runs that are live keep what they began with."""
        poll = config.poll
        self._configure_log(config)
        if secrets is not None:
            self._http.renew(secrets)
        self._backend.use(inherited(os.environ, config.flows.pass_env))
        self._roster.use(config.agent.limit)
        self._patience.use(poll)
        self._pollers.use(config.work, poll, config.agent.prefetch_seconds)
        self._canceller.use(poll, self._cancel_turn(config))
        self._listener.use(poll)
        self._heartbeat.use(self._pollers.sources, poll)
        self._output.use(config.output)
        self._warm.use(self._warmths(config))
        if self._departure is not None:
            self._departure.use(config.stop)

    async def work(self, *, run_once: bool) -> int:
        """Everything the agent does between its start and its end. The indentation is the order of shutdown."""
        asked = True
        async with trio.open_nursery() as services:
            await services.start(self._channel.serve)
            await services.start(self._warm.run)
            for service in (self._watchdog.run, self._canceller.run, self._heartbeat.run, self._beat, self._late.run):
                services.start_soon(service)
            for keeper in (self._journal.run, self._keep_house, reap_strangers, stacks.on_request):
                services.start_soon(keeper)
            services.start_soon(self._notifier.run_status, self.describe)
            async with trio.open_nursery() as runs:
                self._roster.open(runs)
                self._recover(runs)
                async with trio.open_nursery() as polls:
                    departure = Departure(
                        self._roster,
                        self._reload.config.stop,
                        polls.cancel_scope,
                        runs.cancel_scope,
                        lambda: self._health.lost,
                        self._manager.intent,
                    )
                    self._departure = departure
                    services.start_soon(departure.leave_debts)
                    services.start_soon(self._watchdog.ask_for_time, departure.in_time, departure.going)
                    signals = Signals(self._manager, departure, self._reload.ask)
                    await services.start(signals.run)
                    self._notifier.ready(self.describe())
                    polls.start_soon(self._reload.run, self.use, self.describe)
                    if run_once:
                        asked = await self._pollers.poll_once()
                        polls.cancel_scope.cancel()
                    else:
                        services.start_soon(self._listener.run)
                        polls.start_soon(self._timetable.run)
                        await self._pollers.run()
                # No new runs from here on.
                self._watchdog.dismiss("poll of ")
                self._notifier.stopping(self.describe())
            # No live runs from here on.
            await self._heartbeat.sign_off()
            services.cancel_scope.cancel()
        self._say_goodbye()
        return exit_status(signals.rung, asked)

    def _recover(self, runs: trio.Nursery) -> None:
        """Goes on with what an earlier agent has left, before anything new is asked for."""
        groups = () if self._cgroups is None else self._cgroups.runs()
        marked = marked_runs(self._state.path)
        self._state.sweep(keep=self._recovery.begin(runs, self._journal.open_records(), marked, groups))

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
