"""The journal's file: what is said to SQLite, and what its refusals mean. No trio here; one caller at a time.

A format is for ever: whoever changes what `_SCHEMA` makes raises `FORMAT`, teaches `Store.open` to read every earlier
one, and checks in a file of it beside `tests/fixtures/journal-v1.sqlite3`.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from supervisor.errors import ConfigError
from supervisor.journal import files
from supervisor.journal.entries import Entry, Unreadable, checksum
from supervisor.journal.files import Damaged, Trouble
from supervisor.lifecycle import Closed, Outcome
from supervisor.lifecycle.record import Record

FORMAT = 1
BUSY_SECONDS = 10.0  # how long a reader's lock is waited for
MIN_ROOM = 512 * 1024  # bytes; below that no run should be begun: the ends of the live ones need them
_APPLICATION = 0x666C6F77  # "flow": no other program's database is taken for a journal
_WAL_PAGES = 1000  # of 4 KiB; a checkpoint brings them home

_SCHEMA = f"""
CREATE TABLE records (
  seq INTEGER PRIMARY KEY,
  claim_id TEXT NOT NULL UNIQUE,
  run_id TEXT NOT NULL,
  phase TEXT NOT NULL,
  outcome TEXT,             -- of a closed one
  opened TEXT NOT NULL,     -- UTC, ISO 8601
  changed TEXT NOT NULL,
  closed INTEGER NOT NULL,
  record TEXT NOT NULL,     -- the whole of it, JSON
  crc INTEGER NOT NULL      -- CRC-32 of `record`
);
CREATE INDEX records_of_run ON records (run_id);
CREATE TABLE steps (        -- only ever added to: the story of each claim
  seq INTEGER PRIMARY KEY,
  claim_id TEXT NOT NULL,
  at TEXT NOT NULL,
  phase TEXT NOT NULL       -- JSON
);
CREATE INDEX steps_of_claim ON steps (claim_id);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {FORMAT};
"""
_UPSERT = """
INSERT INTO records (claim_id, run_id, phase, outcome, opened, changed, closed, record, crc)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (claim_id) DO UPDATE SET phase = excluded.phase, outcome = excluded.outcome, changed = excluded.changed,
  closed = excluded.closed, record = excluded.record, crc = excluded.crc
"""
# Offsets are written far more often than phases change.
_STEP = """
INSERT INTO steps (claim_id, at, phase) SELECT ?1, ?2, ?3
WHERE ?3 IS NOT (SELECT phase FROM steps WHERE claim_id = ?1 ORDER BY seq DESC LIMIT 1)
"""
# All of these may pass, or be put right from outside; any other refusal means that the file is not what we wrote.
_PASSING = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
}

_log = logging.getLogger("flow-agent")


class Store:
    """An open journal file. Owns the connection."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._inode = files.inode(path)
        self._synchronous = ""

    @classmethod
    def open(cls, path: Path, *, alone: bool = False) -> Store:
        """The journal at `path`, made when it is missing.

        `alone` keeps the index of its log in memory and not in a file: for reading it where there is no room.
        Raises `Trouble`, `Damaged` or `ConfigError`.
        """
        if files.inode(path) is None:
            files.make(path, _lay_out)
        files.check_rights(path)
        with translated():
            connection = connect(path, "rw")
            try:
                connection.execute(f"PRAGMA locking_mode = {'EXCLUSIVE' if alone else 'NORMAL'}")
                check(connection, path)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
                connection.execute(f"PRAGMA journal_size_limit = {_WAL_PAGES * 4096}")
            except BaseException:
                connection.close()
                raise
            return cls(path, connection)

    def close(self) -> None:
        with translated():
            self._connection.close()

    def abandon(self) -> None:
        """Closes a file that is broken, whatever it says to that."""
        with suppress(sqlite3.Error):
            self._connection.close()

    def records(self) -> tuple[list[Entry], int]:
        """All that can be read, oldest first, and how many cannot."""
        with translated():
            return read_all(self._connection)

    def commit(self, entries: list[Entry], gone: Iterable[str], *, durable: bool) -> bool:
        """All of it or nothing. Returns whether there is room for more; raises `Trouble` or `Damaged`."""
        if files.inode(self._path) != self._inode:
            raise Damaged("it was removed or replaced")
        with translated():
            self._sync(durable)
            try:
                self._write(entries, gone)
            except sqlite3.OperationalError as error:
                if _primary(error) != sqlite3.SQLITE_FULL:
                    raise
                # What the log holds can be brought home and the log used again, without taking more of the disk.
                self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
                self._write(entries, gone)
        return files.room(self._path) >= MIN_ROOM

    def prune(self, before: datetime, runs: int, refused: int, live: Iterable[str]) -> list[str]:
        """Forgets what was closed `before`, all but the latest `runs` closed ones, and of those that never were ours all
        but the latest `refused`. Returns their claim ids.

        Whatever is neither closed nor `live` cannot be read; it goes by age alone.
        """
        keep = set(live)
        with translated():
            self._sync(durable=False)
            with self._transaction():
                old = self._connection.execute("SELECT claim_id FROM records WHERE changed < ?", (before.isoformat(),))
                doomed = [claim_id for (claim_id,) in old if claim_id not in keep]
                many = "SELECT claim_id FROM records WHERE closed AND (outcome IS ?) = ? ORDER BY seq DESC LIMIT -1 OFFSET ?"
                for ours, limit in ((False, runs), (True, refused)):
                    found = self._connection.execute(many, (Outcome.NOT_OURS.value, ours, limit))
                    doomed += [claim_id for (claim_id,) in found]
                self._delete(doomed)
        return doomed

    def _write(self, entries: list[Entry], gone: Iterable[str]) -> None:
        latest = {entry.record.claim_id: entry for entry in entries}
        with self._transaction():
            self._delete(gone)
            self._connection.executemany(_UPSERT, (_row(entry) for entry in latest.values()))
            self._connection.executemany(_STEP, (_step(entry.record) for entry in entries))
            if not entries:  # asked only whether it can be done: this writes one page
                self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _delete(self, claim_ids: Iterable[str]) -> None:
        each = [(claim_id,) for claim_id in claim_ids]
        self._connection.executemany("DELETE FROM records WHERE claim_id = ?", each)
        self._connection.executemany("DELETE FROM steps WHERE claim_id = ?", each)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite ends it by itself on some errors
                self._connection.execute("ROLLBACK")
            raise

    def _sync(self, durable: bool) -> None:
        """With WAL, FULL syncs the log at every commit and NORMAL only when it is brought home."""
        wanted = "FULL" if durable else "NORMAL"
        if wanted != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted


# --- shared with the reader -------------------------------------------------------------------------------------------


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection for any one thread at a time, without transactions of its own."""
    address = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
    connection.text_factory = lambda raw: raw.decode(errors="replace")  # the checksum will tell
    return connection


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Raises `Damaged` when it is not a whole journal of ours, `ConfigError` when it is one that we cannot know."""
    connection.execute("PRAGMA cell_size_check = ON")
    [application], [version] = (
        connection.execute(f"PRAGMA {what}").fetchone() for what in ("application_id", "user_version")
    )
    if application != _APPLICATION or version < 1:
        raise Damaged("it is not a journal of flow-agent")
    if version > FORMAT:
        raise ConfigError(
            f"cannot read the journal {path}: it was written by a newer flow-agent (format {version}, this one knows "
            f"{FORMAT}); start that version, or move the file away when no flow run is live"
        )
    [[verdict]] = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if verdict != "ok":
        raise Damaged(str(verdict).replace("\n", " "))


def read_all(connection: sqlite3.Connection) -> tuple[list[Entry], int]:
    """Every record that can be read, oldest first, and how many cannot; each of those is logged."""
    entries, lost = [], 0
    for claim_id, text, crc in connection.execute("SELECT claim_id, record, crc FROM records ORDER BY seq"):
        try:
            entries.append(Entry.read(text, crc))
        except Unreadable as why:
            lost += 1
            _log.error("cannot read the journal's record of claim %s: %s; it is left as it is", claim_id, why)
    return entries, lost


@contextmanager
def translated() -> Iterator[None]:
    """SQLite's errors as ours. One without a code is a wrong use of the library, a bug of ours, and stays as it is."""
    try:
        yield
    except sqlite3.Error as error:
        code = _primary(error)
        if code is None:
            raise
        raise (Trouble if code in _PASSING else Damaged)(str(error)) from error


def _primary(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _lay_out(path: Path) -> None:
    with translated():
        connection = connect(path, "rw")
        try:
            connection.execute("PRAGMA journal_mode = MEMORY")  # nobody can see the file yet
            connection.executescript(_SCHEMA)
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()


def _row(entry: Entry) -> tuple[object, ...]:
    record = entry.record
    closed = record.phase if isinstance(record.phase, Closed) else None
    return (
        record.claim_id,
        record.run.id,
        record.short,
        closed.outcome.value if closed else None,
        _time(record.opened),
        _time(record.changed),
        closed is not None,
        entry.text,
        checksum(entry.text),
    )


def _step(record: Record) -> tuple[object, ...]:
    return record.claim_id, _time(record.changed), msgspec.json.encode(record.phase).decode()


def _time(when: datetime) -> str:
    return when.astimezone(UTC).isoformat()
