"""What an earlier agent has left: every open run of the journal, and, when the journal was lost, what still runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import trio

from supervisor.config import Flows, Work
from supervisor.errors import NotFound, Refused
from supervisor.lifecycle import ProcessRef, Running
from supervisor.lifecycle.record import Record
from supervisor.process.ref import boot_id
from supervisor.process.stop import end_leftovers
from supervisor.runs.kit import Kit
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run

_log = logging.getLogger("flow-agent")

Recover = Callable[[Record, Work], Run]


class Recovery:
    """Hands the runs that were open to the roster."""

    def __init__(self, roster: Roster, recover: Recover, work: Sequence[Work], flows: Flows, kit: Kit) -> None:
        self._roster = roster
        self._recover = recover
        self._work = work
        self._flows = flows
        self._kit = kit

    def begin(
        self,
        runs: trio.Nursery,
        records: Sequence[Record],
        marked: Mapping[str, ProcessRef],
        groups: Iterable[str],
    ) -> Collection[str]:
        """With the open runs of the journal, all processes that bear our mark, and the runs that have a control group.

        Returns the ids of all runs that are open.
        """
        self.take(records)
        known = {record.run.id for record in records}
        # With a sound journal everything that bears our mark is in it.
        if lost := {run_id: ref for run_id, ref in marked.items() if run_id not in known}:
            runs.start_soon(self.take_marked, lost)
        open_runs = known | marked.keys()
        if left := set(groups) - open_runs:
            runs.start_soon(self.clear_groups, left)
        return open_runs

    def take(self, records: Sequence[Record]) -> None:
        """Goes on with the runs of the journal."""
        if records:
            _log.info("going on with %d run(s) of an earlier flow-agent", len(records))
        for record in records:
            self._roster.take(self._recover(record, self._work_of(record.work)))

    def _work_of(self, name: str) -> Work:
        """The `[[work]]` table it came by. One that is no longer in the configuration has no limit any more."""
        found = next((work for work in self._work if str(work) == name), None)
        return found if found is not None else Work(flows=self._flows, pool=name)

    async def take_marked(self, processes: Mapping[str, ProcessRef]) -> None:
        """Goes on with processes of which the journal knows nothing, because it was lost."""
        backend, patience = self._kit.backend, self._kit.patience
        for run_id, ref in processes.items():
            if self._roster.get(run_id) is not None:
                continue
            try:
                run = await patience.until_answered(lambda run_id=run_id: backend.read_run(run_id))  # type: ignore[misc]
            except (NotFound, Refused) as error:
                _log.error("cannot learn what process %d belongs to: flow run %s: %s", ref.pid, run_id, error)
                continue
            _log.warning("found flow run '%s' (%s) running as process %d", run.name, run_id, ref.pid)
            record = Record(
                claim_id=Record.claiming(run, "", boot_id(), datetime.now(UTC)).claim_id,
                run=run,
                work=run.work_pool_name or "",
                phase=Running(process=ref, attempt=1),
                boot_id=boot_id(),
                opened=datetime.now(UTC),
                changed=datetime.now(UTC),
                starts=1,
                where=run.infrastructure_pid,
            )
            self._roster.take(self._recover(record, self._work_of(f"pool '{run.work_pool_name}'")))

    async def clear_groups(self, run_ids: Collection[str]) -> None:
        """Control groups without an open run: their agent died between the end of the run and that of its group."""
        for run_id in run_ids:
            if self._roster.get(run_id) is None:
                await end_leftovers(run_id, None, group=self._kit.launcher.group(run_id))
                await self._kit.launcher.clean_up(run_id)
