"""How one value of `agent.toml` is checked: what TOML, a variable or a flag holds becomes what the structs hold.

Each check raises `ValueError` with the reason, in words of TOML. Nothing here knows keys, files or lines.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from datetime import date, time
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import msgspec


class Place(msgspec.Struct, frozen=True):
    """Where a value was written: relative paths start at `base`, commands and `~` are looked up in `environ`."""

    base: Path
    environ: Mapping[str, str]


def words(value: object) -> str:
    """The value as a reader of TOML would name it."""
    match value:
        case bool():
            return f"the boolean {str(value).lower()}"
        case int():
            return f"the integer {value}"
        case float():
            return f"the float {value}"
        case str():
            short = value if len(value) <= 60 else value[:57] + "..."
            return f'the string "{short}"'
        case list() | tuple():
            return "an array"
        case dict():
            return "a table"
        case date() | time():  # a datetime is a date
            return f"the date or time {value}"
        case _:
            return f"{value!r}"


def _wanted(what: str, value: object) -> ValueError:
    return ValueError(f"{what} is wanted, found {words(value)}")


# --- text -----------------------------------------------------------------------------------------------------------


def _text(value: object, what: str = "a string") -> str:
    if not isinstance(value, str):
        raise _wanted(what, value)
    if not value.strip():
        raise ValueError("an empty string says nothing; leave the key out for the default")
    if any(ord(character) < 32 for character in value):
        raise ValueError("it holds a line break or another control character")
    return value


def name(value: object) -> str:
    text = _text(value)
    if found := re.search("[/%]", text):
        raise ValueError(f"'{found[0]}' must not occur in it: Prefect refuses such names, found {words(value)}")
    return text


def deployment(value: object) -> str:
    text = _text(value)
    flow, slash, name = text.partition("/")
    if slash and flow and name and "/" not in name:
        return text
    try:
        return str(UUID(text))
    except ValueError:
        raise ValueError(f'"flow/deployment" or the deployment\'s UUID is wanted, found {words(value)}') from None


def url(value: object) -> str:
    text = _text(value)
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises ValueError when it is not a number
    except ValueError as error:
        raise ValueError(f"it is not a URL: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL is shown in logs and must hold no user or password; use api.auth_string_file")
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in text:
        raise _wanted("a URL that starts with http:// or https://", value)
    if parts.query or parts.fragment:
        raise ValueError(f"a URL without '?' and '#' is wanted, found {words(value)}")
    return text.rstrip("/")


# --- numbers --------------------------------------------------------------------------------------------------------


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _wanted("true or false, without quotes,", value)
    return value


def count(value: object, *, least: int = 1, otherwise: str = "; leave the key out for no limit") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wanted("an integer", value)
    if value < least:
        raise ValueError(f"it must be {least} or more, found {value}{otherwise}")
    return value


def cgroup(value: object) -> str:
    text = _text(value)
    if text not in ("auto", "off") and not text.startswith("/"):
        raise _wanted('"auto", "off" or the path of a control group', value)
    return text


def count_or_none(value: object) -> int:
    return count(value, least=0, otherwise="")


def megabytes(value: object) -> float:
    number = _number(value, "a number of megabytes")
    if number < 1:
        raise ValueError(f"it must be 1 or more, found {value}")
    return number


def one_of(*words: str) -> Callable[[object], str]:
    """A check that takes these words only."""

    def check(value: object) -> str:
        text = _text(value).lower()
        if text not in words:
            raise _wanted("one of " + ", ".join(f'"{word}"' for word in words), value)
        return text

    return check


def _number(value: object, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wanted(what, value)
    if not math.isfinite(value):
        raise ValueError(f"a finite number is wanted, found {value}")
    return float(value)


def _more_than_none(unit: str) -> Callable[[object], float]:
    def check(value: object) -> float:
        number = _number(value, f"a number of {unit}")
        if number <= 0:
            raise ValueError(f"it must be more than 0 {unit}, found {value}")
        return number

    return check


period = _more_than_none("seconds")
days = _more_than_none("days")


def duration(value: object) -> float:
    seconds = _number(value, "a number of seconds")
    if seconds < 0:
        raise ValueError(f"it must be 0 seconds or more, found {value}")
    return seconds


def fraction(value: object) -> float:
    number = _number(value, "a number from 0 to 1")
    if not 0 <= number <= 1:
        raise ValueError(f"it must be from 0 to 1, found {value}")
    return number


# --- paths ----------------------------------------------------------------------------------------------------------


def path(value: object, place: Place) -> Path:
    text = _text(value, "a path in a string")
    if text == "~" or text.startswith("~/"):
        home = place.environ.get("HOME")
        text = (home or str(Path.home())) + text[1:]
    elif text.startswith("~"):
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{text}: {error}") from None
    return place.base / text


def readable(value: object, place: Place) -> Path:
    """A file that must be there now. Looked at, not opened: opening a named pipe would wait for its writer."""
    if isinstance(value, str) and re.match(r"pn[ubc]_", value):
        raise ValueError("that is a key itself; put it into a file and give the file's path here")
    found = path(value, place)
    try:
        found.stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {found}: {getattr(error, 'strerror', None) or error}") from None
    if found.is_dir():
        raise ValueError(f"cannot read {found}: it is a directory")
    if not os.access(found, os.R_OK):
        raise ValueError(f"cannot read {found}: permission denied for user {os.geteuid()}")
    return found


def find_program(name: str, place: Place) -> Path | None:
    """The program of that name in PATH. Links are kept: a virtual environment's Python is one."""
    found = shutil.which(name, path=place.environ.get("PATH", os.defpath))
    return place.base / found if found else None


def program(value: object, place: Place) -> Path:
    text = _text(value, "a path or a command in a string")
    if "/" not in text and text != "~":
        if in_path := find_program(text, place):
            return in_path
        raise ValueError(f"cannot find {text} in PATH; give the whole path")
    found = path(text, place)
    if not found.is_file():
        raise ValueError(f"there is no program {found}")
    if not os.access(found, os.X_OK):
        raise ValueError(f"{found} cannot be executed; check its mode")
    return found


# --- several --------------------------------------------------------------------------------------------------------


def several(item: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    def check(value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise _wanted("an array of strings, or one string,", value)
        if not value:
            raise ValueError("an empty array says nothing; leave the key out")
        return tuple(dict.fromkeys(item(one) for one in value))

    return check


def variable(value: object) -> str:
    text = _text(value, "a variable's name in a string")
    if "=" in text:
        raise ValueError(f"a variable's name without '=' is wanted, found {words(value)}")
    return text


def module(value: object) -> str:
    text = _text(value, "a module's name in a string")
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError(f"a module's name as in 'import pandas' is wanted, found {words(value)}")
    return text


def command(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = shlex.split(_text(value))
        except ValueError as error:
            raise ValueError(f"it cannot be split as a shell would: {error}") from None
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise _wanted("a command in a string, or an array of strings,", value)
    if not value or not value[0]:
        raise ValueError("an empty command starts nothing; leave the key out for Prefect's engine")
    return tuple(value)


def _table(value: object, what: str, pattern: str, forbidden: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wanted(f"a table of {what}s", value)
    for name, one in value.items():
        if not re.fullmatch(pattern, name):
            raise ValueError(f"'{name}' cannot be the name of a {what}")
        if not isinstance(one, str):
            raise _wanted(f"a string (in quotes) for {name}", one)
        if re.search(forbidden, one):
            raise ValueError(f"the value of {name} holds a character that a {what} cannot carry")
    return dict(value)


def env(value: object) -> dict[str, str]:
    return _table(value, "variable", r"[^=\0]+", r"\0")


def headers(value: object) -> dict[str, str]:
    return _table(value, "header", r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", r"[^\t\x20-\x7e]")
