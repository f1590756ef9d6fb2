"""Runs from due to done, on real Prefect servers with real flows."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.agents import AgentProcess
from tests.releases import with_one_release
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

StartAgent = Callable[..., AgentProcess]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_flows_of_a_pool_run_to_the_end_that_their_engine_reports(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, tmp_path: Path
) -> None:
    pool = api.create_pool()
    traces = {flow: tmp_path / flow for flow in ("hello", "failing", "soft_exit", "retrying")}
    runs = {
        flow: api.create_run(api.create_deployment(flow, pool=pool), {"trace": str(trace)})
        for flow, trace in traces.items()
    }
    agent = agent_process(prefect_server, [{"pool": pool}])
    ends = {flow: api.wait_for_state(run, timeout=90)["state_type"] for flow, run in runs.items()}
    assert ends == {"hello": "COMPLETED", "failing": "FAILED", "soft_exit": "CRASHED", "retrying": "COMPLETED"}
    # The retry was the engine's own, in the same process: nobody claimed the run a second time.
    assert [line.split()[0] for line in lines(traces["retrying"])] == [runs["retrying"]] * 2
    assert len(set(lines(traces["retrying"]))) == 1
    for flow in ("hello", "failing", "soft_exit"):
        assert [line.split()[0] for line in lines(traces[flow])] == [runs[flow]]
    assert [name for _, name in api.states(runs["hello"])].count("Running") == 1
    assert "hello world" in (agent.log_dir / f"{runs['hello']}.log").read_text()
    assert agent.stop() == 0


def test_a_process_that_dies_without_a_word_is_crashed_with_the_reason_and_its_last_words(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool = api.create_pool()
    killed = api.create_run(api.create_deployment("kill_self", pool=pool))
    left = api.create_run(api.create_deployment("hard_exit", pool=pool))
    agent_process(prefect_server, [{"pool": pool}])
    for run, reason, words in (
        (killed, "SIGKILL", "last words before the signal"),
        (left, "code 3", "last words before os._exit"),
    ):
        ended = api.wait_for_state(run, timeout=90)
        assert ended["state_type"] == "CRASHED"
        assert reason in ended["state"]["message"]
        wait_until(
            lambda run=run, words=words: any(words in line for line in api.logs(run)), 10, "its output in its log"
        )


def test_an_engine_that_never_takes_the_run_over_is_started_three_times_and_then_crashed(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, tmp_path: Path
) -> None:
    pool = api.create_pool()
    starts = tmp_path / "starts"
    command = f"sh -c 'echo started >> {starts}; echo cannot go on; exit 7'"
    run = api.create_run(api.create_deployment("hello", pool=pool, job_variables={"command": command}))
    agent_process(prefect_server, [{"pool": pool}])
    ended = api.wait_for_state(run, timeout=60)
    assert ended["state_type"] == "CRASHED"
    assert "code 7, 3 times" in ended["state"]["message"]
    assert lines(starts) == ["started"] * 3
    wait_until(lambda: any("cannot go on" in line for line in api.logs(run)), 10, "its output in its log")


def test_work_is_found_in_pools_queues_prefixes_and_deployments(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool, other = api.create_pool(), api.create_pool()
    api.create_pool_queue(pool, "wanted")
    api.create_pool_queue(pool, "unwanted")
    named, matched = api.create_queue(), api.create_queue("dev-one")
    served = api.create_deployment("hello", pool=other)
    runs = {
        "pool queue": api.create_run(api.create_deployment("hello", pool=pool, queue="wanted")),
        "agent-style queue": api.create_run(api.create_deployment("hello", queue=named)),
        "prefix": api.create_run(api.create_deployment("hello", queue=matched)),
        "deployment": api.create_run(served),
    }
    passed_over = api.create_run(api.create_deployment("hello", pool=pool, queue="unwanted"))
    work: list[dict[str, Any]] = [
        {"pool": pool, "queues": ["wanted"]},
        {"queues": [named]},
        {"match": ["dev-"]},
        {"deployments": [served]},
    ]
    agent = agent_process(prefect_server, work)
    for run in runs.values():
        assert api.wait_for_state(run, timeout=90)["state_type"] == "COMPLETED"
    assert "Matched new work queues: dev-one" in agent.log()
    assert api.state(passed_over) == "SCHEDULED"


def test_missing_pools_and_queues_are_made_and_a_missing_match_is_not(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    suffix = os.urandom(4).hex()
    work = [{"pool": f"new-{suffix}"}, {"queues": [f"new-queue-{suffix}"]}, {"match": [f"never-{suffix}"]}]
    agent = agent_process(prefect_server, work)
    agent.wait_for_log(f"created work pool 'new-{suffix}'")
    agent.wait_for_log(f"created work queue 'new-queue-{suffix}'")
    assert api.get(f"/work_pools/new-{suffix}")["type"] == "process"
    # What it made serves a run at once.
    run = api.create_run(api.create_deployment("hello", pool=f"new-{suffix}"))
    assert api.wait_for_state(run, timeout=60)["state_type"] == "COMPLETED"
    queues = api.post("/work_queues/filter", {"work_queues": {"name": {"startswith_": [f"never-{suffix}"]}}})
    assert queues == []


def test_a_flow_sees_a_clean_environment_and_a_private_directory(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, tmp_path: Path
) -> None:
    pool = api.create_pool()
    seen = tmp_path / "seen.json"
    deployment = api.create_deployment("env_dump", pool=pool, job_variables={"env": {"FROM_JOB": "job"}})
    run = api.create_run(deployment, {"path": str(seen)})
    agent = agent_process(
        prefect_server,
        [{"pool": pool}],
        flows={"env": {"FROM_CONFIG": "config"}, "pass_env": ["PASSED_*"]},
        env={"PASSED_ON": "yes", "NOT_PASSED": "no", "FLOW_AGENT_API_KEY": "", "WATCHDOG_USEC": "60000000"},
    )
    api.wait_for_state(run)
    found = json.loads(seen.read_text())
    environ = found["environ"]
    assert environ["PREFECT_API_URL"] == prefect_server.url
    assert environ["PREFECT__FLOW_RUN_ID"] == run
    assert environ["FLOW_AGENT_RUN_ID"] == run
    assert (environ["FROM_JOB"], environ["FROM_CONFIG"], environ["PASSED_ON"]) == ("job", "config", "yes")
    ours = {name for name in environ if name.startswith("FLOW_AGENT_") and not name.startswith("FLOW_AGENT_TEST_")}
    assert ours == {"FLOW_AGENT_RUN_ID", "FLOW_AGENT_RUN_HOME"}
    assert not {"NOT_PASSED", "NOTIFY_SOCKET", "WATCHDOG_USEC", "VIRTUAL_ENV", "PYTHONPATH"} & set(environ)
    assert Path(found["cwd"]).is_relative_to(agent.state_dir)
    wait_until(lambda: not Path(found["cwd"]).exists(), 15, "its private directory is removed")


@with_one_release
def test_a_configured_working_directory_is_used_and_kept(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, tmp_path: Path
) -> None:
    pool = api.create_pool()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    plain = api.create_run(api.create_deployment("cwd_writer", pool=pool))
    with_variable = api.create_deployment("cwd_writer", pool=pool, job_variables={"working_dir": str(theirs)})
    own = api.create_run(with_variable)
    gone = api.create_deployment("cwd_writer", pool=pool, job_variables={"working_dir": str(tmp_path / "nowhere")})
    nowhere = api.create_run(gone)
    agent_process(prefect_server, [{"pool": pool, "working_dir": str(ours)}])
    for run in (plain, own):
        assert api.wait_for_state(run, timeout=90)["state_type"] == "COMPLETED"
    assert (ours / "written-by-a-flow").exists()
    assert (theirs / "written-by-a-flow").exists()
    ended = api.wait_for_state(nowhere)
    assert ended["state_type"] == "CRASHED"
    assert "no such directory" in ended["state"]["message"]


@with_one_release
def test_no_more_runs_at_once_than_the_limits_and_a_freed_slot_is_used_at_once(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, tmp_path: Path
) -> None:
    pool = api.create_pool()
    running = tmp_path / "running"
    # Each run notes how many run beside it.
    body = f"echo x >> {running}/$$; ls {running} | wc -l >> {tmp_path}/seen; sleep 0.3; rm {running}/$$; exit 3"
    running.mkdir()
    deployment = api.create_deployment("hello", pool=pool, job_variables={"command": f"sh -c '{body}'"})
    runs = [api.create_run(deployment) for _ in range(5)]
    agent_process(prefect_server, [{"pool": pool}], agent={"limit": 2}, poll={"interval_seconds": 30})
    for run in runs:
        assert api.wait_for_state(run, timeout=60)["state_type"] == "CRASHED"
    assert {int(line) for line in lines(tmp_path / "seen")} <= {1, 2}
    assert len(lines(tmp_path / "seen")) == 5 * 3  # three starts each; none was polled for every 30 s


@with_one_release
def test_run_once_takes_what_is_due_waits_for_it_and_ends(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool = api.create_pool()
    deployment = api.create_deployment("hello", pool=pool)
    due, soon, later = (api.create_run(deployment, due_in=seconds) for seconds in (0, 8, 3600))
    agent = agent_process(prefect_server, [{"pool": pool}], args=["--run-once"])
    assert agent.wait() == 0
    assert (api.state(due), api.state(soon), api.state(later)) == ("COMPLETED", "COMPLETED", "SCHEDULED")


def test_the_server_knows_the_process_and_the_worker_while_a_run_lives(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool = api.create_pool()
    run = api.create_run(api.create_deployment("sleeper", pool=pool), {"seconds": 600})
    agent = agent_process(prefect_server, [{"pool": pool}])
    api.wait_for_state(run, "RUNNING")
    record = wait_until(lambda: api.read_run(run) if api.read_run(run)["infrastructure_pid"] else None, 10, "its pid")
    pids = {process.pid for process in agent.run_processes()}
    pid = record["infrastructure_pid"]
    if prefect_server.major == 2:
        host, pid = pid.split(":")
        assert host == socket.gethostname()
    assert int(pid) in pids
    workers = wait_until(lambda: api.post(f"/work_pools/{pool}/workers/filter"), 10, "a heartbeat")
    assert [worker["name"] for worker in workers] == ["test-agent"]
    assert any("Worker 'test-agent' submitting flow run" in line for line in api.logs(run))
    if prefect_server.major >= 3:
        labels = wait_until(lambda: api.read_run(run)["labels"].get("prefect.worker.name"), 10, "its labels")
        assert labels == "test-agent"
    api.cancel(run)
    api.wait_for_state(run)
    assert agent.stop() == 0
    # Signed off: nobody waits for three heartbeats to see that it is gone.
    assert api.post(f"/work_pools/{pool}/workers/filter") == []


def test_events_are_sent_as_workers_send_them(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent
) -> None:
    api = api_of(server_3)
    pool = api.create_pool()
    run = api.create_run(api.create_deployment("hello", pool=pool))
    agent = agent_process(server_3, [{"pool": pool}])
    api.wait_for_state(run)

    def events() -> dict[str, Any]:
        wanted = {"event": {"prefix": ["prefect.worker."]}, "any_resource": {"id": [_pool_id(api, pool)]}}
        return {
            event["event"]: event for event in api.post("/events/filter", {"filter": wanted, "limit": 50})["events"]
        }

    # A busy server may refuse the first heartbeats; what it has not heard of has not begun for it, and does not end.
    wait_until(lambda: "prefect.worker.started" in events(), 30, "its first event", more=agent.log)
    agent.stop()
    names = ("started", "submitted-flow-run", "executed-flow-run", "stopped")
    found = wait_until(
        lambda: seen if len(seen := events()) == len(names) else None, 30, "all events", more=lambda: str(events())
    )
    assert set(found) == {f"prefect.worker.{name}" for name in names}
    executed = found["prefect.worker.executed-flow-run"]
    assert executed["follows"] == found["prefect.worker.submitted-flow-run"]["id"]
    roles = {related["prefect.resource.role"]: related for related in executed["related"]}
    assert roles["flow-run"]["prefect.resource.id"] == f"prefect.flow-run.{run}"
    assert roles["flow-run"]["prefect.infrastructure.status-code"] == "0"
    assert {"deployment", "flow", "work-pool"} <= set(roles)


def _pool_id(api: Api, pool: str) -> str:
    return f"prefect.work-pool.{api.get(f'/work_pools/{pool}')['id']}"


def test_a_paused_pool_is_said_once_and_served_when_it_is_resumed(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool = api.create_pool()
    api.patch(f"/work_pools/{pool}", {"is_paused": True})
    run = api.create_run(api.create_deployment("hello", pool=pool))
    agent = agent_process(prefect_server, [{"pool": pool}])
    agent.wait_for_log(f"work pool '{pool}' is paused")
    api.patch(f"/work_pools/{pool}", {"is_paused": False})
    assert api.wait_for_state(run)["state_type"] == "COMPLETED"
    assert agent.log().count("is paused") == 1


def test_priority_is_kept_as_the_server_gives_it(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent, tmp_path: Path
) -> None:
    pool = api.create_pool()
    api.create_pool_queue(pool, "low", priority=9)
    api.create_pool_queue(pool, "high", priority=2)
    order = tmp_path / "order"
    runs = [
        api.create_run(
            api.create_deployment(
                "hello", pool=pool, queue=queue, job_variables={"command": f"sh -c 'echo {queue} >> {order}; exit 1'"}
            )
        )
        for queue in ("low", "high")
    ]
    agent_process(prefect_server, [{"pool": pool, "queues": ["low", "high"]}], agent={"limit": 1})
    for run in runs:
        api.wait_for_state(run)
    assert lines(order) == ["high"] * 3 + ["low"] * 3  # the low one was created, and due, first


def test_a_run_whose_deployment_is_deleted_while_it_waits_for_us_is_not_started(
    prefect_server: PrefectServer, api: Api, agent_process: StartAgent
) -> None:
    pool = api.create_pool()
    deployment = api.create_deployment("hello", pool=pool)
    run = api.create_run(deployment)
    api.delete(f"/deployments/{deployment}")
    agent = agent_process(prefect_server, [{"pool": pool}], args=["--run-once"])
    assert agent.wait() == 0
    assert api.client.get(f"{prefect_server.url}/flow_runs/{run}").status_code in (200, 404)
    assert "internal error" not in agent.log()


def test_a_suspended_run_gives_its_slot_back_and_comes_back_when_it_is_resumed(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent, tmp_path: Path
) -> None:
    api = api_of(server_3)
    pool = api.create_pool()
    trace = tmp_path / "trace"
    run = api.create_run(api.create_deployment("suspender", pool=pool), {"trace": str(trace)})
    agent = agent_process(server_3, [{"pool": pool}], agent={"limit": 1})
    api.wait_for_state(run, "PAUSED")
    wait_until(lambda: not agent.run_processes(), 20, "its process has ended")
    api.resume(run)
    assert api.wait_for_state(run, timeout=60)["state_type"] == "COMPLETED"
    assert lines(trace)[-1] == f"{run} resumed"
    pids = {line.split()[1] for line in lines(trace) if not line.endswith("resumed")}
    assert len(pids) == 2


def test_a_full_deployment_rests_and_other_deployments_run(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent
) -> None:
    api = api_of(server_3)
    pool = api.create_pool()
    narrow = api.create_deployment("sleeper", pool=pool, concurrency_limit=1)
    first, second = (api.create_run(narrow, {"seconds": 600}) for _ in range(2))
    agent = agent_process(server_3, [{"pool": pool}], agent={"limit": 3})
    wait_until(
        lambda: sorted([api.state(first), api.state(second)]) == ["RUNNING", "SCHEDULED"], 30, "one runs, one waits"
    )
    assert api.wait_for_state(api.create_run(api.create_deployment("hello", pool=pool)))["state_type"] == "COMPLETED"
    waiting = first if api.state(first) == "SCHEDULED" else second
    assert [name for _, name in api.states(waiting)].count("AwaitingConcurrencySlot") == 1
    wait_until(lambda: len(agent.run_processes()) == 1, 15, "only the one that may run has a process")


def test_the_process_block_of_an_agent_style_deployment_is_obeyed_and_others_are_named(
    server_2: PrefectServer, api_of: Callable[[PrefectServer], Api], agent_process: StartAgent, tmp_path: Path
) -> None:
    api = api_of(server_2)
    queue = api.create_queue()

    def block(slug: str, data: dict[str, Any]) -> str:
        kind = api.get(f"/block_types/slug/{slug}")
        schema = api.post("/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}})[0]
        body = {
            "name": f"b-{os.urandom(3).hex()}",
            "data": data,
            "block_type_id": kind["id"],
            "block_schema_id": schema["id"],
        }
        identity: str = api.post("/block_documents/", body)["id"]
        return identity

    seen = tmp_path / "seen.json"
    process = block("process", {"type": "process", "env": {"FROM_BLOCK": "block", "BOTH": "block"}})
    obeyed = api.create_deployment(
        "env_dump",
        queue=queue,
        infrastructure_document_id=process,
        job_variables={"env.BOTH": "override", "working_dir": str(tmp_path)},
    )
    other = api.create_deployment(
        "hello", queue=queue, infrastructure_document_id=block("docker-container", {"type": "docker-container"})
    )
    run, refused = api.create_run(obeyed, {"path": str(seen)}), api.create_run(other)
    agent_process(server_2, [{"queues": [queue]}])
    api.wait_for_state(run)
    found = json.loads(seen.read_text())
    assert (found["environ"]["FROM_BLOCK"], found["environ"]["BOTH"]) == ("block", "override")
    assert found["cwd"] == str(tmp_path)
    ended = api.wait_for_state(refused)
    assert ended["state_type"] == "FAILED"
    assert "docker-container" in ended["state"]["message"]


def test_an_older_engine_serves_a_newer_server(
    server_3: PrefectServer,
    api_of: Callable[[PrefectServer], Api],
    agent_process: StartAgent,
    engine: Callable[[str], Path],
) -> None:
    api = api_of(server_3)
    pools = {version: api.create_pool() for version in ("3.4.25", "3.6.29")}
    runs = [
        api.create_run(api.create_deployment(flow, pool=pool))
        for pool in pools.values()
        for flow in ("hello", "kill_self")
    ]
    agent_process(server_3, [{"pool": pool, "python": str(engine(version))} for version, pool in pools.items()])
    ends = [api.wait_for_state(run, timeout=60)["state_type"] for run in runs]
    assert ends == ["COMPLETED", "CRASHED"] * 2


def test_an_interpreter_without_prefect_is_refused_at_the_start_in_one_sentence(
    server_3: PrefectServer, agent_process: StartAgent, tmp_path: Path
) -> None:
    for python, words in ((tmp_path / "nowhere", "cannot"), (Path("/usr/bin/env"), "is not a Python that works")):
        agent = agent_process(server_3, [{"pool": "p"}], flows={"python": str(python)}, wait=False)
        assert agent.wait(30) == 78
        assert words in agent.log()
        assert "Traceback" not in agent.log()
