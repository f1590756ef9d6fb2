"""Reads what the server's records say about starting one run, and merges it into a `Job`.

Three kinds of deployments, told apart by the work pool that the run is in:

    pool of type process              its base job template, filled from the job variables
    pool of type prefect-agent, or    the `process` infrastructure block (2.x) with the deployment's overrides;
    no pool at all                    without a block a plain job with what the job variables say
    any other pool                    not ours: `JobError`

Where the flow's code comes from (pull steps, storage block, path) is the engine's business and is not read here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
import trio

from supervisor.backend.rest import placeholders, template
from supervisor.backend.rest.api import Api
from supervisor.backend.rest.wire import decode, segment
from supervisor.errors import FlowAgentError, JobError, NotFound, ServerTrouble
from supervisor.model import FlowRun, Job, Pool

AGENT_POOL = "prefect-agent"
_SECRETS = {"include_secrets": True}
_NOTHING: Mapping[str, str] = MappingProxyType({})
POOL_SECONDS = 5.0  # for which a pool's record counts: Prefect's own workers read theirs each 15 seconds
FLOWS = 1000  # of which the name is remembered

T = TypeVar("T")


# The parts of the server's answers that a job is made of. Whatever else an answer holds is ignored: servers grow.


class _Deployment(msgspec.Struct, frozen=True):
    id: str
    name: str
    work_pool_name: str | None = None
    job_variables: dict[str, Any] | None = None  # 3.x
    infra_overrides: dict[str, Any] | None = None  # 2.x
    infrastructure_document_id: str | None = None

    @property
    def variables(self) -> dict[str, Any]:
        return self.job_variables or self.infra_overrides or {}


class _Flow(msgspec.Struct, frozen=True):
    name: str


class _Template(msgspec.Struct, frozen=True):
    base_job_template: dict[str, Any] | None = None


class _BlockType(msgspec.Struct, frozen=True):
    slug: str


class _Block(msgspec.Struct, frozen=True):
    data: dict[str, Any]
    name: str | None = None
    block_type: _BlockType | None = None


class Common:
    """What many runs have in common, asked for once: the names of flows, which never change, and for a while pools. Owns both."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._flows: OrderedDict[str, str] = OrderedDict()
        self._pools: dict[str, tuple[float, Any]] = {}

    async def flow_name(self, flow_id: str) -> str:
        """Raises `NotFound` when the flow has been deleted before it was ever asked for."""
        if flow_id not in self._flows:
            self._flows[flow_id] = decode(_Flow, await self._api.get(f"/flows/{flow_id}"), "the run's flow").name
            if len(self._flows) > FLOWS:
                self._flows.popitem(last=False)
        return self._flows[flow_id]

    async def pool(self, name: str | None) -> Any:
        """The pool's record, `POOL_SECONDS` old at most; None when there is no such pool, or no name."""
        if name is None:
            return None
        now = trio.current_time()
        self._pools = {one: known for one, known in self._pools.items() if now - known[0] < POOL_SECONDS}
        if name not in self._pools:
            try:
                self._pools[name] = now, await self._api.get(f"/work_pools/{segment(name)}")
            except NotFound:
                return None
        return self._pools[name][1]


async def read_job(
    api: Api, run: FlowRun, major: int, *, environ: Mapping[str, str] = _NOTHING, common: Common | None = None
) -> Job:
    """How to start this run. `major` is the server's generation, 2 or 3.

    `environ` is all that `{{ $NAME }}` in a template may read. Raises `JobError` for what cannot be started here,
    `NotFound` when the deployment or its flow has been deleted, and any other `BackendError`. Two round trips: the
    records side by side, then blocks and variables if the job names any (blocks before variables, as they may name
    some).
    """
    if run.deployment_id is None:
        raise JobError("cannot start the run: it has no deployment, which would say where its code is; deploy the flow")
    common = common or Common(api)
    answer, flow_name, record = await _together(
        lambda: api.get(f"/deployments/{run.deployment_id}"),
        lambda: common.flow_name(run.flow_id),
        lambda: common.pool(run.work_pool_name),
    )
    deployment = decode(_Deployment, answer, "the run's deployment")
    # The run's own pool decides, as it does for Prefect's workers; offers and old runs do not always name it.
    pool_name = run.work_pool_name or deployment.work_pool_name
    if not run.work_pool_name:
        record = await common.pool(pool_name)
    if pool_name is not None and record is None:
        raise JobError(
            f"cannot start the run: its work pool '{pool_name}' does not exist (any more);"
            " create it or move the deployment to another pool"
        )
    pool = decode(Pool, record, f"work pool '{pool_name}'") if record is not None else None

    if pool is not None and pool.type == "process":
        variables = template.merge_variables(deployment.variables, run.job_variables)
        base = decode(_Template, record, f"work pool '{pool_name}'").base_job_template or {}
        settings = template.configuration(base, variables, dotted=major >= 3, environ=environ)
    elif pool is not None and pool.type != AGENT_POOL:
        raise JobError(_not_ours(pool))
    elif deployment.infrastructure_document_id is not None:
        data = await _process_block(api, deployment.infrastructure_document_id)
        settings = template.override_block(data, deployment.variables, run.job_variables)
    else:
        # Prefect's 2.x agent ignores overrides here; its users who wrote some meant them.
        settings = template.expand_dotted(template.merge_variables(deployment.variables, run.job_variables))

    settings = {name: settings[name] for name in template.SETTINGS if name in settings}
    settings = await _with_variables(api, await _with_blocks(api, settings))
    return Job(
        command=template.as_command(settings.get("command"), lenient=major < 3),
        env=template.as_env(settings.get("env")),
        working_dir=template.as_working_dir(settings.get("working_dir")),
        flow_name=flow_name,
        deployment_id=deployment.id,
        deployment_name=deployment.name,
        pool=pool,
    )


def _not_ours(pool: Pool) -> str:
    what = f"cannot start the run: this agent runs processes, and work pool '{pool.name}' is of type '{pool.type}'"
    if pool.type.endswith((":push", ":managed")):
        return f"{what}, whose runs Prefect starts itself; take this pool out of the agent's configuration"
    return f"{what}; start a worker of that type for it, or move the deployment to a pool of type 'process'"


async def _process_block(api: Api, document_id: str) -> dict[str, Any]:
    try:
        answer = await api.get(f"/block_documents/{document_id}", _SECRETS)
    except NotFound:
        raise JobError(
            f"cannot start the run: its deployment's infrastructure block {document_id} does not exist (any more);"
            " create one of type 'process' and deploy again"
        ) from None
    block = decode(_Block, answer, f"block {document_id}")
    kind = block.block_type.slug if block.block_type else "unknown"
    if kind != "process":
        raise JobError(
            f"cannot start the run: this agent runs processes, and the deployment's infrastructure block"
            f" '{block.name}' is of type '{kind}'; deploy it with a block of type 'process' or to a work pool"
        )
    return block.data


async def _with_blocks(api: Api, settings: dict[str, Any]) -> dict[str, Any]:
    names, ids = placeholders.block_names(settings), placeholders.block_ids(settings)

    async def by_name(key: tuple[str, str]) -> dict[str, Any]:
        slug, name = key
        path = f"/block_types/slug/{segment(slug)}/block_documents/name/{segment(name)}"
        return await read(path, f"'{name}' of type '{slug}'")

    async def by_id(document_id: str) -> dict[str, Any]:
        return await read(f"/block_documents/{segment(document_id)}", document_id)

    async def read(path: str, what: str) -> dict[str, Any]:
        try:
            answer = await api.get(path, _SECRETS)
        except NotFound:
            raise JobError(
                f"cannot start the run: block {what} does not exist (any more), and the job template or the job"
                " variables refer to it; create it or take the reference out"
            ) from None
        return decode(_Block, answer, f"block {what}").data

    found_names, found_ids = await _together(lambda: _each(by_name, names), lambda: _each(by_id, ids))
    filled: dict[str, Any] = placeholders.put_blocks(settings, found_names, found_ids)
    return filled


async def _with_variables(api: Api, settings: dict[str, Any]) -> dict[str, Any]:
    async def read(name: str) -> Any:
        try:
            answer = await api.get(f"/variables/name/{segment(name)}")
        except NotFound:
            return ""  # as in Prefect: a variable that is not there is empty text
        if not isinstance(answer, dict) or "value" not in answer:
            raise ServerTrouble(f"cannot read variable '{name}': the server's answer has no value")
        return answer["value"]

    found = await _each(read, placeholders.variable_names(settings))
    filled: dict[str, Any] = placeholders.put_variables(settings, found)
    return filled


async def _each(call: Callable[[Any], Awaitable[T]], keys: Collection[Any]) -> dict[Any, T]:
    ordered = sorted(keys)
    return dict(zip(ordered, await _together(*(lambda key=key: call(key) for key in ordered)), strict=True))


async def _together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """The calls' answers, made side by side. Of several errors the first call's is raised, and as itself: which one
    a caller sees must not depend on which answer came first."""
    outcomes: list[Any] = [None] * len(calls)

    async def one(index: int, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            outcomes[index] = await call()
        except FlowAgentError as error:
            outcomes[index] = error

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(one, index, call)
    for outcome in outcomes:
        if isinstance(outcome, FlowAgentError):
            raise outcome
    return outcomes
