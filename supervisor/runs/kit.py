"""What every run needs of the rest of the house, handed over in one piece by `supervisor.app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.backend.base import Backend
    from supervisor.runs.health import ServerHealth
    from supervisor.runs.launcher import Launcher
    from supervisor.runs.patience import Patience
    from supervisor.runs.teller import Teller


@dataclass(frozen=True)
class Kit:
    """Shared by all runs; holds nothing about any one of them."""

    backend: Backend
    health: ServerHealth
    patience: Patience
    teller: Teller
    launcher: Launcher
