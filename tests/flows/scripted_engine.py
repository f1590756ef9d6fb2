"""Stands for a Python with Prefect where hundreds of runs are wanted: a real engine takes seconds, this one milliseconds.

Copied to a file named `python-VERSION`, made executable and given to the agent as `flows.python`, it plays all that an agent asks
of such a Python: which Prefect it has (`-c QUESTION`), the engine (`-m prefect.engine`), the helper that runs hooks
(`-c HELPER KIND MESSAGE`) and the fork server (`-c PROGRAM LINE`), unless a file named `refuses` stands beside it. What the
run shall do stands in its parameters:

    outcome   completes, fails, crashes (kills itself) or is cancelled (waits for its signal)
    trace     a file that gets the line "RUN_ID PID" once the server has accepted RUNNING: the body has begun
    hooks     a file that gets the line "KIND RUN_ID" for each hook
    go        a file for which the body waits before it ends; none: it ends at once
    seconds   how long the body takes at least

Each run leaves a child behind.

As in Prefect 3.6.27 and later, and not in 2.x, it connects to the control channel and answers for its own hooks: asked to
cancel, it reports CANCELLED on SIGTERM; not asked, it takes the signal for a crash. That of 2.x dies without a word.
"""

import json
import os
import signal
import socket
import sys
import threading
import time

VERSION = os.path.basename(sys.argv[0]).partition("-")[2]  # noqa: PTH119 - importing pathlib takes as long as all the rest
NATIVE = not VERSION.startswith("2.")  # it has a control channel and runs its own hooks


def call(method: str, path: str, body: object = None) -> dict:
    """One request, repeated while a busy server on SQLite has no time. By hand: importing urllib takes 0.1 s."""
    _, _, host, root = os.environ["PREFECT_API_URL"].split("/", 3)
    data = b"" if body is None else json.dumps(body).encode()
    # The User-Agent is that of an engine: 3.x takes the concurrency slot away from others.
    head = f"{method} /{root}{path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: prefect/3.8.8 (API 0.8.4)\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    for _ in range(200):
        with socket.create_connection(tuple(host.rsplit(":", 1)), timeout=30) as connection:
            connection.sendall(head.encode() + data)
            with connection.makefile("rb") as stream:
                answer = stream.read()
        status = int(answer.split(b" ", 2)[1])
        if status < 300:
            return json.loads(answer.partition(b"\r\n\r\n")[2])
        if status < 500:
            sys.exit(f"the server answers {method} {path} with {answer!r}")
        time.sleep(0.1)
    sys.exit(f"the server does not answer {method} {path}")


def append(path: str, line: str) -> None:
    with open(path, "a") as file:  # noqa: PTH123 - as above
        file.write(f"{line}\n")


def leave_a_child() -> None:
    """A process in a session of its own that nobody but the agent will end."""
    if os.fork() == 0:
        os.setsid()
        os.execv("/bin/sleep", ["sleep", "300"])


class Engine:
    def __init__(self) -> None:
        self.run_id = os.environ["PREFECT__FLOW_RUN_ID"]
        self.asked_to_cancel = False

    def propose(self, state: str, *, force: bool = False) -> dict:
        return call("POST", f"/flow_runs/{self.run_id}/set_state", {"state": {"type": state}, "force": force})

    def run(self) -> None:
        wanted = call("GET", f"/flow_runs/{self.run_id}")["parameters"]
        verdict = self.propose("RUNNING")
        if verdict["status"] != "ACCEPT":
            sys.exit(f"the server does not accept RUNNING: {verdict}")
        self.hooks = wanted["hooks"]
        leave_a_child()  # before it could inherit what we do on SIGTERM
        if NATIVE:
            signal.signal(signal.SIGTERM, self.terminated)
            self.connect()
        append(wanted["trace"], f"{self.run_id} {os.getpid()}")
        print(f"body of {self.run_id}", flush=True)
        if wanted["outcome"] == "is cancelled":
            while True:
                signal.pause()
        time.sleep(wanted.get("seconds", 0))
        while wanted.get("go") and not os.path.exists(wanted["go"]):  # noqa: PTH110 - as above
            time.sleep(0.02)
        if wanted["outcome"] == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        self.propose({"completes": "COMPLETED", "fails": "FAILED"}[wanted["outcome"]])

    def connect(self) -> None:
        port = os.environ.get("PREFECT__CONTROL_PORT")
        if not port:
            return
        try:
            channel = socket.create_connection(("127.0.0.1", int(port)), timeout=5)
            channel.sendall(os.environ["PREFECT__CONTROL_TOKEN"].encode() + b"\n")
        except OSError:  # its agent is dead
            return
        channel.settimeout(None)
        threading.Thread(target=self.listen, args=(channel,), daemon=True).start()

    def listen(self, channel: socket.socket) -> None:
        try:
            if channel.recv(1) == b"c":
                self.asked_to_cancel = True
                channel.sendall(b"a")
        except OSError:
            return

    def terminated(self, *_: object) -> None:
        kind, state = ("cancellation", "Cancelling") if self.asked_to_cancel else ("crashed", "Crashed")
        print(f"Running hook 'on_{kind}' in response to entering state '{state}'", flush=True)
        append(self.hooks, f"{kind} {self.run_id}")
        self.propose("CANCELLED" if self.asked_to_cancel else "CRASHED", force=True)
        os._exit(0)


def run_hook(kind: str) -> None:
    run_id = os.environ["PREFECT__FLOW_RUN_ID"]
    append(call("GET", f"/flow_runs/{run_id}")["parameters"]["hooks"], f"{kind.removeprefix('on_')} {run_id}")


def serve_forks(program: str, line: str) -> None:
    """What the fork server imports as Prefect's engine is this file."""
    import importlib.abc
    import importlib.util

    me = sys.argv[0]
    if os.path.exists(os.path.join(os.path.dirname(me), "refuses")):  # noqa: PTH110, PTH118, PTH120 - as above
        sys.exit("refused")
    with open(me) as file:  # noqa: PTH123 - as above
        own = file.read()
    sources = {
        "prefect": "import prefect.context, prefect.logging.configuration",
        "prefect.engine": own,
        "prefect.context": "def root_settings_context(): pass",
        "prefect.logging": "",
        "prefect.logging.configuration": "PROCESS_LOGGING_CONFIG = {}\ndef setup_logging(**_): pass",
    }

    class Played(importlib.abc.InspectLoader):
        def get_source(self, fullname: str) -> str:
            return sources[fullname]

        def is_package(self, fullname: str) -> bool:
            return fullname in ("prefect", "prefect.logging")

        def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> object:
            if fullname in sources:
                return importlib.util.spec_from_loader(fullname, self, origin=me)
            if fullname.partition(".")[0] in ("asyncio", "concurrent", "multiprocessing", "sqlite3", "zoneinfo"):
                raise ImportError(f"{fullname} takes time, and nobody here needs it")
            return None

    sys.meta_path.insert(0, Played())
    sys.argv[:] = ["-c", line]
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    match sys.argv[1:]:
        case [] | ["-m", "prefect.engine"]:
            Engine().run()
        case ["-c", _question]:
            print("\nflow-agent:" + json.dumps({"prefect": VERSION, "paths": [], "installs": []}))
        case ["-c", program, line]:
            serve_forks(program, line)
        case ["-c", _helper, kind, _message]:
            run_hook(kind)
        case other:
            sys.exit(f"cannot play this part of a Python with Prefect: {other}")
