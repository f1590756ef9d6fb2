"""Files written beside their places and renamed into them once all of them are written.

What can fail (a full disk, a read-only file system) fails while nothing has been changed yet. A rename needs no room, and
a program that runs keeps the file it was started from.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from supervisor.install.bundle import CannotInstall

_MARK = ".flow-agent-"  # in front of the names of what is not in its place yet


class Staging:
    """Owns what has been written and is not in its place yet, and the folders made for it; removes both unless committed.

    Everything raises `CannotInstall` that the disk does not allow.
    """

    def __init__(self) -> None:
        self._written: list[tuple[Path, Path]] = []
        self._folders: list[Path] = []
        self._committed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for written, _ in self._written:
            if written.is_dir() and not written.is_symlink():
                shutil.rmtree(written, ignore_errors=True)
            else:
                with suppress(OSError):
                    written.unlink(missing_ok=True)
        if not self._committed:
            for folder in reversed(self._folders):
                with suppress(OSError):  # somebody else has put something into it
                    folder.rmdir()

    def file(self, place: Path, content: bytes, mode: int) -> None:
        """A plain file."""
        with self._beside(place):
            handle, name = tempfile.mkstemp(prefix=_MARK, dir=place.parent)
            self._written.append((Path(name), place))
            with open(handle, "wb") as file:  # noqa: PTH123 - it is open already
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())

    def link(self, place: Path, target: str) -> None:
        """A symbolic link; it takes the place of a file, too."""
        with self._beside(place):
            name = place.with_name(f"{_MARK}{os.getpid()}-{place.name}")
            self._written.append((name, place))
            name.symlink_to(target)

    def folder(self, place: Path, source: Path, name: str) -> None:
        """A copy of a folder, for everybody to read; if the source is a file, a folder with that in it under that name."""
        with self._beside(place):
            made = Path(tempfile.mkdtemp(prefix=_MARK, dir=place.parent))
            self._written.append((made, place))
            if source.is_dir():
                shutil.copytree(source, made, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(source, made / name)
            for one in (made, *made.rglob("*")):
                if one.is_symlink():
                    continue
                one.chmod(0o755 if one.is_dir() or one.stat().st_mode & 0o100 else 0o644)
                if one.is_file():
                    _sync(one)

    def commit(self) -> None:
        """Puts everything in its place, in the order in which it was written."""
        self._committed = True
        done: list[str] = []
        while self._written:
            written, place = self._written[0]
            try:
                written.replace(place)
            except OSError as error:
                so_far = f"new already: {', '.join(done)}" if done else "nothing has been changed"
                raise CannotInstall(f"cannot install: {place}: {error.strerror}; {so_far}") from error
            self._written.pop(0)
            done.append(str(place))

    @contextmanager
    def _beside(self, place: Path) -> Iterator[None]:
        """Makes the place's folder, and those above it, for everybody to read whatever the umask is."""
        try:
            for folder in reversed([one for one in place.parents if not one.exists()]):
                folder.mkdir()
                self._folders.append(folder)
                folder.chmod(0o755)
            yield
        except OSError as error:
            raise CannotInstall(
                f"cannot install: {place} cannot be written: {error.strerror or error}; nothing has been changed"
            ) from error


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
