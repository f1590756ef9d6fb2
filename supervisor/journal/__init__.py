"""MEMORY: what the agent must know again after its death, on disk before the deed.

`store` is what is said to SQLite, `files` what is done to the file as a whole, `reader` is for `flow-agent runs`. This
file is what the agent talks to. Why it is as it is stands in docs/decisions/0006-journal.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio

from supervisor.errors import ConfigError
from supervisor.journal import files
from supervisor.journal.entries import Batch, Entry
from supervisor.journal.files import Damaged, Trouble
from supervisor.journal.reader import NoJournal, read
from supervisor.journal.store import Store
from supervisor.lifecycle import Closed
from supervisor.lifecycle.record import Record

__all__ = ["Journal", "NoJournal", "read"]

RETRY_SECONDS = 2.0  # how often an unwritten value is tried again
PRUNE_SECONDS = 3600.0
HISTORY_DAYS = 30  # how long closed records are kept
HISTORY_RUNS = 1000  # how many of them
HISTORY_REFUSED = 100  # and how many whose claim the server refused: where agents compete they would fill it all

_log = logging.getLogger("flow-agent")


class Journal:
    """One agent's journal. Only the holder of the state directory's lock may open it.

    Owns the file; `_next`, the values that wait for the next commit; `_open`, the latest value on disk of every record
    that is not closed, from which a journal that breaks is written anew; and `_retried`. SQLite is only ever called in a
    thread, by one caller at a time: whoever finds it idle commits for all who came meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.set_aside: Path | None = None  # where a journal that could not be read went, at the opening or later
        self.unreadable = 0  # how many records of it could not be read at the opening
        self._path = path
        self._store: Store | None = None  # None: to be opened again when there is room
        self._found: list[Record] = []
        self._open: dict[str, Entry] = {}
        self._retried: dict[str, str] = {}  # claim id to run id, of closed records with `crash_retry`
        self._next = Batch()
        self._in_flight = Batch()
        self._idle: trio.Event | None = None  # set, and None again, when SQLite is free
        self._trouble = ""  # why the last attempt failed
        self._scarce = False  # it succeeded and left next to no room
        self._limiter = trio.CapacityLimiter(1)  # the common one may be taken up by others

    @classmethod
    def open(cls, path: Path) -> Journal:
        """The journal at `path`, made when it is missing. Blocks; for the agent's start.

        What is there and is not a journal, or a broken one, is set aside. Where the disk has no room, the journal is held
        in memory until it has. Raises `ConfigError` when the directory cannot be used, or a newer agent wrote the file.
        """
        journal = cls(path)
        try:
            try:
                journal._take(Store.open(path))
            except Trouble as trouble:
                journal._take_in_need(trouble)
            except Damaged as damage:
                journal._begin_anew(damage)
        except Trouble as trouble:
            journal._trouble = str(trouble)
        if journal._trouble:
            journal._complain()
        return journal

    @property
    def full(self) -> bool:
        """There was no room for the last write, or it left next to none: begin nothing new."""
        return bool(self._trouble) or self._scarce

    def open_records(self) -> list[Record]:
        """Every record that was not closed when the journal was opened, oldest first."""
        return list(self._found)

    def crash_retries(self, run_id: str) -> int:
        """How many closed records of that run say that it crashed and was handed back to be retried."""
        return sum(of == run_id for of in self._retried.values())

    async def write(self, record: Record, *, durable: bool = True) -> bool:
        """Makes this the value of the record with that claim id. Returns whether it, or a later one, is on disk.

        `durable`: also after a power cut. Without, it outlives the agent, and costs no sync. When it is not on disk it is
        held in memory and tried again by `run`. Never raises for the disk. Being cancelled does not keep it from being
        written: it is seen to the end first.
        """
        batch = self._next
        batch.entries.append(Entry.of(record))
        batch.durable |= durable
        if record.crash_retry and isinstance(record.phase, Closed):
            self._retried[record.claim_id] = record.run.id
        with trio.CancelScope(shield=True):
            while batch.kept is None:
                if self._idle is None:
                    await self._commit()
                else:
                    await self._idle.wait()
        return batch.kept is True

    async def write_patiently(self, record: Record) -> None:
        """Like `write`; returns when it is on disk, or was superseded by a value that is, or forgotten.

        Cancelled, it leaves the value in memory.
        """
        await self.write(record)
        while self._owes(record.claim_id):
            await trio.sleep(RETRY_SECONDS)
            await self._try_again()

    def forget(self, claim_id: str) -> None:
        """Drops a record that need not be written any more, and what is on disk of it."""
        self._retried.pop(claim_id, None)
        self._next.drop(claim_id)
        if claim_id in self._open or self._in_flight.has(claim_id):
            self._next.gone.add(claim_id)

    async def run(self) -> None:
        """Tries again what could not be written, asks whether there is room again, and prunes the history. Until cancelled."""
        prune_at = trio.current_time()
        while True:
            if trio.current_time() >= prune_at and not self.full:
                await self.prune(datetime.now(UTC))
                prune_at = trio.current_time() + PRUNE_SECONDS
            await trio.sleep(RETRY_SECONDS)
            if self.full or self._next:
                await self._try_again()

    async def prune(self, now: datetime) -> None:
        """Forgets closed records beyond `HISTORY_DAYS`, `HISTORY_RUNS` and `HISTORY_REFUSED`."""

        def job() -> None:
            if self._store is not None:
                before = now - timedelta(days=HISTORY_DAYS)
                for claim_id in self._store.prune(before, HISTORY_RUNS, HISTORY_REFUSED, self._open):
                    self._retried.pop(claim_id, None)

        while self._idle is not None:
            await self._idle.wait()
        with trio.CancelScope(shield=True), self._alone():
            await self._attempt(job)

    def close(self) -> None:
        """Writes what can still be written, and lets go of the file. Nobody may be waiting for a `write`."""
        if self._next and not self._note(self._in_thread(lambda: self._save(self._next))):
            _log.error("lost with the agent: %d records that the journal had no room for", len(self._next.latest()))
        if self._store is not None:
            try:
                self._store.close()
            except (Trouble, Damaged) as problem:
                _log.warning("cannot close the journal %s in order: %s", self._path, problem)
            self._store = None

    # --- one caller at a time -----------------------------------------------------------------------------------------

    def _owes(self, claim_id: str) -> bool:
        return self._next.has(claim_id) or self._in_flight.has(claim_id)

    async def _try_again(self) -> None:
        with trio.CancelScope(shield=True):
            if self._idle is not None:
                await self._idle.wait()  # somebody is trying already
            else:
                await self._commit()

    async def _commit(self) -> None:
        """Writes all that waits; nothing waiting, only finds out whether it could."""
        with self._alone():
            batch, self._next = self._next, Batch()
            self._in_flight = batch
            try:
                batch.kept = await self._attempt(lambda: self._save(batch))
            finally:
                self._in_flight = Batch()
                if batch.kept:
                    self._settle(batch)
                else:
                    self._put_back(batch)

    async def _attempt(self, job: Callable[[], None]) -> bool:
        return self._note(await trio.to_thread.run_sync(self._in_thread, job, limiter=self._limiter))

    def _settle(self, batch: Batch) -> None:
        for claim_id in batch.gone:
            self._open.pop(claim_id, None)
        for claim_id, entry in batch.latest().items():
            if isinstance(entry.record.phase, Closed):
                self._open.pop(claim_id, None)
            else:
                self._open[claim_id] = entry

    def _put_back(self, batch: Batch) -> None:
        """Only the latest value of each claim is held: the outage may be long."""
        batch.kept = False
        held = [entry for claim_id, entry in batch.latest().items() if claim_id not in self._next.gone]
        self._next.entries[:0] = held
        self._next.gone |= batch.gone
        self._next.durable |= batch.durable

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._idle = idle = trio.Event()
        try:
            yield
        finally:
            self._idle = None
            idle.set()

    def _note(self, trouble: str) -> bool:
        """Takes down how an attempt went; says so when that changed."""
        before, self._trouble = self._trouble, trouble
        if trouble and not before:
            self._complain()
        elif before and not trouble:
            _log.warning("the journal %s can be written again", self._path)
        return not trouble

    def _complain(self) -> None:
        _log.error(
            "cannot write the journal %s: %s; live flow runs go on and are held in memory, new ones wait until it can be "
            "written; make room on that disk",
            self._path,
            self._trouble,
        )

    # --- in the thread, or at the opening -----------------------------------------------------------------------------

    def _in_thread(self, job: Callable[[], None]) -> str:
        """Does it, with the file open and whole. Returns why not, or nothing."""
        try:
            try:
                if self._store is None:
                    self._reopen()
                job()
            except Damaged as damage:
                self._begin_anew(damage)
                job()
        except (Trouble, Damaged, ConfigError) as problem:
            return str(problem)
        return ""

    def _save(self, batch: Batch) -> None:
        assert self._store is not None
        self._scarce = not self._store.commit(batch.entries, batch.gone, durable=batch.durable)

    def _begin_anew(self, damage: Exception) -> None:
        """A new journal in the place of one that is broken, with all in it that is open."""
        broken, self._store = self._store, None
        self.set_aside = files.set_aside(self._path)  # before the file is closed: that would remove its log
        if broken is not None:
            broken.abandon()
        _log.error(
            "cannot read the journal %s: %s; set it aside as %s and began a new one", self._path, damage, self.set_aside
        )
        self._reopen()

    def _reopen(self) -> None:
        store = self._store = Store.open(self._path)
        if self._open:  # the file may be a new one
            store.commit(list(self._open.values()), (), durable=True)

    def _take(self, store: Store) -> None:
        """What is in the file becomes what we know."""
        self._store = store
        entries, self.unreadable = store.records()
        for entry in entries:
            record = entry.record
            if not isinstance(record.phase, Closed):
                self._found.append(record)
                self._open[record.claim_id] = entry
            elif record.crash_retry:
                self._retried[record.claim_id] = record.run.id

    def _take_in_need(self, trouble: Trouble) -> None:
        """There may be no room for the parts that SQLite wants beside the file; it can still be read."""
        self._trouble = str(trouble)
        if files.inode(self._path) is None:
            return
        try:
            self._take(Store.open(self._path, alone=True))
        except (Trouble, Damaged) as problem:
            self._begin_anew(problem)
        else:
            store, self._store = self._store, None
            assert store is not None
            store.close()
