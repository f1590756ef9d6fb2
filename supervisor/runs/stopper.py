"""Ends one living process of a run, and all that belongs to it, as its engine needs to be told.

Engines differ in what they make of SIGTERM: one that has been asked through its control channel reports the end itself, one
that cannot be asked calls it a crash, and an older one dies without a word.
"""

from __future__ import annotations

import logging

import trio

from supervisor.errors import BackendError
from supervisor.failpoints import failpoint
from supervisor.lifecycle import Stopping, StopReason
from supervisor.model import Answer, Proposal, StateType
from supervisor.process.adopt import Adopted
from supervisor.process.cgroup import RunGroup
from supervisor.process.channel import Intent, Session
from supervisor.process.signals import hold, let_go_on
from supervisor.process.stop import end, end_others
from supervisor.runs.ending import engine_ran_hooks
from supervisor.runs.entry import Entry
from supervisor.runs.kit import Kit
from supervisor.runs.launcher import Launched
from supervisor.runs.wish import StopWish

CONNECT_SECONDS = 1.0  # an engine that is not on its control channel by then will not be asked through it
CANCELLING_SECONDS = 5.0  # the longest that telling the server of our own stop may delay the stop


def _is_mute(launched: Launched, reason: StopReason) -> bool:
    """Whether a polite signal would make a lie: an engine whose channel went with its agent calls SIGTERM a crash.

    It would force CRASHED over what the run is and run the hooks for that. Where the machine goes down, that is the truth.
    """
    adopted_engine = isinstance(launched.child, Adopted) and launched.is_engine and launched.runs_own_hooks
    return adopted_engine and reason is not StopReason.SHUTDOWN


class Stopper:
    """Carries out the wish that a run shall stop."""

    def __init__(
        self,
        entry: Entry,
        wish: StopWish,
        kit: Kit,
        grace: float,
        group: RunGroup | None,
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        """`grace`: seconds between the polite signal and SIGKILL."""
        self._entry = entry
        self._wish = wish
        self._kit = kit
        self._grace = grace
        self._group = group
        self._log = log
        self._id = entry.record.run.id
        self._output = kit.launcher.output(self._id)

    async def stop_when_asked(self, launched: Launched, stopped: trio.Event) -> None:
        await self._wish.asked.wait()
        reason = self._wish.reason
        assert reason is not None
        child = launched.child
        if not isinstance(self._entry.phase, Stopping):  # an earlier agent may have begun
            await self._entry.to(Stopping(process=child.ref, reason=reason), stopped=reason, why=self._wish.why)
        grace = self._grace
        with trio.CancelScope() as politeness:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._when_hurried, politeness)
                killed = await self._stop_politely(launched, reason, grace)
                nursery.cancel_scope.cancel()
            if killed:
                self._log.warning("killed %d process(es) that outlived the grace of %g s", killed, grace)
        if politeness.cancelled_caught:
            await end(child.ref, self._id, grace=0.0, group=self._group)
        stopped.set()

    async def _stop_politely(self, launched: Launched, reason: StopReason, grace: float) -> int:
        """How many processes had to be killed all the same."""
        child, killed = launched.child, 0
        ours = reason in (StopReason.TIMEOUT, StopReason.OPERATOR)  # cancellations that nobody else has wished for
        leaving = ours and not await self._say_cancelling()
        failpoint("before ask engine")
        asked = not (leaving or self._hooks_begun(launched)) and await self._ask_engine(launched.session, reason)
        failpoint("after ask engine")
        mute = _is_mute(launched, reason)
        if (asked and launched.is_engine) or mute:
            # It will write CANCELLED itself, and nothing else of the run may live by then.
            failpoint("before others ended")
            killed = await end_others(child.ref, self._id, grace=grace, group=self._group)
            failpoint("after others ended")
        if launched.is_engine and launched.runs_own_hooks and not leaving:
            await hold(child.ref)  # or it could begin its hooks after we have looked whether it has
        if leaving or self._hooks_begun(launched):
            # An engine on its way out would take the signal for the run's: it would put CANCELLED or CRASHED over
            # what it has reported, or run once more the hooks it began when the server refused its COMPLETED.
            let_go_on(child.ref)
            with trio.move_on_after(grace):
                await child.wait()
        failpoint("before signal")
        if mute:
            self._log.info("killing process %d: it cannot be told that this is no crash", child.ref.pid)
            await end(child.ref, self._id, grace=0.0, group=self._group)
        else:
            killed += await end(child.ref, self._id, grace=grace, group=self._group)
        failpoint("after signal")
        return killed

    def _hooks_begun(self, launched: Launched) -> bool:
        return launched.runs_own_hooks and engine_ran_hooks(self._output)

    async def _ask_engine(self, session: Session | None, reason: StopReason) -> bool:
        """Tells the engine what the signal to come means; without a channel, it would call it a crash.

        Returns whether it has understood, and so will act on it itself.
        """
        if session is None or reason is StopReason.SHUTDOWN:
            return False
        with trio.move_on_after(CONNECT_SECONDS):
            await session.wait_connected()
        intent = Intent.RESCHEDULE if reason is StopReason.RESCHEDULE else Intent.CANCEL
        return session.connected and await session.ask(intent)

    async def _when_hurried(self, politeness: trio.CancelScope) -> None:
        await self._wish.hurry.wait()
        politeness.cancel()

    async def _say_cancelling(self) -> bool:
        """Our own stop is a cancellation to everybody else: the engine runs its hooks, and people see why.

        Returns False when the server says that the run has ended already.
        """
        proposal = Proposal(
            type=StateType.CANCELLING,
            name="Cancelling",
            message=self._wish.why,
            transition_id=self._entry.record.transition_id("cancelling"),
        )
        with trio.move_on_after(CANCELLING_SECONDS):
            try:
                verdict = await self._kit.backend.propose(self._id, proposal)
            except BackendError as error:
                self._log.debug("not told that it is being stopped: %s", error)
            else:
                return verdict.answer is not Answer.ABORT
        return True
