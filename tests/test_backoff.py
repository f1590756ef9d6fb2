"""Waits between the turns of a loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import ServerTrouble
from supervisor.runs.backoff import Backoff


@given(st.floats(0.1, 60), st.floats(1, 600), st.floats(0, 1), st.integers(0, 2000))
def test_a_wait_stays_within_the_interval_the_cap_and_the_jitter(
    interval: float, cap: float, jitter: float, failures: int
) -> None:
    backoff = Backoff(interval, cap=cap, jitter=jitter)
    for _ in range(failures):
        backoff.failed()
    assert interval * (1 - jitter) <= backoff.delay() <= max(interval, cap) * (1 + jitter) + 1e-6


def test_waits_double_up_to_about_a_minute_and_come_back_at_the_first_success() -> None:
    backoff = Backoff(5.0, cap=60.0, jitter=0.0)
    waits = []
    for _ in range(6):
        backoff.failed()
        waits.append(backoff.delay())
    assert waits == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
    backoff.succeeded()
    assert backoff.delay() == 5.0


def test_the_servers_own_wish_is_the_least_to_wait_and_is_forgotten_after_a_success() -> None:
    backoff = Backoff(5.0, cap=60.0, jitter=0.0)
    backoff.failed(ServerTrouble("429", retry_after=120.0))
    assert backoff.delay() == 120.0
    backoff.succeeded()
    assert backoff.delay() == 5.0


def test_agents_that_failed_together_do_not_come_back_together() -> None:
    waits = set()
    for _ in range(20):
        backoff = Backoff(5.0, cap=60.0, jitter=0.3)
        backoff.failed()
        waits.add(backoff.delay())
    assert len(waits) > 15
