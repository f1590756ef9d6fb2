"""The pollers of all `[[work]]` tables: one each, come and gone with its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import trio

from supervisor.config import Poll, Work
from supervisor.config.reload import by_name
from supervisor.runs.poller import Poller
from supervisor.runs.sources import Source


class Pollers:
    """Owns which pollers there are. A table is known by what it names: with other limits or flows it is the same one."""

    def __init__(self, work: Sequence[Work], make: Callable[[Work], Poller]) -> None:
        self._make = make
        self._pollers = {table: make(one) for table, one in by_name(work).items()}
        self._nursery: trio.Nursery | None = None
        self._news = trio.Event()

    def __iter__(self) -> Iterator[Poller]:
        return iter(self._pollers.values())

    @property
    def sources(self) -> list[Source]:
        """In the order of the tables."""
        return [poller.source for poller in self._pollers.values()]

    async def run(self) -> None:
        """Polls until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for poller in self._pollers.values():
                    nursery.start_soon(poller.run, self._ring)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def poll_once(self) -> bool:
        """Asks every source once. Returns False, having said why, when one of them could not be asked."""
        return all([await poller.poll_once(hold=False) for poller in list(self._pollers.values())])

    def use(self, work: Sequence[Work], poll: Poll, prefetch_seconds: float) -> None:
        """Takes work from these tables from now on. A poller whose table and times are as they were is not disturbed."""
        before, self._pollers = self._pollers, {}
        for table, one in by_name(work).items():
            if table in before:
                poller = before.pop(table)
                poller.use(one, poll, prefetch_seconds)
            else:
                poller = self._make(one)
                if self._nursery is not None:
                    self._nursery.start_soon(poller.run, self._ring)
            self._pollers[table] = poller
        for poller in before.values():
            poller.end()
        self._ring()

    async def wait_news(self) -> None:
        """Returns when there is another poller, or one whose source knows other `resources` than before."""
        await self._news.wait()

    def _ring(self) -> None:
        self._news.set()
        self._news = trio.Event()
