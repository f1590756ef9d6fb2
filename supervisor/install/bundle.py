"""What this binary carries besides the program, and where each file belongs when nobody packaged it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

import supervisor
from supervisor.errors import FlowAgentError
from supervisor.frozen import is_frozen
from supervisor.install.plan import Item

COMMAND = PurePosixPath("/usr/local/bin/flow-agent")
PROGRAMS = PurePosixPath("/usr/local/lib/flow-agent")  # a folder of its own for each build, and the list of files
CONFIG = PurePosixPath("/etc/flow-agent/agent.toml")
SYSUSERS = PurePosixPath("/usr/local/lib/sysusers.d/flow-agent.conf")
UNITS = PurePosixPath("/etc/systemd/system")
TMPFILES = PurePosixPath("/usr/local/lib/tmpfiles.d/flow-agent.conf")
_EXAMPLES = PurePosixPath("/usr/local/share/doc/flow-agent/examples")
_PACKAGED_COMMAND = b"/usr/bin/flow-agent"  # as it stands in the units
# What of a package's root goes along, and where it goes to.
_ALONG = {
    "usr/share/man": PurePosixPath("/usr/local/share/man"),
    "usr/share/bash-completion/completions": PurePosixPath("/usr/local/share/bash-completion/completions"),
    "usr/share/zsh/vendor-completions": PurePosixPath("/usr/local/share/zsh/site-functions"),
    "usr/share/fish/vendor_completions.d": PurePosixPath("/usr/local/share/fish/vendor_completions.d"),
}


class CannotInstall(FlowAgentError):
    """The installation is refused or failed; the sentence says why, and what has been changed."""


class Bundle(msgspec.Struct, frozen=True):
    """A binary as it was downloaded."""

    program: Path  # the executable file
    share: Path  # the folder of the files it carries
    whole: bool  # the program is one file, which unpacks itself; else its folder belongs to it

    @property
    def name(self) -> str:
        """What the program is called once it is installed. A single file may have been downloaded under a longer name."""
        return "flow-agent" if self.whole else self.program.name

    @property
    def build(self) -> str:
        """What tells this build from every other: the version and a digest of the program."""
        digest = hashlib.sha256()
        for file in [self.program] if self.whole else sorted(self.program.parent.rglob("*")):
            if file.is_file():
                digest.update(file.read_bytes())
        return f"{supervisor.__version__}-{digest.hexdigest()[:8]}"

    def items(self) -> tuple[Item, ...]:
        """Every file but the program itself. Raises `CannotInstall` when the binary carries them not."""
        try:
            return tuple(self._items())
        except OSError as error:
            raise CannotInstall(
                f"cannot install: {error.filename} is missing, which this binary should carry; download it anew"
            ) from error

    def _items(self) -> Iterator[Item]:
        units, root = self.share / "systemd", self.share / "root"
        for name in ("flow-agent.service", "flow-agent@.service"):
            yield Item(UNITS / name, _relocated(units / name))
            if self.whole:
                yield Item(UNITS / f"{name}.d" / "10-onefile.conf", _relocated(units / "onefile.conf"))
        yield Item(SYSUSERS, (root / "usr/lib/sysusers.d/flow-agent.conf").read_bytes())
        yield Item(TMPFILES, (root / "usr/lib/tmpfiles.d/flow-agent.conf").read_bytes())
        yield Item(CONFIG, (self.share / "agent.toml.example").read_bytes())
        yield Item(_EXAMPLES / "hardening.conf", (units / "hardening.conf").read_bytes())
        for source, target in _ALONG.items():
            for file in sorted((root / source).rglob("*")):
                if file.is_file():
                    yield Item(target / file.relative_to(root / source), file.read_bytes())


def own_bundle() -> Bundle:
    """That of the running binary. Raises `CannotInstall` when it is none."""
    if not is_frozen():
        raise CannotInstall(
            f"cannot install: this flow-agent is part of the Python environment {sys.prefix}, and only the binary can be "
            "put anywhere else; download that, or write a unit that starts this one"
        )
    base = Path(getattr(sys, "_MEIPASS"))  # noqa: B009 - there in a packed binary only, and unknown to type checkers
    # A one-file program unpacks into a folder of this name; the other has a fixed one beside it.
    return Bundle(Path(sys.executable).resolve(), base / "share", base.name.startswith("_MEI"))


def _relocated(unit: Path) -> bytes:
    return unit.read_bytes().replace(_PACKAGED_COMMAND, str(COMMAND).encode())
