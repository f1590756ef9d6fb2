"""The service manager's watchdog: it hears from us only while our own loops make progress.

Progress is not success. A loop whose every request fails still comes back to say so, and an agent whose server is away
must not be restarted for it; a loop that hangs in a call that never ends is what the watchdog is for.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import trio

from supervisor.systemd import stacks
from supervisor.systemd.notify import Notifier

MORE_SECONDS = (
    60.0  # what is asked for at once while we start or stop: an agent that hangs then is killed after as long
)
MORE_EVERY = 15.0  # how often: one message that is lost, or late, costs nothing
SUSPICIOUS = 2 / 3  # of the manager's limit without a turn of the event loop, and it is said where it stands still

_log = logging.getLogger("flow-agent")


class Pulse:
    """One loop's promise of when it will be back. Owns that time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._deadline: float | None = None

    def expect(self, within: float | None) -> None:
        """I will be back within that many seconds; None: I am idle and cannot be late."""
        self._deadline = None if within is None else trio.current_time() + within

    @property
    def late(self) -> bool:
        return self._deadline is not None and trio.current_time() > self._deadline


class Watchdog:
    """Tells the manager that we live, at half of the time it allows, while no pulse is late.

    `seconds` is the manager's limit; None where it keeps no watch. Owns the list of pulses.
    """

    def __init__(self, notifier: Notifier, seconds: float | None) -> None:
        self.seconds = seconds
        self._notifier = notifier
        self._pulses: list[Pulse] = []

    @classmethod
    def from_environ(cls, notifier: Notifier, environ: Mapping[str, str]) -> Watchdog:
        """As the manager that started this process asked for it.

        WATCHDOG_PID may be our parent: a one-file binary runs its Python as a child of the process that was started.
        """
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        meant = not pid or pid in {str(os.getpid()), str(os.getppid())}
        watched = meant and usec.isascii() and usec.isdigit() and int(usec) > 0
        return cls(notifier, int(usec) / 1e6 if watched else None)

    def pulse(self, name: str) -> Pulse:
        """A new loop to watch; it is idle until it promises something."""
        self._pulses.append(Pulse(name))
        return self._pulses[-1]

    def dismiss(self, prefix: str) -> None:
        """Stops watching the loops whose names start so, because they have been ended on purpose."""
        self._pulses = [pulse for pulse in self._pulses if not pulse.name.startswith(prefix)]

    def late(self) -> list[str]:
        """The names of the loops that have not come back when they said they would."""
        return [pulse.name for pulse in self._pulses if pulse.late]

    async def run(self) -> None:
        """Pings for ever. While a loop is late it looks more often, to be in time when the loop comes back."""
        if self.seconds is None:
            return
        said: list[str] = []
        with stacks.Sentry(self.seconds * SUSPICIOUS) as sentry:
            while True:
                sentry.turned()
                late = self.late()
                self._say(late, said)
                said = late
                if not late:
                    self._notifier.watchdog()
                await trio.sleep(self.seconds / (10 if late else 2))

    def _say(self, late: list[str], said: list[str]) -> None:
        if late and late != said:
            _log.error(
                "no progress in: %s. The service manager's watchdog is not fed until that changes", ", ".join(late)
            )
        elif said and not late:
            _log.warning("progress again in: %s", ", ".join(said))
        root = trio.lowlevel.current_root_task()
        if late and not said and root is not None:
            _log.error("where every task stands\n%s", stacks.describe(root, threading.get_ident()))

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around that part of the start which may take long by rights. What follows it has as much time once more."""
        asking = trio.CancelScope()

        async def ask() -> None:
            with asking:
                await self.ask_for_time(lambda: True)

        trio.lowlevel.spawn_system_task(ask)  # a nursery would wrap what is raised here in a group
        try:
            yield
        finally:
            asking.cancel()
        self._notifier.extend(MORE_SECONDS)

    async def ask_for_time(self, wanted: Callable[[], bool], since: trio.Event | None = None) -> None:
        """Service: while `wanted`, asks the manager for more time than the unit gives for a start or a stop.

        In small steps and only while no loop is late: so a long drain is not cut off, and one that hangs is ended soon. The
        first step is as soon as `since` is set, for what the unit gives may be less than one step.
        """
        if since is not None:
            await since.wait()
        while True:
            if wanted() and not self.late():
                self._notifier.extend(MORE_SECONDS)
            await trio.sleep(MORE_EVERY)
