"""`flow-agent install`, for who has only the binary. The front door only; `supervisor.install` does it."""

from __future__ import annotations

from typing import Annotated

import typer


def install(
    only_show: Annotated[
        bool, typer.Option("--print", help="Show every file and command, and change nothing. Needs no root.")
    ] = False,
) -> None:
    """Install this binary: the program, its systemd units, its user, a configuration.

    Needs root. Starts nothing. Run again with a newer binary, it upgrades; what has been edited is kept.
    """
    from supervisor.install.bundle import CannotInstall, own_bundle
    from supervisor.install.machine import Machine
    from supervisor.install.work import carry_out, prepare, show

    try:
        work = prepare(own_bundle(), Machine())
        if only_show:
            show(work, typer.echo)
        else:
            carry_out(work, typer.echo)
    except CannotInstall as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
