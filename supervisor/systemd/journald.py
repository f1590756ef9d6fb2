"""The journal's native protocol: records with fields, so that `journalctl FLOW_RUN_ID=…` shows one run's whole story.

As systemd's "Native Journal Protocol" page has it: one datagram a record; a record that is too long for one goes in a sealed
memory file whose descriptor is sent instead. Nothing here raises or blocks: a journal that does not listen must not hold us up.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Mapping

ADDRESS = "/run/systemd/journal/socket"
_BUFFER = 8 * 1024 * 1024  # bytes that may wait in the socket, as systemd's own library asks for
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Journald:
    """The way to the journal. Owns the socket."""

    def __init__(self, address: str = ADDRESS) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    def send(self, fields: Mapping[str, str]) -> bool:
        """One record. False when the journal did not take it: it is not there, or its queue is full."""
        record = b"".join(_field(name, value) for name, value in fields.items())
        try:
            self._socket.sendto(record, self._address)
        except OSError as error:
            return error.errno in (errno.EMSGSIZE, errno.ENOBUFS) and self._send_long(record)
        return True

    def _send_long(self, record: bytes) -> bool:
        try:
            memory = os.memfd_create("flow-agent-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                with os.fdopen(os.dup(memory), "wb") as file:
                    file.write(record)
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)  # the journal reads it in place, so it must not change
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))
                self._socket.sendmsg([], [rights], 0, self._address)
            finally:
                os.close(memory)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Lets go of the socket."""
        self._socket.close()


def _field(name: str, value: str) -> bytes:
    raw = value.encode(errors="surrogateescape")
    if b"\n" in raw:
        return name.encode() + b"\n" + struct.pack("<Q", len(raw)) + raw + b"\n"
    return name.encode() + b"=" + raw + b"\n"
