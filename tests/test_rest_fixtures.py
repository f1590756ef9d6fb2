"""The REST backend against answers that real 2.20 and 3.8 servers gave: everything in them becomes our values."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote
from uuid import UUID

import msgspec
import pytest
import trio

from supervisor.backend.answers import read
from supervisor.backend.rest.client import RestBackend
from supervisor.errors import NotFound, Refused, ServerTrouble
from supervisor.model import Answer, LogRecord, Proposal, StateType

FIXTURES = Path(__file__).parent / "fixtures" / "rest"
VERSIONS = ("2.20", "3.8")
PROPOSALS = sorted(path for path in FIXTURES.glob("*/set_state_*.json") if not path.stem.endswith(("404", "422")))
T = TypeVar("T")
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def recorded(version: str, name: str) -> dict[str, Any]:
    return dict(json.loads((FIXTURES / version / f"{name}.json").read_text()))


class Replay:
    """Answers each request with the next recorded exchange, which must be for the same method and path."""

    def __init__(self, *exchanges: dict[str, Any]) -> None:
        self.left = list(exchanges)
        self.bodies: list[Any] = []

    async def _answer(self, method: str, path: str, body: Any = None) -> Any:
        await trio.lowlevel.checkpoint()
        assert self.left, f"unexpected {method} {path}"
        exchange = self.left.pop(0)
        assert (method, unquote(path)) == (exchange["request"]["method"], exchange["request"]["path"])
        self.bodies.append(msgspec.to_builtins(body))
        said = exchange["response"]
        content = b"" if said == "" else json.dumps(said).encode()
        return read(exchange["status"], exchange["headers"], content, f"cannot {method} {path}")

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return await self._answer("GET", path)

    async def post(self, path: str, body: Any) -> Any:
        return await self._answer("POST", path, body)

    async def patch(self, path: str, body: Any) -> Any:
        return await self._answer("PATCH", path, body)

    async def delete(self, path: str) -> None:
        await self._answer("DELETE", path)


def run(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return trio.run(call)


def replayed(version: str, *names: str) -> tuple[RestBackend, Replay]:
    replay = Replay(*(recorded(version, name) for name in names))
    return RestBackend(replay), replay


def tail(path: str) -> str:
    return path.split("/")[2]


@pytest.mark.parametrize("path", PROPOSALS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recorded_proposal_is_sent_as_recorded_and_its_verdict_understood(path: Path) -> None:
    exchange = json.loads(path.read_text())
    sent, said = exchange["request"]["json"], exchange["response"]
    replay = Replay(exchange)
    proposal = Proposal(
        type=StateType(sent["state"]["type"]),
        name=sent["state"].get("name"),
        message="because",
        transition_id="11111111-1111-4111-8111-111111111111",
        force=sent["force"],
    )

    verdict = run(lambda: RestBackend(replay).propose(tail(exchange["request"]["path"]), proposal))

    body = replay.bodies[0]
    assert body["force"] is sent["force"]
    assert body["state"]["type"] == sent["state"]["type"]
    assert body["state"].get("name") == sent["state"].get("name")
    assert body["state"]["message"] == "because"
    assert body["state"]["state_details"] == {"transition_id": "11111111-1111-4111-8111-111111111111"}
    assert verdict.answer == said["status"]
    assert verdict.reason == said["details"].get("reason")
    assert verdict.delay_seconds == said["details"].get("delay_seconds")
    assert verdict.state is not None
    details = said["state"]["state_details"]
    assert (verdict.state.id, verdict.state.type, verdict.state.name, verdict.state.message) == (
        said["state"]["id"],
        said["state"]["type"],
        said["state"]["name"],
        said["state"]["message"],
    )
    assert verdict.state.transition_id == details["transition_id"]
    assert verdict.state.lease_id == details.get("deployment_concurrency_lease_id")


def test_the_recorded_proposals_hold_all_four_answers_and_a_lease() -> None:
    assert {json.loads(path.read_text())["response"]["status"] for path in PROPOSALS} == set(Answer)
    lease = recorded("3.8", "set_state_pending_with_lease")["response"]["state"]["state_details"]
    assert lease["deployment_concurrency_lease_id"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_proposal_for_a_deleted_run_is_not_found_and_a_bad_one_refused_with_the_servers_words(version: str) -> None:
    proposal = Proposal(type=StateType.PENDING, transition_id="1")
    backend, replay = replayed(version, "set_state_404", "set_state_422")
    missing, bad = (tail(exchange["request"]["path"]) for exchange in replay.left)
    with pytest.raises(NotFound, match=f"Flow run with id {missing} not found"):
        run(lambda: backend.propose(missing, proposal))
    with pytest.raises(Refused, match=r"Invalid request received.*type") as refused:
        run(lambda: backend.propose(bad, proposal))
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("version", "full", "major"), [("2.20", "2.20.26", 2), ("3.8", "3.8.8", 3)], ids=["2.20", "3.8"]
)
def test_the_generation_is_told_by_the_version_of_the_server(version: str, full: str, major: int) -> None:
    backend, _ = replayed(version, "admin_version")
    server = run(backend.hello)
    assert (server.version, server.major) == (full, major)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_running_run_is_read_with_its_state(version: str) -> None:
    backend, replay = replayed(version, "flow_run_running_worker")
    said = replay.left[0]["response"]
    flow_run = run(lambda: backend.read_run(said["id"]))
    assert (flow_run.id, flow_run.state_id, flow_run.name) == (said["id"], said["state_id"], said["name"])
    assert flow_run.state is not None
    assert flow_run.state.type is flow_run.state_type is StateType.RUNNING
    assert flow_run.state.transition_id == said["state"]["state_details"]["transition_id"]
    assert flow_run.infrastructure_pid == said["infrastructure_pid"]
    assert flow_run.work_pool_name == said["work_pool_name"]
    assert flow_run.run_count == 1
    assert flow_run.expected_start is not None
    assert flow_run.expected_start.utcoffset() == timedelta(0)
    assert flow_run.expected_start == datetime.fromisoformat(said["expected_start_time"])


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_due_in_a_pool_come_in_the_servers_order_and_name_the_pool(version: str) -> None:
    backend, replay = replayed(version, "pool_get_scheduled_flow_runs")
    said = [entry["flow_run"] for entry in replay.left[0]["response"]]
    due = run(lambda: backend.due_in_pool("p1", queues=None, before=NOW, limit=1000))
    assert [one.id for one in due] == [one["id"] for one in said]
    assert {one.work_pool_name for one in due} == {"p1"}
    assert due[0].state_type is StateType.SCHEDULED
    assert due[0].state_id == said[0]["state_id"]
    assert due[0].tags == tuple(said[0]["tags"])
    assert replay.bodies == [{"scheduled_before": "2026-11-21T12:00:00Z", "limit": 200}]


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_due_in_some_queues_of_a_pool_are_asked_for_by_queue_name(version: str) -> None:
    backend, replay = replayed(version, "pool_get_scheduled_flow_runs_queue", "pool_get_scheduled_flow_runs_404")
    replay.left[1]["request"]["path"] = "/work_pools/p1/get_scheduled_flow_runs"
    assert run(lambda: backend.due_in_pool("p1", queues=["default"], before=NOW, limit=3)) == []
    assert replay.bodies[0]["work_queue_names"] == ["default"]
    assert replay.bodies[0]["limit"] == 3
    with pytest.raises(NotFound, match='Work pool "nope" not found'):
        run(lambda: backend.due_in_pool("p1", queues=["nope"], before=NOW, limit=3))


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_due_in_a_queue_and_of_deployments_are_read(version: str) -> None:
    backend, replay = replayed(version, "work_queue_get_runs", "deployments_get_scheduled_flow_runs")
    queue_id = tail(replay.left[0]["request"]["path"])
    expected = [[one["id"] for one in exchange["response"]] for exchange in replay.left]
    deployment_ids = replay.left[1]["request"]["json"]["deployment_ids"]
    in_queue = run(lambda: backend.due_in_queue(queue_id, before=NOW, limit=0))
    in_deployments = run(lambda: backend.due_in_deployments(deployment_ids, before=NOW, limit=5))
    assert [[one.id for one in in_queue], [one.id for one in in_deployments]] == expected
    assert replay.bodies[0]["limit"] == 1
    assert replay.bodies[1]["deployment_ids"] == deployment_ids


@pytest.mark.parametrize(("retry_type", "kept_away"), [("in_process", True), ("reschedule", False), (None, False)])
def test_a_run_whose_own_engine_will_retry_it_is_marked(retry_type: str | None, kept_away: bool) -> None:
    backend, replay = replayed("3.8", "work_queue_get_runs")
    replay.left[0]["response"][0]["empirical_policy"]["retry_type"] = retry_type
    queue_id = tail(replay.left[0]["request"]["path"])
    due = run(lambda: backend.due_in_queue(queue_id, before=NOW, limit=5))
    assert due[0].retry_in_process is kept_away


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_being_cancelled_and_what_has_been_is_found_in_one_request(version: str) -> None:
    backend, replay = replayed(version, "flow_runs_filter_cancelling")
    today = replay.left[0]["response"][0]
    old, done = json.loads(json.dumps(today)), json.loads(json.dumps(today))
    old["id"], done["id"] = "22222222-2222-4222-8222-222222222222", "33333333-3333-4333-8333-333333333333"
    old["state"]["type"] = done["state"]["type"] = "CANCELLED"
    done["state"]["name"] = "Cancelled"
    replay.left[0]["response"] += [old, done]
    found = run(lambda: backend.cancelling([today["id"], old["id"], done["id"]]))
    assert set(found) == {today["id"], old["id"], done["id"]}
    assert found[today["id"]].type is StateType.CANCELLING
    assert (found[old["id"]].type, found[old["id"]].name) == (StateType.CANCELLED, "Cancelling")
    assert replay.bodies[0]["flow_runs"]["state"] == {"type": {"any_": ["CANCELLING", "CANCELLED"]}}


def test_asking_about_no_runs_costs_no_request_and_about_five_hundred_one() -> None:
    backend, replay = replayed("3.8", *["flow_runs_filter_empty_any"] * 3)
    assert run(lambda: backend.cancelling([])) == {}
    assert replay.bodies == []
    assert run(lambda: backend.cancelling([f"run-{number}" for number in range(500)])) == {}
    assert [len(body["flow_runs"]["id"]["any_"]) for body in replay.bodies] == [500]


def test_no_request_names_more_runs_than_the_oldest_databases_take_variables() -> None:
    backend, replay = replayed("3.8", *["flow_runs_filter_empty_any"] * 2)
    assert run(lambda: backend.cancelling([f"run-{number}" for number in range(1000)])) == {}
    assert [len(body["flow_runs"]["id"]["any_"]) for body in replay.bodies] == [900, 100]


def test_of_more_cancelled_runs_than_servers_list_at_once_every_one_is_found() -> None:
    backend, replay = replayed("3.8", *["flow_runs_filter_cancelling"] * 2)
    one = replay.left[0]["response"][0]
    ids = [str(UUID(int=number)) for number in range(250)]
    for page, part in zip(replay.left, (ids[:200], ids[200:]), strict=True):
        page["response"] = [{**one, "id": id_} for id_ in part]
    assert set(run(lambda: backend.cancelling(ids))) == set(ids)
    assert [body["offset"] for body in replay.bodies] == [0, 200]


@pytest.mark.parametrize("version", VERSIONS)
def test_pools_are_read_and_a_missing_one_is_not_found(version: str) -> None:
    backend, replay = replayed(version, "work_pool_read", "work_pool_paused_read", "work_pool_404")
    said = replay.left[0]["response"]
    pool = run(lambda: backend.read_pool("p1"))
    assert (pool.id, pool.name, pool.type, pool.is_paused) == (said["id"], "p1", "process", False)
    assert run(lambda: backend.read_pool("pc")).is_paused
    with pytest.raises(NotFound, match='Work pool "p1" not found'):
        run(lambda: backend.read_pool("p1"))


def test_a_pool_is_created_with_the_template_that_prefect_gives_it() -> None:
    backend, replay = replayed("3.8", "work_pool_create")
    expected = replay.left[0]["request"]["json"]
    assert run(lambda: backend.create_pool("p1")).name == "p1"
    assert replay.bodies == [expected]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_somebody_else_created_first_is_read(version: str) -> None:
    backend, replay = replayed(
        version,
        *("work_pool_create_conflict", "work_pool_read"),
        *("work_pool_queue_conflict", "work_pool_queue_read"),
        *("work_queue_create_conflict", "work_queue_by_name"),
    )
    pool_id, queue_id, agent_queue_id = (replay.left[position]["response"]["id"] for position in (1, 3, 5))
    replay.left[3]["request"]["path"] = "/work_pools/p1/queues/hi"
    assert run(lambda: backend.create_pool("p1")).id == pool_id
    assert run(lambda: backend.create_pool_queue("p1", "hi")).id == queue_id
    assert run(lambda: backend.create_queue("agent-a")).id == agent_queue_id


@pytest.mark.parametrize("version", VERSIONS)
def test_queues_are_listed_by_prefix_and_without_one(version: str) -> None:
    backend, replay = replayed(version, "work_pool_queue_filter", "work_pool_queue_filter_all", "work_queue_create")
    every = {queue["name"] for queue in replay.left[1]["response"]}
    prefixed = run(lambda: backend.pool_queues("p1", prefixes=["h"]))
    assert [queue.name for queue in prefixed] == ["hi"]
    assert prefixed[0].priority == 1
    assert {queue.name for queue in run(lambda: backend.pool_queues("p1"))} == every > {"hi"}
    assert run(lambda: backend.create_queue("agent-a")).pool_name == "default-agent-pool"
    assert replay.bodies[0]["work_queues"] == {"name": {"startswith_": ["h"]}}
    assert replay.bodies[1]["work_queues"] is None
    assert replay.bodies[2] == {"name": "agent-a"}


@pytest.mark.parametrize("version", VERSIONS)
def test_matching_finds_agents_queues_only_and_never_asks_without_a_prefix(version: str) -> None:
    backend, replay = replayed(version, "work_queue_filter_startswith")
    ours = replay.left[0]["response"][0]
    replay.left[0]["response"].append({**ours, "id": "other", "work_pool_name": "p1"})
    assert run(lambda: backend.match_queues([])) == []
    assert [queue.id for queue in run(lambda: backend.match_queues(["agent-"]))] == [ours["id"]]


def test_listings_of_more_than_two_hundred_queues_are_read_page_by_page() -> None:
    backend, replay = replayed("3.8", "work_queue_filter_startswith", "work_queue_filter_startswith")
    one = replay.left[0]["response"][0]
    replay.left[0]["response"] = [{**one, "id": f"queue-{number}"} for number in range(200)]
    replay.left[1]["response"] = [{**one, "id": "queue-199"}, {**one, "id": "queue-200"}]
    assert len(run(lambda: backend.match_queues(["agent-"]))) == 201
    assert [body["offset"] for body in replay.bodies] == [0, 200]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_deployment_is_found_by_id_and_a_plain_word_is_explained(version: str) -> None:
    backend, replay = replayed(version, "deployment_read")
    said = replay.left[0]["response"]
    deployment = run(lambda: backend.find_deployment(said["id"]))
    assert (deployment.id, deployment.name, deployment.flow_id) == (said["id"], said["name"], said["flow_id"])
    with pytest.raises(NotFound, match="flow/deployment"):
        run(lambda: backend.find_deployment("nightly"))


@pytest.mark.parametrize("version", VERSIONS)
def test_reports_about_ourselves_are_sent_as_the_servers_took_them(version: str) -> None:
    backend, replay = replayed(version, "worker_heartbeat", "worker_delete", "logs_create")
    run(lambda: backend.heartbeat("p1", "w1", 12.2))
    run(lambda: backend.sign_off("p1", "w 1"))
    record = LogRecord(run_id="r", level=20, message="half \ud800 nul \0", at=NOW)
    run(lambda: backend.write_logs([record]))
    assert replay.bodies[0] == {"name": "w1", "heartbeat_interval_seconds": 13}
    assert replay.bodies[2] == [
        {
            "name": "prefect.flow-agent",
            "level": 20,
            "message": "half ? nul \N{REPLACEMENT CHARACTER}",
            "timestamp": "2026-11-21T12:00:00Z",
            "flow_run_id": "r",
        }
    ]


def test_signing_off_from_a_pool_that_is_gone_is_quiet_but_a_heartbeat_says_so() -> None:
    backend, replay = replayed("3.8", "worker_heartbeat_404", "worker_delete")
    with pytest.raises(NotFound, match="nope"):
        run(lambda: backend.heartbeat("nope", "w", 30))
    replay.left[0]["status"] = 404
    replay.left[0]["response"] = {"detail": "Worker not found."}
    run(lambda: backend.sign_off("p1", "w 1"))
    assert replay.left == []


def test_log_lines_are_split_by_size_and_a_giant_one_is_cut() -> None:
    backend, replay = replayed("3.8", *["logs_create"] * 4)
    lines = ["a" * 300_000, "b" * 300_000, "\N{SNOWMAN}" * 700_000, "c"]
    run(
        lambda: backend.write_logs([LogRecord(run_id="r", level=20, message=line, at=NOW) for line in lines]),
    )
    sent = [[record["message"] for record in batch] for batch in replay.bodies]
    assert [len(batch) for batch in sent] == [1, 1, 1, 1]
    assert [sent[0][0], sent[1][0], sent[3][0]] == [lines[0], lines[1], lines[3]]
    assert 899_000 < len(sent[2][0].encode()) <= 900_000
    assert sent[2][0].endswith("too long for the server)")
    run(lambda: backend.write_logs([]))


def test_labels_are_only_sent_where_the_server_knows_them() -> None:
    backend, replay = replayed("2.20", "admin_version")
    run(lambda: backend.label_run("r", {"a": "b"}))
    backend, replay = replayed("3.8", "admin_version", "flow_run_patch_labels")
    run_id = tail(replay.left[1]["request"]["path"])
    run(lambda: backend.label_run(run_id, {"a": "b"}))
    assert replay.bodies[1] == {"a": "b"}


def test_an_event_is_sent_whole_where_the_server_takes_events() -> None:
    backend, replay = replayed("3.8", "events_post")
    resource = {"prefect.resource.id": "x"}
    event_id = run(lambda: backend.emit("e", resource=resource, related=[{"a": "b"}], follows="f"))
    (event,) = replay.bodies[0]
    assert event.pop("id") == event_id
    assert datetime.fromisoformat(event.pop("occurred")) <= datetime.now(UTC)
    assert event == {"event": "e", "resource": resource, "related": [{"a": "b"}], "payload": {}, "follows": "f"}


def test_a_server_without_events_is_asked_once() -> None:
    backend, replay = replayed("2.20", "events_post")
    assert replay.left[0]["status"] == 404
    assert run(lambda: backend.emit("e", resource={})) is None
    assert run(lambda: backend.emit("e", resource={})) is None


def test_a_lease_is_renewed_and_one_that_is_gone_is_refused_with_410() -> None:
    backend, replay = replayed("3.8", "lease_renew", "lease_renew_gone")
    lease, gone = (exchange["request"]["path"].split("/")[4] for exchange in replay.left)
    run(lambda: backend.renew_lease(lease, 300))
    assert replay.bodies == [{"lease_duration": 300}]
    with pytest.raises(Refused, match="expired or been revoked") as refused:
        run(lambda: backend.renew_lease(gone, 300))
    assert refused.value.status == 410


def test_an_answer_of_another_shape_is_not_taken_for_prefects() -> None:
    backend, replay = replayed("3.8", "flow_run_read_cancelling", "work_queue_get_runs", "flow_run_read_cancelling")
    run_id, queue_id = (tail(exchange["request"]["path"]) for exchange in replay.left[:2])
    replay.left[0]["response"] = [1]
    replay.left[1]["response"] = {"items": []}
    replay.left[2]["response"]["state"]["type"] = "SLEEPING"
    with pytest.raises(ServerTrouble, match="not Prefect's API"):
        run(lambda: backend.read_run(run_id))
    with pytest.raises(ServerTrouble, match="not Prefect's API"):
        run(lambda: backend.due_in_queue(queue_id, before=NOW, limit=1))
    with pytest.raises(ServerTrouble, match="SLEEPING"):
        run(lambda: backend.read_run(run_id))


@pytest.mark.parametrize(
    ("version", "major"), [("4.0.1", 4), ("3.9.0.dev3+1.gabc", 3), ("0+unknown", 3), ("2.19.9", 2)]
)
def test_unusual_versions_still_name_a_generation(version: str, major: int) -> None:
    backend, replay = replayed("3.8", "admin_version")
    replay.left[0]["response"] = version
    assert run(backend.hello).major == major


def test_a_server_that_tells_no_version_is_cloud_when_it_answers_like_prefect() -> None:
    backend, replay = replayed("3.8", "admin_version", "flow_runs_filter_empty_any")
    replay.left[0].update(status=404, response={"detail": "Not Found"})
    server = run(backend.hello)
    assert (server.version, server.major) == ("cloud", 3)

    backend, replay = replayed("3.8", "admin_version", "flow_runs_filter_empty_any")
    for exchange in replay.left:
        exchange.update(status=404, response={"detail": "Not Found"})
    with pytest.raises(ServerTrouble, match="usually ends in /api"):
        run(backend.hello)
