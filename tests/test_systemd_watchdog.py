"""The watchdog on a clock that jumps, its pings received on a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

from supervisor.systemd.notify import Notifier
from supervisor.systemd.watchdog import Watchdog


class Manager:
    """A service manager that kills after `limit` seconds of silence. Owns when it heard us."""

    def __init__(self) -> None:
        self.address = f"@flow-agent-watchdog-{os.getpid()}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.socket.bind("\0" + self.address[1:])
        self.heard: list[float] = []

    async def listen(self) -> None:
        ear = trio.socket.from_stdlib_socket(self.socket)
        while True:
            assert await ear.recv(100) == b"WATCHDOG=1"
            self.heard.append(trio.current_time())


@pytest.fixture
def manager() -> Iterator[Manager]:
    made = Manager()
    yield made
    made.socket.close()


def watched(
    manager: Manager, clock: trio.testing.MockClock, seconds: float, loop: Callable[[Watchdog], Awaitable[None]]
) -> list[float]:
    """When pings arrived, in seconds from the start, while `loop` ran under a watchdog of 10 s."""
    notifier = Notifier(manager.address)
    watchdog = Watchdog.from_environ(notifier, {"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())})

    async def main() -> float:
        started = trio.current_time()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(manager.listen)
                nursery.start_soon(loop, watchdog)
                nursery.start_soon(watchdog.run)
        return started

    started = trio.run(main, clock=clock)
    notifier.close()
    return [round(at - started, 3) for at in manager.heard]


def test_it_pings_at_half_the_limit_while_nothing_is_late(
    manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    async def loop(watchdog: Watchdog) -> None:
        pulse = watchdog.pulse("poll")
        while True:
            pulse.expect(3)
            await trio.sleep(2)

    assert watched(manager, autojump_clock, 21, loop) == [0, 5, 10, 15, 20]


def test_a_loop_that_hangs_stops_the_pings_and_is_named_once(
    manager: Manager, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def loop(watchdog: Watchdog) -> None:
        watchdog.pulse("cancel").expect(None)
        watchdog.pulse("poll of pool 'p'").expect(7)
        await trio.sleep_forever()

    assert watched(manager, autojump_clock, 60, loop) == [0, 5]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "no progress in: poll of pool 'p'. The service manager's watchdog is not fed until that changes"
    ]


def test_a_loop_whose_every_call_fails_is_not_late(manager: Manager, autojump_clock: trio.testing.MockClock) -> None:
    async def loop(watchdog: Watchdog) -> None:
        pulse = watchdog.pulse("poll")
        delay = 1.0
        while True:
            pulse.expect(30)
            await trio.sleep(29)  # the whole of a request's timeout, and no answer
            delay = min(delay * 2, 60)
            pulse.expect(delay + 30)
            await trio.sleep(delay)

    assert watched(manager, autojump_clock, 601, loop) == [float(at) for at in range(0, 601, 5)]


def test_a_loop_that_comes_back_is_heard_before_the_limit_is_over(
    manager: Manager, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def loop(watchdog: Watchdog) -> None:
        pulse = watchdog.pulse("poll")
        pulse.expect(4)
        await trio.sleep(7.5)
        pulse.expect(100)
        await trio.sleep_forever()

    assert watched(manager, autojump_clock, 14, loop) == [0, 8, 13]
    assert [record.getMessage() for record in caplog.records][-1] == "progress again in: poll"


def test_an_idle_loop_and_a_dismissed_one_are_never_late(
    manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    async def loop(watchdog: Watchdog) -> None:
        watchdog.pulse("cancel").expect(None)
        watchdog.pulse("poll of a").expect(1)
        watchdog.pulse("poll of b").expect(1)
        await trio.sleep(3)
        assert watchdog.late() == ["poll of a", "poll of b"]
        watchdog.dismiss("poll of ")
        assert watchdog.late() == []
        await trio.sleep_forever()

    assert watched(manager, autojump_clock, 11, loop) == [0, 5, 10]


def test_two_loops_of_one_name_are_two(autojump_clock: trio.testing.MockClock) -> None:
    async def main() -> None:
        watchdog = Watchdog(Notifier(None), None)
        watchdog.pulse("poll").expect(1)
        watchdog.pulse("poll").expect(10)
        await trio.sleep(2)
        assert watchdog.late() == ["poll"]

    trio.run(main, clock=autojump_clock)


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getppid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1000000000"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watch_is_kept_only_when_it_is_meant_for_us(environ: dict[str, str], seconds: float | None) -> None:
    assert Watchdog.from_environ(Notifier(None), environ).seconds == seconds


def test_without_a_watch_it_ends_at_once(autojump_clock: trio.testing.MockClock) -> None:
    trio.run(Watchdog(Notifier(None), None).run, clock=autojump_clock)
