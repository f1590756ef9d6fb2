"""A flow that does what flows do: each ability is tried, and what fails is said by name."""

import ctypes
import mmap
import multiprocessing
import multiprocessing.shared_memory
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from prefect import flow, task

PTRACE_ATTACH, PTRACE_DETACH = 16, 17


@task
def squared(number):
    return number * number


def tasks():
    assert [future.result() for future in [squared.submit(n) for n in range(3)]] == [0, 1, 4]


def threads():
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(abs, range(100))) == 4950


def processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]


def programs():
    assert subprocess.run(["sh", "-c", "echo $((6 * 7)) | cat"], capture_output=True, text=True).stdout == "42\n"


def sockets():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        with connection:
            client.sendall(b"x")
            assert connection.recv(1) == b"x"
    ours, theirs = socket.socketpair()
    ours.close(), theirs.close()


def interfaces():
    assert "lo" in [name for _, name in socket.if_nameindex()]


def working_directory():
    Path("sub").mkdir()
    Path("sub/file").write_text("something")
    Path("sub/file").rename("file")
    os.link("file", "hard")
    Path("soft").symlink_to("file")
    os.mkfifo("fifo")
    assert Path("soft").read_text() == "something"


def programs_of_its_own():
    script = Path("script")
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    assert subprocess.run([script.resolve()]).returncode == 7


def temporary_files():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").write_text("x")
    assert os.environ.get("CACHE_DIRECTORY", "/var/cache/flow-agent") not in tempfile.gettempdir()


def database():
    with sqlite3.connect("data.db") as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("create table t (n int)")
        connection.execute("insert into t values (1)")
    assert sqlite3.connect("data.db").execute("select n from t").fetchone() == (1,)


def shared_memory():
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
    block.close()
    block.unlink()


def code_made_at_run_time():
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as memory:
        memory.write(b"\xb8\x2a\x00\x00\x00\xc3")  # mov eax, 42; ret
        call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        answer = call()
        del call
    assert answer == 42


def debuggers():
    """gdb, strace and py-spy look into another process of the same user, which asks for it here."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            "import ctypes, time; ctypes.CDLL(None).prctl(0x59616D61, -1); print(1, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    child.stdout.read(1)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    attached = libc.ptrace(PTRACE_ATTACH, child.pid, None, None)
    why = os.strerror(ctypes.get_errno())
    if attached == 0:
        os.waitpid(child.pid, os.WUNTRACED)
        libc.ptrace(PTRACE_DETACH, child.pid, None, None)
    child.kill()
    child.wait()
    assert attached == 0, why


def signals_and_clocks():
    seen = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda *_: seen.set())
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen.wait(5)
    os.nice(1)
    os.sched_getaffinity(0)
    time.monotonic()


def sudo():
    done = subprocess.run(["sudo", "-n", "id", "-u"], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


ABILITIES = (
    tasks,
    threads,
    processes,
    programs,
    sockets,
    interfaces,
    working_directory,
    programs_of_its_own,
    temporary_files,
    database,
    shared_memory,
    code_made_at_run_time,
    debuggers,
    signals_and_clocks,
)


@flow
def abilities(with_sudo: bool = False):
    missing = []
    for ability in (*ABILITIES, *([sudo] if with_sudo else [])):
        try:
            ability()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is named
            missing.append(f"{ability.__name__}: {type(error).__name__}: {error}")
    if missing:
        raise RuntimeError("; ".join(missing))
    print("able to do all of it")
