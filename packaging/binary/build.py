#!/usr/bin/env python3
"""Builds the packed binary in both forms: dist/flow-agent (one file) and dist/onedir/, the same bytes each time.

    python packaging/binary/build.py                # what has changed since the last time, into dist/
    python packaging/binary/build.py --out DIR      # anew, somewhere else
    python packaging/binary/build.py --host         # with this Python instead of the build root; needs a newer glibc

The build root is Debian 11 with a CPython of our own (sources.toml, toolchain.sh), so that the binary runs wherever glibc is
2.31 or newer. It is made once, in the test cache, and needs root, mmdebstrap and two minutes of two cores. Where it cannot be
made, this Python is used instead, and said. At the end the oldest glibc that can run the result is printed; newer than 2.36 is
an error.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import glibc  # noqa: E402 - beside this file

SUITE = "bullseye"  # glibc 2.31
PYTHON = "3.11"
NEWEST_GLIBC = (2, 36)
# Debian's own servers, then the one for releases that are no longer kept up, then every file that ever was.
MIRRORS = (
    "http://deb.debian.org/debian",
    "http://security.debian.org/debian-security",
    "http://archive.debian.org/debian",
    "http://snapshot.debian.org/archive/debian/20261101T000000Z",
)
EPOCH = "1767225600"  # the time in everything that must have one; the same for every build
# A compiler and what OpenSSL's and CPython's scripts call.
PACKAGES = (
    *("base-files", "bash", "binutils", "bzip2", "coreutils", "dash", "diffutils", "findutils", "gcc", "grep", "gzip"),
    *(
        "libc-bin",
        "libc6-dev",
        "libffi-dev",
        "libsqlite3-dev",
        "make",
        "mawk",
        "patch",
        "perl",
        "sed",
        "tar",
        "xz-utils",
    ),
)
# Test data of others that OpenSSL's archive carries along: five sixths of it.
_LEFT_OUT = ("pyca-cryptography", "wycheproof", "krb5", "corpora", "gost-engine", "oqs-provider", "tlsfuzzer")

_PIP = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-deps", "--require-hashes")


class NoRoot(Exception):
    """What is missing for the build root, in words."""


class BuildFailed(Exception):
    """What went wrong inside the build root: the end of what was said there."""


# --- the build root ---------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Where the tests keep what is costly to make."""
    if named := os.environ.get("FLOW_AGENT_TEST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flow-agent-tests"


def why_no_root() -> str | None:
    """What this machine lacks for making the build root, in words; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "only root can make it"
    if missing := [name for name in ("mmdebstrap", "unshare", "chroot") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (apt install mmdebstrap)"
    return None


def build_root() -> Path:
    """The build root, made first when it is missing: root/ is Debian, python/ and run are what was compiled in it.

    Safe against a second caller at the same time. Raises `NoRoot` where this machine cannot make one.
    """
    recipe = "".join((HERE / name).read_text() for name in ("sources.toml", "toolchain.sh", "modules.setup"))
    recipe += (HERE / "requirements.txt").read_text() + (HERE / "bootloader.patch").read_text() + " ".join(PACKAGES)
    made = cache() / f"binary-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not made.exists() and (reason := why_no_root()):
        raise NoRoot(reason)
    with locked(made):
        if not made.exists():
            _make_root(made)
    return made


def _make_root(made: Path) -> None:
    print(f"making the build root {made} once; this takes some minutes", flush=True)
    half = Path(tempfile.mkdtemp(prefix=f"{made.name}-", dir=made.parent))
    try:
        sources = half / "sources"
        for folder in (sources, half / "python"):
            folder.mkdir()
        with ThreadPoolExecutor() as pool:
            fetched = pool.submit(_fetch_sources, sources)
            packages = pool.submit(_fetch_packages, half / "wheels")
            _unpack_debian(half / "root")
            fetched.result()
            packages.result()
        for name in ("toolchain.sh", "modules.setup", "bootloader.patch"):
            shutil.copy(HERE / name, sources)
        enter(half, ["bash", "/build/toolchain.sh"], build=sources)
        shutil.move(sources / "run", half / "run")
        site = half / "python" / "lib" / f"python{PYTHON}" / "site-packages"
        shutil.copytree(half / "wheels", site, dirs_exist_ok=True)
        [old] = site.glob("PyInstaller/bootloader/*/run")
        shutil.copy(half / "run", old)
        for folder in (sources, half / "wheels"):
            shutil.rmtree(folder)
        half.chmod(0o755)
        half.rename(made)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def _unpack_debian(root: Path) -> None:
    """Only unpacked, not set up: nothing but a compiler will run in it."""
    wanted = ["--variant=extract", f"--include={','.join(PACKAGES)}", '--aptopt=Acquire::Languages "none"']
    for mirror in (MIRRORS[0], *MIRRORS[2:]):
        done = subprocess.run(
            ["mmdebstrap", "--quiet", *wanted, SUITE, str(root), mirror], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            break
        shutil.rmtree(root, ignore_errors=True)
    else:
        raise NoRoot(f"cannot unpack Debian's {SUITE}: {done.stderr.strip()[-500:]}")
    (root / "usr/bin/awk").symlink_to("mawk")  # what setting up would have done
    for folder in ("build", "opt/python", "proc", "dev"):
        (root / folder).mkdir(parents=True, exist_ok=True)


def _fetch_sources(folder: Path) -> None:
    """Unpacks every source of sources.toml, each archive checked against its sum first."""
    for source in tomllib.loads((HERE / "sources.toml").read_text())["source"]:
        bases = [source["url"]] if "url" in source else [f"{mirror}/{source['pool']}" for mirror in MIRRORS]
        into = folder
        for name, digest in source["files"].items():
            archive = _fetch([f"{base}/{name}" for base in bases], digest)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                members = [member for member in tar if _is_wanted(member.name)]
                tar.extractall(into, members, filter="data")
            into = folder / members[0].name.split("/")[0]  # Debian's patches go into the source they are for


def _is_wanted(name: str) -> bool:
    parts = name.split("/")
    return not any(part in _LEFT_OUT for part in parts) and not ("recipes" in parts and len(parts) > 4)


def _fetch(urls: Sequence[str], digest: str) -> bytes:
    trouble = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own list
                found: bytes = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            trouble.append(f"{url}: {error}")
            continue
        if hashlib.sha256(found).hexdigest() == digest:
            return found
        trouble.append(f"{url}: other bytes than sources.toml says")
    raise NoRoot("cannot fetch a source:\n  " + "\n  ".join(trouble))


def _fetch_packages(folder: Path) -> None:
    """What requirements.txt names, as wheels for the build root's Python and not this one."""
    pip = [sys.executable, *_PIP, "--no-compile"]
    tags = [f"--platform={tag}_{os.uname().machine}" for tag in ("manylinux2014", "manylinux_2_28")]
    wheels = ["--python-version", PYTHON, "--only-binary=:all:"]
    subprocess.run([*pip, *tags, *wheels, "--target", str(folder), "-r", str(HERE / "requirements.txt")], check=True)


def enter(made: Path, command: Sequence[str], *, build: Path, env: Mapping[str, str] | None = None) -> None:
    """Runs a command inside a build root, with `build` as /build. Raises `BuildFailed` with the end of what it said."""
    root = made / "root"
    mounts = [(build, "build"), (made / "python", "opt/python"), (Path("/dev"), "dev")]
    script = [f"mount --rbind {shlex.quote(str(path))} {shlex.quote(str(root / name))}" for path, name in mounts]
    script.append(f"mount -t proc proc {shlex.quote(str(root / 'proc'))}")
    script.append(f"exec chroot {shlex.quote(str(root))} {shlex.join(command)}")
    environ = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/build",
        "SOURCE_DATE_EPOCH": EPOCH,
        "PYTHONHASHSEED": "0",
    }
    # Mounts and processes are in namespaces of their own and go with them.
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation=private",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-ec",
            "\n".join(script),
        ],
        env={**environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise BuildFailed(f"'{shlex.join(command)}' failed:\n{done.stdout.decode(errors='replace')[-3000:]}")


# --- the binary -------------------------------------------------------------------------------------------------------


def build(out: Path, *, host: bool = False) -> None:
    """Both forms, into the folder `out`."""
    made = None if host else build_root()
    with tempfile.TemporaryDirectory(prefix="flow-agent-build-") as scratch:
        stage = Path(scratch)
        _put_together(stage)
        arguments = ["-m", "PyInstaller", "--noconfirm", "--log-level=WARN", "--distpath=dist", "--workpath=work"]
        if made is None:
            _host_pyinstaller(stage, arguments)
        else:
            python = f"/opt/python/bin/python{PYTHON}"
            environ = {"FLOW_AGENT_STAGE": "/build", "PYTHONDONTWRITEBYTECODE": "1"}
            shell = f"cd /build && exec {shlex.join([python, *arguments, 'flow-agent.spec'])}"
            enter(made, ["sh", "-c", shell], build=stage, env=environ)
        _take_out(stage / "dist", out)


def _put_together(stage: Path) -> None:
    """What is packed: our code and the files below share/, which `flow-agent install` puts into place."""
    for name in ("entry.py", "flow-agent.spec"):
        shutil.copy(HERE / name, stage)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PROJECT / "supervisor", stage / "supervisor", ignore=ignored)
    share = stage / "share"
    for folder, name in ((PROJECT / "systemd", "systemd"), (PROJECT / "packaging" / "root", "root")):
        shutil.copytree(folder, share / name, ignore=ignored)
    shutil.copy(PROJECT / "agent.toml.example", share)


def _host_pyinstaller(stage: Path, arguments: Sequence[str]) -> None:
    venv = stage / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    pip = [python, *_PIP]
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    environ = {**os.environ, "FLOW_AGENT_STAGE": str(stage), "SOURCE_DATE_EPOCH": EPOCH, "PYTHONHASHSEED": "0"}
    subprocess.run([python, *arguments, "flow-agent.spec"], cwd=stage, env=environ, check=True)


def _take_out(dist: Path, out: Path) -> None:
    """Into place by renames: an agent that runs from there keeps what it has open. One file first, then the tree."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as new:
        tree, file = Path(new) / "onedir", Path(new) / "flow-agent"
        shutil.copytree(dist / "onedir", tree, symlinks=True)
        (tree / "flow-agent-dir").rename(tree / "flow-agent")
        shutil.copy(dist / "flow-agent", file)
        for path in (*sorted(Path(new).rglob("*")), file):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.name == "flow-agent" else 0o644)
            os.utime(path, (int(EPOCH), int(EPOCH)), follow_symlinks=False)
        if (out / "onedir").exists():
            (out / "onedir").rename(Path(new) / "old")
        tree.rename(out / "onedir")
        file.rename(out / "flow-agent")


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file of both forms, and where every link leads."""
    found = {}
    for path in (out / "flow-agent", *sorted((out / "onedir").rglob("*"))):
        if path.is_symlink():
            found[str(path.relative_to(out))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# --- once for the same input ------------------------------------------------------------------------------------------


def inputs() -> str:
    """A sum of all that the binary is made of."""
    seen = hashlib.sha256()
    folders = (PROJECT / "supervisor", HERE, PROJECT / "systemd", PROJECT / "packaging" / "root")
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            seen.update(f"{path.relative_to(PROJECT)} {path.stat().st_mode:o}\n".encode() + path.read_bytes())
    return seen.hexdigest() + hashlib.sha256((PROJECT / "agent.toml.example").read_bytes()).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(*, host: bool = False) -> Path:
    """dist/ with both forms, made when anything they are made of has changed. Safe against a second caller."""
    dist = PROJECT / "dist"
    if not host:
        build_root()
    with locked(dist / "binary"):
        stamp, made = dist / ".binary", (dist / "flow-agent", dist / "onedir")
        wanted = f"{inputs()} {host}"
        if not (stamp.exists() and stamp.read_text() == wanted and all(path.exists() for path in made)):
            stamp.unlink(missing_ok=True)
            build(dist, host=host)
            stamp.write_text(wanted)
    return dist


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the packed binary in both forms.")
    parser.add_argument("--out", type=Path, help="build anew, into this folder instead of dist/")
    parser.add_argument("--host", action="store_true", help="with this Python, for a glibc as new as this machine's")
    options = parser.parse_args()
    work = functools.partial(build, options.out) if options.out else make
    try:
        work(host=options.host)
    except NoRoot as error:
        if options.host:
            raise
        print(f"no build root: {error}\nbuilding with {sys.executable} instead", file=sys.stderr, flush=True)
        work(host=True)
    except BuildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = options.out or PROJECT / "dist"
    floors = glibc.report(out)
    if max(floors.values()) > NEWEST_GLIBC:
        print("error: a glibc newer than 2.36 would be needed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
