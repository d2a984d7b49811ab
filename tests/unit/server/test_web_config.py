"""The web-config file: what it may hold, how it is refused, and that it is read again."""

import base64
import logging
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import bcrypt
import pytest
import trustme
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from consul_prom.errors import EndpointError
from consul_prom.server import web_config as module
from consul_prom.server.web_config import WebConfig
from tests.services.waiting import wait_until

HASH = bcrypt.hashpw(b"hunter2", b"$2b$04$" + b"." * 22).decode()  # the same in each process: it is in names of tests
Write = Callable[..., WebConfig]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a server's certificate and key, and the CA of clients."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(tmp_path / "cert.pem", append=number > 0)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path


@pytest.fixture
def write(files: Path) -> Write:
    """Writes a web-config file, from data or text, and reads it."""

    def write(content: object) -> WebConfig:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (files / "web.yml").write_text(text)
        return WebConfig(str(files / "web.yml"))

    return write


def tls(**more: Any) -> dict[str, Any]:
    return {"tls_server_config": {"cert_file": "cert.pem", "key_file": "key.pem", **more}}


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


class TestTLS:
    """tls_server_config."""

    def test_nothing(self, write: Write) -> None:
        """An empty file asks for nothing: plain HTTP."""
        for empty in ("", "# nothing yet\n", "tls_server_config:\nbasic_auth_users:\n"):
            config = write(empty)
            assert (config.scheme, config.tls(), config.requires_certificate) == ("http", None, False)

    def test_versions(self, write: Write) -> None:
        """TLS 1.2 and 1.3 are spoken unless the file says less; paths are relative to its folder."""
        config = write(tls())
        assert config.scheme == "https"
        context = config.tls()
        assert context
        assert (context.minimum_version, context.maximum_version) == (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        assert context.verify_mode is ssl.CERT_NONE
        context = write(tls(min_version="TLS13")).tls()
        assert context
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        context = write(tls(max_version="TLS12")).tls()
        assert context
        assert context.maximum_version is ssl.TLSVersion.TLSv1_2

    @pytest.mark.parametrize(
        ("kind", "mode"),
        [("RequireAndVerifyClientCert", ssl.CERT_REQUIRED), ("VerifyClientCertIfGiven", ssl.CERT_OPTIONAL)],
    )
    def test_clients(self, write: Write, kind: str, mode: ssl.VerifyMode) -> None:
        """Client certificates are asked for as the file says, and what is asked for tells the kind of check."""
        config = write(tls(client_ca_file="ca.pem", client_auth_type=kind))
        context = config.tls()
        assert context
        assert context.verify_mode is mode
        assert config.requires_certificate is (mode is ssl.CERT_REQUIRED)

    def test_ciphers(self, write: Write) -> None:
        """The suites of TLS 1.2 that are named are those that are left; with only 1.3's, only 1.3 is spoken."""
        context = write(tls(cipher_suites=["TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"])).tls()
        assert context
        names = {cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"}
        assert names == {"ECDHE-RSA-AES256-GCM-SHA384"}
        context = write(tls(cipher_suites=["TLS_AES_128_GCM_SHA256"])).tls()
        assert context
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3

    def test_every_cipher_is_openssls(self, write: Write) -> None:
        """Every suite that we claim to know is one of OpenSSL's."""
        for suite, name in module._CIPHERS.items():
            context = write(tls(cipher_suites=[suite])).tls()
            assert context
            assert not name or name in {cipher["name"] for cipher in context.get_ciphers()}

    def test_preference(self, write: Write) -> None:
        """The client's preference may be asked for."""
        for server in (True, False):
            context = write(tls(prefer_server_cipher_suites=server)).tls()
            assert context
            assert bool(context.options & ssl.OP_CIPHER_SERVER_PREFERENCE) is server


class TestRefusals:
    """What cannot be followed is refused in a sentence, since whoever wrote it relies on it."""

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("a: [", "is no YAML, in line 1"),
            ("- a", "has no keys in the file"),
            *((text, "has a value that is none") for text in ("a: 2026-02-31", "a: !!bool hunter2")),
            pytest.param("[" * 5000, "has a value that is none", id="deep"),
            ("rate_limit: {burst: 1}", "has the key 'rate_limit' in the file, which consul-prom cannot follow"),
            ("7: 1", "has the key '7' in the file"),
            ({"tls_server_config": {"cert_file": "cert.pem"}}, "needs both cert_file and key_file"),
            (tls(cert="-----BEGIN"), "has the key 'cert' in tls_server_config, which consul-prom cannot follow"),
            (tls(client_allowed_sans=["a"]), "has the key 'client_allowed_sans' in tls_server_config"),
            (tls(cert_file="no.pem"), "names a cert_file that cannot be read: '"),
            (tls(cert_file="ca.pem"), "names a cert_file and a key_file that are no pair of PEM files"),
            (tls(key_file="web.yml"), "names a cert_file and a key_file that are no pair of PEM files"),
            (
                tls(min_version="TLS10"),
                "has min_version='TLS10', which consul-prom cannot follow; it knows TLS12",
            ),
            (tls(min_version=["TLS12"]), "has min_version="),
            (tls(min_version="TLS13", max_version="TLS12"), "has a min_version above max_version"),
            (tls(client_auth_type="RequireAnyClientCert"), "has client_auth_type='RequireAnyClientCert', which"),
            (tls(client_auth_type="RequireAndVerifyClientCert"), "needs client_auth_type and client_ca_file both"),
            (tls(client_ca_file="ca.pem"), "needs client_auth_type and client_ca_file both"),
            (
                tls(client_ca_file="key.pem", client_auth_type="RequireAndVerifyClientCert"),
                "names a client_ca_file that holds no certificate",
            ),
            (tls(cipher_suites="all"), "has cipher_suites that are no list"),
            (tls(cipher_suites=["TLS_RSA_WITH_RC4_128_SHA"]), "has cipher_suites='TLS_RSA_WITH_RC4_128_SHA', which"),
            ({"http_server_config": {"headers": {"Server": "x"}}}, "has the key 'Server' in headers"),
            ({"http_server_config": {"headers": {"X-Frame-Options": "x"}}}, "has a wrong value for the header X-Frame"),
            (
                {"http_server_config": {"headers": {"X-XSS-Protection": "a\nb"}}},
                "has a wrong value for the header X",
            ),
            ({"http_server_config": []}, "has no keys in http_server_config"),
            ({"basic_auth_users": ["me"]}, "has basic_auth_users that are not name: hash"),
            ({"basic_auth_users": {7: HASH}}, "has basic_auth_users that are not name: hash"),
            ({"basic_auth_users": {"me": "hunter2"}}, "has no bcrypt hash for the user 'me'"),
            ({"basic_auth_users": {"me": 7}}, "has no bcrypt hash for the user 'me'"),
        ],
        ids=str,
    )
    def test_content(self, write: Write, content: object, sentence: str) -> None:
        """The sentence names the setting, the file and what is wrong."""
        with pytest.raises(EndpointError) as caught:
            write(content)
        assert str(caught.value).startswith("CONSUL_PROM_WEB_CONFIG='")
        assert sentence in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        """A file that is not there, a folder, and one that is no text are told apart."""
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
        for name, sentence in (("no", "No such file"), (".", "Is a directory"), ("bytes", "it is not UTF-8")):
            with pytest.raises(EndpointError, match=f"cannot be read: {sentence}"):
                WebConfig(str(tmp_path / name))

    def test_key_with_a_password(self, files: Path, write: Write) -> None:
        """A key that is encrypted is refused; nobody is asked for its password."""
        key = load_pem_private_key((files / "key.pem").read_bytes(), None)
        form = Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"hunter2")
        (files / "k.pem").write_bytes(key.private_bytes(*form))
        with pytest.raises(EndpointError, match="without a password"):
            write(tls(key_file="k.pem"))

    @pytest.mark.parametrize(
        "content",
        [f"me: {HASH}: [", f"basic_auth_users: {{me: {HASH}x}}", "a: 'hunter2", "a: !!int hunter2"],
        ids=["key", "hash", "quote", "number"],
    )
    def test_no_secret(self, write: Write, content: str) -> None:
        """What the file holds is in no sentence."""
        with pytest.raises(EndpointError) as caught:
            write(content)
        assert HASH[:20] not in str(caught.value)
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize("library", ["yaml", "bcrypt"])
    def test_without_the_extra(self, files: Path, library: str) -> None:
        """Without its libraries the sentence says what to install."""
        (files / "web.yml").write_text("")
        code = (
            f"import sys; sys.modules[{library!r}] = None\n"
            "from consul_prom.server.web_config import WebConfig\n"
            f"WebConfig({str(files / 'web.yml')!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert f"CONSUL_PROM_WEB_CONFIG needs {library}: pip install bcrypt pyyaml" in done.stderr


class TestRest:
    """What asks for no more than to be handed on."""

    async def test_users(self, write: Write) -> None:
        """Users are let in with their passwords, and nobody else; without users everybody is."""
        config = write({"basic_auth_users": {"me": HASH}})
        assert await config.permits(basic("me", "hunter2"), peer="192.0.2.1")
        assert not await config.permits(basic("me", "hunter3"), peer="192.0.2.1")
        assert not await config.permits("", peer="192.0.2.1")
        assert await write(tls()).permits("", peer="192.0.2.1")

    def test_headers(self, write: Write) -> None:
        """Headers that the file sets are given, and empty ones are not."""
        config = write({"http_server_config": {"http2": True, "headers": {"X-Frame-Options": "deny"}}})
        assert config.headers == {"X-Frame-Options": "deny"}
        assert write({"http_server_config": {"headers": {"Content-Security-Policy": ""}}}).headers == {}


class TestReload:
    """What changes is taken up."""

    async def test_users(self, write: Write, files: Path) -> None:
        """A password that was taken out opens no longer, and a new one does."""
        config = write({"basic_auth_users": {"me": HASH}})
        assert await config.permits(basic("me", "hunter2"), peer="192.0.2.1")
        other = bcrypt.hashpw(b"correct horse", bcrypt.gensalt(4)).decode()
        (files / "web.yml").write_text(yaml.safe_dump({"basic_auth_users": {"me": other}}))
        assert not await config.permits(basic("me", "hunter2"), peer="192.0.2.1")
        assert await config.permits(basic("me", "correct horse"), peer="192.0.2.1")

    def test_certificate(self, write: Write, files: Path) -> None:
        """A certificate that is replaced is served from the next connection on, though the file is the same."""
        config = write(tls())
        before = config.tls()
        assert config.tls() is before
        (files / "new.pem").write_bytes((files / "cert.pem").read_bytes())
        (files / "new.pem").replace(files / "cert.pem")
        assert config.tls() is not before

    def test_directory_that_is_swapped(self, files: Path, tmp_path: Path) -> None:
        """A mounted secret is swapped by its link, as Kubernetes does."""
        first, second, link = tmp_path / "1", tmp_path / "2", tmp_path / "now"
        for folder in (first, second):
            folder.mkdir()
            for name in ("cert.pem", "key.pem"):
                shutil.copy(files / name, folder / name)
            (folder / "web.yml").write_text(yaml.safe_dump(tls()))
        link.symlink_to(first)
        config = WebConfig(str(link / "web.yml"))
        before = config.tls()
        (tmp_path / "next").symlink_to(second)
        (tmp_path / "next").replace(link)
        assert config.tls() is not before

    def test_half_a_file(self, write: Write, files: Path, caplog: pytest.LogCaptureFixture) -> None:
        """What cannot be used is one WARNING and changes nothing; that it can be used again, one more."""
        caplog.set_level(logging.INFO)
        config = write(tls())
        before = config.tls()
        for broken in ("tls_server_config: {", "tls_server_config: {cert_file: cert.pem}"):
            (files / "web.yml").write_text(broken)
            for _ in range(3):
                assert config.tls() is before
        (files / "web.yml").write_text(yaml.safe_dump(tls(min_version="TLS13")))
        context = config.tls()
        assert context
        assert context is not before
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO", "WARNING"]
        assert "the web configuration stays as it was: CONSUL_PROM_WEB_CONFIG=" in caplog.text

    def test_back_to_what_it_was(self, write: Write, files: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A file that is moved away and back is right again."""
        caplog.set_level(logging.INFO)
        config = write(tls())
        (files / "web.yml").rename(files / "away")
        config.tls()
        (files / "away").rename(files / "web.yml")
        config.tls()
        levels = [record.levelname for record in caplog.records if record.levelname != "INFO"]
        assert levels == ["WARNING", "WARNING"]
        assert caplog.messages[-1] == "the web configuration is right again"

    def test_broken_file_is_read_once(
        self, write: Write, files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A file that cannot be used is not parsed at each connection, but when it or a file that it names changes."""
        config = write(tls())
        before = config.tls()
        parse = Mock(wraps=yaml.safe_load)
        monkeypatch.setattr(yaml, "safe_load", parse)
        (files / "web.yml").write_text("tls_server_config: {")
        for _ in range(5):
            assert config.tls() is before
        assert parse.call_count == 1
        (files / "web.yml").write_text(yaml.safe_dump(tls(cert_file="new.pem")))
        for _ in range(5):
            assert config.tls() is before
        assert parse.call_count == 2
        shutil.copy(files / "cert.pem", files / "new.pem")
        assert config.tls() is not before
        assert parse.call_count == 3
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "WARNING"]
        assert caplog.messages[-1] == "the web configuration is right again"

    def test_rights_are_given(self, write: Write, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A certificate that could not be read is read when its mode changes."""
        config = write(tls())
        before = config.tls()
        shutil.copy(files / "cert.pem", files / "new.pem")
        (files / "web.yml").write_text(yaml.safe_dump(tls(cert_file="new.pem")))
        with monkeypatch.context() as denied:
            denied.setattr("os.access", lambda file, _mode: file.name != "new.pem")
            assert config.tls() is before
        assert config.tls() is before

        def is_read() -> bool:
            (files / "new.pem").chmod(0o600)  # again, as the clock of file systems is coarse
            return config.tls() is not before

        wait_until(is_read, within=10, what="read")

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({}, tls()),
            (tls(), {}),
            (tls(), tls(client_ca_file="ca.pem", client_auth_type="RequireAndVerifyClientCert")),
        ],
        ids=["TLS on", "TLS off", "certificates"],
    )
    def test_what_the_entry_tells(
        self, write: Write, files: Path, caplog: pytest.LogCaptureFixture, before: object, after: object
    ) -> None:
        """Whether TLS is spoken, and certificates are required, stays as it was registered until the next start."""
        config = write(before)
        scheme, context = config.scheme, config.tls()
        (files / "web.yml").write_text(yaml.safe_dump(after))
        assert (config.tls(), config.scheme) == (context, scheme)
        assert "start the worker anew" in caplog.text

    def test_unreadable(self, write: Write, files: Path) -> None:
        """A certificate that disappears changes nothing."""
        config = write(tls())
        before = config.tls()
        (files / "cert.pem").unlink()
        assert config.tls() is before
