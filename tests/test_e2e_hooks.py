"""A flow's hooks run exactly once, whichever engine runs the flow and however the run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents import AgentProcess
from tests.servers import Api, PrefectServer
from tests.waiting import lines, wait_until

# How the run ends -> the flow, its last state, and the one hook that is owed with the name of the state it is given.
ENDS = {
    "cancelled": ("hooked_sleeper", "Cancelled", "cancellation {} Cancelling"),
    "async, cancelled": ("hooked_async_sleeper", "Cancelled", "cancellation {} Cancelling"),
    "deaf, cancelled": ("hooked_deaf", "Cancelled", "cancellation {} Cancelling"),
    "cancelled while it starts": ("hooked_sleeper", "Cancelled", "cancellation {} Cancelling"),
    "terminated by a stranger": ("hooked_sleeper", "Crashed", "crashed {} Crashed"),
    "async, terminated by a stranger": ("hooked_async_sleeper", "Crashed", "crashed {} Crashed"),
    "killed": ("hooked_kill_self", "Crashed", "crashed {} Crashed"),
    "left by os._exit": ("hooked_hard_exit", "Crashed", "crashed {} Crashed"),
    "failed": ("hooked_failing", "Failed", "failure {} Failed"),
}


@pytest.mark.parametrize(
    ("server", "version"),
    [("2.20.26", "2.20.26"), ("3.8.8", "3.4.25"), ("3.8.8", "3.6.29"), ("3.8.8", "3.8.8")],
    ids=["2.20", "3.4", "3.6", "3.8"],
)
def test_each_way_to_end_runs_the_one_right_hook_once(
    servers: Callable[[str], PrefectServer],
    api_of: Callable[[PrefectServer], Api],
    engine: Callable[[str], Path],
    agent_process: Callable[..., AgentProcess],
    tmp_path: Path,
    server: str,
    version: str,
) -> None:
    prefect_server = servers(server)
    api = api_of(prefect_server)
    pool = api.create_pool()
    deployments = {flow: api.create_deployment(flow, pool=pool) for flow, *_ in ENDS.values()}

    def start(end: str) -> str:
        files = {kind: str(tmp_path / f"{end}.{kind}") for kind in ("hooks", "trace")}
        return api.create_run(deployments[ENDS[end][0]], files)

    runs = {end: start(end) for end in ENDS if end != "cancelled while it starts"}
    agent = agent_process(prefect_server, [{"pool": pool}], flows={"python": engine(version), "grace_seconds": 4})
    for end, run in runs.items():
        trace = tmp_path / f"{end}.trace"
        wait_until(lambda trace=trace: lines(trace), 90, f"the flow that is to be {end} has begun", more=agent.log)
        if "cancelled" in end:
            api.cancel(run)
        elif "stranger" in end:
            os.kill(int(lines(trace)[0].split()[1]), signal.SIGTERM)
    runs["cancelled while it starts"] = early = start("cancelled while it starts")
    agent.wait_for_log(f"({early}): started, process")
    api.cancel(early)

    ends = {end: api.wait_for_state(run)["state_name"] for end, run in runs.items()}
    assert agent.stop() == 0  # whatever was still to be done has been done now
    assert ends == {end: state for end, (_, state, _) in ENDS.items()}
    hooks = {end: lines(tmp_path / f"{end}.hooks") for end in runs}
    assert hooks == {end: [hook.format(runs[end])] for end, (_, _, hook) in ENDS.items()}
    for end, run in runs.items():
        assert len(lines(tmp_path / f"{end}.trace")) == (0 if end == "cancelled while it starts" else 1), end
        assert api.read_run(run)["state_name"] == ENDS[end][1], f"{end}: its end was changed afterwards"
