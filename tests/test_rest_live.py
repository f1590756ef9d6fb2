"""Every method of the REST backend against real servers of both generations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
import trio

from supervisor.backend.http import HttpApi
from supervisor.backend.rest.client import RestBackend
from supervisor.config import Api, Credentials
from supervisor.errors import NotFound, Refused, ServerTrouble, Unauthorized
from supervisor.model import Answer, FlowRun, LogRecord, Proposal, StateType
from tests.faultserver import LoseAnswer, on, open_fault_server
from tests.servers import PrefectServer


class Patient:
    """Asks again for up to 30 s while a server on SQLite answers 503 because its database is busy.

    Its wish was not carried out then; in the agent this patience is the business of who calls.
    """

    def __init__(self, api: HttpApi) -> None:
        self.http = api

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return await self._until_not_busy(lambda: self.http.get(path, params))

    async def post(self, path: str, body: Any) -> Any:
        return await self._until_not_busy(lambda: self.http.post(path, body))

    async def patch(self, path: str, body: Any) -> Any:
        return await self._until_not_busy(lambda: self.http.patch(path, body))

    async def delete(self, path: str) -> None:
        await self._until_not_busy(lambda: self.http.delete(path))

    async def _until_not_busy(self, call: Callable[[], Awaitable[Any]]) -> Any:
        deadline = trio.current_time() + 30
        while True:
            try:
                return await call()
            except ServerTrouble as trouble:
                if "answered 503" not in str(trouble) or trio.current_time() > deadline:
                    raise
            await trio.sleep(0.2)


class Scene:
    """A backend on a real server, and what a test needs to put things there and to look at them."""

    def __init__(self, server: PrefectServer, api: HttpApi) -> None:
        self.server = server
        self.http = api
        self.api = Patient(api)
        self.backend = RestBackend(self.api)
        self.major = int(server.version.split(".")[0])
        self.tag = uuid4().hex[:8]  # names of this test only: servers are shared

    def name(self, word: str) -> str:
        return f"{word}-{self.tag}"

    async def deployment(self, **fields: Any) -> dict[str, Any]:
        flow = await self.api.post("/flows/", {"name": self.name("flow")})
        body = {"name": self.name("deployment"), "flow_id": flow["id"], "entrypoint": "flow.py:main", **fields}
        return dict(await self.api.post("/deployments/", body))

    async def run(self, deployment: dict[str, Any], *, delay: float = 0, **fields: Any) -> str:
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": now() + timedelta(seconds=delay)}}
        made = await self.api.post(f"/deployments/{deployment['id']}/create_flow_run", {"state": state, **fields})
        return str(made["id"])

    async def propose(self, run_id: str, kind: StateType, **fields: Any) -> Answer:
        proposal = Proposal(type=kind, transition_id=str(uuid4()), **fields)
        return (await self.backend.propose(run_id, proposal)).answer


def now() -> datetime:
    return datetime.now(UTC)


def on_scene(
    server: PrefectServer,
    body: Callable[[Scene], Awaitable[None]],
    credentials: Credentials | None = None,
) -> None:
    async def main() -> None:
        given = credentials or Credentials()
        async with HttpApi.open(Api(url=server.url), lambda: given) as api:
            with trio.fail_after(120):
                await body(Scene(server, api))

    trio.run(main)


def ids(runs: list[FlowRun]) -> list[str]:
    return [run.id for run in runs]


# --- who answers ----------------------------------------------------------------------------------------------------


def test_the_server_says_its_version(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        server = await scene.backend.hello()
        assert (server.version, server.major) == (prefect_server.version, scene.major)

    on_scene(prefect_server, body)


def test_a_url_without_api_at_its_end_is_said_to_be_wrong(prefect_server: PrefectServer) -> None:
    async def main() -> None:
        async with HttpApi.open(Api(url=prefect_server.url.removesuffix("/api")), Credentials) as api:
            with pytest.raises(Exception, match=r"api\.url|not Prefect's API"):
                await RestBackend(api).hello()

    trio.run(main)


# --- where work comes from ------------------------------------------------------------------------------------------


def test_a_pool_is_missing_then_created_then_read_by_the_slower_one(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        name = scene.name("a pool")
        with pytest.raises(NotFound):
            await scene.backend.read_pool(name)
        made = await scene.backend.create_pool(name)
        again = await scene.backend.create_pool(name)
        assert made.id == again.id
        assert (again.name, again.type, again.is_paused) == (name, "process", False)
        await scene.api.patch(f"/work_pools/{name}", {"is_paused": True, "concurrency_limit": 3})
        paused = await scene.backend.read_pool(name)
        assert (paused.is_paused, paused.concurrency_limit, paused.status) == (True, 3, "PAUSED")

    on_scene(prefect_server, body)


def test_queues_of_a_pool_are_found_by_name_by_prefix_and_all(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        pool = scene.name("pool")
        await scene.backend.create_pool(pool)
        for name in ("nightly", "nightly two", "weekly"):
            made = await scene.backend.create_pool_queue(pool, name)
            assert (await scene.backend.create_pool_queue(pool, name)).id == made.id

        async def names(**question: Any) -> set[str]:
            return {queue.name for queue in await scene.backend.pool_queues(pool, **question)}

        assert await names() == {"default", "nightly", "nightly two", "weekly"}
        assert await names(names=["weekly", "absent"]) == {"weekly"}
        assert await names(prefixes=["night", "def"]) == {"default", "nightly", "nightly two"}
        assert await names(names=["weekly"], prefixes=["def"]) == {"default", "weekly"}
        with pytest.raises(NotFound):
            await scene.backend.pool_queues(scene.name("absent"))

    on_scene(prefect_server, body)


def test_an_agent_style_queue_is_found_by_name_id_and_prefix(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        name = scene.name("agent queue")
        with pytest.raises(NotFound):
            await scene.backend.read_queue(name)
        with pytest.raises(NotFound):
            await scene.backend.read_queue(str(uuid4()))
        made = await scene.backend.create_queue(name)
        assert (await scene.backend.create_queue(name)).id == made.id
        assert (await scene.backend.read_queue(name)).id == made.id
        assert (await scene.backend.read_queue(made.id)).name == name
        assert made.pool_name == "default-agent-pool"
        # A queue of the same name in a worker's pool is none of an agent's business.
        await scene.backend.create_pool(scene.name("pool"))
        await scene.backend.create_pool_queue(scene.name("pool"), name)
        assert [queue.id for queue in await scene.backend.match_queues([name[:-2]])] == [made.id]

    on_scene(prefect_server, body)


def test_a_queue_named_like_an_id_is_still_found_by_its_name(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        name = str(uuid4())
        made = await scene.backend.create_queue(name)
        assert (await scene.backend.read_queue(name)).id == made.id

    on_scene(prefect_server, body)


def test_the_legacy_tag_filter_is_put_on_new_and_on_old_queues(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        deployment = await scene.deployment()
        tagged = await scene.run(deployment, tags=[scene.tag, "other"])
        await scene.run(deployment, tags=["other"])
        old = await scene.backend.create_queue(scene.name("old"))
        for name in (scene.name("new"), scene.name("old")):
            queue = await scene.backend.create_queue(name, tags=[scene.tag])
            if name == scene.name("old"):
                assert queue.id == old.id
            due = await scene.backend.due_in_queue(queue.id, before=now(), limit=10)
            assert ids(due) == [tagged]
        # A filter that somebody chose is left alone.
        await scene.backend.create_queue(scene.name("new"), tags=["something else"])
        held = await scene.api.get(f"/work_queues/name/{scene.name('new')}")
        assert held["filter"]["tags"] == [scene.tag]

    on_scene(prefect_server, body)


def test_a_deployment_is_found_by_its_two_names_and_by_id(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        made = await scene.deployment(paused=True)
        full = f"{scene.name('flow')}/{scene.name('deployment')}"
        for name in (full, made["id"]):
            found = await scene.backend.find_deployment(name)
            assert (found.id, found.name, found.flow_id) == (made["id"], made["name"], made["flow_id"])
            assert found.paused
        for name in (f"{scene.name('flow')}/absent", str(uuid4()), "absent"):
            with pytest.raises(NotFound):
                await scene.backend.find_deployment(name)

    on_scene(prefect_server, body)


def test_due_runs_come_by_priority_and_then_by_time_up_to_the_limit(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        pool = scene.name("pool")
        await scene.backend.create_pool(pool)
        for name, priority in (("low", 9), ("high", 1)):
            await scene.api.post(f"/work_pools/{pool}/queues", {"name": name, "priority": priority})
        low = await scene.deployment(name="low", work_pool_name=pool, work_queue_name="low")
        high = await scene.deployment(name="high", work_pool_name=pool, work_queue_name="high")
        first = await scene.run(low, delay=-60)
        second = await scene.run(high, delay=-10)
        third = await scene.run(high, delay=-5)
        later = await scene.run(high, delay=600)

        async def due(queues: list[str] | None, limit: int = 50, ahead: float = 0) -> list[FlowRun]:
            before = now() + timedelta(seconds=ahead)
            return await scene.backend.due_in_pool(pool, queues=queues, before=before, limit=limit)

        everything = await due(None)
        assert ids(everything) == [second, third, first]
        assert {run.work_pool_name for run in everything} == {pool}
        assert everything[0].work_queue_name == "high"
        assert everything[0].state_type is StateType.SCHEDULED
        assert everything[0].state_id
        assert ids(await due(["low"])) == [first]
        assert ids(await due(None, limit=2)) == [second, third]
        assert ids(await due(None, limit=9999, ahead=3600)) == [second, third, later, first]
        with pytest.raises(NotFound):
            await due(["absent"])
        ahead = now() + timedelta(hours=1)
        of_both = await scene.backend.due_in_deployments([low["id"], high["id"]], before=ahead, limit=50)
        assert set(ids(of_both)) == {first, second, third, later}
        assert await scene.backend.due_in_deployments([], before=ahead, limit=5) == []

    on_scene(prefect_server, body)


def test_runs_of_an_agent_style_queue_are_offered_and_one_retrying_by_itself_is_marked(
    prefect_server: PrefectServer,
) -> None:
    async def body(scene: Scene) -> None:
        queue = await scene.backend.create_queue(scene.name("queue"))
        deployment = await scene.deployment(work_queue_name=queue.name)
        plain = await scene.run(deployment, delay=-10)
        retrying = await scene.run(deployment, delay=-5, empirical_policy={"retries": 3, "retry_delay": 0})
        await scene.propose(retrying, StateType.PENDING)
        await scene.propose(retrying, StateType.RUNNING)
        assert await scene.propose(retrying, StateType.FAILED) is Answer.REJECT
        due = await scene.backend.due_in_queue(queue.id, before=now() + timedelta(seconds=5), limit=50)
        assert {run.id: run.retry_in_process for run in due} == {plain: False, retrying: True}
        with pytest.raises(NotFound):
            await scene.backend.due_in_queue(str(uuid4()), before=now(), limit=5)

    on_scene(prefect_server, body)


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_claim_is_accepted_once_and_the_same_claim_is_recognised(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        run_id = await scene.run(await scene.deployment())
        claim = Proposal(type=StateType.PENDING, transition_id=str(uuid4()), message="claimed \0 here")
        first = await scene.backend.propose(run_id, claim)
        assert first.answer is Answer.ACCEPT
        assert first.state is not None
        read = await scene.backend.read_run(run_id)
        assert read.state == first.state
        assert read.state is not None
        assert read.state.transition_id == claim.transition_id
        assert read.state.message == "claimed \N{REPLACEMENT CHARACTER} here"
        assert (read.state_id, read.state_type, read.state_name) == (first.state.id, StateType.PENDING, "Pending")
        again = await scene.backend.propose(run_id, claim)
        assert again.answer is Answer.REJECT
        assert again.state is not None
        assert again.state.transition_id == claim.transition_id
        assert "already made this state transition" in (again.reason or "")
        assert await scene.propose(run_id, StateType.PENDING) is Answer.ABORT
        submitting = await scene.propose(run_id, StateType.PENDING, name="Submitting")
        assert submitting is (Answer.ACCEPT if scene.major >= 3 else Answer.ABORT)

    on_scene(prefect_server, body)


def test_a_claim_whose_answer_was_lost_is_found_on_the_run(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        run_id = await scene.run(await scene.deployment())
        claim = Proposal(type=StateType.PENDING, transition_id=str(uuid4()))
        async with open_fault_server(scene.server.url) as between:
            between.rules.append(on("POST", r"/flow_runs/[^/]+/set_state", LoseAnswer(), times=1))
            async with HttpApi.open(Api(url=between.url), Credentials) as api:
                with pytest.raises(Exception, match="broke") as lost:
                    await RestBackend(api).propose(run_id, claim)
                assert getattr(lost.value, "ambiguous", None) is True
                verdict = await RestBackend(api).propose(run_id, claim)
        assert verdict.answer is Answer.REJECT
        assert verdict.state is not None
        assert verdict.state.transition_id == claim.transition_id

    on_scene(prefect_server, body)


def test_a_deleted_run_is_not_found_by_any_call_that_matters(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        run_id = await scene.run(await scene.deployment())
        await scene.api.delete(f"/flow_runs/{run_id}")
        with pytest.raises(NotFound):
            await scene.backend.read_run(run_id)
        with pytest.raises(NotFound):
            await scene.propose(run_id, StateType.PENDING)
        with pytest.raises(NotFound):
            await scene.backend.patch_infrastructure(run_id, "host:1")
        await scene.backend.label_run(run_id, {"a": "b"})
        assert await scene.backend.cancelling([run_id]) == {}

    on_scene(prefect_server, body)


@pytest.mark.parametrize("pid", ["host:4711", None])
def test_a_run_that_waits_is_cancelled_at_once_where_it_has_no_process(
    prefect_server: PrefectServer, pid: str | None
) -> None:
    async def body(scene: Scene) -> None:
        run_id = await scene.run(await scene.deployment())
        await scene.backend.patch_infrastructure(run_id, "host:4711")
        await scene.backend.patch_infrastructure(run_id, pid)
        await scene.propose(run_id, StateType.CANCELLING)
        wanted = StateType.CANCELLING if pid else StateType.CANCELLED
        assert (await scene.backend.read_run(run_id)).state_type is wanted

    on_scene(prefect_server, body)


def test_pid_and_labels_are_noted_on_the_run_where_the_server_has_them(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        run_id = await scene.run(await scene.deployment())
        await scene.backend.patch_infrastructure(run_id, "host:4711")
        await scene.backend.label_run(run_id, {"prefect.worker.name": "me"})
        assert (await scene.backend.read_run(run_id)).infrastructure_pid == "host:4711"
        if scene.major >= 3:
            assert (await scene.api.get(f"/flow_runs/{run_id}"))["labels"]["prefect.worker.name"] == "me"

    on_scene(prefect_server, body)


def test_what_is_being_cancelled_and_what_has_been_is_found_among_our_runs_only(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        deployment = await scene.deployment()
        runs = [await scene.run(deployment) for _ in range(5)]
        today, renamed, old, cancelled, foreign = runs
        for run_id in runs:
            await scene.propose(run_id, StateType.PENDING)
        for run_id in (today, foreign):
            assert await scene.propose(run_id, StateType.CANCELLING) is Answer.ACCEPT
        await scene.propose(renamed, StateType.CANCELLING, name="Stop it")
        await scene.propose(old, StateType.CANCELLED, name="Cancelling", force=True)
        await scene.propose(cancelled, StateType.CANCELLED, force=True)
        many = [str(uuid4()) for _ in range(250)]
        found = await scene.backend.cancelling([*many, today, renamed, old, cancelled])
        assert {run_id: state.type for run_id, state in found.items()} == {
            today: StateType.CANCELLING,
            renamed: StateType.CANCELLING,
            old: StateType.CANCELLED,
            cancelled: StateType.CANCELLED,
        }
        assert (found[old].name, found[cancelled].name) == ("Cancelling", "Cancelled")
        assert await scene.backend.cancelling(many) == {}

    on_scene(prefect_server, body)


def test_a_lease_comes_with_the_claim_and_can_be_renewed_until_it_is_gone(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        deployment = await scene.deployment(**({"concurrency_limit": 1} if scene.major >= 3 else {}))
        first, second = [await scene.run(deployment) for _ in range(2)]
        verdict = await scene.backend.propose(first, Proposal(type=StateType.PENDING, transition_id=str(uuid4())))
        assert verdict.state is not None
        if scene.major < 3:
            assert verdict.state.lease_id is None
            return
        assert verdict.state.lease_id is not None
        await scene.backend.renew_lease(verdict.state.lease_id, 1)
        refused = await scene.backend.propose(second, Proposal(type=StateType.PENDING, transition_id=str(uuid4())))
        assert refused.answer is Answer.REJECT
        assert refused.state is not None
        assert refused.state.name == "AwaitingConcurrencySlot"
        with pytest.raises(Refused) as gone:
            await scene.backend.renew_lease(str(uuid4()), 300)
        assert gone.value.status == 410

    on_scene(prefect_server, body)


# --- about us -------------------------------------------------------------------------------------------------------


def test_a_worker_is_online_after_its_heartbeat_and_off_the_list_after_signing_off(
    prefect_server: PrefectServer,
) -> None:
    async def body(scene: Scene) -> None:
        pool = scene.name("pool")
        await scene.backend.create_pool(pool)
        await scene.backend.heartbeat(pool, "flow agent 1", 29.5)
        (worker,) = await scene.api.post(f"/work_pools/{pool}/workers/filter", {})
        assert (worker["name"], worker["status"]) == ("flow agent 1", "ONLINE")
        assert worker["heartbeat_interval_seconds"] == 30
        assert (await scene.backend.read_pool(pool)).status == "READY"
        await scene.backend.sign_off(pool, "flow agent 1")
        await scene.backend.sign_off(pool, "flow agent 1")
        assert await scene.api.post(f"/work_pools/{pool}/workers/filter", {}) == []
        with pytest.raises(NotFound):
            await scene.backend.heartbeat(scene.name("absent"), "w", 30)

    on_scene(prefect_server, body)


def test_log_lines_of_any_size_and_content_are_stored_in_order(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        run_id = await scene.run(await scene.deployment())
        started = now()
        lines = ["plain", "nul \0 and half \ud800", "x" * 1_500_000, "y" * 400_000, "z" * 400_000, "last"]
        await scene.backend.write_logs(
            [
                LogRecord(run_id=run_id, level=20 + place, message=line, at=started + timedelta(milliseconds=place))
                for place, line in enumerate(lines)
            ]
        )
        question = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
        stored = await scene.api.post("/logs/filter", question)
        assert [log["level"] for log in stored] == [20, 21, 22, 23, 24, 25]
        assert [log["message"][:1] for log in stored] == ["p", "n", "x", "y", "z", "l"]
        assert stored[1]["message"] == "nul \N{REPLACEMENT CHARACTER} and half ?"
        assert {log["name"] for log in stored} == {"prefect.flow-agent"}

    on_scene(prefect_server, body)


def test_events_are_taken_by_3_and_left_alone_by_2(prefect_server: PrefectServer) -> None:
    async def body(scene: Scene) -> None:
        resource = {"prefect.resource.id": f"prefect.worker.process.{scene.tag}"}
        related = [{"prefect.resource.id": f"prefect.flow.{uuid4()}", "prefect.resource.role": "flow"}]
        first = await scene.backend.emit("prefect.worker.started", resource=resource)
        second = await scene.backend.emit("prefect.worker.stopped", resource=resource, related=related, follows=first)
        if scene.major < 3:
            assert (first, second) == (None, None)
            return
        assert first is not None
        assert second is not None
        question = {
            "filter": {
                "any_resource": {"id": [resource["prefect.resource.id"]]},
                "occurred": {"since": now() - timedelta(minutes=5), "until": now() + timedelta(minutes=5)},
            }
        }
        with trio.fail_after(30):  # the server stores them a moment later
            while len(held := (await scene.api.post("/events/filter", question))["events"]) < 2:
                await trio.sleep(0.1)
        assert {event["id"]: event["follows"] for event in held} == {first: None, second: first}

    on_scene(prefect_server, body)


# --- servers that let only some in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.20.26", "3.8.8"])
def test_csrf_protection_is_answered_on_a_real_server(own_server: Callable[..., PrefectServer], version: str) -> None:
    server = own_server(version, {"PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true"})
    assert httpx.post(f"{server.url}/flow_runs/filter", json={}, trust_env=False).status_code == 403

    async def body(scene: Scene) -> None:
        pool = scene.name("pool")
        await scene.backend.create_pool(pool)
        assert await scene.backend.due_in_pool(pool, queues=None, before=now(), limit=5) == []
        # Whoever fetches a token for our client ends ours, as an hour does.
        query = {"client": scene.http._csrf_client}
        assert (await scene.api.get("/csrf-token", query))["token"] != scene.http._csrf_token
        run_id = await scene.run(await scene.deployment())
        assert await scene.propose(run_id, StateType.PENDING) is Answer.ACCEPT

    on_scene(server, body)


def test_a_login_opens_a_server_that_wants_one_and_a_wrong_one_does_not(
    own_server: Callable[..., PrefectServer],
) -> None:
    # The server's own clients need the login, too, or its background services are locked out.
    login = {"PREFECT_SERVER_API_AUTH_STRING": "admin:s3cret:x", "PREFECT_API_AUTH_STRING": "admin:s3cret:x"}
    server = own_server("3.8.8", login)

    async def right(scene: Scene) -> None:
        assert (await scene.backend.hello()).major == 3
        assert (await scene.backend.create_pool(scene.name("pool"))).type == "process"

    async def wrong(scene: Scene) -> None:
        with pytest.raises(Unauthorized) as refused:
            await scene.backend.hello()
        assert "s3cret" not in str(refused.value)

    on_scene(server, right, Credentials(api_key="ignored", auth_string="admin:s3cret:x"))
    on_scene(server, wrong, Credentials(auth_string="admin:s3cret"))
    on_scene(server, wrong, Credentials(api_key="s3cret"))
    on_scene(server, wrong)
