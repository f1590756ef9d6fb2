"""A new configuration for an agent that runs: what of it counts, who is told, and what a bad one changes: nothing."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from supervisor.config import Agent, Api, Config, Credentials, Flows, Output, Poll, Stop, Work
from supervisor.config.keys import KEYS
from supervisor.config.reload import RELOAD, How, compare
from supervisor.errors import ConfigError, InterpreterError
from supervisor.logs import OutputKeeper
from supervisor.process.interpreter import Interpreter
from supervisor.runs import reload as reload_room
from supervisor.runs.canceller import Canceller
from supervisor.runs.health import ServerHealth
from supervisor.runs.heartbeat import Heartbeat
from supervisor.runs.pollers import Pollers
from supervisor.runs.reload import Reload
from supervisor.runs.roster import Roster
from supervisor.runs.sources import Source
from supervisor.systemd.notify import Notifier
from tests.agents import NotifySocket
from tests.fakes import FakeBackend, QuietPulse, QuietTeller, lives, offer, on_jumping_clock, poller_of, roster_of, work

TOP = Path(__file__).parent.parent
PYTHON = Path("/nowhere/python")


def configuration(*tables: Work, **agent: Any) -> Config:
    return Config(
        agent=Agent(**{"name": "a", "state_dir": Path("/s"), "log_dir": Path("/s/logs"), **agent}),
        api=Api(url="http://server/api"),
        poll=Poll(),
        flows=Flows(python=PYTHON),
        output=Output(),
        stop=Stop(),
        work=tables or (work(pool="p"),),
        path=Path("/etc/agent.toml"),
    )


def with_key(config: Config, section: str, key: str, value: object) -> Config:
    """The configuration with one value of [section] changed, in every [[work]] table too where that belongs to flows."""
    changed: dict[str, Any] = {section: msgspec.structs.replace(getattr(config, section), **{key: value})}
    if section == "flows":
        tables = (msgspec.structs.replace(one, flows=changed["flows"]) for one in config.work)
        changed["work"] = tuple(tables)
    return msgspec.structs.replace(config, **changed)


# --- which keys -------------------------------------------------------------------------------------------------------


def test_every_key_of_the_configuration_says_when_a_new_value_counts() -> None:
    assert {section: set(keys) for section, keys in RELOAD.items()} == {
        section: set(keys) for section, keys in KEYS.items()
    }


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section in KEYS if section != "work" for key in KEYS[section]]
)
def test_a_new_value_is_taken_or_named_as_needing_a_restart_and_left_as_it_was(section: str, key: str) -> None:
    old = configuration()
    new = with_key(old, section, key, "another")
    change = compare(old, new)
    if RELOAD[section][key] is How.RESTART:
        assert (change.taken, change.needs_restart, change.config) == ((), (f"{section}.{key}",), old)
    else:
        assert (change.taken, change.needs_restart, change.config) == ((f"{section}.{key}",), (), new)


def test_the_key_to_another_server_is_not_shown_to_the_one_of_today() -> None:
    old = configuration()
    new = with_key(with_key(old, "api", "url", "http://other/api"), "api", "api_key_file", Path("/key"))
    change = compare(old, new)
    assert (change.taken, change.needs_restart) == ((), ("api.url", "api.api_key_file"))
    assert change.config == old


def test_the_page_names_every_key_that_needs_a_restart_and_no_other() -> None:
    page = (TOP / "docs" / "configuration.md").read_text().partition("\n## Reload\n")[2].partition("\n## ")[0]
    sentence = page[page.index("need a restart") :].partition("\n\n")[0]
    wanted = {f"{section}.{key}" for section, keys in RELOAD.items() for key in keys if keys[key] is How.RESTART}
    assert set(re.findall(r"`(\w+\.\w+)`", sentence)) == wanted


def test_tables_that_come_go_and_change_are_named_by_what_they_take_and_without_their_values() -> None:
    stays, goes = work(pool="stays", limit=1), work(pool="goes")
    wider = msgspec.structs.replace(
        stays, limit=2, flows=Flows(python=PYTHON, env={"TOKEN": "secret"}, grace_seconds=5.0)
    )
    change = compare(configuration(stays, goes), configuration(work(queues=("new",)), wider))
    assert change.taken == (
        "[[work]] queue 'new' added",
        "[[work]] pool 'goes' removed",
        "[[work]] pool 'stays': limit, env, grace_seconds",
    )
    assert change.config.work == (work(queues=("new",)), wider)


def test_two_tables_of_one_name_are_told_apart_by_their_order() -> None:
    one, other = work(pool="p", limit=1), work(pool="p", limit=2)
    assert compare(configuration(one, other), configuration(one)).taken == ("[[work]] pool 'p' removed",)
    assert compare(configuration(one, other), configuration(one, other)).taken == ()


# --- the reload -------------------------------------------------------------------------------------------------------


class Scene:
    """A `Reload` with a manager that listens; `read` is what reading comes to, and may be another for every call."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.reads = 0
        self.read: Callable[[], Config] = lambda: config
        self.applied: list[tuple[Config, Credentials | None]] = []
        self.manager = NotifySocket()
        self.without_prefect: set[Path] = set()
        self.notifier = Notifier(self.manager.address)
        self.reload = Reload(config, self._read, self, self.notifier)  # type: ignore[arg-type]

    def _read(self) -> Config:
        self.reads += 1
        return self.read()

    async def get(self, python: Path) -> Interpreter:
        """As `Interpreters.get`."""
        if python in self.without_prefect:
            raise InterpreterError(f"'{python}' has no Prefect")
        return Interpreter(python, "3.8.8")

    def apply(self, config: Config, secrets: Credentials | None) -> None:
        self.applied.append((config, secrets))

    def play(self, story: Callable[[], Any]) -> None:
        """Runs the story while the service runs, on the clock of this world: files are read in a thread."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.reload.run, self.apply, lambda: f"idle; {self.reload.describe()}")
                await trio.testing.wait_all_tasks_blocked()
                with trio.fail_after(30):
                    await story()
                nursery.cancel_scope.cancel()

        trio.run(main)

    async def reloaded(self, times: int = 1) -> None:
        """Until the manager has heard that often that a reload is over."""
        while len(self.manager.lines("READY")) < times:
            await trio.sleep(0.01)

    def close(self) -> None:
        self.notifier.close()
        self.manager.close()


@pytest.fixture
def scene(caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    caplog.set_level(logging.DEBUG)
    made = Scene(configuration())
    yield made
    made.close()


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level and record.name == "flow-agent"]


def test_the_manager_hears_when_a_reload_begins_and_when_it_is_over(scene: Scene) -> None:
    before = time.monotonic_ns() // 1000

    async def story() -> None:
        scene.reload.ask()
        await scene.reloaded()

    scene.play(story)
    begun, over = [message.splitlines() for message in scene.manager.messages]
    assert (begun[0], over) == ("RELOADING=1", ["READY=1", "STATUS=idle;"])
    assert before <= int(begun[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_another_configuration_is_handed_on_and_the_keys_of_it_named(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    new = configuration(limit=4, name="b")
    scene.read = lambda: new

    async def story() -> None:
        scene.reload.ask()
        await scene.reloaded()
        scene.read = lambda: msgspec.structs.replace(scene.config, agent=scene.reload.config.agent)
        scene.reload.ask()
        await scene.reloaded(2)

    scene.play(story)
    in_force = configuration(limit=4)
    assert [config for config, _ in scene.applied] == [in_force, in_force]
    assert scene.reload.config == in_force
    assert messages(caplog, logging.INFO) == [
        "reloaded /etc/agent.toml: agent.limit",
        "reloaded /etc/agent.toml: nothing has changed",
    ]
    assert messages(caplog, logging.WARNING) == [
        "reloaded; these need a restart, and stay as they were: agent.name",
    ]
    assert scene.manager.lines("STATUS") == ["idle; a restart is needed for agent.name", "idle;"]


@pytest.mark.parametrize("mistakes", [("/etc/agent.toml:3: no such key", "FLOW_AGENT_X: unknown"), ("other: broken",)])
def test_a_bad_configuration_changes_nothing_and_is_told_until_a_good_one_comes(
    scene: Scene, caplog: pytest.LogCaptureFixture, mistakes: tuple[str, ...]
) -> None:
    def bad() -> Config:
        raise ConfigError(*mistakes)

    async def story() -> None:
        scene.read = bad
        scene.reload.ask()
        await scene.reloaded()
        assert (scene.applied, scene.reload.config) == ([], scene.config)
        scene.read = lambda: configuration(limit=2)
        scene.reload.ask()
        await scene.reloaded(2)

    scene.play(story)
    assert messages(caplog, logging.ERROR) == [f"cannot reload: {mistake}" for mistake in mistakes]
    assert scene.reload.config.agent.limit == 2
    first = "agent.toml:3: no such key (and 1 more)" if len(mistakes) > 1 else "other: broken"
    assert scene.manager.lines("STATUS") == [f"idle; reload refused: {first}", "idle;"]


def test_a_python_for_flows_that_has_no_prefect_is_refused_also_beside_a_good_one(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    tables = [work(pool="p")]
    for name in "bcd":
        flows = Flows(python=Path(f"/{name}"), command=("true",) if name == "d" else None)
        tables.append(Work(flows=flows, pool=name))
    scene.without_prefect = {Path("/b"), Path("/c"), Path("/d")}
    scene.read = lambda: configuration(*tables)

    async def story() -> None:
        scene.reload.ask()
        await scene.reloaded()

    scene.play(story)
    assert messages(caplog, logging.ERROR) == [f"cannot reload: '/{name}' has no Prefect" for name in "bc"]
    assert scene.applied == []


def test_a_key_file_that_holds_no_usable_key_refuses_the_reload(scene: Scene, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("good")
    new = with_key(scene.config, "api", "api_key_file", key)
    scene.read = lambda: new

    async def story() -> None:
        scene.reload.ask()
        await scene.reloaded()
        scene.read = lambda: with_key(new, "api", "url", "http://other/api")
        scene.reload.ask()
        await scene.reloaded(2)
        key.write_text("two\nlines")
        scene.reload.ask()
        await scene.reloaded(3)

    scene.play(story)
    assert scene.applied == [(new, Credentials(api_key="good")), (new, None)], "never to the server that is left"
    assert "one line of text is wanted" in scene.manager.lines("STATUS")[-1]
    assert "two" not in scene.manager.lines("STATUS")[-1]


def test_signals_that_come_together_are_one_reload_and_one_that_comes_late_is_another(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slowly() -> Config:
        reading.set()
        assert go_on.wait(10)
        return scene.config

    async def story() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(reload_room, "SETTLE_SECONDS", 1.0)  # no slow machine makes two reloads of it
            for _ in range(3):
                scene.reload.ask()
                await trio.testing.wait_all_tasks_blocked()
        await scene.reloaded()
        await trio.sleep(reload_room.SETTLE_SECONDS * 3)  # in which another would be read
        assert scene.reads == 1
        scene.read = slowly
        scene.reload.ask()
        await trio.to_thread.run_sync(reading.wait, 10)
        for _ in range(3):  # what it reads now may be older than what these are about
            scene.reload.ask()
        go_on.set()
        await scene.reloaded(3)
        await trio.sleep(reload_room.SETTLE_SECONDS * 3)

    scene.play(story)
    assert scene.reads == 3
    assert [message.partition("=")[0] for message in scene.manager.messages] == ["RELOADING", "READY"] * 3


def test_a_file_that_cannot_be_read_in_time_and_a_bug_of_ours_refuse_the_reload(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reload_room, "READ_SECONDS", 0.2)
    go_on = threading.Event()

    def hangs() -> Config:
        go_on.wait(10)
        raise RuntimeError

    async def story() -> None:
        scene.read = hangs
        scene.reload.ask()
        await scene.reloaded()
        scene.reload.ask()
        await scene.reloaded(2)
        go_on.set()
        scene.reload.ask()
        await scene.reloaded(3)

    scene.play(story)
    assert scene.manager.lines("STATUS") == [
        "idle; reload refused: agent.toml: cannot read it within 0.2 s",
        "idle; reload refused: agent.toml: cannot read it within 0.2 s",
        "idle; reload refused: internal error; see the log",
    ]
    assert scene.reads == 2, "no second read beside one that hangs"
    assert scene.applied == []


def test_an_agent_that_stops_does_not_reload_and_says_so(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def nothing() -> None:
        pass

    scene.play(nothing)
    scene.reload.ask()
    [said] = messages(caplog, logging.WARNING)
    assert said.startswith("cannot reload the configuration: ")
    assert (scene.reads, scene.manager.messages) == (0, [])


# --- who is told ------------------------------------------------------------------------------------------------------


def polls(backend: FakeBackend) -> list[str]:
    """The pools that were asked for runs since the last call."""
    asked = [about[0] for called, about in backend.calls if called == "due_in_pool"]
    backend.calls.clear()
    return asked


def pollers_of(tables: list[Work], backend: FakeBackend, roster: Roster) -> Pollers:
    return Pollers(tables, lambda one: poller_of(Source(one, backend), roster, interval_seconds=10.0))


POLL = Poll(jitter=0.0, interval_seconds=10.0)


@on_jumping_clock
async def test_pollers_come_and_go_with_their_tables_and_those_that_stay_are_not_disturbed() -> None:
    backend, roster = FakeBackend(), roster_of(None, lives(1))
    pollers = pollers_of([work(pool="stays"), work(pool="goes")], backend, roster)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(pollers.run)
        await trio.sleep(5)
        assert sorted(polls(backend)) == ["goes", "stays"]
        pollers.use([work(pool="comes"), work(pool="stays")], POLL, 10.0)
        assert [str(source) for source in pollers.sources] == ["pool 'comes'", "pool 'stays'"]
        await trio.sleep(1)
        assert polls(backend) == ["comes"]
        await trio.sleep(5)
        assert polls(backend) == ["stays"], "in its old rhythm"
        await trio.sleep(100)
        assert set(polls(backend)) == {"comes", "stays"}
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_table_with_other_flows_goes_on_with_its_poller_and_gives_them_to_new_runs() -> None:
    backend, roster = FakeBackend(offer()), roster_of(None, lives(1000))
    pollers = pollers_of([work(pool="p")], backend, roster)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(pollers.run)
        await trio.sleep(5)
        [source] = pollers.sources
        other = msgspec.structs.replace(work(pool="p"), flows=Flows(python=Path("/other")))
        pollers.use([other], POLL, 10.0)
        assert pollers.sources == [source]
        roster.admit(offer("r2"), source)
        assert [run.work.flows.python for run in roster.all()] == [PYTHON, Path("/other")]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_tables_may_come_and_go_while_each_is_asked_once() -> None:
    backend, roster = FakeBackend(), roster_of(None, lives(1))
    backend.delay = 1.0
    pollers = pollers_of([work(pool="stays"), work(pool="goes")], backend, roster)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pollers.poll_once)
        await trio.sleep(2)
        pollers.use([work(pool="stays"), work(pool="comes")], POLL, 10.0)
    assert polls(backend) == ["stays", "goes"]


@on_jumping_clock
async def test_a_poller_whose_table_is_gone_is_never_late() -> None:
    backend, roster = FakeBackend(), roster_of(None, lives(1))
    poller = poller_of(Source(work(pool="p"), backend), roster)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(poller.run)
        await trio.sleep(1)
        assert poller._pulse.within is not None  # type: ignore[attr-defined]
        poller.end()
    assert poller._pulse.within is None  # type: ignore[attr-defined]


@on_jumping_clock
async def test_a_shorter_interval_counts_at_once_and_not_after_the_long_one() -> None:
    backend, roster = FakeBackend(offer()), roster_of(None, lives(100_000))
    slow = Poll(jitter=0.0, interval_seconds=3600, cancel_interval_seconds=3600, heartbeat_seconds=3600)
    fast = Poll(jitter=0.0, interval_seconds=5, cancel_interval_seconds=5, heartbeat_seconds=5)
    source, health = Source(work(pool="p"), backend), ServerHealth("u")
    pollers = Pollers([work(pool="p")], lambda _: poller_of(source, roster, interval_seconds=3600))
    canceller = Canceller(backend, roster, health, QuietPulse(), poll=slow, turn_seconds=9)  # type: ignore[arg-type]
    heartbeat = Heartbeat(backend, [source], QuietTeller(), health, worker="w", poll=slow)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        for service in (pollers.run, canceller.run, heartbeat.run):
            nursery.start_soon(service)
        await trio.sleep(100)  # the run that was begun is no news any more
        backend.calls.clear()
        pollers.use([work(pool="p")], fast, 10.0)
        canceller.use(fast, 9)
        heartbeat.use([source], fast)
        await trio.sleep(12)
        assert [backend.count(call) for call in ("due_in_pool", "cancelling", "heartbeat")] == [3, 3, 3]
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_limit_below_the_live_runs_lets_no_new_ones_in_until_enough_have_ended() -> None:
    source = Source(work(pool="p"), FakeBackend())
    seconds = {"r0": 10.0, "r1": 20.0, "r2": 30.0}
    roster = roster_of(3, lambda offered, source: lives(seconds.get(offered.id, 5.0))(offered, source))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        assert all(roster.admit(offer(f"r{n}"), source) for n in range(3))
        roster.use(1)
        assert roster.describe() == "3 running, 0 free"
        await trio.sleep(25)
        assert len(roster) == 1
        assert not roster.admit(offer("r3"), source)
        await trio.sleep(10)
        assert roster.admit(offer("r3"), source)
        roster.use(None)
        assert roster.admit(offer("r4"), source)


@on_jumping_clock
async def test_a_raised_limit_is_used_without_waiting_for_the_next_poll() -> None:
    backend = FakeBackend(offer("r1"), offer("r2"))
    roster = roster_of(1, lives(10_000))
    pollers = Pollers([work(pool="p")], lambda one: poller_of(Source(one, backend), roster, interval_seconds=3600))
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        nursery.start_soon(pollers.run)
        await trio.sleep(10)
        assert len(roster) == 1
        roster.use(2)
        await trio.sleep(10)
        assert len(roster) == 2
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_live_runs_count_in_the_limit_of_what_has_become_of_their_table_and_in_no_other() -> None:
    backend = FakeBackend()
    roster = roster_of(10, lives(100))
    pollers = pollers_of([work(pool="p"), work(pool="q")], backend, roster)
    async with trio.open_nursery() as nursery:
        roster.open(nursery)
        one, other = pollers.sources
        assert all(roster.admit(offer(f"p{n}"), one) for n in range(2))
        assert all(roster.admit(offer(f"q{n}"), other) for n in range(2))
        pollers.use([work(pool="p", limit=3)], POLL, 10.0)
        assert roster.free(pollers.sources[0].work) == 1
        assert roster.free() == 6, "runs of the table that is gone still take slots"
        nursery.cancel_scope.cancel()


@on_jumping_clock
async def test_a_pool_that_is_no_longer_served_hears_a_good_bye_and_one_whose_table_changed_does_not() -> None:
    backend, teller = FakeBackend(), QuietTeller()
    stays, goes = Source(work(pool="stays"), backend), Source(work(pool="goes"), backend)
    for source in (stays, goes):
        await source.due(before=offer_time(), limit=1)
    heartbeat = Heartbeat(backend, [stays, goes], teller, ServerHealth("u"), worker="w", poll=POLL)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heartbeat.run)
        await trio.sleep(1)
        again = Source(work(pool="stays", queues=("q",)), backend)  # not read yet
        heartbeat.use([again], POLL)
        await trio.sleep(1)
        assert [about for call, about in backend.calls if call == "sign_off"] == ["goes"]
        await again.due(before=offer_time(), limit=1)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    await heartbeat.sign_off()
    assert [about for call, about in backend.calls if call == "sign_off"] == ["goes", "stays"]
    assert teller.events == [("started", "stays"), ("started", "goes"), ("stopped", "goes"), ("stopped", "stays")]


def offer_time() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC)


def test_the_output_of_a_live_run_is_treated_as_when_it_began(tmp_path: Path) -> None:
    shown: list[str] = []

    async def show(lines: list[str], offset: int) -> None:
        shown.extend(lines)

    async def run(keeper: OutputKeeper, run_id: str, change: Output) -> None:
        await keeper.prepare(run_id)
        keeper.path(run_id).write_text("secret\n" * 400_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.watch, run_id, 0, show)
            await trio.testing.wait_all_tasks_blocked()
            keeper.use(change)
            nursery.cancel_scope.cancel()
        await keeper.finish(run_id, 0, show)

    keeper = OutputKeeper(tmp_path, Output(show=False, max_mb=4.0))
    trio.run(run, keeper, "one", Output(show=True, max_mb=1.0))
    assert not shown
    assert keeper.path("one").stat().st_size == 2_800_000
    trio.run(run, keeper, "two", Output(show=False))
    assert shown
    assert keeper.path("two").stat().st_size < 1_100_000
