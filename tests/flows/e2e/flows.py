"""The flows of the end-to-end tests, the same for every Prefect from 2.20 on.

`trace` names a file to which each execution of a body appends one line "RUN_ID PID": proof that it started, and how
often. `hooks` names a file to which each hook appends one line "KIND RUN_ID STATE".
"""

import asyncio
import atexit
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from prefect import flow, pause_flow_run, suspend_flow_run

RUN_ID = os.environ.get("PREFECT__FLOW_RUN_ID", "")


def append(path, line):
    if path:
        with Path(path).open("a") as file:
            file.write(f"{line}\n")


def mark(trace):
    append(trace, f"{RUN_ID} {os.getpid()}")


def on_cancellation(flow, flow_run, state):
    append(flow_run.parameters.get("hooks"), f"cancellation {flow_run.id} {state.name}")


def on_crashed(flow, flow_run, state):
    append(flow_run.parameters.get("hooks"), f"crashed {flow_run.id} {state.name}")


def on_failure(flow, flow_run, state):
    append(flow_run.parameters.get("hooks"), f"failure {flow_run.id} {state.name}")


def by_place(a, b, c):
    on_crashed(a, b, c)


def by_name(*, flow, flow_run, state):
    on_crashed(flow, flow_run, state)


HOOKS = {"on_cancellation": [on_cancellation], "on_crashed": [on_crashed], "on_failure": [on_failure]}


@flow
def hello(name: str = "world", trace: str = ""):
    mark(trace)
    print(f"hello {name}")


@flow
def failing(trace: str = ""):
    mark(trace)
    raise RuntimeError("this flow fails on purpose")


@flow
def sleeper(seconds: float = 600, trace: str = ""):
    mark(trace)
    time.sleep(seconds)


@flow
async def async_sleeper(seconds: float = 600, trace: str = ""):
    mark(trace)
    await asyncio.sleep(seconds)


@flow
def hard_exit(code: int = 3, trace: str = ""):
    mark(trace)
    print("last words before os._exit", flush=True)
    os._exit(code)


@flow
def soft_exit(code: int = 4, trace: str = ""):
    mark(trace)
    sys.exit(code)


@flow
def kill_self(trace: str = "", signum: int = 9):
    mark(trace)
    print("last words before the signal", flush=True)
    os.kill(os.getpid(), signum)
    time.sleep(600)


@flow(retries=1, retry_delay_seconds=int(os.environ.get("E2E_RETRY_DELAY", "1")))
def retrying(trace: str):
    """Fails the first time, completes the second."""
    mark(trace)
    if len(Path(trace).read_text().splitlines()) < 2:
        raise RuntimeError("the first attempt fails on purpose")


@flow
def pauser(timeout: int = 600, trace: str = ""):
    mark(trace)
    pause_flow_run(timeout=timeout, poll_interval=1)


@flow
def suspender(timeout: int = 600, trace: str = ""):
    mark(trace)
    suspend_flow_run(timeout=timeout, key="once")
    append(trace, f"{RUN_ID} resumed")


@flow
def lingering(fail: bool = False, trace: str = ""):
    """Has ended and been reported long before its process is gone."""
    mark(trace)
    atexit.register(time.sleep, 600)
    if fail:
        raise RuntimeError("this flow fails on purpose")


DAEMON = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
open(sys.argv[1] + ".part", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""


DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").close()
time.sleep(600)
"""


@flow
def spawner(pids: str, seconds: float = 600, trace: str = ""):
    """Starts children that get away from a plain kill and writes {kind: pid} as JSON to the file `pids`."""
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    children = {
        "plain": subprocess.Popen(sleep).pid,
        "group": subprocess.Popen(sleep, process_group=0).pid
        if sys.version_info >= (3, 11)
        else subprocess.Popen(sleep, preexec_fn=os.setpgrp).pid,
        "session": subprocess.Popen(sleep, start_new_session=True).pid,
        # Without the run's mark and in sessions of their own: only the process tree tells whose they are. The second
        # ignores SIGTERM, so that its parent is gone before it.
        "bare": subprocess.Popen(sleep, env={}, start_new_session=True).pid,
        "deaf": subprocess.Popen(
            [sys.executable, "-S", "-c", DEAF, f"{pids}.deaf"], env={}, start_new_session=True
        ).pid,
    }
    subprocess.run([sys.executable, "-S", "-c", DAEMON, f"{pids}.daemon"], check=True)
    while not (Path(f"{pids}.daemon").exists() and Path(f"{pids}.deaf").exists()):
        time.sleep(0.02)
    children["daemon"] = int(Path(f"{pids}.daemon").read_text())
    Path(f"{pids}.part").write_text(json.dumps(children))
    Path(f"{pids}.part").rename(pids)
    mark(trace)
    time.sleep(seconds)


@flow
def deaf(seconds: float = 600, trace: str = ""):
    """Ignores SIGTERM. Through libc, because Python only lets the main thread say so and flows may run in others."""
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))
    mark(trace)
    time.sleep(seconds)


@flow(**HOOKS)
def hooked_deaf(hooks: str, seconds: float = 600, trace: str = ""):
    """As `deaf`."""
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))
    mark(trace)
    time.sleep(seconds)


@flow(**HOOKS)
def hooked_sleeper(hooks: str, seconds: float = 600, trace: str = ""):
    mark(trace)
    time.sleep(seconds)


@flow(**HOOKS)
async def hooked_async_sleeper(hooks: str, seconds: float = 600, trace: str = ""):
    mark(trace)
    await asyncio.sleep(seconds)


def dawdle(flow, flow_run, state):
    on_cancellation(flow, flow_run, state)
    time.sleep(3)


@flow(on_cancellation=[dawdle])
def dawdler(hooks: str, go: str, trace: str = ""):
    """Ends when it is let go; when it has been cancelled by then, its hook takes longer than a look for cancelled runs."""
    mark(trace)
    while not Path(go).exists():
        time.sleep(0.05)


@flow(**{**HOOKS, "on_crashed": [by_place]})
def hooked_kill_self(hooks: str, signum: int = 9, trace: str = ""):
    mark(trace)
    os.kill(os.getpid(), signum)
    time.sleep(600)


@flow(**{**HOOKS, "on_crashed": [by_name]})
def hooked_hard_exit(hooks: str, code: int = 3, trace: str = ""):
    mark(trace)
    os._exit(code)


@flow(**HOOKS)
def hooked_failing(hooks: str, trace: str = ""):
    mark(trace)
    raise RuntimeError("this flow fails on purpose")


@flow
def env_dump(path: str, trace: str = ""):
    """Writes {"environ": …, "cwd": …, "argv": …, "executable": …} as JSON."""
    seen = {"environ": dict(os.environ), "cwd": str(Path.cwd()), "argv": sys.argv, "executable": sys.executable}
    Path(f"{path}.part").write_text(json.dumps(seen))
    Path(f"{path}.part").rename(path)
    mark(trace)


@flow
def cwd_writer(name: str = "written-by-a-flow", trace: str = ""):
    Path(name).write_text("something")
    append(trace, str(Path.cwd()))


@flow
def talker(seconds: float = 600, trace: str = ""):
    """Says "word N" every twentieth of a second."""
    mark(trace)
    for number in range(int(seconds * 20)):
        print(f"word {number}", flush=True)
        time.sleep(0.05)


@flow
def chatty(lines: int = 5000, trace: str = ""):
    mark(trace)
    for number in range(lines):
        print(f"line {number} of {lines}")
    print("an error line", file=sys.stderr)
