"""supervisor/runs/stopper.py: an engine that begins its hooks just when it is to be stopped is not told to run them again."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from supervisor.lifecycle import ProcessRef, Stopping, StopReason
from supervisor.runs import stopper
from supervisor.runs.entry import Entry
from supervisor.runs.kit import Kit
from supervisor.runs.launcher import Launched
from supervisor.runs.stopper import Stopper
from supervisor.runs.wish import StopWish

REF = ProcessRef(pid=4711, start_ticks=1, boot_id="boot")
BEGUN = "Running hook 'tidy_up' in response to entering state 'Cancelling'\n"


class Engine:
    """Plays the process. `done` has what was done to it, in order."""

    ref = REF

    def __init__(self, output: Path, begins_hooks_at: str) -> None:
        self._output = output
        self._begins_hooks_at = begins_hooks_at
        self.done: list[str] = []

    def did(self, what: str) -> None:
        if what == self._begins_hooks_at:
            self._output.write_text(BEGUN)
        self.done.append(what)

    async def wait(self) -> None:
        self.did("wait")


def stop(
    engine: Engine,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    runs_own_hooks: bool = True,
    is_engine: bool = True,
) -> list[str]:
    async def hold(ref: ProcessRef) -> None:
        engine.did("hold")

    async def end(ref: ProcessRef, run_id: str, *, grace: float, group: object) -> int:
        engine.did("end")
        return 0

    monkeypatch.setattr(stopper, "hold", hold)
    monkeypatch.setattr(stopper, "let_go_on", lambda ref: engine.did("let go on"))
    monkeypatch.setattr(stopper, "end", end)
    record = SimpleNamespace(run=SimpleNamespace(id="run-1"))
    entry = SimpleNamespace(record=record, phase=Stopping(process=REF, reason=StopReason.CANCEL))
    kit = SimpleNamespace(launcher=SimpleNamespace(output=lambda _: output))
    log = logging.LoggerAdapter(logging.getLogger("test"), {})
    wish = StopWish(StopReason.CANCEL)
    launched = Launched(cast(Any, engine), None, runs_own_hooks, is_engine, output_from=0)

    async def main() -> None:
        stopped = trio.Event()
        await Stopper(cast(Entry, entry), wish, cast(Kit, kit), 5.0, None, log).stop_when_asked(launched, stopped)
        assert stopped.is_set()

    trio.run(main)
    return engine.done


def test_an_engine_that_has_begun_its_hooks_by_the_time_it_is_held_is_let_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    assert stop(Engine(output, "hold"), output, monkeypatch) == ["hold", "let go on", "wait", "end"]


def test_an_engine_is_held_from_the_look_at_its_output_until_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    assert stop(Engine(output, ""), output, monkeypatch) == ["hold", "end"]


@pytest.mark.parametrize(("runs_own_hooks", "is_engine"), [(False, True), (True, False)])
def test_a_process_whose_output_says_nothing_of_hooks_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_own_hooks: bool, is_engine: bool
) -> None:
    engine, output = Engine(tmp_path / "output", ""), tmp_path / "output"
    assert stop(engine, output, monkeypatch, runs_own_hooks=runs_own_hooks, is_engine=is_engine) == ["end"]
