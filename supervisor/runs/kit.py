"""What every run needs of the rest of the house, handed over in one piece by `supervisor.agent`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from supervisor.runs.clock import ServerClock
from supervisor.runs.lead import Leads

if TYPE_CHECKING:
    from supervisor.backend.base import Backend
    from supervisor.lifecycle.record import Record
    from supervisor.runs.entry import Memory
    from supervisor.runs.health import ServerHealth
    from supervisor.runs.launcher import Launcher
    from supervisor.runs.patience import Patience
    from supervisor.runs.teller import Teller


Show = Callable[[Sequence[str], int], Awaitable[None]]


class Output(Protocol):
    """What a run needs of the keeper of the output files (`supervisor.logs`)."""

    async def watch(self, run_id: str, shown: int, show: Show) -> None: ...

    async def finish(self, run_id: str, shown: int, show: Show) -> int: ...


@dataclass(frozen=True)
class Kit:
    """Shared by all runs; holds nothing about any one of them."""

    backend: Backend
    health: ServerHealth
    patience: Patience
    teller: Teller
    launcher: Launcher
    journal: Memory
    output: Output
    clock: ServerClock = field(default_factory=ServerClock)
    leads: Leads = field(default_factory=Leads)
    claimed_twice: Callable[[Record], None] = lambda _: None  # `LateClaims.claimed_twice`
