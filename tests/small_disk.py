"""Runs one function of a test module on a small file system of its own, and says what it returned.

The file system is mounted in a namespace of its own, so it is gone with the process, whatever happens.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_small_disk(kind: str, function: Callable[[Path], Any], folder: Path) -> Any:
    """What the function returns, given the mounted folder. `kind` is tmpfs (4 MB) or ramfs (no holes, no reserves)."""
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    size = ["-o", "size=4m"] if kind == "tmpfs" else []
    inside = 'mount -t "$1" $2 $3 none "$4" && exec "$5" -m tests.small_disk "$6" "$7" "$4"'
    arguments = [kind, *(size or ["", ""]), str(folder), sys.executable, function.__module__, function.__name__]
    command = [*namespace, "sh", "-c", inside, "sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, function, folder = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(Path(folder))))
