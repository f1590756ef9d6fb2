"""One HTTP connection pool to one server: headers, credentials, TLS and time limits; the only importer of httpx.

A call is sent once. It is sent a second time only when the server refused the first before looking at it: a CSRF token
that was missing or has expired, or credentials whose file has changed since we read it. Everything else that goes wrong
is told apart by one question, "may the server have carried it out?", and raised as a `BackendError`.
"""

from __future__ import annotations

import logging
import os
import ssl
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
import msgspec
import trio

from supervisor import __version__
from supervisor.backend.answers import http_date, read
from supervisor.backend.tls import tls_context
from supervisor.config import Api, Credentials
from supervisor.errors import BackendError, ConfigError, LostAnswer, ServerTrouble, Unauthorized, Unreachable

if TYPE_CHECKING:
    from supervisor.backend.websocket import WebSocket

API_VERSION = "0.8.4"  # what Prefect 2.20 and every 3.x accept
# Servers (uvicorn) drop an idle connection after 5 s. Dropping it first keeps a request from being sent into a
# connection that is just being closed, where nobody can tell whether it was carried out.
_KEEPALIVE_SECONDS = 4.0
CALLS_AT_ONCE = 16  # the rest waits for its turn, in order; a websocket has a connection beside these
_UPGRADE_SECONDS = 10.0  # for opening a websocket, which no server has to think about


class HttpApi:
    """The low-level caller: JSON in, JSON out, `BackendError`s.

    Mutable state, all of it changed here only: the credentials last read, the CSRF token last given to us, and what the server
    last said the time was.
    """

    def __init__(self, api: Api, credentials: Callable[[], Credentials], client: httpx.AsyncClient) -> None:
        self._base, self._url_login = _split_url(api.url)
        self._timeout = api.timeout_seconds
        self._client = client
        self._read_credentials = credentials
        self._credentials = credentials()
        self._csrf_client = str(uuid.uuid4())
        self._csrf_token: str | None = None
        self._csrf_lock = trio.Lock()
        # The server's `Date`, which has no fractions, and when we heard it (monotonic).
        self.said: tuple[datetime, float] | None = None
        # The pool's own queue would count against a call's deadline: with hundreds of runs none would be answered in time.
        self._turns = trio.Semaphore(CALLS_AT_ONCE)

    @classmethod
    @asynccontextmanager
    async def open(cls, api: Api, credentials: Callable[[], Credentials]) -> AsyncIterator[HttpApi]:
        """Opens the pool; nothing is sent yet. `credentials` is called now, and again after each 401.

        Raises `ConfigError` for certificates or a proxy that cannot be used, and whatever `credentials` raises.
        """
        for name in ("httpx", "httpcore"):  # a line for every request would drown the agent's own log
            logging.getLogger(name).setLevel(logging.WARNING)
        tls = tls_context(api)
        try:
            client = httpx.AsyncClient(
                headers={
                    **api.headers,
                    "User-Agent": f"flow-agent/{__version__}",
                    "X-PREFECT-API-VERSION": API_VERSION,
                },
                verify=tls,
                timeout=None,  # noqa: S113 - one deadline around the whole call, which httpx does not have
                limits=httpx.Limits(
                    max_connections=CALLS_AT_ONCE + 2, max_keepalive_connections=4, keepalive_expiry=_KEEPALIVE_SECONDS
                ),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as problem:
            raise ConfigError(
                f"cannot use the proxy named in the environment (HTTP_PROXY, HTTPS_PROXY or ALL_PROXY): {problem}"
            ) from None
        async with client:
            yield cls(api, credentials, client)

    def renew(self, credentials: Credentials) -> None:
        """Shows these from now on, though the server may still take the old ones."""
        self._credentials = credentials

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer to GET; None where it has no body."""
        return await self._call("GET", path, params=params)

    async def post(self, path: str, body: Any) -> Any:
        """The decoded answer to POST; None where it has no body. Times in `body` must be aware."""
        return await self._call("POST", path, body=body)

    async def patch(self, path: str, body: Any) -> Any:
        """The decoded answer to PATCH; None where it has no body."""
        return await self._call("PATCH", path, body=body)

    async def delete(self, path: str) -> None:
        """DELETE; the answer's body, if any, is ignored."""
        await self._call("DELETE", path)

    @property
    def secret(self) -> str | None:
        """What is shown to be let in where no header can be: the login or the key as it is."""
        return _login(self._credentials, self._url_login) or self._credentials.api_key

    @asynccontextmanager
    async def websocket(self, path: str, subprotocol: str) -> AsyncIterator[WebSocket]:
        """A websocket at that path, for the time of the block. Entering raises as every call does."""
        from supervisor.backend.websocket import Upgrade, WebSocket  # many an agent never needs it

        sentence = f"cannot open a websocket at {path}"
        upgrade, flight = Upgrade(subprotocol), _Flight()
        seconds = min(self._timeout, _UPGRADE_SECONDS)
        answer: httpx.Response | None = None
        with trio.move_on_after(seconds):
            answer = await self._send("GET", path, None, None, flight, upgrade.headers)
        if answer is None:
            raise flight.lost(f"{sentence}: no answer from {self._base} within {seconds:g} s")
        try:
            if answer.status_code != 101:
                read(answer.status_code, answer.headers, answer.content, sentence)
            if answer.status_code != 101 or not upgrade.is_answered(answer.headers.get("Sec-WebSocket-Accept")):
                raise ServerTrouble(f"{sentence}: what answers there ({answer.status_code}) does not know websockets")
            socket = WebSocket(answer.extensions["network_stream"], f"the websocket at {path} has ended")
            yield socket
            await socket.close()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await answer.aclose()

    async def _call(self, method: str, path: str, *, params: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        content = msgspec.json.encode(body) if method in ("POST", "PATCH") else None
        flight = _Flight()
        async with self._turns:
            with trio.move_on_after(self._timeout):
                return await self._exchange(method, path, params, content, flight)
        raise flight.lost(f"cannot {method} {path}: no whole answer from {self._base} within {self._timeout:g} s")

    async def _exchange(
        self, method: str, path: str, params: Mapping[str, Any] | None, content: bytes | None, flight: _Flight
    ) -> Any:
        """One call, sent again at most once for each of the two refusals that happen before the server acts."""
        may_renew_token = method != "GET"
        may_renew_login = True
        while True:
            token, login = self._csrf_token, self._credentials
            answer = await self._send(method, path, params, content, flight)
            if answer.status_code == 403 and may_renew_token and b"CSRF token" in answer.content:
                may_renew_token = False
                await self._renew_csrf_token(token, flight)
            elif answer.status_code == 401 and may_renew_login and self._credentials_changed(login):
                may_renew_login = False
            else:
                return read(answer.status_code, answer.headers, answer.content, f"cannot {method} {path}")

    async def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        content: bytes | None,
        flight: _Flight,
        upgrade: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """The answer, read to its end unless it is the `upgrade` that was wished for."""
        sentence = f"cannot {method} {path}"
        headers = dict(upgrade or {})
        authorization = _authorization(self._credentials, self._url_login)
        if authorization is not None:
            headers["Authorization"] = authorization
        if content is not None:
            headers["Content-Type"] = "application/json"
        if method != "GET" and self._csrf_token is not None:
            headers["Prefect-Csrf-Token"] = self._csrf_token
            headers["Prefect-Csrf-Client"] = self._csrf_client
        flight.sent = False
        try:
            request = self._client.build_request(
                method,
                self._base + path,
                params=None if params is None else dict(params),
                content=content,
                headers=headers,
                extensions={"trace": flight.trace},
            )
            answer = await self._client.send(request, stream=upgrade is not None)
            if answer.status_code != 101:
                await answer.aread()
            if (date := http_date(answer.headers.get("Date"))) is not None:
                self.said = date, trio.current_time()
        except httpx.ProxyError as problem:
            raise Unreachable(f"{sentence}: the proxy refused to connect us to {self._base}: {problem}") from None
        except (httpx.LocalProtocolError, httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeEncodeError):
            # The library's words may quote a header, and with it a secret.
            raise Unreachable(
                f"{sentence}: it cannot be put into an HTTP request; check url and headers under [api]"
            ) from None
        except (httpx.TransportError, httpx.DecodingError) as problem:
            raise flight.lost(f"{sentence}: {_why(problem, self._base)}") from None
        return answer

    def _credentials_changed(self, used: Credentials) -> bool:
        """Reads the credentials again. True when they are others than those just refused."""
        try:
            self._credentials = self._read_credentials()
        except (OSError, ConfigError):
            return False  # the file is away or half-written: the 401 is what the caller must hear of
        return self._credentials != used

    async def _renew_csrf_token(self, refused: str | None, flight: _Flight) -> None:
        """Fetches a token, unless another task has done so since `refused` was used: a new one ends the old one."""
        async with self._csrf_lock:
            if self._csrf_token == refused:
                path = "/csrf-token"
                answer = await self._send("GET", path, {"client": self._csrf_client}, None, flight)
                given = read(answer.status_code, answer.headers, answer.content, f"cannot GET {path}")
                if not isinstance(given, dict) or not isinstance(given.get("token"), str):
                    raise ServerTrouble(f"cannot GET {path}: the answer holds no token")
                self._csrf_token = given["token"]


class _Flight:
    """How far one request has come. `sent` turns true when its first bytes are about to leave."""

    def __init__(self) -> None:
        self.sent = False

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        # What is said to a proxy to open a tunnel does not reach the server.
        if event == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
            self.sent = True

    def lost(self, sentence: str) -> BackendError:
        """The error for a request whose answer will not come."""
        return LostAnswer(sentence) if self.sent else Unreachable(sentence)


def _split_url(url: str) -> tuple[str, str | None]:
    """The URL that paths are appended to, and the login that stood in it: sentences must never show that."""
    parts = urlsplit(url.strip())
    login, at, host = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")), unquote(login) if at else None


def _login(credentials: Credentials, url_login: str | None) -> str | None:
    return credentials.auth_string or (None if credentials.api_key else url_login)


def _authorization(credentials: Credentials, url_login: str | None) -> str | None:
    login = _login(credentials, url_login)
    if login is not None:
        return "Basic " + b64encode(login.encode()).decode()
    if credentials.api_key is None:
        return None
    if not (credentials.api_key.isascii() and credentials.api_key.isprintable()):
        raise Unauthorized("cannot send the API key: it holds characters that no key has; check the file it is in")
    return f"Bearer {credentials.api_key}"


def _why(problem: Exception, base: str) -> str:
    """What went wrong on the way, for people."""
    if isinstance(problem, httpx.ConnectError):
        words = _plain(_root(problem))
        hint = "; name the CA that signed it in api.ca_file" if "CERTIFICATE_VERIFY_FAILED" in words else ""
        return f"cannot connect to {base}: {words}{hint}"
    return f"the connection to {base} broke: {str(problem) or type(problem).__name__}"


def _plain(problem: BaseException) -> str:
    if isinstance(problem, OSError) and not isinstance(problem, ssl.SSLError) and problem.errno is not None:
        # Only the system's own words; the name lookup has numbers below zero, and words of its own.
        return os.strerror(problem.errno) if problem.errno > 0 else problem.strerror or str(problem)
    return str(problem) or type(problem).__name__


def _root(problem: BaseException) -> BaseException:
    """The first cause: the libraries wrap "Connection refused" into "all attempts failed"."""
    while True:
        if isinstance(problem, BaseExceptionGroup):
            problem = problem.exceptions[0]
        elif (cause := problem.__cause__ or problem.__context__) is not None:
            problem = cause
        else:
            return problem
