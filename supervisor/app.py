"""WIRING: what an agent needs to begin with is found, locked and opened here, and closed again when it has ended."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial

import trio

from supervisor import agentlog, frozen
from supervisor.agent import Agent
from supervisor.backend.http import HttpApi
from supervisor.backend.rest.client import RestBackend
from supervisor.config import Config
from supervisor.config.secrets import credentials
from supervisor.journal import Journal
from supervisor.process.cgroup import Cgroups
from supervisor.process.environ import inherited
from supervisor.process.interpreter import Interpreters
from supervisor.process.reaper import become_subreaper
from supervisor.runs.reload import Reload, check_interpreters
from supervisor.statedir import StateDirectory
from supervisor.systemd.journald import Journald
from supervisor.systemd.manager import Manager
from supervisor.systemd.notify import Notifier, clear_environment
from supervisor.systemd.watchdog import Watchdog

JOURNAL = "journal.sqlite3"


def run(config: Config, reread: Callable[[], Config], *, run_once: bool = False, hide_welcome: bool = False) -> int:
    """Runs the agent until it is told to stop; returns its exit status.

    `reread` reads the configuration again, as `config` was read, when the agent is told to reload. Raises
    `StateDirectoryHeld`, `InterpreterError` or `ConfigError` before anything has been started.
    """
    faulthandler.enable()  # what the watchdog's SIGABRT finds, even where nothing of ours can say it any more
    _configure_log(config)
    frozen.guard()
    return trio.run(partial(_agent, config, reread, run_once=run_once, hide_welcome=hide_welcome))


def _configure_log(config: Config) -> None:
    agentlog.configure(config.agent.log_level, config.agent.log_format, journal=Journald)


@asynccontextmanager
async def connect(current: Callable[[], Config]) -> AsyncIterator[tuple[HttpApi, RestBackend]]:
    """The way to the server of the configuration in force. Opens no connection before the first call."""
    api, flows = current().api, current().flows
    async with HttpApi.open(api, lambda: credentials(current().api, os.environ)) as http:
        yield http, RestBackend(http, inherited(os.environ, flows.pass_env))


async def _agent(config: Config, reread: Callable[[], Config], *, run_once: bool, hide_welcome: bool) -> int:
    notifier = Notifier.from_environ(os.environ)
    watchdog = Watchdog.from_environ(notifier, os.environ)
    manager = Manager.from_environ(os.environ)
    clear_environment()
    become_subreaper()
    cgroups = Cgroups.find(config.agent.cgroup)
    interpreters = Interpreters()
    # With questions of its own: one that hangs must not keep runs from being started meanwhile.
    reload = Reload(config, reread, Interpreters(), notifier)
    with StateDirectory(config.agent.state_dir, name=config.agent.name) as state:
        with watchdog.starting():
            await check_interpreters(config, interpreters)
        with closing(Journal.open(state.path / JOURNAL)) as journal:
            async with connect(lambda: reload.config) as (http, backend):
                agent = Agent(
                    reload,
                    http,
                    backend,
                    state,
                    journal,
                    interpreters,
                    notifier,
                    watchdog,
                    manager,
                    cgroups,
                    _configure_log,
                )
                if not hide_welcome:
                    agent.welcome()
                return await agent.work(run_once=run_once)
