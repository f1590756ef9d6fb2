"""`flow-agent demo`: the agent at work, on a server of its own. The front door only; `supervisor.demo` does it."""

from __future__ import annotations

from pathlib import Path

import typer


def demo(python: Path | None) -> int:
    """Shows it and returns the exit status: 0 when all three runs ended as they should have."""
    from supervisor.demo.show import run
    from supervisor.errors import FlowAgentError

    try:
        return run(python, typer.echo)
    except FlowAgentError as error:
        typer.echo(str(error), err=True)
        return 1
