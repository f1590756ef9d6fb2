"""What the agent is told by signals: to stop, to cancel, to kill, to reload (docs/architecture.md, "Signals")."""

from __future__ import annotations

import signal
from collections.abc import Callable

import trio

from supervisor.runs.departure import Departure
from supervisor.runs.ladder import Ladder, Rung
from supervisor.systemd.manager import Manager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


class Signals:
    """Hears the signals and hands them on. Owns how far they have pushed the agent."""

    def __init__(self, manager: Manager, departure: Departure, reload: Callable[[], None]) -> None:
        self._manager = manager
        self._departure = departure
        self._reload = reload
        self._ladder = Ladder()

    @property
    def rung(self) -> Rung:
        return self._ladder.rung

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: hears them until cancelled, from the moment that it reports as started."""
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(*SIGNALS) as arriving:
                task_status.started()
                async for signum in arriving:
                    self._hear(signum, nursery)

    def _hear(self, signum: int, nursery: trio.Nursery) -> None:
        if signum == signal.SIGHUP:
            self._reload()
            return
        rung, name = self._ladder.push(signum, trio.current_time()), signal.Signals(signum).name
        if rung is Rung.DRAIN:
            nursery.start_soon(self._stop, name)
        elif rung is Rung.CANCEL:
            self._departure.cancel_all(name)
        elif rung is Rung.KILL:
            self._departure.kill_all(name)

    async def _stop(self, name: str) -> None:
        await self._departure.begin(await self._manager.intent(), name)
