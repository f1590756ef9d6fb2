"""`flow-agent install`: what it puts where, what it leaves alone, when it refuses, and what a failure on the way leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from supervisor.cli import app
from supervisor.install.bundle import Bundle, CannotInstall, own_bundle
from supervisor.install.machine import Machine
from supervisor.install.machine import run as really_run
from supervisor.install.work import carry_out, prepare, show
from tests.small_disk import on_small_disk

TOP = Path(__file__).parent.parent
USERADD = "useradd --system --user-group --no-create-home --home-dir /var/lib/flow-agent --shell /bin/false flow-agent"
UNITS = ("flow-agent.service", "flow-agent@.service")


def bundle(at: Path, *, whole: bool = True, program: Path = Path("/bin/true")) -> Bundle:
    """A binary as somebody has downloaded it, with the files of this checkout; `/bin/true` is as good as any program."""
    folder = at / ("download" if whole else "unpacked")
    folder.mkdir(parents=True)
    name = "flow-agent-0.1.0-linux-x86_64" if whole else "flow-agent"
    shutil.copy(program, folder / name)
    (folder / ("beside" if whole else "_internal")).mkdir()
    (folder / ("beside" if whole else "_internal") / "libz.so.1").write_text("a library")
    share = at / "share"
    if not share.exists():
        shutil.copytree(TOP / "systemd", share / "systemd")
        shutil.copytree(TOP / "packaging" / "root", share / "root")
        shutil.copy(TOP / "agent.toml.example", share)
    return Bundle(folder / name, share, whole)


class Host:
    """A machine below a folder, as root sees it. Owns the list of the commands that were run on it."""

    def __init__(self, root: Path, **fields: Any) -> None:
        self.root = root
        self.commands: list[str] = []
        (root / "run" / "systemd" / "system").mkdir(parents=True, exist_ok=True)
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        defaults: dict[str, Any] = {"uid": 0, "run": self._run, "find": lambda command: f"/usr/bin/{command}"}
        self.machine = Machine(root, **(defaults | fields))

    def _run(self, command: Sequence[str]) -> None:
        self.commands.append(" ".join(command))

    def install(self, what: Bundle) -> str:
        """Installs it and returns what was said."""
        said: list[str] = []
        carry_out(prepare(what, self.machine), said.append)
        return "\n".join(said)

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """Mode, inode and content of everything below the root."""
        return {
            str(path.relative_to(self.root)): (path.lstat().st_mode, path.lstat().st_ino, _content(path))
            for path in self.root.rglob("*")
        }


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return bytes(path.readlink())
    return path.read_bytes() if path.is_file() else b""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "host")
    yield made
    assert not [name for name in made.files() if "/.flow-agent-" in name], "something was left beside its place"


@pytest.fixture
def binary(tmp_path: Path) -> Bundle:
    return bundle(tmp_path)


def newer(old: Bundle, at: Path) -> Bundle:
    """Another build of it, by which its example and its unit have changed as well."""
    new = bundle(at, whole=old.whole, program=Path("/bin/sleep"))
    for name in ("agent.toml.example", "systemd/flow-agent.service"):
        with (new.share / name).open("a") as file:
            file.write("# more of it\n")
    return new


# --- a machine that never had it --------------------------------------------------------------------------------------


def test_everything_that_a_package_would_bring_is_in_its_place(host: Host, binary: Bundle) -> None:
    before = os.umask(0o077)  # root's own files may be private; these are for the agent's user
    try:
        host.install(binary)
    finally:
        os.umask(before)
    command = host.root / "usr/local/bin/flow-agent"
    assert command.resolve().read_bytes() == binary.program.read_bytes()
    assert command.resolve().is_relative_to(host.root / "usr/local/lib/flow-agent")
    assert [path.name for path in command.resolve().parent.iterdir()] == ["flow-agent"]
    assert host.read("etc/flow-agent/agent.toml") == (TOP / "agent.toml.example").read_text()
    share = TOP / "packaging/root/usr/share"
    for ours, there in (
        ("man/man8/flow-agent.8", "man/man8/flow-agent.8"),
        ("man/man5/agent.toml.5", "man/man5/agent.toml.5"),
        ("bash-completion/completions/flow-agent", "bash-completion/completions/flow-agent"),
        ("zsh/vendor-completions/_flow-agent", "zsh/site-functions/_flow-agent"),
        ("fish/vendor_completions.d/flow-agent.fish", "fish/vendor_completions.d/flow-agent.fish"),
        ("../../../../systemd/hardening.conf", "doc/flow-agent/examples/hardening.conf"),
    ):
        assert host.read(f"usr/local/share/{there}") == (share / ours).read_text()
    for name in UNITS:
        unit = host.read(f"etc/systemd/system/{name}")
        assert "/usr/local/bin/flow-agent start" in unit
        assert "=/usr/bin/flow-agent" not in unit
        assert host.read(f"etc/systemd/system/{name}.d/10-onefile.conf") == (TOP / "systemd/onefile.conf").read_text()
    for path in host.root.rglob("*"):
        if path.is_symlink() or "run" in path.parts or path.name == "passwd":
            continue
        wanted = 0o755 if path.is_dir() or path == command.resolve() else 0o644
        assert path.stat().st_mode & 0o777 == wanted, path


def test_the_user_the_folders_and_systemd_follow_the_files_and_nothing_is_started(host: Host, binary: Bundle) -> None:
    host.install(binary)
    assert host.commands == [
        "systemd-sysusers /usr/local/lib/sysusers.d/flow-agent.conf",
        "install --directory --mode=0750 --group=flow-agent /etc/flow-agent",
        "systemd-tmpfiles --create /usr/local/lib/tmpfiles.d/flow-agent.conf",
        "systemctl daemon-reload",
    ]
    for command in host.commands[:1] + host.commands[2:3]:
        assert (host.root / command.split()[-1].lstrip("/")).exists()


def test_the_last_it_says_are_the_next_two_commands(host: Host, binary: Bundle) -> None:
    said = host.install(binary).splitlines()
    assert said[-2:] == ["  /usr/local/bin/flow-agent check --server", "  systemctl enable --now flow-agent"]
    assert "not started. Say in /etc/flow-agent/agent.toml where your server is" in said[-4]


@pytest.mark.parametrize(
    ("passwd", "commands"),
    [
        (
            "root:x:0:0::/:/bin/sh\nmy-flow-agent:x:7:7::/:/bin/sh\n",
            [USERADD],
        ),
        ("root:x:0:0::/:/bin/sh\nflow-agent:x:7:7::/:/bin/sh\n", []),
    ],
    ids=["without the user", "with it"],
)
def test_without_systemd_sysusers_the_user_is_made_if_it_is_not_there(
    tmp_path: Path, binary: Bundle, passwd: str, commands: list[str]
) -> None:
    host = Host(tmp_path / "host", find=lambda command: None)
    (host.root / "etc/passwd").write_text(passwd)
    host.install(binary)
    assert host.commands[: len(commands) + 1] == [
        *commands,
        "install --directory --mode=0750 --group=flow-agent /etc/flow-agent",
    ]


def test_the_form_with_a_folder_brings_all_of_it_and_no_drop_in(host: Host, tmp_path: Path) -> None:
    binary = bundle(tmp_path, whole=False)
    host.install(binary)
    folder = (host.root / "usr/local/bin/flow-agent").resolve().parent
    assert (folder / "_internal/libz.so.1").read_text() == "a library"
    assert not list((host.root / "etc/systemd/system").glob("*.d"))


# --- a machine that has it --------------------------------------------------------------------------------------------


def test_again_with_the_same_binary_changes_nothing(host: Host, binary: Bundle) -> None:
    host.install(binary)
    before = host.files()
    said = host.install(binary)
    ours = (
        "usr/local/bin/flow-agent",
        "usr/local/lib/flow-agent/installed.sha256",
    )  # written anew, with the same in them
    after = host.files()
    for name in before:
        assert before[name][2] == after[name][2]
        assert name in ours or before[name] == after[name]
    assert set(after) == set(before)
    assert said.count("  as it is") == len(prepare(binary, host.machine).items) + 1


def test_a_newer_binary_replaces_what_nobody_has_changed(host: Host, binary: Bundle, tmp_path: Path) -> None:
    host.install(binary)
    new = newer(binary, tmp_path / "new")
    said = host.install(new)
    assert (host.root / "usr/local/bin/flow-agent").resolve().read_bytes() == new.program.read_bytes()
    assert host.read("etc/flow-agent/agent.toml").endswith("# more of it\n")
    assert host.read("etc/systemd/system/flow-agent.service").endswith("# more of it\n")
    assert "0644  /etc/flow-agent/agent.toml  replaced" in said
    assert said.splitlines()[-1] == "  systemctl enable --now flow-agent", "nobody has done so yet"


def test_where_it_is_enabled_the_next_two_commands_end_with_the_restart_that_flows_survive(
    host: Host, binary: Bundle, tmp_path: Path
) -> None:
    host.install(binary)
    wants = host.root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    for unit in ("flow-agent@gpu.service", "flow-agent.service", "other.service"):
        (wants / unit).symlink_to("../somewhere")
    said = host.install(newer(binary, tmp_path / "new")).splitlines()
    assert said[-2:] == ["  /usr/local/bin/flow-agent check", "  systemctl restart flow-agent flow-agent@gpu"]
    assert "flow runs do not notice" in said[-4]


def test_an_edited_configuration_is_kept_and_a_new_example_laid_beside_it(
    host: Host, binary: Bundle, tmp_path: Path
) -> None:
    host.install(binary)
    mine = "[[work]]\npool = 'mine'\n"
    (host.root / "etc/flow-agent/agent.toml").write_text(mine)
    said = host.install(binary)
    assert host.read("etc/flow-agent/agent.toml") == mine
    assert not (host.root / "etc/flow-agent/agent.toml.new").exists(), "the example is no other than before"
    assert "0644  /etc/flow-agent/agent.toml  kept: it is not as we brought it\n" in said
    said = host.install(newer(binary, tmp_path / "new"))
    assert host.read("etc/flow-agent/agent.toml") == mine
    assert host.read("etc/flow-agent/agent.toml.new").endswith("# more of it\n")
    assert "kept: it is not as we brought it; ours is /etc/flow-agent/agent.toml.new" in said


def test_a_configuration_from_before_the_installation_is_kept(host: Host, binary: Bundle) -> None:
    (host.root / "etc/flow-agent").mkdir()
    (host.root / "etc/flow-agent/agent.toml").write_text("[[work]]\npool = 'mine'\n")
    host.install(binary)
    assert host.read("etc/flow-agent/agent.toml") == "[[work]]\npool = 'mine'\n"
    assert host.read("etc/flow-agent/agent.toml.new") == (TOP / "agent.toml.example").read_text()


def test_a_configuration_that_is_a_link_stays_one(host: Host, binary: Bundle, tmp_path: Path) -> None:
    host.install(binary)
    config = host.root / "etc/flow-agent/agent.toml"
    elsewhere = config.rename(tmp_path / "in-a-repository.toml")
    config.symlink_to(elsewhere)
    host.install(newer(binary, tmp_path / "new"))
    assert config.readlink() == elsewhere
    assert elsewhere.read_text() == (TOP / "agent.toml.example").read_text()


def test_an_edited_unit_a_masked_one_and_every_drop_in_are_kept(host: Host, binary: Bundle, tmp_path: Path) -> None:
    host.install(binary)
    units = host.root / "etc/systemd/system"
    (units / "flow-agent.service").write_text("[Service]\nExecStart=/mine\n")
    (units / "flow-agent@.service").unlink()
    (units / "flow-agent@.service").symlink_to("/dev/null")
    (units / "flow-agent.service.d/override.conf").write_text("[Service]\nUser=me\n")
    said = host.install(newer(binary, tmp_path / "new"))
    assert host.read("etc/systemd/system/flow-agent.service") == "[Service]\nExecStart=/mine\n"
    assert (units / "flow-agent@.service").readlink() == Path("/dev/null")
    assert host.read("etc/systemd/system/flow-agent.service.d/override.conf") == "[Service]\nUser=me\n"
    assert "/usr/local/bin/flow-agent" in host.read("etc/systemd/system/flow-agent.service.new")
    assert said.count("  kept: ") == 2


def test_a_running_agent_keeps_the_build_that_it_was_started_from(host: Host, tmp_path: Path) -> None:
    first = bundle(tmp_path / "1", program=Path("/bin/sleep"))
    host.install(first)
    command = host.root / "usr/local/bin/flow-agent"
    old = command.resolve()
    with subprocess.Popen([command, "1000"]) as running:
        try:
            assert Path(f"/proc/{running.pid}/exe").readlink() == old
            host.install(bundle(tmp_path / "2"))
            assert old.exists()
            assert command.resolve() != old
            host.install(bundle(tmp_path / "3", program=Path("/bin/false")))
            assert old.exists(), "it still runs"
        finally:
            running.kill()
    host.install(bundle(tmp_path / "4"))
    assert [path.parent for path in host.root.glob("usr/local/lib/flow-agent/*/flow-agent")] == [
        command.resolve().parent
    ]


def test_a_program_that_was_put_into_its_place_by_hand_is_installed_from_there(host: Host, tmp_path: Path) -> None:
    command = host.root / "usr/local/bin/flow-agent"
    command.parent.mkdir(parents=True)
    shutil.copy("/bin/true", command)
    binary = bundle(tmp_path)
    host.install(Bundle(command, binary.share, whole=True))
    assert command.is_symlink()
    assert command.read_bytes() == binary.program.read_bytes()
    installed = Bundle(command.resolve(), binary.share, whole=True)
    assert prepare(installed, host.machine).known, "it can be repaired by itself"


def test_what_a_newer_binary_brings_no_more_goes_unless_it_was_edited(host: Host, tmp_path: Path) -> None:
    host.install(bundle(tmp_path / "1"))
    edited = host.root / "etc/systemd/system/flow-agent@.service.d/10-onefile.conf"
    edited.write_text("[Service]\n# mine\n")
    said = host.install(bundle(tmp_path / "2", whole=False))
    assert not (host.root / "etc/systemd/system/flow-agent.service.d").exists()
    assert edited.read_text() == "[Service]\n# mine\n"
    assert "/etc/systemd/system/flow-agent.service.d/10-onefile.conf  removed" in said
    assert "/etc/systemd/system/flow-agent@.service.d/10-onefile.conf  kept: " in said


# --- refusals and failures --------------------------------------------------------------------------------------------


def without_systemd(host: Host) -> None:
    (host.root / "run/systemd/system").rmdir()


def with_deb(host: Host) -> None:
    for name in ("usr/lib/systemd/system/flow-agent.service", "var/lib/dpkg/info/flow-agent.list"):
        (host.root / name).parent.mkdir(parents=True)
        (host.root / name).touch()


def with_rpm(host: Host) -> None:
    (host.root / "usr/lib/systemd/system").mkdir(parents=True)
    (host.root / "usr/lib/systemd/system/flow-agent.service").touch()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (without_systemd, "systemd does not run this machine; run `flow-agent start` under the init that does"),
        (with_deb, "upgrade it with `apt install ./flow-agent_….deb`, or remove it first"),
        (with_rpm, "upgrade it with `dnf install ./flow-agent-….rpm`, or remove it first"),
    ],
)
def test_it_refuses_with_one_sentence_and_has_changed_nothing(
    host: Host, binary: Bundle, given: Callable[[Host], None], sentence: str
) -> None:
    given(host)
    before = host.files()
    with pytest.raises(CannotInstall) as refused:
        host.install(binary)
    assert str(refused.value).startswith("cannot install: ")
    assert str(refused.value).endswith(sentence)
    assert (host.files(), host.commands) == (before, [])


def test_without_root_it_says_how_to_have_it(tmp_path: Path, binary: Bundle) -> None:
    host = Host(tmp_path / "host", uid=1000)
    before = host.files()
    with pytest.raises(CannotInstall, match=f"needs root: sudo {binary.program} install$"):
        host.install(binary)
    assert (host.files(), host.commands) == (before, [])


def test_only_a_binary_can_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["install"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(
        f"cannot install: this flow-agent is part of the Python environment {sys.prefix}, "
    )
    for folder, whole in (("_MEI0001Abc", True), ("_internal", False)):
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        monkeypatch.setattr(sys, "_MEIPASS", str(tmp_path / folder), raising=False)
        assert own_bundle() == Bundle(Path(sys.executable).resolve(), tmp_path / folder / "share", whole)


def test_a_binary_that_was_built_without_its_files_says_so(host: Host, binary: Bundle) -> None:
    (binary.share / "systemd/onefile.conf").unlink()
    with pytest.raises(
        CannotInstall, match=r"onefile.conf is missing, which this binary should carry; download it anew$"
    ):
        host.install(binary)


def test_a_command_that_fails_is_told_with_its_words_and_the_rest_can_be_done_again(
    tmp_path: Path, binary: Bundle
) -> None:
    def failing(command: Sequence[str]) -> None:
        really_run(["sh", "-c", "echo no more users >&2; false"])

    host = Host(tmp_path / "host", run=failing)
    with pytest.raises(CannotInstall) as failed:
        host.install(binary)
    said = str(failed.value)
    assert said.startswith("all files are in their places, but `sh -c echo no more users")
    assert said.endswith("failed: no more users; run this again when that is mended")
    again = Host(host.root)
    again.install(binary)
    assert len(again.commands) == 4


def test_a_command_of_the_machine_sees_nothing_of_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/the/bundle")
    really_run(["sh", "-c", 'test -z "$LD_LIBRARY_PATH"'])
    with pytest.raises(CannotInstall, match="`no-such-command` cannot be run: No such file or directory"):
        really_run(["no-such-command"])


# These two run on a disk of 4 MB, which is mounted in a namespace of its own.


def upgrade_on_full_disk(disk: Path) -> list[object]:
    return _upgrade(disk, grown_by=5_000_000, spoil=lambda: None)


def upgrade_with_read_only_etc(disk: Path) -> list[object]:
    def spoil() -> None:
        for options in (("--bind",), ("-o", "remount,ro,bind")):
            subprocess.run(["mount", *options, disk / "etc", disk / "etc"], check=True)

    return _upgrade(disk, grown_by=1, spoil=spoil)


def _upgrade(disk: Path, *, grown_by: int, spoil: Callable[[], None]) -> list[object]:
    """What is said, and whether the machine is as it was."""
    host = Host(disk)
    host.install(bundle(disk.parent / "old"))
    host.commands.clear()
    new = newer(bundle(disk.parent / "older"), disk.parent / "new")
    with new.program.open("ab") as program:
        program.write(bytes(grown_by))
    spoil()
    before = host.files()
    try:
        host.install(new)
    except CannotInstall as error:
        return [str(error).replace(str(disk), ""), host.files() == before, host.commands]
    return ["installed"]


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    said, as_it_was, commands = on_small_disk("tmpfs", upgrade_on_full_disk, tmp_path / "disk")
    assert said.startswith("cannot install: /usr/local/lib/flow-agent/0.1.0-")
    assert said.endswith(" cannot be written: No space left on device; nothing has been changed")
    assert (as_it_was, commands) == (True, [])


def test_a_read_only_etc_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    said, as_it_was, commands = on_small_disk("tmpfs", upgrade_with_read_only_etc, tmp_path / "disk")
    assert said.startswith("cannot install: /etc/systemd/system/flow-agent.service cannot be written: Read-only file ")
    assert said.endswith("; nothing has been changed")
    assert (as_it_was, commands) == (True, [])


def test_a_first_installation_that_fails_leaves_no_folder_behind(host: Host, binary: Bundle) -> None:
    (host.root / "usr/local").mkdir(parents=True)
    (host.root / "usr/local/bin").write_text("not a folder")
    before = host.files()
    with pytest.raises(
        CannotInstall, match=r"usr/local/bin/flow-agent cannot be written: .*; nothing has been changed$"
    ):
        host.install(binary)
    assert (host.files(), host.commands) == (before, [])


# --- --print ----------------------------------------------------------------------------------------------------------


def shown(binary: Bundle, host: Host) -> str:
    said: list[str] = []
    show(prepare(binary, host.machine), said.append)
    return "\n".join(said)


def test_print_shows_every_file_and_command_changes_nothing_and_needs_no_root(tmp_path: Path, binary: Bundle) -> None:
    host = Host(tmp_path / "host", uid=1000)
    before = host.files()
    said = shown(binary, host)
    assert (host.files(), host.commands) == (before, [])
    assert (
        f"\nAs things are it would be refused: this changes /usr/local and /etc, so it needs root: sudo {binary.program}"
        in said
    )
    root = Host(host.root)
    root.install(binary)
    made = {f"/{name}" for name, path in ((name, host.root / name) for name in host.files()) if path.is_file()}
    listed = {line.split()[1] for line in said.splitlines() if line.startswith(("0644  ", "0755  ", "link  "))}
    assert listed == made - {"/etc/passwd"}
    for command in root.commands:
        assert f"\n{command}" in said
    for name in ("etc/systemd/system/flow-agent.service", "etc/flow-agent/agent.toml"):
        assert f"==> /{name} <==\n{host.read(name).rstrip()}\n" in said
    assert "==> /usr/local/share" not in said


def test_print_tells_what_would_be_kept(host: Host, binary: Bundle, tmp_path: Path) -> None:
    host.install(binary)
    (host.root / "etc/flow-agent/agent.toml").write_text("# mine")
    said = shown(newer(binary, tmp_path / "new"), host)
    assert (
        "/etc/flow-agent/agent.toml  kept: it is not as we brought it; ours is /etc/flow-agent/agent.toml.new" in said
    )
    assert "0644  /etc/systemd/system/flow-agent.service  replaced" in said
    assert "As things are it would be refused" not in said


def test_print_for_somebody_who_may_not_read_what_lies_there_tells_so(host: Host, binary: Bundle) -> None:
    host.install(binary)
    private = host.root / "etc/flow-agent"
    private.chmod(0)
    program = """
import sys
from pathlib import Path
from supervisor.install.bundle import Bundle
from supervisor.install.machine import Machine
from supervisor.install.work import prepare, show
show(prepare(Bundle(Path(sys.argv[1]), Path(sys.argv[2]), True), Machine(Path(sys.argv[3]), uid=1000)), print)
"""
    # Root reads everything, unless it has lost its capabilities.
    ordinary = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*ordinary, sys.executable, "-c", program, binary.program, binary.share, host.root],
        capture_output=True,
        text=True,
        check=False,
    )
    private.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0644  /etc/flow-agent/agent.toml  not for this user to see\n" in done.stdout
    assert "needs root: sudo " in done.stdout
