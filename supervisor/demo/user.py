"""What the demonstration's user asks of the server: a pool, deployments, runs, a cancellation."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from supervisor.backend.http import HttpApi
from supervisor.demo.history import History
from supervisor.errors import BackendError, NotFound, Refused, Unauthorized

PATIENCE_SECONDS = 20.0  # a server on SQLite answers 503 while it is busy


class User:
    """Speaks to the server, and asks again when it is too busy to answer. Every call here may be made twice."""

    def __init__(self, api: HttpApi) -> None:
        self._api = api

    async def healthy(self) -> bool:
        """Whether the server answers at all."""
        try:
            return await self._api.get("/health") is True
        except BackendError:
            return False

    async def server_version(self) -> str:
        return str(await _patiently(lambda: self._api.get("/admin/version")))

    async def create_pool(self, name: str) -> None:
        try:
            await _patiently(lambda: self._api.post("/work_pools/", {"name": name, "type": "process"}))
        except Refused as refused:
            if refused.status != 409:  # an answer was lost, and the pool is there
                raise

    async def has_worker(self, pool: str) -> bool:
        return bool(await _patiently(lambda: self._api.post(f"/work_pools/{pool}/workers/filter", {})))

    async def deploy(self, flow: str, folder: Path, pool: str) -> str:
        """Deploys that function of flows.py in the folder and returns the deployment's id."""
        made = await _patiently(lambda: self._api.post("/flows/", {"name": flow}))
        body = {
            "name": "demo",
            "flow_id": made["id"],
            "entrypoint": f"flows.py:{flow}",
            "path": str(folder),
            "work_pool_name": pool,
        }
        return str((await _patiently(lambda: self._api.post("/deployments/", body)))["id"])

    async def create_run(self, deployment: str) -> str:
        """Schedules a run for now and returns its id."""
        body = {"state": {"type": "SCHEDULED", "name": "Scheduled"}, "idempotency_key": uuid.uuid4().hex}
        path = f"/deployments/{deployment}/create_flow_run"
        return str((await _patiently(lambda: self._api.post(path, body)))["id"])

    async def cancel(self, run_id: str) -> None:
        """What `prefect flow-run cancel` does."""
        body = {"state": {"type": "CANCELLING"}}
        await _patiently(lambda: self._api.post(f"/flow_runs/{run_id}/set_state", body))

    async def history(self, name: str, run_id: str) -> History:
        run = await _patiently(lambda: self._api.get(f"/flow_runs/{run_id}"))
        states = await _patiently(lambda: self._api.get("/flow_run_states/", {"flow_run_id": run_id}))
        return History.from_answers(name, run, states)


async def _patiently(call: Callable[[], Awaitable[Any]]) -> Any:
    deadline = trio.current_time() + PATIENCE_SECONDS
    while True:
        try:
            return await call()
        except (NotFound, Refused, Unauthorized):
            raise
        except BackendError:
            if trio.current_time() > deadline:
                raise
        await trio.sleep(0.3)
