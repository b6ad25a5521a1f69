"""A revoked client certificate never counts, whatever clientcrl.pem looks like."""

from __future__ import annotations

import os
import shutil
import warnings
from binascii import a2b_base64, b2a_base64
from pathlib import Path
from types import SimpleNamespace

import pytest

SSL = pytest.importorskip("OpenSSL.SSL")

from e2e.certificates import Certificate  # noqa: E402
from OpenSSL.crypto import X509  # noqa: E402

from qmail_smtpd_py import tls  # noqa: E402
from qmail_smtpd_py.channel import Channel, Notes, note_problem  # noqa: E402

FIXTURES = Path(__file__).parent / "conformance" / "fixtures"
CLIENTS = [b"alice@clients.example", b"dave@clients.example"]
CRL = (FIXTURES / "client-crl.pem").read_bytes()

LISTS = {
    "as it was made": CRL,
    "without a newline at its end": CRL.rstrip(b"\n"),
    "with CR LF": CRL.replace(b"\n", b"\r\n"),
    "with blanks at line ends": CRL.replace(b"-----\n", b"----- \n"),
    "twice": CRL + CRL,
    "with text around it": b"issued today\n" + CRL + b"\nend\n",
}


def altered(old: bytes, new: bytes) -> bytes:
    """The list with some of its octets changed, as it is in DER."""
    lines = CRL.split(b"\n")
    begin, end = lines.index(b"-----BEGIN X509 CRL-----"), lines.index(b"-----END X509 CRL-----")
    der = a2b_base64(b"".join(lines[begin + 1 : end]))
    assert old in der
    text = b2a_base64(der.replace(old, new, 1))
    return b"\n".join([lines[begin], text.strip(), lines[end], b""])


BROKEN = {
    "empty": b"",
    "of no version": altered(b"\x02\x01\x01", b"\x02\x01\x00"),
    "an issuer that is no text": altered(b"known", b"\xff\xfe\xfdwn"),
    "no list": b"nothing revoked\n",
    "cut off": CRL[: len(CRL) // 2],
    "not base64": CRL.replace(b"M", b"!"),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A qmail home whose control files ask for client certificates."""
    control = tmp_path / "control"
    control.mkdir()
    shutil.copy(FIXTURES / "server-rsa.pem", control / "servercert.pem")
    shutil.copy(FIXTURES / "client-ca.pem", control / "clientca.pem")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def certified(certificate: str) -> bytes | None:
    """The address that a client with the certificate is known by after a handshake."""
    return handshake(tls.Context(tls.Policy(ask_client=True)).channel(), certificate)


def handshake(channel: Channel, certificate: str, name: bytes = b"") -> bytes | None:
    """The same, by this end of ours, and for a client that asks for a name."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.use_certificate_chain_file(os.fspath(FIXTURES / certificate))
    context.use_privatekey_file(os.fspath(FIXTURES / certificate))
    client = SSL.Connection(context, None)
    client.set_connect_state()
    if name:
        client.set_tlsext_host_name(name)
    for _ in range(4):
        try:
            client.do_handshake()
        except SSL.WantReadError:
            pass
        channel.feed(client.bio_read(65536))
        if channel.handshake():
            return channel.certified_address(CLIENTS)[0]
        client.bio_write(channel.pending())
    pytest.fail("no end of the handshake")


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_what_is_revoked_does_not_count_and_the_rest_does(home, text):
    (home / "control" / "clientcrl.pem").write_bytes(text)
    assert certified("client-revoked.pem") is None
    assert certified("client-alice.pem") == b"alice@clients.example"


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_with_a_list_that_is_none_nobody_counts_and_the_log_says_so(home, text):
    (home / "control" / "clientcrl.pem").write_bytes(text)
    assert certified("client-revoked.pem") is None
    assert certified("client-alice.pem") is None
    context = tls.Context(tls.Policy(ask_client=True))
    (warning,) = context.warnings
    assert warning.startswith("control/clientcrl.pem: ")
    assert context.ssl.get_verify_mode() == SSL.VERIFY_NONE, "nobody is asked in vain"


def test_with_authorities_that_are_none_nobody_is_asked(home):
    (home / "control" / "clientca.pem").write_bytes(b"no certificate")
    context = tls.Context(tls.Policy(ask_client=True))
    (warning,) = context.warnings
    assert warning.startswith("control/clientca.pem: ")
    assert context.ssl.get_verify_mode() == SSL.VERIFY_NONE


def test_whose_authority_is_revoked_does_not_count(home, tmp_path):
    """Each authority below ours has a list, and so have we."""
    root = Certificate("root", authority=True)
    between = Certificate("between", issuer=root, authority=True)
    client = Certificate("alice", issuer=between, email="alice@clients.example")
    path = tmp_path / "alice.pem"
    path.write_bytes(client.key_pem + client.chain)
    (home / "control" / "clientca.pem").write_bytes(root.pem)
    lists = home / "control" / "clientcrl.pem"
    lists.write_bytes(between.revoke() + root.revoke())
    assert certified(path) == b"alice@clients.example"
    for text in (between.revoke() + root.revoke(between), between.revoke(), root.revoke()):
        lists.write_bytes(text)
        assert certified(path) is None


@pytest.mark.filterwarnings("ignore:Attribute's length")
def test_a_certificate_that_the_library_has_a_warning_for(home, tmp_path):
    """What it warns of would go to the log as it is."""
    authority = Certificate("its own", authority=True)
    client = Certificate("x" * 100, issuer=authority, email="alice@clients.example")
    path = tmp_path / "warned.pem"
    path.write_bytes(client.key_pem + client.pem)
    (home / "control" / "clientca.pem").write_bytes(authority.pem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert certified(path) == b"alice@clients.example"


def test_the_first_problem_is_told(home):
    """What OpenSSL finds behind it comes of it."""
    channel = tls.Context(tls.Policy(ask_client=True)).channel()
    assert handshake(channel, "client-stranger.pem") is None
    assert len(channel.notes.problems) > 1
    assert channel.certified_address(CLIENTS)[1] == b"unable to get local issuer certificate"


def test_a_problem_that_is_rare_has_words_too():
    notes = Notes()
    connection = SimpleNamespace(get_app_data=lambda: notes)
    assert note_problem(connection, None, 22, depth=1, ok=0), "the handshake goes on"
    assert notes.problems == ["certificate chain too long"]


def test_a_certificate_that_the_library_can_not_read(home, monkeypatch):
    """Whatever it raises then."""
    channel = tls.Context(tls.Policy(ask_client=True)).channel()
    assert handshake(channel, "client-alice.pem")
    monkeypatch.setattr(X509, "to_cryptography", lambda self: 1 // 0)
    assert channel.certified_address(CLIENTS) == (None, b"malformed")


def test_with_a_list_that_can_not_be_reached_nobody_counts(home):
    (home / "control" / "clientcrl.pem").symlink_to("clientcrl.pem")
    assert certified("client-alice.pem") is None


def add_name(home: Path) -> None:
    """A certificate for mx.example.net."""
    named = home / "control" / "servercerts" / "mx.example.net"
    named.mkdir(parents=True)
    shutil.copy(FIXTURES / "server-rsa.pem", named / "servercert.pem")


def test_a_list_that_was_broken_before_is_not_told_of_again(home):
    (home / "control" / "clientcrl.pem").write_bytes(b"")
    add_name(home)
    context = tls.Context(tls.Policy(ask_client=True))
    channel = context.channel()
    assert handshake(channel, "client-alice.pem", b"mx.example.net") is None
    assert (len(context.warnings), channel.notes.warnings) == (1, [])


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_list_that_breaks_while_a_client_asks_for_a_name(home, text):
    """Its certificate is asked for by one context, and looked at by that of the name."""
    revocations = home / "control" / "clientcrl.pem"
    revocations.write_bytes(CRL)
    add_name(home)
    channel = tls.Context(tls.Policy(ask_client=True)).channel()
    revocations.write_bytes(text)
    assert handshake(channel, "client-revoked.pem", b"mx.example.net") is None
    (warning,) = channel.notes.warnings
    assert warning.startswith("control/clientcrl.pem: ")


def test_without_a_list_nobody_is_revoked(home):
    assert certified("client-revoked.pem") == b"dave@clients.example"
