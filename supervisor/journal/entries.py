"""What is written of a record, and what is written together."""

from __future__ import annotations

import json
import zlib
from typing import NamedTuple

import msgspec

from supervisor.lifecycle.record import Record

_decoder = msgspec.json.Decoder(Record)


class Unreadable(Exception):
    """A record that is not what was written, or that this version does not understand."""


class Entry(NamedTuple):
    """A record and its text in the journal."""

    record: Record
    text: str

    @classmethod
    def of(cls, record: Record) -> Entry:
        try:
            return cls(record, msgspec.json.encode(record).decode())
        except UnicodeEncodeError:  # a name from our command line that is not UTF-8
            text = json.dumps(msgspec.to_builtins(record), ensure_ascii=False)
            return cls(record, text.encode(errors="replace").decode())

    @classmethod
    def read(cls, text: str, crc: int) -> Entry:
        """Raises `Unreadable`."""
        if checksum(str(text)) != crc:
            raise Unreadable("its checksum does not match")
        try:
            return cls(_decoder.decode(text), text)
        except msgspec.DecodeError as error:  # also a field that is missing or wrong
            raise Unreadable(str(error)) from error


def checksum(text: str) -> int:
    """SQLite has none of its own: it does not notice a flipped bit in a text."""
    return zlib.crc32(text.encode())


class Batch:
    """Values that go to the disk together, and what became of them: `kept` is None until that has been tried.

    Owned by the journal.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []  # in the order they came
        self.gone: set[str] = set()  # claim ids; deleted before the entries are written
        self.durable = False
        self.kept: bool | None = None

    def __bool__(self) -> bool:
        return bool(self.entries or self.gone)

    def has(self, claim_id: str) -> bool:
        return any(entry.record.claim_id == claim_id for entry in self.entries)

    def drop(self, claim_id: str) -> None:
        self.entries = [entry for entry in self.entries if entry.record.claim_id != claim_id]

    def latest(self) -> dict[str, Entry]:
        return {entry.record.claim_id: entry for entry in self.entries}
