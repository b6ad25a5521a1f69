"""Certificates of both sides: every kind of servercert.pem, and clients that have one."""

from __future__ import annotations

import re

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from e2e.certificates import KEYS, Certificate
from e2e.clients import curl, handshake, msmtp, s_client, swaks
from e2e.letter import HELO, SENDER
from e2e.maildir import deliveries, delivery
from e2e.service import NAME

pytest_plugins = ["e2e.fixtures"]

PKEY = {
    "RSA-2048": (b"rsaEncryption", b"RSA"),
    "ECDSA-P256": (b"id-ecPublicKey", b"EC"),
    "Ed25519": (b"ED25519",),
}
"""What versions of OpenSSL call them."""
EMAIL = "gateway@branch.example"
STRANGER = "someone@elsewhere.example"


# The server's


@pytest.fixture(scope="module")
def intermediate(authority):
    return Certificate("Test Intermediate", issuer=authority, authority=True)


@pytest.fixture(scope="module", params=KEYS)
def certificate(request, intermediate):
    """A server certificate of each key type, from an intermediate authority."""
    return request.param, Certificate(NAME, request.param, issuer=intermediate)


def traditional(key):
    """The key as older programs write it, with its type in the PEM label, where there is such."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


@pytest.mark.parametrize("order", ["key first", "key last"])
def test_key_type_and_order(start, home, trusted, letter, certificate, order):
    """Clients that know nothing but the root verify the chain, by OpenSSL and by GnuTLS."""
    key_type, made = certificate
    parts = [made.key_pem, made.chain]
    home.certificate(b"".join(parts if order == "key first" else parts[::-1]))
    service = start()
    options = ["-CAfile", trusted, "-verify_return_error", "-verify_hostname", NAME]
    with s_client(service, "-ign_eof", *options) as client:
        client.wait_for(rb"Verify return code: 0 \(ok\)")
        client.reply()
        assert client.say("QUIT") == f"221 {NAME}"
        client.end()
    assert re.findall(rb"^ *a:PKEY: ([\w-]+)", client.printed, re.MULTILINE)[0] in PKEY[key_type]
    sent = re.findall(rb"^ *\d s:CN ?= ?(.*?)\r?$", client.printed, re.MULTILINE)
    assert sent == [NAME.encode(), b"Test Intermediate"]
    sent = msmtp(service, letter, "--tls=on", f"--tls-trust-file={trusted}")
    assert sent.status == 0, sent.output
    assert delivery(home.maildir).data == letter.delivered


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_each_version_of_tls(start, home, trusted, letter, certificate, version):
    """A certificate of each key type serves both, and curl verifies it."""
    _, made = certificate
    home.certificate(made.key_pem + made.chain)
    options = ["--ssl-reqd", "--cacert", trusted, f"--tlsv{version}", "--tls-max", version]
    ended = curl(start(), letter, *options)
    assert ended.status == 0, ended.output
    assert re.search("SSL certificate verif(y ok|ied)", ended.output)
    assert len(deliveries(home.maildir)) == 1


@pytest.mark.parametrize("key_type", ["RSA-2048", "ECDSA-P256"])
def test_traditional_key_format(start, home, trusted, letter, intermediate, key_type):
    made = Certificate(NAME, key_type, issuer=intermediate)
    home.certificate(made.chain + traditional(made.key))
    ended = curl(start(), letter, "--ssl-reqd", "--cacert", trusted)
    assert ended.status == 0, ended.output


def test_chain_is_needed(start, home, trusted, letter, intermediate):
    """Without the intermediate a client that verifies goes away, and the log says what it said."""
    made = Certificate(NAME, issuer=intermediate)
    home.certificate(made.key_pem + made.pem)
    service = start()
    # New versions of curl look at it when the handshake is over.
    output, _ = handshake(service, "-verify_return_error", "-CAfile", trusted)
    assert "unable to get local issuer certificate" in output
    tls = service.event("tls")
    assert tls["result"] == "failed"
    assert "unknown ca" in tls["why"]


# The client's


@pytest.fixture(scope="module")
def clients_authority():
    return Certificate("Clients' Root", authority=True)


@pytest.fixture(scope="module")
def listed(clients_authority):
    return Certificate("gateway", issuer=clients_authority, email=EMAIL)


@pytest.fixture
def certified(home, start, clients_authority, listed):
    """A service that lets those relay who have a certificate of this authority and are listed."""
    home.control("tlsclients", f"# who may relay\n{EMAIL.upper()}")
    home.control("clientca.pem", clients_authority.pem)
    revoked = Certificate("nobody", issuer=clients_authority)
    home.control("clientcrl.pem", clients_authority.revoke(revoked))
    return start


def files(directory, certificate):
    """The certificate and its key, each in a file."""
    cert, key = directory / "client.pem", directory / "client.key"
    cert.write_bytes(certificate.chain)
    key.write_bytes(certificate.key_pem)
    return cert, key


def ask_by_s_client(service, cert, key):
    options = ["-cert", cert, "-key", key] if cert else []
    with s_client(service, "-quiet", *options) as client:
        client.reply()
        client.say(f"EHLO {HELO}")
        client.say(f"MAIL FROM:<{SENDER}>")
        answer = client.say(f"RCPT TO:<{STRANGER}>")
        client.say("QUIT")
        return answer


def ask_by_swaks(service, cert, key):
    options = ["--tls-cert", cert, "--tls-key", key] if cert else []
    return swaks(service, "--tls", "--to", STRANGER, "--quit-after", "RCPT", *options).output


def ask_by_curl(service, cert, key):
    """With the server's name in place of a message, as no message is needed."""
    options = ["--cert", cert, "--key", key] if cert else []
    options += ["--ssl-reqd", "--insecure", "--mail-rcpt", STRANGER, "--tls-max", "1.2"]
    with open("/dev/null", "rb") as nothing:
        return curl(service, None, *options, stdin=nothing).output


each_client = pytest.mark.parametrize("ask", [ask_by_s_client, ask_by_swaks, ask_by_curl])


@each_client
def test_listed_client_may_relay(certified, tmp_path, listed, ask):
    service = certified()
    answer = ask(service, *files(tmp_path, listed))
    assert "250 ok" in answer
    assert "553 sorry" not in answer
    assert service.event("tls")["cert"] == EMAIL


def test_address_counts_however_it_is_written(certified, tmp_path, clients_authority):
    """In tlsclients it is in upper case, in the certificate in mixed case."""
    mixed = Certificate("gateway", issuer=clients_authority, email=EMAIL.title())
    service = certified()
    assert "250 ok" in ask_by_s_client(service, *files(tmp_path, mixed))
    assert service.event("tls")["cert"] == EMAIL.title()


def test_message_of_a_listed_client(certified, home, tmp_path, letter, listed):
    cert, key = files(tmp_path, listed)
    options = ["--ssl-reqd", "--insecure", "--cert", cert, "--key", key]
    ended = curl(certified(), letter, *options, "--mail-rcpt", STRANGER)
    assert ended.status == 0, ended.output
    found = delivery(home.maildir)
    assert found.data == letter.delivered
    assert STRANGER in found.recipients
    assert f"encrypted) (cert {EMAIL}); " in found.received


@each_client
def test_client_without_certificate(certified, ask):
    service = certified()
    denied = "rcpthosts; no valid cert for gatewaying (#5.7.1)"
    assert denied in ask(service, None, None)
    assert service.event("tls")["cert"] == "none"


@each_client
def test_client_that_is_not_listed(certified, tmp_path, clients_authority, ask):
    other = Certificate("other", issuer=clients_authority, email="other@branch.example")
    answer = ask(certified(), *files(tmp_path, other))
    assert "no valid cert for gatewaying: email address not in my list of tlsclients" in answer


@each_client
def test_revoked_client(certified, home, tmp_path, clients_authority, listed, ask):
    home.control("clientcrl.pem", clients_authority.revoke(listed))
    service = certified()
    answer = ask(service, *files(tmp_path, listed))
    assert "no valid cert for gatewaying: certificate revoked (#5.7.1)" in answer
    assert service.event("tls")["cert"] == "certificate revoked"


@each_client
def test_client_of_another_authority(certified, tmp_path, ask):
    """It can write the listed address into a certificate of its own."""
    stranger = Certificate("Clients' Root", authority=True)
    forged = Certificate("gateway", issuer=stranger, email=EMAIL)
    answer = ask(certified(), *files(tmp_path, forged))
    assert "553 sorry" in answer
    assert "no valid cert for gatewaying: unable to " in answer


def test_clients_are_told_whose_certificates_count(certified):
    """One that has many chooses by it."""
    said, _ = handshake(certified())
    assert re.search("Acceptable client certificate CA names\\nCN ?= ?Clients' Root\\n", said)


def test_client_is_not_asked_where_it_may_relay_anyway(certified, tmp_path, listed):
    service = certified(environ={"RELAYCLIENT": ""})
    assert "250 ok" in ask_by_s_client(service, *files(tmp_path, listed))
    assert service.event("tls")["cert"] == "none"
