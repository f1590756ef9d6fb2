"""Secrets: where they are read from, and what is unwise about a configuration. They are never kept in a `Config`."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from supervisor.config import Api, Config, Credentials
from supervisor.errors import ConfigError

SECRET_VARIABLES = ("FLOW_AGENT_API_KEY", "FLOW_AGENT_AUTH_STRING")


def credentials(api: Api, environ: Mapping[str, str]) -> Credentials:
    """The secrets as they are now; call it again after a rotation.

    The first place that holds any is used alone: the files that `[api]` names, then `$CREDENTIALS_DIRECTORY` (systemd),
    then FLOW_AGENT_* and then PREFECT_* variables. Raises `ConfigError` when a named file cannot be read or does not
    hold a secret that can be sent. An empty file, and one that says "unset", hold none.
    """
    places = [_from_files(api.api_key_file, api.auth_string_file)]
    if folder := environ.get("CREDENTIALS_DIRECTORY"):
        given = [Path(folder, name) for name in ("api-key", "auth-string")]
        places.append(_from_files(*(path if path.is_file() else None for path in given)))
    for names in (SECRET_VARIABLES, ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")):
        key, auth = (_clean(environ.get(name, ""), name) for name in names)
        places.append(Credentials(api_key=key, auth_string=auth))
    return next((place for place in places if place != Credentials()), Credentials())


def _from_files(key: Path | None, auth: Path | None) -> Credentials:
    return Credentials(api_key=_read(key) if key else None, auth_string=_read(auth) if auth else None)


def _read(path: Path) -> str | None:
    try:
        return _clean(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the secret in it: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot use the secret in it: it is not text in UTF-8") from None


def _clean(text: str, where: str) -> str | None:
    """The secret without the white space around it. What would break an HTTP header is refused, unquoted."""
    text = text.strip()
    if not text.isprintable():
        raise ConfigError(f"{where}: cannot use the secret in it: one line of text is wanted")
    return None if text in ("", "unset") else text


def warnings(config: Config) -> list[str]:
    """What can be used but is probably not what was meant, one sentence each."""
    said = []
    api = config.api
    for key in ("api_key_file", "auth_string_file", "client_key"):
        path: Path | None = getattr(api, key)
        if path is not None and _everybody_reads(path):
            said.append(f"api.{key}: everybody on this machine can read {path}; chmod 600 {path}")
    if not api.verify:
        unused = ", and api.ca_file is not used" if api.ca_file else ""
        said.append(f"api.verify: the server's certificate is not checked{unused}")
    if not urlsplit(api.url).path:
        said.append(f"api.url: {api.url} has no path; Prefect's API is usually at {api.url}/api")
    for folder in dict.fromkeys(work.flows.working_dir for work in config.work):
        if folder is not None and not folder.is_dir():
            said.append(f"flows.working_dir: there is no directory {folder} yet; runs that start in it will fail")
    return said


def _everybody_reads(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def flow_secrets(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """What a flow needs to speak to the same server as we do, as Prefect's own settings."""
    api = config.api
    found = credentials(api, environ)
    settings: dict[str, str] = {}
    if found.auth_string is not None:
        settings["PREFECT_API_AUTH_STRING"] = found.auth_string
    elif found.api_key is not None:
        settings["PREFECT_API_KEY"] = found.api_key
    if api.ca_file is not None:
        settings["PREFECT_API_SSL_CERT_FILE"] = str(api.ca_file)
    if not api.verify:
        settings["PREFECT_API_TLS_INSECURE_SKIP_VERIFY"] = "true"
    if api.headers:
        settings["PREFECT_CLIENT_CUSTOM_HEADERS"] = json.dumps(dict(api.headers))
    return settings
