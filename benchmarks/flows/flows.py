"""The flows that are measured, the same for every contender."""

import json
import os
import subprocess
import sys
from pathlib import Path

from prefect import flow


@flow
def noop():
    pass


@flow
def sleeper(report: str):
    """Starts a child, writes [its own pid, the child's pid] to the file `report`, and waits to be cancelled."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    Path(f"{report}.part").write_text(json.dumps([os.getpid(), child.pid]))
    Path(f"{report}.part").rename(report)
    child.wait()
