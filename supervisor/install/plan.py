"""What is to be done with each file, decided from what we bring, what lies there, and what we brought the last time."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath

import msgspec

# In place of a digest:
LINK = "a link"  # whoever made it one did not get it from us
HIDDEN = "hidden"  # only shown, for nobody but root installs


class Item(msgspec.Struct, frozen=True):
    """One plain file that we bring. It belongs to root."""

    path: PurePosixPath
    content: bytes
    mode: int = 0o644

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()


class Verdict(enum.StrEnum):
    """What becomes of a file."""

    NEW = "new"
    SAME = "as it is"
    REPLACED = "replaced"
    KEPT = "kept"  # somebody has changed it since we brought it, or it never was ours
    UNKNOWN = "not for this user to see"
    REMOVED = "removed"  # we brought it once and do so no more


class Step(msgspec.Struct, frozen=True):
    """What becomes of one file. `content` is what to write to `write_to`; None where nothing is written."""

    path: PurePosixPath
    verdict: Verdict
    mode: int = 0o644
    content: bytes | None = None
    write_to: PurePosixPath | None = None


def plan(
    items: Iterable[Item], found: Callable[[PurePosixPath], str | None], brought: Mapping[PurePosixPath, str]
) -> tuple[Step, ...]:
    """A step for each item, and for each file that was brought the last time and is not one of them.

    `found` tells the digest of what lies there, None for nothing, or `LINK` or `HIDDEN`. `brought` are the digests of the
    last time.
    """
    items = list(items)
    steps = [_step(item, found(item.path), brought.get(item.path)) for item in items]
    for path in sorted(set(brought) - {item.path for item in items}):
        there = found(path)
        if there is not None:
            steps.append(Step(path, Verdict.REMOVED if there == brought[path] else Verdict.KEPT))
    return tuple(steps)


def _step(item: Item, there: str | None, brought: str | None) -> Step:
    if there == HIDDEN:
        return Step(item.path, Verdict.UNKNOWN, item.mode)
    if there is None:
        return Step(item.path, Verdict.NEW, item.mode, item.content, item.path)
    if there == item.digest:
        return Step(item.path, Verdict.SAME, item.mode)
    if there == brought:
        return Step(item.path, Verdict.REPLACED, item.mode, item.content, item.path)
    if brought == item.digest:  # nothing is new for whoever changed it
        return Step(item.path, Verdict.KEPT, item.mode)
    # systemd reads no file of such a name, neither as a unit nor as a drop-in.
    return Step(item.path, Verdict.KEPT, item.mode, item.content, item.path.with_name(f"{item.path.name}.new"))


def write_list(items: Iterable[Item]) -> bytes:
    """What was brought, in the format of `sha256sum`, which can check it."""
    return "".join(f"{item.digest}  {item.path}\n" for item in items).encode()


def read_list(text: str) -> dict[PurePosixPath, str]:
    """The digests of `write_list`."""
    split = (line.partition("  ") for line in text.splitlines())
    return {PurePosixPath(path): digest for digest, _, path in split if path}
