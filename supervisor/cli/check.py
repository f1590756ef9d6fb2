"""`flow-agent check`: whether the configuration can be used and, with `--server`, whether the server agrees."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from supervisor.cli.survey import Row
    from supervisor.config import Config

EX_CONFIG = 78


def check(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The configuration. [default: /etc/flow-agent/agent.toml, if it is there]"),
    ] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Also ask the server and the flows' Python. Changes nothing there.")
    ] = False,
    api: Annotated[str | None, typer.Option(metavar="URL", help="Another Prefect server than the configured.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but what is wrong or unwise.")] = False,
) -> None:
    """Check the configuration.

    With --server, also what it names: the pools, queues and deployments there, and the flows' Python here.

    Exits 0 when all of it can be used, 78 when the configuration has mistakes, 1 when server or interpreter have.
    """
    from supervisor.config.file import load, warnings
    from supervisor.errors import ConfigError

    try:
        loaded = load(config, environ=os.environ, flags={"api.url": api})
        if not quiet:
            typer.echo(f"{loaded.path or 'configuration without a file'}: ok")
        for warning in warnings(loaded):
            typer.echo(f"warning: {warning}")
        if not server:
            return
        rows = _ask(loaded)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EX_CONFIG) from None
    usable = all(row.usable for row in rows)
    if not (quiet and usable):
        typer.echo("\n" + table(rows))
    raise typer.Exit(0 if usable else 1)


def _ask(config: Config) -> list[Row]:
    import trio

    from supervisor.app import connect
    from supervisor.cli.survey import survey
    from supervisor.config.file import credentials
    from supervisor.errors import ConfigError
    from supervisor.process.interpreter import inspect

    rows: list[Row] | ConfigError | None = None

    async def ask() -> None:
        nonlocal rows
        try:
            async with connect(lambda: config) as (_, backend):
                rows = await survey(config, backend, inspect=inspect, secrets=credentials(config.api, os.environ))
        except ConfigError as error:
            rows = error

    async def main() -> None:
        # A KeyboardInterrupt could be raised anywhere, also where a library takes it for a broken connection.
        with trio.open_signal_receiver(signal.SIGINT) as interrupts:
            async with trio.open_nursery() as nursery:

                async def until_interrupted() -> None:
                    await anext(interrupts)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_interrupted)
                await ask()
                nursery.cancel_scope.cancel()

    trio.run(main)
    if rows is None:
        raise KeyboardInterrupt
    if isinstance(rows, ConfigError):
        raise rows
    return rows


def table(rows: list[Row]) -> str:
    """The rows under their headings, aligned."""
    lines = [("WHAT", "FOUND", "VERDICT"), *((row.what, row.found, row.verdict) for row in rows)]
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{what:<{first}}  {found:<{second}}  {verdict}".rstrip() for what, found, verdict in lines)
