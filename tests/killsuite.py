"""Kills agents where it hurts, starts them again, and judges what is left by the server, by /proc and by the bodies' trace.

The invariant: every claimed run ends in exactly one right terminal state, its body is executed exactly once, and no
process of it lives on. `tests/test_kill_suite.py` does each failpoint once in CI, `tests/torture.py` all of it.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.failpoints import FAILPOINTS, STEPS, VARIABLE
from tests.agents import RUN_MARK, AgentProcess, config_for
from tests.invariants import executions
from tests.servers import TERMINAL, Api, PrefectServer, processes_with
from tests.waiting import lines, wait_until

ENGINE = Path(__file__).parent / "flows" / "scripted_engine.py"
ENDS = {"completes": "COMPLETED", "fails": "FAILED", "crashes": "CRASHED", "is cancelled": "CANCELLED"}
SIGNS_OF_BUGS = ("Traceback", "internal error", "giving up")
LONGEST = 20.0  # seconds for anything that takes well under two when all is well

# File and flow in tests/flows/e2e that do the same with a real engine.
REAL_FLOWS = {
    "completes": ("held.py", "held"),
    "fails": ("flows.py", "hooked_failing"),
    "crashes": ("flows.py", "hooked_kill_self"),
    "is cancelled": ("flows.py", "hooked_sleeper"),
}

# --- which failpoints a run comes by -----------------------------------------------------------------------------------

EVERY_RUN = frozenset(
    {
        "journal Claiming",
        "claim",
        "journal Starting",
        "job",
        "spawn",
        "journal Running",
        "pid",
        "journal Exited",
        "look",
        "clean up",
        "journal Closed",
    }
)
REPORTED_BY_US = frozenset({"hook", "journal owed", "report", "journal heard", "log line"})
STOPPED = frozenset({"journal Stopping", "ask engine", "signal"})


def steps_of(outcome: str, major: int) -> frozenset[str]:
    """The steps that a run with this outcome comes by, on a server and with an engine of that generation."""
    steps = EVERY_RUN | ({"submitting"} if major == 3 else set())  # 2.x knows no such state
    if outcome == "crashes":
        return steps | REPORTED_BY_US
    if outcome == "is cancelled":
        # An engine of 3.8 is asked, and reports the end and runs the hooks itself.
        return steps | STOPPED | ({"others ended"} if major == 3 else REPORTED_BY_US)
    return steps


def failpoints_of(outcome: str, major: int) -> list[str]:
    """The failpoints that a run with this outcome comes by, in order."""
    steps = steps_of(outcome, major)
    return [name for name in FAILPOINTS if name.partition(" ")[2] in steps]


def agent_sees_it_alive(failpoint: str) -> bool:
    """Whether a run that waits to be let go lives when the agent that died there comes back."""
    return STEPS.index("spawn") <= STEPS.index(failpoint.partition(" ")[2]) <= STEPS.index("pid")


# --- findings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something that must never be. `kind` is lost, doubled, stray, bug or harness; `story` is what helps to understand it."""

    kind: str
    where: str
    what: str
    story: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}" + (f"\n{self.story}" if self.story else "")


@dataclass
class Tally:
    """What was done and found. Owns the counts."""

    kills: int = 0
    restarts: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.restarts += other.restarts
        self.runs += other.runs
        self.findings += other.findings

    def of(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)

    def __str__(self) -> str:
        runs = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.runs.items()))
        return (
            f"kills {self.kills}, restarts {self.restarts}, runs {self.runs.total()} ({runs}), lost {self.of('lost')}, "
            f"doubled {self.of('doubled')}, stray processes {self.of('stray')}, findings {len(self.findings)}"
        )


def check_history(
    states: Sequence[tuple[str, str]], end: str, *, adopted_native: bool = False
) -> Iterator[tuple[str, str]]:
    """(kind, what) of all that is wrong with the history of a run that should have come to this end.

    An engine whose agent has died has lost its control channel with it: it takes the SIGTERM of a cancellation for a crash and
    says so before the agent says what it was (`adopted_native`).
    """
    kinds = [kind for kind, _ in states]
    ends = {kind for kind in kinds if kind in TERMINAL}
    if not kinds or kinds[-1] != end:
        yield "lost", f"it is {kinds[-1] if kinds else 'unknown'} and should be {end}"
    allowed = {end, "CRASHED"} if adopted_native and end == "CANCELLED" else {end}
    if ends - allowed:
        yield "doubled", f"it had the ends {sorted(ends)} and should have had {end} alone"
    if kinds.count("RUNNING") > 1:
        yield "doubled", f"it was RUNNING {kinds.count('RUNNING')} times"


def check_trace(trace: Path, run_id: str) -> Iterator[tuple[str, str]]:
    """(kind, what) when the body was not executed exactly once."""
    count = executions(trace)[run_id]
    if count != 1:
        yield "doubled" if count else "lost", f"its body was executed {count} times"


def check_hooks(hooks: Path, run_id: str) -> Iterator[tuple[str, str]]:
    """(kind, what) when a hook was run twice. Once begun, a hook is never begun again: it may have been half done."""
    for line, count in Counter(line for line in lines(hooks) if run_id in line).items():
        if count > 1:
            yield "doubled", f"its hook was run {count} times: {line}"


def check_processes(run_id: str) -> Iterator[tuple[str, str]]:
    """(kind, what) for each process that bears the run's mark."""
    for process in processes_with(RUN_MARK, run_id):
        yield "stray", f"process {process.pid} is left of it"


def check_log(log: str) -> Iterator[tuple[str, str]]:
    """(kind, what) for each sign of a bug in an agent's log."""
    for sign in SIGNS_OF_BUGS:
        if sign in log:
            yield "bug", f"the agent's log says '{sign}'"


# --- one agent and its runs --------------------------------------------------------------------------------------------


class Scene:
    """One agent with one pool, and the runs in it. Owns the agent and the files to which the engines write."""

    def __init__(
        self,
        server: PrefectServer,
        api: Api,
        where: str,
        *,
        real: bool = False,
        limit: int | None = None,
    ) -> None:
        self.server, self.api, self.where, self.real = server, api, where, real
        self.tally = Tally()
        self.agent = AgentProcess("")
        home = self.agent.home
        self.trace, self.hooks, self.go = home / "trace", home / "hooks", home / "go"
        self.ends: dict[str, str] = {}  # run id -> outcome
        self._cancelled: set[str] = set()
        self._pool = api.create_pool()
        self._deployments: dict[str, str] = {}
        flows: dict[str, Any] = {"grace_seconds": 5}
        if not real:
            flows["python"] = self._scripted_engine(home)
        poll = {"interval_seconds": 0.2, "cancel_interval_seconds": 0.2, "heartbeat_seconds": 600, "jitter": 0}
        self.agent.write_config(
            # What real flows print has tracebacks of its own.
            config_for(
                server,
                [{"pool": self._pool}],
                poll=poll,
                flows=flows,
                agent={"limit": limit},
                output={"show": not real},
            )
        )

    def _scripted_engine(self, home: Path) -> Path:
        python = home / f"python-{self.server.version}"
        python.write_text(f"#!{sys.executable} -IS\n{ENGINE.read_text()}")
        python.chmod(0o755)
        return python

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        agent = self.agent
        if agent.process is not None and agent.returncode is None:
            agent.kill()
        agent.kill_runs()
        agent.notify.close()

    def create_run(self, outcome: str, *, held: bool = False, **parameters: Any) -> str:
        """A due run. `held`: its body does not end before `let_go`."""
        file, flow = REAL_FLOWS[outcome] if self.real else ("flows.py", "scripted")
        if flow not in self._deployments:
            self._deployments[flow] = self.api.create_deployment(flow, pool=self._pool, file=file)
        wanted = {"trace": str(self.trace), "hooks": str(self.hooks), **parameters}
        if held and (outcome == "completes" or not self.real):
            wanted["go"] = str(self.go)
        if not self.real:
            wanted["outcome"] = outcome
        run_id = self.api.create_run(self._deployments[flow], wanted)
        self.ends[run_id] = outcome
        self.tally.runs[outcome] += 1
        return run_id

    def let_go(self) -> None:
        """Lets bodies end that were held."""
        self.go.touch()

    def start(self, failpoint: str | None = None) -> None:
        """Starts the agent, armed with that failpoint or with none; does not wait for it."""
        if self.agent.process is not None:
            self.tally.restarts += 1
        self.agent.env.pop(VARIABLE, None)
        if failpoint is not None:
            self.agent.env[VARIABLE] = failpoint
        self.agent.start(wait=False)

    @property
    def dead(self) -> bool:
        return self.agent.returncode is not None

    def start_ready(self) -> None:
        """Starts the agent, and waits until it says that it is at work."""
        ready = len(self.agent.notify.lines("READY"))
        self.start()
        wait_until(lambda: len(self.agent.notify.lines("READY")) > ready or self.dead, LONGEST, "the agent is ready")

    def kill(self) -> None:
        """SIGKILL, from outside."""
        if self.dead:
            self.find("bug", f"the agent died by itself: {self.agent.returncode}", self.agent.log()[-6000:])
        self.agent.kill()
        self.tally.kills += 1

    def cancel_those_that_run(self) -> bool:
        """Sets CANCELLING, once, for the runs that are to be cancelled and whose body has begun. Returns whether all are."""
        begun = executions(self.trace)
        wanted = {run_id for run_id, outcome in self.ends.items() if outcome == "is cancelled"}
        for run_id in (wanted & begun.keys()) - self._cancelled:
            self._cancelled.add(run_id)
            self.api.cancel(run_id)
        return wanted <= self._cancelled

    def open_runs(self) -> set[str]:
        """Those that are not yet in the state in which they should end."""
        return {run_id for run_id, outcome in self.ends.items() if self.api.state(run_id) != ENDS[outcome]}

    def story(self, run_id: str) -> str:
        """What the server and the agent say of the run, for a finding."""
        return f"{self.api.story(run_id)}\ntrace: {lines(self.trace)}\nagent:\n{self.agent.log()[-6000:]}"

    def stop(self) -> None:
        """Ends the agent by SIGTERM, when its runs are over."""
        if self.dead:
            self.find("bug", f"the agent died by itself: {self.agent.returncode}", self.agent.log()[-6000:])
        elif (code := self.agent.stop()) != 0:
            self.find("bug", f"the agent ended with {code}", self.agent.log()[-6000:])

    def find(self, kind: str, what: str, story: str = "") -> None:
        self.tally.findings.append(Finding(kind, self.where, what, story))

    def check(self) -> None:
        """All that must hold now that the agent has been stopped."""
        native = self.tally.kills > 0 and self.server.major == 3
        for run_id, outcome in self.ends.items():
            states = self.api.states(run_id)
            for kind, what in (
                *check_history(states, ENDS[outcome], adopted_native=native),
                *check_trace(self.trace, run_id),
                *check_hooks(self.hooks, run_id),
                *check_processes(run_id),
            ):
                self.find(kind, f"run {run_id} {outcome}: {what}", self.story(run_id))
        for kind, what in check_log(self.agent.log()):
            self.find(kind, what, self.agent.log()[-6000:])
        left = [path.name for path in (self.agent.state_dir / "runs").glob("*")]
        if left:
            self.find("stray", f"private directories are left: {left}", self.agent.log()[-6000:])


# --- the three ways to kill --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One agent that dies at one failpoint over one run. `held`: the run outlives it where it can."""

    failpoint: str
    outcome: str
    held: bool = False
    real: bool = False

    def __str__(self) -> str:
        return ", ".join((f"{self.failpoint}, {self.outcome}", *["held"] * self.held, *["real engine"] * self.real))


def judged(scene: Scene, deeds: Callable[[], None]) -> Tally:
    """Does the deeds, which end with the agent's stop, then checks. A wait that was in vain is a finding like others."""
    with scene:
        try:
            deeds()
        except AssertionError as error:
            stories = "\n".join(scene.story(run_id) for run_id in list(scene.ends)[:3])
            scene.find("lost", str(error).partition("\n")[0], stories)
        else:
            scene.check()
    return scene.tally


def kill_at(case: Case, server: PrefectServer, api: Api) -> Tally:
    """Has an agent die at the failpoint, starts it again, and checks what becomes of its run."""
    scene = Scene(server, api, f"{case} on {server.version}", real=case.real)
    longest = LONGEST * 3 if case.real else LONGEST

    def deeds() -> None:
        run_id = scene.create_run(case.outcome, held=case.held)
        if not (case.held and agent_sees_it_alive(case.failpoint)):
            scene.let_go()
        scene.start(case.failpoint)

        def died() -> bool:
            scene.cancel_those_that_run()
            return scene.dead

        wait_until(died, longest, "the agent dies there")
        scene.tally.kills += 1
        if scene.agent.returncode != -signal.SIGKILL:
            scene.find("bug", f"the agent ended with {scene.agent.returncode}", scene.agent.log()[-6000:])
        said = len(scene.agent.log())
        scene.start_ready()
        if not scene.go.exists():
            wait_until(
                lambda: re.search("going on with it|started, process", scene.agent.log()[said:]), longest, "it goes on"
            )
            scene.let_go()
        wait_until(
            lambda: scene.cancel_those_that_run() and scene.api.state(run_id) == ENDS[case.outcome],
            longest,
            f"the run {case.outcome}",
        )
        scene.stop()

    return judged(scene, deeds)


def kill_at_random(
    seed: int, kills: int, server: PrefectServer, api: Api, *, load: int = 20, say: Callable[[str], None] = print
) -> Tally:
    """Kills the agent at random moments while up to `load` short runs of all outcomes are open."""
    dice = random.Random(seed)
    scene = Scene(server, api, f"random kills, seed {seed}, on {server.version}", limit=load)

    def top_up() -> None:
        for _ in range(load - len(scene.open_runs())):
            scene.create_run(dice.choice(list(ENDS)), seconds=round(dice.uniform(0, 1.5), 2))

    def pass_time(seconds: float) -> None:
        until = time.monotonic() + seconds

        def passed() -> bool:
            scene.cancel_those_that_run()
            return time.monotonic() >= until

        wait_until(passed, seconds + LONGEST, "a moment")

    def deeds() -> None:
        said = time.monotonic()
        for done in range(kills):
            top_up()
            if dice.random() < 0.9:
                scene.start_ready()
            else:  # it may well die before it has begun
                scene.start()
            pass_time(dice.uniform(0, 1.2))
            scene.kill()
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{done + 1} of {kills} random kills, {len(scene.ends)} runs")
        scene.start()
        wait_until(
            lambda: scene.cancel_those_that_run() and not scene.open_runs(), LONGEST * 5, "all runs end", every=0.3
        )
        scene.stop()

    return judged(scene, deeds)


def kill_around_a_long_run(
    outcome: str, server: PrefectServer, api: Api, *, kills: int = 10, seed: int = 0, real: bool = True
) -> Tally:
    """Kills the agent again and again while one run goes on, and checks that it is the same process throughout."""
    dice = random.Random(seed)
    scene = Scene(server, api, f"{kills} kills around one run that {outcome}, on {server.version}", real=real)

    def process() -> tuple[int, float]:
        pid = int(lines(scene.trace)[0].split()[1])
        (found,) = [one for one in processes_with(RUN_MARK) if one.pid == pid]
        return pid, found.create_time()

    def deeds() -> None:
        run_id = scene.create_run(outcome, held=True)
        scene.start()
        wait_until(lambda: lines(scene.trace), LONGEST * 3, "the body has begun")
        before = process()
        for _ in range(kills):
            adopted = scene.agent.log().count("going on with it")
            scene.kill()
            scene.start()
            wait_until(
                lambda adopted=adopted: scene.agent.log().count("going on with it") > adopted,  # type: ignore[misc]
                LONGEST,
                "the run is adopted",
            )
            until = time.monotonic() + dice.uniform(0, 0.5)
            wait_until(lambda until=until: time.monotonic() >= until, 1, "a moment")  # type: ignore[misc]
            if process() != before:
                scene.find("doubled", f"its process was {before} and is {process()}", scene.story(run_id))
            if scene.api.state(run_id) != "RUNNING":
                scene.find("lost", f"it is {scene.api.state(run_id)} while it runs", scene.story(run_id))
        scene.let_go()
        wait_until(
            lambda: scene.cancel_those_that_run() and scene.api.state(run_id) == ENDS[outcome],
            LONGEST,
            f"the run {outcome}",
        )
        scene.stop()

    return judged(scene, deeds)
