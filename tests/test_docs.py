"""What the pages say is true: their examples load, their commands exist, their links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.config.file import load
from supervisor.failpoints import STEPS

TOP = Path(__file__).parent.parent
PAGES = sorted([TOP / "README.md", *(TOP / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every `flow-agent …` line of a console block, and every one in a table or sentence that names an argument."""
    prompted = re.compile(r"^[$#] (?:\w+=\S* )*(.*)", re.MULTILINE)  # variables may stand in front
    console = [line for block in blocks(page, "console") for line in prompted.findall(block)]
    quoted = re.findall(r"`(flow-agent [a-z][^`]*)`", page.read_text())
    return [line for line in [*console, *quoted] if re.match(r"(\S*/)?flow-agent(-\S+)? ", line) and "…" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(TOP).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:docs|tests|supervisor|examples|benchmarks)/[\w./-]+)`", page.read_text()):
        assert (TOP / path).exists(), f"{page.name} names {path}"
    for path in re.findall(r"`((?:runs|process|backend|systemd|cli|config)/[\w.]*)`", page.read_text()):
        assert (TOP / "supervisor" / path).exists(), f"{page.name} names {path}"


def test_the_readmes_configuration_is_accepted(tmp_path: Path) -> None:
    [example] = blocks(TOP / "README.md", "toml")
    file = tmp_path / "agent.toml"
    file.write_text(example.replace("/srv/flows/venv/bin/python", sys.executable))
    config = load(file, environ={"HOME": str(tmp_path)})
    assert config.work[0].pool == "my-pool"


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command in commands(page)}), ids=lambda text: text[-60:]
)
def test_every_command_in_the_pages_takes_the_arguments_it_is_shown_with(command: str) -> None:
    arguments = shlex.split(command)[1:]
    # --help as the last word parses everything before it and does nothing.
    shown = subprocess.run(
        [sys.executable, "-m", "supervisor", *arguments, "--help"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert shown.returncode == 0, shown.stderr
    unknown = [word for word in arguments if word.startswith("-") and word.partition("=")[0] not in shown.stdout]
    assert not unknown


def test_the_readmes_make_targets_exist() -> None:
    makefile = (TOP / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\w+)", (TOP / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_architecture_page_names_every_room() -> None:
    page = (TOP / "docs" / "architecture.md").read_text()
    rooms = {
        path.name.removesuffix(".py")
        for path in (TOP / "supervisor").iterdir()
        if path.suffix == ".py" or path.is_dir()
    }
    for room in sorted(rooms - {"__init__", "__pycache__", "py.typed"}):
        assert re.search(rf"\b{room}\b", page), f"docs/architecture.md does not name {room}"


def test_the_readme_names_every_file_that_may_skip_tests_and_no_other() -> None:
    _, _, develop = (TOP / "README.md").read_text().partition("## Develop it")
    skipping = {
        f"tests/{file.name}"
        for file in (TOP / "tests").glob("*.py")
        if re.search(r"pytest\.(skip\(|mark\.skip|mark\.xfail|importorskip\()", file.read_text())
        and file.name != Path(__file__).name
    }
    assert skipping == set(re.findall(r"`(tests/\w+\.py)`", develop))


# --- docs/what-happens-if.md ------------------------------------------------------------------------------------------

WHAT_IF = TOP / "docs" / "what-happens-if.md"
PROOF = re.compile(r"`(tests/test_\w+\.py)::(test_\w+)`")


def rows(page: str) -> list[list[str]]:
    """The cells of every row of every table, headings left out."""
    tables = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for table in tables for row in table.splitlines()]


def names_of_tests(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_every_row_of_what_happens_if_says_all_and_names_its_proof() -> None:
    found = rows(WHAT_IF.read_text())
    for row in found:
        assert len(row) == 4, row
        assert all(row), row
        assert PROOF.search(row[-1]), f"no test is named for: {row[0]}"
    said = [row[0] for row in found]
    assert sorted(set(said)) == sorted(said)
    # No table has slipped through for not being written as the others are.
    assert len(found) == len([line for line in WHAT_IF.read_text().splitlines() if PROOF.search(line)]) > 50


def test_every_test_that_the_pages_name_exists() -> None:
    named = {proof for page in PAGES for proof in PROOF.findall(page.read_text())}
    for file, name in sorted(named):
        assert (TOP / file).exists(), file
        assert name in names_of_tests(TOP / file), f"{file} has no {name}"


def test_what_happens_if_names_every_step_of_the_kill_suite() -> None:
    killed = WHAT_IF.read_text().partition("## The agent is killed")[2].partition("\n## ")[0]
    for step in STEPS:
        assert re.search(rf"[(, ]{step}[,)]", killed), f"no row tells what happens at '{step}'"
