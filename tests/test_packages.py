"""The packages: what is in them, what their scripts do, and that what they say of the program is true. Nothing is booted."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pty
import re
import select
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from supervisor.cli import app
from tests.machines import root_directory
from tests.machines import why_not as why_no_machine
from tests.packages import NEXT, ROOT, build, onedir, package, version

PACKAGING = ROOT / "packaging"
SHARE = PACKAGING / "root/usr/share"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = sorted(
    {word for command in COMMANDS.values() for option in command.params for word in option.opts} - {"work_queue"}
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and change the root directory")


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool} (apt install {tool})")


# --- what is made from something else ---------------------------------------------------------------------------------


def test_completions_and_manual_are_those_of_this_program() -> None:
    check = [sys.executable, PACKAGING / "generate.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_and_option_is_in_the_manual() -> None:
    page = (SHARE / "man/man8/flow-agent.8").read_text().replace("\\-", "-")
    sections = dict(re.findall(r"^\.SS (\w+)\n(.*?)(?=^\.S[SH])", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == {name for name, command in COMMANDS.items() if not command.hidden}
    for name, command in COMMANDS.items():
        wanted = {word for option in command.params for word in option.opts}
        said = set(re.findall(r"--?[a-z][\w-]*", sections[name])) | set(
            re.findall(r"^\.I ([A-Z_]+)$", sections[name], re.MULTILINE)
        )
        assert {word.upper() if word[0] != "-" else word for word in wanted} <= said, name
        assert {word for word in said if word.startswith("--")} <= wanted | {"--help", "--version"}, name


def test_every_key_of_the_configuration_is_in_the_manual() -> None:
    page = (SHARE / "man/man5/agent.toml.5").read_text()
    keys = set(re.findall(r"^#?(\w+) = ", (ROOT / "agent.toml.example").read_text(), re.MULTILINE))
    assert len(keys) > 40
    assert not {key for key in keys if f"\\fB{key}\\fR" not in page}


@needs("mandoc")
def test_the_manual_is_well_formed() -> None:
    pages = sorted(SHARE.glob("man/man?/*"))
    assert len(pages) == 2
    done = subprocess.run(["mandoc", "-Tlint", *pages], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


class Terminal:
    """A bash that a person types into. Owns the process and its terminal."""

    def __init__(self, home: Path) -> None:
        self._master, slave = pty.openpty()
        environ = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", "PS1": "ready> ", "LC_ALL": "C.UTF-8"}
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            cwd=home, env=environ, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        script = SHARE / "bash-completion/completions/flow-agent"
        self.type(
            f"bind 'set bell-style none'; bind 'set completion-query-items 0'; . {script}; echo so''urced\r", "sourced"
        )

    def type(self, text: str, until: str) -> str:
        """Types it and returns what is shown until that appears."""
        os.write(self._master, text.encode())
        shown, deadline = "", time.monotonic() + 30
        while until not in shown:
            readable, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"typed {text!r}, waited for {until!r}, saw {shown!r}"
            shown += os.read(self._master, 65536).decode(errors="replace")
        return shown

    def close(self) -> None:
        self._bash.kill()
        self._bash.wait()
        os.close(self._master)


def test_a_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    (tmp_path / "my-agent.toml").touch()
    terminal = Terminal(tmp_path)
    try:
        for typed, completed in [
            ("flow-agent ch\t", "flow-agent check "),
            ("flow-agent start --log-f\t", "flow-agent start --log-format "),
            ("flow-agent start --log-format j\t", "flow-agent start --log-format json "),
            ("flow-agent start --log-format=j\t", "flow-agent start --log-format=json "),
            ("flow-agent check --config my\t", "flow-agent check --config my-agent.toml "),
            ("flow-agent runs --js\t", "flow-agent runs --json "),
        ]:
            terminal.type(f"\x15{typed}", completed)
        # Readline writes the list in as many pieces as it likes: it is all there when the prompt is again.
        shown = terminal.type("\x15flow-agent start --\t\t", "\nready> flow-agent start --")
        assert {word for word in re.findall(r"--[a-z-]+", shown) if word in OPTIONS} >= {
            "--config",
            "--pool",
            "--run-once",
            "--tag",
        }
    finally:
        terminal.close()


# --- what is in them --------------------------------------------------------------------------------------------------


def members(deb: Path, part: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files in "data" or "control" of a .deb, by dpkg's own reading of it."""
    switch = {"data": "--fsys-tarfile", "control": "--ctrl-tarfile"}[part]
    packed = subprocess.run(["dpkg-deb", switch, deb], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            yield member, file.read() if file else b""


def test_the_deb_holds_what_belongs_on_a_machine_and_nothing_that_others_could_change() -> None:
    found = {member.name.removeprefix("."): (member, data) for member, data in members(package("deb"), "data")}
    for name in (
        "/usr/lib/flow-agent/flow-agent",
        "/usr/lib/systemd/system/flow-agent.service",
        "/usr/lib/systemd/system/flow-agent@.service",
        "/usr/lib/sysusers.d/flow-agent.conf",
        "/usr/lib/tmpfiles.d/flow-agent.conf",
        "/usr/share/man/man8/flow-agent.8.gz",
        "/usr/share/man/man5/agent.toml.5.gz",
        "/usr/share/bash-completion/completions/flow-agent",
        "/usr/share/zsh/vendor-completions/_flow-agent",
        "/usr/share/fish/vendor_completions.d/flow-agent.fish",
        "/usr/share/doc/flow-agent/copyright",
        "/usr/share/doc/flow-agent/examples/hardening.conf",
    ):
        assert name in found, name
    assert found["/usr/bin/flow-agent"][0].linkname == "../lib/flow-agent/flow-agent"
    assert found["/etc/flow-agent/agent.toml"][1] == (ROOT / "agent.toml.example").read_bytes()
    for name, (member, _) in found.items():
        assert (member.uid, member.gid) == (0, 0), name
        assert member.issym() or not member.mode & 0o7022, name
        is_program = name == "/usr/lib/flow-agent/flow-agent"
        assert not member.isfile() or member.mode == (0o755 if is_program else 0o644), name
    assert {name for name in found if not name.startswith(("/usr/", "/etc/flow-agent", "/usr"))} <= {
        "/etc/",
        "/etc",
        "/usr",
        "/",
    }
    assert found["/etc/flow-agent"][0].mode == 0o750
    control = {member.name.removeprefix("./"): data.decode() for member, data in members(package("deb"), "control")}
    assert control["conffiles"].split() == ["/etc/flow-agent/agent.toml"]
    assert f"\nVersion: {version()}\n" in control["control"]
    assert re.search(r"libc6 \(>= 2\.\d+\)", control["control"])


def test_the_changelog_begins_with_this_version() -> None:
    first, *_ = (PACKAGING / "changelog").read_text().splitlines()
    assert first.startswith(f"flow-agent ({version()}) ")
    data = {member.name: data for member, data in members(package("deb"), "data")}
    assert gzip.decompress(data["./usr/share/doc/flow-agent/changelog.gz"]).decode().splitlines()[0] == first


def test_the_tarball_is_a_program_wherever_it_is_unpacked(tmp_path: Path) -> None:
    with tarfile.open(package("tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (top,) = tmp_path.iterdir()
    assert top.name == f"flow-agent-{version()}-linux-x86_64"
    said = subprocess.run([top / "bin/flow-agent", "version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"flow-agent {version()} ")
    for name in ("LICENSE", "third-party.txt.gz", "examples/agent.toml.example"):
        assert (top / "share/doc/flow-agent" / name).is_file()


RPM_SCRIPTS = {"pre": 1023, "post": 1024, "preun": 1025, "postun": 1026, "posttrans": 1152}  # and their tags


def rpm_header(rpm: Path) -> dict[int, list[Any]]:
    """Tag to values, of the main header: the index of an RPM file is sixteen bytes a tag."""
    data, at = rpm.read_bytes(), 96
    for header in range(2):
        count, size = struct.unpack_from(">II", data, at + 8)
        index, store = at + 16, at + 16 + 16 * count
        if header == 1:
            break
        at = (store + size + 7) // 8 * 8
    found: dict[int, list[Any]] = {}
    for number in range(count):
        tag, kind, offset, length = struct.unpack_from(">IIII", data, index + 16 * number)
        if kind in (3, 4):
            found[tag] = list(struct.unpack_from(f">{length}{'HI'[kind - 3]}", data, store + offset))
        elif kind in (6, 8, 9):
            found[tag] = [text.decode() for text in data[store + offset :].split(b"\0", length)[:length]]
    return found


def test_the_rpm_holds_the_same_and_its_scripts() -> None:
    header = rpm_header(package("rpm"))
    folders, names, numbers = header[1118], header[1117], header[1116]
    files = {folders[number] + name: place for place, (name, number) in enumerate(zip(names, numbers, strict=True))}
    flags, modes, groups, users = (header[tag] for tag in (1037, 1030, 1040, 1039))
    assert flags[files["/etc/flow-agent/agent.toml"]] == 0b10001  # %config(noreplace)
    assert stat.S_IMODE(modes[files["/etc/flow-agent"]]) == 0o750
    assert groups[files["/etc/flow-agent"]] == "flow-agent"
    assert set(users) == {"root"}
    assert {group for path, group in zip(files, groups, strict=True) if path != "/etc/flow-agent"} == {"root"}
    assert "/usr/share/zsh/site-functions/_flow-agent" in files
    deb = {member.name.removeprefix(".") for member, _ in members(package("deb"), "data") if not member.isdir()}
    only_deb = ("/usr/share/lintian", "/usr/share/zsh", "/usr/share/doc/flow-agent/copyright")
    assert {name for name in deb - set(files) if not name.startswith(only_deb)} == set()
    assert "useradd" in header[RPM_SCRIPTS["pre"]][0]


def small_onedir(folder: Path) -> Path:
    """A tree that packs faster and has all kinds of files of the real one."""
    (folder / "_internal").mkdir(parents=True)
    shutil.copy(onedir() / "flow-agent", folder)
    for library in sorted(onedir().glob("_internal/*.so*"))[:2]:
        shutil.copy(library, folder / "_internal")
    return folder


@pytest.mark.parametrize("kind", ["deb", "rpm", "tar.gz"])
def test_a_second_build_has_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first = build(tmp_path / "first", kind, "1.2.3", small_onedir(tmp_path / "a"))
    other = small_onedir(tmp_path / "b")
    for path in other.rglob("*"):  # as another umask and another day would have left them
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1, 1))
    second = build(tmp_path / "second", kind, "1.2.3", other, TZ="Pacific/Apia", LC_ALL="C")
    assert first.read_bytes() == second.read_bytes()
    later = build(tmp_path / "later", kind, "1.2.3", other, SOURCE_DATE_EPOCH="2000000000")
    assert first.read_bytes() != later.read_bytes()


if shutil.which("lintian") is not None:  # 173 packages, for this one: where somebody has it, so before a release

    def test_lintian_has_nothing_to_say() -> None:
        check = ["lintian", "--allow-root", "--fail-on", "error,warning", package("deb")]
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- a release --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """dist/release as `make release` leaves it, and what it printed."""
    out = tmp_path_factory.mktemp("release") / "release"
    script = [sys.executable, PACKAGING / "release.py", "--dist", onedir().parent, "--out", out]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_release_is_complete_and_its_sums_are_right(release: tuple[Path, str]) -> None:
    out, table = release
    name = f"flow-agent-{version()}"
    assert {path.name for path in out.iterdir()} == {
        f"{name}-linux-x86_64",
        f"flow-agent_{version()}_amd64.deb",
        f"{name}-1.x86_64.rpm",
        f"{name}-linux-x86_64.tar.gz",
        f"{name}.cdx.json",
        f"{name}-licences.txt",
        "SHA256SUMS",
    }
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    summed = {line.split()[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert summed == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    for path in out.iterdir():
        assert re.search(
            rf"^{re.escape(path.name)} .*{hashlib.sha256(path.read_bytes()).hexdigest()}$", table, re.MULTILINE
        )


def test_the_sbom_names_all_that_is_in_the_binary(release: tuple[Path, str]) -> None:
    out, _ = release
    document = json.loads((out / f"flow-agent-{version()}.cdx.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    libraries = {entry["name"]: entry for entry in document["components"] if entry["type"] == "library"}
    assert {
        "CPython",
        "OpenSSL",
        "SQLite",
        "PyInstaller",
        "trio",
        "httpx",
        "typer",
        "msgspec",
        "psutil",
        "tomli",
    } <= set(libraries)
    for entry in libraries.values():
        assert entry["version"]
        assert entry["licenses"]
        assert entry.get("hashes") or entry["externalReferences"][0]["hashes"], entry["name"]
    files = {
        entry["name"]: entry["hashes"][0]["content"] for entry in document["components"] if entry["type"] == "file"
    }
    for path in onedir().rglob("*"):
        if path.is_file():
            assert files[f"onedir/{path.relative_to(onedir())}"] == hashlib.sha256(path.read_bytes()).hexdigest()
    texts = (out / f"flow-agent-{version()}-licences.txt").read_text()
    assert not [name for name, entry in libraries.items() if f"\n{name} {entry['version']}: " not in texts]


def test_every_pinned_package_has_its_licence_or_only_builds() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (PACKAGING / "binary/requirements.txt").read_text(), re.MULTILINE))
    builds = {"altgraph", "packaging", "pyinstaller", "pyinstaller-hooks-contrib", "setuptools"}
    left_out = {"anyio"}  # wanted by a library for what we do not use; see the excludes of the .spec
    texts = {path.stem for path in (PACKAGING / "licences").glob("*.txt")}
    assert pinned - builds - left_out <= texts


# --- on a machine -----------------------------------------------------------------------------------------------------


class Chroot:
    """A Debian that is not booted, with changes in memory. Owns its mounts, which are gone with the process that holds them."""

    def __init__(self, home: Path) -> None:
        self.root = home / "root"
        upper = home / "memory"
        for folder in (self.root, upper):
            folder.mkdir()
        overlay = f"lowerdir={root_directory('bookworm')},upperdir={upper}/upper,workdir={upper}/work"
        script = (
            f"mount -t tmpfs tmpfs {upper} && mkdir {upper}/upper {upper}/work && mount -t overlay -o {overlay} overlay "
            f"{self.root} && mount -t proc proc {self.root}/proc && mount --rbind /dev {self.root}/dev && echo up && exec cat"
        )
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n"

    def path(self, inside: str) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{self.root}") / inside.lstrip("/")

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            ["nsenter", "--target", str(self._holder.pid), "--mount", "chroot", self.root, *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def bring(self, file: Path) -> str:
        """Copies a file in; returns where it is."""
        shutil.copy(file, self.path("/root"))
        return f"/root/{file.name}"

    def close(self) -> None:
        self._holder.communicate()


@pytest.fixture
def chroot(tmp_path: Path) -> Iterator[Chroot]:
    with contextlib.closing(Chroot(tmp_path)) as chroot:
        yield chroot


@pytest.mark.skipif(why_no_machine() is not None, reason=f"README, Tests: {why_no_machine()}")
def test_a_deb_comes_and_goes_as_debian_wants_it(chroot: Chroot) -> None:
    said = chroot.run("dpkg", "--install", chroot.bring(package("deb")))
    assert "sudoedit /etc/flow-agent/agent.toml\n" in said
    assert "systemctl enable --now flow-agent\n" in said
    assert chroot.run("flow-agent", "version").startswith(f"flow-agent {version()} ")
    assert chroot.run("stat", "--format=%A %U %G", "/etc/flow-agent") == "drwxr-x--- root flow-agent\n"
    assert chroot.run("getent", "passwd", "flow-agent").split(":", 5)[5] == "/var/lib/flow-agent:/usr/sbin/nologin\n"
    assert chroot.run("systemctl", "is-enabled", "flow-agent", check=False) == "disabled\n"
    assert "/etc/flow-agent/agent.toml: ok" in chroot.run("flow-agent", "check"), "as it comes it can be used"
    assert chroot.run("systemd-analyze", "verify", "--man=no", "flow-agent.service", "flow-agent@gpu.service") == ""

    chroot.run("systemctl", "enable", "flow-agent", "flow-agent@gpu")
    config = chroot.path("/etc/flow-agent/agent.toml")
    config.write_text(config.read_text() + "# edited\n")
    chroot.path("/etc/flow-agent/api-key").write_text("secret")
    chroot.run("chgrp", "daemon", "/etc/flow-agent")
    said = chroot.run("dpkg", "--install", chroot.bring(package("deb", NEXT)))
    assert "enable --now" not in said, "who has it knows"
    assert config.read_text().endswith("# edited\n")
    assert chroot.run("stat", "--format=%G", "/etc/flow-agent") == "daemon\n", "what was changed stays so"
    assert chroot.run("systemctl", "is-enabled", "flow-agent", "flow-agent@gpu") == "enabled\nenabled\n"

    states = ["/var/lib/flow-agent", "/var/log/flow-agent", "/var/cache/flow-agent", "/var/lib/flow-agent@gpu"]
    for folder in states:
        chroot.path(folder).mkdir()
    chroot.run("dpkg", "--remove", "flow-agent")
    assert not chroot.path("/usr/lib/flow-agent").exists()
    assert config.read_text().endswith("# edited\n")
    assert all(chroot.path(folder).is_dir() for folder in states)

    chroot.run("dpkg", "--purge", "flow-agent")
    left = chroot.run("find", "/", "-xdev", "-path", "/proc", "-prune", "-o", "-name", "*flow-agent*", "-print").split()
    assert set(left) == {f"/root/{package('deb').name}", f"/root/{package('deb', NEXT).name}"}
    assert chroot.run("getent", "passwd", "flow-agent"), "other files may be its"


# --- what the scripts say to systemd ----------------------------------------------------------------------------------

# Stands for systemctl where the time until an agent is gone is the test's to say. Units and their pids are files.
_SYSTEMCTL = """\
#!/bin/sh
echo "$@" >>said
case "$*" in
*list-units*) for unit in units/*; do [ -e "$unit" ] && echo "${unit#units/} loaded active running it"; done ;;
*StatusText*) echo "1 running, no limit" ;;
*MainPID*) cat "units/${4-$3}" 2>/dev/null || echo 0 ;;
*list-jobs*) [ ! -s jobs ] || cat jobs ;;
*--signal=*) signal=${3#--signal=}; unit=$4; grep -q "$signal" "deaf/$unit" 2>/dev/null || echo 0 >"units/$unit" ;;
*is-active*) exit "$(cat inactive 2>/dev/null || echo 0)" ;;
esac
exit 0
"""
# Each second that is slept passes on the clock that the scripts read.
_SLEEP = """\
#!/bin/sh
read -r now _ <uptime
echo "$((${now%.*} + $1)).00 0.00" >uptime
"""


class Scripts:
    """The scripts of both packages among commands that only write down what they were told."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for folder in ("bin", "units", "deaf", "control", "groups"):
            (home / folder).mkdir()
        for member, data in members(package("deb"), "control"):
            if member.isfile():
                (home / "control" / Path(member.name).name).write_bytes(data)
        for name, tag in RPM_SCRIPTS.items():
            (home / "control" / name).write_text(rpm_header(package("rpm"))[tag][0])
        fakes = {"systemctl": _SYSTEMCTL, "sleep": _SLEEP}
        for name in ("systemd-sysusers", "deb-systemd-helper", "dpkg-statoverride", "chgrp"):
            fakes[name] = "#!/bin/sh\n"
        for name, text in fakes.items():
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)
        (home / "uptime").write_text("1000.00 0.00\n")

    def unit(self, name: str, pid: int, *, deaf: str = "") -> None:
        """A unit that runs, and the signals that do not end it at once."""
        (self.home / "units" / name).write_text(f"{pid}\n")
        (self.home / "deaf" / name).write_text(deaf)

    def run(self, script: str, *arguments: str) -> str:
        inner = (
            "mount --bind uptime /proc/uptime; mount --bind groups /sys/fs/cgroup; mount -t tmpfs tmpfs /run; "
            "mkdir -p /run/systemd/system; mount -t tmpfs tmpfs /usr/sbin; [ ! -e policy-rc.d ] || cp policy-rc.d /usr/sbin; "
            'PATH=$PWD/bin:$PATH exec sh control/"$@"'
        )
        done = subprocess.run(
            ["unshare", "--mount", "--propagation=private", "sh", "-ec", inner, "sh", script, *arguments],
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    @property
    def said(self) -> list[str]:
        """What systemctl was told to do, less what it was asked."""
        file = self.home / "said"
        lines = file.read_text().splitlines() if file.exists() else []
        asked = ("list-units", "show ", "list-jobs", "is-active")
        return [line for line in lines if not any(word in line for word in asked)]

    def seconds(self) -> float:
        return float((self.home / "uptime").read_text().split()[0]) - 1000


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


PLAIN, GPU = "flow-agent.service", "flow-agent@gpu.service"
Told = Callable[[str, str], str]


def told(signal: str, unit: str, whom: str = "main") -> str:
    return f"kill --kill-who={whom} --signal={signal} {unit}"


@needs_root
def test_a_removal_cancels_what_runs_before_it_stops_the_units(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    scripts.unit(GPU, 12)
    said = scripts.run("prerm", "remove")
    assert scripts.said == [told("QUIT", PLAIN), told("QUIT", GPU), f"--no-block stop {PLAIN} {GPU}"]
    for unit in (PLAIN, GPU):
        assert f"stopping {unit} (1 running, no limit); flow runs that have not ended are cancelled now" in said
    assert scripts.seconds() == 0


@needs_root
def test_a_removal_kills_after_a_while_and_never_takes_more_than_a_minute(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11, deaf="QUIT")
    scripts.unit(GPU, 12)
    said = scripts.run("prerm", "remove")
    assert scripts.said[2:] == [told("TERM", PLAIN), told("TERM", GPU), f"--no-block stop {PLAIN} {GPU}"]
    assert "killing them" in said
    assert 40 <= scripts.seconds() <= 50


@needs_root
def test_a_removal_ends_an_agent_that_hangs_within_a_minute(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11, deaf="QUIT TERM KILL")
    scripts.run("prerm", "remove")
    assert scripts.said[-1] == told("KILL", PLAIN, "all")
    assert scripts.seconds() <= 60


@needs_root
def test_a_removal_without_an_agent_says_and_does_nothing(scripts: Scripts) -> None:
    assert scripts.run("prerm", "remove") == ""
    assert scripts.said == []


@needs_root
def test_a_removal_says_that_it_leaves_alone_what_a_stopped_agent_has_kept(scripts: Scripts) -> None:
    for slice_, unit, populated in (("", PLAIN, 0), ("system-flow\\x2dagent.slice", GPU, 1)):
        group = scripts.home / "groups/system.slice" / slice_ / unit
        group.mkdir(parents=True)
        (group / "cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
    said = scripts.run("prerm", "remove")
    assert said == f"flow-agent: flow runs that {GPU} has left behind are not touched; see: systemd-cgls --unit {GPU}\n"
    assert scripts.said == []


@needs_root
def test_an_upgrade_leaves_the_old_agent_alone_until_the_new_one_can_start(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    scripts.unit(GPU, 12)
    assert scripts.run("prerm", "upgrade", NEXT) == ""
    assert scripts.said == []
    said = scripts.run("postinst", "configure", version())
    assert scripts.said == [
        "--system daemon-reload",
        f"--no-block try-restart {PLAIN}",
        f"--no-block try-restart {GPU}",
    ]
    assert f"{PLAIN} is restarted; flow runs go on" in said
    assert "enable --now" not in said


@needs_root
def test_an_upgrade_says_what_did_not_come_back(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    (scripts.home / "inactive").write_text("3")
    assert f"{PLAIN} is not running; see: systemctl status {PLAIN}" in scripts.run("postinst", "configure", version())


@needs_root
def test_an_upgrade_does_not_wait_for_a_restart_that_drains(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    (scripts.home / "jobs").write_text(f"  7 {PLAIN} restart running\n")
    assert f"the restart of {PLAIN} takes its time; it goes on by itself" in scripts.run(
        "postinst", "configure", version()
    )
    assert scripts.seconds() <= 61


@needs_root
def test_an_installation_starts_nothing(scripts: Scripts) -> None:
    said = scripts.run("postinst", "configure", "")
    assert scripts.said == ["--system daemon-reload"]
    assert "systemctl enable --now flow-agent\n" in said


@needs_root
def test_an_upgrade_restarts_nothing_where_the_administrator_forbids_it(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    (scripts.home / "policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (scripts.home / "policy-rc.d").chmod(0o755)
    assert scripts.run("postinst", "configure", version()) == ""
    assert scripts.said == ["--system daemon-reload"]


# --- the same for rpm, whose scripts are told how many versions are left ------------------------------------------------


@needs_root
def test_removing_the_rpm_cancels_what_runs_and_disables_the_units(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    said = scripts.run("preun", "0")
    disable = "--quiet --no-reload disable flow-agent.service flow-agent@.service"
    assert scripts.said == [told("QUIT", PLAIN), f"--no-block stop {PLAIN}", disable]
    assert "flow runs that have not ended are cancelled now" in said


@needs_root
def test_upgrading_the_rpm_restarts_what_runs_when_the_old_version_has_gone(scripts: Scripts) -> None:
    scripts.unit(PLAIN, 11)
    assert scripts.run("post", "2") + scripts.run("preun", "1") == ""
    assert scripts.said == []
    assert scripts.run("postun", "1") == ""
    assert f"{PLAIN} is restarted; flow runs go on" in scripts.run("posttrans", "1")
    assert scripts.said == ["daemon-reload", "daemon-reload", f"--no-block try-restart {PLAIN}"]


@needs_root
def test_installing_the_rpm_starts_nothing(scripts: Scripts) -> None:
    assert "systemctl enable --now flow-agent\n" in scripts.run("post", "1")
    assert scripts.run("posttrans", "1") == ""
    assert scripts.said == ["daemon-reload"]
