"""The errors that cross a room's door, each named for what the caller can do about it.

    FlowAgentError
    ├── ConfigError           the user must change the configuration; the command exits 78
    ├── StateDirectoryHeld    another agent owns the state directory; the command exits 75
    ├── InterpreterError      the Python for flows is missing or has no Prefect
    ├── JobError              this run can never be started as it is described; fail it with this sentence
    └── BackendError          a call to the server gave no answer that can be used
        ├── Unreachable       nothing was sent: repeat or forget, both are safe
        ├── LostAnswer        sent, no whole answer: the server may or may not have carried it out
        ├── ServerTrouble     5xx, 408, 429 or an answer that is not the protocol: try later, outcome unknown
        ├── Unauthorized      401 or 403: the credentials are wrong, or not yet right
        ├── NotFound          404: the thing does not exist (any more)
        └── Refused           any other 4xx: asking again the same way will not help

The wire layer raises them and never retries; who retries, and for how long, is decided in `supervisor.runs`.
"""

from __future__ import annotations


class FlowAgentError(Exception):
    """Base of every error that this program raises on purpose. `str()` is one sentence for people."""


class ConfigError(FlowAgentError):
    """The configuration cannot be used.

    `mistakes` holds every mistake found, one sentence each, already with file and line where there is one.
    """

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class StateDirectoryHeld(FlowAgentError):
    """Another agent holds the lock of the state directory; the sentence says which."""


class InterpreterError(FlowAgentError):
    """The Python that should run flows does not exist, cannot be executed, or has no Prefect."""


class JobError(FlowAgentError):
    """The run's deployment, work pool, blocks or variables describe something this agent cannot start."""


class BackendError(FlowAgentError):
    """A call to the server gave no answer that can be used.

    `ambiguous` is true where the server may have carried the call out all the same. `retry_after` is the server's own
    wish in seconds, where it stated one.
    """

    ambiguous = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unreachable(BackendError):
    """Nothing was sent: connection refused, no such host, TLS handshake failed, proxy away."""


class LostAnswer(BackendError):
    """The request went out and no whole answer came back: timeout, reset, half-closed connection."""

    ambiguous = True


class ServerTrouble(BackendError):
    """The server (or a proxy before it) answered 5xx, 408, 429, or something that is not the protocol."""

    ambiguous = True


class Unauthorized(BackendError):
    """401 or 403."""


class NotFound(BackendError):
    """404: the object does not exist, or does not exist any more."""


class Refused(BackendError):
    """Any other 4xx. `status` is the HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
