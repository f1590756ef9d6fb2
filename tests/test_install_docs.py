"""docs/install.md, followed word for word on new machines: each command of it, in its order, by the user it is meant for.

Three things are not as on the page. The two servers' addresses are those of servers that are there; and what pip would
download lies in the machine already, which pip finds and says so.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import supervisor
from tests.machines import SUITES, Machine, why_not
from tests.packages import onedir, package
from tests.servers import Api, PrefectServer
from tests.waiting import wait_until

TOP = Path(__file__).parent.parent
PAGE = TOP / "docs" / "install.md"
DOWNLOADS = "https://flow-agent.example"
PREFECT = "http://prefect.example:4200"
HOME = "/home/reader"
DEB = f"flow-agent_{supervisor.__version__}_amd64.deb"
BINARY = f"flow-agent-{supervisor.__version__}-linux-x86_64"
HELLO = """
from prefect import flow

@flow
def hello():
    print("hello from a flow")
"""


class Step(NamedTuple):
    """One command of the page, and what is shown of its output."""

    section: str
    by_root: bool
    command: str
    output: tuple[str, ...]


def steps(page: str) -> list[Step]:
    """Every command in the page's console blocks."""
    found: list[Step] = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for block in re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            lines = iter(block.splitlines())
            for line in lines:
                if line.startswith(("$ ", "# ")):
                    command = line[2:]
                    if here := re.search(r"<<'(\w+)'$", line):
                        for text in lines:
                            command += f"\n{text}"
                            if text == here[1]:
                                break
                    found.append(Step(section.splitlines()[0], line[0] == "#", command, ()))
                else:
                    found[-1] = found[-1]._replace(output=(*found[-1].output, line))
    return found


STEPS = steps(PAGE.read_text())
DEBIAN, ONE_FILE, ELSEWHERE = "Debian and Ubuntu", "Any other machine", "Fedora, RHEL and the like"
PYTHON, CONFIGURE, START = "A Python for your flows", "Say where your server is", "Start it"
SEVERAL, STRICTER, REMOVE = "Several agents on one machine", "A stricter sandbox", "Remove"


class Reader:
    """Somebody who reads the page at a machine, with an editor's find-and-replace for the addresses."""

    def __init__(self, machine: Machine, replacing: Mapping[str, str]) -> None:
        self.machine = machine
        self._replacing = replacing
        machine.run("useradd", "--create-home", "--shell", "/bin/bash", "reader")

    def follow(self, *sections: str, only: slice = slice(None)) -> str:
        """Does what these sections say, each command to a good end, and returns what was said."""
        wanted = [[step for step in STEPS if step.section == section][only] for section in sections]
        return "".join(self._do(step) for section in wanted for step in section)

    def _do(self, step: Step) -> str:
        command = step.command
        for theirs, ours in self._replacing.items():
            command = command.replace(theirs, ours)
        done = self.machine.run(
            *("bash", "-o", "pipefail", "-c", f"API_KEY=of-the-page; cd {HOME}; {command}"),
            user=None if step.by_root else "reader",
            timeout=120,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"`{command}`: exit {done.returncode}\n{said}{self.machine.status('flow-agent')}"
        for line in step.output:
            assert line in said.splitlines(), f"`{command}` does not say {line!r}:\n{said}"
        return f"{command}\n{said}"


def publish(folder: Path, file: str) -> None:
    """Puts there what `make release` makes: a file and the sums."""
    folder.mkdir(parents=True)
    # The one file lies beside the folder that goes into the packages.
    made = package("deb") if file.endswith(".deb") else onedir().with_name("flow-agent")
    shutil.copy(made, folder / file)
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(made.read_bytes()).hexdigest()}  {file}\n")


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path, server_3: PrefectServer) -> Iterator[Reader]:
    """At a new machine of that Debian release, which reaches a server that has that file."""
    suite, file = request.param
    publish(tmp_path / "releases" / supervisor.__version__, file)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    machine = Machine(suite, tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as downloads:
        threading.Thread(target=downloads.serve_forever, daemon=True).start()
        try:
            machine.boot()
            machine.write(f"/srv/flows/venv/lib/python{SUITES[suite]}/site-packages/prefect.pth", "/opt/prefect\n")
            machine.write("/srv/flows/hello.py", HELLO)
            replacing = {
                DOWNLOADS: f"http://127.0.0.1:{downloads.server_port}",
                PREFECT: f"http://127.0.0.1:{server_3.port}",
            }
            yield Reader(machine, replacing)
        finally:
            machine.close()
            downloads.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        pass


needs_machines = pytest.mark.skipif(why_not() is not None, reason=f"README, Tests: {why_not()}")


def make_run(api: Api, pool: str) -> str:
    """A run that waits in that pool for an agent. Made before there is one, it is found at once. Returns its id."""
    if not api.post("/work_pools/filter", {"work_pools": {"name": {"any_": [pool]}}}):
        api.create_pool(pool)
    return api.create_run(api.create_deployment("hello", pool=pool, file="hello.py", path=Path("/srv/flows")))


def run_completes(reader: Reader, api: Api, run: str) -> str:
    """It ends as COMPLETED, and the journal has heard of it; returns its name."""
    api.wait_for_state(run, "COMPLETED", 60)
    messages = functools.partial(reader.machine.messages, f"FLOW_RUN_ID={run}")
    wait_until(lambda: "exited with code 0" in messages(), 20, "the run's end is in the journal", more=messages)
    name: str = api.read_run(run)["name"]
    return name


@needs_machines
@pytest.mark.parametrize("reader", [("bookworm", DEB)], indirect=True, ids=["bookworm"])
def test_the_page_for_debian_leads_to_runs_that_complete_and_back_to_a_clean_machine(
    reader: Reader, server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    machine, api = reader.machine, api_of(server_3)
    run, instances_run = make_run(api, "my-pool"), make_run(api, "gpu-pool")
    reader.follow(DEBIAN, PYTHON, CONFIGURE)
    assert machine.show("flow-agent", "ActiveState") == "inactive", "nobody has said so"
    reader.follow(START, SEVERAL)
    name = run_completes(reader, api, run)
    run_completes(reader, api, instances_run)
    looked = reader.follow(START)  # it is only looked at now
    assert name in looked
    assert "hello from a flow" in looked
    reader.follow(STRICTER)
    assert machine.show("flow-agent", "NoNewPrivileges") == "yes"
    reader.follow(REMOVE, only=slice(1))  # the package; the rest is for the one file
    assert machine.show("flow-agent", "LoadState") == "not-found"
    assert machine.path("/etc/flow-agent/agent.toml").exists()


@needs_machines
@pytest.mark.parametrize("reader", [("trixie", BINARY)], indirect=True, ids=["trixie"])
def test_the_page_for_one_file_leads_to_a_run_that_completes_and_back_to_a_clean_machine(
    reader: Reader, server_3: PrefectServer, api_of: Callable[[PrefectServer], Api]
) -> None:
    machine, api = reader.machine, api_of(server_3)
    run = make_run(api, "my-pool")
    assert "systemctl enable --now flow-agent" in reader.follow(ONE_FILE)
    reader.follow(PYTHON, CONFIGURE, START)
    name = run_completes(reader, api, run)
    assert name in reader.follow(START)
    reader.follow(REMOVE, only=slice(1, None))
    assert machine.show("flow-agent", "LoadState") == "not-found"
    left = machine.run("find", "/usr/local", "/etc/systemd/system", "-name", "*flow-agent*", "-type", "f").stdout
    assert left == ""
    assert machine.path("/etc/flow-agent/agent.toml").exists()


def test_every_section_with_commands_is_followed_here_but_that_for_another_system() -> None:
    followed = {DEBIAN, ONE_FILE, PYTHON, CONFIGURE, START, SEVERAL, STRICTER, REMOVE}
    assert {step.section for step in STEPS} == followed | {ELSEWHERE}


def test_the_page_is_about_this_version() -> None:
    assert set(re.findall(r"(?<![\d.])\d+\.\d+\.\d+", PAGE.read_text())) == {supervisor.__version__}
