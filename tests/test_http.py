"""The HTTP room against real sockets: what is sent, what each fault means, TLS, proxies, time limits."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from supervisor import __version__
from supervisor.backend.answers import MAX_RETRY_AFTER, read, retry_after
from supervisor.backend.http import CALLS_AT_ONCE, HttpApi
from supervisor.backend.tls import ca_bundle
from supervisor.config import Api, Credentials
from supervisor.errors import (
    BackendError,
    ConfigError,
    LostAnswer,
    NotFound,
    Refused,
    ServerTrouble,
    Unauthorized,
    Unreachable,
)
from tests.faultserver import (
    Delay,
    Fault,
    FaultServer,
    HalfClose,
    LoseAnswer,
    Refuse,
    Request,
    SlowBody,
    Status,
    html,
    on,
    open_fault_server,
)

KEY = "pnu_very-secret-key"
LOGIN = "admin:very-secret-password"


@pytest.fixture(autouse=True)
def _no_proxies_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def talk(
    body: Callable[[HttpApi, FaultServer], Awaitable[None]],
    *,
    credentials: Callable[[], Credentials] = Credentials,
    upstream: str | None = None,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> None:
    """Runs `body` with a caller of a server that does what its rules say; `settings` go into `[api]`."""

    async def main() -> None:
        async with open_fault_server(upstream, tls=tls) as server:
            api = Api(**{"url": server.url, "timeout_seconds": 10.0, **settings})
            async with HttpApi.open(api, credentials) as http:
                await body(http, server)

    trio.run(main)


def seen(server: FaultServer) -> Request:
    return server.requests[-1]


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_what_time_a_server_says_it_is_stays_known_until_another_answer_says_so() -> None:
    then = datetime(2015, 10, 21, 7, 28, tzinfo=UTC)

    async def body(http: HttpApi, server: FaultServer) -> None:
        assert http.said is None
        server.rules.append(on("GET", "/x", Status(200, {"Date": format_datetime(then, usegmt=True)}, 1)))
        for path, answer in (("/y", Status(200, {}, 1)), ("/z", Status(200, {"Date": "noon"}, 1))):
            server.rules.append(on("GET", path, answer))
        before = trio.current_time()
        await http.get("/x")
        heard = http.said
        assert heard is not None
        assert heard[0] == then
        assert before <= heard[1] <= trio.current_time()
        for path in ("/y", "/z"):
            await http.get(path)
            assert http.said is heard

    talk(body)


@pytest.mark.parametrize(
    ("credentials", "sent"),
    [
        (Credentials(), None),
        (Credentials(api_key=KEY), f"Bearer {KEY}"),
        (Credentials(auth_string=LOGIN), "Basic " + b64encode(LOGIN.encode()).decode()),
        (Credentials(api_key=KEY, auth_string=LOGIN), "Basic " + b64encode(LOGIN.encode()).decode()),
    ],
    ids=["none", "key", "login", "both"],
)
def test_credentials_go_into_the_authorization_header_and_the_login_wins(
    credentials: Credentials, sent: str | None
) -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/x", Status(200, {}, 1)))
        await http.get("/x")
        assert seen(server).headers.get("authorization") == sent

    talk(body, credentials=lambda: credentials)


def test_other_credentials_are_used_from_the_moment_they_are_given_though_the_old_ones_are_still_taken() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/x", Status(200, {}, 2)))
        await http.get("/x")
        http.renew(Credentials(api_key="another"))
        await http.get("/x")
        assert [request.headers.get("authorization") for request in server.requests] == [
            f"Bearer {KEY}",
            "Bearer another",
        ]

    talk(body, credentials=lambda: Credentials(api_key=KEY))


def test_our_own_headers_cannot_be_replaced_by_configured_ones_which_are_sent_beside_them() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("POST", "/x", Status(200, {}, 1)))
        await http.post("/x", {"at": datetime(2026, 1, 1, tzinfo=UTC)})
        headers = seen(server).headers
        assert headers["x-prefect-api-version"] == "0.8.4"
        assert headers["user-agent"] == f"flow-agent/{__version__}"
        assert headers["cf-access"] == "yes"
        assert headers["content-type"] == "application/json"
        assert seen(server).body == b'{"at":"2026-01-01T00:00:00Z"}'

    talk(body, headers={"CF-Access": "yes", "user-agent": "mine"})


def test_parameters_reach_the_query_and_an_answer_without_body_is_none() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("*", "/x%20y", Status(204, {}, b"")))
        assert await http.get("/x%20y", {"include_secrets": True}) is None
        assert seen(server).target.endswith("/x%20y?include_secrets=true")
        assert await http.patch("/x%20y", {}) is None
        await http.delete("/x%20y")
        assert [request.method for request in server.requests] == ["GET", "PATCH", "DELETE"]

    talk(body)


def test_requests_share_a_connection() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/x", Status(200, {}, 1)))
        for _ in range(5):
            await http.get("/x")
        assert server.connections == 1

    talk(body)


def test_no_line_is_logged_for_a_request(caplog: pytest.LogCaptureFixture) -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/x", Status(200, {}, 1)))
        with caplog.at_level(logging.DEBUG):
            await http.get("/x")
        assert [record for record in caplog.records if record.name.startswith("http")] == []

    talk(body)


def test_a_login_in_the_url_is_used_and_never_shown() -> None:
    async def main() -> None:
        async with open_fault_server() as server:
            url = server.url.replace("://", "://me:pass%2Fword@")
            async with HttpApi.open(Api(url=url), Credentials) as http:
                server.rules.append(on("GET", "/x", Status(200, {}, 1)))
                await http.get("/x")
                assert seen(server).headers["authorization"] == "Basic " + b64encode(b"me:pass/word").decode()
                await server.go_down()
                with pytest.raises(BackendError) as away:
                    await http.get("/x")
                assert "word" not in str(away.value)

    trio.run(main)


def test_a_rotated_key_is_read_again_after_a_401_and_the_request_sent_once_more() -> None:
    held = [Credentials(api_key="old")]

    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("POST", "/x", Status(401, {}, {"exception_message": "Unauthorized"}), times=1))
        server.rules.append(on("POST", "/x", Status(200, {}, "in")))
        held[0] = Credentials(api_key="new")
        assert await http.post("/x", {}) == "in"
        assert [request.headers["authorization"] for request in server.requests] == ["Bearer old", "Bearer new"]

    talk(body, credentials=lambda: held[0])


@pytest.mark.parametrize("away", [False, True], ids=["unchanged", "file away"])
def test_a_401_with_the_same_key_is_unauthorized_at_once(away: bool) -> None:
    calls = []

    def credentials() -> Credentials:
        calls.append(1)
        if away and len(calls) > 1:
            raise FileNotFoundError("api-key")
        return Credentials(api_key=KEY)

    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/x", Status(401, {}, {"exception_message": "Unauthorized"})))
        with pytest.raises(Unauthorized, match=r"401.*Unauthorized") as refused:
            await http.get("/x")
        assert KEY not in str(refused.value)
        assert len(server.requests) == 1
        assert len(calls) == 2

    talk(body, credentials=credentials)


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        with pytest.raises(Unauthorized, match="characters") as refused:
            await http.get("/x")
        assert "secret" not in str(refused.value)
        assert server.requests == []

    talk(body, credentials=lambda: Credentials(api_key="secret\nline"))


def test_a_header_that_cannot_be_sent_is_not_quoted() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        with pytest.raises(Unreachable, match="headers under") as refused:
            await http.get("/x")
        assert "token" not in str(refused.value)

    talk(body, headers={"X-Secret": "token\r\nX: y"})


# --- what an answer means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Status(400, {}, {"detail": "bad version"}), Refused, "400: bad version"),
        (Status(409, {}, {"detail": "exists"}), Refused, "409: exists"),
        (
            Status(
                422, {}, {"exception_message": "Invalid", "exception_detail": [{"loc": ["body", "x"], "msg": "no"}]}
            ),
            Refused,
            r"422: Invalid; body\.x: no",
        ),
        (Status(422, {}, {"detail": [{"loc": ["body"], "msg": "missing", "input": "SECRET"}]}), Refused, "missing$"),
        (Status(413, {}, b"<html>"), Refused, "413: Request Entity Too Large"),
        (Status(401, {}, {"exception_message": "Unauthorized"}), Unauthorized, "401.*Unauthorized"),
        (Status(403, {}, b"<html>"), Unauthorized, "403.*Forbidden"),
        (Status(404, {}, {"detail": "Flow run not found"}), NotFound, "cannot POST /x: Flow run not found"),
        (html(404), ServerTrouble, "404.*not Prefect's API.*Welcome"),
        (Status(407, {}, b""), Unreachable, "proxy wants a login"),
        (Status(408, {}, b""), ServerTrouble, "408: Request Timeout"),
        (Status(429, {}, {"detail": "slow down"}), ServerTrouble, "429: slow down"),
        (Status(500, {}, {"exception_message": "Internal Server Error"}), ServerTrouble, "500: Internal Server Error"),
        (html(502), ServerTrouble, "502: Bad Gateway"),
        (Status(503, {"Prefect-Maintenance": "true"}, b""), ServerTrouble, "maintenance"),
        (Status(599, {}, b""), ServerTrouble, "599: no reason"),
        (html(200), ServerTrouble, "not Prefect's API.*<html><body>"),
        (Status(200, {}, b"\xff\xfe"), ServerTrouble, "not Prefect's API"),
        (Status(307, {"Location": "https://u:p@h/login?token=s"}, b""), ServerTrouble, "307.*https://h/login; api.url"),
        (Status(302, {}, b""), ServerTrouble, "302.*nowhere"),
    ],
)
def test_each_bad_answer_is_the_error_that_says_what_to_do(
    answer: Status, error: type[BackendError], words: str
) -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("*", ".*", answer))
        with pytest.raises(BackendError) as raised:
            await http.post("/x", {"name": "SECRET"})
        assert type(raised.value) is error
        assert re.search(words, str(raised.value)), str(raised.value)
        assert "SECRET" not in str(raised.value)
        assert len(server.requests) == 1
        if isinstance(raised.value, Refused):
            assert raised.value.status == answer.code

    talk(body)


def test_the_servers_words_are_cut_to_a_readable_length() -> None:
    with pytest.raises(ServerTrouble) as raised:
        read(500, {}, b'{"detail":"' + b"x" * 10_000 + b'"}', "cannot GET /x")
    assert len(str(raised.value)) < 400
    with pytest.raises(ServerTrouble) as raised:
        read(200, {}, b"<html>" + b"x" * 10_000, "cannot GET /x")
    assert len(str(raised.value)) < 200


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        (None, None, None),
        ("7", None, 7.0),
        ("0.5", None, 0.5),
        ("-3", None, 0.0),
        ("86400", None, MAX_RETRY_AFTER),
        ("inf", None, MAX_RETRY_AFTER),
        ("nan", None, None),
        ("soon", None, None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), format_datetime(NOW, usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), format_datetime(NOW, usegmt=True), 0.0),
        (format_datetime(NOW + timedelta(days=9), usegmt=True), format_datetime(NOW, usegmt=True), MAX_RETRY_AFTER),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_servers_clock(
    value: str | None, date: str | None, seconds: float | None
) -> None:
    assert retry_after(value, date) == seconds


def test_retry_after_reaches_the_error_and_a_date_without_the_servers_clock_uses_ours() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/a", Status(429, {"Retry-After": "12"}, b"")))
        then = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
        server.rules.append(on("GET", "/b", Status(503, {"Retry-After": then}, b"")))
        server.rules.append(on("GET", "/c", Status(503, {}, b"")))
        waits = []
        for path in ("/a", "/b", "/c"):
            with pytest.raises(ServerTrouble) as raised:
                await http.get(path)
            waits.append(raised.value.retry_after)
        assert waits[0] == 12
        assert waits[1] is not None
        assert 80 < waits[1] <= 100
        assert waits[2] is None

    talk(body)


# --- what a broken connection means ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "carried_out"),
    [(Refuse(), 0), (LoseAnswer(), 1), (HalfClose(), 1), (SlowBody(60), 1), (Delay(60), 0)],
    ids=["dropped", "answer lost", "half an answer", "dribbling", "silent"],
)
def test_an_answer_that_does_not_come_whole_is_lost_within_the_time_limit(fault: Fault, carried_out: int) -> None:
    async def main() -> None:
        async with open_fault_server() as real:
            real.rules.append(on("POST", "/x", Status(200, {}, {"id": "0123456789"})))
            async with open_fault_server(real.url) as server:
                server.rules.append(on("POST", "/x", fault))
                async with HttpApi.open(Api(url=server.url, timeout_seconds=0.5), Credentials) as http:
                    started = trio.current_time()
                    with pytest.raises(LostAnswer) as lost:
                        await http.post("/x", {})
                    assert trio.current_time() - started < 5
                    assert lost.value.ambiguous
                    assert str(lost.value).startswith("cannot POST /x: ")
                    assert len(real.requests) == carried_out
                    server.rules.clear()
                    assert await http.post("/x", {}) == {"id": "0123456789"}

    trio.run(main)


def test_waiting_for_a_turn_behind_many_other_calls_is_not_the_servers_fault() -> None:
    async def main() -> None:
        async with open_fault_server() as real:
            real.rules.append(on("GET", "/x", Status(200, {}, {})))
            async with open_fault_server(real.url) as slow:
                slow.rules.append(on("GET", "/x", Delay(0.3)))
                async with (
                    HttpApi.open(Api(url=slow.url, timeout_seconds=2.0), Credentials) as http,
                    trio.open_nursery() as nursery,
                ):
                    for _ in range(CALLS_AT_ONCE * 10):
                        nursery.start_soon(http.get, "/x")

    trio.run(main)


def test_a_refused_connection_is_unreachable_and_the_next_one_may_succeed() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/x", Status(200, {}, 1)))
        assert await http.get("/x") == 1
        await server.go_down()
        with pytest.raises(Unreachable, match="Connection refused") as away:
            await http.get("/x")
        assert not away.value.ambiguous
        await server.come_up()
        assert await http.get("/x") == 1

    talk(body)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://nowhere.invalid/api", "cannot connect to http://nowhere.invalid/api: "),
        ("nowhere/api", "check url"),
        ("ftp://nowhere/api", "check url"),
    ],
)
def test_a_url_that_leads_nowhere_is_unreachable(url: str, words: str) -> None:
    async def main() -> None:
        async with HttpApi.open(Api(url=url, timeout_seconds=10), Credentials) as http:
            with pytest.raises(Unreachable, match=words):
                await http.get("/x")

    trio.run(main)


def test_a_connection_that_is_never_accepted_is_unreachable_within_the_time_limit() -> None:
    async def main() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            place = full.getsockname()
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(place)
            try:
                async with HttpApi.open(
                    Api(url=f"http://127.0.0.1:{place[1]}/api", timeout_seconds=0.3), Credentials
                ) as http:
                    with pytest.raises(Unreachable, match=r"within 0\.3 s"):
                        await http.get("/x")
            finally:
                for filler in fillers:
                    filler.close()

    trio.run(main)


def test_what_is_not_http_is_a_lost_answer() -> None:
    async def chatter(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2\r\n")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, chatter, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            async with HttpApi.open(Api(url=f"http://127.0.0.1:{port}"), Credentials) as http:
                with pytest.raises(LostAnswer, match="broke"):
                    await http.get("/x")
            nursery.cancel_scope.cancel()

    trio.run(main)


# --- CSRF -----------------------------------------------------------------------------------------------------------

MISSING = Status(403, {}, {"detail": "Missing CSRF token."})
INVALID = Status(403, {}, {"detail": "Invalid CSRF token or client identifier."})


def test_a_csrf_token_is_fetched_when_first_asked_for_and_kept() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("POST", "/x", MISSING, times=1))
        server.rules.append(on("GET", "/csrf-token", Status(200, {}, {"token": "t1"})))
        server.rules.append(on("*", "/x", Status(200, {}, "done")))
        assert await http.get("/x") == "done"
        assert await http.post("/x", {}) == "done"
        assert await http.patch("/x", {}) == "done"
        assert await http.get("/x") == "done"
        told = [(one.method, one.path, one.headers.get("prefect-csrf-token")) for one in server.requests]
        assert told == [
            ("GET", "/x", None),
            ("POST", "/x", None),
            ("GET", "/csrf-token", None),
            ("POST", "/x", "t1"),
            ("PATCH", "/x", "t1"),
            ("GET", "/x", None),
        ]
        client = server.requests[3].headers["prefect-csrf-client"]
        assert server.requests[2].target.endswith(f"?client={client}")

    talk(body)


def test_an_expired_csrf_token_is_replaced_once_and_not_for_ever() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/csrf-token", Status(200, {}, {"token": "t1"})))
        server.rules.append(on("POST", "/x", INVALID))
        with pytest.raises(Unauthorized, match="Invalid CSRF token"):
            await http.post("/x", {})
        assert server.received["POST", "/x"] == 2

    talk(body)


def test_many_requests_refused_together_share_one_new_token() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("GET", "/csrf-token", Status(200, {}, {"token": "t1"})))
        server.rules.append(on("POST", "/x", MISSING, times=5))
        server.rules.append(on("POST", "/x", Status(200, {}, 1)))
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(http.post, "/x", {})
        assert server.received["GET", "/csrf-token"] == 1
        assert server.received["POST", "/x"] == 10

    talk(body)


def test_a_csrf_answer_without_a_token_and_a_plain_403_are_told_apart() -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        server.rules.append(on("POST", "/x", MISSING))
        server.rules.append(on("GET", "/csrf-token", Status(200, {}, [])))
        server.rules.append(on("POST", "/y", Status(403, {}, {"detail": "Forbidden"})))
        with pytest.raises(ServerTrouble, match="no token"):
            await http.post("/x", {})
        with pytest.raises(Unauthorized, match="Forbidden"):
            await http.post("/y", {})
        assert server.received["GET", "/csrf-token"] == 1

    talk(body)


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server's certificate for 127.0.0.1 and a client's, made with the openssl command."""
    home = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=home, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA")
    (home / "san.cnf").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "san.cnf", "-out", f"{name}.pem"),
        )
    openssl("ec", "-in", "client.key", "-aes128", "-passout", "pass:hidden", "-out", "locked.key")
    (home / "both.pem").write_bytes((home / "client.pem").read_bytes() + (home / "client.key").read_bytes())
    return home


def server_tls(certificates: Path, *, client: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED if client else ssl.CERT_NONE
    return context


async def _hello(http: HttpApi, server: FaultServer) -> None:
    server.rules.append(on("GET", "/x", Status(200, {}, "hello")))
    assert await http.get("/x") == "hello"


def test_a_ca_of_ones_own_is_trusted_when_it_is_named(certificates: Path) -> None:
    talk(_hello, tls=server_tls(certificates), ca_file=certificates / "ca.pem")


def test_a_ca_of_ones_own_is_not_trusted_by_itself(certificates: Path) -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        with pytest.raises(Unreachable, match=r"certificate verify failed.*api\.ca_file"):
            await http.get("/x")
        assert server.requests == []

    talk(body, tls=server_tls(certificates))


def test_a_certificate_for_another_host_is_not_trusted(certificates: Path) -> None:
    async def main() -> None:
        async with open_fault_server(tls=server_tls(certificates)) as server:
            url = server.url.replace("127.0.0.1", "localhost")
            async with HttpApi.open(Api(url=url, ca_file=certificates / "ca.pem"), Credentials) as http:
                with pytest.raises(Unreachable, match="certificate verify failed"):
                    await http.get("/x")

    trio.run(main)


def test_without_verify_any_certificate_will_do(certificates: Path) -> None:
    talk(_hello, tls=server_tls(certificates), verify=False)


@pytest.mark.parametrize(("cert", "key"), [("client.pem", "client.key"), ("both.pem", None)], ids=["two files", "one"])
def test_a_client_certificate_is_shown_to_a_server_that_wants_one(
    certificates: Path, cert: str, key: str | None
) -> None:
    talk(
        _hello,
        tls=server_tls(certificates, client=True),
        ca_file=certificates / "ca.pem",
        client_cert=certificates / cert,
        client_key=None if key is None else certificates / key,
    )


def test_a_server_that_wants_a_client_certificate_lets_nobody_in_without(certificates: Path) -> None:
    async def body(http: HttpApi, server: FaultServer) -> None:
        # With TLS 1.3 the server says no only after the client has begun to send.
        with pytest.raises((LostAnswer, Unreachable)):
            await http.get("/x")
        assert server.requests == []

    talk(body, tls=server_tls(certificates, client=True), ca_file=certificates / "ca.pem")


def test_plain_http_from_a_tls_port_and_tls_to_a_plain_port_are_told(certificates: Path) -> None:
    async def main() -> None:
        async with open_fault_server() as plain, open_fault_server(tls=server_tls(certificates)) as secret:
            tls_to_plain = Api(url=plain.url.replace("http:", "https:"), verify=False)
            plain_to_tls = Api(url=secret.url.replace("https:", "http:"))
            async with HttpApi.open(tls_to_plain, Credentials) as http:
                with pytest.raises(Unreachable, match="cannot connect"):
                    await http.get("/x")
            async with HttpApi.open(plain_to_tls, Credentials) as http:
                with pytest.raises(LostAnswer):
                    await http.get("/x")

    trio.run(main)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ca_file": "missing.pem"}, r"cannot use api\.ca_file .*missing\.pem: No such file"),
        ({"ca_file": "ca.key"}, r"cannot use api\.ca_file"),
        ({"client_cert": "missing.pem"}, r"cannot use api\.client_cert .*No such file"),
        ({"client_cert": "client.pem", "client_key": "server.key"}, r"api\.client_key .*server\.key"),
        ({"client_cert": "client.pem", "client_key": "locked.key"}, r"api\.client_key .*locked\.key"),
    ],
)
def test_certificates_that_cannot_be_used_are_a_config_error(
    certificates: Path, settings: dict[str, str], words: str
) -> None:
    async def main() -> None:
        files: dict[str, Any] = {key: certificates / name for key, name in settings.items()}
        with pytest.raises(ConfigError, match=words):
            async with HttpApi.open(Api(url="https://127.0.0.1/api", **files), Credentials):
                raise AssertionError

    trio.run(main)


def test_the_usual_places_are_searched_where_openssl_knows_no_certificates(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)

    def paths(cafile: Path | None = None, capath: Path | None = None) -> ssl.DefaultVerifyPaths:
        return cast("ssl.DefaultVerifyPaths", SimpleNamespace(cafile=cafile, capath=capath))

    known = certificates / "ca.pem"
    places = ("/nonexistent/bundle.pem", str(known))
    assert ca_bundle(paths(), places) == known
    assert ca_bundle(paths(capath=tmp_path), places) == known  # a folder, but an empty one
    assert ca_bundle(paths(cafile=known), places) is None
    assert ca_bundle(paths(capath=certificates), places) == known  # none that OpenSSL would find by its hash: Red Hat
    hashed = tmp_path / "hashed"
    hashed.mkdir()
    (hashed / "5ed36f99.0").symlink_to(known)
    assert ca_bundle(paths(capath=hashed), places) is None
    last = ca_bundle(paths(), ())
    assert last is not None
    assert "BEGIN CERTIFICATE" in last.read_text()
    monkeypatch.setenv("SSL_CERT_FILE", "/some/bundle.pem")
    assert ca_bundle(paths(), places) is None


# --- proxies --------------------------------------------------------------------------------------------------------


def test_a_proxy_from_the_environment_is_used_for_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_fault_server() as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/api"))
            proxy.rules.append(on("GET", "/x", Status(200, {}, "by proxy")))
            async with HttpApi.open(Api(url="http://prefect.invalid/api"), Credentials) as http:
                assert await http.get("/x") == "by proxy"
            assert seen(proxy).target == "http://prefect.invalid/api/x"
            monkeypatch.setenv("NO_PROXY", "prefect.invalid")
            async with HttpApi.open(Api(url="http://prefect.invalid/api"), Credentials) as http:
                with pytest.raises(Unreachable):
                    await http.get("/x")
            assert len(proxy.requests) == 1

    trio.run(main)


@pytest.mark.parametrize(
    ("fault", "error"), [(Status(407, {}, b""), Unreachable), (Status(502, {}, b""), Unreachable)], ids=["407", "502"]
)
def test_a_proxy_that_opens_no_tunnel_leaves_the_server_unreachable(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, error: type[BackendError]
) -> None:
    async def main() -> None:
        async with open_fault_server() as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url.removesuffix("/api").replace("://", "://joe:hidden@"))
            proxy.rules.append(on("CONNECT", ".*", fault))
            async with HttpApi.open(Api(url="https://prefect.invalid/api"), Credentials) as http:
                with pytest.raises(error, match="the proxy refused") as away:
                    await http.get("/x")
            assert "hidden" not in str(away.value)
            assert seen(proxy).target == "prefect.invalid:443"

    trio.run(main)


def test_a_proxy_that_cannot_be_used_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setenv("ALL_PROXY", "gopher://joe:hidden@proxy.invalid:70")
        with pytest.raises(ConfigError, match="cannot use the proxy") as wrong:
            async with HttpApi.open(Api(url="http://prefect.invalid/api"), Credentials):
                raise AssertionError
        assert "hidden" not in str(wrong.value)

    trio.run(main)
