"""The TLS settings for a server: which certificates we trust, and the one that we show."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from supervisor.config import Api
from supervisor.errors import ConfigError

# Where distributions keep their CA bundle: Debian, Alpine and Arch; Red Hat; SUSE; FreeBSD and older systems.
CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/var/lib/ca-certificates/ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

_HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+")


def tls_context(api: Api) -> ssl.SSLContext:
    """The TLS settings for the server. Raises `ConfigError` when a certificate or key cannot be loaded."""
    if urlsplit(api.url).scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused; loading the CA bundle costs memory and time
    if not api.verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        bundle = api.ca_file or ca_bundle(ssl.get_default_verify_paths())
        try:
            context = ssl.create_default_context(cafile=bundle)
        except OSError as problem:  # also ssl.SSLError
            raise ConfigError(f"cannot use api.ca_file {bundle}: {_os_words(problem)}") from None
    if api.client_cert is not None:
        try:
            # An empty password instead of a question on the terminal, which a daemon has not got.
            context.load_cert_chain(api.client_cert, api.client_key, password=lambda: "")
        except OSError as problem:
            key = f" with api.client_key {api.client_key}" if api.client_key else ""
            raise ConfigError(f"cannot use api.client_cert {api.client_cert}{key}: {_os_words(problem)}") from None
    return context


def ca_bundle(default: ssl.DefaultVerifyPaths, candidates: tuple[str, ...] = CA_BUNDLES) -> Path | None:
    """The CA bundle to load, or None where OpenSSL finds the system's own.

    The OpenSSL inside a packed binary looks where the machine that built it keeps its certificates, which may be
    nowhere on this machine; then the usual places are tried, and last the bundle that came with us.
    """
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR") or default.cafile:
        return None
    # OpenSSL finds a certificate in a folder by a name made of its hash. Red Hat's folder has only bundles in it.
    if default.capath and any(_HASHED.fullmatch(file.name) for file in Path(default.capath).iterdir()):
        return None
    for candidate in candidates:
        if Path(candidate).is_file():
            return Path(candidate)
    import certifi  # httpx brings it; loaded only where the system has no certificates

    return Path(certifi.where())


def _os_words(problem: OSError) -> str:
    return problem.strerror or str(problem)
