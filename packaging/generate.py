#!/usr/bin/env python3
"""Writes what in packaging/root is made from something else: completions from the commands, agent.toml(5) from its page.

    python packaging/generate.py           # write
    python packaging/generate.py --check   # 1 when something is not what it would write, and its name

They are kept in the repository so that the binary can carry them and a review can see them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import completions
import manual
from build import released

HERE = Path(__file__).resolve().parent
SHARE = HERE / "root/usr/share"


def generated() -> dict[Path, str]:
    """The text of every such file."""
    commands = completions.commands()
    page = (HERE.parent / "docs/configuration.md").read_text()
    return {
        SHARE / "bash-completion/completions/flow-agent": completions.bash(commands),
        SHARE / "zsh/vendor-completions/_flow-agent": completions.zsh(commands),
        SHARE / "fish/vendor_completions.d/flow-agent.fish": completions.fish(commands),
        SHARE / "man/man5/agent.toml.5": manual.page(page, released().date().isoformat()),
    }


def main() -> None:
    """Write them, or say which are stale."""
    stale = [path for path, text in generated().items() if not path.is_file() or path.read_text() != text]
    if sys.argv[1:] == ["--check"]:
        if stale:
            sys.exit(f"stale, run packaging/generate.py: {', '.join(str(path.relative_to(HERE)) for path in stale)}")
        return
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(generated()[path])
        print(path.relative_to(HERE))


if __name__ == "__main__":
    main()
