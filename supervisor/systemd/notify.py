"""sd_notify(3): datagrams to the service manager that started us, where there is one.

A manager that does not listen must never disturb the agent, so nothing here raises or blocks.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping

import trio

STATUS_SECONDS = 2.0  # how often the status line may change

_OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_log = logging.getLogger("flow-agent")


def clear_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Forgets the manager's variables, once they have been read: a child that had them would speak in our name."""
    for name in _OURS:
        environ.pop(name, None)


class Notifier:
    """The way to the service manager; without one, every method does nothing.

    Owns the socket, the last status that was sent, and the messages that found the manager's queue full.
    """

    def __init__(self, address: str | None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._status: str | None = None
        self._owed: list[str] = []
        self._complained = False
        if self._address and self._address.startswith(("/", "\0")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        elif address:
            _log.debug("cannot notify %s: only unix sockets are spoken here", address)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Notifier:
        """For the manager that this process was started by, if any."""
        return cls(environ.get("NOTIFY_SOCKET"))

    def ready(self, status: str) -> None:
        """Start-up is over, or a reload."""
        self._send(f"READY=1\n{self._status_line(status)}", keep=True)

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends that, whatever has come of it."""
        # The time by which the manager knows whether this is about the reload it has asked for.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", keep=True)

    def stopping(self, status: str) -> None:
        """Shutdown has begun."""
        self._send(f"STOPPING=1\n{self._status_line(status)}", keep=True)

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only when it differs from the last one."""
        if _one_line(text) != self._status:
            self._send(self._status_line(text))

    def extend(self, seconds: float) -> None:
        """The start or stop that is under way is not to be given up before so many seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> None:
        """We make progress."""
        self._send("WATCHDOG=1")

    async def run_status(self, describe: Callable[[], str]) -> None:
        """Keeps the status line true, for ever: asks `describe` every two seconds."""
        while True:
            self._pay()
            self.status(describe())
            await trio.sleep(STATUS_SECONDS)

    def close(self) -> None:
        """Lets go of the socket. What is sent afterwards goes nowhere."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _status_line(self, text: str) -> str:
        self._status = _one_line(text)
        return f"STATUS={self._status}"

    def _pay(self) -> None:
        """Sends what the manager had no room for: without READY=1 it would take the start for failed."""
        owed, self._owed = self._owed, []
        for message in owed:
            self._send(message, keep=True)

    def _send(self, message: str, *, keep: bool = False) -> None:
        if self._socket is None or self._address is None:
            return
        if keep and self._owed:  # READY=1 must not overtake the RELOADING=1 before it
            self._owed.append(message)
            return
        try:
            self._socket.sendto(message.encode(), self._address)
            self._complained = False
        except OSError as error:
            if keep:
                self._owed.append(message)
            if not self._complained:
                self._complained = True
                _log.debug("cannot notify the service manager: %s", error)


def _one_line(text: str) -> str:
    """A line break would begin a new assignment."""
    return " ".join(text.split())
