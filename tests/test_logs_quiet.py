"""supervisor/logs/quiet.py: files that nobody writes to are looked at by one task for all."""

from __future__ import annotations

from pathlib import Path

import trio

from supervisor.logs.quiet import QuietFiles
from tests.fakes import on_jumping_clock

PAUSE = 2.0


class Watch:
    """So many quiet files; knows how often they were looked at, and who has noticed a change."""

    def __init__(self, folder: Path, count: int) -> None:
        self.files = [folder / f"{number}.log" for number in range(count)]
        for file in self.files:
            file.touch()
        self.looks = 0
        self.noticed: list[int] = []
        self._quiet = QuietFiles(self._pause)

    def _pause(self) -> float:
        self.looks += 1
        return PAUSE

    async def wait(self, number: int) -> None:
        await self._quiet.wait_changed(self.files[number], 0)
        self.noticed.append(number)

    def begin(self, nursery: trio.Nursery, number: int) -> trio.CancelScope:
        """Waits for that file; the scope ends that."""
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                await self.wait(number)

        nursery.start_soon(wait)
        return scope


async def settle() -> None:
    await trio.sleep(PAUSE * 1.5)


def test_a_hundred_files_are_looked_at_by_one_task_and_only_the_changed_one_is_told(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 100)

    @on_jumping_clock
    async def scene() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                watch.begin(nursery, number)
            await trio.sleep(PAUSE * 9.5)
            assert watch.looks == 10
            watch.files[70].write_text("a line\n")
            await settle()
            assert watch.noticed == [70]
            nursery.cancel_scope.cancel()

    scene()


def test_when_the_file_of_whoever_looks_changes_another_looks_on(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 3)

    @on_jumping_clock
    async def scene() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                watch.begin(nursery, number)
                await trio.sleep(0)
            for number in range(3):
                watch.files[number].write_text("a line\n")
                await settle()
                assert watch.noticed == list(range(number + 1))

    scene()


def test_who_gives_up_looking_is_followed_by_another_even_by_one_that_gives_up_itself(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 4)

    @on_jumping_clock
    async def scene() -> None:
        async with trio.open_nursery() as nursery:
            scopes = []
            for number in range(4):
                scopes.append(watch.begin(nursery, number))
                await trio.sleep(0)
            scopes[0].cancel()
            await settle()
            scopes[1].cancel()
            scopes[2].cancel()
            await settle()
            watch.files[3].write_text("a line\n")
            await settle()
            assert watch.noticed == [3]

    scene()


def test_all_that_change_at_once_are_told_the_looker_too(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 5)

    @on_jumping_clock
    async def scene() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                watch.begin(nursery, number)
            await settle()
            for number in (0, 2, 4):
                watch.files[number].unlink() if number == 2 else watch.files[number].write_text("a line\n")
            await settle()
            assert sorted(watch.noticed) == [0, 2, 4]
            watch.files[1].write_text("a line\n")
            watch.files[3].write_text("a line\n")
            await settle()
            assert sorted(watch.noticed) == [0, 1, 2, 3, 4]

    scene()
