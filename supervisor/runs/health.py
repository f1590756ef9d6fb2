"""Whether the server answers: heard from every loop, said once on loss and once on recovery."""

from __future__ import annotations

import logging

import trio

from supervisor.errors import BackendError, LostAnswer, NotFound, Refused, ServerTrouble, Unauthorized

QUIET_SECONDS = 1.0  # several calls that fail together are one hiccup, not an outage

_log = logging.getLogger("flow-agent")


class ServerHealth:
    """The one memory of how the server has been answering. Owns when it was lost and what has been said about it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._failures = 0
        self._lost_at: float | None = None
        self._said: set[str] = set()  # of "outage" and "credentials": what has been said of this loss
        self._kind = ""  # the one that the last failure was about
        self._last_poll: float | None = None
        self.answers = 0  # how often the server has answered, whatever was asked

    @property
    def lost(self) -> bool:
        return bool(self._said)

    def polled(self) -> None:
        """A poll for work went well."""
        self._last_poll = trio.current_time()
        self.answered()

    def answered(self) -> None:
        """The server gave an answer of its own."""
        self.answers += 1
        if self._said and self._lost_at is not None:
            _log.info("the server at %s answers again after %s", self._url, span(trio.current_time() - self._lost_at))
        self._failures = 0
        self._lost_at = None
        self._said.clear()

    def failed(self, error: BackendError) -> None:
        """A call failed. Says so once for an outage, and once more when it turns out to be about credentials."""
        if isinstance(error, NotFound | Refused):
            self.answered()
            return
        self._failures += 1
        if self._lost_at is None:
            self._lost_at = trio.current_time()
        # A few 503s or dropped connections are everyday life with a server on SQLite: not worth a line yet.
        passing = self._failures < 2 or trio.current_time() - self._lost_at < QUIET_SECONDS
        if isinstance(error, ServerTrouble | LostAnswer) and passing:
            return
        self._kind = kind = "credentials" if isinstance(error, Unauthorized) else "outage"
        if kind in self._said:
            return
        self._said.add(kind)
        if kind == "credentials":
            _log.error(
                "the server at %s refuses our credentials: %s. Check api.api_key_file or api.auth_string_file; "
                "runs that are under way go on, and we keep asking",
                self._url,
                error,
            )
        else:
            _log.warning(
                "lost the server at %s: %s. Runs that are under way go on, and we keep asking", self._url, error
            )

    def describe(self) -> str:
        """For the status line: when we last polled, or since when the server has been away."""
        now = trio.current_time()
        if self._said and self._lost_at is not None:
            what = "server refuses our credentials" if self._kind == "credentials" else "server away"
            return f"{what} for {span(now - self._lost_at)}"
        return "no poll yet" if self._last_poll is None else f"last poll {span(now - self._last_poll)} ago"


def span(seconds: float) -> str:
    """A duration for people."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
