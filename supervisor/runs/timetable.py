"""Offers that are not due yet. They hold neither a slot nor a claim until it is time to begin them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import trio

from supervisor.model import FlowRun, log_extra
from supervisor.runs.clock import ServerClock
from supervisor.runs.lead import TICK_SECONDS
from supervisor.runs.sources import Source

MOST = 200  # offers of one source that are kept: a page of the server's

_log = logging.getLogger("flow-agent")


@dataclass(frozen=True)
class _Held:
    offer: FlowRun
    lead: float  # seconds before it is due at which it is to be taken


class Timetable:
    """Owns which offers wait for their time. What becomes of them then is the roster's: the claim reads the run again."""

    def __init__(self, admit: Callable[[FlowRun, Source], bool], clock: ServerClock) -> None:
        self._admit = admit
        self._clock = clock
        self._held: dict[Source, dict[str, _Held]] = {}
        self._changed = trio.Event()

    def now(self) -> datetime:
        """The time by which runs are due: the server's, in UTC."""
        return self._clock.now()

    def __len__(self) -> int:
        return len({run for held in self._held.values() for run in held})

    def describe(self) -> str:
        """For the status line: what goes on with it."""
        return f", {len(self)} to come" if len(self) else ""

    def offered(
        self, source: Source, offers: Sequence[FlowRun], lead: Callable[[FlowRun], float], *, whole: bool
    ) -> tuple[int, int]:
        """What the server offers now: begins what is due, in its order, and keeps the rest. Returns how many were begun and kept.

        What it offered earlier and does not any more is dropped; unless the answer was not the whole list.
        """
        before = self._held.get(source, {})
        kept = {} if whole else dict(before)
        begun = held = 0
        for offer in offers:
            one = _Held(offer, lead(offer))
            kept.pop(offer.id, None)
            if self._left(one) > 0:
                if offer.id not in before:
                    _log.debug(
                        "due in %.1f s; waiting for its time", one.lead + self._left(one), extra=log_extra(offer)
                    )
                kept[offer.id] = one
                held += 1
            elif self._admit(offer, source):
                begun += 1
        soonest = sorted(kept.values(), key=self._left)[:MOST]
        self._held[source] = {one.offer.id: one for one in soonest}
        self._changed.set()
        return begun, held

    def forget(self, source: Source) -> None:
        """Nothing of it is begun from here; its next poll, where there is one, offers anew."""
        self._held.pop(source, None)

    async def run(self) -> None:
        """Begins each offer when it is time, until cancelled."""
        try:
            while True:
                self._changed = trio.Event()
                with trio.move_on_after(self._begin()):
                    await self._changed.wait()
        finally:
            self._held.clear()

    def _begin(self) -> float:
        """Hands over what is to be taken now. Returns how long nothing more can be."""
        for source, held in self._held.items():
            for run, one in list(held.items()):
                if self._left(one) <= 0:
                    # Taken or not: one that finds no free slot is offered again when there is one.
                    del held[run]
                    self._admit(one.offer, source)
        soonest = min((self._left(one) for held in self._held.values() for one in held.values()), default=None)
        return float("inf") if soonest is None else min(max(soonest, 0.0), TICK_SECONDS)

    def _left(self, one: _Held) -> float:
        due = one.offer.expected_start
        return 0.0 if due is None else self._clock.until(due) - one.lead
