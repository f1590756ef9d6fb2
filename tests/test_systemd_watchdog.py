"""The watchdog on a clock that jumps, its pings received on a real datagram socket."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

from supervisor.systemd.notify import Notifier
from supervisor.systemd.watchdog import MORE_EVERY, MORE_SECONDS, Watchdog


class Manager:
    """A service manager. Owns when it heard us."""

    def __init__(self, says: bytes = b"WATCHDOG=1") -> None:
        self.says = says
        self.address = f"@flow-agent-watchdog-{os.getpid()}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.socket.bind("\0" + self.address[1:])
        self.heard: list[float] = []

    async def listen(self) -> None:
        ear = trio.socket.from_stdlib_socket(self.socket)
        while True:
            assert await ear.recv(100) == self.says
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
    said, where = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == "no progress in: poll of pool 'p'. The service manager's watchdog is not fed until that changes"
    assert re.search(
        r"where every task stands\n(.*\n)*.*test_systemd_watchdog.py:\d+ .*loop\n.*trio/_timeouts.py:\d+ sleep", where
    )


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


# --- more time -----------------------------------------------------------------------------------------------------


@pytest.fixture
def patient_manager() -> Iterator[Manager]:
    made = Manager(f"EXTEND_TIMEOUT_USEC={round(MORE_SECONDS * 1e6)}".encode())
    yield made
    made.socket.close()


def test_more_time_is_asked_for_in_small_steps_while_it_is_wanted_and_no_loop_is_late(
    patient_manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    notifier = Notifier(patient_manager.address)
    watchdog = Watchdog(notifier, None)
    wanted = False

    async def main() -> float:
        nonlocal wanted
        since = trio.Event()
        async with trio.open_nursery() as nursery:
            started = trio.current_time()
            nursery.start_soon(patient_manager.listen)
            nursery.start_soon(watchdog.ask_for_time, lambda: wanted, since)
            await trio.sleep(101)
            wanted = True
            since.set()
            await trio.sleep(100)
            watchdog.pulse("run loop").expect(0)
            await trio.sleep(100)
            nursery.cancel_scope.cancel()
        return started

    started = trio.run(main, clock=autojump_clock)
    notifier.close()
    every = round(MORE_EVERY)
    assert [round(at - started) for at in patient_manager.heard] == [*range(101, 201, every)]
    assert every * 3 < MORE_SECONDS


def test_a_start_that_takes_long_has_time_and_what_it_raises_is_not_wrapped(
    patient_manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    notifier = Notifier(patient_manager.address)

    async def fails_to_start(watchdog: Watchdog) -> None:
        with watchdog.starting():
            await trio.sleep(1)
            raise ValueError("as it is")

    async def main() -> float:
        started = trio.current_time()
        watchdog = Watchdog(notifier, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(patient_manager.listen)
            with watchdog.starting():
                await trio.sleep(70)
            await trio.sleep(50)
            with pytest.raises(ValueError, match="as it is"):
                await fails_to_start(watchdog)
            await trio.sleep(50)
            nursery.cancel_scope.cancel()
        return started

    started = trio.run(main, clock=autojump_clock)
    notifier.close()
    assert [round(at - started) for at in patient_manager.heard] == [0, 15, 30, 45, 60, 70, 120]
