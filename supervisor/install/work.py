"""One installation: decided first, then shown or carried out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath

import msgspec

import supervisor
from supervisor.install.bundle import COMMAND, CONFIG, PROGRAMS, Bundle, CannotInstall
from supervisor.install.machine import Machine
from supervisor.install.plan import Item, Step, Verdict, plan, read_list, write_list
from supervisor.install.staging import Staging

LIST = PROGRAMS / "installed.sha256"
# What decides how the machine behaves is shown whole; man pages and completions are only named.
_SHOWN = ("/etc/", "/usr/local/lib/")

Tell = Callable[[str], object]


class Work(msgspec.Struct, frozen=True):
    """What is to be done on that machine."""

    bundle: Bundle
    machine: Machine
    items: tuple[Item, ...]
    steps: tuple[Step, ...]
    commands: tuple[tuple[str, ...], ...]
    folder: PurePosixPath  # of this build's program
    known: bool  # this build is there already

    @property
    def link(self) -> str:
        """Where the command's link points."""
        return f"../lib/flow-agent/{self.folder.name}/{self.bundle.name}"


def prepare(bundle: Bundle, machine: Machine) -> Work:
    """Looks at both and changes nothing. Raises `CannotInstall` when one of them cannot be read."""
    items = bundle.items()
    folder = PROGRAMS / bundle.build
    brought = read_list(machine.read(LIST).decode())
    return Work(
        bundle,
        machine,
        items=items,
        steps=plan(items, machine.digest, brought),
        commands=machine.commands(),
        folder=folder,
        known=machine.at(folder).exists(),
    )


def show(work: Work, tell: Tell) -> None:
    """Every file with its mode, the text of those that decide something, and every command."""
    tell("This is what would be done. All files belong to root.\n")
    for line in _table(work):
        tell(line)
    for item in work.items:
        if str(item.path).startswith(_SHOWN):
            tell(f"\n==> {item.path} <==\n{item.content.decode().rstrip()}")
    tell("\n==> commands <==")
    for command in work.commands:
        tell(" ".join(command))
    if refusal := work.machine.refusal(work.bundle.program):
        tell(f"\nAs things are it would be refused: {refusal}")


def carry_out(work: Work, tell: Tell) -> None:
    """Puts everything in its place and says what comes next.

    Raises `CannotInstall`; until all files are written it has changed nothing then, and later it says what it has done.
    """
    if refusal := work.machine.refusal(work.bundle.program):
        raise CannotInstall(f"cannot install: {refusal}")
    _put(work)
    _clear(work)
    for line in _table(work):
        tell(line)
    try:
        for command in work.commands:
            work.machine.run(command)
            tell(" ".join(command))
    except CannotInstall as error:
        raise CannotInstall(f"all files are in their places, but {error}; run this again when that is mended") from None
    for line in _next(work):
        tell(line)


def _put(work: Work) -> None:
    at = work.machine.at
    bundle = work.bundle
    with Staging() as staging:
        if not work.known:
            staging.folder(at(work.folder), bundle.program if bundle.whole else bundle.program.parent, bundle.name)
        for step in work.steps:
            if step.content is not None and step.write_to is not None:
                staging.file(at(step.write_to), step.content, step.mode)
        # The link is turned when the units that go with the program are in place, and the list tells what has been done.
        staging.link(at(COMMAND), work.link)
        staging.file(at(LIST), write_list(work.items), 0o644)
        staging.commit()


def _clear(work: Work) -> None:
    """Removes what we brought earlier and do so no more, and builds that nobody uses."""
    at = work.machine.at
    for step in work.steps:
        if step.verdict is Verdict.REMOVED:
            at(step.path).unlink(missing_ok=True)
            with suppress(OSError):  # there are others in it
                at(step.path).parent.rmdir()
    for build in work.machine.idle_builds(work.folder.name):
        shutil.rmtree(at(build), ignore_errors=True)


def _table(work: Work) -> Iterator[str]:
    yield f"0755  {work.folder}/{work.bundle.name}  {Verdict.SAME if work.known else Verdict.NEW}"
    for step in work.steps:
        words = str(step.verdict)
        if step.verdict is Verdict.KEPT:
            words += ": it is not as we brought it" + (f"; ours is {step.write_to}" if step.write_to else "")
        yield f"{step.mode:04o}  {step.path}  {words}"
    yield f"link  {COMMAND} -> {work.link}"
    yield f"0644  {LIST}"


def _next(work: Work) -> Iterator[str]:
    version = f"flow-agent {supervisor.__version__}"
    if enabled := work.machine.enabled():
        yield f"\n{version} is installed. What runs is the one before until it is restarted; flow runs do not notice. Next:\n"
        yield f"  {COMMAND} check"
        yield f"  systemctl restart {' '.join(unit.removesuffix('.service') for unit in enabled)}"
        return
    yield f"\n{version} is installed, and not started. Say in {CONFIG} where your server is, then:\n"
    yield f"  {COMMAND} check --server"
    yield "  systemctl enable --now flow-agent"
