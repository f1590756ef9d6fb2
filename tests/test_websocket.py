"""The websocket for events: against real servers, and against one that does what real ones and proxies do too rarely."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import trio
from wsproto.events import CloseConnection, Ping

from supervisor.backend import websocket
from supervisor.backend.http import HttpApi
from supervisor.backend.rest import events
from supervisor.backend.rest.client import RestBackend
from supervisor.config import Api, Credentials
from supervisor.errors import BackendError, LostAnswer, NotFound, ServerTrouble, Unauthorized, Unreachable
from supervisor.model import Notice
from tests import servers
from tests.eventserver import Deed, EventServer, Peer, answer, close, hang, open_event_server, swallow
from tests.servers import PrefectServer

RESOURCE = "prefect.work-pool.1"


def listen_to(
    *deeds: Deed, credentials: Callable[[], Credentials] = Credentials
) -> tuple[list[Notice], Any, EventServer]:
    """What one listener hears from such a server, what ends it, and the server."""
    heard: list[Notice] = []

    async def main() -> tuple[BackendError, EventServer]:
        async with open_event_server(*deeds) as server:
            api = Api(url=server.url, timeout_seconds=1.0, headers={"X-Ours": "yes"})
            async with HttpApi.open(api, credentials) as http:
                try:
                    async with RestBackend(http).listen(["prefect.flow-run.Late"], [RESOURCE]) as notices:
                        while True:
                            heard.append(await notices.next())
                except BackendError as error:
                    return error, server

    async def limited() -> tuple[BackendError, EventServer]:
        with trio.fail_after(20):
            return await main()

    error, server = trio.run(limited)
    return heard, error, server


def http(status: str, body: str = "", kind: str = "text/html") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


JSON = "application/json"


@pytest.mark.parametrize(
    ("deed", "error", "words"),
    [
        (answer(http("200 OK", "<html>")), ServerTrouble, "not Prefect's API"),
        (answer(http("200 OK", "{}", JSON)), ServerTrouble, "does not know websockets"),
        (answer(http("403 Forbidden")), Unauthorized, "403"),
        (answer(http("404 Not Found", '{"detail":"Not Found"}', JSON)), NotFound, "Not Found"),
        (answer(http("500 Internal Server Error")), ServerTrouble, "500"),
        (answer(http("101 Switching Protocols")), ServerTrouble, "does not know websockets"),
        (answer(b""), LostAnswer, "broke"),
        (hang, LostAnswer, "no answer"),
        (close(1000), LostAnswer, r"closed it \(1000\)"),
        (close(1012, reason="bye"), LostAnswer, r"closed it \(1012, bye\)"),
        (close(1008, welcome=False, reason="Invalid token"), Unauthorized, "1008, Invalid token"),
        (close(1002, welcome=False), LostAnswer, "1002"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_way_of_not_having_a_websocket_is_told_once(deed: Deed, error: type[BackendError], words: str) -> None:
    heard, raised, _ = listen_to(deed)
    assert type(raised) is error, raised
    assert re.search(words, str(raised)), raised
    assert not heard


def test_a_server_that_nobody_listens_at_is_unreachable() -> None:
    async def main() -> None:
        async with HttpApi.open(Api(url=f"http://127.0.0.1:{servers.free_port()}/api"), Credentials) as http:
            with pytest.raises(Unreachable, match="refused"):
                async with http.websocket("/events/out", "prefect"):
                    pass

    trio.run(main)


def test_a_proxy_that_opens_it_and_hands_nothing_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HELLO_SECONDS", 0.2)
    _, error, _ = listen_to(swallow)
    assert type(error) is LostAnswer
    assert "no answer to our login" in str(error)


def test_a_websocket_that_falls_silent_is_asked_whether_it_is_there_and_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(websocket, "PONG_SECONDS", 0.3)

    async def answer_some(peer: Peer) -> None:
        await peer.welcome()
        with trio.move_on_after(1.0):
            await peer.hear()
        await trio.sleep_forever()

    _, error, server = listen_to(answer_some)
    assert server.peers[0].pings >= 2
    assert type(error) is LostAnswer
    assert "silent" in str(error)


def test_what_is_said_is_handed_on_in_order_whatever_stands_between_and_before_the_end() -> None:
    async def talk(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(Ping(b"are you there"))
        for number in range(3):
            run = {"prefect.resource.id": f"prefect.flow-run.{number}", "x": None}
            related = [{"prefect.resource.id": RESOURCE, "prefect.resource.role": "work-pool"}, {}]
            event = {"event": "prefect.flow-run.Late", "resource": run, "related": related, "payload": {"a": [1]}}
            await peer.say(type="event", event=event, more=1)
        await peer.say(type="something newer")
        await peer.send(CloseConnection(code=1001))
        await peer.hear()

    heard, error, server = listen_to(talk)
    assert [notice.subject for notice in heard] == [f"prefect.flow-run.{number}" for number in range(3)]
    assert heard[0].about == {"prefect.flow-run.0", RESOURCE}
    assert "1001" in str(error)
    login, chosen, goodbye = server.peers[0].told
    assert login == {"type": "auth", "token": None}
    assert chosen["filter"]["any_resource"] == {"id": [RESOURCE]}
    assert chosen["filter"]["event"] == {"name": ["prefect.flow-run.Late"]}
    assert chosen["backfill"] is False
    assert goodbye == ("closed", 1001)
    assert server.peers[0].pongs == 1
    head = server.peers[0].request.decode()
    assert "X-Ours: yes" in head
    assert "Sec-WebSocket-Protocol: prefect" in head


@pytest.mark.parametrize(
    ("given", "shown"),
    [(Credentials(api_key="pnu_key"), "pnu_key"), (Credentials(auth_string="a:b"), "a:b")],
    ids=["key", "login"],
)
def test_the_key_or_the_login_is_shown_as_it_is(given: Credentials, shown: str) -> None:
    _, _, server = listen_to(close(1000), credentials=lambda: given)
    assert server.peers[0].told[0]["token"] == shown


def test_something_that_is_no_event_ends_it() -> None:
    async def talk(peer: Peer) -> None:
        await peer.welcome()
        await peer.say(event="no type")

    _, error, _ = listen_to(talk)
    assert type(error) is ServerTrouble


def test_a_message_without_an_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MESSAGE_BYTES", 1000)

    async def talk(peer: Peer) -> None:
        await peer.welcome()
        await peer.say(type="x" * 2000)

    _, error, _ = listen_to(talk)
    assert "too long" in str(error)


def test_a_server_of_prefect_2_has_no_websocket_for_us(server_2: PrefectServer) -> None:
    async def main() -> None:
        async with HttpApi.open(Api(url=server_2.url), Credentials) as http:
            with pytest.raises(BackendError):
                async with RestBackend(http).listen(["x"], [f"prefect.work-pool.{uuid.uuid4()}"]):
                    pass

    trio.run(main)
