"""`flow-agent version`."""

from __future__ import annotations

import platform

import typer

import supervisor


def version() -> None:
    """Show the versions of agent and libraries."""
    typer.echo(sentence())


def sentence() -> str:
    """Read from the packages' metadata: importing trio and httpx to ask them would take a quarter of a second."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    parts = [f"Python {platform.python_version()}"]
    for package in ("trio", "httpx"):
        try:
            parts.append(f"{package} {installed(package)}")
        except PackageNotFoundError:  # a binary may have been built without metadata
            continue
    return f"flow-agent {supervisor.__version__} ({', '.join(parts)})"
