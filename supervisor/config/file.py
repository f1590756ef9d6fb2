"""`agent.toml`, `FLOW_AGENT_*` variables and flags, made into one `Config`: flag > variable > file > default.

What each source gives is read by `supervisor.config.layers`, what a key may hold is in `supervisor.config.keys`, secrets
are in `supervisor.config.secrets`. Every mistake in any of them is reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervisor.config import Agent, Api, Config, Flows, Output, Poll, Stop, Work
from supervisor.config.checks import Place, find_program, url
from supervisor.config.keys import KEYS
from supervisor.config.layers import (
    FILE_VARIABLE,
    Layer,
    Mistakes,
    from_environ,
    from_file,
    from_flags,
    working_directory,
)
from supervisor.config.secrets import credentials, warnings
from supervisor.errors import ConfigError

__all__ = ["DEFAULT_FILE", "NoWorkNamed", "credentials", "load", "warnings"]

DEFAULT_FILE = Path("/etc/flow-agent/agent.toml")
_DEFAULT_URL = "http://127.0.0.1:4200/api"


class NoWorkNamed(ConfigError):
    """Everything given is right, but neither file, variables nor flags say what to work on."""


def load(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, object] = {},
    default_file: Path = DEFAULT_FILE,
) -> Config:
    """Reads and merges the whole configuration. Raises `ConfigError` with every mistake there is.

    `path` is what `--config` says; without it FLOW_AGENT_CONFIG, then `default_file` where it can be read, then no
    file. `flags` maps "section.key" to a value (None: not given), and "work" to a list of tables that stand in for the
    file's `[[work]]` tables.
    """
    mistakes = Mistakes()
    chosen = _choose(path, environ, default_file)
    file = from_file(chosen, environ, mistakes) if chosen else Layer({}, {})
    layers = [file, from_environ(environ, mistakes), from_flags(flags, environ, mistakes)]

    config = _merge(layers, environ, mistakes, chosen)
    sentences = mistakes.sentences()
    if not config.work:
        none = _no_work(chosen, default_file)
        if not sentences:
            raise NoWorkNamed(none)
        sentences.append(none)
    if sentences:
        raise ConfigError(*sentences)
    return config


def _no_work(chosen: Path | None, default_file: Path) -> str:
    what = 'add a [[work]] table with pool = "NAME"'
    if chosen is None:
        what = f'write {default_file} with a [[work]] table and pool = "NAME" in it'
        if default_file.exists():
            what = f"{default_file} is there but user {os.geteuid()} may not read it"
    return f"{chosen or 'configuration'}: cannot tell what to work on; {what}, or name --pool, --work-queue or --match"


def _choose(path: Path | None, environ: Mapping[str, str], default_file: Path) -> Path | None:
    if path is None and environ.get(FILE_VARIABLE):
        path = Path(environ[FILE_VARIABLE])
    if path is None and os.access(default_file, os.R_OK):
        path = default_file
    return path


# --- one configuration of the layers --------------------------------------------------------------------------------


def _merge(layers: list[Layer], environ: Mapping[str, str], mistakes: Mistakes, chosen: Path | None) -> Config:
    """The layers laid over each other, lowest first, with the defaults under them."""
    where: dict[str, str] = {}
    for layer in layers:
        where.update(layer.where)
    _check_api(where, mistakes)

    tables = next((layer.work for layer in reversed(layers) if layer.work is not None), [])
    python = find_program("python3", Place(working_directory(), environ))
    named = ["python" in table for table in tables] or [True]
    if python is None and "flows.python" not in where and not all(named):
        mistakes.add(
            str(chosen or "configuration"), "cannot find python3 in PATH; set flows.python to the flows' Python"
        )
    default = {"python": python or Path("/usr/bin/python3")}

    file, *higher = (layer.sections.get("flows", {}) for layer in layers)
    work = []
    for table in tables:
        own = {key: value for key, value in table.items() if key in KEYS["flows"]}
        rest = {key: value for key, value in table.items() if key not in KEYS["flows"]}
        # A variable or a flag is above the file, and with it above what a [[work]] table in the file says.
        work.append(Work(flows=_flows(default, file, own, *higher), **rest))
    return Config(
        agent=_agent(_section(layers, "agent"), environ),
        api=_api(_section(layers, "api"), where, environ, mistakes),
        poll=Poll(**_section(layers, "poll")),
        flows=_flows(default, file, *higher),
        output=Output(**_section(layers, "output")),
        stop=Stop(**_section(layers, "stop")),
        work=tuple(work),
        path=chosen,
    )


def _section(layers: list[Layer], name: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer.sections.get(name, {}))
    return merged


def _flows(*tables: Mapping[str, Any]) -> Flows:
    """Of the tables the later wins, key by key; in `env`, variable by variable."""
    merged: dict[str, Any] = {}
    env: dict[str, str] = {}
    for table in tables:
        merged.update(table)
        env.update(table.get("env", {}))
    return Flows(**{**merged, "env": env})


def _agent(given: dict[str, Any], environ: Mapping[str, str]) -> Agent:
    state_dir = given.get("state_dir") or _state_dir(environ)
    logs = environ.get("LOGS_DIRECTORY", "").partition(":")[0]
    defaults = {"name": os.uname().nodename, "log_dir": Path(logs) if logs else state_dir / "logs"}
    return Agent(**{**defaults, **given, "state_dir": state_dir})


def _state_dir(environ: Mapping[str, str]) -> Path:
    """systemd's, the system's for root, the user's for anybody else."""
    if given := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/flow-agent")
    if (base := environ.get("XDG_STATE_HOME", "")).startswith("/"):  # the specification says to ignore relative ones
        return Path(base, "flow-agent")
    return Path(environ.get("HOME") or Path.home(), ".local/state/flow-agent")


def _api(given: dict[str, Any], where: Mapping[str, str], environ: Mapping[str, str], mistakes: Mistakes) -> Api:
    if "api.url" not in where:
        default = environ.get("PREFECT_API_URL") or _DEFAULT_URL
        mistakes.check("PREFECT_API_URL", "api.url", lambda: url(default), given)
    return Api(**{"url": _DEFAULT_URL, **given})


def _check_api(where: Mapping[str, str], mistakes: Mistakes) -> None:
    """What the keys of [api] must not say together. Each may come from another layer, so both places are named."""
    if "api.client_key" in where and "api.client_cert" not in where:
        mistakes.add_at(where["api.client_key"], "cannot use api.client_key without api.client_cert; name both")
    if "api.api_key_file" in where and "api.auth_string_file" in where:
        one, other = where["api.api_key_file"], where["api.auth_string_file"]
        mistakes.add_at(other, f"cannot use api.auth_string_file beside api.api_key_file ({one}); keep one of them")
