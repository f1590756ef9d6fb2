"""What `agent.toml` may say, as frozen structs; the reading of it is in `supervisor.config.file`.

The field names are the file's keys. Durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec


class Agent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[agent]`: this agent on this machine."""

    name: str
    state_dir: Path
    log_dir: Path
    limit: int | None = None  # how many flow runs at once; None: no limit of ours
    prefetch_seconds: float = 10.0  # how long before it is due a run is taken at most
    log_level: str = "info"
    log_format: str = "text"  # or "json"
    cgroup: str = "auto"  # "auto", "off", or a directory of the cgroup v2 hierarchy that is ours


class Api(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[api]`: the Prefect server. Secrets are named by file, never held here."""

    url: str
    api_key_file: Path | None = None
    auth_string_file: Path | None = None
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    verify: bool = True
    timeout_seconds: float = 30.0
    headers: Mapping[str, str] = {}


class Poll(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[poll]`: how often the server is asked."""

    interval_seconds: float = 5.0
    cancel_interval_seconds: float = 5.0
    heartbeat_seconds: float = 30.0
    jitter: float = 0.3  # each wait is multiplied by 1 ± jitter
    max_backoff_seconds: float = 60.0
    push: bool = True  # have the server say what is new, where it can (Prefect 3)


class Flows(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[flows]`: how flow runs are started and ended. Every value may be overridden in a `[[work]]` table."""

    python: Path
    working_dir: Path | None = None  # None: a private directory for each run, removed afterwards
    env: Mapping[str, str] = {}
    pass_env: tuple[str, ...] = ()
    grace_seconds: float = 30.0
    timeout_seconds: float | None = None
    command: tuple[str, ...] | None = None
    crash_retries: int = 0  # how often a run that crashed is handed back to be retried
    start: str = "cold"  # or "warm": a copy of a process that has imported Prefect already
    preload: tuple[str, ...] = ()  # what else that process imports


class Output(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[output]`: what flow runs print, one file each in `agent.log_dir`."""

    max_mb: float = 32.0  # per run: the first and the last half of it are kept
    keep_days: float = 30.0  # how long the files of finished runs are kept
    show: bool = True  # repeat the lines in the agent's own log


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[stop]`: what becomes of live runs when the agent is told to stop.

    Actions: "drain" lets them end, "cancel" cancels them, "keep" leaves them to the next agent, "reschedule" ends them and hands
    them back to the server, for another agent to take.
    """

    on_stop: str = "drain"  # drain, cancel, keep or reschedule
    on_restart: str = "keep"  # the same, for `systemctl restart`
    drain_timeout_seconds: float = 1500.0  # how long a drain may take
    then: str = "cancel"  # after that: cancel, keep or reschedule
    shutdown_timeout_seconds: float = 90.0  # the same for a machine that goes down, where nothing can be kept


class Work(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[work]]` table: a pool (with queues or match), or queues, or match, or deployments."""

    flows: Flows  # [flows] with this table's own values already merged in
    pool: str | None = None
    queues: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    deployments: tuple[str, ...] = ()
    limit: int | None = None  # of this table, within agent.limit
    create: bool = True  # make a missing pool or queue; what is only matched is never made
    tags: tuple[str, ...] = ()  # the deprecated --tag only: its queue gets the legacy tag filter

    def __str__(self) -> str:
        if self.pool is not None:
            inside = [*self.queues, *(f"{prefix}*" for prefix in self.match)]
            return f"pool '{self.pool}'" + (f" ({', '.join(inside)})" if inside else "")
        if self.deployments:
            return f"deployments {', '.join(self.deployments)}"
        if self.match:
            return f"queues {', '.join(f'{prefix}*' for prefix in self.match)}"
        return ("queue " if len(self.queues) == 1 else "queues ") + ", ".join(f"'{name}'" for name in self.queues)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration, complete: every default filled in, every path absolute."""

    agent: Agent
    api: Api
    poll: Poll
    flows: Flows
    output: Output
    stop: Stop
    work: tuple[Work, ...]
    path: Path | None = None  # the file it came from, if any


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What we show the server to be let in, read by `supervisor.config.file.credentials`. Never shows itself."""

    api_key: str | None = None  # sent as a bearer token
    auth_string: str | None = None  # "user:password", sent as HTTP basic

    def __repr__(self) -> str:
        held = [name for name in ("api_key", "auth_string") if getattr(self, name) is not None]
        return f"Credentials({', '.join(held) or 'none'})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec gives every struct one that shows all
        return []
