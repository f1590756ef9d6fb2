"""`flow-agent runs`: what the journal knows, whether the agent is up or down."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from supervisor.config import Agent
    from supervisor.lifecycle.record import Record

EX_CONFIG = 78
FINISHED_SHOWN = 20
JOURNAL = "journal.sqlite3"


def runs(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for programs.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help=f"All that are remembered, not only the last {FINISHED_SHOWN} finished ones.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The configuration. [default: /etc/flow-agent/agent.toml, if it is there]"),
    ] = None,
) -> None:
    """List the flow runs of this machine's agent.

    Those that are open, then those that are finished, the latest first. Needs no server and no running agent.

    Keys of each object with --json: flow_run_id, flow_run_name, deployment (name), flow (name), work, claim_id,
    open (true or false), state (claiming, starting, running, stopping, exited, closed), opened, since (ISO 8601, UTC), pid,
    reason (why it is or was stopped, or anything else in words), exit (how its process ended), outcome (finished, crashed,
    cancelled, failed, handed back, not ours, deleted), output (the file that it prints to). What is not known is null.

    Exits 0, also without any; 1 when the journal cannot be read, 78 when the configuration has mistakes.
    """
    from supervisor.config.file import load
    from supervisor.errors import ConfigError, FlowAgentError
    from supervisor.journal.reader import NoJournal, read

    # Only the directories are wanted: an agent that got its work and its Python by flags is to be found as well.
    any_work = {"work": [{"pool": "any"}], "flows.python": sys.executable}
    try:
        agent = load(config, environ=os.environ, flags=any_work).agent
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EX_CONFIG) from None
    try:
        found = select(read(agent.state_dir / JOURNAL), everything=everything)
    except NoJournal as none:
        typer.echo("[]" if as_json else str(none))
        return
    except FlowAgentError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(_json(found, agent) if as_json else table(found, agent))


def select(found: list[Record], *, everything: bool) -> list[Record]:
    """The open ones, then the latest finished ones. Claims that others won are left out where only some are shown."""
    from supervisor.lifecycle import Closed, Outcome

    alive = [record for record in found if not isinstance(record.phase, Closed)]
    over = [record for record in found if isinstance(record.phase, Closed)]
    over.sort(key=lambda record: record.changed, reverse=True)
    if not everything:
        over = [record for record in over if record.phase != Closed(outcome=Outcome.NOT_OURS)][:FINISHED_SHOWN]
    return alive + over


def table(found: list[Record], agent: Agent) -> str:
    """For people: local time, and the phases in words."""
    if not found:
        return "no flow runs"
    lines = [("FLOW RUN", "STATE", "SINCE", "PID", "REASON", "OUTPUT")]
    for record in found:
        known = describe(record, agent)
        lines.append(
            (
                record.run.name,
                _state(record),
                record.changed.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                str(known["pid"] or "-"),
                _one_line(known["reason"] or known["exit"] or "-"),
                known["output"] or "-",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def describe(record: Record, agent: Agent) -> dict[str, Any]:
    """The object that `--json` shows of it. Its keys are a promise."""
    from supervisor.lifecycle import Closed, Exited, Running, Stopping

    phase, job = record.phase, record.job
    output = agent.log_dir / f"{record.run.id}.log"
    return {
        "flow_run_id": record.run.id,
        "flow_run_name": record.run.name,
        "deployment": job.deployment_name if job else None,
        "flow": job.flow_name if job else None,
        "work": record.work,
        "claim_id": record.claim_id,
        "open": not isinstance(phase, Closed),
        "state": record.short.lower(),
        "opened": record.opened.isoformat(),
        "since": record.changed.isoformat(),
        "pid": phase.process.pid if isinstance(phase, Running | Stopping) else None,
        "reason": _reason(record),
        "exit": str(phase.how) if isinstance(phase, Exited) and phase.how else None,
        "outcome": phase.outcome.value if isinstance(phase, Closed) else None,
        "output": str(output) if os.path.exists(output) else None,  # noqa: PTH110 - pathlib's raises where we may not look
    }


def _json(found: list[Record], agent: Agent) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode([describe(record, agent) for record in found])).decode()


def _state(record: Record) -> str:
    from supervisor.lifecycle import Claiming, Closed, Exited, Running, Starting, Stopping

    match record.phase:
        case Claiming():
            return "being claimed"
        case Starting():
            return "starting"
        case Running():
            return "running"
        case Stopping():
            return "being stopped"
        case Exited(owed=None):
            return "ended"
        case Exited():
            return "ended, server to be told"
        case Closed(outcome=outcome):
            return outcome.value


def _reason(record: Record) -> str | None:
    """In words where there are any."""
    from supervisor.lifecycle import Exited, Stopping, StopReason

    phase = record.phase
    words = {
        StopReason.CANCEL: "cancelled on the server",
        StopReason.TIMEOUT: "it took too long",
        StopReason.OPERATOR: "the agent was told to stop its runs",
        StopReason.RESCHEDULE: "handed back for another agent",
        StopReason.SHUTDOWN: "the machine is going down",
    }
    stopped = phase.reason if isinstance(phase, Stopping) else record.stopped
    if stopped is None and isinstance(phase, Exited):
        stopped = phase.stopped
    return record.why or (words[stopped] if stopped else None)


def _one_line(text: str, most: int = 60) -> str:
    """A cell of the table; the whole of it is in the JSON."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
