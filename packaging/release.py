#!/usr/bin/env python3
"""Puts into dist/release/ all that a page of a release holds, and nothing else, and prints it as a table.

Needs the binary in both forms (packaging/binary/build.py) in dist/. The same bytes from the same input.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import shutil
from pathlib import Path

import build
import glibc
import inventory


def release(dist: Path, out: Path) -> list[Path]:
    """Makes `out` anew from the binary in `dist`; returns its files."""
    version = build.version()
    shutil.rmtree(out, ignore_errors=True)
    packages = build.build(dist / "onedir", out, version, build.FORMATS)
    onefile = out / f"flow-agent-{version}-linux-x86_64"
    shutil.copy(dist / "flow-agent", onefile)
    onefile.chmod(0o755)
    licences = out / f"flow-agent-{version}-licences.txt"
    own = (build.PROJECT / "LICENSE").read_text()
    licences.write_text(f"flow-agent {version}: Apache-2.0\n\n{own}\n{inventory.notices(dist / 'onedir')}")
    time = datetime.datetime.fromtimestamp(build.epoch(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    sbom = out / f"flow-agent-{version}.cdx.json"
    sbom.write_text(inventory.sbom(dist / "onedir", version, time, onefile))
    files = [onefile, *packages, sbom, licences]
    sums = out / "SHA256SUMS"
    sums.write_text("".join(f"{digest(path)}  {path.name}\n" for path in files))
    return [*files, sums]


def digest(path: Path) -> str:
    """Its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(files: list[Path], floors: dict[str, str]) -> str:
    """Name, size in MB of 1,000,000 bytes, oldest glibc, SHA-256."""
    rows = [("FILE", "MB", "GLIBC", "SHA-256")]
    rows += [(path.name, f"{path.stat().st_size / 1e6:.2f}", floors.get(path.name, ""), digest(path)) for path in files]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {floor:<{widths[2]}}  {sum_}" for name, size, floor, sum_ in rows
    )


def main() -> None:
    """Build, print."""
    parser = argparse.ArgumentParser(description="Put together all that a page of a release holds.")
    parser.add_argument("--dist", type=Path, default=build.PROJECT / "dist", help="where the binary is; default: dist")
    parser.add_argument("--out", type=Path, help="made anew; default: dist/release")
    arguments = parser.parse_args()
    files = release(arguments.dist, (arguments.out or arguments.dist / "release").resolve())
    one, tree = (".".join(map(str, glibc.floor(arguments.dist / form))) for form in ("flow-agent", "onedir"))
    floors = {path.name: tree for path in files if path.suffix in (".deb", ".rpm", ".gz")} | {files[0].name: one}
    print(table(files, floors))


if __name__ == "__main__":
    main()
