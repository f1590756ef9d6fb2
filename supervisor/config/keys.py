"""Every key of `agent.toml`, and what may stand there. `KEYS` is the whole list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from supervisor.config import checks as check
from supervisor.config.checks import Place


class Kind(msgspec.Struct, frozen=True):
    """What a key takes. `from_text` makes a TOML value of a variable's text; `placed`: the check wants a `Place`."""

    check: Callable[..., Any]
    from_text: Callable[[str], object] = str
    placed: bool = False

    def read(self, value: object, place: Place) -> Any:
        """What the structs hold for this value. Raises `ValueError` with the reason why it cannot be used."""
        return self.check(value, place) if self.placed else self.check(value)


# --- from the text of a variable or a flag --------------------------------------------------------------------------


def _text_to_boolean(text: str) -> object:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def _text_to_number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # the check names it


def _text_to_list(text: str) -> object:
    return [one.strip() for one in text.split(",")]


def _text_to_table(text: str) -> object:
    pairs = [one.partition("=") for one in text.split(",")]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise ValueError("NAME=value, separated by commas, is wanted")
    return {name.strip(): value for name, _, value in pairs}


# --- the keys -------------------------------------------------------------------------------------------------------

NAME = Kind(check.name)
NAMES = Kind(check.several(check.name), _text_to_list)
PATH = Kind(check.path, placed=True)
FILE = Kind(check.readable, placed=True)
BOOLEAN = Kind(check.boolean, _text_to_boolean)
COUNT = Kind(check.count, _text_to_number)
COUNT_OR_NONE = Kind(check.count_or_none, _text_to_number)
PERIOD = Kind(check.period, _text_to_number)
DURATION = Kind(check.duration, _text_to_number)

KEYS: Mapping[str, Mapping[str, Kind]] = {
    "agent": {
        "name": NAME,
        "limit": COUNT,
        "prefetch_seconds": DURATION,
        "state_dir": PATH,
        "log_dir": PATH,
        "log_level": Kind(check.one_of("debug", "info", "warning", "error")),
        "log_format": Kind(check.one_of("text", "json")),
        "cgroup": Kind(check.cgroup),
    },
    "api": {
        "url": Kind(check.url),
        "api_key_file": FILE,
        "auth_string_file": FILE,
        "ca_file": FILE,
        "client_cert": FILE,
        "client_key": FILE,
        "verify": BOOLEAN,
        "timeout_seconds": PERIOD,
        "headers": Kind(check.headers, _text_to_table),
    },
    "poll": {
        "interval_seconds": PERIOD,
        "cancel_interval_seconds": PERIOD,
        "heartbeat_seconds": PERIOD,
        "jitter": Kind(check.fraction, _text_to_number),
        "max_backoff_seconds": PERIOD,
        "push": BOOLEAN,
    },
    "work": {
        "pool": NAME,
        "queues": NAMES,
        "match": NAMES,
        "deployments": Kind(check.several(check.deployment), _text_to_list),
        "limit": COUNT,
        "create": BOOLEAN,
    },
    "flows": {
        "python": Kind(check.program, placed=True),
        "working_dir": PATH,
        "env": Kind(check.env, _text_to_table),
        "pass_env": Kind(check.several(check.variable), _text_to_list),
        "grace_seconds": DURATION,
        "timeout_seconds": PERIOD,
        "command": Kind(check.command),
        "crash_retries": COUNT_OR_NONE,
        "start": Kind(check.one_of("cold", "warm")),
        "preload": Kind(check.several(check.module), _text_to_list),
    },
    "output": {
        "max_mb": Kind(check.megabytes, _text_to_number),
        "keep_days": Kind(check.days, _text_to_number),
        "show": BOOLEAN,
    },
    "stop": {
        "on_stop": Kind(check.one_of("drain", "cancel", "keep", "reschedule")),
        "on_restart": Kind(check.one_of("drain", "cancel", "keep", "reschedule")),
        "drain_timeout_seconds": DURATION,
        "then": Kind(check.one_of("cancel", "keep", "reschedule")),
        "shutdown_timeout_seconds": DURATION,
    },
}
