"""Shell completions made from the commands as they are: static, so that a TAB starts no program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

HEADER = "# Made from the commands by packaging/generate.py; not to be edited."


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: its spellings, what it is for, and what stands behind it."""

    spellings: tuple[str, ...]
    help: str
    value: str  # "" for none, "any", "file", "program", or the words it may be, with "|" between them
    repeats: bool

    @property
    def words(self) -> list[str]:
        return self.value.split("|") if "|" in self.value else []


@dataclasses.dataclass(frozen=True)
class Command:
    """One command, "" for what stands before all commands."""

    name: str
    help: str
    options: tuple[Option, ...]


def commands() -> list[Command]:
    """All of them, those that are hidden left out."""
    import typer

    from supervisor.cli import app

    top: Any = typer.main.get_command(app)
    own = [
        Command(name, _sentence(command.help), tuple(_options(command)))
        for name, command in top.commands.items()
        if not command.hidden
    ]
    return [Command("", _sentence(top.help), tuple(_options(top))), *own]


def _options(command: Any) -> Iterator[Option]:
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            spellings = tuple(sorted([*parameter.opts, *parameter.secondary_opts], key=len))
            yield Option(spellings, _sentence(parameter.help), _value(parameter), parameter.multiple)
    yield Option(("-h", "--help"), "Show what it does and takes, and exit", "", False)


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    metavar = option.metavar or ""
    if "|" in metavar:
        return str(metavar)
    if metavar == "COMMAND":
        return "program"
    return "file" if metavar == "FILE" or type(option.type).__name__.endswith("Path") else "any"


def _sentence(text: str | None) -> str:
    """The first sentence, without its full stop and what stands in brackets."""
    plain = re.sub(r"\s*\[.*?\]", "", " ".join((text or "").split("\n\n")[0].split()))
    return plain.split(". ")[0].rstrip(".")


# --- bash -------------------------------------------------------------------------------------------------------------

_BASH = """\
{header}

_flow_agent() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD - 1]}} command= index words=
    # "=" is a word of its own here: --option = value.
    if [[ $word == "=" ]]; then
        word=
    elif [[ $option == "=" ]]; then
        option=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        if [[ ${{COMP_WORDS[index]}} != -* ]]; then
            command=${{COMP_WORDS[index]}}
            break
        fi
    done
    COMPREPLY=()
    case $command:$option in
{values}
    esac
    case $command in
{options}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -F _flow_agent flow-agent
"""
_BASH_ACTIONS = {
    "file": 'compopt -o filenames\n            mapfile -t COMPREPLY < <(compgen -f -- "$word")\n            ',
    "program": 'compopt -o filenames\n            mapfile -t COMPREPLY < <(compgen -c -- "$word")\n            ',
    "any": "",
}


def bash(commands: list[Command]) -> str:
    """For /usr/share/bash-completion/completions/flow-agent."""
    values, options = [], []
    for command in commands:
        by_value: dict[str, list[str]] = {}
        for option in command.options:
            if option.value:
                by_value.setdefault(option.value, []).extend(option.spellings)
        for value, spellings in by_value.items():
            pattern = " | ".join(f"{command.name}:{spelling}" for spelling in spellings)
            action = _BASH_ACTIONS.get(value)
            if action is None:
                action = f'mapfile -t COMPREPLY < <(compgen -W "{value.replace("|", " ")}" -- "$word")\n            '
            values.append(f"        {pattern})\n            {action}return\n            ;;")
        words = [spelling for option in command.options for spelling in option.spellings]
        words += [other.name for other in commands if other.name] if not command.name else []
        name = command.name or '""'
        options.append(f'        {name}) words="{" ".join(words)}" ;;')
    return _BASH.format(header=HEADER, values="\n".join(values), options="\n".join(options))


# --- zsh --------------------------------------------------------------------------------------------------------------

_ZSH = """\
#compdef flow-agent
{header}

_flow_agent() {{
    local curcontext=$curcontext state line
    typeset -A opt_args
    _arguments -C \\
{top}
        '1: :->command' \\
        '*:: :->arguments' && return
    case $state in
    command)
        local -a commands=(
{names}
        )
        _describe command commands
        ;;
    arguments)
        case $words[1] in
{cases}
        esac
        ;;
    esac
}}

_flow_agent "$@"
"""
_ZSH_ACTIONS = {"": "", "any": ":value:", "file": ":file:_files", "program": ":program:_command_names -e"}


def zsh(commands: list[Command]) -> str:
    """For a folder of zsh's fpath, named _flow-agent."""
    top, *own = commands
    cases = [
        f"        {command.name})\n            _arguments \\\n{_zsh_options(command, 16)}\n            ;;"
        for command in own
    ]
    return _ZSH.format(
        header=HEADER,
        top=_zsh_options(top, 8) + " \\",
        names="\n".join(f"            {_quoted(f'{command.name}:{command.help}')}" for command in own),
        cases="\n".join(cases),
    )


def _zsh_options(command: Command, indent: int) -> str:
    lines = []
    for option in command.options:
        text = re.sub(r"([\[\]:])", r"\\\1", option.help)
        action = _ZSH_ACTIONS.get(option.value)
        if action is None:
            action = f":value:({' '.join(option.words)})"
        before = "*" if option.repeats else f"({' '.join(option.spellings)})"
        equals = "=" if option.value else ""
        lines += [
            " " * indent + _quoted(f"{before}{spelling}{equals if spelling.startswith('--') else ''}[{text}]{action}")
            for spelling in option.spellings
        ]
    return " \\\n".join(lines)


# --- fish -------------------------------------------------------------------------------------------------------------

_FISH_ACTIONS = {"": "", "any": " -x", "file": " -r -F", "program": " -x -a '(__fish_complete_command)'"}


def fish(commands: list[Command]) -> str:
    """For a folder of fish's completions, named flow-agent.fish."""
    first = "__fish_use_subcommand"
    lines = [HEADER, "complete -c flow-agent -f"]
    for command in commands:
        where = f"__fish_seen_subcommand_from {command.name}" if command.name else first
        if command.name:
            lines.append(f"complete -c flow-agent -n {first} -a {command.name} -d {_quoted(command.help)}")
        for option in command.options:
            spelt = " ".join(f"-{'sl'[word.startswith('--')]} {word.lstrip('-')}" for word in option.spellings)
            behind = _FISH_ACTIONS.get(option.value)
            if behind is None:
                behind = f" -x -a {_quoted(' '.join(option.words))}"
            lines.append(f"complete -c flow-agent -n '{where}' {spelt}{behind} -d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
