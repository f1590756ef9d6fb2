"""Another configuration for an agent that runs: read, checked as a start would check it, and taken as far as it can be."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from supervisor.config import Config, Credentials
from supervisor.config.reload import Change, compare
from supervisor.config.secrets import credentials
from supervisor.errors import ConfigError, InterpreterError
from supervisor.process.interpreter import Interpreters
from supervisor.systemd.notify import Notifier

SETTLE_SECONDS = 0.1  # a one-file binary is handed the same signal twice; signals within it are one reload
READ_SECONDS = 30.0  # the longest that reading may take: files may be on a disk that hangs

_log = logging.getLogger("flow-agent")

Apply = Callable[[Config, Credentials | None], None]


class Reload:
    """Owner of the configuration in force, and of what the last attempt to change it has come to.

    `read` reads the configuration as it was read at the start: from the same file, with the same flags and variables.
    """

    def __init__(
        self, config: Config, read: Callable[[], Config], interpreters: Interpreters, notifier: Notifier
    ) -> None:
        self.config = config
        self._read = read
        self._interpreters = interpreters
        self._notifier = notifier
        self._asked = trio.Event()
        self._is_over = False
        self._thread = trio.CapacityLimiter(1)  # a read that hangs shall not be joined by more of them
        self._outcome = ""

    def ask(self) -> None:
        """Has the configuration read again soon; asked while that is under way, once more afterwards."""
        if self._is_over:
            _log.warning("cannot reload the configuration: this agent takes no new runs any more")
        else:
            self._asked.set()

    def describe(self) -> str:
        """For the status line: what the last reload has left to do; empty when nothing."""
        return self._outcome

    async def run(self, apply: Apply, describe: Callable[[], str]) -> None:
        """Reloads when asked, until cancelled. `apply` hands a new configuration to those who need it.

        With it go the secrets to use from now on, or None where they stay as they were.
        """
        try:
            while True:
                await self._asked.wait()
                self._notifier.reloading()
                await trio.sleep(SETTLE_SECONDS)
                self._asked = trio.Event()
                await self._reload(apply)
                self._notifier.ready(describe())
        finally:
            self._is_over = True

    async def _reload(self, apply: Apply) -> None:
        try:
            found, secrets = await self._look()
            await check_interpreters(found, self._interpreters)
        except (ConfigError, InterpreterError) as error:
            self._refuse(str(error).splitlines())
            return
        except Exception:  # noqa: BLE001 - a bug in the reading of a file may cost the reload, never the runs
            _log.exception("internal error while the configuration was read")
            self._refuse(["internal error; see the log"])
            return
        change = compare(self.config, found)
        self.config = change.config
        # What the files say now may be for the server that a restart will bring.
        apply(change.config, None if "api.url" in change.needs_restart else secrets)
        self._say(change)

    async def _look(self) -> tuple[Config, Credentials]:
        def look() -> tuple[Config, Credentials]:
            found = self._read()
            return found, credentials(found.api, os.environ)

        with trio.move_on_after(READ_SECONDS):
            return await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=self._thread)
        raise ConfigError(f"{self.config.path or 'configuration'}: cannot read it within {READ_SECONDS:g} s")

    def _refuse(self, sentences: list[str]) -> None:
        for sentence in sentences:
            _log.error("cannot reload: %s", sentence)
        _log.warning("going on with the configuration as it was")
        more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
        self._outcome = f"reload refused: {self._short(sentences[0])}{more}"

    def _short(self, sentence: str) -> str:
        """With the file's name in place of its path."""
        path = self.config.path
        return sentence if path is None else sentence.replace(str(path), path.name, 1)

    def _say(self, change: Change) -> None:
        what = self.config.path or "the configuration"
        _log.info("reloaded %s: %s", what, "; ".join(change.taken) or "nothing has changed")
        self._outcome = ""
        if change.needs_restart:
            keys = ", ".join(change.needs_restart)
            _log.warning("reloaded; these need a restart, and stay as they were: %s", keys)
            self._outcome = f"a restart is needed for {keys}"


async def check_interpreters(config: Config, interpreters: Interpreters) -> None:
    """Raises `InterpreterError`, a line for each, where runs could not be started."""
    mistakes: list[str] = []
    for python in dict.fromkeys(work.flows.python for work in config.work if work.flows.command is None):
        try:
            found = await interpreters.get(python)
            _log.debug("%s has Prefect %s", found.python, found.prefect_version)
        except InterpreterError as error:
            mistakes.append(str(error))
    if mistakes:
        raise InterpreterError("\n".join(mistakes))
