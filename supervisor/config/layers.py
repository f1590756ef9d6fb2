"""The sources of the configuration, each read and checked by itself: the file, the variables, the flags.

Every key is checked, also where a higher layer overrides it, and a mistake never hides another.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli

from supervisor.config.checks import Place, words
from supervisor.config.keys import KEYS, Kind
from supervisor.config.lines import Lines
from supervisor.config.secrets import SECRET_VARIABLES
from supervisor.errors import ConfigError

PREFIX = "FLOW_AGENT_"
FILE_VARIABLE = "FLOW_AGENT_CONFIG"
_OTHERS_PREFIX = "FLOW_AGENT_TEST_"
_MARKS = ("FLOW_AGENT_RUN_ID", "FLOW_AGENT_RUN_HOME")  # of a run's processes: a flow may start a flow-agent
_OTHERS = frozenset({FILE_VARIABLE, *_MARKS, *SECRET_VARIABLES})
_FLAGS = {
    "agent.limit": "--limit",
    "agent.name": "--name",
    "agent.prefetch_seconds": "--prefetch-seconds",
    "api.url": "--api",
    "flows.python": "--python",
    "work.pool": "--pool",
    "work.queues": "--work-queue",
    "work.match": "--match",
}
_NO_LINE = 1 << 30  # what has no line is reported after what has one

Table = dict[str, Any]


class Layer(msgspec.Struct, frozen=True):
    """What one source gives, checked. `work` is None where it names none."""

    sections: dict[str, Table]
    where: dict[str, str]  # "api.url" → the file's line, the variable or the flag
    work: list[Table] | None = None


class Mistakes:
    """The mistakes found so far; the list is this object's own."""

    def __init__(self) -> None:
        self._found: list[tuple[int, str]] = []

    def add(self, where: str, sentence: str, line: int = _NO_LINE) -> None:
        self._found.append((line, f"{where}: {sentence}"))

    def add_at(self, where: str, sentence: str) -> None:
        """As `add`, with the line taken from a "FILE:LINE" where there is one."""
        line = where.rpartition(":")[2]
        self.add(where, sentence, int(line) if line.isdigit() else _NO_LINE)

    def check(self, where: str, name: str, check: Callable[[], object], into: Table, line: int = _NO_LINE) -> None:
        """Puts what `check` returns into the table, or keeps why it cannot be used."""
        try:
            into[name.rpartition(".")[2]] = check()
        except ValueError as error:
            self.add(where, f"cannot use {name}: {error}", line)

    def sentences(self) -> list[str]:
        return [sentence for _, sentence in sorted(self._found, key=lambda one: one[0])]


def variable(section: str, key: str) -> str:
    """The environment variable of one key."""
    return f"{PREFIX}{section}_{key}".upper()


def working_directory() -> Path:
    """Where relative paths of variables and flags start. Raises `ConfigError` where it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError(
            "cannot tell where we are: this working directory was removed; change to another one"
        ) from None


def from_file(path: Path, environ: Mapping[str, str], mistakes: Mistakes) -> Layer:
    """The file's tables. Relative paths in it start at its own folder."""
    text, document = _parse(path, mistakes)
    if document is None:
        # Nothing is known about it; a table of its own keeps "no work" from being a second complaint.
        return Layer({}, {}, [{}])
    reader = _FileReader(path, Lines(text), Place(working_directory() / path.parent, environ), mistakes)
    sections = {name: reader.section(name, value) for name, value in document.items() if name != "work"}
    work = reader.work(document["work"]) if "work" in document else []
    return Layer(sections, reader.where, work or None)


class _FileReader:
    """Checks one parsed document. `where` fills as keys are read and is this object's own."""

    def __init__(self, path: Path, lines: Lines, place: Place, mistakes: Mistakes) -> None:
        self.where: dict[str, str] = {}
        self._path = path
        self._lines = lines
        self._place = place
        self._mistakes = mistakes

    def section(self, name: str, value: object) -> Table:
        line = self._lines.of(name)
        if name not in KEYS:
            self._complain(line, _unknown_section(name, value))
        elif isinstance(value, dict):
            return self._table(name, f"[{name}]", value, (name,))
        else:
            brackets = ", with one bracket," if isinstance(value, list) else ""
            self._complain(line, f"cannot use {name}: a table [{name}]{brackets} is wanted, found {words(value)}")
        return {}

    def work(self, value: object) -> list[Table]:
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self._complain(
                self._lines.of("work"), "cannot use work: write [[work]], with two brackets, over each table"
            )
            return [{}]
        for index, table in enumerate(value):
            if clash := _contradiction(table):
                why, keys = clash
                if not keys and table.keys() - _kinds("work"):
                    continue  # a misspelled key names it, most likely, and is reported by itself
                line = max((self._lines.of("work", index, key) for key in keys), default=self._lines.of("work", index))
                self._complain(line, f"cannot use this [[work]]: {why}")
        return [self._table("work", "[[work]]", table, ("work", index)) for index, table in enumerate(value)]

    def _table(self, section: str, title: str, table: Table, at: tuple[str | int, ...]) -> Table:
        kinds = _kinds(section)
        good: Table = {}
        for key, value in table.items():
            line = self._lines.of(*at, key)
            self.where[f"{section}.{key}"] = f"{self._path}:{line}"
            if key in kinds:
                check = _checker(kinds[key], value, self._place)
                self._mistakes.check(f"{self._path}:{line}", f"{section}.{key}", check, good, line)
            else:
                self._complain(line, _unknown_key(key, section, title))
        return good

    def _complain(self, line: int, sentence: str) -> None:
        self._mistakes.add(f"{self._path}:{line}", sentence, line)


def _parse(path: Path, mistakes: Mistakes) -> tuple[str, Table | None]:
    try:
        data = path.read_bytes()
    except OSError as error:
        mistakes.add(str(path), f"cannot read it: {error.strerror or error}", 0)
        return "", None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        mistakes.add(f"{path}:{line}", f"cannot read it as TOML: byte {data[error.start]:#04x} is not UTF-8", line)
        return "", None
    try:
        return text, tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        line = error.lineno
        mistakes.add(f"{path}:{line}", f"cannot read it as TOML: {error.msg} (column {error.colno})", line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        mistakes.add(str(path), f"cannot read it as TOML: {error}", 0)
    return text, None


def from_environ(environ: Mapping[str, str], mistakes: Mistakes) -> Layer:
    place = Place(working_directory(), environ)
    known = {
        variable(section, key): (section, key, kind) for section, kinds in KEYS.items() for key, kind in kinds.items()
    }
    sections: dict[str, Table] = {}
    where: dict[str, str] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in _OTHERS or name.startswith(_OTHERS_PREFIX):
            continue
        if name not in known:
            mistakes.add(name, f"cannot use this variable: no such one is known{_nearest(name, [*known, *_OTHERS])}")
        elif text:  # an empty variable is a variable that is not set
            section, key, kind = known[name]
            where[f"{section}.{key}"] = name
            into = sections.setdefault(section, {})
            mistakes.check(name, f"{section}.{key}", _text_checker(kind, text, place), into)
    work = sections.pop("work", None)
    if work is not None and (why := _contradiction(work)):
        mistakes.add(f"{PREFIX}WORK_*", f"cannot use these variables: {why[0]}")
    return Layer(sections, where, None if work is None else [work])


def from_flags(flags: Mapping[str, object], environ: Mapping[str, str], mistakes: Mistakes) -> Layer:
    place = Place(working_directory(), environ)
    sections: dict[str, Table] = {}
    where: dict[str, str] = {}
    work: list[Table] = []

    def read(name: str, value: object, into: Table) -> None:
        section, _, key = name.partition(".")
        where[name] = _FLAGS.get(name, name)
        mistakes.check(where[name], name, _checker(KEYS[section][key], value, place), into)

    for name, value in flags.items():
        if name == "work":
            for table in value if isinstance(value, list) else ():
                good: Table = {"tags": tuple(table["tags"])} if table.get("tags") else {}
                for key in table.keys() - {"tags"}:
                    read(f"work.{key}", table[key], good)
                if why := _contradiction(table):
                    mistakes.add("command line", f"cannot use these flags: {why[0]}")
                work.append(good)
        elif value is not None:
            read(name, value, sections.setdefault(name.partition(".")[0], {}))
    return Layer(sections, where, work or None)


def _checker(kind: Kind, value: object, place: Place) -> Callable[[], object]:
    return lambda: kind.read(value, place)


def _text_checker(kind: Kind, text: str, place: Place) -> Callable[[], object]:
    return lambda: kind.read(kind.from_text(text), place)


# --- unknown and contradictory --------------------------------------------------------------------------------------


def _kinds(section: str) -> Mapping[str, Kind]:
    """The keys of a table in the file: a [[work]] table may override every key of [flows]."""
    return {**KEYS["work"], **KEYS["flows"]} if section == "work" else KEYS[section]


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    beginnings = [one for one in known if one.startswith(f"{name}_")]  # "grace" for "grace_seconds"
    close = beginnings or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _unknown_key(key: str, section: str, title: str) -> str:
    said = f"cannot use '{key}' in {title}: "
    if near := _nearest(key, _kinds(section)):
        return f"{said}there is no such key{near}"
    return said + (_belongs(key) or f"there is no such key; known are {', '.join(_kinds(section))}")


def _unknown_section(name: str, value: object) -> str:
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        tables = ", ".join("[[work]]" if section == "work" else f"[{section}]" for section in KEYS)
        return f"cannot use [{name}]: there is no such table{_nearest(name, KEYS) or f'; known are {tables}'}"
    keys = [key for section in KEYS for key in KEYS[section]]
    return f"cannot use '{name}' outside a table: {_belongs(name) or 'there is no such key' + _nearest(name, keys)}"


def _belongs(key: str) -> str:
    homes = ["[[work]]" if section == "work" else f"[{section}]" for section in KEYS if key in KEYS[section]]
    return f"it belongs in {' or '.join(homes)}" if homes else ""


def _contradiction(work: Table) -> tuple[str, Sequence[str]] | None:
    """Why the keys of this [[work]] cannot stand together, and which they are."""
    named = [key for key in ("pool", "queues", "match", "deployments") if key in work]
    match named:
        case []:
            return "it names no pool, queues, match or deployments", []
        case [_] | ["pool", "queues"] | ["pool", "match"]:
            return None
    clash = [key for key in named if key != "pool" or "deployments" in named]
    return f"it names both {' and '.join(clash[:2])}; choose one, or write two [[work]] tables", clash
