"""FRONT DOOR: the `flow-agent` command. One file a command: parse, call, print; nothing else.

What a command needs is imported when it is called: `flow-agent version` must not wait for trio and httpx.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from supervisor.cli.check import check
from supervisor.cli.install import install
from supervisor.cli.runs import runs
from supervisor.cli.start import start
from supervisor.cli.version import version

app = typer.Typer(
    name="flow-agent",
    help="Polls a Prefect server, starts each due flow run as a subprocess, supervises it, cancels it, and tells the "
    "server the truth about how it ended.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich costs more at start than all of ours
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(start)
app.command()(check)
app.command()(runs)
app.command()(install)
app.command()(version)


@app.command(name="demo")
def _demo(
    python: Annotated[
        Path | None,
        typer.Option(help="A Python with Prefect 3, for server and flows. [default: that of the configuration]"),
    ] = None,
) -> None:
    """Show the agent at work.

    Starts a Prefect server of its own, a work pool, the agent and three flow runs, and removes all of it afterwards.
    """
    from supervisor.cli.demo import demo

    raise typer.Exit(demo(python))


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _flow_agent(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script. Ends the process with the command's exit code.

    typer turns Ctrl-C into 130 and a reader that has gone into a quiet 1, as long as commands print with `typer.echo`,
    which flushes.
    """
    try:
        app(prog_name="flow-agent")
    except BaseExceptionGroup as group:
        # Ctrl-C inside one of trio's nurseries, which a mere connect opens: typer does not look into groups.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        sys.exit(130)
