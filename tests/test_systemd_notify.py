"""Notifications, received on a real datagram socket."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor.systemd.notify import Notifier, clear_environment


class Ear:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self) -> list[str]:
        """What has arrived since the last time."""
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    made = Ear(str(tmp_path / "notify") if request.param == "path" else f"@flow-agent-notify-{os.getpid()}")
    yield made
    made.socket.close()


@pytest.fixture
def notifier(ear: Ear) -> Iterator[Notifier]:
    made = Notifier.from_environ({"NOTIFY_SOCKET": ear.address})
    yield made
    made.close()


def test_ready_and_stopping_carry_the_status(ear: Ear, notifier: Notifier) -> None:
    notifier.ready("nothing to do")
    notifier.stopping("draining")
    assert ear.heard() == ["READY=1\nSTATUS=nothing to do", "STOPPING=1\nSTATUS=draining"]


def test_a_status_is_sent_only_when_it_has_changed(ear: Ear, notifier: Notifier) -> None:
    notifier.ready("a")
    notifier.status("a")
    notifier.status("b")
    notifier.status("b")
    assert ear.heard()[1:] == ["STATUS=b"]


def test_a_status_cannot_smuggle_in_a_second_assignment(ear: Ear, notifier: Notifier) -> None:
    notifier.status("queue 'a\nMAINPID=1'")
    assert ear.heard() == ["STATUS=queue 'a MAINPID=1'"]


def test_the_status_line_follows_its_function_every_two_seconds(
    ear: Ear, notifier: Notifier, autojump_clock: trio.testing.MockClock
) -> None:
    asked: list[float] = []

    def describe() -> str:
        asked.append(trio.current_time())
        return f"{len(asked) // 2} running"

    async def main() -> None:
        with trio.move_on_after(7):
            await notifier.run_status(describe)

    trio.run(main, clock=autojump_clock)
    assert [at - asked[0] for at in asked] == pytest.approx([0, 2, 4, 6])
    assert ear.heard() == ["STATUS=0 running", "STATUS=1 running", "STATUS=2 running"]


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier.from_environ({})
    notifier.ready("a")
    notifier.watchdog()
    notifier.close()


@pytest.mark.parametrize("address", ["/nowhere/at/all", "@nobody-listens-here", "vsock:2:1", "relative"])
def test_a_manager_that_cannot_be_reached_disturbs_nobody_and_is_mentioned_once(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flow-agent")
    notifier = Notifier(address)
    notifier.ready("a")
    notifier.status("b")
    notifier.watchdog()
    notifier.close()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_ready_is_sent_again_when_the_managers_queue_was_full(
    ear: Ear, notifier: Notifier, autojump_clock: trio.testing.MockClock
) -> None:
    for _ in range(10_000):  # the kernel's queue for datagrams holds at most some hundreds
        notifier.watchdog()
    notifier.ready("here")
    assert "READY=1\nSTATUS=here" not in ear.heard()

    async def main() -> None:
        with trio.move_on_after(1):
            await notifier.run_status(lambda: "here")

    trio.run(main, clock=autojump_clock)
    assert ear.heard() == ["READY=1\nSTATUS=here"]


def test_the_end_of_a_reload_is_never_heard_before_its_beginning(
    ear: Ear, notifier: Notifier, autojump_clock: trio.testing.MockClock
) -> None:
    for _ in range(10_000):
        notifier.watchdog()
    notifier.reloading()
    ear.heard()  # there is room again
    notifier.ready("here")
    assert ear.heard() == []

    async def main() -> None:
        with trio.move_on_after(1):
            await notifier.run_status(lambda: "here")

    trio.run(main, clock=autojump_clock)
    reloading, ready = ear.heard()
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
    assert ready == "READY=1\nSTATUS=here"


def test_a_manager_that_comes_back_hears_us_again(tmp_path: Path) -> None:
    first = Ear(str(tmp_path / "notify"))
    notifier = Notifier(first.address)
    first.socket.close()
    (tmp_path / "notify").unlink()
    notifier.status("a")
    second = Ear(first.address)
    notifier.status("b")
    assert second.heard() == ["STATUS=b"]
    second.socket.close()
    notifier.close()


def test_no_child_inherits_the_socket(ear: Ear, notifier: Notifier) -> None:
    notifier.status("opened")
    child = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False, check=True)
    assert "pipe:" in child.stdout
    assert "socket:" not in child.stdout


def test_the_managers_variables_are_forgotten_and_no_others() -> None:
    environ = {"NOTIFY_SOCKET": "@a", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2", "LISTEN_FDS": "3", "PATH": "/bin"}
    clear_environment(environ)
    assert environ == {"PATH": "/bin"}
