"""When a run is begun so that it becomes Running on time: what is learnt from others, by which clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor.config import Flows
from supervisor.runs.clock import KEPT as CLAIMS
from supervisor.runs.clock import ServerClock
from supervisor.runs.lead import (
    DEPLOYMENTS,
    KEPT,
    LATE_SECONDS,
    LONGEST_PREPARING,
    SHORTEST,
    TICK_SECONDS,
    WAITS_FROM,
    Countdown,
    Lead,
    Leads,
    aim,
)
from tests.fakes import EPOCH, offer, on_jumping_clock, wall

FLOWS = Flows(python=Path("/nowhere/python"))
SECONDS = st.floats(0.1, 20.0)


def becomes_running(asks: float, planned: float) -> float:
    """When, after its start, a server has a run become Running whose engine asks then, for a time that is `planned` away."""
    while (wait := round(planned - asks)) > 0:
        asks += wait
    return asks


@given(st.lists(st.floats(0.0, 0.5), min_size=1, max_size=KEPT), SECONDS)
def test_no_engine_is_aimed_so_early_that_it_must_wait_and_nearly_none_late(spread: list[float], least: float) -> None:
    took = [least + more for more in spread]
    lead = aim(took)
    assert lead - min(took) <= WAITS_FROM + 0.001
    late = sum(seconds - lead > LATE_SECONDS + 0.001 for seconds in took)
    assert late <= 1


def test_starts_that_take_much_the_same_are_not_early_either() -> None:
    assert aim([1.2, 1.21, 1.22, 1.25, 9.0]) == 1.2  # one that was slow says nothing about the next
    assert aim([0.01, 0.02]) == SHORTEST
    assert aim([0.5, *[1.2] * 12]) == 1.2  # nor does one that was quick


@given(SECONDS, SECONDS)
def test_an_engine_that_was_made_to_wait_does_not_pass_for_a_slow_one(asks: float, planned: float) -> None:
    lead = Lead(1.5)
    lead.learn(becomes_running(asks, planned), planned, asks)
    assert lead.seconds == pytest.approx(asks)


@given(st.floats(1.05, 2.5), st.floats(3.1, 15.0))
def test_where_the_engine_does_not_say_when_it_asked_a_lead_that_has_become_too_long_is_found_out(
    quick: float, slow: float
) -> None:
    lead = Lead(1.5)
    for _ in range(5):
        lead.learn(slow, planned=1.5)  # the machine was busy; they were late, so none of them had to wait
    assert lead.seconds == pytest.approx(slow)
    late = 0
    for _ in range(3 * KEPT):
        took = becomes_running(quick, lead.seconds)
        late += took - lead.seconds > 0.51
        lead.learn(took, planned=lead.seconds)
    assert lead.seconds == pytest.approx(quick, abs=WAITS_FROM)
    assert late <= 2


def test_runs_that_were_due_when_they_were_begun_say_it_plainly() -> None:
    lead = Lead(1.5)
    lead.learn(7.0, planned=-3.0)
    assert lead.seconds == 7.0
    asked = Lead(1.5)
    asked.learn(7.0, planned=-3.0, asked=6.0)  # a server that is slow to hear has nobody wait
    assert asked.seconds == 7.0
    hardly = Lead(1.5)
    hardly.learn(1.6, planned=1.0, asked=0.8)  # nobody waits for less than half a second
    assert hardly.seconds == 1.6


def test_guesses_go_by_the_kind_of_start_and_the_generation_of_prefect() -> None:
    leads = Leads(lambda python: 2 if python.name == "old" else None)
    old = msgspec.structs.replace(FLOWS, python=Path("/nowhere/old"))
    warm = msgspec.structs.replace(old, start="warm")
    assert leads.engine("d", warm) < leads.engine("d", FLOWS) < leads.engine("d", old)


def test_a_deployment_has_a_lead_of_its_own_once_it_has_run_and_others_that_of_their_interpreter() -> None:
    leads = Leads()
    leads.learn("heavy", FLOWS, took=6.0, planned=-1.0)
    leads.learn("light", FLOWS, took=1.0, planned=-1.0)
    assert leads.engine("heavy", FLOWS) == 6.0
    assert leads.engine("light", FLOWS) == 1.0
    assert leads.engine("new", FLOWS) == 1.0
    leads.learn("heavy", FLOWS, took=6.0, planned=-1.0)
    assert leads.engine("new", FLOWS) == pytest.approx(6.0, abs=LATE_SECONDS)  # rather early than late
    assert leads.most(FLOWS) >= leads.whole("heavy", FLOWS) > 6.0
    assert leads.engine("light", msgspec.structs.replace(FLOWS, start="warm")) < 1.0


def test_no_more_deployments_are_remembered_than_are_worth_it() -> None:
    leads = Leads()
    for number in range(DEPLOYMENTS + 50):
        leads.learn(f"d{number}", FLOWS, took=1.0, planned=-1.0)
    assert len(leads._own) == DEPLOYMENTS


def test_those_are_forgotten_that_have_not_run_for_longest() -> None:
    leads = Leads()
    leads.learn("first", FLOWS, took=9.0, planned=-1.0)
    for number in range(DEPLOYMENTS):
        leads.learn("first", FLOWS, took=9.0, planned=-1.0)
        leads.learn(f"d{number}", FLOWS, took=1.0, planned=-1.0)
    assert leads.engine("first", FLOWS) == 9.0


def test_a_run_is_taken_so_early_that_it_can_be_prepared_and_what_took_longer_was_an_outage() -> None:
    leads = Leads()
    leads.prepared(0.2)
    leads.prepared(LONGEST_PREPARING)
    assert leads.whole("d", FLOWS) == pytest.approx(leads.engine("d", FLOWS) + 0.2 + SHORTEST / 2)


# --- the countdown of one run --------------------------------------------------------------------------------------------


class Connected:
    """An engine that was about to ask for Running then (monotonic)."""

    def __init__(self, at: float) -> None:
        self.connected_at = at


@on_jumping_clock
async def test_a_run_is_started_its_lead_before_its_time_and_its_end_teaches_the_next() -> None:
    leads, clock = Leads(), ServerClock(wall)
    clock.heard(EPOCH, sent=trio.current_time())
    run = offer(expected_start=EPOCH + timedelta(seconds=60))
    countdown = Countdown(run, FLOWS, leads, clock)
    await trio.sleep(0.3)
    await countdown.wait()
    lead = leads.engine("d1", FLOWS)
    assert trio.current_time() == pytest.approx(60 - lead)
    engine: Any = Connected(trio.current_time() + 0.4)
    countdown.spawned(engine)
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(seconds=59.95)), 1)
    # It asked for Running more than a second early, and was told to wait for one.
    assert leads.engine("d1", FLOWS) == pytest.approx(lead - 0.05 - 1.0)
    assert leads.whole("d1", FLOWS) == pytest.approx(leads.engine("d1", FLOWS) + 0.3, abs=0.1)


@on_jumping_clock
async def test_a_run_is_not_late_because_a_clock_was_set_while_it_was_waited_for() -> None:
    ours = [0.0]
    clock = ServerClock(lambda: wall() + timedelta(seconds=ours[0]))
    countdown = Countdown(offer(expected_start=EPOCH + timedelta(hours=1)), FLOWS, Leads(), clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(countdown.wait)
        await trio.sleep(10)
        ours[0] = 3600.0
    assert trio.current_time() <= 10 + TICK_SECONDS


@on_jumping_clock
async def test_nothing_is_learnt_while_only_our_own_clock_is_known() -> None:
    leads, run = Leads(), offer(expected_start=EPOCH)
    countdown = Countdown(run, FLOWS, leads, ServerClock(wall))
    await countdown.wait()
    guess = leads.engine("d1", FLOWS)
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(seconds=3)), 1)
    assert leads.engine("d1", FLOWS) == guess


@on_jumping_clock
async def test_nothing_is_learnt_from_a_run_that_was_running_before_or_was_started_twice() -> None:
    leads, clock = Leads(), ServerClock(wall)
    clock.heard(EPOCH, sent=trio.current_time())
    await trio.sleep(100)
    run = offer(expected_start=EPOCH)
    countdown = Countdown(run, FLOWS, leads, clock)
    await countdown.wait()
    guess = leads.engine("d1", FLOWS)
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(seconds=50)), 1)
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(seconds=103)), 2)
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(hours=3)), 1)
    countdown.ended(None, 1)
    assert leads.engine("d1", FLOWS) == guess
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(seconds=103)), 1)
    assert leads.engine("d1", FLOWS) == pytest.approx(3.0)


@on_jumping_clock
async def test_that_a_start_waited_for_its_fork_server_is_not_expected_of_the_next() -> None:
    leads, clock = Leads(), ServerClock(wall)
    clock.heard(EPOCH, sent=trio.current_time())
    run = offer(expected_start=EPOCH)
    countdown = Countdown(run, FLOWS, leads, clock)
    await countdown.wait()
    await trio.sleep(5)
    countdown.spawned(None)
    countdown.ended(msgspec.structs.replace(run, started=EPOCH + timedelta(seconds=5.3)), 1)
    assert leads.engine("d1", FLOWS) == pytest.approx(0.3)


# --- the server's clock --------------------------------------------------------------------------------------------------


@on_jumping_clock
async def test_the_servers_clock_is_learnt_from_claims_and_the_quickest_answers_count() -> None:
    clock = ServerClock(wall)
    assert (clock.now(), clock.known) == (wall(), False)
    for delay in (0.9, 0.01, 0.5):
        sent = trio.current_time()
        said = wall() + timedelta(seconds=300 + delay)  # it reads our request `delay` later
        await trio.sleep(delay)
        clock.heard(said, sent=sent)
    sent = trio.current_time()
    await trio.sleep(30)
    clock.heard(wall(), sent=sent)
    assert (clock.now() - wall()).total_seconds() == pytest.approx(300.01)
    assert clock.until(wall()) == pytest.approx(-300.01)


@on_jumping_clock
async def test_before_the_first_claim_the_dates_of_answers_tell_of_a_clock_that_is_seconds_wrong() -> None:
    said: list[tuple[datetime, float]] = []
    ours = [0.0]
    clock = ServerClock(lambda: wall() + timedelta(seconds=ours[0]), lambda: said[-1] if said else None)
    said.append((wall() + timedelta(seconds=1), trio.current_time()))
    assert clock.now() == wall()  # it has no fractions: this may be the same time
    said.append((wall() + timedelta(hours=1), trio.current_time()))
    await trio.sleep(5)
    assert (clock.now() - wall()).total_seconds() == pytest.approx(3600.5)
    assert not clock.known  # too rough to learn leads by
    ours[0] = -7200.0  # the machine has slept, or its clock was set: what was said may be long ago
    assert clock.now() == wall() - timedelta(hours=2)
    await trio.sleep(1)
    said.append((wall() + timedelta(hours=1), trio.current_time()))
    assert (clock.now() - wall()).total_seconds() == pytest.approx(3600.5)
    clock.heard(wall() + timedelta(seconds=2), sent=trio.current_time())
    assert clock.now() == wall() + timedelta(seconds=2)  # a claim is believed rather


@on_jumping_clock
async def test_a_slow_answer_is_better_than_none() -> None:
    clock = ServerClock(wall)
    sent = trio.current_time()
    await trio.sleep(30)
    clock.heard(EPOCH + timedelta(hours=1), sent=sent)
    assert clock.now() - wall() == timedelta(hours=1)


@on_jumping_clock
async def test_a_server_whose_clock_was_set_is_believed_after_a_few_claims() -> None:
    clock = ServerClock(wall)
    clock.heard(wall(), sent=trio.current_time())
    for _ in range(CLAIMS):
        clock.heard(wall() + timedelta(hours=1), sent=trio.current_time())
    assert clock.now() - wall() == timedelta(hours=1)


@on_jumping_clock
async def test_what_was_learnt_is_forgotten_when_our_own_clock_is_set() -> None:
    ours = [0.0]
    clock = ServerClock(lambda: wall() + timedelta(seconds=ours[0]))
    clock.heard(wall(), sent=trio.current_time())
    ours[0] = -7200.0
    assert not clock.known
    assert clock.now() == datetime(2026, 1, 1, tzinfo=UTC) - timedelta(hours=2)
