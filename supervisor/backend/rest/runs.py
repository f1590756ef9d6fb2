"""One run at a time: reading it, proposing states for it, and what is noted on its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from supervisor.backend.rest.api import Api
from supervisor.backend.rest.wire import PAGE, WireRun, WireState, WireVerdict, clean, decode, segment
from supervisor.errors import NotFound
from supervisor.model import FlowRun, Proposal, State, StateType, Verdict

# How many ids are asked about at once. A list in a condition may be as long as it likes, unlike an answer, but each id is a
# variable to the server's database, and SQLite before 3.32 takes 999.
MOST_IDS = 900


async def read_run(api: Api, run_id: str) -> FlowRun:
    return decode(WireRun, await api.get(f"/flow_runs/{segment(run_id)}"), "a flow run").model()


async def history(api: Api, run_id: str) -> list[State]:
    answer = await api.get("/flow_run_states/", params={"flow_run_id": run_id})
    return [state.model() for state in decode(list[WireState], answer, "the states of a flow run")]


async def propose(api: Api, run_id: str, proposal: Proposal) -> Verdict:
    details: dict[str, Any] = {"transition_id": proposal.transition_id}
    if proposal.scheduled is not None:
        details["scheduled_time"] = proposal.scheduled.isoformat()
    state: dict[str, Any] = {"type": proposal.type, "state_details": details}
    if proposal.name is not None:
        state["name"] = proposal.name
    if proposal.message is not None:
        state["message"] = clean(proposal.message)
    if proposal.data is not None:
        state["data"] = proposal.data
    answer = await api.post(f"/flow_runs/{segment(run_id)}/set_state", {"state": state, "force": proposal.force})
    return decode(WireVerdict, answer, "the answer to a proposal").model()


async def patch_infrastructure(api: Api, run_id: str, pid: str | None) -> None:
    await api.patch(f"/flow_runs/{segment(run_id)}", {"infrastructure_pid": pid})


async def label_run(api: Api, run_id: str, labels: Mapping[str, str]) -> None:
    try:
        await api.patch(f"/flow_runs/{segment(run_id)}/labels", dict(labels))
    except NotFound:
        # The first 3.x have no such route; and where the run was deleted, calls that matter say so.
        return


async def renew_lease(api: Api, lease_id: str, seconds: float) -> None:
    # The server takes a minute up to a day.
    duration = min(max(seconds, 60.0), 86400.0)
    await api.post(f"/v2/concurrency_limits/leases/{segment(lease_id)}/renew", {"lease_duration": duration})


async def cancelling(api: Api, run_ids: Sequence[str]) -> dict[str, State]:
    found: dict[str, State] = {}
    for start in range(0, len(run_ids), MOST_IDS):
        condition = {
            "id": {"any_": list(run_ids[start : start + MOST_IDS])},
            # The older form of the wish, of Prefect 2, has the type CANCELLED.
            "state": {"type": {"any_": [StateType.CANCELLING, StateType.CANCELLED]}},
        }
        offset = 0
        while True:
            body = {"flow_runs": condition, "limit": PAGE, "offset": offset}
            page = decode(list[WireRun], await api.post("/flow_runs/filter", body), "the runs being cancelled")
            found.update((run.id, run.state.model()) for run in page if run.state is not None)
            if len(page) < PAGE:
                break
            offset += PAGE  # one that is missed, because another has left the list meanwhile, is found at the next poll
    return found
