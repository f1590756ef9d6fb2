"""How a base job template and job variables, or an infrastructure block and its overrides, become one job. Pure.

Only the three settings that describe a process are looked at: a missing block in a label never keeps a run from
starting. Values are JSON. Every function leaves its arguments as they are, and raises `JobError` for what cannot be
merged. Its sentences name keys, never values: those may be secret.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from supervisor.backend.rest.placeholders import fill, kind, steps
from supervisor.errors import JobError

SETTINGS = ("command", "env", "working_dir")
DEFAULT_CONFIGURATION = {"command": "{{ command }}", "env": "{{ env }}", "working_dir": "{{ working_dir }}"}
ENGINE = ("python", "-m", "prefect.engine")


# --- job variables ------------------------------------------------------------------------------------------------


def merge_variables(deployment: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The run's job variables over the deployment's. Their `env` tables are joined, anything else is replaced."""
    merged = {**deployment, **run}
    base = deployment.get("env")
    if isinstance(base, dict) and "env" in run:
        merged["env"] = _joined(base, run["env"] if run["env"] is not None else {})
    return merged


def expand_dotted(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys (`env.NAME`) as tables; where the same thing is also given as a table, the table wins."""
    expanded: dict[str, Any] = {}
    for key, value in variables.items():
        if "." in key:
            _set(expanded, steps(key), copy.deepcopy(value))
    for key, value in variables.items():
        if "." not in key:
            expanded[key] = _overlay(expanded.get(key), value)
    return expanded


def _overlay(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _overlay(below.get(key), value) for key, value in above.items()}}


def _joined(below: Any, above: Any) -> dict[str, Any]:
    for table in (below, above):
        if not isinstance(table, dict):
            raise JobError(
                f"cannot merge the job's env: one is a table and another is {kind(table)};"
                " make each a table of names and values"
            )
    return {**below, **above}


def _set(table: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for step in path[:-1]:
        if table.get(step) is None:
            table[step] = {}
        table = table[step]
        if not isinstance(table, dict):
            raise JobError(f"cannot set job variable '{'.'.join(path)}': '{step}' in it is {kind(table)}, not a table")
    table[path[-1]] = value


# --- the job configuration ----------------------------------------------------------------------------------------


def configuration(
    base_job_template: Mapping[str, Any], variables: Mapping[str, Any], *, dotted: bool, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The settings of a process pool's job with its placeholders filled; blocks and variables are still to be put in.

    `dotted` expands dotted keys of the job variables (3.x; in 2.x such a key is a variable that no template names).
    `environ` is what `{{ $NAME }}` may read: never the agent's whole environment, which holds its secrets.
    """
    template = base_job_template.get("job_configuration") or DEFAULT_CONFIGURATION
    properties = (base_job_template.get("variables") or {}).get("properties") or {}
    # A null default counts as none: 2.20 would write it into text as "None".
    defaults = {
        name: schema["default"]
        for name, schema in properties.items()
        if isinstance(schema, dict) and schema.get("default") is not None
    }
    values = {**defaults, **(expand_dotted(variables) if dotted else variables)}
    job = {name: template[name] for name in SETTINGS if name in template}
    # env is joined from all layers although the template's placeholder would only take the last. 2.20 loses the
    # template's own table when there are defaults too, which 3.x mended; nobody can have meant that.
    if defaults.get("env"):
        job["env"] = _joined(job["env"], defaults["env"]) if isinstance(job.get("env"), dict) else defaults["env"]
    if isinstance(job.get("env"), dict) and values.get("env"):
        job["env"] = _joined(job["env"], values["env"])
    filled: dict[str, Any] = fill(job, values, environ)
    return filled


def override_block(
    data: Mapping[str, Any], overrides: Mapping[str, Any], run_variables: Mapping[str, Any]
) -> dict[str, Any]:
    """An infrastructure block's data with the deployment's overrides (dotted paths) and the run's variables set in it.

    A deployment's `env` replaces the block's, as it does in Prefect; `env.NAME` adds to it. A run's `env` always adds:
    Prefect's agent ignores a run's variables, so no one relies on anything else.
    """
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for key, value in overrides.items():
        _set(result, key.split("."), copy.deepcopy(value))
    for key, value in run_variables.items():
        if key == "env" and isinstance(value, dict):
            for name, text in value.items():
                _set(result, ("env", name), text)
        else:
            _set(result, key.split("."), copy.deepcopy(value))
    return result


# --- from JSON to a job -------------------------------------------------------------------------------------------


def as_command(value: Any, *, lenient: bool = False) -> tuple[str, ...] | None:
    """The words of a command, None for "the engine". Text is split as a shell would.

    `lenient` takes text whose quotes do not match apart at blanks, as 2.20 does with all text.
    """
    if isinstance(value, str):
        try:
            words = tuple(shlex.split(value))
        except ValueError as why:
            if not lenient:
                raise JobError(f"cannot split the job's command into words: {why}; mend its quotes") from None
            words = tuple(value.split())
    elif value is None or (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        words = tuple(value or ())
    else:
        raise JobError(f"cannot use the job's command: it is {kind(value)}; make it text")
    # 2.20 spells its default out. Taken literally it would be whatever python comes first in PATH.
    return None if words in ((), ENGINE) else words


def as_env(value: Any) -> dict[str, str | None]:
    """Environment variables, values written out; None is kept and means "unset"."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise JobError(f"cannot use the job's env: it is {kind(value)}; make it a table of names and values")
    env = {name: None if given is None else str(given) for name, given in value.items()}
    for name, text in env.items():
        if not name or "=" in name or "\0" in name or "\0" in (text or ""):
            raise JobError(
                f"cannot set environment variable {name!r}: a name must not be empty or hold '=',"
                " and neither name nor value a zero byte"
            )
    return env


def as_working_dir(value: Any) -> str | None:
    """The working directory, None for a private one."""
    if value is not None and not isinstance(value, str):
        raise JobError(f"cannot use the job's working_dir: it is {kind(value)}; make it the path of a directory")
    if value and "\0" in value:
        raise JobError("cannot use the job's working_dir: it holds a zero byte; make it the path of a directory")
    return value or None
