"""supervisor/process/channel.py: the framing on memory streams and a jumping clock, the listener on a real socket."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor.lifecycle import Exit
from supervisor.process.channel import TOKEN_TIMEOUT, ControlChannel, Intent, Receipt, Session
from supervisor.process.environ import flow_environ
from supervisor.process.launch import launch
from supervisor.process.stop import end
from tests.servers import Api, PrefectServer

HELLO_2 = b"\x00PF\x02\x01"
STATE = {"disposition": "STATE_REPORTED", "state_id": "s", "state_type": "COMPLETED", "state_name": "Completed"}


def receipt(payload: object) -> bytes:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return b"\x01" + struct.pack("!I", len(raw)) + raw


class Talk:
    """One connection: `engine` is the far end, driven by the test."""

    def __init__(self, channel: ControlChannel, nursery: trio.Nursery) -> None:
        self.channel = channel
        self.session = channel.expect()
        channel.port = 1  # what a listener would have set: `environ` is empty without
        self.token = self.session.environ["PREFECT__CONTROL_TOKEN"].encode() + b"\n"
        self.engine, ours = trio.testing.memory_stream_pair()
        self.done = trio.Event()

        async def handle() -> None:
            await channel.handle(ours)
            self.done.set()

        nursery.start_soon(handle)

    async def connect(self) -> None:
        await self.engine.send_all(self.token)
        await self.session.wait_connected()

    async def hears(self, expected: bytes) -> None:
        heard = b""
        with trio.fail_after(60):
            while len(heard) < len(expected):
                heard += await self.engine.receive_some(len(expected) - len(heard))
        assert heard == expected

    async def is_dropped(self) -> None:
        with trio.fail_after(60):
            assert await self.engine.receive_some() == b""
            await self.done.wait()


def talk(script: Callable[[Talk], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await script(Talk(ControlChannel(), nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("intent", list(Intent))
def test_an_intent_that_the_engine_takes_is_agreed(intent: Intent) -> None:
    async def script(t: Talk) -> None:
        await t.connect()

        async def engine() -> None:
            await t.hears(intent.value)
            await t.engine.send_all(b"a")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine)
            assert await t.session.ask(intent)
        assert await t.session.ask(intent)  # said once, true for good
        assert not t.session.connected
        await t.is_dropped()

    talk(script)


def test_an_engine_that_does_not_answer_is_waited_for_one_second() -> None:
    async def script(t: Talk) -> None:
        await t.connect()
        before = trio.current_time()
        assert not await t.session.ask(Intent.CANCEL)
        assert trio.current_time() - before == pytest.approx(1.0)
        await t.hears(b"c")
        await t.engine.send_all(b"a")  # too late for the first question, in time for the second
        assert await t.session.ask(Intent.CANCEL)

    talk(script)


def test_an_engine_that_hangs_up_on_an_unknown_intent_is_answered_at_once() -> None:
    async def script(t: Talk) -> None:
        await t.connect()

        async def engine() -> None:
            await t.hears(b"r")
            await t.engine.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine)
            before = trio.current_time()
            assert not await t.session.ask(Intent.RESCHEDULE)
            assert trio.current_time() == before

    talk(script)


def test_nobody_connected_means_no_at_once() -> None:
    async def script(t: Talk) -> None:
        before = trio.current_time()
        assert not t.session.connected
        assert not await t.session.ask(Intent.CANCEL)
        assert trio.current_time() == before

    talk(script)


@pytest.mark.parametrize(
    ("greeting", "answer"),
    [
        (HELLO_2, b"\x00PF\x02\x01"),
        (b"\x00PF\x03\x03", b"\x00PF\x02\x01"),  # newer than we are
        (b"\x00PF\x02\x00", b"\x00PF\x01\x00"),  # version 2 without receipts
        (b"\x00PF\x01\x00", b"\x00PF\x01\x00"),
    ],
)
def test_version_2_is_spoken_with_those_who_offer_it(greeting: bytes, answer: bytes) -> None:
    async def script(t: Talk) -> None:
        await t.engine.send_all(t.token + greeting)  # in one piece, as it may well arrive
        await t.hears(answer)

    talk(script)


def test_every_byte_may_arrive_alone() -> None:
    async def script(t: Talk) -> None:
        for byte in t.token + HELLO_2 + receipt(STATE):
            await t.engine.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        await t.hears(b"\x00PF\x02\x01\x02")
        assert t.session.receipt is not None
        assert t.session.receipt.state_type == "COMPLETED"

    talk(script)


def test_receipts_are_noted_and_kept_after_the_end() -> None:
    async def script(t: Talk) -> None:
        await t.engine.send_all(t.token + HELLO_2 + receipt({"disposition": "ORCHESTRATION_ABORTED"}))
        await t.hears(b"\x00PF\x02\x01\x02")
        await t.is_dropped()
        assert t.session.receipt == Receipt(disposition="ORCHESTRATION_ABORTED")
        assert not await t.session.ask(Intent.CANCEL)

    talk(script)


def test_a_receipt_in_place_of_an_answer_means_that_the_intent_came_too_late() -> None:
    async def script(t: Talk) -> None:
        await t.connect()
        await t.engine.send_all(HELLO_2)
        await t.hears(b"\x00PF\x02\x01")

        async def engine() -> None:
            await t.hears(b"c")
            await t.engine.send_all(receipt(STATE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine)
            assert not await t.session.ask(Intent.CANCEL)
        assert t.session.receipt is not None

    talk(script)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"a",  # an answer to nothing
        b"x",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00XX\x02\x01",
        receipt(STATE),  # before version 2 was agreed on
        HELLO_2 + b"\x01\xff\xff\xff\xff",
        HELLO_2 + receipt(b"not json"),
        HELLO_2 + receipt([1]),
        HELLO_2 + receipt({"disposition": 1}),
        HELLO_2 + receipt({}),
    ],
)
def test_nonsense_ends_the_connection_and_leaves_no_receipt(nonsense: bytes) -> None:
    async def script(t: Talk) -> None:
        await t.engine.send_all(t.token + nonsense)
        with trio.fail_after(60):
            await t.done.wait()
        assert t.session.receipt is None
        assert not t.session.connected

    talk(script)


@pytest.mark.parametrize("said", [b"\n", b"0123456789abcdef0123456789abcdef\n", b"\xff\xfe\n", b"x" * 5000])
def test_a_wrong_token_is_turned_away(said: bytes) -> None:
    async def script(t: Talk) -> None:
        await t.engine.send_all(said)
        before = trio.current_time()
        await t.is_dropped()
        assert trio.current_time() == before
        assert not t.session.connected

    talk(script)


def test_a_silent_stranger_is_turned_away_after_five_seconds() -> None:
    async def script(t: Talk) -> None:
        await t.engine.send_all(t.token[:-1])
        before = trio.current_time()
        await t.is_dropped()
        assert trio.current_time() - before == pytest.approx(TOKEN_TIMEOUT)

    talk(script)


def test_a_token_is_good_for_one_connection() -> None:
    async def script(t: Talk) -> None:
        await t.connect()
        thief, theirs = trio.testing.memory_stream_pair()
        await thief.send_all(t.token)
        await t.channel.handle(theirs)
        assert await thief.receive_some() == b""
        assert t.session.connected

    talk(script)


def test_a_closed_session_hangs_up_and_its_token_is_worthless() -> None:
    async def script(t: Talk) -> None:
        await t.connect()
        t.session.close()
        await t.is_dropped()
        unused = t.channel.expect()
        unused.close()
        late, ours = trio.testing.memory_stream_pair()
        await late.send_all(unused.environ["PREFECT__CONTROL_TOKEN"].encode() + b"\n")
        await t.channel.handle(ours)
        assert not unused.connected

    talk(script)


def test_a_thousand_silent_strangers_do_not_keep_an_engine_out() -> None:
    async def main() -> None:
        channel = ControlChannel()
        strangers = []
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                stranger, ours = trio.testing.memory_stream_pair()
                strangers.append(stranger)
                nursery.start_soon(channel.handle, ours)
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 64  # the others are gone already
            await trio.sleep(TOKEN_TIMEOUT)
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 0
            t = Talk(channel, nursery)
            await t.connect()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# --- the listener ---------------------------------------------------------------------------------------------------


async def dial(session: Session) -> trio.SocketStream:
    environ = session.environ
    stream = await trio.open_tcp_stream("127.0.0.1", int(environ["PREFECT__CONTROL_PORT"]))
    await stream.send_all(environ["PREFECT__CONTROL_TOKEN"].encode() + b"\n")
    return stream


def test_one_listener_tells_runs_apart_by_token() -> None:
    async def main() -> None:
        channel = ControlChannel()
        async with trio.open_nursery() as nursery:
            await nursery.start(channel.serve)
            first, second = channel.expect(), channel.expect()
            async with await dial(second) as stream:
                with trio.fail_after(10):
                    await second.wait_connected()
                assert second.connected
                assert not first.connected
                nursery.start_soon(second.ask, Intent.CANCEL)
                assert await stream.receive_some(1) == b"c"
            nursery.cancel_scope.cancel()
        assert channel.port is None

    trio.run(main)


def test_only_this_machine_can_connect() -> None:
    async def main() -> None:
        channel = ControlChannel()
        async with trio.open_nursery() as nursery:
            await nursery.start(channel.serve)
            assert channel.port is not None
            taken = socket.socket()
            taken.bind(("127.0.0.2", channel.port))  # free: the listener is bound to one address, not to all
            taken.close()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_reset_connection_does_not_hurt_the_listener() -> None:
    async def main() -> None:
        channel = ControlChannel()
        async with trio.open_nursery() as nursery:
            await nursery.start(channel.serve)
            session = channel.expect()
            stream = await dial(session)
            with trio.fail_after(10):
                await session.wait_connected()
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()  # with that option: a reset
            other = channel.expect()
            async with await dial(other):
                with trio.fail_after(10):
                    await other.wait_connected()
            assert not session.connected
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_without_a_listener_engines_are_told_of_none(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        channel = ControlChannel()
        async with trio.open_nursery() as nursery:
            # No descriptor for a socket: the shortest way to a listener that cannot be made.
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            try:
                await nursery.start(channel.serve)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        session = channel.expect()
        assert session.environ == {}
        assert not session.connected
        assert not await session.ask(Intent.CANCEL)

    trio.run(main)
    assert "cancelled by signal only" in caplog.text


# --- real engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.6.29", "3.8.8"])
@pytest.mark.parametrize("flow", ["sync_sleeper", "async_sleeper"])
def test_an_engine_that_was_asked_cancels_its_run_itself(
    version: str,
    flow: str,
    server_3: PrefectServer,
    api_of: Callable[[PrefectServer], Api],
    engine: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    api = api_of(server_3)
    run_id = api.create_run(api.create_deployment(flow, file="process_flows.py", path=Path(__file__).parent / "flows"))
    api.set_state(run_id, "PENDING")
    said, output, work = tmp_path / "said", tmp_path / "output", tmp_path / "work"
    work.mkdir()

    async def main() -> None:
        channel = ControlChannel()
        async with trio.open_nursery() as nursery:
            await nursery.start(channel.serve)
            session = channel.expect()
            env = flow_environ(
                run_id=run_id,
                api_url=server_3.url,
                secrets={},
                pass_env=(),
                flows_env={"SAY": str(said)},
                job_env={},
                extra=session.environ,
                environ=os.environ,
            )
            child = await launch([str(engine(version)), "-m", "prefect.engine"], env=env, cwd=work, output=output)
            try:
                with trio.fail_after(60):
                    await session.wait_connected()
                    while not said.exists():
                        await trio.sleep(0.02)
                    await trio.to_thread.run_sync(api.cancel, run_id)
                    assert await session.ask(Intent.CANCEL)
            finally:
                with trio.CancelScope(shield=True):
                    killed = await end(child.ref, run_id, grace=20)
                    how = await child.wait()
            nursery.cancel_scope.cancel()
        assert killed == 0, output.read_text()
        assert how == Exit(code=0)

    trio.run(main)
    assert [word.split()[0] for word in said.read_text().splitlines()] == ["body", "failing", "sync", "async"]
    assert api.states(run_id)[-2:] == [("CANCELLING", "Cancelling"), ("CANCELLED", "Cancelled")]


def test_an_engine_of_version_2_leaves_a_receipt(
    server_3: PrefectServer, api_of: Callable[[PrefectServer], Api], engine: Callable[[str], Path], tmp_path: Path
) -> None:
    api = api_of(server_3)
    flows = Path(__file__).parent / "flows"
    run_id = api.create_run(api.create_deployment("hookless", file="process_flows.py", path=flows))
    api.set_state(run_id, "PENDING")

    async def main() -> Receipt | None:
        channel = ControlChannel()
        async with trio.open_nursery() as nursery:
            await nursery.start(channel.serve)
            session = channel.expect()
            env = flow_environ(
                run_id=run_id,
                api_url=server_3.url,
                secrets={},
                pass_env=(),
                flows_env={"SAY": str(tmp_path / "said")},
                job_env={},
                extra=session.environ,
                environ=os.environ,
            )
            argv = [str(engine("3.8.8")), "-m", "prefect.engine"]
            child = await launch(argv, env=env, cwd=tmp_path, output=tmp_path / "output")
            with trio.fail_after(60):
                assert await child.wait() == Exit(code=0)
            nursery.cancel_scope.cancel()
        return session.receipt

    receipt = trio.run(main)
    assert receipt is not None
    assert (receipt.disposition, receipt.state_type) == ("STATE_REPORTED", "COMPLETED")
    assert api.state(run_id) == "COMPLETED"
