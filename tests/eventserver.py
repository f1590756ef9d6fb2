"""A server of one websocket that behaves as a test tells it, for what real ones do too rarely.

    async with open_event_server(say_hello, close(1000)) as server:     # inside trio
        ...                                                             # connect to server.url

The first connection is treated as the first deed says, the next one as the second, all others as the last.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Event, Ping, Pong, Request, TextMessage


class Peer:
    """One connection as the server sees it. Owns what it was told."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.request = b""  # what came first, in bytes
        self.told: list[Any] = []  # messages, decoded
        self.pings = self.pongs = 0
        self._wire = WSConnection(ConnectionType.SERVER)

    async def open(self) -> None:
        """Reads the request for a websocket and grants it."""
        self._wire.receive_data(self.request)
        [request] = self._wire.events()
        assert isinstance(request, Request)
        await self.send(AcceptConnection(subprotocol=request.subprotocols[0]))

    async def send(self, event: Event) -> None:
        await self.stream.send_all(self._wire.send(event))

    async def say(self, **message: Any) -> None:
        await self.send(TextMessage(data=json.dumps(message)))

    async def hear(self, many: int = 10**6) -> None:
        """Reads so many more messages, answering pings, or until the other side is gone."""
        wanted = len(self.told) + many
        while len(self.told) < wanted and (data := await self.stream.receive_some()):
            self._wire.receive_data(bytes(data))
            for event in self._wire.events():
                if isinstance(event, Ping):
                    self.pings += 1
                    await self.send(event.response())
                elif isinstance(event, Pong):
                    self.pongs += 1
                elif isinstance(event, TextMessage):
                    self.told.append(json.loads(event.data))
                elif isinstance(event, CloseConnection):
                    self.told.append(("closed", event.code))

    async def welcome(self) -> None:
        """As Prefect does: the login, then the filter."""
        await self.open()
        await self.hear(1)
        await self.say(type="auth_success")
        await self.hear(1)


Deed = Callable[[Peer], Awaitable[None]]


def answer(raw: bytes) -> Deed:
    """Plain HTTP instead of a websocket."""

    async def deed(peer: Peer) -> None:
        await peer.stream.send_all(raw)

    return deed


def close(code: int, *, welcome: bool = True, reason: str | None = None) -> Deed:
    """Closes the websocket with that code, after the filter or without having listened."""

    async def deed(peer: Peer) -> None:
        await (peer.welcome() if welcome else peer.open())
        await peer.send(CloseConnection(code=code, reason=reason))

    return deed


async def swallow(peer: Peer) -> None:
    """Opens it, and hands nothing on: some proxies do."""
    await peer.open()
    await trio.sleep_forever()


async def hang(peer: Peer) -> None:
    """Does not even answer the request."""
    await trio.sleep_forever()


class EventServer:
    """Where it listens, and who came."""

    def __init__(self) -> None:
        self.url = ""
        self.peers: list[Peer] = []


@asynccontextmanager
async def open_event_server(*deeds: Deed) -> AsyncIterator[EventServer]:
    server = EventServer()

    async def serve(stream: trio.SocketStream) -> None:
        peer = Peer(stream)
        server.peers.append(peer)
        deed = deeds[min(len(server.peers), len(deeds)) - 1]
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while b"\r\n\r\n" not in peer.request:
                peer.request += bytes(await stream.receive_some())
            await deed(peer)
        await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        server.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/api"
        yield server
        nursery.cancel_scope.cancel()
