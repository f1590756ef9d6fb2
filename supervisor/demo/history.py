"""What became of a run, and how that is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from supervisor.model import StateType


class Entered(msgspec.Struct, frozen=True):
    """One state of a run and when it was entered."""

    type: StateType
    name: str
    at: datetime


class History(msgspec.Struct, frozen=True):
    """A run's states so far, oldest first."""

    name: str
    created: datetime
    states: tuple[Entered, ...]

    @classmethod
    def from_answers(cls, name: str, run: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> History:
        """From what the server says of the run and of its states."""
        found = [
            Entered(StateType(state["type"]), state["name"], datetime.fromisoformat(state["timestamp"]))
            for state in states
        ]
        return cls(name, datetime.fromisoformat(run["created"]), tuple(sorted(found, key=lambda state: state.at)))

    @property
    def end(self) -> Entered | None:
        return self.states[-1] if self.states and self.states[-1].type.terminal else None

    @property
    def started(self) -> datetime | None:
        return next((state.at for state in self.states if state.type is StateType.RUNNING), None)


def table(histories: Sequence[History]) -> list[str]:
    """What ran, for people: how it ended, how long after its creation it started, how long it ran."""
    rows = [("flow", "ended as", "started after", "ran for")]
    for one in histories:
        last = one.states[-1].name if one.states else "no state"
        ended = one.end.name if one.end else f"not ended ({last})"
        ran = _span(one.started, one.end.at if one.end else None)
        rows.append((one.name, ended, _span(one.created, one.started), ran))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _span(start: datetime | None, end: datetime | None) -> str:
    return "-" if start is None or end is None else f"{(end - start).total_seconds():.2f} s"
