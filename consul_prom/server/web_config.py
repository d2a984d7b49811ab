"""TLS and passwords of the port, by the ecosystem's web-config file.

https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md. What of it Python cannot do is
refused, since whoever wrote it relies on it. PyYAML and bcrypt, of the extra `web`, are imported when a file is read.
"""

import logging
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consul_prom.errors import EndpointError
from consul_prom.logs import ThrottledLogger
from consul_prom.server.basic_auth import Passwords

log = logging.getLogger(__name__)

_HASH: Final = re.compile(r"\$2[abxy]?\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENTS: Final = {
    "": ssl.CERT_NONE,
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_CIPHERS: Final = {
    f"TLS_ECDHE_{key}_WITH_{theirs}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for theirs, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    )
} | dict.fromkeys(("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"), "")
_HEADERS: Final[Mapping[str, tuple[str, ...]]] = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}
_TLS_KEYS: Final = frozenset(
    {"cert_file", "key_file", "client_ca_file", "client_auth_type", "min_version", "max_version", "cipher_suites"}
    | {"prefer_server_cipher_suites"}
)


_Versions = Mapping[Path, tuple[int, ...] | None]
"""Tell whether a web-config file, and the files that it names, are still those that were read."""


@dataclass(frozen=True, slots=True)
class _Content:
    """A file, understood."""

    tls: ssl.SSLContext | None
    users: Mapping[str, str]
    headers: Mapping[str, str]
    versions: _Versions

    @property
    def registered(self) -> tuple[bool, bool]:
        """What the registration depends on: whether TLS is spoken, and client certificates are required."""
        return self.tls is not None, self.tls is not None and self.tls.verify_mode is ssl.CERT_REQUIRED


@dataclass(frozen=True, slots=True)
class _Failure:
    """A file that cannot be used: it is not read again at each request, but when it has changed."""

    error: EndpointError
    versions: _Versions


class WebConfig:
    """The file at *path* as it is now: it, and the certificates that it names, are read again when they change."""

    def __init__(self, path: str) -> None:
        """Reads it.

        Raises:
            EndpointError: it cannot be used; says why, and nothing of what it holds.
        """
        self._path = Path(path).absolute()
        self._content = _read(self._path, {})
        self._failure: _Failure | None = None
        self._log = ThrottledLogger(log)
        self._passwords = Passwords()

    @property
    def scheme(self) -> str:
        return "https" if self._content.registered[0] else "http"

    @property
    def requires_certificate(self) -> bool:
        """Then the agent, which has none, can do no more than connect."""
        return self._content.registered[1]

    @property
    def headers(self) -> Mapping[str, str]:
        return self._content.headers

    def tls(self) -> ssl.SSLContext | None:
        """The context for a new connection."""
        self._refresh()
        return self._content.tls

    async def permits(self, authorization: str, *, peer: str) -> bool:
        """Whether a request with this header, or none, of the address *peer* may be answered.

        Raises:
            EndpointError: that cannot be told now.
        """
        self._refresh()
        users = self._content.users
        return not users or await self._passwords.permit(authorization, users, peer=peer)

    def _refresh(self) -> None:
        """Take up what has changed; what cannot be taken up is one WARNING, and all stays as it was."""
        if _is_current(self._content.versions):
            self._failure = None
        elif self._failure is None or not _is_current(self._failure.versions):
            self._read_again()
        if failure := self._failure:
            reason = tuple(failure.versions.values())
            self._log.failed("the web configuration stays as it was: %s", failure.error, reason=reason)
        else:
            self._log.over("the web configuration is right again")

    def _read_again(self) -> None:
        seen: dict[Path, tuple[int, ...] | None] = {}
        try:
            content = _read(self._path, seen)
            if content.registered != self._content.registered:
                raise _trouble(
                    self._path,
                    "changes whether TLS is spoken or client certificates are required, which the worker's entry in "
                    "Consul tells: start the worker anew",
                )
        except EndpointError as error:
            self._failure = _Failure(error, seen)
        else:
            self._content, self._failure = content, None
            log.info("the web configuration was read again")


def _read(path: Path, seen: dict[Path, tuple[int, ...] | None]) -> _Content:
    """What the file at *path* says. Each file that is read goes into *seen*, with its version."""
    seen[path] = _version(path)
    try:  # both here: none is imported when the file changes, in the middle of which the application might fork
        import bcrypt  # noqa: F401
        import yaml
    except ImportError as error:
        raise EndpointError(f"CONSUL_PROM_WEB_CONFIG needs {error.name}: pip install bcrypt pyyaml") from None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _trouble(path, f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    # Of a library's error no word is passed on: it may show a hash.
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise _trouble(path, f"is no YAML{f', in line {mark.line + 1}' if mark else ''}") from None
    except Exception:  # noqa: BLE001  # whatever Python says of such a value
        raise _trouble(path, "has a value that is none, as the date 2026-02-31 is; a text goes in quotes") from None
    try:
        top = _keys(found, "the file", {"tls_server_config", "http_server_config", "basic_auth_users"})
        http = _keys(top.get("http_server_config"), "http_server_config", {"http2", "headers"})
        return _Content(
            tls=_tls(_keys(top.get("tls_server_config"), "tls_server_config", _TLS_KEYS), path.parent, seen),
            users=_users(top.get("basic_auth_users")),
            headers=_headers(_keys(http.get("headers"), "headers", _HEADERS)),
            versions=seen,
        )
    except ValueError as error:
        raise _trouble(path, str(error)) from None


def _trouble(path: Path, what: str) -> EndpointError:
    return EndpointError(f"CONSUL_PROM_WEB_CONFIG={str(path)!r} {what}")


def _keys(found: object, where: str, known: Mapping[str, object] | set[str] | frozenset[str]) -> dict[str, Any]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"has no keys in {where}")  # noqa: TRY004  # the file's fault, not a caller's
    for key in found:
        if key not in known:
            raise ValueError(f"has the key {str(key)[:40]!r} in {where}, which consul-prom cannot follow")
    return found


def _users(found: object) -> dict[str, str]:
    users = {} if found is None else found
    if not isinstance(users, dict) or not all(isinstance(user, str) for user in users):
        raise ValueError("has basic_auth_users that are not name: hash")
    for user, hashed in users.items():
        if not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
            raise ValueError(f"has no bcrypt hash for the user {user!r} (htpasswd -nBC 10 makes one)")
    return users


def _headers(found: Mapping[str, object]) -> dict[str, str]:
    for key, value in found.items():
        if not isinstance(value, str) or not value.isprintable() or (_HEADERS[key] and value not in _HEADERS[key]):
            raise ValueError(f"has a wrong value for the header {key}")
    return {key: str(value) for key, value in found.items() if value}


def _tls(found: Mapping[str, Any], folder: Path, seen: dict[Path, tuple[int, ...] | None]) -> ssl.SSLContext | None:
    """Paths are relative to the file's folder, as in the toolkit. Each file that is named goes into *seen*."""
    if not found:
        return None
    files = {}
    for key in ("cert_file", "key_file", "client_ca_file"):
        if value := found.get(key):
            files[key] = folder / str(value)
            seen[files[key]] = _version(files[key])
    if not {"cert_file", "key_file"} <= set(files):
        raise ValueError("needs both cert_file and key_file in tls_server_config")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, files)
    context.minimum_version = _known(found, "min_version", _VERSIONS, "TLS12")
    context.maximum_version = _known(found, "max_version", _VERSIONS, "TLS13")
    if context.minimum_version > context.maximum_version:
        raise ValueError("has a min_version above max_version")
    context.verify_mode = _known(found, "client_auth_type", _CLIENTS, "NoClientCert")
    if (context.verify_mode is not ssl.CERT_NONE) != ("client_ca_file" in files):
        raise ValueError("needs client_auth_type and client_ca_file both, or neither")
    _choose_ciphers(context, found)
    return context


def _choose_ciphers(context: ssl.SSLContext, found: Mapping[str, Any]) -> None:
    if suites := found.get("cipher_suites"):
        if not isinstance(suites, list):
            raise ValueError("has cipher_suites that are no list")
        chosen = [_known({"cipher_suites": suite}, "cipher_suites", _CIPHERS, "") for suite in suites]
        if any(chosen):
            context.set_ciphers(":".join(filter(None, chosen)))
        else:  # they are TLS 1.3's, which are always on
            context.minimum_version = ssl.TLSVersion.TLSv1_3
    if not found.get("prefer_server_cipher_suites", True):
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE


def _load(context: ssl.SSLContext, files: Mapping[str, Path]) -> None:
    """Python tells of neither which file it missed, nor where the fault is."""
    for key, file in files.items():
        if not os.access(file, os.R_OK):
            raise ValueError(f"names a {key} that cannot be read: {str(file)!r}")
    try:
        context.load_cert_chain(files["cert_file"], files["key_file"], password=lambda: "")  # it would ask a terminal
    except (OSError, ValueError):
        raise ValueError("names a cert_file and a key_file that are no pair of PEM files without a password") from None
    if "client_ca_file" in files:
        try:
            context.load_verify_locations(files["client_ca_file"])
        except OSError:
            raise ValueError("names a client_ca_file that holds no certificate") from None


def _known(found: Mapping[str, Any], key: str, values: Mapping[str, Any], default: str) -> Any:
    value = found.get(key, default)
    if not isinstance(value, str) or value not in values:
        names = ", ".join(filter(None, values))
        raise ValueError(f"has {key}={str(value)[:40]!r}, which consul-prom cannot follow; it knows {names}")
    return values[value]


def _is_current(versions: _Versions) -> bool:
    return all(_version(file) == version for file, version in versions.items())


def _version(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev  # a change of rights changes ctime only
