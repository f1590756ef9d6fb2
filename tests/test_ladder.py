"""What each signal leads to."""

from __future__ import annotations

import signal

import pytest

from supervisor.runs.ladder import Ladder, Rung

TERM, INT, QUIT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP


@pytest.mark.parametrize(
    ("signals", "rungs"),
    [
        ([TERM], [Rung.DRAIN]),
        ([TERM, TERM], [Rung.DRAIN, Rung.CANCEL]),
        ([INT, TERM, INT], [Rung.DRAIN, Rung.CANCEL, Rung.KILL]),
        ([TERM, TERM, TERM, TERM], [Rung.DRAIN, Rung.CANCEL, Rung.KILL, None]),
        ([QUIT], [Rung.CANCEL]),
        ([TERM, QUIT], [Rung.DRAIN, Rung.CANCEL]),
        ([QUIT, QUIT], [Rung.CANCEL, None]),
        ([QUIT, TERM], [Rung.CANCEL, Rung.KILL]),
        ([HUP], [None]),
    ],
)
def test_each_signal_climbs_as_the_ladder_says(signals: list[signal.Signals], rungs: list[Rung | None]) -> None:
    ladder = Ladder()
    assert [ladder.push(signum, float(second)) for second, signum in enumerate(signals)] == rungs


def test_a_signal_delivered_twice_within_a_tenth_of_a_second_counts_once() -> None:
    ladder = Ladder()
    assert ladder.push(TERM, 10.0) is Rung.DRAIN
    assert ladder.push(TERM, 10.0005) is None
    assert ladder.push(TERM, 10.2) is Rung.CANCEL
