"""Reading the journal from outside, while its agent writes it or is gone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from supervisor.errors import FlowAgentError
from supervisor.journal import store
from supervisor.journal.files import Damaged, Trouble
from supervisor.lifecycle.record import Record


class NoJournal(FlowAgentError):
    """There is no journal: no agent has used this state directory yet."""


def read(path: Path) -> list[Record]:
    """Every record, newest first. Writes nothing into it and keeps no agent waiting.

    Raises `NoJournal`, or a `FlowAgentError` that says why it cannot be read.
    """
    try:
        path.stat()
        with path.open("rb"):  # SQLite would only say that it cannot
            pass
    except FileNotFoundError:
        raise NoJournal(f"no journal at {path} yet: no agent has used this state directory") from None
    except OSError as error:
        raise FlowAgentError(f"cannot read the journal {path}: {error.strerror or error}") from error
    try:
        with store.translated():
            return _read(path, "ro")
    except Trouble as trouble:
        return _read_without_a_log(path, trouble)
    except Damaged as damage:
        raise _unreadable(path, damage) from damage


def _read_without_a_log(path: Path, trouble: Trouble) -> list[Record]:
    """A journal that was closed in order can be read where there is no room, or no right, to make a log beside it."""
    try:
        if path.with_name(path.name + "-wal").stat().st_size:
            raise _unreadable(path, trouble) from trouble
    except FileNotFoundError:
        pass
    try:
        with store.translated():
            return _read(path, "ro&immutable=1")
    except (Trouble, Damaged) as problem:
        raise _unreadable(path, problem) from problem


def _read(path: Path, mode: str) -> list[Record]:
    connection: sqlite3.Connection = store.connect(path, mode)
    try:
        store.check(connection, path)
        entries, _ = store.read_all(connection)
    finally:
        connection.close()
    return [entry.record for entry in reversed(entries)]


def _unreadable(path: Path, why: Exception) -> FlowAgentError:
    return FlowAgentError(f"cannot read the journal {path}: {why}")
