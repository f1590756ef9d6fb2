#!/usr/bin/env python3
"""The oldest glibc that can run the binary: the newest version of its symbols that any ELF file inside asks for.

    python packaging/binary/glibc.py [DIST]

Reads each file's table of needed versions (.gnu.version_r), also of those that the one file unpacks.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

Version = tuple[int, ...]
_NEEDS = 0x6FFFFFFE  # section type SHT_GNU_verneed
_COOKIE = b"MEI\014\013\012\013\016"


def needed(elf: bytes) -> Version:
    """The newest GLIBC_ version that this ELF file asks for; (0,) when it asks for none."""
    if elf[:4] != b"\x7fELF":
        return (0,)
    if elf[4:6] != b"\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    table, size, count = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + number * size) for number in range(count)]
    found: list[Version] = [(0,)]
    for _, kind, _, _, offset, _, link, entries, _, _ in sections:
        if kind == _NEEDS:
            names = sections[link][4]
            found += [_version(elf, names + name) for name in _names(elf, offset, entries)]
    return max(found)


def _names(elf: bytes, at: int, files: int) -> Iterator[int]:
    """Where in the table of names each needed version is called by its name."""
    for _ in range(files):
        _, count, _, first, following = struct.unpack_from("<HHIII", elf, at)
        entry = at + first
        for _ in range(count):
            *_, name, after = struct.unpack_from("<IHHII", elf, entry)
            yield name
            entry += after
        at += following


def _version(elf: bytes, at: int) -> Version:
    name = elf[at : elf.index(b"\0", at)].decode()
    numbers = re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", name)
    return tuple(map(int, numbers[1].split("."))) if numbers else (0,)


def unpacked(onefile: Path) -> Iterator[tuple[str, bytes]]:
    """The files that the one file unpacks at its start, and its start program under the name of the whole."""
    data = onefile.read_bytes()
    yield onefile.name, data
    cookie = data.rindex(_COOKIE)
    length, table, size = struct.unpack_from("!III", data, cookie + 8)
    start = cookie + 88 - length
    at, end = start + table, start + table + size
    while at < end:
        entry, offset, packed, _, compressed, kind = struct.unpack_from("!IIIIBc", data, at)
        name = data[at + 18 : at + entry].rstrip(b"\0").decode()
        if kind in b"bx":
            content = data[start + offset : start + offset + packed]
            yield name, zlib.decompress(content) if compressed else content
        at += entry


def floor(path: Path) -> Version:
    """Of one form: a folder, or the one file."""
    if path.is_dir():
        return max(needed(file.read_bytes()) for file in path.rglob("*") if file.is_file())
    return max(needed(content) for _, content in unpacked(path))


def report(dist: Path) -> dict[str, Version]:
    """Prints what each form needs and returns it."""
    found = {name: floor(dist / name) for name in ("flow-agent", "onedir")}
    for name, version in found.items():
        print(f"{dist / name}: glibc {'.'.join(map(str, version))} or newer")
    return found


if __name__ == "__main__":
    report(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
