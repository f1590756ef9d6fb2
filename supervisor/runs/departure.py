"""How the agent goes: what becomes of its live runs when it is told to stop (docs/architecture.md, "Signals")."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from supervisor.config import Stop
from supervisor.lifecycle import Claiming, Exited, Starting, StopReason
from supervisor.runs.ladder import Rung
from supervisor.runs.roster import Roster

KILL_SECONDS = 5.0  # the longest that reports may delay the end of an agent that was told to kill and go
LEAVE_SECONDS = 10.0  # how long runs that are between two states of rest may take to reach one before we leave them
OWING_SECONDS = (
    10.0  # how long a stopping agent waits for a server that does not answer; the reports are in the journal
)
LOOK_SECONDS = 0.1

_log = logging.getLogger("flow-agent")


class Departure:
    """Carries a stop out, step by step. Owns what it has come to."""

    def __init__(
        self,
        roster: Roster,
        stop: Stop,
        polls: trio.CancelScope,
        runs: trio.CancelScope,
        server_lost: Callable[[], bool],
    ) -> None:
        self._roster = roster
        self._server_lost = server_lost
        self._stop = stop
        self._polls = polls
        self._runs = runs
        self._drain = trio.CancelScope()
        self.going = trio.Event()
        self.doing = ""  # for the status line

    # --- the steps ---------------------------------------------------------------------------------------------------

    async def act(self, action: str, name: str) -> None:
        """Does what `[stop]` says of a stop: drain, cancel, keep or reschedule. Returns when it needs nothing more."""
        self._take_no_more()
        live = len(self._roster)
        if action == "drain":
            wait = f"; waiting for {live} live run(s), signal again to cancel them" if live else ""
            _log.info("%s: taking no new runs%s", name, wait)
            if await self._wait_drained(self._stop.drain_timeout_seconds, "draining"):
                return
            _log.warning("the drain took longer than %g s", self._stop.drain_timeout_seconds)
            action = self._stop.then
        if action == "cancel":
            self.cancel_all(name)
        elif action == "reschedule":
            self._reschedule(name)
        else:
            await self._keep(name)

    async def shut_down(self, name: str) -> None:
        """The machine is going down: nothing of a run survives that."""
        self._take_no_more()
        action = self._stop.on_stop if self._stop.on_stop in ("cancel", "reschedule") else self._stop.then
        if self._stop.on_stop in ("drain", "keep"):
            seconds = self._stop.shutdown_timeout_seconds
            _log.info("%s: the machine is going down; %d live run(s) have %g s", name, len(self._roster), seconds)
            if await self._wait_drained(seconds, "machine going down"):
                return
        if action == "reschedule":
            self._reschedule(name)
        elif self._stop.on_stop == "cancel":
            self.cancel_all(name)
        else:
            self._ask_all(StopReason.SHUTDOWN, "The machine went down while it ran.", "ending")

    def cancel_all(self, name: str) -> None:
        """Cancels the live runs, with their grace."""
        self._take_no_more()
        _log.warning("%s: cancelling %d live run(s), signal again to kill them", name, len(self._roster))
        self._ask_all(StopReason.OPERATOR, f"Cancelled by flow-agent: it was told to stop ({name}).", "cancelling")

    def kill_all(self, name: str) -> None:
        """Kills them and goes, whatever the server says."""
        self._take_no_more()
        _log.error("%s: killing %d live run(s)", name, len(self._roster))
        why = f"Killed by flow-agent: it was told to go ({name})."
        self._ask_all(StopReason.OPERATOR, why, "killing", hurry=True)
        self._runs.deadline = trio.current_time() + KILL_SECONDS

    def _reschedule(self, name: str) -> None:
        _log.warning("%s: handing %d live run(s) back to the server", name, len(self._roster))
        why = f"Handed back by flow-agent: it was told to stop ({name})."
        self._ask_all(StopReason.RESCHEDULE, why, "handing back")

    async def _keep(self, name: str) -> None:
        _log.info("%s: leaving %d live run(s) to the next flow-agent", name, len(self._roster))
        self.doing = "leaving"
        # Whoever is between two deeds could be left, too: the journal knows. But it is better manners to finish them.
        await self._wait(lambda: not any(self._between()), LEAVE_SECONDS)
        self._runs.cancel()

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def _wait_drained(self, seconds: float, doing: str) -> bool:
        """Whether all have ended within that time, or a later step has taken over."""
        self.doing = doing
        with self._drain:
            return await self._wait(lambda: len(self._roster) == 0, seconds)
        return True

    async def leave_debts(self) -> None:
        """Service: a stopping agent does not wait for ever to say what the next one can say as well."""
        await self.going.wait()
        since = trio.current_time()
        while True:
            await trio.sleep(LOOK_SECONDS)
            runs = self._roster.all()
            owing = runs and self._server_lost() and all(self._between())
            if not owing:
                since = trio.current_time()
            elif trio.current_time() - since > OWING_SECONDS:
                _log.warning("leaving %d run(s) to the next flow-agent: the server does not answer", len(runs))
                self._runs.cancel()
                return

    async def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        deadline = trio.current_time() + seconds
        # What is waited for changes in many places, and a look costs nothing.
        while not done() and trio.current_time() < deadline:  # noqa: ASYNC110
            await trio.sleep(LOOK_SECONDS)
        return done()

    # --- all of them -------------------------------------------------------------------------------------------------

    def _take_no_more(self) -> None:
        self._polls.cancel()
        self.going.set()

    def _between(self) -> list[bool]:
        """Of each live run, whether all that it waits for is the server."""
        return [isinstance(run.phase, Claiming | Starting | Exited) for run in self._roster.all()]

    def _ask_all(self, reason: StopReason, why: str, doing: str, *, hurry: bool = False) -> None:
        self._drain.cancel()
        self.doing = doing
        for run in self._roster.all():
            run.ask_to_stop(reason, why, hurry=hurry)


def exit_status(rung: Rung, asked: bool) -> int:
    """1 when runs were killed, or the server could not be asked by `--run-once`."""
    return 1 if rung is Rung.KILL or not asked else 0
