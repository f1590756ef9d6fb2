"""On which line of a TOML file a key stands. tomli does not say, and a mistake without its line is half a message.

The text must already have been accepted by a TOML parser: this scan only tells headers and keys from the insides of
strings and arrays, and believes everything else.
"""

from __future__ import annotations

import re

import tomli

Step = str | int  # a key, or the index of a table in an array of tables

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = re.compile(rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*")
_PARTS = re.compile(_PART)
# What can hide a bracket, a quote or a line's end from us; the long quotes first.
_TOKEN = re.compile(
    r"""
    \"{3} (?: [^\\] | \\. )*? \"{3,5}
    | '{3} .*? '{3,5}
    | " (?: [^"\\\n] | \\. )* "
    | ' [^'\n]* '
    | \# [^\n]*
    | [\[\]{}\n]
    """,
    re.DOTALL | re.VERBOSE,
)


class Lines:
    """Where each table and key of one document begins, counted from 1."""

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[Step, ...], int] = {}
        self._tables: dict[tuple[Step, ...], int] = {}  # how many tables an array has had so far
        here: tuple[Step, ...] = ()
        for number, statement in _statements(text):
            if statement.startswith("[["):
                here = self._array_header(_key(statement[2:]))
                self._note(here, 0, number)
            elif statement.startswith("["):
                here = self._inside(_key(statement[1:]))
                self._note(here, 0, number)
            else:
                self._note((*here, *_key(statement)), len(here), number)

    def of(self, *path: Step) -> int:
        """The line of that key, or of the nearest thing around it that has a line of its own."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _note(self, path: tuple[Step, ...], known: int, number: int) -> None:
        for end in range(known + 1, len(path) + 1):
            self._lines.setdefault(path[:end], number)

    def _array_header(self, parts: list[str]) -> tuple[Step, ...]:
        array = (*self._inside(parts[:-1]), *parts[-1:])
        index = self._tables.get(array, 0)
        self._tables[array] = index + 1
        return (*array, index)

    def _inside(self, parts: list[str]) -> tuple[Step, ...]:
        """A header's keys as a path: an array of tables stands for its latest table."""
        path: tuple[Step, ...] = ()
        for part in parts:
            path = (*path, part)
            if path in self._tables:
                path = (*path, self._tables[path] - 1)
        return path


def _statements(text: str) -> list[tuple[int, str]]:
    """The headers and `key = value` statements, each with the line on which it begins."""
    found = []
    depth = start = 0
    number = first = 1
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case "\n" if depth <= 0:
                found.append((first, text[start : token.end()]))
                start, first = token.end(), number + 1
        number += token[0].count("\n")
    found.append((first, text[start:]))
    stripped = ((line, statement.strip()) for line, statement in found)
    return [(line, statement) for line, statement in stripped if statement and not statement.startswith("#")]


def _key(text: str) -> list[str]:
    match = _KEY.match(text)
    if match is None:
        return []
    return [_plain(part) for part in _PARTS.findall(match[1])]


def _plain(part: str) -> str:
    return str(tomli.loads(f"x = {part}")["x"]) if part[0] in "\"'" else part
