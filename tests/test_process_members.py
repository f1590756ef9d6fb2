"""supervisor/process/members.py: one look at /proc for all who ask at the same time, and what it promises to each."""

from __future__ import annotations

import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from supervisor.lifecycle import ProcessRef
from supervisor.process import members, reaper
from supervisor.process.environ import MARK
from supervisor.process.members import look
from supervisor.process.ref import identify
from supervisor.process.stop import end_leftovers

Answer = Callable[[Sequence[Any]], None]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every look from now on, how many it was for."""
    found: list[int] = []
    answer = members._answer

    def counted(questions: Sequence[Any]) -> None:
        found.append(len(questions))
        answer(questions)

    monkeypatch.setattr(members, "_answer", counted)
    return found


class Gate:
    """Holds the first look back, after all of /proc has been read, until it is opened."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._seen = threading.Event()
        self._open = threading.Event()

    def __call__(self, questions: Sequence[Any]) -> None:
        first = not self._seen.is_set()
        self._answer(questions)
        self._seen.set()
        if first:
            assert self._open.wait(60)

    async def wait_seen(self) -> None:
        assert await trio.to_thread.run_sync(self._seen.wait, 60)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def new_gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Gate]:
    """Each one made holds back the first look from then on."""
    answer = members._answer

    def make() -> Gate:
        gate = Gate(answer)
        monkeypatch.setattr(members, "_answer", gate)
        return gate

    return make


@contextmanager
def marked(run_id: str) -> Iterator[ProcessRef]:
    """A living process that bears that run's mark."""
    with subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: run_id}) as process:
        try:
            ref = identify(process.pid)
            assert ref is not None
            yield ref
        finally:
            process.kill()


def new_id() -> str:
    return str(uuid.uuid4())


def test_fifty_runs_that_ask_at_once_cost_one_look_and_each_is_told_its_own_processes(looks: list[int]) -> None:
    ids = [new_id() for _ in range(50)]
    told: dict[str, list[int]] = {}

    async def ask(run_id: str) -> None:
        told[run_id] = [stat.pid for stat in await look(None, run_id)]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for run_id in ids:
                nursery.start_soon(ask, run_id)

    with marked(ids[3]) as three, marked(ids[40]) as forty:
        trio.run(main)
    assert told == {run_id: [] for run_id in ids} | {ids[3]: [three.pid], ids[40]: [forty.pid]}
    assert looks == [50]


def test_who_asks_during_a_look_is_told_of_what_has_begun_since(new_gate: Callable[[], Gate]) -> None:
    gate, run_id = new_gate(), new_id()
    told: dict[str, list[int]] = {}

    async def ask(who: str) -> None:
        told[who] = [stat.pid for stat in await look(None, run_id)]

    async def main() -> ProcessRef:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "before")
            await gate.wait_seen()
            with marked(run_id) as process:
                nursery.start_soon(ask, "after")
                await trio.testing.wait_all_tasks_blocked()
                gate.open()
                with trio.fail_after(60):
                    while "after" not in told:
                        await trio.sleep(0.01)
        return process

    process = trio.run(main)
    assert told == {"before": [], "after": [process.pid]}


def test_who_gives_up_during_a_look_leaves_nobody_without_an_answer(new_gate: Callable[[], Gate]) -> None:
    told: list[object] = []

    async def ask() -> None:
        told.append(await look(None, new_id()))

    async def scene(gate: Gate) -> None:
        async with trio.open_nursery() as others, trio.open_nursery() as nursery:
            nursery.start_soon(look, None, new_id())
            others.start_soon(ask)
            await gate.wait_seen()
            others.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            gate.open()

    async def main() -> None:
        with trio.fail_after(60):
            for _ in range(8):  # who of the first two has the look made is left to chance
                await scene(new_gate())

    trio.run(main)
    assert told == [[]] * 16


def test_a_look_that_fails_is_the_fault_of_one_and_made_again_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, faults = members._answer, [MemoryError("no room")]
    told: list[object] = []

    def faulty(questions: Sequence[Any]) -> None:
        if faults:
            raise faults.pop()
        answer(questions)

    monkeypatch.setattr(members, "_answer", faulty)

    async def ask() -> None:
        try:
            told.append(await look(None, new_id()))
        except MemoryError as error:
            told.append(str(error))

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask)

    trio.run(main)
    assert told == ["no room", [], []]


def test_a_run_that_has_left_nothing_behind_costs_two_looks(looks: list[int]) -> None:
    assert trio.run(end_leftovers, new_id(), None) == 0
    assert looks == [1, 1]


def test_the_status_of_no_child_is_asked_for_anew_at_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else five hundred live runs make the start of one five hundred times as dear."""
    asked: list[ProcessRef] = []
    living = {ProcessRef(pid=number, start_ticks=1, boot_id="b") for number in range(500)}

    def same(ref: ProcessRef) -> object:
        asked.append(ref)
        return ref if ref in living else None

    monkeypatch.setattr(reaper, "same", same)
    expected = reaper._Expected()
    for ref in living:
        expected.add(ref)
    asked.clear()
    for number in range(500, 2500):  # each ends at once
        expected.add(ProcessRef(pid=number, start_ticks=1, boot_id="b"))
    assert len(asked) <= 2 * 2000
    assert all(ref in expected for ref in living)
    assert len(expected) <= 2 * 500 + 64
