"""supervisor/systemd/manager.py with a systemctl that prints what the real one (252) has printed in each case."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

import pytest
import trio

from supervisor.systemd.manager import ASKING_SECONDS, Intent, Manager, read_jobs
from tests.waiting import SLOWEST

UNIT = "flow-agent.service"
RESTART = "31 flow-agent.service restart running"
STOP = "61 flow-agent.service stop running"
LOGOUT = """\
97 gpg-agent.socket      stop  waiting
98 app.slice             stop  waiting
81 basic.target          stop  waiting
86 flow-agent.service    stop  running
77 exit.target           start waiting
80 shutdown.target       start waiting
78 systemd-exit.service  start waiting
"""
REBOOT = """\
411 flow-agent.service       stop  running
395 shutdown.target          start waiting
447 cron.service             stop  running
393 reboot.target            start waiting
394 systemd-reboot.service   start waiting
460 umount.target            start waiting
"""
POWEROFF = REBOOT.replace("reboot", "poweroff").replace("395 shutdown.target          start waiting\n", "")
BY_SYSTEMD = {"INVOCATION_ID": "7bdcf94bf8bb433db60adcb654a83fba"}
IN_SYSTEM = "0::/system.slice/flow-agent.service\n"
IN_USER = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/flow-agent.service\n"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer to run a script; how long is too long is tested where the script hangs."""
    monkeypatch.setattr("supervisor.systemd.manager.ASKING_SECONDS", 60.0)


def fake(folder: Path, script: str) -> Path:
    """A systemctl that writes down its arguments and environment and does what the script says."""
    program = folder / "systemctl"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> '{folder}/asked'\nenv >> '{folder}/environ'\n{script}\n")
    program.chmod(0o755)
    return folder


def says(jobs: str, state: str = "running") -> str:
    answer = f'case "$*" in *is-system-running*) echo {state};; *) printf %s {shlex.quote(jobs)};; esac'
    return answer if state == "running" else f"{answer}; exit 1"


def manager(folder: Path, script: str, environ: dict[str, str] = BY_SYSTEMD, cgroup: str = IN_SYSTEM) -> Manager:
    path = f"{fake(folder, script)}:{os.environ['PATH']}"
    file = folder / "cgroup"
    file.write_text(cgroup)
    return Manager.from_environ({"PATH": path, **environ}, file)


def asked(folder: Path) -> list[str]:
    file = folder / "asked"
    return file.read_text().splitlines() if file.exists() else []


# --- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "state", "expected"),
    [
        ("", "running", Intent.STOP),
        (STOP, "degraded", Intent.STOP),
        (RESTART, "running", Intent.RESTART),
        (RESTART, "degraded", Intent.RESTART),
        (RESTART, "stopping", Intent.SHUTDOWN),
        (STOP, "stopping", Intent.SHUTDOWN),
        (REBOOT, "running", Intent.SHUTDOWN),
        (POWEROFF, "running", Intent.SHUTDOWN),
        (LOGOUT, "running", Intent.SHUTDOWN),
    ],
)
def test_the_queue_and_the_state_of_systemd_tell_why_we_are_stopped(
    tmp_path: Path, jobs: str, state: str, expected: Intent
) -> None:
    assert trio.run(manager(tmp_path, says(jobs, state)).intent) is expected


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ("7 other.service restart running\n61 flow-agent.service stop running", Intent.STOP),
        ("7 flow-agent.service try-restart waiting", Intent.RESTART),
        ("7 flow-agent.service reload-or-restart waiting", Intent.RESTART),
        ("7 flow-agent.service reload running", Intent.STOP),
        # Each in place of a stop under way, as 252 shows it.
        ("135 flow-agent.service restart running", Intent.RESTART),
        ("186 flow-agent.service start waiting", Intent.RESTART),
        ("186 flow-agent.service start running", Intent.STOP),  # we have not said READY=1 yet
        ("186 other.service start waiting", Intent.STOP),
        ("7 reboot.target stop waiting", Intent.STOP),
        ("7 shutdown.target verify-active waiting", Intent.STOP),
        ("7 multi-user.target start waiting", Intent.STOP),
        ("7 not-shutdown.target start waiting", Intent.STOP),
        (f"{RESTART}\n7 kexec.target start waiting", Intent.SHUTDOWN),
        *((f"7 {name}.target start running", Intent.SHUTDOWN) for name in ("shutdown", "poweroff", "reboot", "umount")),
        *((f"7 {name}.target start running", Intent.SHUTDOWN) for name in ("halt", "final", "soft-reboot", "exit")),
        ("flow-agent.service restart running", Intent.STOP),
        ("No jobs running.", Intent.STOP),
        ("x shutdown.target start waiting", Intent.STOP),
    ],
)
def test_only_our_own_restart_and_the_targets_that_end_everything_count(jobs: str, expected: Intent) -> None:
    assert read_jobs(jobs, UNIT) is expected


def test_without_a_unit_no_restart_is_ours() -> None:
    assert read_jobs(RESTART, None) is Intent.STOP
    assert read_jobs(REBOOT, None) is Intent.SHUTDOWN


def test_no_time_is_lost_with_a_second_question_once_the_end_is_known(tmp_path: Path) -> None:
    assert trio.run(manager(tmp_path, says(REBOOT)).intent) is Intent.SHUTDOWN
    assert len(asked(tmp_path)) == 1


# --- who is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, {"INVOCATION_ID": ""}, {"NOTIFY_SOCKET": "/run/somebody"}])
def test_who_was_not_started_by_systemd_does_not_ask(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object, **__: object) -> None:
        raise AssertionError("a program is started")

    monkeypatch.setattr(trio, "run_process", nothing)
    assert trio.run(manager(tmp_path, says(RESTART, "stopping"), environ).intent) is Intent.STOP


@pytest.mark.parametrize("environ", [BY_SYSTEMD, {"SYSTEMD_EXEC_PID": "26"}])
def test_the_machines_systemd_is_asked_by_a_unit_of_the_machine(tmp_path: Path, environ: dict[str, str]) -> None:
    assert trio.run(manager(tmp_path, says(RESTART), environ).intent) is Intent.RESTART
    assert asked(tmp_path) == ["list-jobs --no-legend --plain --full", "is-system-running"]


def test_the_users_systemd_is_asked_by_a_unit_of_the_user(tmp_path: Path) -> None:
    environ = BY_SYSTEMD | {"XDG_RUNTIME_DIR": "/run/user/1000", "LD_LIBRARY_PATH": "/bundle", "PREFECT_API_KEY": "x"}
    assert trio.run(manager(tmp_path, says(RESTART), environ, IN_USER).intent) is Intent.RESTART
    assert asked(tmp_path) == ["--user list-jobs --no-legend --plain --full", "--user is-system-running"]
    given = (tmp_path / "environ").read_text().splitlines()
    assert "XDG_RUNTIME_DIR=/run/user/1000" in given
    assert not [line for line in given if line.startswith(("LD_LIBRARY_PATH", "PREFECT"))]


def test_a_terminal_in_a_users_session_is_asked_about_the_logout(tmp_path: Path) -> None:
    cgroup = "0::/user.slice/user-1000.slice/user@1000.service/tmux-spawn-1.scope\n"
    assert trio.run(manager(tmp_path, says(LOGOUT), BY_SYSTEMD, cgroup).intent) is Intent.SHUTDOWN
    assert asked(tmp_path)[0].startswith("--user ")


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        (IN_SYSTEM, UNIT),
        (IN_USER, UNIT),
        ("0::/system.slice/flow-agent.service/supervisor\n", UNIT),
        ("0::/system.slice/system-flow\\x2dagent.slice/flow-agent@team:a.service\n", "flow-agent@team:a.service"),
        ("0::/system.slice/_flow.agent.service\n", "flow.agent.service"),
        ("9:name=systemd:/system.slice/flow-agent.service\n8:pids:/other.service\n0::/\n", UNIT),
        ("8:pids:/other.service\n1:name=systemd:/\n0::/system.slice/flow-agent.service\n", UNIT),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("8:pids:/other.service\n0::/\n", None),
        ("garbage\n\n::\n", None),
    ],
)
def test_our_units_name_is_in_the_control_group(tmp_path: Path, cgroup: str, unit: str | None) -> None:
    assert manager(tmp_path, "", cgroup=cgroup).unit == unit


def test_without_control_groups_there_is_no_unit_but_still_a_shutdown(tmp_path: Path) -> None:
    environ = BY_SYSTEMD | {"PATH": f"{fake(tmp_path, says(REBOOT))}:{os.environ['PATH']}"}
    made = Manager.from_environ(environ, tmp_path / "missing")
    assert made.unit is None
    assert trio.run(made.intent) is Intent.SHUTDOWN


# --- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "echo 'System has not been booted with systemd as init system (PID 1).' >&2; exit 1",
        "printf '\\377\\376 restart \\0\\n\\n\\n7\\n7 8 9 10 11 12'",
        "echo 'Running in chroot, ignoring command' >&2",
        "kill -9 $$",
    ],
)
def test_an_answer_that_says_nothing_is_a_stop(tmp_path: Path, script: str) -> None:
    assert trio.run(manager(tmp_path, script).intent) is Intent.STOP
    assert len(asked(tmp_path)) == 2


def test_what_systemctl_complains_of_can_be_found_in_the_debug_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flow-agent")
    trio.run(manager(tmp_path, "echo 'Failed to connect to bus' >&2; exit 1").intent)
    assert "systemctl exited with 1: Failed to connect to bus" in caplog.text
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


def test_without_a_systemctl_it_is_a_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flow-agent")
    file = tmp_path / "cgroup"
    file.write_text(IN_SYSTEM)
    assert trio.run(Manager.from_environ(BY_SYSTEMD | {"PATH": str(tmp_path)}, file).intent) is Intent.STOP
    assert "cannot ask systemd" in caplog.text


def test_no_stop_is_held_up_by_a_systemd_that_does_not_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.systemd.manager.ASKING_SECONDS", ASKING_SECONDS)
    caplog.set_level(logging.DEBUG, "flow-agent")
    made = manager(tmp_path, "exec sleep 60")

    async def main() -> None:
        started = trio.current_time()
        assert await made.intent() is Intent.STOP
        assert trio.current_time() - started < (ASKING_SECONDS + 1) * SLOWEST

    trio.run(main)
    assert "no answer within 2 s" in caplog.text


def test_what_the_queue_has_told_is_not_lost_when_the_next_question_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.systemd.manager.ASKING_SECONDS", ASKING_SECONDS * SLOWEST)
    script = f'case "$*" in *list-jobs*) echo {shlex.quote(RESTART)};; *) exec sleep 60;; esac'
    assert trio.run(manager(tmp_path, script).intent) is Intent.RESTART


def test_asking_can_be_given_up(tmp_path: Path) -> None:
    made = manager(tmp_path, "exec sleep 60")

    async def main() -> None:
        with trio.move_on_after(0.05) as hurried:
            await made.intent()
        assert hurried.cancelled_caught

    trio.run(main)
