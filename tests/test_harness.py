"""The harness itself: what the other tests stand on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.agents import NotifySocket, to_toml
from tests.servers import Api, PrefectServer, clean_environ, processes_with
from tests.waiting import wait_until


def test_a_server_serves_deployments_and_runs(api: Api, prefect_server: PrefectServer) -> None:
    assert api.get("/admin/version") == prefect_server.version
    deployment = api.create_deployment("hello", pool=api.create_pool(), job_variables={"env": {"A": "1"}})
    run_id = api.create_run(deployment, {"name": "you"})
    assert api.read_run(run_id)["parameters"] == {"name": "you"}
    assert api.states(run_id) == [("SCHEDULED", "Scheduled")]
    api.cancel(run_id)
    assert api.wait_for_state(run_id)["state_type"] == "CANCELLED"


def test_a_killed_server_comes_back_with_its_data_on_the_same_port(
    own_server: Callable[..., PrefectServer], api_of: Callable[[PrefectServer], Api]
) -> None:
    server = own_server("3.8.8")
    api = api_of(server)
    pool, port = api.create_pool(), server.port
    server.restart()
    assert server.port == port
    assert api.get(f"/work_pools/{pool}")["name"] == pool
    server.stop()
    assert not server.home.exists()
    assert not processes_with("PREFECT_HOME", str(server.home))


def test_a_run_of_the_engine_is_seen_through_the_client(api: Api, prefect_server: PrefectServer) -> None:
    run_id = api.create_run(api.create_deployment("hello", queue=api.create_queue()))
    environ = clean_environ(PREFECT_API_URL=prefect_server.url, PREFECT__FLOW_RUN_ID=run_id)
    api.set_state(run_id, "PENDING")
    subprocess.run([prefect_server.python, "-m", "prefect.engine"], env=environ, cwd=prefect_server.home, check=True)
    assert [kind for kind, _ in api.states(run_id)] == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]
    wait_until(lambda: any("Finished" in line for line in api.logs(run_id)), 10, "the engine's log lines arrive")


def test_an_unwanted_end_of_a_run_ends_the_wait_at_once(api: Api) -> None:
    run_id = api.create_run(api.create_deployment("hello", pool=api.create_pool()))
    api.set_state(run_id, "FAILED", force=True)
    with pytest.raises(AssertionError, match="ended as"):
        api.wait_for_state(run_id, "COMPLETED", timeout=60)


def test_processes_are_found_by_a_variable_of_theirs() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=clean_environ(WANTED_HERE="yes")
    ) as child:
        wait_until(lambda: [p.pid for p in processes_with("WANTED_HERE", "yes")] == [child.pid], 10, "it is found")
        assert processes_with("WANTED_HERE", "no") == []
        child.communicate(b"\n")


def test_the_notify_socket_keeps_what_it_is_sent() -> None:
    import socket

    ear = NotifySocket()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:
        mouth.sendto(b"READY=1\nSTATUS=a=b", "\0" + ear.address[1:])
    wait_until(lambda: ear.lines("READY") == ["1"], 5, "the message arrives")
    ear.close()
    assert ear.lines("STATUS") == ["a=b"]


def test_configurations_are_written_as_toml() -> None:
    import tomli

    document = {
        "agent": {"limit": 2},
        "flows": {"env": {"A b": 'x"y\n'}},
        "work": [{"queues": ["a", "b"]}, {"pool": "p"}],
    }
    assert tomli.loads(to_toml(document)) == document
