"""Starts a run's process, so that it needs nothing of us afterwards: it outlives an agent that dies or is upgraded.

Own session, no input, output straight into a file (never a pipe: a flow whose reader is gone crashes at its next
print), no descriptor of ours.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from supervisor.errors import JobError
from supervisor.lifecycle import Exit, ProcessRef
from supervisor.process.brand import birth
from supervisor.process.cgroup import RunGroup
from supervisor.process.environ import MARK
from supervisor.process.reaper import expect
from supervisor.process.ref import identify

log = logging.getLogger(__name__)

# Joins the group named first, then becomes the program: the same process, so whatever the program does first is done in
# the group. Python can start nothing straight in a group (CLONE_INTO_CGROUP), and code of ours between fork and exec
# could hang for ever in a process with threads. A group that cannot be joined is no reason not to run.
_SHELL = "/bin/sh"
_JOIN = 'echo $$ >"$1/cgroup.procs"; shift; '
_BECOME = 'unset PWD OLDPWD SHLVL; exec "$@"'

# A unit may spare the agent when memory runs out (OOMScoreAdjust=). A run that had inherited that would be spared in place
# of the machine. To raise one's score everybody is allowed.
_OOM_SCORE = 0
_RESET_OOM_SCORE = "{{ echo {} >/proc/self/oom_score_adj; }} 2>/dev/null; "

# A shell drops variables that it could not name, and gives these a value of its own.
_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHELLS_OWN = re.compile(
    r"_|PWD|OLDPWD|SHLVL|IFS|OPT(IND|ARG|ERR)|PS[0-9]|E?UID|PPID|LINENO|RANDOM|SRANDOM|SECONDS|REPLY|GROUPS|DIRSTACK"
    r"|FUNCNAME|PIPESTATUS|MAPFILE|HISTCMD|SHELLOPTS|POSIXLY_CORRECT|ENV|(BASH|COMP_|READLINE_|EPOCH|KSH).*"
)


class Child:
    """A process we have started. It lives on when this object goes; ending it is `supervisor.process.stop`'s."""

    def __init__(self, process: trio.Process, ref: ProcessRef) -> None:
        self._process = process
        self.ref = ref

    def __repr__(self) -> str:
        return f"<Child {self.ref.pid}>"

    async def wait(self) -> Exit:
        """How it ended, as soon as it has. Any number of tasks may wait, and waiting can be given up."""
        return Exit.from_returncode(await self._process.wait())


async def launch(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, output: Path, group: RunGroup | None = None
) -> Child:
    """Start `argv` in its own session, with exactly `env`; what it prints is appended to the file `output`.

    With `group`, which is made when it is missing, it is in that group from its first instruction. A program without a
    slash is looked up in the PATH of `env`. Raises `JobError` when it cannot be started.
    """
    if not argv:
        raise JobError("cannot start the run: its command is empty")
    if group is not None and not group.create():
        group = None
    spared = is_spared()
    by_shell = (group is not None or spared) and _hands_on(argv[0], env)
    descriptor = open_output(output)
    try:
        if by_shell:
            _refuse(argv[0], env, cwd)
        async with birth(env.get(MARK)):
            process = await trio.lowlevel.open_process(
                [*(_by_shell(group, spared=spared) if by_shell else ()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=dict(env),
                cwd=os.fspath(cwd),
                start_new_session=True,
            )
    except OSError as error:
        # subprocess names the folder when it was the change into it that failed.
        where = f" in '{cwd}'" if error.filename == os.fspath(cwd) else ""
        raise JobError(f"cannot start '{argv[0]}'{where}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in an argument or value, '=' in a name: what the job says, not a bug of ours
        raise JobError(f"cannot start '{argv[0]}': {error} in its arguments or variables") from error
    finally:
        os.close(descriptor)
    ref = identify(process.pid)
    if ref is None:  # even one that ended at once is there as a zombie until `wait` has fetched its status
        raise RuntimeError(f"internal error: the process {process.pid} that was just started is not in /proc")
    expect(ref)
    if group is not None and not by_shell:
        group.add(process.pid)
    if spared and not by_shell:
        unspare(process.pid)
    return Child(process, ref)


def is_spared() -> bool:
    """Whether the kernel prefers others to us, and so to our children, when it must kill somebody for his memory."""
    try:
        return int(Path("/proc/self/oom_score_adj").read_text()) < _OOM_SCORE
    except (OSError, ValueError):
        return False


def unspare(pid: int) -> None:
    """Lets the kernel take that process like any other when memory runs out."""
    with contextlib.suppress(OSError):  # it has ended
        Path(f"/proc/{pid}/oom_score_adj").write_text(f"{_OOM_SCORE}")


def _by_shell(group: RunGroup | None, *, spared: bool) -> list[str]:
    script = (_RESET_OOM_SCORE.format(_OOM_SCORE) if spared else "") + (_JOIN if group else "") + _BECOME
    return [_SHELL, "-c", script, _SHELL, *([os.fspath(group.path)] if group else [])]


def _hands_on(program: str, env: Mapping[str, str]) -> bool:
    """Whether a shell starts the program by that name and with exactly these variables.

    If not, the process is moved into its group, and its score set, just after its start: its variables matter more than that
    moment.
    """
    if program.startswith("-") or "PATH" not in env or not os.access(_SHELL, os.X_OK):
        return False
    return all(_SHELL_NAME.fullmatch(name) and not _SHELLS_OWN.fullmatch(name) for name in env)


def _refuse(program: str, env: Mapping[str, str], cwd: Path) -> None:
    """Raise the `OSError` that starting the program would raise: from behind the shell it could not be told.

    The shell runs a text file without "#!" as a script of its own, as execvp(3) does; that is left to it.
    """
    if not cwd.is_dir():
        return  # the start itself will say so
    error = errno.ENOENT
    for folder in [""] if "/" in program else os.get_exec_path(env):
        path = cwd / folder / program
        if path.is_file() and os.access(path, os.X_OK, effective_ids=True):
            if _interpreted(path, cwd):
                return
            break  # the kernel says ENOENT of the program when it means the interpreter
        if path.exists():
            error = errno.EACCES
    raise OSError(error, os.strerror(error))


def _interpreted(path: Path, cwd: Path) -> bool:
    """Whether the interpreter that a script names in its first line is there; true for what is no script."""
    try:
        with path.open("rb") as file:
            first = file.readline(4096)
    except OSError:
        return True  # may be executed and not read
    words = first[2:].split() if first.startswith(b"#!") else []
    return not words or (cwd / os.fsdecode(words[0])).exists()


def open_output(output: Path) -> int:
    """Append only: the rerun of a run goes on in the same file, and nobody's write can destroy another's."""
    try:
        return os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as error:
        raise JobError(f"cannot write the run's output to '{output}': {error.strerror or error}") from error


def private_directory(parent: Path, run_id: str) -> Path:
    """The run's own folder in `parent`, which only this user can enter; made when it is missing. Raises `JobError`.

    The same for every process of the run: its engine, started once more or not, and its hooks.
    """
    directory = parent / run_id
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise JobError(f"cannot use the working directory '{directory}': it is a link or another user's; remove it")
        directory.chmod(0o700)
    except OSError as error:
        raise JobError(f"cannot make the working directory '{directory}': {error.strerror or error}") from error
    return directory


async def remove_directory(path: Path) -> None:
    """Remove the folder with all that is in it; it may be gone already. Symbolic links are removed, not followed.

    What cannot be removed is logged and left: the run has ended, whatever its folder holds.
    """
    await trio.to_thread.run_sync(partial(_remove, path))


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return
    try:
        _open_up(path)  # a flow may have made folders that not even their owner can write
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("cannot remove the working directory '%s': %s", path, error.strerror or error)


def _open_up(top: Path) -> None:
    _let_owner_in(top)
    for folder, names, _ in os.walk(top):  # top down: a folder is opened before it is listed
        for name in names:
            _let_owner_in(Path(folder, name))


def _let_owner_in(folder: Path) -> None:
    # lchmod does not exist on Linux; a handle that refuses links does the same without a race.
    try:
        handle = os.open(folder, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # a link, or gone
    try:
        Path(f"/proc/self/fd/{handle}").chmod(stat.S_IRWXU)
    finally:
        os.close(handle)
