"""A package that a Python can import as Prefect, as far as a fork server asks of it: for tests of what is ours to do.

Its import takes no time, and its engine is whatever the test says. With real Prefects the same is tested end to end.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

CONTEXT = """
import os

def root_settings_context():
    return dict(os.environ)

GLOBAL_SETTINGS_CONTEXT = root_settings_context()
"""
LOGGING = """
PROCESS_LOGGING_CONFIG = {"level": "the fork server's"}

def setup_logging(incremental=None):
    PROCESS_LOGGING_CONFIG["incremental"] = incremental
"""


def fake_prefect(folder: Path, engine: str, version: str = "3.8.8") -> Path:
    """Makes it in `folder`, with that source as `prefect.engine`; returns what PYTHONPATH must hold."""
    site = folder / "site"
    for path, text in {
        "prefect/__init__.py": "from prefect import context\nfrom prefect.logging import configuration\n",
        "prefect/context.py": CONTEXT,
        "prefect/engine.py": "if __name__ == '__main__':\n" + indent(engine or "pass", "    "),
        "prefect/logging/__init__.py": "",
        "prefect/logging/configuration.py": LOGGING,
        f"prefect-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: prefect\nVersion: {version}\n",
    }.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    return site
