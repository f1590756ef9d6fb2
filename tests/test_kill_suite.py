"""Nothing is lost, doubled or left behind, wherever an agent is killed: each failpoint with several ways a run can end.

`make torture` does more of the same: every failpoint with either server and both kinds of engine, and 200 kills at random.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from supervisor.failpoints import FAILPOINTS
from tests.agents import RUN_MARK
from tests.killchecks import Tally, check_history, check_hooks, check_log, check_processes, check_trace
from tests.killsuite import (
    ENDS,
    Case,
    Scene,
    agent_sees_it_alive,
    failpoints_of,
    harm_fork_servers,
    kill_around_long_runs,
    kill_at,
    kill_at_random,
)
from tests.servers import Api, PrefectServer, clean_environ
from tests.waiting import wait_until

GOOD_HISTORY = [("SCHEDULED", "Scheduled"), ("PENDING", "Pending"), ("RUNNING", "Running"), ("COMPLETED", "Completed")]
# Where real engines differ most from the scripted one: what they do while nobody supervises them.
TELLING = {
    "after spawn": tuple(ENDS),
    "before journal Stopping": ("is cancelled",),
    "after others ended": ("is cancelled",),
    "before report": ("crashes",),
    "after report": ("crashes",),
}


def run_cases(cases: list[Case], server: PrefectServer, api_of: Callable[[PrefectServer], Api]) -> None:
    """Two at a time: most of a case's time is waiting."""
    apis = [api_of(server) for _ in cases]
    total = Tally()
    with ThreadPoolExecutor(2) as pool:
        for tally in pool.map(lambda pair: kill_at(pair[0], server, pair[1]), zip(cases, apis, strict=True)):
            total.add(tally)
    assert not total.findings, "\n\n".join(map(str, total.findings))
    assert total.kills == len(cases)


def by_turns(
    failpoint: str, outcomes: Sequence[str], major: int, *, held: bool = False, real: bool = False
) -> list[Case]:
    """A case for each outcome, cold and warm by turns, so that each step is seen both ways. Only a warm run is told to go."""
    turn = FAILPOINTS.index(failpoint) + major
    return [
        Case(failpoint, outcome, held=held, real=real, warm=failpoint.endswith(" go") or (turn + place) % 2 == 0)
        for place, outcome in enumerate(outcomes)
    ]


# --- the suite ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_an_agent_killed_there_leaves_nothing_lost_or_doubled_on_3(
    failpoint: str, server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    # To us a run that completes and one that fails are the same: here they take turns, and `make torture` does all of them.
    spared = ("completes", "fails")[FAILPOINTS.index(failpoint) // 2 % 2]
    possible = [outcome for outcome in ENDS if failpoint in failpoints_of(outcome, 3)]
    outcomes = [outcome for outcome in possible if outcome != spared or len(possible) == 1]
    run_cases(by_turns(failpoint, outcomes, 3), server_3, api_of)


ON_2 = sorted({name for outcome in ENDS for name in failpoints_of(outcome, 2)}, key=FAILPOINTS.index)


@pytest.mark.parametrize("failpoint", ON_2)
def test_an_agent_killed_there_leaves_nothing_lost_or_doubled_on_2(
    failpoint: str, server_2: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    # As above; and so do the other two, which are what differs on 2.x.
    well, ill = ("completes", "fails"), ("crashes", "is cancelled")
    place = ON_2.index(failpoint)
    wanted = {ill[place % 2], *(well[place // 2 % 2 :][:1] if agent_sees_it_alive(failpoint) else ())}
    possible = [name for name in ENDS if failpoint in failpoints_of(name, 2)]
    outcomes = [name for name in possible if name in wanted] or possible[:1]
    run_cases(by_turns(failpoint, outcomes, 2, held=agent_sees_it_alive(failpoint)), server_2, api_of)


@pytest.mark.parametrize("failpoint", TELLING)
def test_a_run_of_a_real_engine_outlives_an_agent_killed_there(
    failpoint: str, server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    run_cases(by_turns(failpoint, TELLING[failpoint], 3, real=True), server_3, api_of)


def test_runs_are_neither_lost_nor_doubled_by_kills_at_random_moments(prefect_server: PrefectServer, api: Api) -> None:
    tally = kill_at_random(seed=20, kills=10, server=prefect_server, api=api, warm=prefect_server.major == 3)
    print(tally)
    assert not tally.findings, "\n\n".join(map(str, tally.findings))
    assert tally.kills == 10


def test_runs_are_neither_lost_nor_doubled_by_what_befalls_their_fork_server(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    deeds = ("hang", "kill", "stop", "kill agent", "fail", "mend")
    tally = harm_fork_servers(20, deeds, server_3, api_of(server_3), load=4)
    print(tally)
    assert not tally.findings, "\n\n".join(map(str, tally.findings))
    assert tally.kills == len(deeds)


def test_long_runs_keep_their_processes_through_ten_kills_of_the_agent(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    tally = kill_around_long_runs(server_3, api_of(server_3), warm=True)
    assert not tally.findings, "\n\n".join(map(str, tally.findings))
    assert (tally.kills, tally.restarts) == (10, 10)


# --- the suite can fail ------------------------------------------------------------------------------------------------


def test_every_failpoint_is_reached_by_some_way_to_end() -> None:
    assert {name for outcome in ENDS for name in failpoints_of(outcome, 3)} == set(FAILPOINTS)


def test_a_failpoint_that_is_not_reached_is_found(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.killsuite.LONGEST", 1.0)
    tally = kill_at(Case("before hook", "completes"), server_3, api_of(server_3))
    assert "the agent dies there" in str(tally.findings[0])


@pytest.mark.parametrize(
    ("states", "kind"),
    [
        ([], "lost"),
        (GOOD_HISTORY[:-1], "lost"),
        ([*GOOD_HISTORY[:-1], ("CRASHED", "Crashed")], "lost"),
        ([*GOOD_HISTORY[:-1], ("CRASHED", "Crashed"), GOOD_HISTORY[-1]], "doubled"),
        ([*GOOD_HISTORY[:-1], *GOOD_HISTORY[-2:]], "doubled"),
    ],
    ids=["unknown", "left running", "wrong end", "two ends", "running twice"],
)
def test_a_history_that_must_not_be_is_found(states: list[tuple[str, str]], kind: str) -> None:
    assert kind in [found for found, _ in check_history(states, "COMPLETED")]
    assert not list(check_history(GOOD_HISTORY, "COMPLETED"))


def test_a_body_executed_never_or_twice_is_found(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert [kind for kind, _ in check_trace(trace, "run")] == ["lost"]
    trace.write_text("run 12\n")
    assert not list(check_trace(trace, "run"))
    trace.write_text("run 12\nrun 13\n")
    assert [kind for kind, _ in check_trace(trace, "run")] == ["doubled"]


def test_a_hook_run_never_or_twice_is_found(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    assert [kind for kind, _ in check_hooks(hooks, "run", "crashes", at_least=1)] == ["lost"]
    assert not list(check_hooks(hooks, "run", "crashes", at_least=0))
    hooks.write_text("crashed run\ncancellation other\n")
    assert not list(check_hooks(hooks, "run", "crashes", at_least=1))
    hooks.write_text("crashed run\ncancellation run\n")
    assert [kind for kind, _ in check_hooks(hooks, "run", "crashes", at_least=1)] == ["doubled"]


def test_a_process_that_bears_the_mark_of_a_run_is_found() -> None:
    environ = clean_environ(**{RUN_MARK: "no-such-run"})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as stray:
        wait_until(lambda: list(check_processes("no-such-run")), 5, "the stray is found")
        stray.communicate()
    assert not list(check_processes("no-such-run"))


@pytest.mark.parametrize("sign", ["Traceback (most recent call last)", "internal error; ending", "; giving up"])
def test_a_bug_that_the_log_tells_of_is_found(sign: str) -> None:
    assert [kind for kind, _ in check_log(f"one line\n{sign}\n")] == ["bug"]
    assert not list(check_log("one line"))


def test_a_run_that_nobody_ends_is_found_by_the_server(server_3: PrefectServer, api_of: Callable[..., Api]) -> None:
    api = api_of(server_3)
    with Scene(server_3, api, "here") as scene:
        run_id = scene.create_run("completes")
        scene.trace.write_text(f"{run_id} {os.getpid()}\n" * 2)
        (scene.agent.state_dir / "runs" / run_id).mkdir(parents=True)
        scene.check()
    assert [finding.kind for finding in scene.tally.findings] == ["lost", "doubled", "stray"]
    assert "should be COMPLETED" in scene.tally.findings[0].what
