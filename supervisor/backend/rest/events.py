"""What the server says by itself, over its websocket for events (Prefect 3)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import msgspec
import trio

from supervisor.backend.rest.api import Api, Channel
from supervisor.errors import LostAnswer, ServerTrouble, Unauthorized
from supervisor.model import Notice

HELLO_SECONDS = 10.0  # for the login, once the websocket is open: a proxy may have opened it and hand nothing on
_PATH = "/events/out"
_SENTENCE = f"cannot listen at {_PATH}"


class WireEvent(msgspec.Struct):
    event: str
    resource: dict[str, str | None] = {}
    related: list[dict[str, str | None]] = []


class WireMessage(msgspec.Struct):
    type: str
    event: WireEvent | None = None
    reason: str | None = None


class Notices:
    """What one websocket has to say."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def next(self) -> Notice:
        while True:
            message = _read(await self._channel.receive())
            if message.event is None:
                continue  # of a kind that is newer than we are
            ids = [entry.get("prefect.resource.id") for entry in (message.event.resource, *message.event.related)]
            return Notice(name=message.event.event, subject=ids[0] or "", about=frozenset(id_ for id_ in ids if id_))


@asynccontextmanager
async def listen(api: Api, names: Sequence[str], resources: Sequence[str]) -> AsyncIterator[Notices]:
    async with api.websocket(_PATH, "prefect") as channel:
        await _introduce(channel, api.secret, names, resources)
        yield Notices(channel)


async def _introduce(channel: Channel, secret: str | None, names: Sequence[str], resources: Sequence[str]) -> None:
    with trio.move_on_after(HELLO_SECONDS):
        await channel.send(_text({"type": "auth", "token": secret}))
        answer = _read(await channel.receive())
        if answer.type != "auth_success":
            raise Unauthorized(f"{_SENTENCE}: the server refuses our credentials: {answer.reason or answer.type}")
        now = datetime.now(UTC)
        # Only what happens from now on: whoever listens asks for what there is once he does. The times are far
        # enough away that no two clocks differ by more; the server brings the first one nearer by its own.
        occurred = {"since": now - timedelta(days=1), "until": now + timedelta(days=365)}
        chosen = {"event": {"name": list(names)}, "any_resource": {"id": list(resources)}, "occurred": occurred}
        await channel.send(_text({"type": "filter", "backfill": False, "filter": chosen}))
        return
    raise LostAnswer(f"{_SENTENCE}: no answer to our login within {HELLO_SECONDS:g} s")


def _text(message: object) -> str:
    return msgspec.json.encode(message).decode()


def _read(text: str) -> WireMessage:
    try:
        return msgspec.json.decode(text, type=WireMessage)
    except msgspec.DecodeError as problem:
        raise ServerTrouble(f"{_SENTENCE}: the server says something that is no event: {problem}") from None
