"""Output files on a disk that is full, and on one that has no holes: real ones, mounted for the moment."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
import trio.testing

from supervisor.config import Output
from supervisor.logs import Follower, OutputKeeper, last_lines, sweep_old
from supervisor.logs.live import LiveFile
from tests.small_disk import on_small_disk

RUN = "11111111-2222-4333-8444-555555555555"
LINES = [f"line {number:08} {'x' * 1000}" for number in range(10_000)]  # 10 MB
STEP = 200  # lines between two looks of the keeper: a fifth of what is reserved


async def ignore(lines: object, offset: int) -> None:
    pass


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


def write_steadily(path: Path, live: LiveFile | None, full_after: int = -1) -> tuple[int, str]:
    """How many lines could be written, and why no more. After that many the disk is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for number, line in enumerate(LINES):
            if number == full_after:
                fill(path.parent)
            if live is not None and number % STEP == 0:
                live.keep()
            data = line.encode() + b"\n"
            if os.write(descriptor, data) != len(data):
                return number, "short write"
    except OSError as error:
        return number, str(error.strerror)
    finally:
        os.close(descriptor)
    return len(LINES), ""


# What follows runs on the small disk.


def flow_on_full_disk(disk: Path) -> dict[str, Any]:
    keeper = OutputKeeper(disk, Output())
    path = keeper.path(RUN)
    trio.run(keeper.prepare, RUN)
    # So late that the head alone is more than what the reserve gives back in the end.
    written, why = write_steadily(path, LiveFile(path, 32_000_000), full_after=1500)
    follower = Follower(path, 0)
    shown = []
    while lines := follower.read():
        shown += lines
    trio.run(keeper.finish, RUN, follower.offset, ignore)
    while_full = path.read_bytes().count(b"\0")
    tail = last_lines(path, lines=2)
    (disk / "ballast").unlink()
    sweep_old(disk, 30, (), cap=32_000_000)
    text = path.read_text()
    left = sorted(entry.name for entry in disk.iterdir())
    return {
        "written": written,
        "why": why,
        "shown": shown,
        "holes": while_full,
        "tail": tail,
        "text": text,
        "left": left,
    }


def flow_without_reserve(disk: Path) -> dict[str, Any]:
    path = disk / f"{RUN}.log"
    path.touch()
    fill(disk)
    written, why = write_steadily(path, None)
    return {"written": written, "why": why}


def flow_where_nothing_is_left(disk: Path) -> dict[str, Any]:
    path = disk / f"{RUN}.log"
    path.touch()
    fill(disk)
    said: list[str] = []

    class Ears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("supervisor.logs").addHandler(Ears())
    live = LiveFile(path, 32_000_000)
    for _ in range(3):
        live.keep()
    (disk / "ballast").unlink()
    live.keep()
    written, why = write_steadily(path, None)
    return {"said": said, "written": written, "why": why}


def flow_without_holes(disk: Path) -> dict[str, Any]:
    cap = 1_000_000
    path = disk / f"{RUN}.log"
    path.touch()
    live, follower = LiveFile(path, cap), Follower(path, 0)
    shown: list[str] = []
    most = 0
    with path.open("ab", buffering=0) as file:
        for number, line in enumerate(LINES):
            file.write(line.encode() + b"\n")
            if number % STEP == 0:
                while lines := follower.read():
                    shown += lines
                if (cut := live.keep()) is not None:
                    follower.moved(cut)
                most = max(most, path.stat().st_size)
    while lines := follower.finish():
        shown += lines
    return {"shown": shown, "most": most, "text": path.read_text()}


def flow_in_bursts(disk: Path) -> dict[str, Any]:
    keeper = OutputKeeper(disk, Output())
    path = keeper.path(RUN)
    trio.run(keeper.prepare, RUN)
    fill(disk)
    live = LiveFile(path, 32_000_000)
    bursts = [980_000, 800_000, 800_000]
    written = []
    with path.open("ab", buffering=0) as file:
        for burst in bursts:
            written.append(file.write(b"x" * burst))
            live.keep()
    return {"bursts": bursts, "written": written}


def flow_that_wakes_up(disk: Path) -> dict[str, Any]:
    keeper = OutputKeeper(disk, Output())
    path = keeper.path(RUN)
    clock = trio.testing.MockClock(rate=5)

    async def main() -> int:
        await keeper.prepare(RUN)
        fill(disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.watch, RUN, 0, ignore)
            with trio.fail_after(100):
                while path not in keeper._quiet._waiting:  # where looks at a still file are rare
                    await trio.sleep(0.01)
            clock.rate = 1
            with path.open("ab", buffering=0) as file:
                for number in range(30):  # 1.5 MB/s: twice its reserve in the longest that a look may take elsewhere
                    file.write(b"".join(line.encode() + b"\n" for line in LINES[number * 150 : (number + 1) * 150]))
                    await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        return path.stat().st_size

    return {"size": trio.run(main, clock=clock)}


def watched_flow_without_holes(disk: Path) -> dict[str, Any]:
    keeper = OutputKeeper(disk, Output(max_mb=1.0))
    path = keeper.path(RUN)
    shown: list[str] = []
    on_record = 0

    async def show(lines: Sequence[str], offset: int) -> None:
        nonlocal on_record
        shown.extend(lines)
        on_record = offset

    async def main() -> int:
        await keeper.prepare(RUN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.watch, RUN, 0, show)
            for number in range(0, 4000, STEP):
                with path.open("ab", buffering=0) as file:
                    file.write(b"".join(line.encode() + b"\n" for line in LINES[number : number + STEP]))
                while LINES[number + STEP - 1] not in shown[-300:]:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        return await keeper.finish(RUN, on_record, show)

    size = trio.run(main, clock=trio.testing.MockClock(rate=10))
    return {"shown": shown, "size": size, "text": path.read_text()}


# The tests.


def test_a_flow_that_writes_steadily_to_a_full_disk_never_sees_an_error(tmp_path: Path) -> None:
    seen = on_small_disk("tmpfs", flow_on_full_disk, tmp_path)
    assert (seen["written"], seen["why"]) == (len(LINES), "")
    assert seen["tail"] == LINES[-2:]


def test_what_a_full_disk_made_us_cut_is_told_and_cut_for_good_once_there_is_room(tmp_path: Path) -> None:
    seen = on_small_disk("tmpfs", flow_on_full_disk, tmp_path)
    assert seen["holes"] > 0, "a full disk has no room for a copy: the holes have to stay"
    lines = seen["text"].splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("[flow-agent: "))
    assert lines[:at] == LINES[:at]
    assert lines[at + 1 :] == LINES[at + 1 - len(lines) :]
    assert 0 < at < len(lines) - 1
    cut = sum(len(line) + 1 for line in LINES) - sum(len(line) + 1 for line in lines if line != lines[at])
    assert lines[at] == f"[flow-agent: {cut} bytes cut here]"
    assert seen["left"] == [f"{RUN}.log"]
    assert seen["shown"][-1] == LINES[-1]
    assert not any("\0" in line or "NUL" in line for line in seen["shown"])


def test_the_reserve_is_filled_up_from_the_middle_and_then_from_the_head(tmp_path: Path) -> None:
    seen = on_small_disk("tmpfs", flow_in_bursts, tmp_path)
    assert seen["written"] == seen["bursts"]


def test_a_flow_that_was_still_for_long_is_looked_at_in_time_where_the_disk_is_full(tmp_path: Path) -> None:
    seen = on_small_disk("tmpfs", flow_that_wakes_up, tmp_path)
    assert seen["size"] == sum(len(line) + 1 for line in LINES[: 30 * 150])


def test_without_a_reserve_the_same_flow_fails_at_once(tmp_path: Path) -> None:
    seen = on_small_disk("tmpfs", flow_without_reserve, tmp_path)
    assert seen["written"] < 10
    assert seen["why"] == "No space left on device"


def test_a_disk_without_room_for_a_reserve_is_spoken_of_once_and_made_good_when_there_is_room(tmp_path: Path) -> None:
    seen = on_small_disk("tmpfs", flow_where_nothing_is_left, tmp_path)
    (said,) = seen["said"]
    assert said.startswith("cannot reserve room for the output of a run (No space left on device)")
    assert seen["written"] > 1000


def test_where_there_are_no_holes_the_cap_is_kept_and_every_line_shown_once(tmp_path: Path) -> None:
    seen = on_small_disk("ramfs", flow_without_holes, tmp_path)
    assert [line for line in seen["shown"] if not line.startswith("[flow-agent: ")] == LINES
    assert seen["most"] <= 1_000_000 * 9 / 8 + STEP * 1100
    lines = seen["text"].splitlines()
    assert lines[0] == LINES[0]
    assert lines[-1] == LINES[-1]
    (note,) = (line for line in lines if line.startswith("[flow-agent: "))
    kept = sum(len(line) + 1 for line in lines if line != note)
    assert note == f"[flow-agent: {sum(len(line) + 1 for line in LINES) - kept} bytes cut here]"


def test_a_cut_in_place_disturbs_nobody_who_watches(tmp_path: Path) -> None:
    seen = on_small_disk("ramfs", watched_flow_without_holes, tmp_path)
    assert [line for line in seen["shown"] if not line.startswith("[flow-agent: ")] == LINES[:4000]
    assert seen["size"] == len(seen["text"]) < 1_200_000
    assert seen["text"].startswith(LINES[0])
    assert seen["text"].endswith(LINES[3999] + "\n")
