"""`flow-agent runs`: what it shows of a journal, and where it looks for one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio
from typer.testing import CliRunner, Result

from supervisor.cli import app
from supervisor.cli.runs import FINISHED_SHOWN
from supervisor.journal import Journal
from supervisor.lifecycle import Closed, Exited, Outcome, Owed, Report, Running
from supervisor.model import StateType
from tests.journals import PROCESS, made, one_of_each, record


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The state directory that a file without any work names."""
    for name in [name for name in os.environ if name.startswith(("FLOW_AGENT_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TZ", "UTC")
    (tmp_path / "agent.toml").write_text("[agent]\nstate_dir = 'state'\nlog_dir = 'logs'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_AGENT_CONFIG", "agent.toml")
    (tmp_path / "state").mkdir()
    (tmp_path / "logs").mkdir()
    return tmp_path / "state"


def flow_agent(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_table_shows_open_runs_first_then_the_latest_finished(state: Path) -> None:
    made(state / "journal.sqlite3", *one_of_each())
    output = state.parent / "logs" / "run-3.log"
    output.touch()
    shown = flow_agent("runs")
    assert shown.exit_code == 0
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown.stdout.splitlines()]
    assert cells == [
        ["FLOW RUN", "STATE", "SINCE", "PID", "REASON", "OUTPUT"],
        ["curious-otter-6", "ended, server to be told", "2026-11-01 12:36:05", "-", "cancelled on the server", "-"],
        ["curious-otter-5", "ended", "2026-11-01 12:35:05", "-", "-", "-"],
        ["curious-otter-4", "being stopped", "2026-11-01 12:34:05", "4711", "It took 60 s.", "-"],
        ["curious-otter-3", "running", "2026-11-01 12:33:05", "4711", "-", str(output)],
        ["curious-otter-2", "starting", "2026-11-01 12:32:05", "-", "-", "-"],
        ["curious-otter-1", "being claimed", "2026-11-01 12:31:05", "-", "-", "-"],
        ["curious-otter-8", "handed back", "2026-11-01 12:38:05", "-", "-", "-"],
        ["curious-otter-7", "finished", "2026-11-01 12:37:05", "-", "-", "-"],
    ]


def test_only_the_last_finished_ones_are_shown_and_all_on_demand(state: Path) -> None:
    finished = [record(number, Closed(outcome=Outcome.FINISHED)) for number in range(2, FINISHED_SHOWN + 5)]
    refused = record(100, Closed(outcome=Outcome.NOT_OURS))
    made(state / "journal.sqlite3", record(1), *finished, refused)
    names = [line.split()[0] for line in flow_agent("runs").stdout.splitlines()[1:]]
    assert len(names) == 1 + FINISHED_SHOWN
    assert names[:2] == ["curious-otter-1", f"curious-otter-{FINISHED_SHOWN + 4}"]
    assert len(flow_agent("runs", "--all").stdout.splitlines()) == 1 + 1 + len(finished) + 1


def test_the_json_has_the_keys_that_the_help_promises(state: Path) -> None:
    made(state / "journal.sqlite3", *one_of_each())
    found = json.loads(flow_agent("runs", "--json", "--all").stdout)
    assert [one["flow_run_id"] for one in found] == [f"run-{number}" for number in (6, 5, 4, 3, 2, 1, 9, 8, 7)]
    assert found[3] == {
        "flow_run_id": "run-3",
        "flow_run_name": "curious-otter-3",
        "deployment": "nightly",
        "flow": "etl",
        "work": "pool 'local'",
        "claim_id": "00000000-0000-0000-0000-000000000003",
        "open": True,
        "state": "running",
        "opened": "2026-11-01T12:33:00+00:00",
        "since": "2026-11-01T12:33:05+00:00",
        "pid": 4711,
        "reason": None,
        "exit": None,
        "outcome": None,
        "output": None,
    }
    ended, refused = found[0], found[6]
    assert (ended["state"], ended["exit"], ended["reason"]) == (
        "exited",
        "killed for memory",
        "cancelled on the server",
    )
    assert (refused["open"], refused["outcome"], refused["reason"]) == (False, "not ours", "Another agent has it.")
    help_text = " ".join(flow_agent("runs", "--help").stdout.split())
    promised = help_text.partition("--json:")[2].partition("Exits 0")[0]
    assert [key for key in found[0] if key not in promised] == []


def test_it_reads_while_the_agent_writes(state: Path) -> None:
    journal = Journal.open(state / "journal.sqlite3")
    assert trio.run(journal.write, record(1, Running(process=PROCESS, attempt=1)))
    [line] = flow_agent("runs").stdout.splitlines()[1:]
    assert "running" in line
    report = Report(type=StateType.CRASHED, message="m", outcome=Outcome.CRASHED)
    assert trio.run(journal.write, record(1, Exited(how=None, owed=Owed(report=report))))
    [line] = flow_agent("runs").stdout.splitlines()[1:]
    assert "ended, server to be told" in line
    journal.close()


def test_no_journal_yet_is_no_error(state: Path) -> None:
    shown = flow_agent("runs")
    assert (shown.exit_code, shown.stdout) == (
        0,
        f"no journal at {state}/journal.sqlite3 yet: no agent has used this state directory\n",
    )
    shown = flow_agent("runs", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)) == (0, [])
    assert not list(state.iterdir())
    made(state / "journal.sqlite3")
    assert flow_agent("runs").stdout == "no flow runs\n"
    assert json.loads(flow_agent("runs", "--json").stdout) == []


def test_a_journal_that_cannot_be_read_is_one_sentence(state: Path) -> None:
    (state / "journal.sqlite3").write_bytes(b"not a database" * 1000)
    shown = flow_agent("runs", "--json")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == f"cannot read the journal {state}/journal.sqlite3: file is not a database\n"


def test_it_looks_where_start_would_put_it(state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made(state / "journal.sqlite3", record(1))
    (tmp_path / "elsewhere").mkdir()
    made(tmp_path / "elsewhere" / "journal.sqlite3", record(2))
    other = tmp_path / "other.toml"
    other.write_text("[agent]\nstate_dir = 'elsewhere'\n[[work]]\npool = 'p'\n")
    assert "curious-otter-2" in flow_agent("runs", "--config", str(other)).stdout
    monkeypatch.setenv("FLOW_AGENT_AGENT_STATE_DIR", str(state))
    assert "curious-otter-1" in flow_agent("runs", "--config", str(other)).stdout
    other.write_text("[agent]\nstate_dri = 'elsewhere'\n")
    shown = flow_agent("runs", "--config", str(other))
    assert (shown.exit_code, shown.stdout) == (78, "")
    assert "state_dri" in shown.stderr


def test_a_machine_without_a_python_can_still_ask(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(state / "journal.sqlite3", record(1))
    monkeypatch.setenv("PATH", "/nowhere")
    assert "curious-otter-1" in flow_agent("runs").stdout


def test_a_long_reason_is_cut_in_the_table_only(state: Path) -> None:
    why = "It could not be started:\n" + "because " * 50
    made(state / "journal.sqlite3", record(1, Closed(outcome=Outcome.FAILED), why=why))
    [line] = flow_agent("runs").stdout.splitlines()[1:]
    assert "It could not be started: because" in line
    assert len(line) < 140
    assert json.loads(flow_agent("runs", "--json").stdout)[0]["reason"] == why
