"""The calls that the REST rooms make: paths and decoded JSON, nothing of HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Api(Protocol):
    """A Prefect REST API. Paths start behind `/api`; answers are decoded JSON.

    Each method is one request and may raise any of `Unreachable`, `LostAnswer`, `ServerTrouble`, `Unauthorized`,
    `NotFound`, `Refused`.
    """

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any: ...

    async def post(self, path: str, body: Any) -> Any: ...

    async def patch(self, path: str, body: Any) -> Any: ...

    async def delete(self, path: str) -> None: ...
