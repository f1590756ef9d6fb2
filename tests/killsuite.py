"""Kills agents where it hurts, starts them again, and judges what is left by the server, by /proc and by the bodies' trace.

The invariant: every claimed run ends in exactly one right terminal state, its body is executed exactly once, and no
process of it lives on. `tests/test_kill_suite.py` does each failpoint once in CI, `tests/torture.py` all of it.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from supervisor.failpoints import FAILPOINTS, STEPS, VARIABLE
from tests.agents import RUN_MARK, AgentProcess, config_for
from tests.invariants import executions
from tests.killchecks import Finding, Tally, check_history, check_hooks, check_log, check_processes, check_trace
from tests.servers import Api, PrefectServer, processes_with
from tests.waiting import lines, wait_until

ENGINE = Path(__file__).parent / "flows" / "scripted_engine.py"
ENDS = {"completes": "COMPLETED", "fails": "FAILED", "crashes": "CRASHED", "is cancelled": "CANCELLED"}
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


def steps_of(outcome: str, major: int, *, warm: bool = True) -> frozenset[str]:
    """The steps that a run with this outcome comes by, on a server and with an engine of that generation."""
    steps = EVERY_RUN | ({"submitting"} if major == 3 else set()) | ({"go"} if warm else set())  # 2.x does not submit
    if outcome == "crashes":
        return steps | REPORTED_BY_US
    if outcome == "is cancelled":
        # An engine of 3.8 is asked, and reports the end and runs the hooks itself.
        return steps | STOPPED | ({"others ended"} if major == 3 else REPORTED_BY_US)
    return steps


def failpoints_of(outcome: str, major: int, *, warm: bool = True) -> list[str]:
    """The failpoints that a run with this outcome comes by, in order."""
    steps = steps_of(outcome, major, warm=warm)
    return [name for name in FAILPOINTS if name.partition(" ")[2] in steps]


def agent_sees_it_alive(failpoint: str) -> bool:
    """Whether a run that waits to be let go lives when the agent that died there comes back."""
    return STEPS.index("spawn") <= STEPS.index(failpoint.partition(" ")[2]) <= STEPS.index("pid")


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
        warm: bool = False,
        limit: int | None = None,
        hooks_owed: int = 1,
    ) -> None:
        """`warm`: its runs start as copies. `hooks_owed`: 0 where an agent is killed that may have begun one."""
        self.server, self.api, self.where, self.real = server, api, where, real
        self._hooks_owed = hooks_owed
        self.tally = Tally()
        self.agent = AgentProcess("")
        home = self.agent.home
        self.trace, self.hooks, self.go = home / "trace", home / "hooks", home / "go"
        self.ends: dict[str, str] = {}  # run id -> outcome
        self._cancelled: set[str] = set()
        self._ended: set[str] = set()
        self._pool = api.create_pool()
        self._deployments: dict[str, str] = {}
        flows: dict[str, Any] = {"grace_seconds": 5, "start": "warm" if warm else "cold"}
        if not real:
            flows["python"] = self._scripted_engine(home)
        poll = {"interval_seconds": 0.2, "cancel_interval_seconds": 0.2, "heartbeat_seconds": 600, "jitter": 0}
        self.agent.write_config(
            config_for(server, [{"pool": self._pool}], poll=poll, flows=flows, agent={"limit": limit})
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
        agent.kill_fork_servers()
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

    def start_ready(self, failpoint: str | None = None) -> None:
        """Starts the agent, and waits until it says that it is at work; armed, it may die before."""
        ready = len(self.agent.notify.lines("READY"))
        self.start(failpoint)
        wait_until(lambda: len(self.agent.notify.lines("READY")) > ready or self.dead, LONGEST, "the agent is ready")

    def kill(self) -> None:
        """SIGKILL, from outside."""
        if self.dead:
            self.find("bug", f"the agent died by itself: {self.agent.returncode}", self.agent.log()[-6000:])
        self.agent.kill()
        self.tally.kills += 1

    def note_death(self) -> None:
        """The agent has died at its failpoint."""
        self.tally.kills += 1
        if self.agent.returncode != -signal.SIGKILL:
            self.find("bug", f"the agent ended with {self.agent.returncode}", self.agent.log()[-6000:])

    def cancel_those_that_run(self) -> bool:
        """Sets CANCELLING, once, for the runs that are to be cancelled and whose body has begun. Returns whether all are."""
        begun = executions(self.trace)
        wanted = {run_id for run_id, outcome in self.ends.items() if outcome == "is cancelled"}
        for run_id in (wanted & begun.keys()) - self._cancelled:
            self._cancelled.add(run_id)
            self.api.cancel(run_id)
        return wanted <= self._cancelled

    def open_runs(self) -> set[str]:
        """Those that have not yet been seen in the state in which they should end."""
        asked = sorted(self.ends.keys() - self._ended)[:200]
        found = (
            self.api.post("/flow_runs/filter", {"flow_runs": {"id": {"any_": asked}}, "limit": 200}) if asked else []
        )
        self._ended |= {run["id"] for run in found if run["state_type"] == ENDS[self.ends[run["id"]]]}
        return self.ends.keys() - self._ended

    def story(self, run_id: str) -> str:
        """What the server and the agent say of the run, for a finding."""
        return f"{self.api.story(run_id)}\ntrace: {lines(self.trace)}\nagent:\n{self.agent.log()[-6000:]}"

    def top_up(self, load: int, dice: random.Random) -> bool:
        """Makes so many short runs of all outcomes that `load` are open. Returns whether any had ended."""
        wanted = load - len(self.open_runs())
        for _ in range(wanted):
            self.create_run(dice.choice(list(ENDS)), seconds=round(dice.uniform(0, 1.5), 2))
        return wanted > 0

    def pass_time(self, seconds: float) -> None:
        """Lets that much time go by for the runs."""
        until = time.monotonic() + seconds

        def passed() -> bool:
            self.cancel_those_that_run()
            return time.monotonic() >= until

        wait_until(passed, seconds + LONGEST, "a moment")

    def wait_for_all(self) -> None:
        """Returns when every run has ended as it should."""
        wait_until(
            lambda: self.cancel_those_that_run() and not self.open_runs(), LONGEST * 5, "all runs end", every=0.3
        )

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
        for run_id, outcome in self.ends.items():
            states = self.api.states(run_id)
            for kind, what in (
                *check_history(states, ENDS[outcome]),
                *check_trace(self.trace, run_id),
                *check_hooks(self.hooks, run_id, outcome, at_least=self._hooks_owed),
                *check_processes(run_id),
            ):
                self.find(kind, f"run {run_id} {outcome}: {what}", self.story(run_id))
        for process in self.agent.fork_servers():
            self.find("stray", f"the fork server {process.pid} is left", self.agent.log()[-6000:])
        for kind, what in check_log(self.agent.log()):
            self.find(kind, what, self.agent.log()[-6000:])
        left = [path.name for path in (self.agent.state_dir / "runs").glob("*")]
        if left:
            self.find("stray", f"private directories are left: {left}", self.agent.log()[-6000:])


# --- the three ways to kill --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One agent that dies at one failpoint over one run.

    `held`: the run outlives it where it can. `twice`: so does the next agent if it comes by there, too. `warm`: the run starts
    as a copy of a fork server.
    """

    failpoint: str
    outcome: str
    held: bool = False
    real: bool = False
    twice: bool = False
    warm: bool = False

    def __str__(self) -> str:
        also = {"held": self.held, "real engine": self.real, "twice": self.twice, "warm": self.warm}
        return ", ".join([self.failpoint, self.outcome, *(word for word, is_so in also.items() if is_so)])


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
    hooks_owed = 0 if case.failpoint.endswith(" hook") else 1
    scene = Scene(server, api, f"{case} on {server.version}", real=case.real, warm=case.warm, hooks_owed=hooks_owed)
    longest = LONGEST * 3 if case.real else LONGEST

    def deeds() -> None:
        run_id = scene.create_run(case.outcome, held=case.held)
        if not (case.held and agent_sees_it_alive(case.failpoint)):
            scene.let_go()
        scene.start(case.failpoint)

        def died() -> bool:
            scene.cancel_those_that_run()
            return scene.dead

        def ended() -> bool:
            return scene.cancel_those_that_run() and scene.api.state(run_id) == ENDS[case.outcome]

        wait_until(died, longest, "the agent dies there")
        scene.note_death()
        if case.twice:
            scene.start_ready(case.failpoint)
            wait_until(lambda: died() or ended(), longest, f"the agent dies there again, or the run {case.outcome}")
            if not scene.dead:
                scene.agent.stop()  # may well die there on its last steps
            if scene.agent.returncode != 0:
                scene.note_death()
        said = len(scene.agent.log())
        scene.start_ready()
        if not scene.go.exists():
            wait_until(
                lambda: re.search("going on with it|started, process", scene.agent.log()[said:]), longest, "it goes on"
            )
            scene.let_go()
        wait_until(ended, longest, f"the run {case.outcome}")
        scene.stop()
        if case.warm and not case.real and re.search(r"started, process \d+$", scene.agent.log(), re.MULTILINE):
            scene.find("harness", "it has started cold", scene.story(run_id))

    return judged(scene, deeds)


def kill_at_random(
    seed: int,
    kills: int,
    server: PrefectServer,
    api: Api,
    *,
    warm: bool = False,
    load: int = 20,
    say: Callable[[str], None] = print,
    enough: Callable[[], bool] = lambda: False,
) -> Tally:
    """Kills the agent at random moments while up to `load` short runs of all outcomes are open. No more once it is `enough`."""
    dice = random.Random(seed)
    where = f"random kills, seed {seed}, on {server.version}"
    scene = Scene(server, api, where, warm=warm, limit=load, hooks_owed=0)

    def deeds() -> None:
        said, longest = time.monotonic(), 1.2
        for done in range(kills):
            if enough():
                break
            # A busy machine needs longer to get anywhere at all.
            longest = max(1.2, longest * 0.9) if scene.top_up(load, dice) else min(8.0, longest * 1.3)
            if dice.random() < 0.9:
                scene.start_ready()
            else:  # it may well die before it has begun
                scene.start()
            scene.pass_time(dice.uniform(0, longest))
            scene.kill()
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{done + 1} of {kills} random kills, {len(scene.ends)} runs")
        scene.start()
        scene.wait_for_all()
        scene.stop()

    return judged(scene, deeds)


def signal_fork_server(agent: AgentProcess, signum: int) -> None:
    """Signals the one there is; a copy that has not yet become a run looks the same, and is younger."""
    for process in sorted(agent.fork_servers(), key=lambda process: process.create_time())[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def harm_fork_servers(
    seed: int,
    deeds_wanted: Sequence[str],
    server: PrefectServer,
    api: Api,
    *,
    load: int = 5,
    enough: Callable[[], bool] = lambda: False,
) -> Tally:
    """Does these deeds to the fork server, or its agent, at random moments under up to `load` short runs of all outcomes.

    "kill" and "stop" (SIGSTOP: it hangs) a fork server, "hang" it until that is noticed, have the next ones "fail" to begin or
    "mend" that, "kill agent". Each counts as a kill.
    """
    dice = random.Random(seed)
    scene = Scene(
        server, api, f"harm to fork servers, seed {seed}, on {server.version}", warm=True, limit=load, hooks_owed=0
    )
    refuses = scene.agent.home / "refuses"

    signal_it = partial(signal_fork_server, scene.agent)

    def is_ready() -> bool:
        return any(f"by process {process.pid}\n" in scene.agent.log() for process in scene.agent.fork_servers())

    def hang() -> None:
        wait_until(is_ready, LONGEST, "a fork server is ready")
        noticed = scene.agent.log().count("a run starts cold: no copy")
        signal_it(signal.SIGSTOP)
        scene.create_run("completes")
        wait_until(
            lambda: scene.cancel_those_that_run() and scene.agent.log().count("a run starts cold: no copy") > noticed,
            LONGEST,
            "the next run notices that it hangs",
        )

    def fail() -> None:
        refuses.touch()
        signal_it(signal.SIGKILL)

    def kill_agent() -> None:
        scene.kill()
        signal_it(signal.SIGCONT)  # one that does not even run cannot end
        wait_until(lambda: not scene.agent.fork_servers(), LONGEST, "fork servers end with their agent")
        scene.start_ready()

    possible: dict[str, Callable[[], object]] = {
        "kill": lambda: signal_it(signal.SIGKILL),
        "stop": lambda: signal_it(signal.SIGSTOP),
        "hang": hang,
        "fail": fail,
        "mend": lambda: refuses.unlink(missing_ok=True),
        "kill agent": kill_agent,
    }

    def deeds() -> None:
        scene.start_ready()
        scene.agent.wait_for_log("warm starts with", LONGEST)
        for deed in deeds_wanted:
            if enough():
                break
            scene.top_up(load, dice)
            scene.pass_time(dice.uniform(0, 1.5))
            possible[deed]()
            scene.tally.kills += deed != "kill agent"  # which counts itself
        scene.top_up(load, dice)
        scene.wait_for_all()
        scene.stop()
        if "(warm)" not in scene.agent.log():
            scene.find("harness", "no run has started warm", scene.agent.log()[-6000:])

    return judged(scene, deeds)


def kill_around_long_runs(
    server: PrefectServer, api: Api, *, kills: int = 10, seed: int = 0, real: bool = True, warm: bool = False
) -> Tally:
    """Kills the agent again and again while two runs go on, and checks that each is the same process throughout.

    Then one is cancelled, and the other completes.
    """
    dice = random.Random(seed)
    how = "warm" if warm else "cold"
    scene = Scene(server, api, f"{kills} kills around long {how} runs on {server.version}", real=real, warm=warm)

    def processes() -> dict[str, tuple[int, float]]:
        """Run id -> pid and start of the process that executes its body; nothing for those that are gone."""
        pids = {int(pid): run_id for run_id, pid in map(str.split, lines(scene.trace))}
        alive = {process.pid: process.create_time() for process in processes_with(RUN_MARK)}
        return {run_id: (pid, alive[pid]) for pid, run_id in pids.items() if pid in alive}

    def deeds() -> None:
        runs = [scene.create_run(outcome, held=True) for outcome in ("completes", "is cancelled")]
        scene.start()
        wait_until(lambda: len(lines(scene.trace)) == len(runs), LONGEST * 3, "the bodies have begun")
        before = processes()
        assert before.keys() == set(runs), "the runs do not run"
        for _ in range(kills):
            adopted = scene.agent.log().count("going on with it") + len(runs)
            scene.kill()
            scene.start()
            wait_until(
                lambda adopted=adopted: scene.agent.log().count("going on with it") == adopted,  # type: ignore[misc]
                LONGEST,
                "the runs are adopted",
            )
            until = time.monotonic() + dice.uniform(0, 0.5)
            wait_until(lambda until=until: time.monotonic() >= until, 1, "a moment")  # type: ignore[misc]
            if processes() != before:
                scene.find("doubled", f"the processes were {before} and are {processes()}", scene.story(runs[0]))
            for run_id in runs:
                if (state := scene.api.state(run_id)) != "RUNNING":
                    scene.find("lost", f"run {run_id} is {state} while it runs", scene.story(run_id))
        scene.let_go()
        wait_until(lambda: scene.cancel_those_that_run() and not scene.open_runs(), LONGEST, "both runs end")
        scene.stop()

    return judged(scene, deeds)
