"""What a new configuration means for an agent that runs: which keys it can take, and which need a restart.

`RELOAD` is the whole list; nothing else in the program knows of a single key whether it can change.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from supervisor.config import Config, Work
from supervisor.config.keys import KEYS


class How(enum.Enum):
    """When a changed value counts."""

    NOW = "at once"
    NEXT_RUN = "for runs that are started from then on"
    RESTART = "after a restart"


NOW, NEXT_RUN, RESTART = How.NOW, How.NEXT_RUN, How.RESTART

RELOAD: Mapping[str, Mapping[str, How]] = {
    "agent": {
        "name": RESTART,  # the server knows us by it
        "limit": NOW,
        "prefetch_seconds": NOW,
        "state_dir": RESTART,  # locked, and live runs work in it
        "log_dir": RESTART,  # live runs write there
        "log_level": NOW,
        "log_format": NOW,
        "cgroup": RESTART,  # live runs are in it
    },
    # A connection is made once, for one server; only what we show to be let in there is read again.
    "api": {
        "url": RESTART,
        "api_key_file": NOW,
        "auth_string_file": NOW,
        "ca_file": RESTART,
        "client_cert": RESTART,
        "client_key": RESTART,
        "verify": RESTART,
        "timeout_seconds": RESTART,
        "headers": RESTART,
    },
    "poll": dict.fromkeys(KEYS["poll"], NOW),
    "work": dict.fromkeys(KEYS["work"], NOW),
    "flows": dict.fromkeys(KEYS["flows"], NEXT_RUN),
    "output": {
        "max_mb": NEXT_RUN,
        "keep_days": NOW,
        "show": NEXT_RUN,
    },
    "stop": dict.fromkeys(KEYS["stop"], NOW),
}

_SECTIONS = ("agent", "api", "poll", "flows", "output", "stop")


class Change(msgspec.Struct, frozen=True):
    """What another configuration comes to."""

    config: Config  # to be in force: the new one, with the old values of what needs a restart
    taken: tuple[str, ...]  # what changes: keys, and [[work]] tables by what they name; never a value
    needs_restart: tuple[str, ...]  # keys whose new value does not count yet


def compare(old: Config, new: Config) -> Change:
    """From the configuration in force to one that was read just now."""
    taken: list[str] = []
    needs_restart: list[str] = []
    sections: dict[str, msgspec.Struct] = {}
    # What we show to be let in is for one server, and no other shall see it.
    moved = {"api": dict.fromkeys(KEYS["api"], RESTART)} if old.api.url != new.api.url else {}
    for section in _SECTIONS:
        how = moved.get(section, RELOAD[section])
        ours, theirs = getattr(old, section), getattr(new, section)
        for key in _differing(ours, theirs, KEYS[section]):
            if how[key] is RESTART:
                needs_restart.append(f"{section}.{key}")
                theirs = msgspec.structs.replace(theirs, **{key: getattr(ours, key)})
            else:
                taken.append(f"{section}.{key}")
        sections[section] = theirs
    known = {key.removeprefix("flows.") for key in taken if key.startswith("flows.")}
    taken += _tables(old.work, new.work, known)
    return Change(msgspec.structs.replace(new, **sections), tuple(taken), tuple(needs_restart))


def _differing(old: object, new: object, keys: Mapping[str, object]) -> list[str]:
    return [key for key in keys if getattr(old, key) != getattr(new, key)]


def by_name(work: Sequence[Work]) -> dict[tuple[str, int], Work]:
    """The tables by what they name, which makes a table the same one after a change; several of one name by their order."""
    seen: Counter[str] = Counter()
    found = {}
    for one in work:
        seen[str(one)] += 1
        found[str(one), seen[str(one)]] = one
    return found


def _tables(old: Sequence[Work], new: Sequence[Work], known: set[str]) -> list[str]:
    """What has become of the `[[work]]` tables. `known` are the keys of [flows] that were named already."""
    before, now = by_name(old), by_name(new)
    said = [f"[[work]] {name} added" for name, count in now if (name, count) not in before]
    said += [f"[[work]] {name} removed" for name, count in before if (name, count) not in now]
    for table in (table for table in now if table in before):
        ours, theirs = before[table], now[table]
        keys = _differing(ours, theirs, KEYS["work"])
        keys += [key for key in _differing(ours.flows, theirs.flows, KEYS["flows"]) if key not in known]
        if keys:
            said.append(f"[[work]] {table[0]}: {', '.join(keys)}")
    return said
