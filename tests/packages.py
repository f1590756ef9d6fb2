"""The packages, each built at most once for the same input, and what is in them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests import envs
from tests.binaries import dist

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "packaging" / "build.py"
_KEPT_SECONDS = 86400  # another session may be reading what we have no use for
NEXT = "99.0.0"  # a version to upgrade to


@functools.cache
def onedir() -> Path:
    """The tree that goes into them."""
    return dist() / "onedir"


@functools.cache
def version() -> str:
    """The project's version."""
    said = subprocess.run([onedir() / "flow-agent", "version"], capture_output=True, text=True, check=True).stdout
    return said.split()[1]


def build(out: Path, kind: str, as_version: str, onedir: Path, **environ: str) -> Path:
    """Builds one package anew, "deb", "rpm" or "tar.gz"."""
    words = ["--version", as_version, "--onedir", onedir, "--out", out, "--formats", kind]
    done = subprocess.run(
        [sys.executable, BUILD, *words], env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@functools.cache
def package(kind: str, as_version: str | None = None) -> Path:
    """The package of that kind, of the project's version or another. Safe for several test processes at once."""
    wanted = as_version or version()
    folder = envs.cache() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{kind}-{wanted}-{_inputs()}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for older in folder.glob(f"{kind}-{wanted}-*"):
                if older.stat().st_mtime < time.time() - _KEPT_SECONDS:
                    shutil.rmtree(older)
            part = folder / "part"
            shutil.rmtree(part, ignore_errors=True)
            build(part, kind, wanted, onedir())
            part.rename(made)
    (found,) = made.iterdir()
    return found


@functools.cache
def _inputs() -> str:
    """A sum of all that they are made of."""
    seen = hashlib.sha256()
    for path in sorted(
        path
        for folder in (ROOT / "packaging", ROOT / "systemd", onedir())
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ):
        seen.update(f"{path.name} {path.stat().st_mode:o}\n".encode() + path.read_bytes())
    for name in ("agent.toml.example", "LICENSE"):
        seen.update((ROOT / name).read_bytes())
    return seen.hexdigest()[:12]
