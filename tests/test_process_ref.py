"""supervisor/process/ref.py: a process is known by pid, start time and boot, whatever its name and state."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.lifecycle import ProcessRef
from supervisor.process.ref import alive, identify, read_stat, same


def sleeper(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv or (sys.executable, "-c", "input()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def let_go(process: subprocess.Popen[bytes]) -> None:
    process.communicate()


def test_a_living_process_is_alive_and_has_the_same_identity_each_time() -> None:
    process = sleeper()
    ref = identify(process.pid)
    assert ref is not None
    assert ref.pid == process.pid
    assert ref == identify(process.pid)
    assert alive(ref)
    let_go(process)
    assert not alive(ref)
    assert identify(process.pid) is None


def test_a_zombie_can_be_identified_but_is_not_alive() -> None:
    process = sleeper()
    ref = identify(process.pid)
    assert ref is not None
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its status is still there to fetch
    assert identify(process.pid) == ref
    assert same(ref) is not None
    assert not alive(ref)
    process.stdin = None
    let_go(process)
    assert same(ref) is None


@pytest.mark.parametrize("name", ["a) R 1 (b", "(((", ") ) )", "blank name"])
def test_a_name_with_parentheses_and_blanks_is_read_past(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    shutil.copy("/bin/cat", program)
    process = sleeper(os.fspath(program))
    stat = read_stat(process.pid)
    assert stat is not None
    assert stat.parent == os.getpid()
    assert stat.session == os.getsid(0)
    assert stat.group == os.getpgid(process.pid)
    ref = identify(process.pid)
    assert ref is not None
    assert alive(ref)
    let_go(process)


def test_a_reused_number_or_another_boot_is_not_the_same_process() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert alive(me)
    assert not alive(ProcessRef(pid=me.pid, start_ticks=me.start_ticks + 1, boot_id=me.boot_id))
    assert not alive(ProcessRef(pid=me.pid, start_ticks=me.start_ticks, boot_id="yesterday"))


def test_a_number_nobody_has_is_nobody() -> None:
    assert identify(2**22 + 1) is None


def test_a_process_whose_main_thread_has_ended_lives_on_while_another_works() -> None:
    script = (
        "import ctypes, sys, threading, time\n"
        "def work():\n"
        "    while open('/proc/self/stat').read().rpartition(')')[2].split()[0] != 'Z': time.sleep(0.01)\n"
        "    print('alone', flush=True)\n"
        "    sys.stdin.read()\n"
        "    import os; os._exit(0)\n"
        "threading.Thread(target=work).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    process = sleeper(sys.executable, "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"alone\n"
    stat = read_stat(process.pid)
    assert stat is not None
    assert stat.state == "Z"
    ref = identify(process.pid)
    assert ref is not None
    assert alive(ref)
    let_go(process)
    assert not alive(ref)


def test_a_process_that_proc_hides_from_us_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    process = sleeper()
    ref = identify(process.pid)
    assert ref is not None

    def refuse(pid: int, name: str) -> bytes:  # hidepid=1 and 4
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"/proc/{pid}/{name}")

    with monkeypatch.context() as hidden:
        hidden.setattr("supervisor.process.ref.read_proc", refuse)
        assert read_stat(process.pid) is None
        assert not alive(ref)
    let_go(process)
