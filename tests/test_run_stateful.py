"""One run by property: whatever dies, is cut off or is asked for, in any order, it ends once, rightly, and leaves nothing.

A script says what happens and when: at a failpoint of the agent, or after so many seconds. It is played to the agent's
own loops, runs and recovery, with a server, a machine and engines made here, on a clock that jumps. Then all is
well again for long enough, and everything is looked at.

`STATEFUL_EXAMPLES=5000` tries that many scripts, other ones each time.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from supervisor.config import Flows, Poll, Stop, Work
from supervisor.errors import BackendError, LostAnswer, ServerTrouble, Unreachable
from supervisor.failpoints import FAILPOINTS
from supervisor.lifecycle import MAX_STARTS, Closed, Exit, Hook, ProcessRef
from supervisor.lifecycle.record import Record
from supervisor.model import Answer, FlowRun, Job, LogRecord, Pool, Proposal, State, StateType, Verdict
from supervisor.process.adopt import UNSEEN, Adopted
from supervisor.process.channel import Intent
from supervisor.runs.canceller import Canceller
from supervisor.runs.departure import Departure
from supervisor.runs.entry import Entry
from supervisor.runs.health import ServerHealth
from supervisor.runs.kit import Kit
from supervisor.runs.late import LateClaims
from supervisor.runs.launcher import Launched
from supervisor.runs.patience import Patience
from supervisor.runs.poller import Poller
from supervisor.runs.recovery import Recovery
from supervisor.runs.roster import Roster
from supervisor.runs.run import Run
from supervisor.runs.sources import Source
from supervisor.runs.teller import Teller
from tests.fakes import FakeBackend, NoOutput, offer

RUN = "r1"
TRANSIT = 0.05  # seconds from here to the server, and the same back
DISK = 0.001  # seconds for a write
BLACK_HOLE = 10.0  # seconds after which an answer is given up
SPAWN = 0.01
IMPORT = 2.0  # seconds until an engine asks for RUNNING
HOOK = 3.0
CANCELLING_TIMEOUT = 300.0  # after which a server of 3.8 calls a run Cancelled that is Cancelling
LONGEST = 7200.0  # seconds after which the run must have ended, whatever has happened
ENDLESS = 900.0  # seconds that a body takes which nobody ends
AFTERMATH = 100.0  # seconds, all well, in which nothing may happen to it any more

# --- what happens ------------------------------------------------------------------------------------------------------

DIES, REBOOTS = "the agent dies", "the machine reboots"
STOPS = {f"the agent is told to {action}": action for action in ("drain", "cancel", "keep", "reschedule")}
OUTAGES: Mapping[str, Callable[[], BackendError]] = {
    "the server refuses connections": lambda: Unreachable("refused"),
    "the network swallows all": lambda: LostAnswer("timed out"),
    "the server answers 503": lambda: ServerTrouble("503"),
}
SWALLOWED = "the network swallows all"
LOSES, CANCEL, KILLED, FULL = "an answer is lost", "somebody cancels", "the process is killed", "the disk is full"
LASTING = (DIES, *OUTAGES, REBOOTS, *STOPS, FULL)
SUDDEN = (CANCEL, LOSES, KILLED)
FATES = ("completes", "is cancelled", "exits", "is killed", "fails")


class Deed(msgspec.Struct, frozen=True):
    """What happens, and how long it lasts: an outage, or the time until there is an agent again."""

    what: str
    seconds: float = 0.0


class Step(msgspec.Struct, frozen=True):
    """The deed happens when an agent comes by that failpoint for the `nth` time, or at that second."""

    when: str | float
    nth: int
    deed: Deed


class Script(msgspec.Struct, frozen=True):
    """What happens to the run, how it would go by itself, and how the agent is configured."""

    steps: tuple[Step, ...] = ()
    fate: str = "completes"  # one of `FATES`: how the body ends
    body: float = 8.0  # after so many seconds
    modern: bool = True  # its engine has a control channel and runs its own hooks
    deaf: bool = False  # its engine ignores SIGTERM
    timeout: float | None = None
    crash_retries: int = 0


spans = st.sampled_from([1.0, 20.0, 400.0])
counts = st.sampled_from([1, 1, 1, 2])
moments = st.sampled_from([*FAILPOINTS, 0.0, 0.2, 0.6, 2.6, 2.7, 5.0, 12.0, 30.0, 200.0])
lasting = st.builds(Deed, st.sampled_from(LASTING), spans)
sudden = st.builds(Deed, st.sampled_from(SUDDEN))
deaths = st.builds(Step, st.sampled_from(FAILPOINTS), counts, st.builds(Deed, st.just(DIES), spans))
steps = deaths | st.builds(Step, moments, counts, lasting | sudden)  # to die is what it is about
scripts = st.builds(
    Script,
    steps=st.lists(steps, max_size=6).map(tuple),
    fate=st.sampled_from(FATES),
    body=st.sampled_from([8.0, 0.02, 60.0, ENDLESS]),
    modern=st.booleans(),
    deaf=st.sampled_from([False, False, True]),
    timeout=st.sampled_from([None, None, None, 30.0]),
    crash_retries=st.sampled_from([0, 0, 1]),
)


class Died(BaseException):
    """The agent dies here, as by SIGKILL."""


class Life:
    """One agent, from its start to its end. Once it is dead, nothing that it still says or does counts."""

    def __init__(self) -> None:
        self.alive = True
        self.scope = trio.CancelScope()
        self.services: trio.Nursery | None = None
        self.departure: Departure | None = None
        self.told = False  # to stop
        self.end: Callable[[], None] = lambda: None

    def die(self) -> None:
        self.alive = False
        self.scope.cancel()

    def check(self) -> None:
        if not self.alive:
            raise Died


# --- the machine -------------------------------------------------------------------------------------------------------


class Process:
    """A process of the run that does nothing."""

    def __init__(self, world: World, what: str) -> None:
        number = next(world.numbers)
        self.world, self.what = world, what
        self.ref = ProcessRef(pid=number, start_ticks=number, boot_id=world.boot)
        self.born = trio.current_time()
        self.exit: Exit | None = None
        self.gone = trio.Event()

    def end(self, how: Exit) -> None:
        if self.exit is None:
            self.exit = how
            self.world.say(f"{self.what} {self.ref.pid} {how}")
            self.gone.set()

    def terminate(self) -> None:
        """SIGTERM."""
        self.end(Exit(signal=15))

    async def wait(self) -> Exit:
        await self.gone.wait()
        assert self.exit is not None
        return self.exit


class Engine(Process):
    """What executes the body: as engines of 3.8 do (`modern`), or as those of 3.0 to 3.6 do."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "engine")
        self.modern, self.deaf = world.script.modern, world.script.deaf
        self.intent: Intent | None = None  # what it was told through its control channel
        self.connected = trio.Event()
        self._scope = trio.CancelScope()
        self._undisturbed = trio.CancelScope()
        self._going = trio.Event()
        self._going.set()

    def end(self, how: Exit) -> None:
        super().end(how)
        self._scope.cancel()

    def terminate(self) -> None:
        if self.deaf:
            return
        if self.modern and self.connected.is_set():
            self._undisturbed.cancel()
        else:
            self.end(Exit(signal=15))

    def stop(self) -> None:
        """SIGSTOP."""
        self._going = trio.Event()

    def go_on(self) -> None:
        """SIGCONT."""
        self._going.set()

    async def live(self) -> None:
        with self._scope:
            with self._undisturbed:
                self.end(Exit(code=await self._work()))
            if self.exit is None:  # disturbed
                self.end(Exit(code=await self._terminated()))

    async def _work(self) -> int:
        await self._pause(IMPORT)
        if not await self._tell(StateType.RUNNING, tries=1):
            return 1
        self.world.begin_body(self)
        self.connected.set()
        script = self.world.script
        await self._pause(ENDLESS if script.fate == "is cancelled" else script.body)
        match script.fate:
            case "exits":
                return 3
            case "is killed":
                self.end(Exit(signal=9))
                return 0
            case "completes" | "is cancelled":
                heard = await self._tell(StateType.COMPLETED)
            case _:
                heard = await self._tell(StateType.FAILED)
        if not heard and self.modern and self.world.server.states[RUN].type is StateType.CANCELLING:
            await self._run_hook(Hook.CANCELLATION)  # as it does for whatever state it finds itself in
        return 0 if heard else 1

    async def _terminated(self) -> int:
        if self.intent is Intent.CANCEL:
            await self._run_hook(Hook.CANCELLATION)
            await self._tell(StateType.CANCELLED)
        elif self.intent is None:
            await self._tell(StateType.CRASHED, force=True)
            await self._run_hook(Hook.CRASHED)
        return 0

    async def _run_hook(self, hook: Hook) -> None:
        self.world.hooked(hook, "the engine")
        self.world.output_tells_of_hooks |= hook is Hook.CANCELLATION
        await self._pause(1.0)

    async def _tell(self, kind: StateType, *, tries: int = 5, force: bool = False) -> bool:
        """Whether the server has taken that state."""
        for _ in range(tries):
            try:
                proposal = Proposal(type=kind, transition_id=f"engine {self.ref.pid} {kind.value}", force=force)
                verdict = await self.world.server.hear_engine(proposal)
            except BackendError:
                await self._pause(2.0)
            else:
                await self._going.wait()
                return verdict.answer is Answer.ACCEPT
        return False

    async def _pause(self, seconds: float) -> None:
        await trio.sleep(seconds)
        await self._going.wait()


class Held(Adopted):
    """A process that an earlier agent has started."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.ref)
        self._process = process

    async def wait(self) -> Exit:
        await self._process.gone.wait()
        return UNSEEN


class Channel:
    """The agent's end of an engine's control channel."""

    def __init__(self, engine: Engine, life: Life) -> None:
        self._engine, self._life = engine, life

    @property
    def connected(self) -> bool:
        return self._engine.connected.is_set() and self._engine.exit is None

    async def wait_connected(self) -> None:
        await self._engine.connected.wait()

    async def ask(self, intent: Intent) -> bool:
        self._life.check()
        await trio.sleep(SPAWN)
        self._life.check()
        if self.connected and self._engine.intent is None:
            self._engine.intent = intent
        return self._engine.intent is intent

    def close(self) -> None:
        pass


class Disk:
    """What is in the journal: what outlives the agent, and of it what outlives the machine."""

    def __init__(self) -> None:
        self.written: dict[str, Record] = {}
        self.synced: dict[str, Record] = {}
        self.full = False


class Paper:
    """One agent's hand on the journal."""

    def __init__(self, world: World, life: Life) -> None:
        self._world, self._life, self._disk = world, life, world.disk
        self._held: dict[str, Record] = {}

    @property
    def full(self) -> bool:
        return self._disk.full

    def open_records(self) -> list[Record]:
        return [record for record in self._disk.written.values() if not isinstance(record.phase, Closed)]

    async def write(self, record: Record, *, durable: bool = True) -> bool:
        self._life.check()
        self._held[record.claim_id] = record
        if isinstance(record.phase, Closed):
            self._world.say(f"closed: {record.phase.outcome.value}")
            self._world.expect(not self._world.living(), "closed while a process of it lives")
        with trio.CancelScope(shield=True):  # as the real one: cancelling does not keep it from being written
            await trio.sleep(DISK)
        self._life.check()
        return self._commit(durable=durable)

    def _commit(self, *, durable: bool) -> bool:
        if self._disk.full:
            return False
        self._disk.written.update(self._held)
        self._held.clear()
        if durable:
            self._disk.synced = dict(self._disk.written)
        return True

    async def run(self) -> None:
        while True:
            await trio.sleep(5.0)
            self._commit(durable=True)

    def close(self) -> None:
        """The end of an agent that was not killed. What there is no room for is lost in either case."""
        if self._life.alive:
            self._commit(durable=True)
        self._world.forgot |= self._disk.full and bool(self._held)

    async def write_patiently(self, record: Record) -> None:
        while not await self.write(record):
            await trio.sleep(2.0)

    def forget(self, claim_id: str) -> None:
        self._held.pop(claim_id, None)
        self._disk.written.pop(claim_id, None)

    def crash_retries(self, run_id: str) -> int:
        records = {**self._disk.written, **self._held}.values()
        return sum(record.crash_retry and isinstance(record.phase, Closed) for record in records)


class Starter:
    """Stands in for the launcher: one agent's way to start processes."""

    def __init__(self, world: World, life: Life) -> None:
        self._world, self._life = world, life

    def output(self, run_id: str) -> Path:
        return Path("/nowhere/output")

    def group(self, run_id: str) -> None:
        return None

    async def plan(self, job: Job, flows: Flows) -> Any:
        await trio.lowlevel.checkpoint()
        return SimpleNamespace(runs_own_hooks=self._world.script.modern, is_engine=True)

    async def launch(self, run: FlowRun, job: Job, flows: Flows, *_: Any) -> Launched:
        self._life.check()
        await trio.sleep(SPAWN)
        self._life.check()
        engine = Engine(self._world)
        self._world.start(engine)
        self._world.nursery.start_soon(engine.live)
        await trio.sleep(SPAWN)
        session: Any = Channel(engine, self._life) if engine.modern else None
        child: Any = engine
        return Launched(child, session, runs_own_hooks=engine.modern, is_engine=True, output_from=0)

    async def run_hook(self, hook: Hook, run: FlowRun, job: Job, flows: Flows) -> bool:
        self._life.check()
        self._world.hooked(hook, "a helper")
        helper = Process(self._world, "helper")
        self._world.start(helper)
        self._world.nursery.start_soon(self._world.end_after, helper, HOOK)
        await helper.wait()
        return True

    async def clean_up(self, run_id: str) -> None:
        self._life.check()
        await trio.lowlevel.checkpoint()


# --- the server --------------------------------------------------------------------------------------------------------


class FakeServer(FakeBackend):
    """A server of 3.8 as one agent and its engines reach it. Knows what must never happen to a run."""

    def __init__(self, world: World) -> None:
        super().__init__(offer(RUN))
        self.pools["p"] = Pool(id="p", name="p", type="process")
        self.world = world
        self.life = Life()  # of the agent that asks
        self.outage: str | None = None
        self.lose_next = False
        self.cut_off = False  # there was an outage
        self.pid: str | None = None
        self.cancelled = False  # somebody's wish to cancel was taken
        self.engines_word: StateType | None = None
        self.log: list[str] = []

    # --- the way there and back ---

    async def _send(self) -> None:
        if (outage := self.outage) is not None:
            await trio.sleep(BLACK_HOLE if outage == SWALLOWED else TRANSIT)
            raise OUTAGES[outage]()
        with trio.CancelScope(shield=True):  # what has been sent arrives, whatever becomes of the sender
            await trio.sleep(TRANSIT)

    async def _call(self, method: str, about: Any = None) -> BackendError | None:
        """All that there is to say of calls of the agent that change nothing here."""
        await self._answer(await self._arrive())
        return None

    async def _arrive(self) -> bool:
        """A call of the agent's arrives. Returns whether its answer is to be lost."""
        self.life.check()
        await self._send()
        lost, self.lose_next = self.lose_next, False
        return lost

    async def _answer(self, lost: bool) -> None:
        await trio.sleep(TRANSIT)
        self.life.check()
        if lost:
            raise LostAnswer("reset")

    async def propose(self, run_id: str, proposal: Proposal) -> Verdict:
        lost = await self._arrive()
        if proposal.type.terminal:
            self.world.expect(not self.world.living(Engine), f"{proposal.type.value} reported while an engine lives")
        verdict = self._orchestrate(run_id, proposal)
        self.world.say(f"the agent proposes {proposal.name or proposal.type.value}: {verdict.answer.value}")
        await self._answer(lost)
        return verdict

    async def patch_infrastructure(self, run_id: str, pid: str | None) -> None:
        lost = await self._arrive()
        self.pid = pid
        await self._answer(lost)

    async def write_logs(self, records: Sequence[LogRecord]) -> None:
        lost = await self._arrive()
        self.log.extend(record.message for record in records)
        await self._answer(lost)

    async def has_log(self, run_id: str, message: str) -> bool:
        await self._call("has_log")
        return message in self.log

    async def read_run(self, run_id: str) -> FlowRun:
        lost = await self._arrive()
        found = msgspec.structs.replace(self._described(), state=self.states[RUN])
        await self._answer(lost)
        return found

    async def hear_engine(self, proposal: Proposal) -> Verdict:
        await self._send()
        verdict = self._orchestrate(RUN, proposal)
        self.world.say(f"the engine proposes {proposal.type.value}: {verdict.answer.value}")
        if proposal.type.terminal and verdict.answer is Answer.ACCEPT:
            self.engines_word = proposal.type
        await trio.sleep(TRANSIT)
        return verdict

    def hear_user(self) -> None:
        """Somebody wants the run cancelled."""
        if self.outage is None:
            verdict = self._orchestrate(RUN, Proposal(type=StateType.CANCELLING, transition_id="user"))
            self.world.say(f"somebody cancels: {verdict.answer.value}")
            self.cancelled |= verdict.answer is not Answer.ABORT

    def _offers(self, limit: int) -> list[FlowRun]:
        found = self._described()
        return [found] if found.state_type is StateType.SCHEDULED else []

    def _described(self) -> FlowRun:
        state = self.states[RUN]
        return msgspec.structs.replace(
            self.runs[RUN],
            state_id=state.id,
            state_type=state.type,
            state_name=state.name,
            infrastructure_pid=self.pid,
        )

    # --- its rules ---

    def _orchestrate(self, run_id: str, proposal: Proposal) -> Verdict:
        now, kind = self.states[RUN], proposal.type
        refusal = None if proposal.force else self._refusal(now, proposal)
        if refusal is not None:
            return refusal
        if (now.type, kind) == (StateType.SCHEDULED, StateType.CANCELLING) and self.pid is None:
            self._store(RUN, self._made(StateType.CANCELLED, proposal))
            return Verdict(answer=Answer.REJECT, state=self.states[RUN], reason="It has not begun.")
        self._store(RUN, self._made(kind, proposal))
        return Verdict(answer=Answer.ACCEPT, state=self.states[RUN])

    def _refusal(self, now: State, proposal: Proposal) -> Verdict | None:
        kind = proposal.type
        if now.transition_id == proposal.transition_id and not now.type.terminal:
            return Verdict(answer=Answer.REJECT, state=now, reason="This run has already made this state transition.")
        reruns = (StateType.PENDING, StateType.SCHEDULED)
        if now.type.terminal and (kind not in reruns or now.type is StateType.CANCELLED):
            return Verdict(answer=Answer.ABORT, reason="This run is already in a terminal state.")
        if now.type is StateType.CANCELLING and kind is not StateType.CANCELLED:
            return Verdict(answer=Answer.REJECT, state=now, reason="This run is being cancelled.")
        renamed = now.type is StateType.PENDING and proposal.name not in (None, now.name)
        if kind is StateType.PENDING and now.type is not StateType.SCHEDULED and not renamed:
            return Verdict(answer=Answer.ABORT, reason="This run is in a PENDING state and cannot transition.")
        return None

    def _made(self, kind: StateType, proposal: Proposal) -> State:
        return State(
            type=kind,
            name=proposal.name or kind.value.title(),
            id=f"s{next(self.world.numbers)}",
            message=proposal.message,
            transition_id=proposal.transition_id,
        )

    async def _enforce(self, cancelling: State) -> None:
        """A cancellation that nobody has carried out by then is taken for done."""
        await trio.sleep(CANCELLING_TIMEOUT)
        if self.states[RUN] is cancelling:
            self.world.say("the server gives up waiting for the cancellation")
            self._store(
                RUN, self._made(StateType.CANCELLED, Proposal(type=StateType.CANCELLED, transition_id="server"))
            )

    def _store(self, run_id: str, state: State) -> None:
        before = self.states[RUN]
        if state.type is StateType.CANCELLING:
            self.world.nursery.start_soon(self._enforce, state)
        # A crash that is retried is no end.
        replaced = before.type.terminal and state.type is not before.type
        retried = before.type is StateType.CRASHED and state.name == "AwaitingRetry"
        self.world.expect(retried or not replaced, f"{state.name} put over {before.name}")
        super()._store(run_id, state)


# --- all of it ---------------------------------------------------------------------------------------------------------


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

    async def end_leftovers(
        self, run_id: str, ref: ProcessRef | None, *, grace: float = 5.0, group: None = None
    ) -> int:
        left = len(self.living())
        await self.end(ref, run_id, grace=grace)
        return left

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
            Source(work, self.server), roster, health, pulse, poll=poll, prefetch_seconds=10.0, turn_seconds=100.0
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
        """As `supervisor.app` does upon the first signal, and upon the second."""
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
        checks = {
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


async def at_once(function: Any, *args: Any, **_: Any) -> Any:
    """Instead of a thread: the clock here must not jump meanwhile."""
    await trio.lowlevel.checkpoint()
    return function(*args)


class Ears(logging.Handler):
    """Hears the agent tell of bugs of its own."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._world.say(f"log: {message}")
        if record.exc_info is not None:
            self._world.story.append(logging.Formatter().formatException(record.exc_info))
        for sign in ("internal error", "giving up"):
            self._world.expect(sign not in message, f"the log says: {message}")


LAUNCHER = "supervisor.runs.launcher"


def heart() -> list[ModuleType]:
    """The modules of supervisor.runs. The launcher is not among them: what it does is done by `Starter`."""
    return [
        sys.modules[name] for name in sorted(sys.modules) if name.startswith("supervisor.runs.") and name != LAUNCHER
    ]


def stand_ins(world: World) -> Mapping[str, Any]:
    """What stands in for that which acts upon the machine, by the name by which it is known there."""
    return {
        "failpoint": world.failpoint,
        "boot_id": lambda: world.boot,
        "adopt": world.adopt,
        "find": world.find,
        "is_engine": lambda ref: any(isinstance(one, Engine) and one.ref == ref for one in world.processes),
        "age_seconds": world.age_seconds,
        "end": world.end,
        "end_others": world.end_others,
        "end_leftovers": world.end_leftovers,
        "let_go_on": world.let_go_on,
        "wait_gone": world.wait_gone,
        "sweep": lambda *_: world.living(),
        "ref_of": lambda process: process.ref,
        "engine_ran_hooks": lambda _: world.output_tells_of_hooks,
    }


@contextmanager
def stage(world: World) -> Iterator[None]:
    """The agent's rooms act upon this world alone."""
    fakes = stand_ins(world)
    log = logging.getLogger("flow-agent")
    ears, level, propagates = Ears(world), log.level, log.propagate
    with ExitStack() as patches:
        patches.enter_context(patch.object(trio.to_thread, "run_sync", at_once))
        for module in heart():
            for name in sorted(fakes.keys() & vars(module).keys()):
                patches.enter_context(patch.object(module, name, fakes[name]))
        log.addHandler(ears)
        log.setLevel(logging.INFO)
        log.propagate = False  # pytest would keep the lines of all examples
        try:
            yield
        finally:
            log.setLevel(level)
            log.propagate = propagates
            log.removeHandler(ears)


def play(script: Script) -> World:
    """What becomes of the run in that script."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    worlds = []

    async def main() -> None:
        world = World(script)
        worlds.append(world)
        with stage(world):
            await world.play()

    trio.run(main, clock=clock)
    worlds[0].judge()
    return worlds[0]


WANTED = os.environ.get("STATEFUL_EXAMPLES")


@settings(
    max_examples=int(WANTED or 250),
    derandomize=WANTED is None,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # to explain a failure takes minutes
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(script=scripts, luck=st.random_module())
def test_a_run_ends_once_and_rightly_whatever_happens_to_its_agent_server_and_process(
    script: Script, luck: object
) -> None:
    world = play(script)
    note("\n".join(world.story))
    assert not world.wrongs


@pytest.mark.parametrize("modern", [True, False], ids=["modern engine", "older engine"])
@pytest.mark.parametrize("fate", FATES)
def test_a_run_survives_one_death_of_the_agent_wherever_that_is(fate: str, modern: bool) -> None:
    for place in FAILPOINTS:
        world = play(Script(steps=(Step(place, 1, Deed(DIES, 1.0)),), fate=fate, modern=modern))
        assert not world.wrongs, "\n".join([place, *world.story])


async def unwritten(self: Entry) -> bool:
    return True


async def begun_anew(self: Entry, hook: Hook) -> bool:
    return True


async def left_alone(self: World, run_id: str, ref: ProcessRef | None, **_: Any) -> int:
    return 0


BUGS: dict[str, tuple[type, str, Any, Script, str]] = {
    "claims are not written down": (
        Entry,
        "open",
        unwritten,
        Script(steps=(Step("after claim", 1, Deed(DIES, 1.0)),)),
        "it should be [] and is PENDING",
    ),
    "proposals are not known again": (
        Record,
        "transition_id",
        lambda record, of: str(uuid4()),
        Script(fate="exits"),
        "it should be ['CRASHED'] and is RUNNING",
    ),
    "hooks that were begun are begun again": (
        Entry,
        "begin_hook",
        begun_anew,
        Script(steps=(Step("after hook", 1, Deed(DIES, 1.0)),), fate="exits"),
        "its hooks were run",
    ),
    "what a run has left is not ended": (
        World,
        "end_leftovers",
        left_alone,
        Script(),
        "closed while a process of it lives",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    where, name, instead, script, wrong = BUGS[bug]
    assert not play(script).wrongs
    with patch.object(where, name, instead):
        assert wrong in "\n".join(play(script).wrongs)


def test_nothing_here_acts_upon_the_machine() -> None:
    """What supervisor.runs comes to use of supervisor.process must be given a stand-in above."""
    used = {
        name
        for module in heart()
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__.startswith("supervisor.process.")
    }
    assert used <= stand_ins(World(Script())).keys()
