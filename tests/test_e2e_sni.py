"""Certificates beside the one: of another key type, and by the name that a client asks for."""

from __future__ import annotations

import re

import pytest
from cryptography import x509
from e2e.certificates import Certificate
from e2e.clients import handshake
from e2e.service import NAME

pytest_plugins = ["e2e.fixtures"]

OTHER = "mail.example.net"
WILD = "*.example.net"


def pem(made):
    return made.key_pem + made.chain


def put(home, name, text, file="servercert.pem"):
    """A certificate by name."""
    directory = home.path / "control" / "servercerts" / name
    directory.mkdir(parents=True, exist_ok=True)
    return home.control(f"servercerts/{name}/{file}", text, 0o640)


def subject(service, *options):
    """The common name in the certificate that a client gets, and its issuers' behind it."""
    said, cipher = handshake(service, "-showcerts", *options)
    assert cipher, said
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", said, re.S)
    certificates = [x509.load_pem_x509_certificate(block.encode()) for block in blocks]
    return [certificate.subject.rfc4514_string()[3:] for certificate in certificates]


def by_name(service, name, *options):
    return subject(service, "-servername", name, *options)


def errors(service, sessions=1):
    return [event["why"] for event in service.events("error", sessions)]


@pytest.fixture(scope="module")
def other(authority):
    intermediate = Certificate("Other Intermediate", issuer=authority, authority=True)
    return Certificate(OTHER, "RSA-2048", issuer=intermediate)


@pytest.fixture(scope="module")
def wild(authority):
    return Certificate(WILD, issuer=authority)


# By key type


@pytest.fixture(scope="module")
def rsa(authority):
    intermediate = Certificate("RSA Intermediate", issuer=authority, authority=True)
    return Certificate("rsa", "RSA-2048", issuer=intermediate)


@pytest.fixture(scope="module")
def ecdsa(authority):
    intermediate = Certificate("ECDSA Intermediate", issuer=authority, authority=True)
    return Certificate("ecdsa", issuer=intermediate)


def test_each_client_gets_the_type_that_it_can_use(start, home, rsa, ecdsa):
    """With the issuers of that, whichever file it is in."""
    for one, beside in ((rsa, ecdsa), (ecdsa, rsa)):
        home.certificate(pem(one))
        home.control("servercert-ecdsa.pem", pem(beside), 0o640)
        service = start()
        for version in ("-tls1_2", "-tls1_3"):
            old = ["-sigalgs", "RSA-PSS+SHA256", version]
            assert subject(service, *old) == ["rsa", "RSA Intermediate"]
            assert subject(service, version) == ["ecdsa", "ECDSA Intermediate"]
        assert errors(service, 4) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"nothing", "no certificate in it"),
        ("no key", "no private key in it; append the key to the certificate"),
        ("same", "its key is of the same type as that in control/servercert.pem"),
    ],
)
def test_a_second_certificate_that_can_not_be_used(start, home, rsa, text, why):
    home.certificate(pem(rsa))
    texts = {"no key": rsa.chain, "same": pem(rsa)}
    home.control("servercert-ecdsa.pem", texts.get(text, text), 0o640)
    service = start()
    assert subject(service) == ["rsa", "RSA Intermediate"]
    assert errors(service) == [f"control/servercert-ecdsa.pem: {why}; left out"]


# By name


def test_the_certificate_is_that_of_the_name(start, home, other, wild):
    put(home, OTHER, pem(other))
    put(home, WILD, pem(wild))
    service = start()
    assert by_name(service, OTHER) == [OTHER, "Other Intermediate"]
    assert by_name(service, OTHER.upper()) == [OTHER, "Other Intermediate"]
    assert by_name(service, "mx.example.net") == [WILD]
    for name in ("a.mx.example.net", "example.net", "example.com", "net", NAME):
        assert by_name(service, name) == [NAME]
    assert subject(service, "-noservername") == [NAME]
    assert errors(service, 9) == []


def test_no_name_leads_elsewhere(start, home, other):
    """Nor can the wildcard be asked for, as if it were a name."""
    put(home, WILD, pem(other))
    for place in ("outside", "control/outside"):
        (home.path / place).mkdir()
        (home.path / place / "servercert.pem").write_bytes(pem(other))
    names = [WILD, "../outside", "../../outside", "..", ".", "a/../../outside", "a..example.net"]
    names += [".example.net", "example.net.", "-", "a_b.example.net", "x" * 240 + ".example.net"]
    service = start()
    for name in names:
        assert by_name(service, name) == [NAME], name
    assert errors(service, len(names)) == []


def test_both_types_by_name(start, home, rsa, ecdsa):
    put(home, OTHER, pem(rsa))
    put(home, OTHER, pem(ecdsa), "servercert-ecdsa.pem")
    service = start()
    assert by_name(service, OTHER, "-sigalgs", "RSA-PSS+SHA256")[0] == "rsa"
    assert by_name(service, OTHER)[0] == "ecdsa"


@pytest.mark.parametrize(
    "what", ["garbage", "no key", "another key", "not a file", "unreadable", "link to itself"]
)
def test_a_broken_one_is_logged_and_the_default_is_served(start, home, other, wild, what):
    text = {"no key": other.chain, "another key": wild.key_pem + other.chain}.get(what, b"garbage")
    path = put(home, OTHER, text)
    if what == "not a file":
        path.unlink()
        path.mkdir()
    elif what == "link to itself":
        path.unlink()
        path.symlink_to(path)
    elif what == "unreadable":
        path.chmod(0o000)
    service = start()
    assert by_name(service, OTHER) == [NAME]
    (why,) = errors(service)
    assert why.startswith(f"control/servercerts/{OTHER}/servercert.pem: ")
    assert why.endswith("; the default is served")
    assert service.event("tls")["result"] == "ok"


def test_policy_holds_for_each_name(start, home, other):
    put(home, OTHER, pem(other))
    home.control("tlsminversion", "1.3")
    service = start(environ={"TLSCIPHERS": "TLS_AES_128_GCM_SHA256:NOTHING"})
    name = ["-servername", OTHER]
    assert handshake(service, *name, "-tls1_2")[1] is None
    assert handshake(service, *name)[1] == "TLS_AES_128_GCM_SHA256"
    assert "alert no application protocol" in handshake(service, *name, "-alpn", "h2")[0]
    told = ["tlsserverciphers: no such cipher: NOTHING; left out"]
    assert errors(service, 3) == told * 3, "not again for the name"


def test_client_certificates_count_under_each_name(start, home, tmp_path, other):
    """And those that were revoked do not: the authorities are the same for all names."""
    put(home, OTHER, pem(other))
    authority = Certificate("Clients' Root", authority=True)
    listed, revoked = (
        Certificate("gateway", issuer=authority, email="gateway@branch.example") for _ in range(2)
    )
    home.control("tlsclients", "gateway@branch.example")
    home.control("clientca.pem", authority.pem)
    home.control("clientcrl.pem", authority.revoke(revoked))
    service = start()
    for client in (listed, revoked):
        file = tmp_path / "client.pem"
        file.write_bytes(pem(client))
        assert by_name(service, OTHER, "-cert", file, "-key", file)[0] == OTHER
    assert [event["cert"] for event in service.events("tls", 2)] == [
        "gateway@branch.example",
        "certificate revoked",
    ]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (["issuer", "own"], "; the key is that of certificate 2 in it, which has to be the first"),
        (["issuer"], "; the key is that of no certificate in it"),
        (["another"], "; the key is that of no certificate in it"),
    ],
)
@pytest.mark.parametrize("key", ["RSA-2048", "ECDSA-P256"])
def test_what_is_wrong_with_a_pair_is_told(start, home, authority, key, parts, why):
    issuer = Certificate("Issuer", "RSA-2048", issuer=authority, authority=True)
    own = Certificate(NAME, key, issuer=issuer)
    another = Certificate(NAME, key, issuer=issuer)
    texts = {"issuer": issuer.pem, "own": own.pem, "another": another.pem}
    home.certificate(own.key_pem + b"".join(texts[part] for part in parts))
    service = start()
    assert handshake(service)[1] is None
    what = "type" if (key, parts[0]) == ("ECDSA-P256", "issuer") else "values"
    expected = f"control/servercert.pem: key {what} mismatch{why}"
    assert errors(service) == [f"TLS not available: {expected}"]
