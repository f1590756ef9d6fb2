"""What the service manager hears from a real agent, on a real datagram socket."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agents import AgentProcess
from tests.faultserver import Delay, fault_server_thread, on
from tests.servers import Api, PrefectServer, free_port
from tests.waiting import lines, wait_until

StartAgent = Callable[..., AgentProcess]

WATCHED = {"WATCHDOG_USEC": "2000000"}
# Stops the event loop wherever it is when SIGUSR2 comes, until the file is removed.
HANG = """
import pathlib, signal, time
def hang(*_):
    while pathlib.Path({!r}).exists():
        time.sleep(0.01)
signal.signal(signal.SIGUSR2, hang)
"""


def config(url: str, server: PrefectServer) -> dict[str, dict[str, object] | list[dict[str, object]]]:
    """For an agent of which only the address of its server matters."""
    return {
        "agent": {"name": "test-agent"},
        "api": {"url": url, "timeout_seconds": 3},
        "poll": {"interval_seconds": 0.2, "max_backoff_seconds": 1},
        "flows": {"python": server.python},
        "work": [{"queues": ["nowhere"]}],
    }


def wait_pings(agent: AgentProcess, more: int, timeout: float) -> None:
    """Until that many more pings have come than there are now."""
    wanted = len(agent.notify.lines("WATCHDOG")) + more
    wait_until(lambda: len(agent.notify.lines("WATCHDOG")) >= wanted, timeout, f"{more} more pings", more=agent.log)


@contextlib.contextmanager
def dead_server(_: PrefectServer) -> Iterator[str]:
    """The address of a server that refuses every connection."""
    yield f"http://127.0.0.1:{free_port()}/api"


@contextlib.contextmanager
def silent_server(server: PrefectServer) -> Iterator[str]:
    """The address of a server that takes every request and answers none."""
    with fault_server_thread(server.url) as way:
        way.rules.append(on("*", ".*", Delay(3600)))
        yield way.url


@pytest.mark.parametrize("away", [dead_server, silent_server])
def test_a_server_that_is_away_keeps_neither_ready_nor_the_watchdog_from_the_manager(
    agent_process: StartAgent,
    server_3: PrefectServer,
    away: Callable[[PrefectServer], contextlib.AbstractContextManager[str]],
) -> None:
    with away(server_3) as url:
        agent = agent_process(config=config(url, server_3), env=WATCHED)
        assert agent.notify.lines("READY") == ["1"]
        agent.wait_for_log("lost the server", 60)
        wait_until(lambda: "server away for" in (agent.notify.lines("STATUS") or [""])[-1], 10, "the status says so")
        wait_pings(agent, 5, timeout=7)  # one a second, also while a request waits for its answer
        assert set(agent.notify.lines("WATCHDOG")) == {"1"}
        assert agent.stop() == 0
    assert agent.notify.lines("STOPPING") == ["1"]


def test_an_agent_whose_event_loop_hangs_is_silent_until_it_goes_on(
    agent_process: StartAgent, server_3: PrefectServer, tmp_path: Path
) -> None:
    hanging = tmp_path / "hanging"
    (tmp_path / "sitecustomize.py").write_text(HANG.format(str(hanging)))
    url = f"http://127.0.0.1:{free_port()}/api"
    agent = agent_process(config=config(url, server_3), env=WATCHED | {"PYTHONPATH": str(tmp_path)})
    other = agent_process(config=config(url, server_3), env=WATCHED)
    wait_pings(agent, 2, timeout=4)
    hanging.touch()
    agent.send(signal.SIGUSR2)
    wait_pings(other, 1, timeout=2)  # what was on its way has come
    before = len(agent.notify.messages)
    wait_pings(other, 3, timeout=6)
    assert len(agent.notify.messages) == before
    hanging.unlink()
    wait_pings(agent, 2, timeout=4)


def test_ready_is_not_said_by_an_agent_that_cannot_start(agent_process: StartAgent, server_3: PrefectServer) -> None:
    wrong = config(server_3.url, server_3) | {"flows": {"python": sys.executable}}  # it has no Prefect
    agent = agent_process(config=wrong, wait=False)
    assert agent.wait(30) == 78
    assert agent.notify.lines("READY") == []


def test_the_status_line_tells_how_the_agent_is_and_no_flow_can_speak_to_the_manager(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent, tmp_path: Path
) -> None:
    api = api_of(server_3)
    pool, trace = api.create_pool(), tmp_path / "trace"
    agent = agent_process(server_3, [{"pool": pool}], agent={"limit": 2}, env=WATCHED)

    def status(pattern: str, timeout: float = 30) -> None:
        wait_until(
            lambda: any(re.fullmatch(pattern, line) for line in agent.notify.lines("STATUS")),
            timeout,
            f"the status {pattern!r}",
            more=lambda: "\n".join(agent.notify.lines("STATUS")),
        )

    status(r"0 running, 2 free, last poll \d+ s ago, push")
    run = api.create_run(api.create_deployment("sleeper", pool=pool), {"trace": str(trace)})
    wait_until(lambda: lines(trace), 60, "the flow has begun", more=agent.log)
    status(r"1 running, 1 free, last poll \d+ s ago, push")
    environs = [process.environ() for process in agent.run_processes()]
    assert environs
    for environ in environs:
        assert not [name for name in environ if name.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))]
    assert agent.notify.lines("STOPPING") == []
    agent.send(signal.SIGTERM)
    wait_until(lambda: agent.notify.lines("STOPPING") == ["1"], 10, "it says that it stops", more=agent.log)
    status(r"draining: 1 live run, 2[45] min left, then cancel, last poll \d+ s ago, push")
    assert set(agent.notify.lines("EXTEND_TIMEOUT_USEC")) == {"60000000"}
    wait_pings(agent, 2, timeout=4)  # the manager goes on watching while runs end
    api.cancel(run)
    assert agent.wait(30) == 0
    assert agent.notify.lines("READY") == ["1"]
