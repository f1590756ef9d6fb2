"""The packed binary, both forms: what it is made of, and that neither its packing nor its unpacking is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import trio

from tests.agents import AgentProcess, config_for
from tests.binaries import FORMS, binary, dist, packed_agent, recipe
from tests.faultserver import open_fault_server
from tests.servers import Api, PrefectServer, clean_environ
from tests.test_http import certificates, server_tls  # noqa: F401 - a fixture
from tests.waiting import lines, wait_until

FLOWS = Path(__file__).parent / "flows" / "binary"
MEGABYTE = 1_000_000
# What a flow must never see: the packer's, the manager's, and our own.
FORBIDDEN = ("_PYI_", "_MEI", "LD_LIBRARY_PATH", "NOTIFY_SOCKET", "WATCHDOG_", "INVOCATION_ID", "CREDENTIALS_DIRECTORY")

both_forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def api(server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]) -> Api:
    return api_of(server_3)


@pytest.fixture
def start_packed() -> Iterator[Callable[..., AgentProcess]]:
    """Starts agents that are the given program; ends them, and looks that no process of a run is left."""
    with contextlib.ExitStack() as stack:

        def start(program: Path, server: PrefectServer, pool: str, **sections: dict[str, object]) -> AgentProcess:
            env = sections.pop("environ", {})
            config = config_for(server, [{"pool": pool}], **sections)
            agent = packed_agent(program, config, {name: str(value) for name, value in env.items()})
            stack.callback(agent.close)
            return agent.start()

        yield start


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_a_second_build_has_the_same_bytes(tmp_path: Path) -> None:
    script = [sys.executable, recipe().HERE / "build.py", "--out", tmp_path]
    subprocess.run(script, check=True, capture_output=True)
    first, second = recipe().digests(dist()), recipe().digests(tmp_path)
    assert len(first) > 10
    assert second == first


def test_it_is_small_and_runs_with_an_old_glibc() -> None:
    assert binary("onefile").stat().st_size <= 18 * MEGABYTE
    floors = recipe().glibc.report(dist())
    assert max(floors.values()) <= (recipe().NEWEST_GLIBC if recipe().why_no_root() else (2, 31))


@both_forms
def test_every_command_is_in_it(form: str) -> None:
    def say(*words: str) -> str:
        done = subprocess.run([binary(form), *words], env=clean_environ(), capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    assert say("version").startswith("flow-agent ")
    assert "trio" in say("version")
    # Unpacking takes a moment each time, and what is packed is the same.
    for command in ("start", "check", "runs", "version", "install", "demo") if form == "onedir" else ("start",):
        assert f"Usage: flow-agent {command}" in say(command, "--help")


@pytest.fixture(scope="module")
def old_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root directory of a Debian 11 (glibc 2.31) that nothing but Debian has put a file into, and both forms in /agent.

    Like Red Hat's it has no folder of certificates but a bundle under /etc/pki, which the tests may write.
    """
    if reason := recipe().why_no_root():
        pytest.skip(f"there is no Debian 11 to run it in: {reason}")
    made = recipe().build_root()
    system = tmp_path_factory.mktemp("debian-11")
    for folder in ("bin", "lib", "lib64"):
        shutil.copytree(made / "root" / folder, system / folder, symlinks=True)
    for folder in ("etc/pki/tls/certs", "tmp", "proc", "dev"):
        (system / folder).mkdir(parents=True)
    shutil.copytree(dist() / "onedir", system / "agent" / "onedir", symlinks=True)
    shutil.copy(dist() / "flow-agent", system / "agent" / "flow-agent")
    return system


@both_forms
def test_it_runs_on_debian_11_and_trusts_the_system_s_certificates(
    form: str,
    old_system: Path,
    certificates: Path,  # noqa: F811
) -> None:
    bundle = old_system / "etc/pki/tls/certs/ca-bundle.crt"

    async def check() -> tuple[str, int]:
        async with open_fault_server(tls=server_tls(certificates)) as server:
            command = ["chroot", str(old_system), f"/agent/{FORMS[form]}", "check", "--server", "--api", server.url]
            environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "FLOW_AGENT_FLOWS_PYTHON": "/bin/true", "HOME": "/"}
            (old_system / "etc/flow-agent").mkdir(exist_ok=True)
            (old_system / "etc/flow-agent/agent.toml").write_text('[[work]]\npool = "any"\n')
            done = await trio.run_process(command, env=environ, capture_stdout=True, capture_stderr=True, check=False)
            return (done.stdout + done.stderr).decode(), len(server.requests)

    bundle.write_bytes((certificates / "ca.pem").read_bytes())
    said, requests = trio.run(check)
    assert requests > 0, said
    assert "certificate verify failed" not in said
    bundle.unlink()
    said, requests = trio.run(check)
    assert requests == 0
    assert "certificate verify failed" in said


# --- what it leaves to the flows --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def numpy(server_3: PrefectServer) -> Path:
    """A folder with numpy for the flows' Python, kept in the cache."""
    folder: Path = recipe().cache() / f"numpy-{server_3.python.parent.parent.name}"
    with recipe().locked(folder):
        if not folder.exists():
            half = folder.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            asked = "import sys; print('%d.%d' % sys.version_info[:2])"
            version = subprocess.run([server_3.python, "-c", asked], capture_output=True, text=True, check=True).stdout
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--no-compile",
            ]
            target = ["--python-version", version.strip(), "--target", str(half), "numpy>=2,<3"]
            subprocess.run([*pip, *target], check=True, capture_output=True)
            half.rename(folder)
    return folder


@pytest.fixture
def spy(tmp_path: Path, server_3: PrefectServer) -> Path:
    """A folder for PATH whose `python` and `systemctl` leave their environment in a file, then do what is asked."""
    folder = tmp_path / "spy"
    folder.mkdir()
    for name, then in (("python", f'exec {server_3.python} "$@"'), ("systemctl", "exit 0")):
        words = '"$(printf %s "$*" | head -c 60 | tr -dc a-z)"'
        (folder / name).write_text(f"#!/bin/sh\ncat /proc/$$/environ >{folder}/{name}-{words}.$$\n{then}\n")
        (folder / name).chmod(0o755)
    return folder


def seen_by(spy: Path) -> dict[str, dict[str, str]]:
    """What each program was given, by the name of the file it left."""
    return {
        file.name: dict(entry.split("=", 1) for entry in file.read_text().split("\0") if entry)
        for file in spy.iterdir()
        if "-" in file.name
    }


def replace_program(copy: Path) -> None:
    """As dpkg does in an upgrade, file by file: another one is written beside it and takes its name."""
    for path in [path for path in copy.rglob("*") if path.is_file() and not path.is_symlink()]:
        new = path.with_name(path.name + ".dpkg-new")
        new.write_bytes(b"of another version\n" * 20)
        new.chmod(path.stat().st_mode)
        new.rename(path)


@pytest.mark.parametrize(("form", "start_mode"), [("onefile", "warm"), ("onedir", "cold")])
def test_flows_are_given_nothing_of_the_bundle_and_an_upgrade_under_a_running_agent_does_not_hurt_it(
    form: str,
    start_mode: str,
    server_3: PrefectServer,
    api: Api,
    start_packed: Callable[..., AgentProcess],
    numpy: Path,
    spy: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "program"
    shutil.copytree(dist() / "onedir", copy / "onedir", symlinks=True) if form == "onedir" else copy.mkdir()
    shutil.copy(dist() / "flow-agent", copy)
    pool = api.create_pool()
    agent = start_packed(
        copy / FORMS[form],
        server_3,
        pool,
        flows={
            "python": str(spy / "python"),
            "env": {"PYTHONPATH": str(numpy)},
            "start": start_mode,
            "preload": ["numpy"],
        },
        environ={"INVOCATION_ID": "0" * 32, "PATH": f"{spy}:{os.environ['PATH']}", "CREDENTIALS_DIRECTORY": "/nowhere"},
    )
    replace_program(copy)

    def start(flow: str, **parameters: object) -> str:
        return api.create_run(api.create_deployment(flow, pool=pool), parameters)

    answer = tmp_path / "answer.json"
    run = api.create_run(api.create_deployment("libraries", pool=pool, path=FLOWS), {"answer": str(answer)})
    crash = start("kill_self", trace=str(tmp_path / "crash"))
    sleeper = start("sleeper", trace=str(tmp_path / "sleeper"))
    api.wait_for_state(run, "COMPLETED")
    api.wait_for_state(crash, "CRASHED")
    wait_until(lambda: lines(tmp_path / "sleeper"), 60, "the sleeper sleeps")
    api.cancel(sleeper)
    api.wait_for_state(sleeper, "CANCELLED")
    assert agent.stop() == 0
    assert "Traceback" not in agent.log()
    assert agent.log().count("(warm)") == {"cold": 0, "warm": 3}[start_mode]

    found = json.loads(answer.read_text())
    environs = {**seen_by(spy), "flow": found["environ"]}
    engine = {"cold": "prefectengine", "warm": "forkserver"}[start_mode]
    for words in ("importglob", engine, "helperruns", "systemctl-listjobs", "flow"):
        assert any(words in name for name in environs), f"{words}: {sorted(environs)}"
    for name, environ in environs.items():
        suspicious = {key: value for key, value in environ.items() if any(word in key + value for word in FORBIDDEN)}
        assert not suspicious, name
    assert any("numpy" in path for path in found["mapped"])
    ours = (str(copy), "_MEI", "/_internal/")
    assert not [path for path in found["mapped"] if any(word in path for word in ours)]


# --- one file: two processes and a folder -----------------------------------------------------------------------------


def unpacked_folders() -> set[Path]:
    return {path for path in Path(os.environ["TMPDIR"]).iterdir() if path.name.startswith("_MEI")}


def test_an_agent_ends_with_its_start_program_and_the_next_one_cleans_up_and_goes_on(
    server_3: PrefectServer, api: Api, start_packed: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    pool = api.create_pool()
    go = tmp_path / "go"
    deployment = api.create_deployment("held", pool=pool, file="held.py")
    run = api.create_run(deployment, {"trace": str(tmp_path / "trace"), "go": str(go)})
    # The pid is that of the shell which becomes the start program: what a manager says to the process it started.
    watched = {"WATCHDOG_USEC": "1000000"}
    agent = start_packed(binary("onefile"), server_3, pool, environ=watched)
    wait_until(lambda: lines(tmp_path / "trace"), 60, "the flow has begun", more=agent.log)
    [python] = psutil.Process(agent.pid).children()
    [left] = [folder for folder in unpacked_folders() if folder.name.startswith(f"_MEI{agent.pid:08x}")]
    wait_until(lambda: len(agent.notify.lines("WATCHDOG")) > 2, 10, "the watchdog is fed", more=agent.log)

    agent.kill()
    wait_until(lambda: not psutil.pid_exists(python.pid), 10, "no second agent is left")
    assert len(agent.run_processes()) >= 1, "the flow goes on"
    assert left.exists()

    agent.start()
    assert not left.exists()
    agent.wait_for_log("going on with it")
    for signum in (signal.SIGHUP, signal.SIGTERM):  # to the group, as a terminal sends them: each comes twice
        os.killpg(agent.pid, signum)
    agent.wait_for_log("SIGTERM")
    go.touch()
    api.wait_for_state(run, "COMPLETED")
    assert agent.wait() == 0
    assert agent.log().count("SIGTERM") == 1
    wait_until(
        lambda: not [f for f in unpacked_folders() if f.name.startswith(f"_MEI{agent.pid:08x}")], 5, "it is gone"
    )


def in_own_mounts(script: Sequence[str], program: Path) -> subprocess.CompletedProcess[str]:
    """Runs `version` where the lines of the script have changed what is mounted."""
    shell = "\n".join((*script, f"exec {program} version"))
    command = ["unshare", "--mount", "--propagation=private", "sh", "-ec", shell]
    environ = {"PATH": os.environ["PATH"], "HOME": "/"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", ["noexec", "size=1m", "ro"])
def test_without_a_usable_folder_for_temporary_files_it_says_what_to_do(options: str) -> None:
    if reason := recipe().why_no_root():
        pytest.skip(f"only what is packed in the build root says so: {reason}")
    program = Path("/run") / f"flow-agent-test-{os.getpid()}"
    shutil.copy(binary("onefile"), program)
    try:
        places = [f"mount -t tmpfs -o {options} none {place}" for place in ("/tmp", "/var/tmp")]
        done = in_own_mounts(places, program)
        assert done.returncode not in (0, 127)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "set TMPDIR" in done.stderr
        assert done.stdout == ""
        done = in_own_mounts(places[:1], program)  # /var/tmp will do
        assert done.stdout.startswith("flow-agent "), done.stderr
    finally:
        program.unlink()
