"""The packed binary in both forms, built at most once for the same input, and agents that run it."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.agents import AgentProcess

ROOT = Path(__file__).parents[1]
FORMS = {"onefile": "flow-agent", "onedir": "onedir/flow-agent"}


@functools.cache
def recipe() -> ModuleType:
    """packaging/binary/build.py as a module."""
    spec = importlib.util.spec_from_file_location("binary_build", ROOT / "packaging" / "binary" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def dist() -> Path:
    """dist/ with both forms as `make binary` leaves them. Safe for several test processes at once.

    FLOW_AGENT_TEST_DIST names a folder that has both already, and spares the build.
    """
    if made := os.environ.get("FLOW_AGENT_TEST_DIST"):
        return Path(made)
    subprocess.run([sys.executable, ROOT / "packaging" / "binary" / "build.py"], check=True, capture_output=True)
    return ROOT / "dist"


def binary(form: str) -> Path:
    """The program of that form: "onefile" or "onedir"."""
    return dist() / FORMS[form]


def packed_agent(program: Path, config: Mapping[str, Any] | str, env: Mapping[str, str] | None = None) -> AgentProcess:
    """An agent, not started yet, that is this program and no Python with our package."""
    instead = ("sh", "-c", f'shift 3; exec {program} "$@"', "instead-of-python-m-supervisor")
    return AgentProcess(config, env=env, behind=instead)
