"""How the agent goes: what becomes of its live runs when it is told to stop (docs/architecture.md, "Signals")."""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable

import trio

from supervisor.config import Stop
from supervisor.lifecycle import Claiming, Exited, Starting, StopReason
from supervisor.runs.health import span
from supervisor.runs.ladder import Rung
from supervisor.runs.roster import Roster
from supervisor.systemd.manager import Intent

KILL_SECONDS = 5.0  # the longest that reports may delay the end of an agent that was told to kill and go
LEAVE_SECONDS = 10.0  # how long runs that are between two states of rest may take to reach one before we leave them
OWING_SECONDS = (
    10.0  # how long a stopping agent waits for a server that does not answer; the reports are in the journal
)
ENDING_SECONDS = 120.0  # what ending runs takes at most beside their grace: hooks, what they have left behind, reports
LOOK_SECONDS = 0.1
ASK_SECONDS = 5.0  # how often an agent that drains looks whether it is to be quicker by now

# What a drain makes way for. Never the other way: a systemd that does not answer looks like a plain stop.
_URGENCY = (Intent.STOP, Intent.RESTART, Intent.SHUTDOWN)

_log = logging.getLogger("flow-agent")


class _Drain(enum.Enum):
    """How the waiting for live runs has ended."""

    OVER = enum.auto()  # none is left, or a later step has taken over
    LATE = enum.auto()
    CHANGED = enum.auto()  # there is something more urgent to do


class Departure:
    """Carries a stop out, step by step. Owns why, what it has come to, and by when that step is over."""

    def __init__(
        self,
        roster: Roster,
        stop: Stop,
        polls: trio.CancelScope,
        runs: trio.CancelScope,
        server_lost: Callable[[], bool],
        ask_why: Callable[[], Awaitable[Intent]] | None = None,
    ) -> None:
        """`ask_why`: what the service manager is about to do with us, where there is one."""
        self._roster = roster
        self._server_lost = server_lost
        self._ask_why = ask_why
        self._stop = stop
        self._polls = polls
        self._runs = runs
        self._drain = trio.CancelScope()
        self.going = trio.Event()
        self._why = Intent.STOP
        self._step = ""  # for the status line
        self._until = float("-inf")

    def use(self, stop: Stop) -> None:
        """What `[stop]` says from now on."""
        self._stop = stop

    # --- what the service manager hears of it ------------------------------------------------------------------------

    def describe(self) -> str:
        """What it is doing, with how many runs, and for how long; empty before the first signal."""
        live = len(self._roster)
        if not live:
            return self._step and "stopping"
        left = span(max(0.0, self._until - trio.current_time()))
        return self._step.format(live=f"{live} live {'run' if live == 1 else 'runs'}", left=left)

    def in_time(self) -> bool:
        """Whether a step is under way and within its bound. A manager may be asked for patience as long as that."""
        return trio.current_time() < self._until

    def _begin(self, step: str, seconds: float) -> None:
        """`step`: for the status line, with {live} and {left} in it; it takes so many seconds at most."""
        self._step, self._until = step, trio.current_time() + seconds

    # --- the steps ---------------------------------------------------------------------------------------------------

    async def begin(self, intent: Intent, name: str) -> None:
        """The first signal to stop: what it means depends on what systemd is about to do with us."""
        self._why = intent
        match intent:
            case Intent.SHUTDOWN:
                await self._shut_down(name)
            case Intent.RESTART:
                await self.act(self._stop.on_restart, name)
            case Intent.STOP:
                await self.act(self._stop.on_stop, name)

    async def act(self, action: str, name: str) -> None:
        """Does what `[stop]` says of a stop: drain, cancel, keep or reschedule. Returns when it needs nothing more."""
        self._take_no_more()
        live = len(self._roster)
        if action == "drain":
            wait = f"; waiting for {live} live run(s), signal again to cancel them" if live else ""
            _log.info("%s: taking no new runs%s", name, wait)
            bound, action = self._stop.drain_timeout_seconds, self._stop.then
            match await self._wait_drained(bound, f"draining: {{live}}, {{left}} left, then {action}"):
                case _Drain.OVER:
                    return
                case _Drain.CHANGED:
                    await self._hurry(name)
                    return
            _log.warning("the drain took longer than %g s", bound)
        if action == "cancel":
            self.cancel_all(name)
        elif action == "reschedule":
            self._reschedule(name)
        else:
            await self._keep(name)

    async def _hurry(self, name: str) -> None:
        """A drain in the middle of which the manager has been told something else."""
        _log.info("the stop has become a %s", self._why)
        if self._why is Intent.SHUTDOWN:
            await self._shut_down(name, within=self._until - trio.current_time())
        else:
            await self.begin(self._why, name)

    async def _shut_down(self, name: str, within: float = float("inf")) -> None:
        """The machine is going down: nothing of a run survives that. `within`: what is left of a drain, in seconds."""
        self._take_no_more()
        action = self._stop.on_stop if self._stop.on_stop in ("cancel", "reschedule") else self._stop.then
        if self._stop.on_stop in ("drain", "keep"):
            seconds = min(within, self._stop.shutdown_timeout_seconds)
            _log.info(
                "%s: the machine is going down; %d live run(s) have %g s", name, len(self._roster), round(seconds, 1)
            )
            then = action if action == "reschedule" else "end them"
            step = f"machine going down: {{live}}, {{left}} left, then {then}"
            if await self._wait_drained(seconds, step) is _Drain.OVER:
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
        self._begin("killing: {live}", KILL_SECONDS)
        self._runs.deadline = self._until

    def _reschedule(self, name: str) -> None:
        _log.warning("%s: handing %d live run(s) back to the server", name, len(self._roster))
        why = f"Handed back by flow-agent: it was told to stop ({name})."
        self._ask_all(StopReason.RESCHEDULE, why, "handing back")

    async def _keep(self, name: str) -> None:
        _log.info("%s: leaving %d live run(s) to the next flow-agent", name, len(self._roster))
        self._begin("leaving {live} to the next flow-agent", LEAVE_SECONDS)
        # Whoever is between two deeds could be left, too: the journal knows. But it is better manners to finish them.
        await self._wait(lambda: not any(self._between()), LEAVE_SECONDS)
        self._runs.cancel()

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def _wait_drained(self, seconds: float, step: str) -> _Drain:
        """Until all have ended, at most that long. What is waited for changes in many places, and a look costs nothing."""
        if self._drain.cancel_called:  # by a signal that was quicker
            return _Drain.OVER
        self._begin(step, seconds)
        asked = trio.current_time()
        with trio.CancelScope() as self._drain:
            while len(self._roster) and self.in_time():
                await trio.sleep(LOOK_SECONDS)
                if trio.current_time() - asked >= ASK_SECONDS:
                    if await self._more_urgent():
                        return _Drain.CHANGED
                    asked = trio.current_time()
            return _Drain.LATE if len(self._roster) else _Drain.OVER
        return _Drain.OVER

    async def _more_urgent(self) -> bool:
        """Whether we shall do something else than when we were told to stop: a restart, or the machine's end."""
        if self._ask_why is None or self._why is Intent.SHUTDOWN:
            return False
        found = await self._ask_why()
        if _URGENCY.index(found) <= _URGENCY.index(self._why):
            return False
        self._why = found
        return found is Intent.SHUTDOWN or self._stop.on_restart != "drain"

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
        grace = max((run.work.flows.grace_seconds for run in self._roster.all()), default=0.0)
        self._begin(f"{doing}: {{live}}, {{left}} left", grace + ENDING_SECONDS)
        for run in self._roster.all():
            run.ask_to_stop(reason, why, hurry=hurry)


def exit_status(rung: Rung, asked: bool) -> int:
    """1 when runs were killed, or the server could not be asked by `--run-once`."""
    return 1 if rung is Rung.KILL or not asked else 0
