"""One run by property: whatever dies, is cut off or is asked for, in any order, it ends once, rightly, and leaves nothing.

A script says what happens and when: at a failpoint of the agent, or after so many seconds. It is played to the agent's
own loops, runs and recovery, with a server, a machine and engines made in `tests/stateful/`, on a clock that jumps. Then all is
well again for long enough, and everything is looked at.

`STATEFUL_EXAMPLES=5000` tries that many scripts, other ones each time.
"""

from __future__ import annotations

import inspect
import os
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from supervisor.failpoints import FAILPOINTS
from supervisor.lifecycle import Hook, ProcessRef
from supervisor.lifecycle.record import Record
from supervisor.runs import canceller
from supervisor.runs.entry import Entry
from tests.stateful.script import CANCEL, DIES, ENDLESS, FATES, Deed, Script, Step, scripts
from tests.stateful.stage import heart, play, stand_ins
from tests.stateful.world import World

WANTED = os.environ.get("STATEFUL_EXAMPLES")


@settings(
    max_examples=int(WANTED or 250),
    derandomize=WANTED is None,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # to explain a failure takes minutes
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(script=scripts, luck=st.random_module())
def test_a_run_ends_once_and_rightly_whatever_happens_to_its_agent_server_and_process(
    script: Script, luck: object
) -> None:
    world = play(script)
    note("\n".join(world.story))
    assert not world.wrongs


@pytest.mark.parametrize("modern", [True, False], ids=["modern engine", "older engine"])
@pytest.mark.parametrize("fate", FATES)
def test_a_run_survives_one_death_of_the_agent_wherever_that_is(fate: str, modern: bool) -> None:
    for place in FAILPOINTS:
        world = play(Script(steps=(Step(place, 1, Deed(DIES, 1.0)),), fate=fate, modern=modern))
        assert not world.wrongs, "\n".join([place, *world.story])


async def unwritten(self: Entry) -> bool:
    return True


async def begun_anew(self: Entry, hook: Hook) -> bool:
    return True


async def left_alone(self: World, run_id: str, ref: ProcessRef | None, **_: Any) -> int:
    return 0


BUGS: dict[str, tuple[Any, str, Any, Script, str]] = {
    "claims are not written down": (
        Entry,
        "open",
        unwritten,
        Script(steps=(Step("after claim", 1, Deed(DIES, 1.0)),)),
        "it should be [] and is PENDING",
    ),
    "proposals are not known again": (
        Record,
        "transition_id",
        lambda record, of: str(uuid4()),
        Script(fate="exits"),
        "it should be ['CRASHED'] and is RUNNING",
    ),
    "hooks that were begun are begun again": (
        Entry,
        "begin_hook",
        begun_anew,
        Script(steps=(Step("after hook", 1, Deed(DIES, 1.0)),), fate="exits"),
        "its hooks were run",
    ),
    "a run that the server has taken for cancelled meanwhile is let run on": (
        canceller,
        "OUTLIVE_SECONDS",
        1e9,
        Script(steps=(Step(5.0, 1, Deed(CANCEL)), Step(5.0, 1, Deed(DIES, 400.0))), fate="completes", body=ENDLESS),
        "after it was cancelled",
    ),
    "what a run has left is not ended": (
        World,
        "end_leftovers",
        left_alone,
        Script(),
        "closed while a process of it lives",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    where, name, instead, script, wrong = BUGS[bug]
    assert not play(script).wrongs
    with patch.object(where, name, instead):
        assert wrong in "\n".join(play(script).wrongs)


def test_nothing_here_acts_upon_the_machine() -> None:
    """What supervisor.runs comes to use of supervisor.process must be given a stand-in above."""
    used = {
        name
        for module in heart()
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__.startswith("supervisor.process.")
    }
    assert used <= stand_ins(World(Script())).keys()
