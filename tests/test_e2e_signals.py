"""What the agent does when it is signalled, and how it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from supervisor.runs.ladder import DEBOUNCE_SECONDS
from tests.agents import AgentProcess
from tests.faultserver import fault_server_thread
from tests.servers import Api, PrefectServer
from tests.waiting import lines, wait_until

StartAgent = Callable[..., AgentProcess]


@pytest.fixture
def api(server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]) -> Api:
    """Signals concern only the agent, so one generation of servers will do."""
    return api_of(server_3)


@pytest.fixture
def pool(api: Api) -> str:
    return api.create_pool()


@pytest.fixture
def live_run(api: Api, pool: str, agent_process: StartAgent, tmp_path: Path) -> Callable[..., tuple[AgentProcess, str]]:
    """An agent, and a run of it whose body has begun."""

    def start(flow: str, seconds: float = 600, **sections: object) -> tuple[AgentProcess, str]:
        trace = tmp_path / "trace"
        run = api.create_run(api.create_deployment(flow, pool=pool), {"seconds": seconds, "trace": str(trace)})
        agent = agent_process(api.server, [{"pool": pool}], **sections)
        wait_until(lambda: lines(trace), 60, "the flow has begun", more=agent.log)
        return agent, run

    return start


def climb(agent: AgentProcess, signum: signal.Signals, said: str) -> None:
    """Sends the signal, and returns when it has been understood and the next one will count as another."""
    agent.send(signum)
    agent.wait_for_log(said)
    counted = time.monotonic() + DEBOUNCE_SECONDS
    wait_until(lambda: time.monotonic() > counted, 5, "the agent would count the same signal again")


def test_sigterm_lets_live_runs_finish_and_takes_no_new_ones(
    api: Api, pool: str, live_run: Callable[..., tuple[AgentProcess, str]]
) -> None:
    agent, run = live_run("sleeper", 3)
    agent.send(signal.SIGTERM)
    agent.wait_for_log("taking no new runs; waiting for 1 live run")
    late = api.create_run(api.create_deployment("hello", pool=pool))
    assert agent.wait() == 0
    assert api.state(run) == "COMPLETED"
    assert api.state(late) == "SCHEDULED"


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT, signal.SIGTERM], [signal.SIGQUIT]],
    ids=["TERM-TERM", "INT-TERM", "QUIT"],
)
def test_the_second_signal_or_sigquit_cancels_live_runs(
    api: Api, live_run: Callable[..., tuple[AgentProcess, str]], signals: Sequence[signal.Signals]
) -> None:
    agent, run = live_run("sleeper")
    if len(signals) == 2:
        climb(agent, signals[0], f"{signals[0].name}: taking no new runs; waiting for 1 live run")
    agent.send(signals[-1])
    assert agent.wait(30) == 0
    ended = api.read_run(run)
    assert ended["state_name"] == "Cancelled"
    assert ended["state"]["message"] == f"Cancelled by flow-agent: it was told to stop ({signals[-1].name})."
    assert "CRASHED" not in [kind for kind, _ in api.states(run)]
    assert agent.run_processes() == []


@pytest.mark.parametrize(("fail", "end"), [(False, "COMPLETED"), (True, "FAILED")], ids=["completed", "failed"])
def test_an_end_that_the_engine_has_reported_is_never_overwritten(
    api: Api, pool: str, agent_process: StartAgent, fail: bool, end: str
) -> None:
    run = api.create_run(api.create_deployment("lingering", pool=pool), {"fail": fail})
    agent = agent_process(api.server, [{"pool": pool}], flows={"grace_seconds": 3})
    api.wait_for_state(run, end)
    agent.send(signal.SIGQUIT)
    assert agent.wait(30) == 0
    assert "cancelling 1 live run" in agent.log()
    assert api.states(run)[-1][0] == end, api.story(run)


@pytest.mark.parametrize("reachable", [True, False], ids=["with-server", "without-server"])
def test_the_third_signal_kills_and_goes_even_when_nobody_can_be_told(
    api: Api, live_run: Callable[..., tuple[AgentProcess, str]], reachable: bool
) -> None:
    with fault_server_thread(api.server.url) as way:
        agent, run = live_run("deaf", flows={"grace_seconds": 600}, api={"url": way.url})
        if not reachable:
            way.go_down()
        climb(agent, signal.SIGTERM, "taking no new runs")
        climb(agent, signal.SIGTERM, "cancelling 1 live run")
        third = time.monotonic()
        agent.send(signal.SIGTERM)
        assert agent.wait(15) == 1
        assert time.monotonic() - third < 10
        assert agent.run_processes() == []
        assert "ended by SIGKILL" in agent.log()
        assert "OOM" not in agent.log()  # nobody shall look for a lack of memory: it was us
        if reachable:
            assert api.state(run) == "CANCELLED"


def test_a_signal_that_is_delivered_several_times_within_milliseconds_counts_once(
    api: Api, live_run: Callable[..., tuple[AgentProcess, str]]
) -> None:
    agent, run = live_run("sleeper", 2)
    enough = time.monotonic() + 0.02
    while time.monotonic() < enough:  # two alone may be one already to the kernel
        agent.send(signal.SIGTERM)
    assert agent.wait() == 0
    assert api.state(run) == "COMPLETED"


def test_an_agent_that_was_to_run_once_takes_nothing_more_while_it_waits(
    api: Api, pool: str, live_run: Callable[..., tuple[AgentProcess, str]]
) -> None:
    agent, run = live_run("sleeper", 3, args=["--run-once"], poll={"interval_seconds": 0.1})
    late = api.create_run(api.create_deployment("hello", pool=pool))
    assert agent.wait() == 0
    assert api.state(run) == "COMPLETED"
    assert api.state(late) == "SCHEDULED"


def test_a_second_agent_on_the_same_state_directory_is_told_who_holds_it(
    api: Api, pool: str, agent_process: StartAgent
) -> None:
    first = agent_process(api.server, [{"pool": pool}], agent={"name": "the-first"})
    second = agent_process(api.server, [{"pool": pool}], agent={"state_dir": first.state_dir}, wait=False)
    assert second.wait(30) == 75
    assert f"flow-agent 'the-first' (pid {first.pid}) is using it" in second.log()
    assert "Traceback" not in second.log()
    assert second.notify.lines("READY") == []
    assert first.stop() == 0
