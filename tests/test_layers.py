"""The judge of the house: who may import whom, and who alone may do what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "supervisor"
FLOORS = {  # a room is a module or package right under supervisor/
    7: {"__main__"},
    6: {"cli"},
    5: {"app", "demo", "install"},
    4: {"agent"},
    3: {"runs"},
    2: {"backend", "process", "journal", "logs", "metrics", "systemd", "statedir", "control", "agentlog", "frozen"},
    1: {"config", "lifecycle"},
    0: {"model", "errors", "failpoints", "__init__"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
LONG_FOR_A_REASON: dict[str, str] = {}
SIGNALLING = {"kill", "killpg", "send_signal", "pidfd_send_signal", "terminate", "pthread_kill"}
MANAGERS_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_FDS", "LISTEN_PID")

MODULES = {path.relative_to(HOUSE).as_posix(): ast.parse(path.read_text()) for path in sorted(HOUSE.rglob("*.py"))}


def room(dotted: str) -> str:
    """The room of "supervisor.x.y" or "x/y.py"."""
    parts = dotted.removesuffix(".py").replace("/", ".").removeprefix("supervisor").strip(".").split(".")
    return parts[0] or "__init__"


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere, also in functions and for type checking only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide from this test"
            for alias in node.names:
                inside = HOUSE / alias.name
                is_room = node.module == "supervisor" and (inside.is_dir() or inside.with_suffix(".py").exists())
                yield f"{node.module}.{alias.name}" if is_room else str(node.module)


@pytest.mark.parametrize("file", MODULES)
def test_imports_point_down_and_rooms_on_one_floor_are_strangers(file: str) -> None:
    own = room(file)
    assert own in FLOOR, f"{file}: give the room a floor"
    for name in imports(MODULES[file]):
        if name.partition(".")[0] == "supervisor" and room(name) != own:
            assert FLOOR[room(name)] < FLOOR[own], f"{file} imports {name}"


@pytest.mark.parametrize("file", MODULES)
def test_outside_libraries_stay_in_their_rooms(file: str) -> None:
    outside = {name.partition(".")[0] for name in imports(MODULES[file])}
    assert "prefect" not in outside
    assert "httpx" not in outside or file == "backend/http.py"
    assert not {"httpcore", "wsproto"} & outside or file == "backend/websocket.py"
    assert "trio" not in outside or FLOOR[room(file)] > 1, "the lowest floors are pure"


@pytest.mark.parametrize("file", MODULES)
def test_only_one_module_sends_signals(file: str) -> None:
    called = {
        (node.func.attr, node.lineno)
        for node in ast.walk(MODULES[file])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SIGNALLING
    }
    # stop.py has the kernel end whole control groups, which goes by the same name.
    assert not called or file in {"process/signals.py", "process/stop.py"}, called


@pytest.mark.parametrize("file", MODULES)
def test_only_systemd_reads_the_managers_variables(file: str) -> None:
    named = {
        node.value
        for node in ast.walk(MODULES[file])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(MANAGERS_VARIABLES)
    }
    # The list of what no flow inherits has to name them.
    assert not named or room(file) == "systemd" or file == "process/environ.py", named


@pytest.mark.parametrize("file", MODULES)
def test_files_stay_short(file: str) -> None:
    lines = len((HOUSE / file).read_text().splitlines())
    assert lines <= (400 if file in LONG_FOR_A_REASON else 300), f"{file} has {lines} lines"


def test_reasons_for_long_files_are_still_needed() -> None:
    assert all(len((HOUSE / file).read_text().splitlines()) > 300 for file in LONG_FOR_A_REASON)
