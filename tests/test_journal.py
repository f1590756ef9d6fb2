"""The journal: what was said to be kept is there, whatever happened to the agent, the disk or the file."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

import supervisor.journal as memory
from supervisor.errors import ConfigError, FlowAgentError
from supervisor.journal import Journal, NoJournal, read
from supervisor.journal.files import MOST_ASIDE
from supervisor.journal.store import Store
from supervisor.lifecycle import Closed, Exited, Outcome, Running, Starting
from supervisor.lifecycle.record import Record
from tests.journals import PROCESS, later, made, one_of_each, record, until, write_all

TOP = Path(__file__).parent.parent
CHECKED_IN = TOP / "tests/fixtures/journal-v1.sqlite3"
CLOSED = Closed(outcome=Outcome.FINISHED)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


def open_claims(journal: Journal) -> list[str]:
    return [one.claim_id for one in journal.open_records()]


# --- what is written is there -----------------------------------------------------------------------------------------


def test_every_field_of_every_phase_comes_back_after_a_restart(path: Path) -> None:
    made(path, *one_of_each())
    journal = Journal.open(path)
    assert journal.open_records() == one_of_each()[:6]
    assert not journal.full
    assert journal.set_aside is None
    assert [journal.crash_retries(f"run-{number}") for number in (7, 8)] == [0, 1]
    journal.close()
    assert read(path) == one_of_each()[::-1]


def test_the_latest_value_of_a_claim_wins_and_its_story_is_kept(path: Path) -> None:
    first = record(1)
    starting = later(first, Starting(attempt=1))
    shown = msgspec.structs.replace(starting, shown=100)
    made(path, first, starting, shown, later(shown, Exited(how=None)))
    assert [(one.short, one.shown) for one in Journal.open(path).open_records()] == [("Exited", 100)]
    story = sqlite3.connect(path).execute("SELECT at, phase FROM steps ORDER BY seq").fetchall()
    assert [phase[9 : phase.index('"', 9)] for _, phase in story] == ["Claiming", "Starting", "Exited"]
    assert story[1][0] == starting.changed.isoformat()


def test_the_checked_in_journal_of_the_first_format_loads_for_ever(path: Path) -> None:
    shutil.copy(CHECKED_IN, path)
    journal = Journal.open(path)
    assert journal.set_aside is None
    assert journal.unreadable == 0
    assert journal.open_records() == one_of_each()[:6]
    assert journal.crash_retries("run-8") == 1
    assert trio.run(journal.write, later(journal.open_records()[0], CLOSED))
    journal.close()
    assert len(read(path)) == 9


def test_crash_retries_are_counted_at_once_and_per_run(path: Path) -> None:
    journal = Journal.open(path)
    crashed = record(1, CLOSED, crash_retry=True)
    again = msgspec.structs.replace(crashed, claim_id="another claim of it")
    trio.run(write_all, journal, crashed, again, record(2, CLOSED), record(3, crash_retry=True))
    assert [journal.crash_retries(f"run-{number}") for number in (1, 2, 3)] == [2, 0, 0]


def test_a_forgotten_claim_is_gone_from_the_disk_too(path: Path) -> None:
    journal = Journal.open(path)
    trio.run(write_all, journal, record(1), record(2))
    journal.forget(record(1).claim_id)
    journal.close()
    assert read(path) == [record(2)]


def test_nobody_else_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        journal = Journal.open(path)
        assert trio.run(journal.write, record(1))
    finally:
        os.umask(before)
    files = sorted(path.parent.iterdir())
    assert [file.name.removeprefix(path.name) for file in files] == ["", "-shm", "-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_name_that_is_not_utf_8_is_written_all_the_same(path: Path) -> None:
    made(path, msgspec.structs.replace(record(1), work="queue 'caf\udce9'"))
    assert [one.work for one in read(path)] == ["queue 'caf?'"]


def test_writes_that_come_during_a_commit_share_the_next_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    commit = Store.commit

    def counted(store: Store, entries: list[memory.Entry], gone: set[str], *, durable: bool) -> bool:
        commits.append(len(entries))
        return commit(store, entries, gone, durable=durable)

    monkeypatch.setattr(Store, "commit", counted)
    journal = Journal.open(path)
    trio.run(write_all, journal, *(record(number) for number in range(64)))
    assert sum(commits) == 64
    assert len(commits) <= 3
    assert len(read(path)) == 64


def test_being_cancelled_loses_and_tears_nothing(path: Path) -> None:
    journal = Journal.open(path)
    answers: list[bool] = []

    async def writer(number: int) -> None:
        answers.append(await journal.write(record(number)))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(writer, number)
            await trio.lowlevel.checkpoint()  # some wait for the disk now, some for their turn
            nursery.cancel_scope.cancel()
        with trio.CancelScope() as scope:
            scope.cancel()
            await writer(20)

    trio.run(main)
    assert answers == [True] * 21
    assert len(read(path)) == 21


def test_only_durable_writes_wait_for_the_disk_and_all_outlive_the_agent(path: Path) -> None:
    journal = Journal.open(path)
    assert trio.run(lambda: journal.write(record(1), durable=False))
    assert journal._store is not None
    level = "PRAGMA synchronous"
    assert journal._store._connection.execute(level).fetchone() == (1,)
    assert trio.run(journal.write, record(2))
    assert journal._store._connection.execute(level).fetchone() == (2,)
    assert len(read(path)) == 2  # through the kernel: another connection, and the journal is not closed


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_whatever_was_said_to_be_kept_is_there_after_kill_9_at_any_instant(path: Path) -> None:
    chance = random.Random(3)
    for _ in range(8):
        command = [sys.executable, "-m", "tests.journals", "write", str(path)]
        writer = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(chance.randrange(1, 400))]
        writer.kill()
        said += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        kept: dict[str, int] = {}
        for claim_id, _, count in (line.decode().partition(" ") for line in said if line.endswith(b"\n")):
            kept[claim_id] = int(count)

        journal = Journal.open(path)
        assert journal.set_aside is None
        assert journal.unreadable == 0
        journal.close()
        found = {one.claim_id: one for one in read(path)}
        assert kept
        assert all(found[claim_id].starts >= count for claim_id, count in kept.items())
        closed = [one for one in found.values() if isinstance(one.phase, Closed)]
        assert all(one.starts % 10 == 9 for one in closed)


# --- no room ----------------------------------------------------------------------------------------------------------


def in_a_process(what: str, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.journals", what, str(folder)]
    if what == "small-disk":
        mount = 'mount -t tmpfs -o size=2m none "$0" && exec "$@"'
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = ["unshare", "--mount", *user, "sh", "-c", mount, str(folder), *command]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_full_disk_keeps_everything_in_memory_and_is_caught_up_with(tmp_path: Path) -> None:
    in_a_process("small-disk", tmp_path)


def test_files_that_may_not_grow_are_a_full_disk_too(tmp_path: Path) -> None:
    in_a_process("small-files", tmp_path)


def test_it_says_that_it_is_full_while_there_is_room_for_the_ends_of_live_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(path)
    status = os.statvfs(path.parent)
    scarce = os.statvfs_result((*status[:4], 100_000 // status.f_frsize, *status[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: scarce)
    assert trio.run(journal.write, record(1))
    assert journal.full
    monkeypatch.undo()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.run)
            await until(lambda: not journal.full)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.001))


# --- files that are not what we wrote ---------------------------------------------------------------------------------


def _zeros(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(20_000))


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _hole(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def _index(path: Path) -> None:
    """What is read at the opening is whole."""
    connection = sqlite3.connect(path)
    [[page]] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'records_of_run'").fetchall()
    connection.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096 + 2000)
        file.write(bytes(2096))


def _foreign(path: Path) -> None:
    """All but its name could be ours."""
    other = sqlite3.connect(path)
    other.execute("PRAGMA application_id = 1")
    other.close()


def _missing(path: Path) -> None:
    shutil.copy(path, f"{path}-wal")
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [_zeros, _garbage, _half, _hole, _index, _foreign, _missing, _directory])
def test_a_file_that_is_not_a_journal_is_set_aside_loudly(
    path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    made(path, *(record(number, payload=3000) for number in range(20)))
    spoil(path)
    journal = Journal.open(path)
    assert journal.open_records() == []
    aside = journal.set_aside
    assert aside is not None
    assert aside.name.startswith("journal.sqlite3.corrupt-20")
    assert aside.exists() or Path(f"{aside}-wal").exists()
    loud = [line.getMessage() for line in caplog.records if line.levelname == "ERROR"]
    assert len(loud) == 1
    assert str(aside) in loud[0]
    assert trio.run(journal.write, record(100))
    journal.close()
    assert open_claims(Journal.open(path)) == [record(100).claim_id]


def test_a_file_that_lost_its_last_bytes_keeps_what_can_be_read(path: Path) -> None:
    made(path, *(record(number, payload=3000) for number in range(20)))
    os.truncate(path, path.stat().st_size - 1000)
    journal = Journal.open(path)
    assert journal.unreadable == 1
    assert journal.open_records() == [record(number, payload=3000) for number in range(19)]


def test_a_flipped_bit_is_noticed_or_harmless(path: Path, tmp_path: Path) -> None:
    made(path, *one_of_each())
    whole, wanted, chance = path.read_bytes(), one_of_each()[:6], random.Random(7)
    noticed = 0
    for number in range(80):
        place = chance.randrange(len(whole))
        if 60 <= place < 64:  # the number of the format: see the test of a newer one
            continue
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        copy = tmp_path / f"{number}.sqlite3"
        copy.write_bytes(flipped)
        journal = Journal.open(copy)
        seen = journal.set_aside is not None or journal.unreadable > 0
        noticed += seen
        assert seen or journal.open_records() == wanted, f"byte {place}"
        journal.close()
    assert noticed > 10


def test_a_record_that_cannot_be_read_is_logged_and_left_for_who_can(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(path, record(1), record(2), record(3))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET record = replace(record, 'Claiming', 'Dreaming') WHERE seq = 2")
    connection.commit()
    connection.close()
    journal = Journal.open(path)
    assert open_claims(journal) == [record(1).claim_id, record(3).claim_id]
    assert journal.unreadable == 1
    assert journal.set_aside is None
    assert record(2).claim_id in caplog.text
    journal.close()
    assert sqlite3.connect(path).execute("SELECT count(*) FROM records").fetchone() == (3,)


def test_a_journal_of_a_newer_agent_is_refused_and_not_touched(path: Path) -> None:
    made(path, record(1))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ConfigError, match="written by a newer flow-agent"):
        Journal.open(path)
    with pytest.raises(FlowAgentError, match="written by a newer flow-agent"):
        read(path)
    assert not list(path.parent.glob("*corrupt*"))


def test_a_directory_that_cannot_be_used_is_a_mistake_in_the_configuration(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot use the journal .*: No such file or directory"):
        Journal.open(path.parent / "missing" / "journal.sqlite3")


def test_broken_journals_do_not_pile_up(path: Path) -> None:
    for _ in range(MOST_ASIDE + 3):
        path.write_bytes(b"")
        last = Journal.open(path)
        last.close()
    found = list(path.parent.glob("*corrupt*"))
    assert len(found) == MOST_ASIDE
    assert last.set_aside in found


@pytest.mark.parametrize("how", ["overwritten", "removed"])
def test_a_journal_that_breaks_under_way_is_written_anew_with_all_that_is_open(
    path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    made(path, *(record(number, payload=20_000) for number in range(300)))  # more than SQLite holds in memory
    journal = Journal.open(path)
    trio.run(journal.write, later(record(7), CLOSED))
    wanted = {record(number).claim_id for number in range(300)} - {record(7).claim_id}
    if how == "removed":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(random.Random(1).randbytes(path.stat().st_size - 4096))
    running = later(record(3), Running(process=PROCESS, attempt=1))
    assert trio.run(journal.write, running)
    assert "set it aside" in caplog.text
    assert not journal.full
    journal.close()
    again = Journal.open(path)
    assert set(open_claims(again)) == wanted
    assert running in again.open_records()


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_is_bounded_by_age_and_number_and_open_runs_stay(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HISTORY_RUNS", 5)
    monkeypatch.setattr(memory, "HISTORY_REFUSED", 2)
    now = datetime.now(UTC)

    def closed(number: int, days: float, outcome: Outcome = Outcome.FINISHED) -> Record:
        at = now - timedelta(days=days)
        return record(number, Closed(outcome=outcome), opened=at, changed=at, crash_retry=True)

    old = closed(1, 31)
    old_but_open = later(record(2, opened=old.opened, changed=old.changed), Starting(attempt=1))
    many = [closed(number, 1) for number in range(10, 20)]
    refused = [closed(number, 1, Outcome.NOT_OURS) for number in range(20, 30)]
    journal = Journal.open(path)

    async def main() -> None:
        await write_all(journal, old_but_open)
        for one in (old, *many, *refused):
            await journal.write(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.run)  # it prunes at once, then now and then
            await until(lambda: journal.crash_retries("run-1") == 0)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.001))
    assert read(path) == [*refused[:-3:-1], *many[:-6:-1], old_but_open]
    stories = sqlite3.connect(path).execute("SELECT count(DISTINCT claim_id) FROM steps").fetchone()
    assert stories == (8,)
    assert journal.crash_retries("run-10") == 0
    assert journal.crash_retries("run-19") == 1


def test_the_log_beside_it_does_not_grow_for_ever(path: Path) -> None:
    journal = Journal.open(path)

    async def main() -> None:
        for number in range(300):
            await journal.write(record(number % 10, payload=50_000, starts=number), durable=False)

    trio.run(main)
    assert Path(f"{path}-wal").stat().st_size < 6_000_000
    journal.close()


# --- the reader -------------------------------------------------------------------------------------------------------


def test_it_can_be_read_while_it_is_written_and_no_reader_holds_a_writer_up(path: Path) -> None:
    journal = Journal.open(path)
    assert trio.run(journal.write, record(1))
    slow = sqlite3.connect(path, isolation_level=None)
    slow.execute("BEGIN")
    assert slow.execute("SELECT count(*) FROM records").fetchone() == (1,)
    trio.run(write_all, journal, *(record(number) for number in range(2, 50)))
    assert slow.execute("SELECT count(*) FROM records").fetchone() == (1,)
    assert len(read(path)) == 49
    assert not journal.full
    slow.close()


def test_a_writer_waits_for_a_reader_that_holds_the_whole_file(path: Path) -> None:
    journal = Journal.open(path)
    greedy = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    greedy.execute("BEGIN IMMEDIATE")
    answers: list[bool] = []
    answered = trio.Event()

    async def writer() -> None:
        answers.append(await journal.write(record(1)))
        answered.set()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            with trio.move_on_after(0.3):  # it must not give up at once
                await answered.wait()
            greedy.execute("COMMIT")

    trio.run(main)
    greedy.close()
    assert answers == [True]


def test_a_reader_changes_nothing_and_says_what_is_wrong(path: Path) -> None:
    with pytest.raises(NoJournal, match="no agent has used this state directory"):
        read(path)
    assert not path.exists()
    path.write_bytes(b"certainly not a database, and long enough to be told from one" * 100)
    with pytest.raises(FlowAgentError, match=rf"cannot read the journal {path}: file is not a database"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FlowAgentError, match="Is a directory"):
        read(path)
