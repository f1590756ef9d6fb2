"""Where every task stands, as an agent that makes no progress leaves it in the log."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
import types

import pytest
import trio
import trio.testing

from supervisor.systemd import stacks
from supervisor.systemd.stacks import Sentry, describe, on_request
from tests.waiting import wait_until


async def waits_for_ever() -> None:
    password = "not-for-the-log"  # a value, of which nothing may be seen
    await trio.sleep_forever()
    print(password)


async def has_children() -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(waits_for_ever)
        nursery.start_soon(waits_for_ever, name="the fourth")


async def here() -> str:
    """What is said of a tree of tasks by one of them."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(has_children, name="parent")
        await trio.testing.wait_all_tasks_blocked()
        said = describe(root, threading.get_ident())
        nursery.cancel_scope.cancel()
    return said


def test_each_task_is_named_below_its_parent_with_the_places_it_waits_at() -> None:
    said = trio.run(here)
    assert re.search(
        r"^( +)- parent\n"
        r"\1    \S*tests/test_systemd_stacks.py:\d+ has_children\n"
        r"\1    trio/_core/_run.py:\d+ NurseryManager.__aexit__\n"
        r"(?:\1    trio/.*\n)+"
        r"\1  - \S*waits_for_ever \(3 of them\)\n"
        r"\1      \S*tests/test_systemd_stacks.py:\d+ waits_for_ever\n"
        r"\1      trio/_timeouts.py:\d+ sleep_forever\n"
        r"\1  - the fourth\n",
        said,
        re.MULTILINE,
    ), said
    assert "(running, see the event loop)" in said
    assert re.search(
        r"^    \S*tests/test_systemd_stacks.py:\d+ here$", said, re.MULTILINE
    )  # by the stack of the loop itself


def test_no_value_is_told() -> None:
    assert "not-for-the-log" not in trio.run(here)


def test_what_is_too_long_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "LIMIT", 500)
    said = trio.run(here)
    assert 300 < len(said) < 550
    assert re.search(r"\nand \d+ more lines$", said)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_event_loop_that_stands_still_is_described_from_outside_and_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(has_children)
            await trio.testing.wait_all_tasks_blocked()
            with Sentry(0.2) as sentry:
                wait_until(lambda: errors(caplog), 10, "it is said")  # blocks, as nothing of ours should
                time.sleep(0.5)
                assert len(errors(caplog)) == 1
                with trio.fail_after(30):
                    while len(errors(caplog)) == 1:
                        sentry.turned()
                        await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    trio.run(main)
    stood, again = errors(caplog)
    assert re.match(r"the event loop has stood still for \d+ s; where every task stands\nevent loop\n", stood)
    assert re.search(r"^    \S*tests/waiting.py:\d+ wait_until$", stood, re.MULTILINE)
    assert re.search(r"^ +\S*tests/test_systemd_stacks.py:\d+ waits_for_ever$", stood, re.MULTILINE)
    assert again == "the event loop goes round again"


def test_an_event_loop_that_goes_round_is_not_complained_of_and_the_sentry_leaves_with_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks = 0.0, 0

    def monotonic() -> float:
        nonlocal looks
        looks += threading.current_thread().name == "sentry"
        return now

    async def main() -> None:
        nonlocal now
        with Sentry(0.1) as sentry, trio.fail_after(30):
            while looks < 10:  # each of which could complain
                now += 0.05
                sentry.turned()
                await trio.sleep(0.01)

    # Only what goes by between two turns counts, so a machine that is slow makes no difference.
    monkeypatch.setattr(stacks, "time", types.SimpleNamespace(monotonic=monotonic))
    trio.run(main)
    assert errors(caplog) == []
    wait_until(lambda: "sentry" not in {thread.name for thread in threading.enumerate()}, 10, "the thread has ended")


@pytest.mark.parametrize("blocked", [False, True])
def test_sigusr1_tells_also_while_the_event_loop_stands_still(caplog: pytest.LogCaptureFixture, blocked: bool) -> None:
    before = signal.getsignal(signal.SIGUSR1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on_request)
            nursery.start_soon(waits_for_ever)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(os.getpid(), signal.SIGUSR1)
            if blocked:
                wait_until(lambda: errors(caplog), 10, "it is said")
            with trio.fail_after(30):
                while not errors(caplog):
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    [said] = errors(caplog)
    assert said.startswith("SIGUSR1: where every task stands\nevent loop\n")
    assert re.search(r"^ +\S*tests/test_systemd_stacks.py:\d+ waits_for_ever$", said, re.MULTILINE)
    assert signal.getsignal(signal.SIGUSR1) is before
