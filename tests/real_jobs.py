"""Run by a real Prefect's interpreter (2.20 or 3.x): what does Prefect itself make of these job descriptions?

Reads `[{"template", "deployment", "run", "process_block"?}, …]` from standard input, creates for each a pool or an
agent-style deployment with a flow run on the server at `PREFECT_API_URL`, asks Prefect's own worker (or agent) code for
the configuration it would start that run with, and prints `[{"run_id", "job" or "error"}, …]`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import prefect
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

# What these add (settings, os.environ, the default command) is not part of the merge.
ProcessJobConfiguration.prepare_for_flow_run = lambda self, *args, **kwargs: None


class Probe(Block):
    """A block that stands for its one value."""

    _block_type_name = "Probe"
    _block_type_slug = "probe"
    value: dict


class Pair(Block):
    """A block of two fields."""

    _block_type_name = "Pair"
    _block_type_slug = "pair"
    A: str
    B: str


async def main() -> None:
    await Secret(value="s3cret").save("token", overwrite=True)
    await Probe(
        value={"a": [{"b": "deep"}], "dir": "/srv/{{ prefect.variables.job_probe_stage }}", "env": {"J": "1"}}
    ).save("conf", overwrite=True)
    pair_id = await Pair(A="from-a", B="from-b").save("two", overwrite=True)
    async with get_client() as client:
        http = client._client
        await http.post("/variables/", json={"name": "job_probe_stage", "value": "prod"})
        flow_id = (await http.post("/flows/", json={"name": "job-probe"})).json()["id"]
        cases = json.loads(sys.stdin.read().replace("@pair@", str(pair_id)))
        print(json.dumps([await one(client, flow_id, index, case) for index, case in enumerate(cases)]))


async def one(client: Any, flow_id: str, index: int, case: dict[str, Any]) -> dict[str, Any]:
    http = client._client
    variables = "infra_overrides" if prefect.__version__.startswith("2.") else "job_variables"
    description = {"name": f"d{index}", "flow_id": flow_id, variables: case.get("deployment", {})}
    if "process_block" in case:
        from prefect.infrastructure.process import Process

        block_id = await Process(**case["process_block"]).save(f"job-probe-{index}", overwrite=True)
        description.update(work_queue_name="job-probe", infrastructure_document_id=str(block_id))
    else:
        pool = {"name": f"job-probe-{index}", "type": "process"}
        pool["base_job_template"] = case.get("template") or ProcessWorker.get_default_base_job_template()
        answer = await http.post("/work_pools/", json=pool)
        assert answer.status_code == 201, answer.text
        description.update(work_pool_name=pool["name"])
    answer = await http.post("/deployments/", json=description)
    assert answer.status_code in (200, 201), answer.text
    body = {"job_variables": case.get("run", {}), "state": {"type": "SCHEDULED", "name": "Scheduled"}}
    answer = await http.post(f"/deployments/{answer.json()['id']}/create_flow_run", json=body)
    assert answer.status_code == 201, answer.text
    run = await client.read_flow_run(answer.json()["id"])
    try:
        found = await (of_agent(client, run) if "process_block" in case else of_worker(client, run))
    except Exception as problem:  # noqa: BLE001 - Prefect raises whatever it likes: that it does is the answer
        return {"run_id": str(run.id), "error": f"{type(problem).__name__}: {problem}"}
    directory = None if found.working_dir is None else str(found.working_dir)
    return {"run_id": str(run.id), "job": {"command": found.command, "env": found.env, "working_dir": directory}}


async def of_worker(client: Any, run: Any) -> Any:
    pool = await client.read_work_pool(run.work_pool_name)
    if hasattr(ProcessJobConfiguration, "resolve_for_flow_run"):
        return await ProcessJobConfiguration.resolve_for_flow_run(
            run, client=client, work_pool=pool, worker_name="probe"
        )
    worker = ProcessWorker(work_pool_name=pool.name)
    worker._client, worker._work_pool = client, pool
    return await worker._get_configuration(run)


async def of_agent(client: Any, run: Any) -> Any:
    from prefect.agent import PrefectAgent
    from prefect.infrastructure.process import Process

    Process.prepare_for_flow_run = lambda self, *args, **kwargs: self
    agent = PrefectAgent(work_queues=["job-probe"])
    agent.client = client
    return await agent.get_infrastructure(run)


asyncio.run(main())
