"""A run's output file: every line shown once, head and tail kept, old files removed."""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.config import Output
from supervisor.errors import JobError
from supervisor.logs import Follower, OutputKeeper, last_lines, output_file, sweep_old
from supervisor.logs.cut import ROOM_FOR_NOTES, compact, cut_in_place
from supervisor.logs.live import LiveFile
from supervisor.logs.quiet import size_of
from supervisor.logs.text import FOLD, harmless

RUN = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
CAP = 65536
NOTE = re.compile(rb"\[flow-agent: (\d+) bytes cut here\]\n")
PATIENCE = 20.0  # seconds a condition may take on a slow machine


def append(path: Path, data: bytes) -> None:
    """As a flow does."""
    with path.open("ab", buffering=0) as file:
        file.write(data)


def numbered(first: int, count: int, width: int = 100) -> bytes:
    return b"".join(f"{number:08}".ljust(width - 1, ".").encode() + b"\n" for number in range(first, first + count))


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def drain(read: Callable[[], list[str]]) -> list[str]:
    found: list[str] = []
    while lines := read():
        found += lines
    return found


@contextmanager
def some_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{RUN}.log")
        path.touch()
        yield path


class Shown:
    """What was shown, and the offset on record: the journal's part."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.offset = 0
        self.batches = 0

    async def show(self, lines: Sequence[str], offset: int) -> None:
        self.lines += lines
        self.offset = offset
        self.batches += 1


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(0.01)


# ------------------------------------------------------------------ following

words = st.text(st.characters(blacklist_categories=("C", "Z")), max_size=30)
writes = st.lists(
    st.one_of(
        words.map(lambda text: text.encode()),
        st.just(b"\n"),
        st.just(b"\xff\n"),
        st.integers(1, 3 * FOLD).map(lambda count: b"y" * count),
        st.sampled_from(["look", "restart"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(writes)
def test_every_line_is_delivered_once_and_in_order_however_it_is_written_and_read(steps: list[bytes | str]) -> None:
    with some_file() as path:
        follower, delivered, written = Follower(path, 0), [], b""
        for step in steps:
            if isinstance(step, bytes):
                append(path, step)
                written += step
                continue
            delivered += follower.read()
            assert written[: follower.offset].endswith((b"\n", b"y", b"")), "no line is delivered before it is whole"
            if step == "restart":
                follower = Follower(path, follower.offset)
        delivered += drain(follower.finish)
        assert follower.offset == len(written)
        assert drain(Follower(path, follower.offset).finish) == []
        lines = written.split(b"\n")
        whole = lines if lines[-1] else lines[:-1]
        assert delivered == [piece for line in whole for piece in folded(line)]


def folded(line: bytes) -> list[str]:
    found = []
    while len(line) > FOLD:
        at = next(at for at in range(FOLD, 0, -1) if line[at] & 0xC0 != 0x80)
        found.append(line[:at].decode("utf-8", "replace"))
        line = line[at:]
    return [*found, line.decode("utf-8", "replace")]


steps_with_cuts = st.lists(st.one_of(st.integers(1, 900), st.sampled_from(["look", "restart", "keep"])), max_size=40)


@settings(max_examples=60, deadline=None)
@given(steps_with_cuts)
def test_what_is_cut_from_a_live_file_before_it_was_read_is_told_to_the_byte(steps: list[int | str]) -> None:
    with some_file() as path:
        live, follower, number, delivered = LiveFile(path, CAP), Follower(path, 0), 0, list[str]()
        for step in steps:
            if isinstance(step, int):
                append(path, numbered(number, step))
                number += step
            elif step == "keep":
                live.keep()
            else:
                delivered += follower.read()
                if step == "restart":
                    live, follower = LiveFile(path, CAP), Follower(path, follower.offset)
        delivered += drain(follower.finish)
        told = [NOTE.match(f"{line}\n".encode()) for line in delivered]
        cut = sum(int(found[1]) for found in told if found)
        lines = [int(line[:8]) for line, found in zip(delivered, told, strict=True) if not found]
        assert lines == sorted(set(lines))
        assert len(lines) * 100 + cut == number * 100 == path.stat().st_size
        assert not any("\0" in line or "NUL" in line for line in delivered)


def test_an_unfinished_line_waits_for_its_end_and_comes_when_the_run_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, b"one\ntw")
    follower = Follower(path, 0)
    assert follower.read() == ["one"]
    assert follower.offset == 4
    append(path, b"o\nthree")
    assert follower.read() == ["two"]
    assert follower.finish() == ["three"]
    assert follower.finish() == []


def test_a_line_that_is_too_long_is_folded_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "x"
    text = "x" + "\u20ac" * FOLD
    append(path, text.encode() + b"\n" + b"y" * FOLD + b"\n")
    *pieces, last = drain(Follower(path, 0).read)
    assert "".join(pieces) == text
    assert all(FOLD - 3 <= len(piece.encode()) <= FOLD for piece in pieces[:-1])
    assert last == "y" * FOLD, "just fits"


def test_a_follower_that_is_far_behind_goes_on_near_the_end_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, numbered(0, 100_000))
    follower = Follower(path, 0)
    note, first, *_ = follower.read()
    left_out = int(first[:8]) * 100
    assert note == f"[flow-agent: {left_out} bytes not shown, see {path}]"
    assert left_out > 9_000_000
    assert drain(follower.read)[-1].startswith("00099999")
    assert follower.offset == path.stat().st_size


def test_batches_are_small(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, numbered(0, 1000))
    follower = Follower(path, 0)
    assert [len(follower.read()) for _ in range(6)] == [200, 200, 200, 200, 200, 0]


def test_a_file_that_its_flow_has_emptied_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, b"one\ntwo\n")
    follower = Follower(path, 0)
    assert follower.read() == ["one", "two"]
    path.write_bytes(b"new\n")
    assert follower.read() == ["new"]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert Follower(tmp_path / "x", 5).read() == []
    assert last_lines(tmp_path / "x") == []


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (b"plain \xc3\xa9\ttext", "plain \u00e9\ttext"),
        (b"\xff", "\ufffd"),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07", "red "),
        (b"10%\r50%\r100%\r", "100%"),
        (b"bell\x07 \x1b(", "bell\\x07 \\x1b("),
        (b"a\0b", "a\\x00b"),
        (b"a" + bytes(5000) + b"b", "a[5000 NUL bytes]b"),
        ("\u2028\u202e\x85".encode(), "\\u2028\\u202e\\x85"),
    ],
)
def test_control_characters_are_made_harmless(printed: bytes, shown: str) -> None:
    assert harmless(printed) == shown


# ------------------------------------------------------------------ the cap


def test_a_live_file_keeps_its_head_and_its_tail_and_gives_the_middle_back(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    live = LiveFile(path, CAP)
    for number in range(0, 20_000, 100):
        append(path, numbered(number, 100))
        live.keep()
        assert blocks(path) <= CAP * 9 / 8 + 2 * CAP + 10_000 + 4096, "cap, reserve, and what came since the last look"
    whole = numbered(0, 20_000)
    assert path.stat().st_size == len(whole)
    found = path.read_bytes()
    assert found[: CAP // 2] == whole[: CAP // 2]
    assert found[-CAP // 2 :] == whole[-CAP // 2 :]
    assert found.count(b"\0") > len(whole) - 2 * CAP
    assert last_lines(path, lines=3) == whole.decode().splitlines()[-3:]


def test_the_last_lines_of_a_file_with_holes_hold_nothing_of_the_hole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, numbered(0, 2000))
    LiveFile(path, CAP).keep()
    lines = last_lines(path, lines=10_000, most_bytes=200_000)
    assert len(lines) > 300
    assert lines == numbered(0, 2000).decode().splitlines()[-len(lines) :]


def test_room_is_reserved_ahead_of_the_writer_and_given_back_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, b"a line\n")
    LiveFile(path, 32_000_000).keep()
    assert path.stat().st_size == 7
    assert blocks(path) >= 1 << 20
    compact(path, 32_000_000)
    assert path.read_bytes() == b"a line\n"
    assert blocks(path) <= 8192


lengths = st.lists(st.integers(0, 3000), max_size=120)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(lengths, st.integers(0, 3), st.booleans()), min_size=1, max_size=4))
def test_a_file_in_its_last_shape_is_head_and_tail_of_whole_lines_however_often_it_was_taken_up(
    claims: list[tuple[list[int], int, bool]],
) -> None:
    with some_file() as path:
        written, number = b"", 0
        for each, keeps, in_place in claims:
            live = LiveFile(path, CAP)
            for index, length in enumerate(each):
                line = f"{number} ".encode() + b"z" * length + b"\n"
                number += 1
                written += line
                append(path, line)
                if keeps and index % (keeps * 10) == 0:
                    live.keep()
            size = path.stat().st_size
            if in_place and size > CAP * 9 / 8 and b"\0" not in path.read_bytes():
                with path.open("rb+") as file:
                    cut_in_place(file.fileno(), size, CAP)
            compact(path, CAP)
            compact(path, CAP)
        found = path.read_bytes()
        assert len(found) <= CAP + ROOM_FOR_NOTES
        assert b"\0" not in found
        parts = NOTE.split(found)
        assert written.startswith(parts[0])
        assert written.endswith(parts[-1])
        assert all(not part or part.endswith(b"\n") for part in parts[0::2]), "whole lines only"
        assert sum(map(len, parts[0::2])) + sum(map(int, parts[1::2])) == len(written)
        if len(parts) == 1:
            assert found == written
        if len(written) > 2 * CAP:
            assert len(parts[0]) > CAP / 2 - 4000
            assert len(parts[-1]) > CAP / 4 - 4000


@pytest.mark.parametrize("width", [10, 31, 100, 3000])
def test_cuts_of_several_claims_become_one(tmp_path: Path, width: int) -> None:
    path = tmp_path / "x"
    for claim in range(3):
        append(path, numbered(claim * 20_000, 20_000, width))
        LiveFile(path, CAP).keep()
        compact(path, CAP)
    head, count, tail = NOTE.split(path.read_bytes())
    assert len(head) + int(count) + len(tail) == 60_000 * width
    assert tail.splitlines()[-1].startswith(b"00059999")


def test_a_file_that_fits_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, numbered(0, CAP // 100))
    before = path.stat()
    compact(path, CAP)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_one_huge_line_is_cut_inside(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, "\u00e9".encode() * 500_000)
    compact(path, CAP)
    text = path.read_bytes().decode("utf-8", "strict")
    head, note, tail = text.split("\n")
    assert set(head) == set(tail) == {"\u00e9"}
    assert note == f"[flow-agent: {1_000_000 - 2 * len(head) - 2 * len(tail)} bytes cut here]"
    assert len(text.encode()) <= CAP + ROOM_FOR_NOTES


def test_a_tail_without_the_start_of_a_line_is_kept_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, b"start\n" + b"x" * 500_000 + b"\n")
    compact(path, CAP)
    *_, tail = path.read_bytes().splitlines(keepends=True)
    assert tail == b"x" * (CAP // 2 - 1) + b"\n"


def test_owner_mode_and_time_survive_the_cut_and_giving_up_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append(path, numbered(0, 10_000))
    path.chmod(0o640)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    before = path.read_bytes()

    class GivenUp(Exception):
        pass

    asked = []

    def give_up() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise GivenUp

    with pytest.raises(GivenUp):
        compact(path, CAP, give_up)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]
    compact(path, CAP)
    found = path.stat()
    assert found.st_size < 2 * CAP
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_mtime == 1_000_000_000
    assert found.st_uid == os.geteuid()


# ------------------------------------------------------------------ ageing


def test_only_old_files_of_finished_runs_are_removed(tmp_path: Path) -> None:
    names = {
        "old": f"{RUN}.log",
        "in use": f"{OTHER}.log",
        "young": "22222222-2222-4333-8444-555555555555.log",
        "not ours": "notes.log",
        "nor this": f"{RUN}.log.gz",
        "left over": f".{RUN}.log.cut",
        "in the making": f".{OTHER}.log.cut",
    }
    for what, name in names.items():
        (tmp_path / name).write_text("x\n")
        if what != "young":
            os.utime(tmp_path / name, (time.time() - 31 * 86400,) * 2)
    (tmp_path / "33333333-2222-4333-8444-555555555555.log").symlink_to(tmp_path / "notes.log")
    assert sweep_old(tmp_path, 30, {OTHER}, cap=CAP) == 2
    left = {what for what, name in names.items() if (tmp_path / name).exists()}
    assert left == {"in use", "young", "not ours", "nor this", "in the making"}
    assert (tmp_path / "33333333-2222-4333-8444-555555555555.log").is_symlink()
    assert sweep_old(tmp_path / "missing", 30, (), cap=CAP) == 0


# ------------------------------------------------------------------ the keeper


def keeper(folder: Path, *, show: bool = True, max_mb: float = 0.1) -> OutputKeeper:
    return OutputKeeper(folder, Output(max_mb=max_mb, show=show))


def test_a_run_is_shown_while_it_lives_and_the_rest_when_it_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        outputs, shown = keeper(tmp_path / "logs"), Shown()
        path = outputs.path(RUN)
        assert await outputs.prepare(RUN) == 0
        assert stat.S_IMODE(path.stat().st_mode) & 0o137 == 0
        assert blocks(path) >= 100_000, "room ahead of the first print"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outputs.watch, RUN, 0, shown.show)
            append(path, b"one\ntwo\nthr")
            await until(lambda: shown.lines == ["one", "two"])
            assert shown.offset == 8
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:  # the next agent
            nursery.start_soon(outputs.watch, RUN, shown.offset, shown.show)
            append(path, b"ee\nfour")
            await until(lambda: shown.lines == ["one", "two", "three"])
            nursery.cancel_scope.cancel()
        assert await outputs.finish(RUN, shown.offset, shown.show) == path.stat().st_size == 18
        assert shown.lines == ["one", "two", "three", "four"]
        assert blocks(path) <= 8192
        # Claimed once more, the run goes on in the same file, however old it is.
        os.utime(path, (0, 0))
        assert await outputs.prepare(RUN) == 18
        await outputs.sweep(())
        assert path.stat().st_size == 18

    trio.run(main)


def test_an_agent_that_dies_between_the_last_cut_and_its_journal_shows_nothing_twice(tmp_path: Path) -> None:
    async def main() -> None:
        outputs, shown = keeper(tmp_path), Shown()
        path = outputs.path(RUN)
        append(path, numbered(0, 3000))
        after = await outputs.finish(RUN, 0, shown.show)
        assert after == path.stat().st_size < shown.offset == 300_000
        assert len(shown.lines) == 3000
        assert await outputs.finish(RUN, shown.offset, shown.show) == after
        assert len(shown.lines) == 3000

    trio.run(main)


def test_a_show_that_hangs_neither_stops_the_cap_nor_the_end_and_the_file_keeps_its_offsets(tmp_path: Path) -> None:
    async def hang(lines: Sequence[str], offset: int) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        outputs = keeper(tmp_path)
        path = outputs.path(RUN)
        await outputs.prepare(RUN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outputs.watch, RUN, 0, hang)
            for number in range(0, 20_000, 1000):
                append(path, numbered(number, 1000))
            await until(lambda: blocks(path) < 500_000)
            nursery.cancel_scope.cancel()
        await outputs.finish(RUN, 0, hang)
        assert path.stat().st_size == 2_000_000
        await outputs.sweep({RUN})
        assert path.stat().st_size == 2_000_000, "in use"
        await outputs.sweep(())
        assert path.stat().st_size <= 100_000 + ROOM_FOR_NOTES

    trio.run(main, clock=trio.testing.MockClock(rate=10))


def test_nothing_is_shown_where_the_configuration_says_so_but_the_cap_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        outputs, shown = keeper(tmp_path, show=False), Shown()
        path = outputs.path(RUN)
        await outputs.prepare(RUN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outputs.watch, RUN, 0, shown.show)
            append(path, numbered(0, 20_000))
            await until(lambda: blocks(path) < 500_000)
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert await outputs.finish(RUN, 0, shown.show) <= 100_000 + ROOM_FOR_NOTES
        assert shown.batches == 0

    trio.run(main, clock=trio.testing.MockClock(rate=10))


def test_a_watched_run_whose_flow_removes_its_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(path: Path) -> int:
        seen.append(size_of(path))
        return seen[-1]

    async def main() -> None:
        outputs, shown = keeper(tmp_path), Shown()
        await outputs.prepare(RUN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outputs.watch, RUN, 0, shown.show)
            append(outputs.path(RUN), b"one\n")
            await until(lambda: shown.lines == ["one"])
            outputs.path(RUN).unlink()
            await until(lambda: seen.count(-1) >= 2)
            append(outputs.path(RUN), b"again\n")
            await until(lambda: shown.lines == ["one", "again"])
            nursery.cancel_scope.cancel()
        outputs.path(RUN).unlink()
        assert await outputs.finish(RUN, shown.offset, shown.show) == 0

    for module in ("keeper", "quiet"):  # the second looks at a file that has been still for a while
        monkeypatch.setattr(f"supervisor.logs.{module}.size_of", noted)
    trio.run(main, clock=trio.testing.MockClock(rate=10))


def test_a_folder_that_cannot_be_written_is_named_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def main() -> None:
        with pytest.raises(
            JobError, match=r"cannot write the run's output to '.*file/logs/.*': Not a directory; see `log_dir`"
        ):
            await keeper(tmp_path / "file" / "logs").prepare(RUN)

    trio.run(main)


def test_the_folder_is_made_when_it_is_missing(tmp_path: Path) -> None:
    path = output_file(tmp_path / "a" / "b", RUN)
    assert path == tmp_path / "a" / "b" / f"{RUN}.log"
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o027 == 0
