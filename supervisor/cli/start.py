"""`flow-agent start`, with the flags and refusals of `prefect agent start`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from supervisor.config import Config

EX_TEMPFAIL = 75
EX_CONFIG = 78


def start(
    work_queue: Annotated[
        str | None, typer.Argument(show_default=False, help="DEPRECATED: A work queue's name or UUID; use -q.")
    ] = None,
    work_queues: Annotated[
        list[str] | None,
        typer.Option("--work-queue", "-q", metavar="NAME", help="A work queue to take runs from. Repeatable."),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(
            "--match", "-m", metavar="PREFIX", help="Take runs from every work queue that starts so. Repeatable."
        ),
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", "-p", metavar="NAME", help="The work pool to take runs from.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-l", help="How many flow runs at once. Without it, no limit.")
    ] = None,
    prefetch_seconds: Annotated[
        float | None, typer.Option(help="How long before it is due a run is taken at most. [default: 10]")
    ] = None,
    run_once: Annotated[bool, typer.Option("--run-once", help="Poll once, wait for those runs, and end.")] = False,
    hide_welcome: Annotated[bool, typer.Option("--hide-welcome", help="Start without the welcome.")] = False,
    api: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The Prefect server. [default: PREFECT_API_URL, or this machine's]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What this agent is called there. [default: the host's name]")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The configuration. [default: /etc/flow-agent/agent.toml, if it is there]"),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(metavar="text|json", help="How the agent's own log looks. [default: text]")
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="The Python that runs the flows. [default: python3]")
    ] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", "-t", metavar="TAG", help="DEPRECATED: Take runs whose deployments have these tags."),
    ] = None,
) -> None:
    """Start the agent.

    It takes flow runs that are due from work queues or a work pool and runs each in a process of its own.

    Flags stand above FLOW_AGENT_* variables, these above the file. Queues, prefixes, pool and tags named here stand in
    for all [[work]] tables of the file.
    """
    from supervisor.config.file import NoWorkNamed, load
    from supervisor.errors import ConfigError, InterpreterError, StateDirectoryHeld

    work = _work(_queues(work_queue, work_queues), match or [], pool, tags or [])
    flags = {
        "agent.limit": limit,
        "agent.log_format": log_format,
        "agent.name": name,
        "agent.prefetch_seconds": prefetch_seconds,
        "api.url": api,
        "flows.python": python,
        "work": work,
    }
    environ = dict(os.environ)  # as it is now: the agent does not keep all of it
    try:
        loaded = load(config, environ=environ, flags=flags)

        from supervisor.app import run

        def reread() -> Config:
            # The file that it was, though it may have gone: to do without one is not what a reload is asked for.
            return load(loaded.path or config, environ=environ, flags=flags)

        code = run(loaded, reread, run_once=run_once, hide_welcome=hide_welcome)
    except NoWorkNamed as error:
        _refuse(f"No work queues provided!\n{error}")
    except (ConfigError, InterpreterError) as error:
        _refuse(str(error), EX_CONFIG)
    except StateDirectoryHeld as error:
        _refuse(str(error), EX_TEMPFAIL)
    raise typer.Exit(code)


def _queues(deprecated: str | None, queues: list[str] | None) -> list[str]:
    if deprecated is None:
        return queues or []
    typer.echo(
        "Agents now support multiple work queues. Instead of passing a single argument, provide work queue names with"
        f" the `-q` or `--work-queue` flag: `flow-agent start -q {deprecated}`\n",
        err=True,
    )
    return [*(queues or []), deprecated]


def _work(queues: list[str], match: list[str], pool: str | None, tags: list[str]) -> list[dict[str, object]]:
    """The flags as one [[work]] table, or none. Refuses what cannot be meant together."""
    if bool(queues) + bool(match) + bool(tags) > 1:
        _refuse("Only one of `work_queues`, `match`, or `tags` can be provided.")
    if pool is not None and tags:
        _refuse("`tag` and `pool` options cannot be used together.")
    if tags:
        queues = [f"Agent queue {'-'.join(sorted(tags))}"]
        typer.echo(
            "`tags` are deprecated. For backwards-compatibility with old versions of Prefect, this agent will create a"
            f" work queue named `{queues[0]}` that uses legacy tag-based matching.",
            err=True,
        )
    given: dict[str, object] = {"pool": pool, "queues": queues, "match": match, "tags": tags}
    table = {key: value for key, value in given.items() if value is not None and value != []}
    return [table] if table else []


def _refuse(message: str, code: int = 1) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
