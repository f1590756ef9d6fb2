"""The calls that the REST rooms make: paths, decoded JSON and text messages, nothing of HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class Channel(Protocol):
    """A websocket. Both methods raise a `BackendError` once it has ended, however that was."""

    async def send(self, text: str) -> None: ...

    async def receive(self) -> str: ...


class Api(Protocol):
    """A Prefect REST API. Paths start behind `/api`; answers are decoded JSON.

    Each method is one request and may raise any of `Unreachable`, `LostAnswer`, `ServerTrouble`, `Unauthorized`,
    `NotFound`, `Refused`.
    """

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any: ...

    async def post(self, path: str, body: Any) -> Any: ...

    async def patch(self, path: str, body: Any) -> Any: ...

    async def delete(self, path: str) -> None: ...

    @property
    def secret(self) -> str | None:
        """What is shown to be let in where no header can be: the login or the key as it is."""

    def websocket(self, path: str, subprotocol: str) -> AbstractAsyncContextManager[Channel]: ...
