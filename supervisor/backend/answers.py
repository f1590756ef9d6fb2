"""What a server's HTTP answer means: the value in it, or the error that tells the caller what to do."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from supervisor.errors import NotFound, Refused, ServerTrouble, Unauthorized, Unreachable

MAX_RETRY_AFTER = 300.0  # seconds; a server that asks for more would be asked too rarely to notice that it is back
_NOT_JSON = object()


def read(status: int, headers: Mapping[str, str], content: bytes, sentence: str) -> Any:
    """The decoded body of a good answer, None where it is empty; otherwise raises what the answer means.

    `sentence` begins the error's: "cannot GET /flow_runs/…". `headers` must not mind upper and lower case.
    """
    try:
        body = msgspec.json.decode(content) if content else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = _NOT_JSON
    if 200 <= status < 300:
        if body is _NOT_JSON:
            raise ServerTrouble(f"{sentence}: {_foreign(content)}")
        return body
    if status < 400:
        raise ServerTrouble(
            f"{sentence}: the server answered {status} and sends us to {_location(headers)}; api.url is not quite right"
        )
    said = _detail(body) or _phrase(status)
    if status == 407:
        raise Unreachable(f"{sentence}: the proxy wants a login (407)")
    if status in (401, 403):
        raise Unauthorized(f"{sentence}: the server refuses our credentials ({status}): {said}")
    if status == 404 and not isinstance(body, dict):
        # A proxy in front of a server that is away says 404 in HTML. That must not read as "the run was deleted".
        raise ServerTrouble(f"{sentence}: 404, and {_foreign(content)}")
    if status == 404:
        raise NotFound(f"{sentence}: {said}")
    if status in (408, 429) or status >= 500:
        pause = retry_after(headers.get("Retry-After"), headers.get("Date"))
        maintenance = headers.get("Prefect-Maintenance", "").lower() == "true"
        words = "the server is in maintenance" if maintenance else f"the server answered {status}"
        raise ServerTrouble(f"{sentence}: {words}: {said}", retry_after=pause)
    raise Refused(f"{sentence}: the server answered {status}: {said}", status=status)


def _foreign(content: bytes) -> str:
    start = " ".join(content[:1000].decode(errors="replace").split())[:60]
    return f"the server answered something that is not Prefect's API: {start!r}"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason given"


def _location(headers: Mapping[str, str]) -> str:
    place = urlsplit(headers.get("Location", ""))
    return urlunsplit((place.scheme, place.netloc.rpartition("@")[2], place.path, "", "")) or "nowhere"


def _detail(body: Any) -> str | None:
    """What the server says in a body that describes an error, in at most 300 characters."""
    if not isinstance(body, dict):
        return None
    said = [body.get("exception_message"), body.get("exception_detail"), body.get("detail")]
    words: list[str] = []
    for part in said:
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, list):  # a validation error; its `input` would repeat what we sent
            words += [
                f"{'.'.join(str(step) for step in item.get('loc', ()))}: {item.get('msg')}"
                for item in part
                if isinstance(item, dict)
            ]
    return "; ".join(words)[:300] or None


def retry_after(value: str | None, date: str | None = None) -> float | None:
    """Seconds to wait by a `Retry-After` header, a number or an HTTP date, within 0 and `MAX_RETRY_AFTER`.

    A date is compared with the server's own `Date`: clocks differ. None where there is nothing that can be read.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        then = http_date(value)
        if then is None:
            return None
        seconds = (then - (http_date(date) or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if seconds == seconds else None  # "nan" is a float, too


def http_date(value: str | None) -> datetime | None:
    try:
        parsed = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)
