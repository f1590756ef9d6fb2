"""How the agent's own log lines look: for people on a terminal or in a file, with fields for the journal, or as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol, TextIO

IDENTIFIER = "flow-agent"

# syslog's numbers, for the journal and, as sd-daemon(3) wants them, in front of each line that goes there as text.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_EXCEPTION = logging.Formatter()


class Journal(Protocol):
    """What is needed of the way to the journal (`supervisor.systemd.journald`)."""

    def send(self, fields: Mapping[str, str]) -> bool: ...

    def close(self) -> None: ...


def configure(
    level: str,
    form: str = "text",
    *,
    journal: Callable[[], Journal] | None = None,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Sends all log records of that level and above to `stream` (standard error), as "text" or "json".

    Text goes to `journal` record by record where the stream is the journal's own; where that does not take one, to the stream.
    """
    out = stream if stream is not None else sys.stderr
    handler: logging.Handler = logging.StreamHandler(out)
    by_manager = _is_journal(out, environ)
    handler.setFormatter(_Json() if form == "json" else _Line(journal=by_manager))
    if by_manager and form == "text" and journal is not None:
        handler = _Records(journal(), handler)
    root = logging.getLogger()
    before, root.handlers[:] = root.handlers[:], [handler]
    for old in before:
        old.close()
    root.setLevel(level.upper())
    # Every request would be a line at INFO.
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _Records(logging.Handler):
    """Records with fields, for the journal."""

    def __init__(self, journal: Journal, otherwise: logging.Handler) -> None:
        super().__init__()
        self._journal = journal
        self._otherwise = otherwise

    def emit(self, record: logging.LogRecord) -> None:
        if not self._journal.send(_fields(record)):
            self._otherwise.handle(record)

    def close(self) -> None:
        self._journal.close()
        super().close()


def _fields(record: logging.LogRecord) -> dict[str, str]:
    """Named as systemd.journal-fields(7) has them, and ours beside them."""
    fields = {
        "MESSAGE": _text(record),
        "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
        "LOGGER": record.name,
    }
    about = _about(record)
    names = {"run": "FLOW_RUN_ID", "run_name": "FLOW_RUN_NAME", "deployment": "DEPLOYMENT"}
    return fields | {names[key]: value for key, value in about.items()}


def _about(record: logging.LogRecord) -> dict[str, str]:
    """Which run it is about, as far as that is known."""
    found = {
        "run": getattr(record, "run", None) or getattr(record, "run_id", None),
        "run_name": getattr(record, "run_name", None),
        "deployment": getattr(record, "deployment", None),
    }
    return {key: str(value) for key, value in found.items() if value}


def _text(record: logging.LogRecord) -> str:
    """The message, with the run it is about in front and the traceback, if any, below."""
    about = _about(record)
    named = f"flow run '{about['run_name']}' ({about['run']}): " if "run_name" in about else ""
    text = named + record.getMessage()
    return f"{text}\n{_EXCEPTION.formatException(record.exc_info)}" if record.exc_info else text


class _Line(logging.Formatter):
    """One record as text."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = _text(record)
        if self._journal:
            priority = _PRIORITIES.get(record.levelno, 6)
            return "\n".join(f"<{priority}>{line}" for line in text.splitlines())
        return f"{self.formatTime(record)} {record.levelname:<7} {text}"


class _Json(logging.Formatter):
    """One record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        what = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about(record),
        }
        if record.exc_info:
            what["exception"] = _EXCEPTION.formatException(record.exc_info)
        return json.dumps(what, ensure_ascii=False)


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether the stream is the journal's socket, as systemd.exec(5) says it is to be found out."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
