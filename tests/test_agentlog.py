"""The agent's own log: on a terminal, as JSON, and in the journal with fields."""

from __future__ import annotations

import array
import io
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from supervisor import agentlog
from supervisor.model import log_extra
from supervisor.systemd.journald import Journald
from tests.fakes import offer

RUN = offer()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


class Stream(io.StringIO):
    """A stream that is the journal's, as far as its file goes; nobody reads it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w")
        status = os.fstat(self._file.fileno())
        self.environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


class Listener:
    """The journal's end: decodes what comes in as journald does."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(5)

    def receive(self) -> dict[str, str]:
        data, rights, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for _, _, raw in rights:
            descriptor = array.array("i", raw)[0]
            data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            with pytest.raises(OSError, match="Operation not permitted"):
                os.pwrite(descriptor, b"x", 0)  # sealed
            os.close(descriptor)
        return _decoded(data)

    def close(self) -> None:
        self._socket.close()


def _decoded(data: bytes) -> dict[str, str]:
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        found[name.decode()] = value.decode(errors="surrogateescape")
    return found


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "socket")
    yield made
    made.close()


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[Stream]:
    with Stream(tmp_path / "stream") as made:
        yield made


@pytest.fixture
def in_the_journal(listener: Listener, stream: Stream) -> logging.Handler:
    agentlog.configure("info", journal=lambda: Journald(listener.address), stream=stream, environ=stream.environ)
    return logging.getLogger().handlers[0]


def test_a_line_for_people_names_the_run_it_is_about() -> None:
    stream = io.StringIO()
    agentlog.configure("info", stream=stream, environ={})
    logging.getLogger("flow-agent").warning("lost %d", 3, extra=log_extra(RUN))
    logging.getLogger("flow-agent").debug("not said")
    assert stream.getvalue().endswith(" WARNING flow run 'name-of-r1' (r1): lost 3\n")
    assert stream.getvalue().count("\n") == 1


def test_a_traceback_stands_below_its_line() -> None:
    stream = io.StringIO()
    agentlog.configure("info", stream=stream, environ={})
    try:
        int("many")
    except ValueError:
        logging.getLogger("flow-agent").exception("a bug")
    assert stream.getvalue().splitlines()[0].endswith("ERROR   a bug")
    assert stream.getvalue().splitlines()[-1] == "ValueError: invalid literal for int() with base 10: 'many'"


def test_json_is_one_object_a_line_with_all_that_is_known() -> None:
    stream = io.StringIO()
    agentlog.configure("info", "json", stream=stream, environ={})
    logging.getLogger("flow-agent").info('said "%s"', "two\nlines", extra=log_extra(RUN))
    try:
        int("many")
    except ValueError:
        logging.getLogger("flow-agent").exception("a bug")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "flow-agent",
        "message": 'said "two\nlines"',
        "run": "r1",
        "run_name": "name-of-r1",
        "deployment": "d1",
    }
    assert second["exception"].endswith("ValueError: invalid literal for int() with base 10: 'many'")


def test_json_is_json_under_systemd_too(listener: Listener, stream: Stream) -> None:
    journal = lambda: Journald(listener.address)  # noqa: E731
    agentlog.configure("info", "json", journal=journal, stream=stream, environ=stream.environ)
    logging.getLogger("flow-agent").info("said")
    assert json.loads(stream.getvalue())["message"] == "said"


@pytest.mark.parametrize(("level", "priority"), [(logging.ERROR, "3"), (logging.WARNING, "4"), (logging.INFO, "6")])
@pytest.mark.usefixtures("in_the_journal")
def test_the_journal_gets_records_with_fields(listener: Listener, stream: Stream, level: int, priority: str) -> None:
    logging.getLogger("flow-agent").log(level, "word %d", 7, extra=log_extra(RUN))
    fields = listener.receive()
    assert fields.pop("CODE_LINE").isdigit()
    assert fields.pop("CODE_FILE") == __file__
    assert fields == {
        "MESSAGE": "flow run 'name-of-r1' (r1): word 7",
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "flow-agent",
        "CODE_FUNC": "test_the_journal_gets_records_with_fields",
        "LOGGER": "flow-agent",
        "FLOW_RUN_ID": "r1",
        "FLOW_RUN_NAME": "name-of-r1",
        "DEPLOYMENT": "d1",
    }
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "message",
    ["two\nlines", "a=b", "FLOW_RUN_ID=forged\nFLOW_RUN_ID=forged", "\udcff bytes", "long " * 4_000_000],
    ids=["lines", "equals", "forged", "undecodable", "too long for a datagram"],
)
def test_any_text_arrives_as_it_is(listener: Listener, in_the_journal: logging.Handler, message: str) -> None:
    # Not by a logger: what pytest captures of it could not be sent from its workers.
    in_the_journal.handle(logging.LogRecord("flow-agent", logging.INFO, __file__, 1, "%s", (message,), None))
    fields = listener.receive()
    assert fields["MESSAGE"] == message
    assert "FLOW_RUN_ID" not in fields


@pytest.mark.usefixtures("in_the_journal")
def test_a_record_that_the_journal_does_not_take_goes_to_the_stream(listener: Listener, stream: Stream) -> None:
    Path(listener.address).unlink()
    logging.getLogger("flow-agent").error("all the same")
    assert stream.getvalue() == "<3>all the same\n"


@pytest.mark.usefixtures("in_the_journal")
def test_a_journal_that_does_not_read_holds_nobody_up(listener: Listener, stream: Stream) -> None:
    for number in range(2000):  # far more than a socket's queue holds
        logging.getLogger("flow-agent").info("%d", number)
    kept = stream.getvalue().splitlines()
    assert kept[-1] == "<6>1999"
    assert listener.receive()["MESSAGE"] == "0"


def test_a_stream_that_is_not_the_journals_gets_text(listener: Listener, stream: Stream) -> None:
    environ: Mapping[str, str] = {"JOURNAL_STREAM": "1:1"}  # standard error has been sent somewhere else
    agentlog.configure("info", journal=lambda: Journald(listener.address), stream=stream, environ=environ)
    logging.getLogger("flow-agent").info("said")
    assert stream.getvalue().endswith(" INFO    said\n")
