"""Push end to end: an agent that would poll once an hour, real servers, and what the way to them does."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from tests.agents import AgentProcess
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

HOURLY = {"interval_seconds": 3600, "cancel_interval_seconds": 3600, "heartbeat_seconds": 3600, "jitter": 0}
SLEEP = {"command": ["/bin/sleep", "1000"]}
LOGIN = "somebody:secret"


def test_runs_start_and_stop_when_the_server_says_so_also_after_it_was_restarted(
    own_server: Callable[..., PrefectServer],
    api_of: Callable[[PrefectServer], Api],
    agent_process: Callable[..., AgentProcess],
    tmp_path: Path,
) -> None:
    """With a login, by pool, queue and deployment, over a restart that nobody was told of."""
    server = own_server("3.8.8", {"PREFECT_SERVER_API_AUTH_STRING": LOGIN})
    api = api_of(server)
    api.client.headers["Authorization"] = f"Basic {b64encode(LOGIN.encode()).decode()}"
    login = tmp_path / "login"
    login.write_text(LOGIN)
    pool, queue = api.create_pool(), api.create_queue()
    in_pool, in_queue = (api.create_deployment("sleeper", **where) for where in ({"pool": pool}, {"queue": queue}))
    alone = api.create_deployment("sleeper", name="alone")
    tables = [{"pool": pool}, {"queues": [queue]}, {"deployments": ["sleeper/alone"]}]
    agent = agent_process(
        server, tables, api={"auth_string_file": login}, poll={**HOURLY, "max_backoff_seconds": 1}, flows=SLEEP
    )
    agent.wait_for_log("says at once what is due")
    wait_until(lambda: agent.notify.lines("STATUS")[-1].endswith("push"), 10, "the status says so", more=agent.log)
    runs = [api.create_run(deployment) for deployment in (in_pool, in_queue)]
    for run in runs:
        wait_until(lambda run=run: api.state(run) == "PENDING", 5, "it is taken at once", more=agent.log)  # type: ignore[misc]
    server.kill()
    agent.wait_for_log("no push: ")
    server.restart()
    missed = api.create_run(alone)  # there may be no websocket yet
    wait_until(lambda: api.state(missed) == "PENDING", 10, "it is taken when the websocket is back", more=agent.log)
    wait_until(lambda: agent.notify.lines("STATUS")[-1].endswith("push"), 10, "the websocket is back", more=agent.log)
    for run in runs:
        api.cancel(run)
        agent.wait_for_log(f"({run}): stopping: Cancelled on request.", 5)
