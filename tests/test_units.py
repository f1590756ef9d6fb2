"""The units on machines that boot a real systemd, with both forms of the binary, a real Prefect server and real flows.

A boot, a server and an installation are shared by many stories, which are told one after the other and each leave the agent
as they found it: running, with a flow run in its hands. `make units` tells them on every system with every form.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.machines import Machine, why_not
from tests.servers import Api, PrefectServer
from tests.units import CONFIG, FORMS, TRACE, UNIT, USER, Unit, pid_inside
from tests.waiting import lines, wait_until

UNITS = Path(__file__).parents[1] / "systemd"
# Every system and every form at least once; with `make units` each with each.
CROSSED = [("bookworm", "deb"), ("trixie", "onefile")]
ALL = [(suite, form) for suite in ("bookworm", "trixie") for form in FORMS]
CHOSEN = ALL if os.environ.get("FLOW_AGENT_ALL_UNITS") else CROSSED


# --- what the files say -----------------------------------------------------------------------------------------------


def directives(file: str) -> list[tuple[str, str]]:
    """(name, value) of every directive in a file of systemd/, without the comments; sections as ("[Unit]", "")."""
    text = (UNITS / file).read_text()
    kept = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, value) for name, _, value in (line.partition("=") for line in kept)]


@pytest.mark.parametrize("file", ["flow-agent.service", "hardening.conf", "onefile.conf"])
def test_every_line_of_a_unit_has_its_reason_above_it(file: str) -> None:
    blocks = [block.splitlines() for block in re.split(r"\n\n+", (UNITS / file).read_text().strip())]
    unsaid = [
        block
        for block in blocks
        if not block[0].startswith("#")
        and not all(re.match(r"\[|Description=|Documentation=|WantedBy=", line) for line in block)
        # The first block of a section begins with its name.
        and not (block[0].startswith("[") and block[1].startswith(("#", "Description=")))
    ]
    assert not unsaid
    assert not [value for name, value in directives(file) if "#" in value], "a comment behind a value is part of it"


def test_the_instances_differ_from_the_plain_unit_in_their_names_alone() -> None:
    plain, instance = directives("flow-agent.service"), directives("flow-agent@.service")
    own_environment = ("EnvironmentFile", "-/etc/default/flow-agent@%i")
    assert own_environment in instance
    generic = [
        (name, value.replace(" --config /etc/flow-agent/%i.toml", "").replace(" --name %H-%i", ""))
        for name, value in instance
        if (name, value) != own_environment
    ]
    generic = [
        (name, value.replace("/%i.api-key", "/api-key").replace("flow-agent %i,", "flow-agent,"))
        for name, value in generic
    ]
    assert generic == plain


def may_spare_from_the_memory_killer() -> bool:
    """Whether root may do so here: some containers and sandboxes keep CAP_SYS_RESOURCE from it."""
    status = Path("/proc/self/status").read_text()
    return bool(int(re.findall(r"CapEff:\s+(\w+)", status)[0], 16) >> 24 & 1)


# --- the stories ------------------------------------------------------------------------------------------------------


def an_installation_starts_nothing(unit: Unit) -> None:
    unit.form.install(unit.machine)
    assert unit.show("LoadState") == "loaded"
    assert (unit.show("ActiveState"), unit.show("UnitFileState")) == ("inactive", "disabled")
    plain = Path(unit.show("FragmentPath"))
    said = unit.machine.run("systemd-analyze", "verify", "--man=no", plain, plain.with_name("flow-agent@one.service"))
    assert said.stdout + said.stderr == ""
    unit.machine.run("systemd-analyze", "security", "--threshold=80", UNIT)


def enabling_it_starts_it(unit: Unit) -> None:
    unit.configure()
    # Tests cannot wait as long as people can.
    unit.drop_in("quick", "[Service]\nRestartSec=1\n")
    unit.systemctl("enable", "--now", UNIT)
    assert (unit.show("ActiveState"), unit.show("UnitFileState")) == ("active", "enabled")
    unit.is_one_agent()
    unit.run_id, unit.run_pid = unit.hold()


def a_run_has_its_own_group_and_the_memory_killer_comes_for_it_first(unit: Unit) -> None:
    runs = unit.processes(f"runs/{unit.run_id}")
    assert unit.run_pid in [pid_inside(process) for process in runs]
    scores = [int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in runs]
    assert set(scores) == {0}
    assert unit.show("OOMScoreAdjust") == "-500"
    main = int(unit.machine.path(f"/proc/{unit.main_pid()}/oom_score_adj").read_text())
    assert main == (-500 if may_spare_from_the_memory_killer() else 0)


def the_journal_tells_the_story_of_a_run(unit: Unit) -> None:
    run_id = unit.start_run("hello", name="journal")
    unit.finished(run_id)
    name = unit.api.read_run(run_id)["name"]
    for last in ("exited with code 0", "Finished in state"):  # the end of its output may be shown after its exit
        unit.wait_told(last, f"FLOW_RUN_ID={run_id}")
    records = unit.machine.journal("-u", UNIT, f"FLOW_RUN_ID={run_id}")
    told = "\n".join(record["MESSAGE"] for record in records)
    assert "hello journal" in told, told
    assert ("(warm)" in told) == (unit.form.start == "warm"), told
    for record in records:
        assert record["PRIORITY"] in "34567"
        assert record["SYSLOG_IDENTIFIER"] == "flow-agent"
        assert record["FLOW_RUN_NAME"] == name
        assert record["CODE_FILE"].endswith(".py")
        assert record["_SYSTEMD_UNIT"] == UNIT
    by_deployment = unit.machine.journal("-u", UNIT, f"DEPLOYMENT={records[0]['DEPLOYMENT']}")
    assert [record["MESSAGE"] for record in by_deployment] == [record["MESSAGE"] for record in records]
    assert f"'{name}'" in told


def a_cancelled_run_leaves_nothing_however_it_runs_away(unit: Unit) -> None:
    run_id = unit.start_run("spawner", pids=f"{TRACE}/zoo", trace=f"{TRACE}/zoo.trace")
    wait_until(
        lambda: lines(unit.machine.path(f"{TRACE}/zoo.trace")), 60, "all have run away", more=lambda: unit.story(run_id)
    )
    engine = int(lines(unit.machine.path(f"{TRACE}/zoo.trace"))[0].split()[1])
    children: dict[str, int] = json.loads(unit.machine.path(f"{TRACE}/zoo").read_text())
    away = [process for process in unit.processes(f"runs/{run_id}") if pid_inside(process) != engine]
    assert len(away) >= len(children)
    unit.api.cancel(run_id)
    unit.api.wait_for_state(run_id, "CANCELLED", 60)
    # The engine may have written that itself, and is then on its way out.
    assert not [process for process in away if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    wait_until(
        lambda: not (unit.machine.group(f"system.slice/{UNIT}/runs/{run_id}")).exists(), 10, "its control group is gone"
    )
    unit.is_untouched()


def a_reload_takes_what_is_right_and_refuses_what_is_wrong(unit: Unit) -> None:
    main = unit.main_pid()
    unit.configure(agent={"limit": 3})
    unit.systemctl("reload", UNIT)
    unit.wait_status("1 running, 2 free")
    unit.machine.write(CONFIG, unit.config() + "\n[agentt]\nlimit = 5\n")
    refused = unit.systemctl("reload", UNIT, check=False)
    assert refused.returncode != 0
    assert "agentt" in unit.machine.status(UNIT)
    assert (unit.show("ActiveState"), unit.main_pid()) == ("active", main)
    # Past the check of the unit, as `kill -HUP` by hand is.
    unit.systemctl("kill", "--kill-who=main", "--signal=HUP", UNIT)
    unit.wait_status("agentt")
    unit.configure()
    unit.systemctl("reload", UNIT)
    assert unit.main_pid() == main
    unit.is_untouched()


def a_restart_leaves_the_run_alone(unit: Unit) -> None:
    before = unit.main_pid()
    unit.systemctl("restart", UNIT)
    assert unit.main_pid() != before
    unit.is_one_agent()
    unit.is_untouched()


def the_agent_may_be_killed(unit: Unit) -> None:
    for victim in range(unit.form.processes):  # the bootloader, the program
        before, restarts = unit.main_pid(), int(unit.show("NRestarts"))
        process = sorted(unit.processes("supervisor"), key=lambda process: process.create_time())[victim]
        process.kill()
        unit.wait_restarted(before, restarts)
        unit.is_untouched()


def an_agent_that_hangs_says_where_and_is_started_again(unit: Unit) -> None:
    unit.drop_in("hang", '[Service]\nEnvironment="FAILPOINT=after pid:hang"\nWatchdogSec=5\n')
    unit.systemctl("restart", UNIT)
    before, restarts = unit.main_pid(), int(unit.show("NRestarts"))
    unit.drop_in("hang", "[Service]\nWatchdogSec=60\n")  # for the next agent
    since = unit.machine.run("date", "+%s").stdout.strip()
    run_id = unit.start_run("hello")
    unit.wait_restarted(before, restarts)
    told = unit.machine.messages("-u", UNIT, f"--since=@{since}")
    assert "the event loop has stood still" in told, told
    assert "failpoints.py" in told, told  # where it hangs
    assert "poller.py" in told, told  # and where another task waits
    assert "watchdog" in unit.machine.messages("-u", UNIT, f"--since=@{since}").lower()
    unit.is_untouched()
    unit.finished(run_id)
    unit.drop_in("hang", None)


def an_upgrade_leaves_the_run_alone(unit: Unit) -> None:
    before = unit.main_pid()
    unit.form.upgrade(unit.machine)
    unit.wait_active()
    assert unit.main_pid() != before
    unit.is_one_agent()
    unit.is_untouched()


def the_run_that_saw_it_all_completes(unit: Unit) -> None:
    unit.let_go()
    unit.finished(unit.run_id)
    assert [kind for kind, _ in unit.api.states(unit.run_id)].count("RUNNING") == 1


def a_stop_waits_for_the_run_and_says_so(unit: Unit) -> None:
    """For longer than systemd would by itself: it is asked for more time."""
    patience = 4
    unit.drop_in("short", f"[Service]\nTimeoutStopSec={patience}\n")
    run_id, _ = unit.hold()
    unit.systemctl("--no-block", "stop", UNIT)
    began = time.monotonic()
    unit.wait_status("draining")
    wait_until(lambda: time.monotonic() > began + patience * 1.5, 10, "systemd's own patience is over")
    assert unit.show("ActiveState") == "deactivating"
    unit.let_go()
    unit.finished(run_id)
    unit.machine.wait_for(UNIT, "ActiveState", "inactive")
    assert unit.show("Result") == "success"
    assert unit.processes() == []
    unit.drop_in("short", None)


def a_wrong_configuration_is_a_sentence_and_no_loop(unit: Unit) -> None:
    unit.machine.write(CONFIG, unit.config() + "[limits]\nmemory = 1\n")
    _fails_for_good(unit, "there is no such table", "ExecStartPre=")


def a_missing_interpreter_is_a_sentence_and_no_loop(unit: Unit) -> None:
    unit.configure(flows={"python": "/opt/none/bin/python"})
    _fails_for_good(unit, "/opt/none/bin/python", "ExecStartPre=")


def an_interpreter_without_prefect_is_a_sentence_and_no_loop(unit: Unit) -> None:
    """Which the agent itself finds, not the check before it."""
    unit.machine.write("/opt/plain/python", '#!/bin/sh\nexec python3 -I -S "$@"\n', 0o755)
    unit.configure(flows={"python": "/opt/plain/python"})
    _fails_for_good(unit, "/opt/plain/python", "ExecStart=")


def _fails_for_good(unit: Unit, sentence: str, where: str) -> None:
    unit.systemctl("reset-failed", check=False)
    assert unit.systemctl("start", UNIT, check=False).returncode != 0
    ended = ("failed", "exit-code", "0")
    assert (unit.show("ActiveState"), unit.show("Result"), unit.show("NRestarts")) == ended
    status = unit.machine.status(UNIT)
    assert sentence in status, status
    assert re.search(rf"{where}.*status=78", status), status
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1.5, 10, "RestartSec is over")  # a start again would be seen now
    assert (unit.show("ActiveState"), unit.show("Result"), unit.show("NRestarts")) == ended


def a_credential_is_used_and_is_nobody_elses(unit: Unit) -> None:
    """There was none until now, and the agent started all the same."""
    unit.configure()
    unit.machine.write("/etc/flow-agent/api-key", "pnu_a-key-of-the-tests\n", 0o600)
    unit.systemctl("start", UNIT)
    run_id = unit.start_run("env_dump", path=f"{TRACE}/environ")
    unit.finished(run_id)
    environ = json.loads(unit.machine.path(f"{TRACE}/environ").read_text())["environ"]
    assert environ["PREFECT_API_KEY"] == "pnu_a-key-of-the-tests"
    leaked = [
        name
        for name in environ
        if re.match("CREDENTIALS|NOTIFY|WATCHDOG|INVOCATION|_PYI|FAILPOINT|.*_DIRECTORY$", name)
    ]
    assert not leaked
    assert "flow-agent" not in environ.get("TMPDIR", "")
    assert "LD_LIBRARY_PATH" not in environ
    shown = f"/run/credentials/{UNIT}/api-key"
    for reader in ("nobody", "daemon"):
        assert unit.machine.run("cat", shown, user=reader, check=False).returncode != 0
        assert unit.machine.run("cat", f"/proc/{unit.main_pid()}/environ", user=reader, check=False).returncode != 0
    assert "pnu_a-key-of-the-tests" not in unit.machine.messages()
    assert not [process for process in unit.processes() if "pnu_a-key" in " ".join(process.cmdline())]
    unit.machine.path("/etc/flow-agent/api-key").unlink()


def instances_work_side_by_side(unit: Unit) -> None:
    host = unit.machine.run("uname", "--nodename").stdout.strip()
    pools = {name: unit.api.create_pool() for name in ("gpu", "runs")}
    for name, pool in pools.items():
        unit.machine.write(f"/etc/flow-agent/{name}.toml", unit.config(pool))
    unit.systemctl("start", *(f"flow-agent@{name}" for name in pools))
    runs = [unit.start_run_in(pool, "hello", name=name) for name, pool in pools.items()]
    for run_id in runs:
        unit.finished(run_id)
    for name, run_id in zip(pools, runs, strict=True):
        instance = f"flow-agent@{name}"
        assert f"'{host}-{name}'" in unit.machine.messages("-u", instance)
        unit.wait_told(f"hello {name}", "-u", instance, f"FLOW_RUN_ID={run_id}")
        assert unit.machine.path(f"/var/log/flow-agent@{name}/{run_id}.log").exists()
        state = unit.machine.path(f"/var/lib/flow-agent@{name}")
        assert (state / "journal.sqlite3").exists()
        assert state.stat().st_mode & 0o777 == 0o750
    unit.systemctl("stop", *(f"flow-agent@{name}" for name in pools))
    assert unit.show("ActiveState") == "active"


def flows_can_do_what_flows_do(unit: Unit) -> None:
    unit.machine.write("/etc/sudoers.d/flows", f"{USER} ALL=(ALL) NOPASSWD: ALL\n", 0o440)
    unit.finished(unit.start_run("abilities", "abilities.py", with_sudo=True))


def flows_can_do_most_of_it_in_the_sandbox(unit: Unit) -> None:
    unit.drop_in("hardening", (UNITS / "hardening.conf").read_text())
    unit.machine.run("systemd-analyze", "security", "--threshold=50", UNIT)
    unit.systemctl("restart", UNIT)
    unit.is_one_agent()
    unit.finished(unit.start_run("abilities", "abilities.py", with_sudo=False))
    main = unit.machine.path(f"/proc/{unit.main_pid()}/status").read_text()
    assert re.search(r"NoNewPrivs:\s+1\n", main)
    assert re.search(r"CapBnd:\s+0+\n", main)
    unit.drop_in("hardening", None)


def a_machine_that_goes_down_gives_its_runs_time_and_says_why(unit: Unit) -> None:
    """The last one."""
    unit.configure(stop={"shutdown_timeout_seconds": 6})
    unit.systemctl("restart", UNIT)
    ends, _ = unit.hold()
    lets_it_end = unit.go
    outlasts, _ = unit.hold()
    unit.machine.power_off(wait=False)
    unit.wait_status("going down")
    unit.machine.write(lets_it_end, "")
    unit.machine.wait_off(60)
    assert unit.api.state(ends) == "COMPLETED"
    last = unit.api.read_run(outlasts)["state"]
    assert last["type"] == "CRASHED", unit.api.story(outlasts)
    assert "The machine went down while it ran." in last["message"]


STORIES: list[Callable[[Unit], None]] = [
    an_installation_starts_nothing,
    enabling_it_starts_it,
    a_run_has_its_own_group_and_the_memory_killer_comes_for_it_first,
    the_journal_tells_the_story_of_a_run,
    a_cancelled_run_leaves_nothing_however_it_runs_away,
    a_reload_takes_what_is_right_and_refuses_what_is_wrong,
    a_restart_leaves_the_run_alone,
    the_agent_may_be_killed,
    an_agent_that_hangs_says_where_and_is_started_again,
    an_upgrade_leaves_the_run_alone,
    the_run_that_saw_it_all_completes,
    a_stop_waits_for_the_run_and_says_so,
    a_wrong_configuration_is_a_sentence_and_no_loop,
    a_missing_interpreter_is_a_sentence_and_no_loop,
    an_interpreter_without_prefect_is_a_sentence_and_no_loop,
    a_credential_is_used_and_is_nobody_elses,
    instances_work_side_by_side,
    flows_can_do_what_flows_do,
    flows_can_do_most_of_it_in_the_sandbox,
    a_machine_that_goes_down_gives_its_runs_time_and_says_why,
]


@pytest.mark.skipif(why_not() is not None, reason=f"README, Tests: {why_not()}")
@pytest.mark.parametrize(("suite", "form"), CHOSEN, ids=["-".join(pair) for pair in CHOSEN])
def test_the_unit_keeps_its_promises(
    suite: str,
    form: str,
    boot: Callable[[str], Machine],
    server_3: PrefectServer,
    api_of: Callable[[PrefectServer], Api],
) -> None:
    machine = boot(suite)
    unit = Unit(machine, FORMS[form](), api_of(server_3))
    began = time.monotonic()
    for tell in STORIES:
        title = tell.__name__.replace("_", " ")
        try:
            tell(unit)
            if tell is not STORIES[-1]:
                unit.is_unprivileged()
        except BaseException as error:
            if tell is not STORIES[-1]:
                error.add_note(f"in the story: {title}\n{machine.status(UNIT)}")
            raise
        print(f"{suite}-{form}: {title}: ok ({time.monotonic() - began:.1f} s)")
        began = time.monotonic()
