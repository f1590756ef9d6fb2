"""agent.toml(5) from docs/configuration.md, so that what is written once is true in both."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from itertools import takewhile

TITLE = '.TH AGENT.TOML 5 "{date}" flow-agent "File Formats Manual"'
NAME = "agent.toml \\- the configuration of flow\\-agent"
SEE_ALSO = ".BR flow\\-agent (8),\n.BR systemd.exec (5)"
_SPECIAL = {
    "\\": "\\e",
    "-": "\\-",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{PLUS-MINUS SIGN}": "\\(+-",
    "\N{EN DASH}": "\\(en",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LESS-THAN OR EQUAL TO}": "\\(<=",
    "\N{MULTIPLICATION SIGN}": "\\(mu",
    "\N{RIGHTWARDS ARROW}": "\\(->",
}
_MARKUP = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\[(`?[^\]]+?`?)\]\([^)]+\)")
_WIDTH = 78


def page(markdown: str, date: str) -> str:
    """The manual page, in the man(7) language; `date` as 2026-01-31.

    Knows as much Markdown as that page uses, and refuses what it does not.
    """
    _, *body = markdown.splitlines()
    lines = [
        '.\\" Made from docs/configuration.md by packaging/generate.py; not to be edited.',
        TITLE.format(date=date),
        ".SH NAME",
        NAME,
        ".SH DESCRIPTION",
        *_blocks(body),
        ".SH FILES",
        ".TP",
        ".I /etc/flow\\-agent/agent.toml",
        "of flow\\-agent.service",
        ".TP",
        ".I /etc/flow\\-agent/INSTANCE.toml",
        "of flow\\-agent@INSTANCE.service",
        ".SH SEE ALSO",
        SEE_ALSO,
    ]
    return "\n".join(lines) + "\n"


def _blocks(lines: list[str]) -> Iterator[str]:
    rest = list(lines)
    headed = True  # a paragraph right below a heading needs no .PP
    while rest:
        line = rest[0]
        if not line.strip():
            rest.pop(0)
            continue
        if line.startswith("```"):
            code = list(takewhile(lambda text: text != "```", rest[1:]))
            yield from (".PP", ".EX", *(_plain(text, code=True) for text in code), ".EE")
            rest = rest[len(code) + 2 :]
        elif heading := re.match(r"(##+) (.*)", line):
            yield f".SH {_plain(heading[2]).upper()}" if heading[1] == "##" else f".SS {_inline(heading[2])}"
            rest.pop(0)
            headed = True
            continue
        else:
            block = list(takewhile(lambda text: bool(text.strip()) and not text.startswith("```"), rest))
            rest = rest[len(block) :]
            if line.startswith("|"):
                yield from _table(block)
            elif marker := re.match(r"(-|\d+\.) ", line):
                yield from _items(block, marker[1])
            else:
                yield from ([] if headed else [".PP"])
                yield from _text(" ".join(block))
        headed = False


def _items(block: list[str], marker: str) -> Iterator[str]:
    for number, item in enumerate(_joined(block), 1):
        yield ".IP \\(bu 2" if marker == "-" else f".IP {number}. 3"
        yield from _text(item)


def _joined(block: list[str]) -> list[str]:
    """Items with their continued lines in one string each, markers removed."""
    items: list[str] = []
    for line in block:
        if marker := re.match(r"(-|\d+\.) (.*)", line):
            items.append(marker[2])
        else:
            items[-1] += " " + line.strip()
    return items


def _table(block: list[str]) -> Iterator[str]:
    """Each row as a tagged paragraph: first what it is about, then, in one line, type and default, then what it means."""
    heads, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in block)
    keys = heads[1:] == ["type", "default", "meaning"]
    if not keys:
        yield from (".TP", f"\\fI{_inline(heads[0])}\\fR", f"\\fI{_inline(heads[-1])}\\fR")
    for first, *others in rows:
        yield ".TP"
        yield _inline(first)
        if keys:
            yield from _text(f"{others[0]}; default: {others[1]}")
            yield ".br"
        yield from _text(others[-1])


def _text(markdown: str) -> Iterator[str]:
    """Filled text, no line of it longer than people like to read in the source."""
    # An escape for a space keeps what is quoted together; a line must not begin with what troff takes for a request.
    for line in textwrap.wrap(_inline(markdown), _WIDTH, break_long_words=False, break_on_hyphens=False):
        yield f"\\&{line}" if line.startswith((".", "'")) else line


def _inline(markdown: str) -> str:
    out, end = "", 0
    for found in _MARKUP.finditer(markdown):
        code, strong, link = found.groups()
        out += _plain(markdown[end : found.start()])
        out += f"\\fB{_plain(code or strong, code=True)}\\fR" if code or strong else _inline(link)
        end = found.end()
    return out + _plain(markdown[end:])


def _plain(text: str, *, code: bool = False) -> str:
    text = text if code else text.replace("\\|", "|")
    escaped = "".join(_SPECIAL.get(letter, letter) for letter in text)
    strange = {letter for letter in escaped if ord(letter) > 126}
    assert not strange, f"packaging/manual.py knows no troff for {strange}"
    return f"\\&{escaped}" if code and escaped.startswith((".", "'")) else escaped
