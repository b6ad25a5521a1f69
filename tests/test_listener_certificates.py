"""Certificates in a process that serves many connections: renewed ones count for the next one."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace

import pytest
from conformance.stage import Stage
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from e2e.certificates import Certificate
from listener.listening import Listening
from listener.mail import quit_
from listener.world import put

from qmail_smtpd_py import certificates
from qmail_smtpd_py.control import ControlFiles
from qmail_smtpd_py.controlcache import CachedControlFiles
from qmail_smtpd_py.tls import CachedContexts, NamedContexts, Policy

pytestmark = pytest.mark.tls
pytest_plugins = ["listener.fixtures"]

NAMED = "mail.example.net"


def subject(listener: Listening, name: str | None = None, ciphers: str = "ALL") -> str:
    """The common name in the certificate that a client gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    client = listener.greeted()
    assert client.command(b"STARTTLS") == "220 ready for tls"
    assert client.handshake(context, name) == "ok"
    der = client.certificate
    quit_(client)
    return x509.load_der_x509_certificate(der).subject.rfc4514_string()[3:]


def test_each_file_counts_from_the_next_connection_on(mx: Stage) -> None:
    """Also those that were not there before; in one worker, which keeps its contexts."""
    with Listening(mx, "-c", "1") as listener:
        before = subject(listener)
        put(mx, "servercert.pem", Certificate("renewed", "RSA-2048"))
        assert before != subject(listener) == "renewed"
        assert subject(listener, ciphers="ECDHE-RSA-AES128-GCM-SHA256") == "renewed"

        put(mx, "servercert-ecdsa.pem", Certificate("another type"))
        assert subject(listener, ciphers="ECDHE-ECDSA-AES128-GCM-SHA256") == "another type"
        assert subject(listener, ciphers="ECDHE-RSA-AES128-GCM-SHA256") == "renewed"

        assert subject(listener, NAMED) == "another type"
        put(mx, f"servercerts/{NAMED}/servercert.pem", Certificate("by name"))
        assert subject(listener, NAMED) == "by name"
        put(mx, f"servercerts/{NAMED}/servercert.pem", Certificate("by name anew"))
        assert subject(listener, NAMED) == "by name anew"
        put(mx, f"servercerts/{NAMED}/servercert-ecdsa.pem", Certificate("both types", "RSA-2048"))
        assert subject(listener, NAMED, "ECDHE-RSA-AES128-GCM-SHA256") == "both types"
        assert subject(listener, "mail.example.com") == "another type"

        put(mx, "servercerts/*.example.com/servercert.pem", Certificate("wildcard"))
        assert subject(listener, "mail.example.com") == "wildcard"
        put(mx, "servercerts/mail.example.com/servercert.pem", Certificate("exact"))
        assert subject(listener, "mail.example.com") == "exact"
        (mx.home / "control/servercerts/mail.example.com/servercert.pem").unlink()
        assert subject(listener, "mail.example.com") == "wildcard"
        assert len({worker for worker, _ in listener.ends(13)}) == 1


def test_a_broken_one_is_told_each_time_until_it_is_mended(mx: Stage) -> None:
    path = f"servercerts/{NAMED}/servercert.pem"
    put(mx, "servercert.pem", Certificate("default"))
    put(mx, path, Certificate("by name"))
    (mx.home / "control" / path).write_bytes(b"garbage")
    with Listening(mx, "-c", "1") as listener:
        assert [subject(listener, NAMED) for _ in range(2)] == ["default", "default"]
        listener.ends(2)  # what a session logs is there when its end is
        told = f"control/{path}: no certificate in it; the default is served"
        assert listener.log.text().count(told) == 2
        put(mx, path, Certificate("mended"))
        assert subject(listener, NAMED) == "mended"
        listener.ends()
        assert listener.log.text().count(told) == 2


def test_memory_for_names_is_bounded(mx: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As contexts, and as files that are broken; what fell out is made anew."""
    monkeypatch.setattr(NamedContexts, "MOST", 3)
    monkeypatch.chdir(mx.home)
    made = Certificate("by name")
    names = [f"mail{number}.example.net" for number in range(5)]
    for name in names:
        put(mx, f"servercerts/{name}/servercert.pem", made)
    (mx.home / "control/servercerts" / names[4] / "servercert.pem").write_bytes(b"garbage")
    contexts = NamedContexts(Policy())
    warnings: list[str] = []
    first = [contexts.get(name.encode(), warnings) for name in names]
    assert [context is None for context in first] == [False] * 4 + [True]
    assert len(contexts._kept) == 3
    assert contexts.get(names[3].encode(), warnings) is first[3]
    assert contexts.get(names[0].encode(), warnings) is not first[0]
    assert contexts.get(b"x.example.com", warnings) is None
    assert len(contexts._kept) == 3
    assert len(warnings) == 1


def test_a_file_that_vanishes_while_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A renewal may take it away and put another in its place."""
    made = Certificate("gone")
    monkeypatch.setattr(certificates, "read", lambda path: made.key_pem + made.chain)
    with pytest.raises(certificates.Unavailable, match="pem: No such file or directory"):
        certificates.check(str(tmp_path / "servercert.pem"))


LONG = ".".join(["x" * 63] * 3 + ["y" * 61])


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("Mail-10.Example.net", ["mail-10.example.net", "*.example.net"]),
        ("example.net", ["example.net", "*.net"]),
        ("localhost", ["localhost"]),
        (LONG, [LONG, "*" + LONG[63:]]),
        (LONG + "y", []),
        ("x" * 64 + ".example.net", []),
        ("*.example.net", []),
    ],
)
def test_where_the_certificate_for_a_name_may_be(name: str, places: list[str]) -> None:
    found = [*certificates.named(name.encode())]
    assert found == [f"control/servercerts/{place}/servercert.pem" for place in places]


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_nobody_is_asked_for_a_passphrase(tmp_path: Path, form: PrivateFormat) -> None:
    made = Certificate("locked")
    path = tmp_path / "servercert.pem"
    key = made.key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"x"))
    path.write_bytes(key + made.chain)
    with pytest.raises(certificates.Unavailable, match="the private key has a passphrase"):
        certificates.check(str(path))


def test_parameters_for_dhe_count_from_the_next_connection_on(
    mx: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mx.home)
    contexts, files = CachedContexts(), CachedControlFiles()
    before = contexts.get(Policy(), files)
    mx.control({"dh2048.pem": "none\n"})
    assert contexts.get(Policy(), files) is before
    files.refresh()
    (warning,) = contexts.get(Policy(), files).warnings
    assert warning.startswith("control/dh2048.pem: ")


def test_ciphers_that_our_own_client_has_not(mx: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have them."""
    monkeypatch.chdir(mx.home)
    policy = Policy((b"TLS_AES_128_CCM_SHA256",))
    assert CachedContexts().get(policy, ControlFiles()).warnings == []


def test_a_certificate_that_can_not_be_used_is_no_surprise_in_a_handshake(
    mx: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """220 is not said: the client is told what is wrong, in netqmail's words."""
    monkeypatch.chdir(mx.home)
    mx.control({"servercert.pem": "none\n"})
    with pytest.raises(certificates.Unavailable, match="no certificate in it"):
        CachedContexts().get(Policy(), ControlFiles())


def test_a_defect_in_the_middle_of_a_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL called, and would not know what an exception is."""

    def breaks(*_: object) -> None:
        raise RuntimeError("what nobody may see")

    monkeypatch.setattr(NamedContexts, "get", breaks)
    warnings: list[str] = []
    connection = SimpleNamespace(
        get_servername=lambda: NAMED.encode(),
        get_app_data=lambda: SimpleNamespace(warnings=warnings),
    )
    NamedContexts(SimpleNamespace()).choose(connection)
    assert warnings == ["control/servercerts: RuntimeError; the default is served"]
