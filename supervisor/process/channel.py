"""The control channel of Prefect's engine (3.6.27 and later): asks a run to cancel itself, and hears how it ended.

One loopback listener serves all runs; a run's engine connects to it with the token from its environment (reference
2.3). Version 1: we send one byte, the engine answers `a`, and our SIGTERM then means what the byte said. Version 2
(3.8.4 and later) also sends a receipt when the engine has reported the end itself.

    engine                                agent
    token \\n                         ──>
    \\0PF version capabilities         ──>                    version 2 opens with this
                                      <──  \\0PF 2 1          and so do we
                                      <──  c | r | q         an intent
    a                                 ──>                    taken
    \\1 length JSON                    ──>                    a receipt
                                      <──  \\2                noted

Everything here is a courtesy: no connection, no answer, a mad answer mean only that SIGTERM has to do alone.
"""

from __future__ import annotations

import enum
import logging
import secrets
from collections.abc import Mapping

import msgspec
import trio

log = logging.getLogger(__name__)

TOKEN_TIMEOUT = 5.0  # seconds for a new connection to say who it is
_STRANGERS = 64  # how many connections may be without a token at once
_MAX_TOKEN = 128  # bytes
_MAX_RECEIPT = 4096  # bytes, as in Prefect's own sources
_HELLO = b"\x00PF"
_VERSION_2 = _HELLO + b"\x02\x01"
_VERSION_1 = _HELLO + b"\x01\x00"


class Intent(enum.Enum):
    """What the coming SIGTERM means. Engines before 3.8.1 know only CANCEL."""

    CANCEL = b"c"
    RESCHEDULE = b"r"
    RELINQUISH = b"q"


class Receipt(msgspec.Struct, frozen=True):
    """The engine's word that it has ended this run itself."""

    disposition: str  # STATE_REPORTED or ORCHESTRATION_ABORTED
    state_id: str | None = None
    state_type: str | None = None
    state_name: str | None = None


class _Malformed(Exception):
    """What the other side says is not the protocol."""


class Session:
    """One process's side of the channel. Owns what is known of that connection."""

    def __init__(self, channel: ControlChannel, token: str) -> None:
        self._channel = channel
        self._token = token
        self._stream: trio.abc.Stream | None = None
        self._scope: trio.CancelScope | None = None
        self._sending = trio.Lock()
        self._connected = trio.Event()
        self._settled = trio.Event()  # nothing more will come: taken, receipt, or hung up
        self._asked: Intent | None = None
        self._taken: Intent | None = None
        self.receipt: Receipt | None = None
        self.connected_at: float | None = None  # monotonic; its next word to the server asks for RUNNING

    @property
    def environ(self) -> Mapping[str, str]:
        """What the engine needs in its environment to connect; empty when there is no listener."""
        if self._channel.port is None:
            return {}
        return {"PREFECT__CONTROL_PORT": str(self._channel.port), "PREFECT__CONTROL_TOKEN": self._token}

    @property
    def connected(self) -> bool:
        """Whether an engine is listening now: it is inside the flow and has its SIGTERM handler in place."""
        return self._stream is not None

    async def wait_connected(self) -> None:
        """Wait until an engine has connected; it may have gone again by the time this returns."""
        await self._connected.wait()

    async def ask(self, intent: Intent, timeout: float = 1.0) -> bool:  # noqa: ASYNC109 - bounds the answer
        """Tell the engine what the SIGTERM will mean, and wait up to `timeout` seconds: whether it has agreed.

        The caller sends the SIGTERM in either case. Asking again for what has been agreed to is true at once.
        """
        if self._taken is not None:
            return self._taken is intent
        if self._stream is None or self._asked not in (None, intent):
            return False
        with trio.move_on_after(timeout):
            try:
                if self._asked is None:
                    self._asked = intent
                    await self._send(intent.value)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            await self._settled.wait()
        return self._taken is intent

    def close(self) -> None:
        """Forget the token and hang up. What is known stays readable."""
        self._channel._forget(self._token)
        if self._scope is not None:
            self._scope.cancel()

    async def _talk(self, stream: trio.abc.Stream, reader: _Reader) -> None:
        with trio.CancelScope() as self._scope:
            self._stream = stream
            self.connected_at = trio.current_time()
            self._connected.set()
            try:
                await self._listen(reader)
            finally:
                self._stream = None
                self._settled.set()

    async def _listen(self, reader: _Reader) -> None:
        receipts = False
        while True:
            match await reader.exactly(1):
                case b"a" if self._asked is not None:
                    self._taken = self._asked
                    return
                case b"\x00":
                    receipts = _speaks_version_2(await reader.exactly(4))
                    await self._send(_VERSION_2 if receipts else _VERSION_1)
                case b"\x01" if receipts:
                    self.receipt = _read_receipt(await reader.exactly(await reader.length()))
                    await self._send(b"\x02")
                    return
                case other:
                    raise _Malformed(f"unexpected {other!r}")

    async def _send(self, data: bytes) -> None:
        async with self._sending:  # an intent and an answer of ours may coincide
            if self._stream is None:
                raise trio.ClosedResourceError
            await self._stream.send_all(data)


class ControlChannel:
    """The one listener. Owns the tokens that have not been used yet."""

    def __init__(self) -> None:
        self._waiting: dict[str, Session] = {}
        self._strangers = 0
        self.port: int | None = None  # None: not listening

    def expect(self) -> Session:
        """A session for a process that is about to be started."""
        session = Session(self, secrets.token_hex(16))
        self._waiting[session._token] = session
        return session

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a free loopback port until cancelled. Started as soon as `port` is known.

        Without a port the agent works on, and cancels by signal only.
        """
        try:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        except OSError as error:
            log.warning("cannot listen on 127.0.0.1: %s; runs are cancelled by signal only", error.strerror or error)
            task_status.started()
            return
        self.port = listeners[0].socket.getsockname()[1]
        try:
            async with trio.open_nursery() as connections:
                await connections.start(trio.serve_listeners, self.handle, listeners)
                task_status.started()
        finally:
            self.port = None

    async def handle(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end. Never raises for what the other side does."""
        try:
            async with stream:
                await self._welcome(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the process has gone: its exit says the rest
        except _Malformed as error:
            log.debug("dropped a control connection: %s", error)

    async def _welcome(self, stream: trio.abc.Stream) -> None:
        if self._strangers >= _STRANGERS:
            raise _Malformed("too many connections without a token")
        reader = _Reader(stream)
        token = b""
        self._strangers += 1
        try:
            with trio.move_on_after(TOKEN_TIMEOUT):
                token = await reader.line(_MAX_TOKEN)
        finally:
            self._strangers -= 1
        # A token is good for one connection: whoever copies it later cannot take the engine's place.
        session = self._waiting.pop(token.decode("ascii", errors="replace").strip(), None)
        if session is None:
            raise _Malformed("no valid token")
        await session._talk(stream, reader)

    def _forget(self, token: str) -> None:
        self._waiting.pop(token, None)


class _Reader:
    """Takes a stream apart. Holds no more than one answer of the operating system beyond what was asked for."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def _more(self) -> None:
        data = await self._stream.receive_some(_MAX_RECEIPT)
        if not data:
            raise trio.BrokenResourceError("the connection ended")
        self._buffer += data

    async def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def line(self, limit: int) -> bytes:
        while (at := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > limit:
                raise _Malformed("the token is too long")
            await self._more()
        return await self.exactly(at + 1)

    async def length(self) -> int:
        size = int.from_bytes(await self.exactly(4), "big")
        if size > _MAX_RECEIPT:
            raise _Malformed(f"a receipt of {size} bytes")
        return size


def _speaks_version_2(frame: bytes) -> bool:
    """The rest of a greeting: `PF`, the version and the capabilities, of which bit 0 means receipts."""
    if frame[:2] != _HELLO[1:]:
        raise _Malformed(f"the greeting {frame!r}")
    return frame[2] >= 2 and bool(frame[3] & 1)


def _read_receipt(raw: bytes) -> Receipt:
    try:
        return msgspec.json.decode(raw, type=Receipt)
    except msgspec.MsgspecError as error:
        raise _Malformed(f"a receipt that cannot be read: {error}") from error
