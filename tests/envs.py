"""Builds the virtual environments that hold real Prefect releases, one a release, and prints their interpreters.

    python tests/envs.py 3.8.8 2.20.26        # makes what is missing, prints one path a line

They live in a cache outside the checkout (`$FLOW_AGENT_TEST_CACHE`, else `$XDG_CACHE_HOME/flow-agent-tests`, else
`~/.cache/flow-agent-tests`), so that a fresh clone on the same machine does not download Prefect again. The folder's
name carries a digest of the constraints and the interpreter: a change of either makes a new environment and never
mends an old one. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")


def cache() -> Path:
    """The folder that holds the environments."""
    if given := os.environ.get("FLOW_AGENT_TEST_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flow-agent-tests"


def interpreter(version: str) -> Path:
    """The Python of the environment with that Prefect release; built first when it is missing.

    Raises `subprocess.CalledProcessError` when pip fails. Safe against a second caller at the same time.
    """
    tag = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.base_prefix.encode()).hexdigest()[:8]
    home = cache() / f"prefect-{version}-py{tag}-{digest}"
    python = home / "bin" / "python"
    done = home / "complete"
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return python
        print(f"installing prefect {version} into {home} (once)", file=sys.stderr, flush=True)
        shutil.rmtree(home, ignore_errors=True)
        venv.EnvBuilder(with_pip=True, symlinks=True).create(home)
        its_own = ["--compile-bytecode", "--python", str(python)]
        install(python, "--constraint", str(CONSTRAINTS), f"prefect=={version}", only_uv=its_own)
        done.touch()
    return python


def install(python: Path, *what: str, only_uv: Sequence[str] = ()) -> None:
    """Has uv install that, four times as fast as pip, where it is there and can; else the pip of that interpreter.

    `only_uv` is what uv needs to be told beyond that. It does not read pip's configuration, so where packages come from a
    place that is named there, it is pip that can. Raises `subprocess.CalledProcessError` when pip fails, too.
    """
    if uv := shutil.which("uv", path=str(Path(sys.executable).parent)):
        fixed = ["--quiet", "--no-config", "--system-certs", "--cache-dir", str(cache() / "uv")]
        if subprocess.run([uv, "pip", "install", *fixed, *only_uv, *what], check=False).returncode == 0:
            return
        print("uv cannot install that; trying pip", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, *what], check=True, stdout=sys.stderr)


def main(versions: list[str]) -> int:
    for version in versions:
        print(interpreter(version))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
