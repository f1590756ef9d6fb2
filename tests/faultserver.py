"""A small HTTP/1.1 reverse proxy on loopback that misbehaves on request, in front of a real Prefect server.

    async with open_fault_server(server.url) as faults:            # inside trio
        faults.rules.append(on("POST", r"/flow_runs/[^/]+/set_state", LoseAnswer(), times=1))
        ...                                                        # talk to faults.url

    with fault_server_thread(server.url) as faults:                # beside anything else, in a thread of its own
        ...

The first rule that matches a request decides about it; without one it is handed on as it is. `rules` may be changed at
any time, from any thread. Paths are those behind the API's base, e.g. `/flow_runs/filter`. Without an upstream every
request needs a rule. Websockets are handed through and are never touched by rules.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11
import trio
import trio.testing

_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"host", b"content-length"}
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError, h11.RemoteProtocolError)


# --- what can go wrong ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refuse:
    """Reads the request, does nothing with it and drops the connection."""


@dataclass(frozen=True)
class LoseAnswer:
    """The server carries the request out; its answer is lost."""


@dataclass(frozen=True)
class Duplicate:
    """The server gets the request twice; the second answer is handed back."""


@dataclass(frozen=True)
class Status:
    """An answer of our own, without asking the server. `body` is sent as it is, or as JSON when it is not bytes."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None


def html(code: int = 200) -> Status:
    """What a proxy or a captive portal says."""
    return Status(code, {"Content-Type": "text/html"}, b"<html><body><h1>Welcome to the gateway</h1></body></html>")


def wrong_json(value: Any = 42) -> Status:
    """JSON, but not what was asked for."""
    return Status(200, {}, value)


@dataclass(frozen=True)
class HalfClose:
    """The server carries the request out; half of its answer arrives, then the connection ends."""


@dataclass(frozen=True)
class SlowBody:
    """The server carries the request out; its answer dribbles, a byte at a time, over this long."""

    seconds: float


@dataclass(frozen=True)
class Delay:
    """The request waits this long before it is handed on."""

    seconds: float


Fault = Refuse | LoseAnswer | Duplicate | Status | HalfClose | SlowBody | Delay


@dataclass
class Rule:
    """A fault for the requests that `match(method, path)`, for the first `times` of them (None: all)."""

    match: Callable[[str, str], bool]
    fault: Fault
    times: int | None = None
    hits: int = 0  # how often it was applied


def on(method: str, path: str, fault: Fault, times: int | None = None) -> Rule:
    """A rule for one method ("*": any) and the paths that the regular expression describes as a whole."""
    pattern = re.compile(path)
    return Rule(lambda m, p: method in ("*", m) and pattern.fullmatch(p) is not None, fault, times)


@dataclass(frozen=True)
class Request:
    """One request as it came in. Header names are in lower case."""

    method: str
    path: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class _Answer:
    code: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


# --- the server -----------------------------------------------------------------------------------------------------


class FaultServer:
    """The running proxy. All of it may be read from any thread, and `rules` changed."""

    def __init__(self, upstream: str | None, tls: ssl.SSLContext | None, nursery: trio.Nursery) -> None:
        parts = urlsplit(upstream or "http://127.0.0.1/api")
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80) if upstream else None
        self._base = parts.path.rstrip("/")
        self._tls = tls
        self._nursery = nursery
        self._port = 0
        self._up: trio.CancelScope | None = None
        self.token = trio.lowlevel.current_trio_token()
        self.rules: list[Rule] = []
        self.requests: list[Request] = []  # as they came in
        self.received: Counter[tuple[str, str]] = Counter()  # by (method, path with {id} for ids)
        self.forwarded: Counter[tuple[str, str]] = Counter()  # the same, for what the server was given
        self.connections = 0

    @property
    def url(self) -> str:
        """What to use instead of the server's URL."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}{self._base}"

    async def come_up(self) -> None:
        """Listens, on the same port as before."""
        listeners = await trio.open_tcp_listeners(self._port, host="127.0.0.1")
        self._port = listeners[0].socket.getsockname()[1]
        self._up = trio.CancelScope()
        await self._nursery.start(self._serve, listeners, self._up)

    async def go_down(self) -> None:
        """Refuses connections and drops those there are, as a server that was killed."""
        if self._up is not None:
            self._up.cancel()
            self._up = None
        await trio.testing.wait_all_tasks_blocked(0.001)

    async def _serve(
        self,
        listeners: list[trio.SocketListener],
        scope: trio.CancelScope,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            async with trio.open_nursery() as connections:
                await trio.serve_listeners(
                    self._connection, listeners, handler_nursery=connections, task_status=_Started(task_status)
                )

    async def _connection(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        if self._tls is not None:
            stream = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
        with contextlib.suppress(*_BROKEN, ssl.SSLError):
            await _Connection(self, stream).run()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)

    def choose(self, request: Request) -> Fault | None:
        """The fault for this request, which is counted."""
        self.requests.append(request)
        self.received[request.method, _template(request.path)] += 1
        for rule in list(self.rules):
            if (rule.times is None or rule.hits < rule.times) and rule.match(request.method, request.path):
                rule.hits += 1
                return rule.fault
        return None

    def path(self, target: str) -> str:
        """The path behind the API's base; also of a target in the form that is sent to proxies."""
        return urlsplit(target).path.removeprefix(self._base)

    async def forward(self, request: Request, headers: Sequence[tuple[bytes, bytes]]) -> _Answer:
        """The server's answer to it. Raises OSError when the server is away."""
        if self._upstream is None:
            return _Answer(404, [], b'{"detail":"Not Found"}')
        self.forwarded[request.method, _template(request.path)] += 1
        stream = await trio.open_tcp_stream(*self._upstream)
        async with stream:
            wire = h11.Connection(h11.CLIENT)
            kept = [(name, value) for name, value in headers if name.lower() not in _HOP]
            kept += [(b"Host", f"{self._upstream[0]}:{self._upstream[1]}".encode()), (b"Connection", b"close")]
            kept.append((b"Content-Length", str(len(request.body)).encode()))
            out = wire.send(h11.Request(method=request.method, target=request.target, headers=kept)) or b""
            out += wire.send(h11.Data(data=request.body)) or b""
            out += wire.send(h11.EndOfMessage()) or b""
            await stream.send_all(out)
            response: h11.Response | None = None
            body = b""
            while True:
                event = wire.next_event()
                if event is h11.NEED_DATA:
                    wire.receive_data(bytes(await stream.receive_some()))
                elif isinstance(event, h11.Response):
                    response = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
        assert response is not None
        kept = [(name, value) for name, value in response.headers if name.lower() not in _HOP]
        return _Answer(response.status_code, kept, body)

    async def tunnel(self, stream: trio.abc.Stream, head: bytes) -> None:
        """Hands bytes through in both directions until one side ends."""
        if self._upstream is None:
            return
        async with await trio.open_tcp_stream(*self._upstream) as server:
            await server.send_all(head)
            await _both_ways(stream, server)


async def _both_ways(one: trio.abc.Stream, other: trio.abc.Stream) -> None:
    async with trio.open_nursery() as nursery:

        async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
            with contextlib.suppress(*_BROKEN):
                while data := await source.receive_some():
                    await sink.send_all(data)
            nursery.cancel_scope.cancel()

        nursery.start_soon(pump, one, other)
        nursery.start_soon(pump, other, one)


class _Started:
    """Hands "started" on without a value."""

    def __init__(self, inner: trio.TaskStatus[None]) -> None:
        self._inner = inner

    def started(self, value: object = None) -> None:
        self._inner.started()


class _Connection:
    """One client connection, request after request."""

    def __init__(self, server: FaultServer, stream: trio.abc.Stream) -> None:
        self._server = server
        self._stream = stream
        self._wire = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        while True:
            event = await self._next()
            if not isinstance(event, h11.Request):
                return
            headers = {name.decode().lower(): value.decode() for name, value in event.headers}
            if headers.get("upgrade", "").lower() == "websocket":
                await self._server.tunnel(self._stream, _head(event) + self._wire.trailing_data[0])
                return
            body = b""
            while isinstance(data := await self._next(), h11.Data):
                body += data.data
            target = event.target.decode()
            request = Request(event.method.decode(), self._server.path(target), target, headers, body)
            if not await self._answer(request, list(event.headers)) or self._wire.our_state is not h11.DONE:
                return
            self._wire.start_next_cycle()

    async def _next(self) -> Any:
        while (event := self._wire.next_event()) is h11.NEED_DATA:
            self._wire.receive_data(bytes(await self._stream.receive_some()))
        return event

    async def _answer(self, request: Request, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Answers, well or badly. False when the connection is to be dropped."""
        fault = self._server.choose(request)
        if isinstance(fault, Refuse):
            return False
        if isinstance(fault, Status):
            raw = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
            own = [(name.encode(), value.encode()) for name, value in fault.headers.items()]
            await self._send(_Answer(fault.code, own, raw))
            return True
        if isinstance(fault, Delay):
            await trio.sleep(fault.seconds)
        try:
            answer = await self._server.forward(request, headers)
            if isinstance(fault, Duplicate):
                answer = await self._server.forward(request, headers)
        except _BROKEN:
            return False  # the server is away
        if isinstance(fault, LoseAnswer):
            return False
        await self._send(answer, fault)
        return not isinstance(fault, HalfClose)

    async def _send(self, answer: _Answer, fault: Fault | None = None) -> None:
        empty = answer.code in (204, 304)
        length = [] if empty else [(b"Content-Length", str(len(answer.body)).encode())]
        response = h11.Response(status_code=answer.code, headers=[*answer.headers, *length])
        head, body = self._wire.send(response) or b"", b"" if empty else answer.body
        if isinstance(fault, HalfClose):
            # An answer without a body is cut in its head.
            await self._stream.send_all(head + body[: len(body) // 2] if body else head[: len(head) // 2])
            return
        if isinstance(fault, SlowBody) and body:
            await self._stream.send_all(head)
            for position in range(len(body)):
                await trio.sleep(fault.seconds / len(body))
                await self._stream.send_all(self._wire.send(h11.Data(data=body[position : position + 1])) or b"")
        else:
            await self._stream.send_all(head + (self._wire.send(h11.Data(data=body)) or b""))
        self._wire.send(h11.EndOfMessage())


def _template(path: str) -> str:
    return _UUID.sub("{id}", path)


def _head(request: h11.Request) -> bytes:
    lines = [request.method + b" " + request.target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in request.headers.raw_items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


@asynccontextmanager
async def open_fault_server(
    upstream: str | None = None, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[FaultServer]:
    """A proxy in front of the API at `upstream` (".../api"), for the time of the block."""
    async with trio.open_nursery() as nursery:
        server = FaultServer(upstream, tls, nursery)
        await server.come_up()
        yield server
        nursery.cancel_scope.cancel()


class ThreadedFaultServer:
    """The same, running in a thread of its own."""

    def __init__(self, server: FaultServer) -> None:
        self.server = server
        self.rules = server.rules
        self.url = server.url
        self.requests = server.requests
        self.received = server.received
        self.forwarded = server.forwarded

    def go_down(self) -> None:
        """As `FaultServer.go_down`; returns when it is done."""
        trio.from_thread.run(self.server.go_down, trio_token=self.server.token)

    def come_up(self) -> None:
        """As `FaultServer.come_up`; returns when it listens."""
        trio.from_thread.run(self.server.come_up, trio_token=self.server.token)


@contextmanager
def fault_server_thread(upstream: str | None = None) -> Iterator[ThreadedFaultServer]:
    """As `open_fault_server`, for tests that are not trio's. Call its methods from outside trio."""
    ready: queue.SimpleQueue[FaultServer | BaseException] = queue.SimpleQueue()
    stop = trio.Event()

    async def main() -> None:
        async with open_fault_server(upstream) as server:
            ready.put(server)
            await stop.wait()

    def body() -> None:
        try:
            trio.run(main)
        except BaseException as problem:  # noqa: BLE001 - whatever it is, the starter is waiting for it
            ready.put(problem)

    thread = threading.Thread(target=body, name="fault server")
    thread.start()
    started = ready.get()
    if isinstance(started, BaseException):
        thread.join()
        raise started
    try:
        yield ThreadedFaultServer(started)
    finally:
        started.token.run_sync_soon(stop.set)
        thread.join()
