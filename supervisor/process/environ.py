"""The environment of a flow run: built up from a clean base, never a copy of the agent's.

Later beats earlier: what a flow may inherit · the Prefect settings that reach the server · `[flows] env` · the run's
variables · the job's variables (None unsets) · the run's mark and id, which nothing overrides.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

STATE_MARK = "FLOW_AGENT_RUN_HOME"  # whose run it is, of several agents on the machine
MARK = "FLOW_AGENT_RUN_ID"  # every process of a run bears it, so that none can be lost when the run is ended
RUN_ID = "PREFECT__FLOW_RUN_ID"

# What any program of this user needs to work: where things are, how to speak, how to get out to the network.
_INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TZ", "TZDIR", "TMPDIR", "LANG", "LANGUAGE", "LC_*"),
    *("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "LD_LIBRARY_PATH"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    # Prefect's agents and workers hand their settings on, and users rely on it (PREFECT_LOGGING_LEVEL,
    # PREFECT_LOCAL_STORAGE_PATH, …). We do too, but for what _BY_NAME_ONLY holds back.
    "PREFECT_*",
)

# The agent's own: a flow that had them would speak to systemd or to the packer in our name, or be taken for another
# run. Not even pass_env gets them.
_NEVER = (
    *("NOTIFY_SOCKET", "WATCHDOG_*", "LISTEN_*", "CREDENTIALS_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM"),
    *("MAINPID", "MANAGERPID", "SYSTEMD_EXEC_PID", "FDSTORE", "MEMORY_PRESSURE_*"),
    *("STATE_DIRECTORY", "LOGS_DIRECTORY", "CACHE_DIRECTORY", "RUNTIME_DIRECTORY", "CONFIGURATION_DIRECTORY"),
    *("_PYI_*", "_MEIPASS*", "LD_LIBRARY_PATH_ORIG", "FLOW_AGENT_*", "PREFECT__*"),
)

# Made for the agent, but a user may have a reason: taken when pass_env says exactly this name, never by a pattern.
_BY_NAME_ONLY = (
    *("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"),
    # The server's address and the keys to it come from our own configuration; PREFECT_SERVER_* is not for clients.
    *("PREFECT_API_*", "PREFECT_SERVER_*", "PREFECT_CLIENT_CUSTOM_HEADERS"),
)
_SECRET_SETTING = re.compile(r"PREFECT_.*(KEY|TOKEN|SECRET|PASSWORD|AUTH|CONNECTION_URL|HEADERS)")


def flow_environ(
    *,
    run_id: str,
    api_url: str,
    secrets: Mapping[str, str],
    pass_env: Sequence[str],
    flows_env: Mapping[str, str],
    job_env: Mapping[str, str | None],
    extra: Mapping[str, str],
    environ: Mapping[str, str],
    frozen: bool | None = None,
) -> dict[str, str]:
    """The whole environment of one run's processes.

    `secrets` are the Prefect settings that a client needs to reach the server (key, auth string, TLS, headers); `extra`
    are the run's variables; `environ` is the agent's own environment. `frozen` tells a PyInstaller binary; None asks
    this interpreter.
    """
    made = inherited(environ, pass_env, frozen=frozen)
    made |= {
        "PYTHONUNBUFFERED": "1",  # what a flow printed must be on file when it is killed a moment later
        "PREFECT_API_URL": api_url,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # never a private server when ours is away
        **secrets,
        **flows_env,
        **extra,
    }
    for name, value in job_env.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = value
    return made | {RUN_ID: run_id, MARK: run_id}


def inherited(
    environ: Mapping[str, str], pass_env: Sequence[str] = (), *, frozen: bool | None = None
) -> dict[str, str]:
    """The part of the agent's environment that its children may have. `pass_env` holds names and `*` patterns."""
    if frozen is None:
        frozen = bool(getattr(sys, "frozen", False))
    theirs = dict(environ)
    if frozen:
        # PyInstaller's start program points LD_LIBRARY_PATH at the bundle and keeps the user's own value aside. TMPDIR
        # may have been set only to say where a one-file binary unpacks itself.
        theirs.pop("LD_LIBRARY_PATH", None)
        if (original := theirs.get("LD_LIBRARY_PATH_ORIG")) is not None:
            theirs["LD_LIBRARY_PATH"] = original
        if "TMPDIR" not in pass_env:
            theirs.pop("TMPDIR", None)
    return {name: value for name, value in theirs.items() if _may_have(name, pass_env)}


def _may_have(name: str, pass_env: Sequence[str]) -> bool:
    if _matches(name, _NEVER):
        return False
    if name in pass_env:
        return True
    if _matches(name, _BY_NAME_ONLY) or _SECRET_SETTING.match(name):
        return False
    return _matches(name, _INHERITED) or _matches(name, pass_env)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
