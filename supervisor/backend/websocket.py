"""The frames of one websocket, over a connection that HTTP has opened; the only importer of wsproto.

Loaded only where a websocket is wanted. Nothing here is retried: whatever ends the websocket is raised, once, as the
`BackendError` that it means.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Protocol

import httpcore
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Event, Ping, TextMessage
from wsproto.utilities import LocalProtocolError, generate_accept_token, generate_nonce

from supervisor.errors import BackendError, LostAnswer, ServerTrouble, Unauthorized

QUIET_SECONDS = (
    25.0  # then the other side is asked whether it is there; Prefect's servers ping every 20 s by themselves
)
PONG_SECONDS = 10.0  # and must say so within this
MESSAGE_BYTES = 4_000_000  # of one message; state messages in events may have 100 kB
_CHUNK = 65_536
_POLICY = 1008  # the close code of a server that does not like what it was shown


class Stream(Protocol):
    """What is under a websocket: a TCP or TLS connection. Limits are in seconds."""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes: ...  # noqa: ASYNC109 - httpcore's

    async def write(self, buffer: bytes, timeout: float | None = None) -> None: ...  # noqa: ASYNC109


class Upgrade:
    """The request for one websocket, and whether an answer is the answer to it."""

    def __init__(self, subprotocol: str) -> None:
        nonce = generate_nonce()
        self._expected = generate_accept_token(nonce)
        self.headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": nonce.decode(),
            "Sec-WebSocket-Protocol": subprotocol,
        }

    def is_answered(self, accept: str | None) -> bool:
        """`accept` is the header Sec-WebSocket-Accept of an answer with status 101."""
        return (accept or "").encode() == self._expected


class WebSocket:
    """Text messages in both directions, for one task.

    Owns what has been received and not yet handed on. Pings are answered, and sent, within `receive`: whoever listens
    learns within 35 s that the other side is gone.
    """

    def __init__(self, stream: Stream, sentence: str) -> None:
        """`sentence` begins those of the errors."""
        self._stream = stream
        self._sentence = sentence
        self._wire = Connection(ConnectionType.CLIENT)
        self._ready: deque[str] = deque()
        self._begun = ""  # of a message whose end has not come yet
        self._end: BackendError | None = None

    async def send(self, text: str) -> None:
        """Raises `LostAnswer` where that cannot be done any more."""
        await self._write(TextMessage(data=text))

    async def receive(self) -> str:
        """The next message. Raises `LostAnswer` at the end, however it came, or `Unauthorized` or `ServerTrouble`."""
        while not self._ready:
            if self._end is not None:
                raise self._end
            await self._take(await self._read())
        return self._ready.popleft()

    async def close(self) -> None:
        """Says goodbye, and waits for nothing."""
        if self._end is None:
            await self._write(CloseConnection(code=1000))

    async def _read(self) -> bytes:
        try:
            try:
                return await self._stream.read(_CHUNK, QUIET_SECONDS)
            except httpcore.ReadTimeout:
                await self._write(Ping())
            return await self._stream.read(_CHUNK, PONG_SECONDS)
        except httpcore.ReadTimeout:
            raise LostAnswer(f"{self._sentence}: it has been silent, also to a ping") from None
        except httpcore.NetworkError as problem:
            raise LostAnswer(f"{self._sentence}: it broke: {problem or type(problem).__name__}") from None

    async def _take(self, data: bytes) -> None:
        if not data:
            self._end = LostAnswer(f"{self._sentence}: the connection was dropped")
            return
        self._wire.receive_data(data)
        for event in list(self._wire.events()):
            if isinstance(event, Ping):
                await self._write(event.response())
            elif isinstance(event, TextMessage):
                self._begun += event.data
                if len(self._begun) > MESSAGE_BYTES:
                    raise ServerTrouble(f"{self._sentence}: a message of it is too long")
                if event.message_finished:
                    self._ready.append(self._begun)
                    self._begun = ""
            elif isinstance(event, CloseConnection):
                kind = Unauthorized if event.code == _POLICY else LostAnswer
                reason = f", {event.reason}" if event.reason else ""
                self._end = kind(f"{self._sentence}: the server closed it ({event.code:d}{reason})")
                with contextlib.suppress(LostAnswer):
                    await self._write(event.response())

    async def _write(self, event: Event) -> None:
        try:
            await self._stream.write(self._wire.send(event), PONG_SECONDS)
        except (httpcore.NetworkError, httpcore.TimeoutException, LocalProtocolError) as problem:
            raise LostAnswer(f"{self._sentence}: it broke: {problem or type(problem).__name__}") from None
