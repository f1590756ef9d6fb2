"""A real agent is told to reload its configuration while it works."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.agents import AgentProcess, config_for
from tests.faultserver import fault_server_thread
from tests.servers import Api, PrefectServer, clean_environ
from tests.waiting import lines, wait_until

StartAgent = Callable[..., AgentProcess]


def reload(agent: AgentProcess, config: dict[str, Any] | str | None = None) -> None:
    """Another configuration, or none: the agent is told, and has told its manager that it is done with it."""
    if config is not None:
        agent.write_config(config)
    done = len(agent.notify.lines("READY"))
    agent.send(signal.SIGHUP)
    wait_until(lambda: len(agent.notify.lines("READY")) > done, 30, "the reload is over", more=agent.log)


def test_a_new_limit_and_another_pool_are_taken_while_a_run_goes_on_until_the_agent_stops(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent, tmp_path: Path
) -> None:
    api = api_of(server_3)
    one, two, trace, go = api.create_pool(), api.create_pool(), tmp_path / "trace", tmp_path / "go"
    deployments = [api.create_deployment("held", pool=pool, file="held.py") for pool in (one, two)]
    parameters = {"trace": str(trace), "go": str(go)}

    def workers(pool: str) -> list[str]:
        return [worker["name"] for worker in api.post(f"/work_pools/{pool}/workers/filter")]

    agent = agent_process(
        server_3,
        [{"pool": one}],
        agent={"limit": 1},
        poll={"cancel_interval_seconds": 3600},
        stop={"on_stop": "cancel"},
    )
    first = api.create_run(deployments[0], parameters)
    wait_until(lambda: lines(trace), 60, "the flow has begun", more=agent.log)
    process = psutil.Process(int(lines(trace)[0].split()[1]))
    second = api.create_run(deployments[1], parameters)

    both = [{"pool": one}, {"pool": two}]
    reload(agent, config_for(server_3, both, agent={"limit": 2}, output={"show": True}, stop={"on_stop": "cancel"}))
    assert f"[[work]] pool '{two}' added" in agent.log()
    wait_until(lambda: len(lines(trace)) == 2, 60, "the other pool's flow has begun", more=agent.log)
    wait_until(lambda: workers(two), 10, "the other pool knows of its worker", more=agent.log)
    agent.wait_for_log("Beginning flow run")  # what a flow prints is shown, of the new run only
    assert agent.log().count("Beginning flow run") == 1

    reload(agent, config_for(server_3, [{"pool": two}], agent={"limit": 3}))
    wait_until(lambda: not workers(one), 10, "the pool that is gone has been left", more=agent.log)
    third = api.create_run(deployments[0], parameters)
    assert "2 running, 1 free" in agent.notify.lines("STATUS")[-1]
    api.cancel(second)
    api.wait_for_state(second, "CANCELLED")
    assert process.is_running()

    agent.send(signal.SIGTERM)
    wait_until(lambda: agent.notify.lines("STOPPING"), 10, "it stops", more=agent.log)
    agent.send(signal.SIGHUP)
    agent.wait_for_log("cannot reload the configuration: this agent takes no new runs any more")
    go.touch()
    assert agent.wait() == 0
    assert [api.state(run) for run in (first, second, third)] == ["COMPLETED", "CANCELLED", "SCHEDULED"]
    assert [line.split()[0] for line in lines(trace)] == [first, second]
    assert len(agent.notify.lines("READY")) == 3


def test_a_bad_file_changes_nothing_and_log_status_and_check_say_why_in_the_same_words(
    server_3: PrefectServer, agent_process: StartAgent
) -> None:
    agent = agent_process(server_3, [{"queues": ["nowhere"]}])
    good = agent.config_file.read_text()
    reload(agent, good.replace('log_level = "debug"', 'log_level = "loud"\nlimt = 3'))
    checked = subprocess.run(
        [sys.executable, "-m", "supervisor", "check", "--config", str(agent.config_file)],
        capture_output=True,
        text=True,
        env=clean_environ(),
    )
    assert checked.returncode == 78
    sentences = checked.stderr.splitlines()
    assert [sentence.split(": ")[1] for sentence in sentences] == [
        "cannot use agent.log_level",
        "cannot use 'limt' in [agent]",
    ]
    said = [line.partition("cannot reload: ")[2] for line in agent.log().splitlines() if " ERROR " in line]
    assert said == sentences
    short = sentences[0].replace(str(agent.config_file), "agent.toml")
    assert agent.notify.lines("STATUS")[-1].endswith(f"; reload refused: {short} (and 1 more)")

    agent.config_file.unlink()
    reload(agent)
    assert "reload refused: agent.toml: cannot read it: No such file" in agent.notify.lines("STATUS")[-1]
    reload(agent, good)
    assert "refused" not in agent.notify.lines("STATUS")[-1]
    assert "nothing has changed" in agent.log()
    # RELOADING=1 begins and READY=1 ends each of them, the start being the first READY=1.
    spoken = [line for message in agent.notify.messages for line in message.splitlines()]
    steps = [line for line in spoken if line in ("RELOADING=1", "READY=1")]
    assert steps == ["READY=1", *["RELOADING=1", "READY=1"] * 3]


def test_what_needs_a_restart_is_named_and_stays_while_the_rest_counts(
    server_3: PrefectServer, agent_process: StartAgent, tmp_path: Path
) -> None:
    work = [{"queues": ["nowhere"]}]
    agent = agent_process(server_3, work)
    elsewhere = {"state_dir": tmp_path / "elsewhere", "log_format": "json"}
    reload(agent, config_for(server_3, work, agent=elsewhere, api={"url": "http://127.0.0.1:1/api"}))
    named = "agent.state_dir, api.url"
    assert agent.notify.lines("STATUS")[-1].endswith(f"; a restart is needed for {named}")
    records = [json.loads(line) for line in agent.log().splitlines() if line.startswith("{")]
    assert [(record["level"], record["message"]) for record in records if "reloaded" in record["message"]] == [
        ("info", f"reloaded {agent.config_file}: agent.log_format"),
        ("warning", f"reloaded; these need a restart, and stay as they were: {named}"),
    ]
    assert agent.stop() == 0
    assert "lost the server" not in agent.log()
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_was_exchanged_is_shown_to_the_server_from_then_on(
    server_3: PrefectServer, agent_process: StartAgent, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("the-first")
    with fault_server_thread(server_3.url) as way:

        def shown() -> str | None:
            return way.requests[-1].headers.get("authorization") if way.requests else None

        agent = agent_process(server_3, [{"queues": ["nowhere"]}], api={"url": way.url, "api_key_file": key})
        wait_until(lambda: shown() == "Bearer the-first", 10, "the server is asked", more=agent.log)
        key.write_text("the-second")
        reload(agent)
        wait_until(lambda: shown() == "Bearer the-second", 10, "the other key is shown", more=agent.log)
        assert agent.stop() == 0
    assert "the-first" not in agent.log()
    assert "the-second" not in agent.log() + str(agent.notify.messages)
