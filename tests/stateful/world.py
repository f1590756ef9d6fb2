"""All of it: the server, the machine, and one agent after another."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from supervisor.config import Flows, Poll, Stop, Work
from supervisor.lifecycle import MAX_STARTS, Closed, Exit, Hook, ProcessRef
from supervisor.lifecycle.record import Record
from supervisor.model import FlowRun, StateType
from supervisor.runs.canceller import Canceller
from supervisor.runs.departure import Departure
from supervisor.runs.health import ServerHealth
from supervisor.runs.kit import Kit
from supervisor.runs.late import LateClaims
from supervisor.runs.patience import Patience
from supervisor.runs.poller import Poller
from supervisor.runs.recovery import Recovery
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller
from supervisor.runs.timetable import Timetable
from tests.fakes import NoOutput
from tests.stateful.machine import Died, Disk, Engine, Held, Life, Paper, Process, Starter
from tests.stateful.script import (
    AFTERMATH,
    CANCEL,
    DIES,
    FULL,
    KILLED,
    LONGEST,
    LOSES,
    OUTAGES,
    OUTLIVES,
    REBOOTS,
    RUN,
    SPAWN,
    STOPS,
    Deed,
    Script,
)
from tests.stateful.server import FakeServer


@dataclass
class World:
    """The server, the machine, and one agent after another. Owns what has happened."""

    script: Script
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(100))
    boot: str = "boot 0"
    disk: Disk = field(default_factory=Disk)
    processes: list[Process] = field(default_factory=list)
    bodies: int = 0  # how often the body was begun
    started: int = 0
    hooks: Counter[Hook] = field(default_factory=Counter)
    output_tells_of_hooks: bool = False
    lives: int = 0  # how many agents there have been
    stopped: bool = False  # the agent was told to cancel what it runs
    rescheduled: int = 0  # how often it was told to hand them back
    away: float = 1.0  # seconds from the end of an agent to the start of the next
    forgot: bool = False  # an agent ended that held what the disk had no room for
    places: Counter[str] = field(default_factory=Counter)  # how often agents came by each failpoint
    reached: int = 0  # how many steps of the script have happened
    story: list[str] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = FakeServer(self)
        self.life: Life | None = None
        self.nursery: trio.Nursery

    def say(self, what: str) -> None:
        self.story.append(f"{trio.current_time():9.2f} {what}")

    def expect(self, condition: bool, otherwise: str) -> None:
        if not condition:
            self.say(f"WRONG: {otherwise}")
            self.wrongs.append(otherwise)

    # --- processes ---

    def start(self, process: Process) -> None:
        self.say(f"{process.what} {process.ref.pid} starts")
        if isinstance(process, Engine):
            self.expect(not self.living(Engine), "two engines at once")
            self.started += 1
        self.processes.append(process)

    def living(self, kind: type[Process] = Process) -> list[Process]:
        return [process for process in self.processes if process.exit is None and isinstance(process, kind)]

    def begin_body(self, engine: Engine) -> None:
        self.say("the body begins")
        self.bodies += 1
        if self.script.fate == "is cancelled":
            self.nursery.start_soon(self._cancel_after, self.script.body)
        self.start(Process(self, "child"))

    def hooked(self, hook: Hook, by: str) -> None:
        self.say(f"{by} runs {hook.value}")
        self.hooks[hook] += 1

    async def _cancel_after(self, seconds: float) -> None:
        """Somebody tries until there is a server to hear it."""
        await trio.sleep(seconds)
        while not self.server.cancelled and not self.server.states[RUN].type.terminal:
            self.server.hear_user()
            await trio.sleep(5.0)

    async def end_after(self, process: Process, seconds: float) -> None:
        await trio.sleep(seconds)
        process.end(Exit(code=0))

    # --- what stands in for supervisor.process ---

    def find(self, run_id: str, *, engine: bool = True) -> ProcessRef | None:
        return next((engine.ref for engine in self.living(Engine)), None)

    def adopt(self, ref: ProcessRef) -> Held | None:
        return next((Held(process) for process in self.living() if process.ref == ref), None)

    def age_seconds(self, ref: ProcessRef) -> float:
        return next(trio.current_time() - process.born for process in self.processes if process.ref == ref)

    async def wait_gone(self, refs: Sequence[ProcessRef], timeout: float) -> bool:
        waited = [process for process in self.living() if process.ref in refs]
        with trio.move_on_after(timeout):
            for process in waited:
                await process.wait()
        return all(process.exit is not None for process in waited)

    async def end(self, ref: ProcessRef | None, run_id: str, *, grace: float, group: None = None) -> int:
        self.check()
        living = self.living()
        if grace > 0:
            for process in living:
                process.terminate()
                self.let_go_on(process.ref)
            await self.wait_gone([process.ref for process in living], grace)
            self.check()
        left = self.living()
        for process in left:
            process.end(Exit(signal=9))
        await trio.sleep(SPAWN)
        return len(left)

    async def end_others(self, ref: ProcessRef, run_id: str, *, grace: float, group: None = None) -> int:
        self.check()
        others = [process for process in self.living() if process.ref != ref]
        for process in self.living(Engine):
            if others and isinstance(process, Engine):
                process.stop()
        for process in others:
            process.terminate()
        await self.wait_gone([process.ref for process in others], grace)
        return 0

    async def look(self, ref: ProcessRef | None, run_id: str, known: object = (), group: None = None) -> list[Process]:
        await trio.lowlevel.checkpoint()
        return self.living()

    async def end_leftovers(
        self, run_id: str, ref: ProcessRef | None, *, grace: float = 5.0, group: None = None
    ) -> int:
        left = len(self.living())
        await self.end(ref, run_id, grace=grace)
        return left

    async def hold(self, ref: ProcessRef) -> None:
        self.check()
        for process in self.living(Engine):
            if isinstance(process, Engine) and process.ref == ref:
                process.stop()
        await trio.lowlevel.checkpoint()

    def let_go_on(self, ref: ProcessRef) -> None:
        for process in self.living(Engine):
            if isinstance(process, Engine) and process.ref == ref:
                process.go_on()

    def check(self) -> None:
        """Raises `Died` when it is a dead agent that acts."""
        if self.life is not None:
            self.life.check()

    def failpoint(self, name: str) -> None:
        self.check()
        self.places[name] += 1
        self.do(step.deed for step in self.script.steps if (step.when, step.nth) == (name, self.places[name]))
        self.check()

    # --- the agent ---

    async def keep_agent(self) -> None:
        """As systemd would."""
        while True:
            self.life = self.server.life = Life()
            self.lives += 1
            self.say("the agent starts")
            try:
                with self.life.scope:
                    await self._agent(self.life)
            except BaseExceptionGroup as died:
                if died.split(Died)[1] is not None:
                    raise
            except Died:
                pass
            self.life.end()
            self.say("the agent has gone")
            self.life.alive = False
            away, self.away = self.away, 1.0
            await trio.sleep(away)

    async def _agent(self, life: Life) -> None:
        poll = Poll(interval_seconds=10.0, cancel_interval_seconds=10.0, jitter=0.0)
        health = ServerHealth("http://server/api")
        patience = Patience(poll, health)
        journal = Paper(self, life)
        late = LateClaims(self.server, patience)
        launcher: Any = Starter(self, life)
        pulse: Any = Pulse()
        kit = Kit(
            backend=self.server,
            health=health,
            patience=patience,
            teller=Teller(self.server, patience, worker="w", version="0"),
            launcher=launcher,
            journal=journal,
            output=NoOutput(),
            claimed_twice=late.claimed_twice,
        )
        flows = Flows(
            python=Path("/nowhere/python"),
            timeout_seconds=self.script.timeout,
            crash_retries=self.script.crash_retries,
        )
        work = Work(flows=flows, pool="p")
        roster = Roster(1, lambda run, source: self._new_run(run, work, kit), room=lambda: not journal.full)
        recovering = Recovery(roster, lambda record, work: Run(record, work, kit, recovered=True), [work], flows, kit)
        poller = Poller(
            Source(work, self.server),
            roster,
            Timetable(roster.admit, kit.clock),
            kit.leads,
            health,
            pulse,
            poll=poll,
            prefetch_seconds=10.0,
            turn_seconds=100.0,
        )
        canceller = Canceller(self.server, roster, health, pulse, poll=poll, turn_seconds=100.0)
        life.end = journal.close
        async with trio.open_nursery() as services:
            services.start_soon(canceller.run)
            services.start_soon(journal.run)
            services.start_soon(late.run)
            async with trio.open_nursery() as runs:
                roster.open(runs)
                records = journal.open_records()
                recovering.take(records)
                found = self.find(RUN)
                self.expect(found is None or bool(records), "a process lives of which the journal knows nothing")
                async with trio.open_nursery() as polls:
                    departure = Departure(roster, Stop(), polls.cancel_scope, runs.cancel_scope, lambda: health.lost)
                    services.start_soon(departure.leave_debts)
                    life.services, life.departure = services, departure
                    polls.start_soon(poller.run)
            services.cancel_scope.cancel()

    def _new_run(self, offered: FlowRun, work: Work, kit: Kit) -> Run:
        return Run(Record.claiming(offered, str(work), self.boot, datetime(2026, 1, 1, tzinfo=UTC)), work, kit)

    # --- deeds ---

    def do(self, deeds: Iterable[Deed]) -> None:
        for deed in deeds:
            self.reached += 1
            self.say(f"*** {deed.what}" + (f" for {deed.seconds:g} s" if deed.seconds else ""))
            self._do(deed)

    def _do(self, deed: Deed) -> None:
        if deed.what in OUTAGES:
            self.server.outage, self.server.cut_off = deed.what, True
            self.nursery.start_soon(self._end_outage, deed.what, deed.seconds)
        elif deed.what in STOPS:
            self._tell_to(STOPS[deed.what], deed.seconds)
        elif deed.what in (DIES, REBOOTS):
            self._kill_agent(deed.seconds)
            if deed.what == REBOOTS:
                self._lose_power()
        elif deed.what == LOSES:
            self.server.lose_next = True
        elif deed.what == CANCEL:
            self.server.hear_user()
        elif deed.what == KILLED:
            for engine in self.living(Engine):
                engine.end(Exit(signal=9))
        else:
            assert deed.what == FULL
            self.disk.full = True
            self.nursery.start_soon(self._make_room, deed.seconds)

    def _kill_agent(self, away: float) -> None:
        if self.life is not None and self.life.alive:
            self.away = away
            self.life.die()

    def _lose_power(self) -> None:
        for process in self.living():
            process.end(Exit(signal=9))
        self.boot = f"boot {next(self.numbers)}"
        self.disk.written = dict(self.disk.synced)

    async def _end_outage(self, outage: str, seconds: float) -> None:
        await trio.sleep(seconds)
        if self.server.outage == outage:
            self.server.outage = None

    async def _make_room(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.disk.full = False

    def _tell_to(self, action: str, away: float) -> None:
        """As `supervisor.agent` does upon the first signal, and upon the second."""
        life = self.life
        if life is None or not life.alive or life.departure is None or life.services is None:
            return
        self.away = away
        self.stopped |= life.told or action in ("drain", "cancel")  # a drain may become a cancellation
        self.rescheduled += action == "reschedule"
        if life.told:
            life.departure.cancel_all("SIGTERM")
        else:
            life.told = True
            life.services.start_soon(life.departure.act, action, "SIGTERM")

    # --- the play ---

    async def play(self) -> None:
        """The script, and then a time in which all is well."""
        async with trio.open_nursery() as self.nursery:
            self.nursery.start_soon(self.keep_agent)
            for step in self.script.steps:
                if not isinstance(step.when, str):
                    self.nursery.start_soon(self._at, step.when, step.deed)
            with trio.move_on_after(LONGEST):
                await trio.sleep(1.0)
                while not self._is_over():
                    await trio.sleep(5.0)
            before = self._sum()
            await trio.sleep(AFTERMATH)
            self.expect(before == self._sum(), "it was over and something happened to it")
            self.nursery.cancel_scope.cancel()

    async def _at(self, second: float, deed: Deed) -> None:
        await trio.sleep(second)
        self.do([deed])

    def _sum(self) -> tuple[int, ...]:
        return (len(self.server.histories[RUN]), self.bodies, self.started, self.hooks.total())

    def _is_over(self) -> bool:
        if self.wrongs:
            return True
        closed = all(isinstance(record.phase, Closed) for record in self.disk.written.values())
        return closed and self.server.states[RUN].type.terminal and not self.living()

    @property
    def handed_back(self) -> int:
        return sum(state.name == "AwaitingRetry" for state in self.server.histories[RUN])

    def judge(self) -> None:
        """Everything that must hold in the end."""
        end = self.server.states[RUN].type
        retries = self.handed_back
        claims = list(self.disk.written.values())
        self.story.append(
            f"          end {end.value}, bodies {self.bodies}, hooks {dict(self.hooks)}, records {claims}"
        )
        right = self._right_ends()
        outlived = self._outlived_cancellation()
        disturbed = sum(step.deed.seconds for step in self.script.steps)
        checks = {
            f"it ran on for {outlived:.0f} s after it was cancelled": outlived <= OUTLIVES + disturbed,
            f"it should be {sorted(right)} and is {end.value}": end.value in right,
            f"a process of it lives: {self.living()}": not self.living(),
            "the journal has it open": all(isinstance(record.phase, Closed) for record in claims),
            f"its body was begun {self.bodies} times": self.bodies <= 1 + retries,
            f"it was handed back {retries} times": self.forgot
            or retries <= self.script.crash_retries + self.rescheduled,
            f"its hooks were run {dict(self.hooks)}": self.forgot
            or all(count <= 1 + retries for count in self.hooks.values()),
            "its hooks were not run": self.hooks.total() or not self._owes_hooks(),
        }
        self.wrongs += [wrong for wrong, holds in checks.items() if not holds]

    def _outlived_cancellation(self) -> float:
        """For how many seconds its last engine has lived on in a run that the server calls cancelled."""
        cancelled, ended = self.server.cancelled_at, max((one.ended for one in self._engines()), default=0.0)
        return 0.0 if cancelled is None else max(0.0, ended - cancelled)

    def _engines(self) -> list[Process]:
        return [process for process in self.processes if isinstance(process, Engine)]

    def _owes_hooks(self) -> bool:
        """Where nothing was in the way: who dies or is cut off may have begun a hook and not ended it."""
        disturbed = self.lives > 1 or self.server.cut_off or self.forgot or self.handed_back > 0
        end, states = self.server.states[RUN].type, self.server.histories[RUN]
        crashed = end is StateType.CRASHED and any(state.type is StateType.RUNNING for state in states)
        return not disturbed and (crashed or (end is StateType.CANCELLED and self.started > 0))

    def _right_ends(self) -> set[str]:
        """What the run may have come to, since it was last scheduled, by what its engine and people have said."""
        history = self.server.histories[RUN]
        last = max(place for place, state in enumerate(history) if state.type is StateType.SCHEDULED)
        seen = {state.type for state in history[last:]}
        if self.server.engines_word in seen:
            return {str(self.server.engines_word)}
        if self.server.cancelled or StateType.CANCELLING in seen:
            return {"CANCELLED"}
        ends = {"CANCELLED"} if self.stopped or self.script.timeout is not None else set()
        if StateType.RUNNING in seen or self.started >= MAX_STARTS:
            ends.add("CRASHED")
        return ends


class Pulse:
    """A pulse that nobody watches."""

    def expect(self, within: float | None) -> None:
        pass
