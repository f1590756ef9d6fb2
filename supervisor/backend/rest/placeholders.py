"""The placeholders in job templates and job variables: finding them, and putting values in their place. Pure.

    {{ name.path[0] }}                          a job variable, or something inside it
    {{ $NAME }}                                 an environment variable, of those the caller allows
    {{ prefect.blocks.<slug>.<name>[.path] }}   a block's data, or something inside it
    {"$ref": {"block_document_id": "…"}}        the same for a whole table, by id
    {{ prefect.variables.<name> }}              a Prefect variable

Prefect fills them in that order (`fill`, `put_blocks`, `put_variables`), and each step sees what the one before put in,
so that a job variable may name a block. Nothing is expanded twice within a step, and no argument is changed. Values
are JSON: tables, lists, text, numbers, booleans and null. Errors name placeholders, never values: those may be secret.
"""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from supervisor.errors import JobError

_PLACEHOLDER = re.compile(r"\{\{\s*([\w.\-\[\]$]+)\s*\}\}")
_BLOCK = "prefect.blocks."
_VARIABLE = "prefect.variables."
_ENVIRONMENT = "$"


class _Missing(enum.Enum):
    MISSING = enum.auto()


MISSING = _Missing.MISSING  # not None: null is a value that a user may give


def steps(path: str) -> list[str]:
    """`a.b[0]` as the keys on the way."""
    return path.replace("[", ".").replace("]", "").split(".")


def fill(template: Any, values: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    """The template with every placeholder replaced that is not a block or a Prefect variable.

    Text that is one placeholder becomes the value itself, whatever its type; when there is no such value it becomes
    `MISSING` and drops out of the table or list around it. Inside other text a value is written out, a missing one as
    nothing.
    """

    def text(given: str) -> Any:
        name = _only(given)
        if name is not None and not name.startswith((_BLOCK, _VARIABLE, _ENVIRONMENT)):
            return _look_up(values, name)
        return _PLACEHOLDER.sub(written, given)

    def written(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith((_BLOCK, _VARIABLE)):
            return match[0]
        if name.startswith(_ENVIRONMENT):
            return environ.get(name.lstrip(_ENVIRONMENT), "")
        value = _look_up(values, name)
        return "" if value is MISSING else str(value)

    return _mapped(template, text)


def block_names(value: Any) -> set[tuple[str, str]]:
    """(block type slug, block name) of every `{{ prefect.blocks.<slug>.<name>… }}` in it."""
    return {_block_path(name)[:2] for name in _names(value, _BLOCK)}


def block_ids(value: Any) -> set[str]:
    """The block document of every `{"$ref": {"block_document_id": …}}` in it."""
    return {found for table in _tables(value) if (found := _block_id(table)) is not None}


def put_blocks(value: Any, by_name: Mapping[tuple[str, str], Any], by_id: Mapping[str, Any]) -> Any:
    """The value with block references replaced by the data of these blocks. Blocks within blocks stay references."""

    def text(given: str) -> Any:
        name = _only(given)
        if name is not None and name.startswith(_BLOCK):
            return _block_value(name, by_name)
        return _PLACEHOLDER.sub(written, given)

    def written(match: re.Match[str]) -> str:
        if not match[1].startswith(_BLOCK):
            return match[0]
        found = _block_value(match[1], by_name)
        if isinstance(found, dict | list):
            raise JobError(
                f"cannot write block placeholder '{match[1]}' into text: it is {kind(found)};"
                " name one value inside it, as in '….value'"
            )
        return str(found)

    def table(given: dict[str, Any]) -> Any:
        found = _block_id(given)
        return MISSING if found is None else copy.deepcopy(by_id[found])

    return _mapped(value, text, table)


def variable_names(value: Any) -> set[str]:
    """The name of every `{{ prefect.variables.<name> }}` in it."""
    return set(_names(value, _VARIABLE))


def put_variables(value: Any, found: Mapping[str, Any]) -> Any:
    """The value with Prefect variables put in. One that is not in `found` becomes empty text, as in Prefect."""

    def text(given: str) -> Any:
        name = _only(given)
        if name is not None and name.startswith(_VARIABLE):
            return copy.deepcopy(found.get(name.removeprefix(_VARIABLE), ""))
        return _PLACEHOLDER.sub(written, given)

    def written(match: re.Match[str]) -> str:
        name = match[1]
        return str(found.get(name.removeprefix(_VARIABLE), "")) if name.startswith(_VARIABLE) else match[0]

    return _mapped(value, text)


def _mapped(value: Any, text: Callable[[str], Any], table: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value rebuilt: its texts replaced, and the tables for which `table` has an answer; `MISSING` is left out."""
    match value:
        case str():
            return text(value)
        case dict():
            if table is not None and (instead := table(value)) is not MISSING:
                return instead
            return {key: new for key, old in value.items() if (new := _mapped(old, text, table)) is not MISSING}
        case list():
            return [new for old in value if (new := _mapped(old, text, table)) is not MISSING]
    return value


def _only(text: str) -> str | None:
    """The placeholder's name when the text is nothing but one placeholder."""
    match = _PLACEHOLDER.fullmatch(text)
    return match[1] if match else None


def _look_up(values: Any, path: str) -> Any:
    for step in steps(path):
        match values:
            case dict() if step in values:
                values = values[step]
            case list() if step.isdecimal() and int(step) < len(values):
                values = values[int(step)]
            case _:
                return MISSING
    return copy.deepcopy(values)


def _names(value: Any, prefix: str) -> Iterator[str]:
    match value:
        case str():
            for name in _PLACEHOLDER.findall(value):
                if name.startswith(prefix):
                    yield name.removeprefix(prefix)
        case dict():
            if _block_id(value) is None:  # a reference is replaced whole: what stands beside it is never read
                for inner in value.values():
                    yield from _names(inner, prefix)
        case list():
            for inner in value:
                yield from _names(inner, prefix)


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    match value:
        case dict():
            yield value
            for inner in value.values() if _block_id(value) is None else ():
                yield from _tables(inner)
        case list():
            for inner in value:
                yield from _tables(inner)


def _block_id(table: Mapping[str, Any]) -> str | None:
    reference = table.get("$ref")
    found = reference.get("block_document_id") if isinstance(reference, dict) else None
    return found if found and isinstance(found, str) else None


def _block_path(name: str) -> tuple[str, str, str]:
    slug, _, rest = name.partition(".")
    block, _, path = rest.partition(".")
    if not (slug and block):
        raise JobError(
            f"cannot read block placeholder '{_BLOCK}{name}': write it as '{_BLOCK}<block-type-slug>.<block-name>'"
        )
    return slug, block, path


def _block_value(placeholder: str, by_name: Mapping[tuple[str, str], Any]) -> Any:
    slug, block, path = _block_path(placeholder.removeprefix(_BLOCK))
    data = by_name[slug, block]
    # Blocks that hold one value (secret, string, json, …) stand for that value.
    if set(data) == {"value"} and steps(path)[0] != "value":
        data = data["value"]
    value = _look_up(data, path) if path else copy.deepcopy(data)
    if value is MISSING:
        raise JobError(f"cannot resolve block placeholder '{placeholder}': block '{block}' has nothing at '{path}'")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words for an error's sentence."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
    return "a table"
