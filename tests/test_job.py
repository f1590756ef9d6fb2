"""Reading a job off a server's records, with the answers of real 2.20 and 3.8 servers cut down to what matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import trio

from supervisor.backend.rest.api import Api
from supervisor.backend.rest.job import FLOWS, POOL_SECONDS, Common, read_job
from supervisor.errors import BackendError, JobError, LostAnswer, NotFound, ServerTrouble
from supervisor.model import FlowRun, Job, Pool, StateType
from tests.fakes import on_jumping_clock

FLOW = {"id": "f1", "created": "2026-11-21T07:46:27.792955Z", "name": "probe", "tags": [], "labels": {}}
TEMPLATE = {
    "job_configuration": {
        "command": "{{ command }}",
        "env": "{{ env }}",
        "labels": "{{ labels }}",
        "name": "{{ name }}",
        "stream_output": "{{ stream_output }}",
        "working_dir": "{{ working_dir }}",
    },
    "variables": {
        "properties": {
            "name": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Name"},
            "env": {"type": "object", "title": "Environment Variables"},
            "command": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Command"},
            "stream_output": {"type": "boolean", "default": True},
            "working_dir": {"anyOf": [{"type": "string", "format": "path"}, {"type": "null"}], "default": None},
        },
        "type": "object",
    },
}
DEPLOYMENT_38 = {
    "id": "d1",
    "created": "2026-11-21T07:46:27.836944Z",
    "name": "d",
    "flow_id": "f1",
    "paused": False,
    "job_variables": {"env": {"X": "1"}},
    "work_queue_name": "hi",
    "path": "/srv/flows",
    "entrypoint": "f.py:hello",
    "storage_document_id": None,
    "infrastructure_document_id": None,
    "work_pool_name": "p1",
}
DEPLOYMENT_220 = {
    "id": "d1",
    "created": "2026-11-21T07:46:27.338680+00:00",
    "infra_overrides": {"env": {"X": "1"}},
    "name": "d",
    "flow_id": "f1",
    "work_queue_name": "hi",
    "path": "/srv/flows",
    "manifest_path": None,
    "storage_document_id": None,
    "infrastructure_document_id": None,
    "work_pool_name": "p1",
}


def pool_answer(kind: str = "process", name: str = "p1", template: Any = TEMPLATE) -> dict[str, Any]:
    return {
        "id": "p-id",
        "name": name,
        "description": None,
        "type": kind,
        "base_job_template": template,
        "is_paused": False,
        "concurrency_limit": None,
        "status": "NOT_READY",
        "default_queue_id": "q-id",
    }


def block_answer(slug: str, data: dict[str, Any], name: str = "proc-a") -> dict[str, Any]:
    return {
        "id": "b1",
        "name": name,
        "data": data,
        "block_schema_id": "s1",
        "block_type": {"id": "t1", "name": slug.title(), "slug": slug, "is_protected": True},
        "block_document_references": {},
        "is_anonymous": False,
    }


class FakeApi:
    """Answers GET from a table of paths; 404 for the rest. `asked` holds what was asked, in order."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = {"/flows/f1": FLOW, **answers}
        self.asked: list[tuple[str, Mapping[str, Any] | None]] = []

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        self.asked.append((path, params))
        await trio.lowlevel.checkpoint()
        answer = self.answers.get(path, NotFound(f"no {path}"))
        if isinstance(answer, BackendError):
            raise answer
        return answer

    async def post(self, path: str, body: Any) -> Any:
        raise AssertionError(f"a job is only read, and this posts to {path}")

    async def patch(self, path: str, body: Any) -> Any:
        raise AssertionError(f"a job is only read, and this patches {path}")

    async def delete(self, path: str) -> None:
        raise AssertionError(f"a job is only read, and this deletes {path}")


def a_run(**fields: Any) -> FlowRun:
    known = {"id": "r1", "name": "calm-otter", "flow_id": "f1", "deployment_id": "d1", "state_id": "s1"}
    return FlowRun(**{**known, "state_type": StateType.SCHEDULED, "state_name": "Scheduled", **fields})


def read(api: FakeApi, run: FlowRun, major: int = 3, **environ: str) -> Job:
    async def main() -> Job:
        return await read_job(api, run, major, environ=environ)

    return trio.run(main)


def in_pool(template: Any = TEMPLATE, variables: Any = None, **blocks: Any) -> FakeApi:
    deployment = {**DEPLOYMENT_38, "job_variables": variables if variables is not None else {"env": {"X": "1"}}}
    return FakeApi({"/deployments/d1": deployment, "/work_pools/p1": pool_answer(template=template), **blocks})


def agent_style(infrastructure: Any, overrides: dict[str, Any], *, document: str | None = "b1") -> FakeApi:
    deployment = {
        **DEPLOYMENT_220,
        "infra_overrides": overrides,
        "infrastructure_document_id": document,
        "work_pool_name": "default-agent-pool",
    }
    pool = pool_answer("prefect-agent", "default-agent-pool", {})
    answers = {"/deployments/d1": deployment, "/work_pools/default-agent-pool": pool}
    return FakeApi({**answers, "/block_documents/b1": infrastructure} if infrastructure else answers)


def test_a_run_in_a_process_pool_has_the_template_filled_from_deployment_and_run() -> None:
    api = in_pool(variables={"env": {"X": "1", "Y": "1"}, "working_dir": "/srv/work"})
    job = read(api, a_run(work_pool_name="p1", job_variables={"env": {"Y": "2", "Z": None}, "command": "run 'a b'"}))
    assert job == Job(
        command=("run", "a b"),
        env={"X": "1", "Y": "2", "Z": None},
        working_dir="/srv/work",
        flow_name="probe",
        deployment_id="d1",
        deployment_name="d",
        pool=Pool(id="p-id", name="p1", type="process", status="NOT_READY"),
    )


def test_the_three_records_are_asked_for_once_each_when_the_run_names_its_pool() -> None:
    api = in_pool()
    read(api, a_run(work_pool_name="p1"))
    assert sorted(api.asked) == [("/deployments/d1", None), ("/flows/f1", None), ("/work_pools/p1", None)]


@pytest.mark.parametrize("named", [{"work_pool_name": "p1"}, {}])
@on_jumping_clock
async def test_many_runs_ask_once_for_the_pool_and_the_flow_that_they_share(named: dict[str, str]) -> None:
    api = in_pool()
    common = Common(cast(Api, api))

    async def jobs() -> Job:
        return await read_job(cast(Api, api), a_run(**named), 3, common=common)

    first = await jobs()
    await trio.sleep(POOL_SECONDS - 0.1)
    assert await jobs() == first
    api.answers["/work_pools/p1"] = pool_answer(template={"job_configuration": {"command": "new"}})
    assert await jobs() == first
    assert sorted(path for path, _ in api.asked) == [*["/deployments/d1"] * 3, "/flows/f1", "/work_pools/p1"]
    await trio.sleep(0.2)
    assert (await jobs()).command == ("new",), "what was changed counts after a few seconds"


@on_jumping_clock
async def test_a_pool_that_is_not_there_is_looked_for_by_every_run() -> None:
    api = FakeApi({"/deployments/d1": DEPLOYMENT_38})
    common = Common(cast(Api, api))
    assert await common.pool("p1") is None
    api.answers["/work_pools/p1"] = pool_answer()
    assert (await common.pool("p1"))["name"] == "p1"


@on_jumping_clock
async def test_no_more_than_some_names_of_flows_are_kept() -> None:
    api = FakeApi({f"/flows/f{number}": FLOW for number in range(FLOWS + 1)})
    common = Common(cast(Api, api))
    for number in (*range(FLOWS + 1), FLOWS, 0):
        assert await common.flow_name(f"f{number}") == "probe"
    assert len(api.asked) == FLOWS + 2, "the last was known, the first is forgotten"


def test_the_deployments_pool_is_read_when_the_run_names_none() -> None:
    api = in_pool()
    job = read(api, a_run())
    assert job.pool is not None
    assert job.env == {"X": "1"}
    assert len(api.asked) == 3


def test_the_pool_the_run_is_in_decides_when_its_deployment_has_moved_on() -> None:
    api = in_pool()
    api.answers["/work_pools/old"] = pool_answer(name="old", template={"job_configuration": {"command": "old {{ x }}"}})
    job = read(api, a_run(work_pool_name="old"))
    assert (job.command, job.pool and job.pool.name) == (("old",), "old")


def test_a_command_with_broken_quotes_starts_in_2x_and_is_refused_in_3x() -> None:
    api = in_pool(variables={"command": "python it's.py"})
    assert read(api, a_run(), 2).command == ("python", "it's.py")
    with pytest.raises(JobError, match="No closing quotation"):
        read(api, a_run(), 3)


def test_the_overrides_of_a_220_deployment_are_its_job_variables() -> None:
    api = FakeApi({"/deployments/d1": DEPLOYMENT_220, "/work_pools/p1": pool_answer()})
    assert read(api, a_run(work_pool_name="p1"), 2).env == {"X": "1"}


def test_dotted_job_variables_of_a_pool_count_in_3x_only() -> None:
    assert read(in_pool(variables={"env.A": "1"}), a_run()).env == {"A": "1"}
    assert read(in_pool(variables={"env.A": "1"}), a_run(), 2).env == {}


def test_pool_names_are_quoted_in_paths() -> None:
    api = FakeApi({"/deployments/d1": DEPLOYMENT_38, "/work_pools/my%20pool": pool_answer(name="my pool")})
    assert read(api, a_run(work_pool_name="my pool")).pool == Pool(
        id="p-id", name="my pool", type="process", status="NOT_READY"
    )


def test_the_environment_is_read_through_the_given_names_only() -> None:
    template = {"job_configuration": {"command": "{{ $TOOL }} {{ $PREFECT_API_KEY }}go"}}
    assert read(in_pool(template), a_run(), TOOL="/usr/bin/tool").command == ("/usr/bin/tool", "go")


def test_blocks_and_variables_are_read_with_secrets_and_once_each() -> None:
    secret = "/block_types/slug/secret/block_documents/name/token"
    variables = {
        "env": {
            "A": "{{ prefect.blocks.secret.token }}",
            "B": "token={{ prefect.blocks.secret.token }}",
            "C": "{{ prefect.variables.stage }}/{{ prefect.variables.stage }}",
            "D": "{{ prefect.variables.nowhere }}",
        },
        "working_dir": {"$ref": {"block_document_id": "b2"}},
        "name": "{{ prefect.blocks.secret.of-no-interest }}",
    }
    template = {
        "job_configuration": {"env": "{{ env }}", "working_dir": "{{ dir }}", "command": "{{ prefect.variables.n }}"},
        "variables": {"properties": {"dir": {"default": "{{ prefect.blocks.json.dirs.work }}"}}},
    }
    api = in_pool(
        template,
        variables,
        **{
            secret: block_answer("secret", {"value": "s3"}),
            "/block_types/slug/json/block_documents/name/dirs": block_answer(
                "json", {"value": {"work": "/srv/{{ prefect.variables.stage }}"}}
            ),
            "/variables/name/stage": {"id": "v1", "name": "stage", "value": "prod", "tags": []},
            "/variables/name/n": {"id": "v2", "name": "n", "value": "python x.py", "tags": []},
        },
    )
    job = read(api, a_run())
    assert job.env == {"A": "s3", "B": "token=s3", "C": "prod/prod", "D": ""}
    assert job.working_dir == "/srv/prod"
    assert job.command == ("python", "x.py")
    assert api.asked.count((secret, {"include_secrets": True})) == 1
    assert len(api.asked) == 3 + 2 + 3


def test_a_block_reference_by_id_becomes_the_blocks_data() -> None:
    env_block = block_answer("env", {"A": "1", "B": 2})
    api = in_pool(variables={"env": {"$ref": {"block_document_id": "b2"}}}, **{"/block_documents/b2": env_block})
    assert read(api, a_run()).env == {"A": "1", "B": "2"}
    assert ("/block_documents/b2", {"include_secrets": True}) in api.asked


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("{{ prefect.blocks.secret.gone }}", "block 'gone' of type 'secret' does not exist"),
        ({"$ref": {"block_document_id": "b9"}}, "block b9 does not exist"),
    ],
)
def test_a_missing_block_fails_the_run_in_a_sentence_that_names_it(value: Any, named: str) -> None:
    with pytest.raises(JobError, match=f"^cannot start the run: {named}"):
        read(in_pool(variables={"env": {"A": value}} if isinstance(value, str) else {"env": value}), a_run())


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("kubernetes", "start a worker of that type"),
        ("docker", "move the deployment to a pool of type 'process'"),
        ("ecs:push", "whose runs Prefect starts itself"),
        ("prefect:managed", "whose runs Prefect starts itself"),
    ],
)
def test_a_pool_of_another_type_is_refused_by_name_and_type_with_advice(kind: str, advice: str) -> None:
    api = FakeApi({"/deployments/d1": DEPLOYMENT_38, "/work_pools/p1": pool_answer(kind)})
    with pytest.raises(JobError, match=f"work pool 'p1' is of type '{kind}'.*{advice}"):
        read(api, a_run(work_pool_name="p1"))


def test_a_missing_pool_is_the_jobs_fault_and_not_a_deleted_deployment() -> None:
    api = FakeApi({"/deployments/d1": DEPLOYMENT_38})
    for run in (a_run(), a_run(work_pool_name="p1")):
        with pytest.raises(JobError, match=r"work pool 'p1' does not exist"):
            read(api, run)
    with pytest.raises(JobError, match=r"work pool 'old' does not exist"):
        read(api, a_run(work_pool_name="old"))


def test_a_run_without_a_deployment_is_refused_without_a_request() -> None:
    api = FakeApi({})
    with pytest.raises(JobError, match=r"^cannot start the run: it has no deployment"):
        read(api, a_run(deployment_id=None))
    assert api.asked == []


def test_a_deleted_deployment_is_not_found_whatever_else_fails() -> None:
    api = FakeApi({"/flows/f1": LostAnswer("reset"), "/work_pools/p1": ServerTrouble("500")})
    with pytest.raises(NotFound, match=r"^no /deployments/d1$"):
        read(api, a_run(work_pool_name="p1"))


@pytest.mark.parametrize("path", ["/deployments/d1", "/flows/f1", "/work_pools/p1", "/variables/name/v"])
def test_a_failed_call_comes_out_as_itself_and_not_in_a_group(path: str) -> None:
    api = in_pool(variables={"env": {"A": "{{ prefect.variables.v }}", "B": "{{ prefect.variables.w }}"}})
    api.answers[path] = LostAnswer("cut off")
    with pytest.raises(LostAnswer, match=r"^cut off$"):
        read(api, a_run(work_pool_name="p1"))


@pytest.mark.parametrize("path", ["/deployments/d1", "/flows/f1", "/work_pools/p1", "/variables/name/v"])
@pytest.mark.parametrize("answer", [{}, [], "<html>", None])
def test_an_answer_that_is_not_the_record_is_server_trouble_or_a_missing_pool(path: str, answer: Any) -> None:
    api = in_pool(variables={"env": {"A": "{{ prefect.variables.v }}"}})
    api.answers[path] = answer
    with pytest.raises(JobError if (path, answer) == ("/work_pools/p1", None) else ServerTrouble):
        read(api, a_run(work_pool_name="p1"))


# --- agent style --------------------------------------------------------------------------------------------------

PROCESS = {
    "type": "process",
    "env": {"A": "1", "B": "1"},
    "command": None,
    "stream_output": True,
    "working_dir": "/tmp",
}


def test_a_process_block_with_dotted_overrides_is_the_job() -> None:
    api = agent_style(block_answer("process", PROCESS), {"env.B": "2", "working_dir": "/srv", "command": ["a", "b c"]})
    job = read(api, a_run(), 2)
    assert (job.command, job.env, job.working_dir) == (("a", "b c"), {"A": "1", "B": "2"}, "/srv")
    assert job.pool is not None
    assert job.pool.type == "prefect-agent"
    assert ("/block_documents/b1", {"include_secrets": True}) in api.asked


def test_a_run_with_an_infrastructure_block_and_no_pool_at_all_has_the_blocks_job() -> None:
    deployment = {**DEPLOYMENT_220, "work_pool_name": None, "infrastructure_document_id": "b1", "infra_overrides": {}}
    api = FakeApi({"/deployments/d1": deployment, "/block_documents/b1": block_answer("process", PROCESS)})
    job = read(api, a_run(), 2)
    assert (job.env, job.pool) == ({"A": "1", "B": "1"}, None)


def test_references_inside_a_process_block_are_resolved() -> None:
    data = {**PROCESS, "env": {"A": "{{ prefect.blocks.secret.token }}"}, "working_dir": "{{ prefect.variables.d }}"}
    api = agent_style(block_answer("process", data), {})
    api.answers["/block_types/slug/secret/block_documents/name/token"] = block_answer("secret", {"value": "s3"})
    api.answers["/variables/name/d"] = {"name": "d", "value": "/srv/d"}
    job = read(api, a_run(), 2)
    assert (job.env, job.working_dir) == ({"A": "s3"}, "/srv/d")


def test_an_infrastructure_block_of_another_type_is_refused_by_name_and_type() -> None:
    api = agent_style(block_answer("docker-container", {"image": "x"}, "my-docker"), {})
    with pytest.raises(JobError, match=r"this agent runs processes, .*block 'my-docker' is of type 'docker-container'"):
        read(api, a_run(), 2)


def test_a_missing_infrastructure_block_is_refused_by_its_id() -> None:
    with pytest.raises(JobError, match=r"infrastructure block b1 does not exist"):
        read(agent_style(None, {}), a_run(), 2)


def test_without_an_infrastructure_block_the_job_is_plain_with_what_the_variables_say() -> None:
    assert read(agent_style(None, {}, document=None), a_run(), 2) == Job(
        flow_name="probe",
        deployment_id="d1",
        deployment_name="d",
        pool=Pool(id="p-id", name="default-agent-pool", type="prefect-agent", status="NOT_READY"),
    )
    job = read(
        agent_style(None, {"env.A": "1", "image": "x"}, document=None), a_run(job_variables={"env": {"B": 2}}), 2
    )
    assert job.env == {"A": "1", "B": "2"}


def test_a_served_deployment_without_a_pool_honours_its_job_variables() -> None:
    variables = {"env": {"A": 1, "B": None}, "command": "python x.py", "working_dir": "/srv"}
    variables["labels"] = {"no": "{{ prefect.blocks.secret.matter-what-is-missing-here }}"}
    deployment = {**DEPLOYMENT_38, "work_pool_name": None, "work_queue_name": None, "job_variables": variables}
    job = read(FakeApi({"/deployments/d1": deployment}), a_run(job_variables={"env": {"A": 2}}))
    assert (job.command, job.env, job.working_dir) == (("python", "x.py"), {"A": "2", "B": None}, "/srv")
    assert job.pool is None
