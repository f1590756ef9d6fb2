"""Runs one function of `tests.test_logs_disk` on a small file system of its own, and says what it returned.

The file system is mounted in a namespace of its own, so it is gone with the process, whatever happens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_small_disk(kind: str, function: str, folder: Path) -> Any:
    """What the function returns, given the mounted folder. `kind` is tmpfs (4 MB) or ramfs (no holes, no reserves)."""
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    size = ["-o", "size=4m"] if kind == "tmpfs" else []
    inside = 'mount -t "$1" $2 $3 none "$4" && exec "$5" -m tests.small_disk "$6" "$4"'
    arguments = [kind, *(size or ["", ""]), str(folder), sys.executable, function]
    command = [*namespace, "sh", "-c", inside, "sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    from tests import test_logs_disk

    print(json.dumps(getattr(test_logs_disk, sys.argv[1])(Path(sys.argv[2]))))
