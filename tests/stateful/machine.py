"""One agent's life, and what it touches here: processes, engines, the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import trio

from supervisor.config import Flows
from supervisor.errors import BackendError
from supervisor.lifecycle import Closed, Exit, Hook, ProcessRef
from supervisor.lifecycle.record import Record
from supervisor.model import Answer, FlowRun, Job, Proposal, StateType
from supervisor.process.adopt import UNSEEN, Adopted
from supervisor.process.channel import Intent
from supervisor.runs.departure import Departure
from supervisor.runs.launcher import Launched
from tests.stateful.script import DISK, ENDLESS, HOOK, IMPORT, RUN, SPAWN

if TYPE_CHECKING:
    from tests.stateful.world import World


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


class Process:
    """A process of the run that does nothing."""

    def __init__(self, world: World, what: str) -> None:
        number = next(world.numbers)
        self.world, self.what = world, what
        self.ref = ProcessRef(pid=number, start_ticks=number, boot_id=world.boot)
        self.born = trio.current_time()
        self.ended = 0.0
        self.exit: Exit | None = None
        self.gone = trio.Event()

    def end(self, how: Exit) -> None:
        if self.exit is None:
            self.exit, self.ended = how, trio.current_time()
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

    async def plan(self, job: Job, flows: Flows, *, again: bool = False) -> Any:
        await trio.lowlevel.checkpoint()
        return SimpleNamespace(runs_own_hooks=self._world.script.modern, is_engine=True)

    async def ready(self, run: FlowRun, job: Job, flows: Flows) -> None:
        await trio.lowlevel.checkpoint()

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
