"""Every client, every mechanism, every way to TLS: each sends a message that arrives as it was."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e.clients import (
    curl,
    curl_auth,
    interpreters,
    msmtp,
    msmtp_auth,
    s_client,
    smtp_source,
    smtplib,
    swaks,
    swaks_auth,
    swaks_data,
)
from e2e.letter import HELO, NO_CRAM_USER, PASSWORD, RECIPIENT, SENDER, USER
from e2e.maildir import deliveries, delivery

WRONG = (USER, "wrong-horse")

pytest_plugins = ["e2e.fixtures"]

MECHANISMS = ("PLAIN", "LOGIN", "CRAM-MD5")
each_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)
each_way = pytest.mark.parametrize("tls", ["starttls", "smtps"])
each_version = pytest.mark.parametrize("version", ["1.2", "1.3"])


@pytest.fixture
def serve(start, check):
    """Start a service that offers every mechanism, in one of the two ways to TLS."""

    def serve_tls(tls="starttls", **environ):
        smtps = {"SMTPS": "1"} if tls == "smtps" else {}
        return start(environ={"SMTPAUTH": "+cram", **smtps, **environ}, check=check)

    return serve_tls


def check_arrived(service, data, protocol, user=None):
    """The one message is there as it was sent, and its Received field says how it came."""
    found = delivery(service.home.maildir)
    assert found.data == data
    assert (found.sender, found.recipients) == (SENDER, [RECIPIENT])
    client = f"({user}@127.0.0.1)" if user else "(127.0.0.1)"
    origin = f"Received: from unknown (HELO {HELO}) {client} by mail.example.org with {protocol};"
    assert found.received.startswith(origin)
    mail = service.event("mail")
    assert (mail["result"], mail["qp"], mail["size"]) == ("accepted", str(found.qp), str(len(data)))
    assert mail.fields.get("user") == user


def check_secured(service, data, version):
    """The same, by TLS without AUTH."""
    tls = service.event("tls")
    assert (tls["result"], tls["version"]) == ("ok", f"TLSv{version}")
    check_arrived(service, data, f"ESMTPS ({tls['cipher']} encrypted)")


def check_authenticated(service, data, mechanism):
    """The same, by TLS with AUTH."""
    auth = service.event("auth").fields
    wanted = {"result": "ok", "mechanism": mechanism, "user": USER, "tls": "yes", "code": "235"}
    assert wanted.items() <= auth.items()
    cipher = service.event("tls")["cipher"]
    check_arrived(service, data, f"ESMTPSA ({cipher} encrypted, authenticated)", USER)


@each_version
@each_way
def test_swaks_tls(serve, letter, tls, version):
    service = serve(tls)
    on = "--tls-on-connect" if tls == "smtps" else "--tls"
    protocol = f"tlsv{version.replace('.', '_')}"
    ended = swaks(service, on, "--tls-protocol", protocol, *swaks_data(letter))
    assert ended.status == 0, ended.output
    assert f"TLS started with cipher TLSv{version}:" in ended.output
    check_secured(service, letter.delivered, version)


@each_version
@each_way
def test_curl_tls(serve, letter, trusted, tls, version):
    service = serve(tls)
    scheme = "smtps" if tls == "smtps" else "smtp"
    options = ["--ssl-reqd", "--cacert", trusted, f"--tlsv{version}", "--tls-max", version]
    ended = curl(service, letter, *options, scheme=scheme)
    assert ended.status == 0, ended.output
    check_secured(service, letter.delivered, version)


@each_version
@each_way
def test_msmtp_tls(serve, letter, trusted, tls, version):
    service = serve(tls)
    options = ["--tls=on", f"--tls-trust-file={trusted}"]
    options += [f"--tls-starttls={'off' if tls == 'smtps' else 'on'}"]
    options += [f"--tls-priorities=NORMAL:-VERS-ALL:+VERS-TLS{version}"]
    ended = msmtp(service, letter, *options)
    assert ended.status == 0, ended.output
    check_secured(service, letter.delivered, version)


@each_version
@each_way
def test_smtplib_tls(serve, letter, trusted, tls, version):
    service = serve(tls)
    sent = smtplib(service, letter, tls=tls, version=version, authority=str(trusted))
    assert sent == {"refused": [], "version": f"TLSv{version}"}
    check_secured(service, letter.delivered, version)


@each_version
@each_way
def test_s_client_tls(serve, letter, trusted, tls, version):
    service = serve(tls)
    protocol = f"-tls{version.replace('.', '_')}"
    options = ["-quiet", "-CAfile", trusted, "-verify_return_error", protocol]
    with s_client(service, *options, starttls=tls == "starttls") as client:
        client.reply()
        client.say(f"EHLO {HELO}")
        client.say(f"MAIL FROM:<{SENDER}>")
        client.say(f"RCPT TO:<{RECIPIENT}>")
        client.say("DATA")
        client.type("Subject: typed\n\n..dot")
        assert client.say(".").startswith("250 ok ")
        assert client.say("QUIT") == "221 mail.example.org"
        client.end()
    check_secured(service, b"Subject: typed\n\n.dot\n", version)


@each_mechanism
def test_swaks_auth(serve, letter, mechanism):
    service = serve()
    options = swaks_auth(mechanism, USER, PASSWORD)
    ended = swaks(service, "--tls", *options, *swaks_data(letter))
    assert ended.status == 0, ended.output
    assert f" ~> AUTH {mechanism}" in ended.output
    check_authenticated(service, letter.delivered, mechanism)


@each_mechanism
@pytest.mark.parametrize("initial", ["--sasl-ir", "--no-sasl-ir"])
def test_curl_auth(serve, letter, trusted, mechanism, initial):
    service = serve()
    options = ["--ssl-reqd", "--cacert", trusted, initial, *curl_auth(mechanism, USER, PASSWORD)]
    ended = curl(service, letter, *options)
    assert ended.status == 0, ended.output
    assert f"> AUTH {mechanism}" in ended.output
    check_authenticated(service, letter.delivered, mechanism)


@each_mechanism
def test_msmtp_auth(serve, letter, trusted, mechanism):
    service = serve()
    options = ["--tls=on", f"--tls-trust-file={trusted}", *msmtp_auth(mechanism, USER, PASSWORD)]
    ended = msmtp(service, letter, *options)
    assert ended.status == 0, ended.output
    check_authenticated(service, letter.delivered, mechanism)


@each_mechanism
def test_smtplib_auth_of_the_oldest_and_newest_python(serve, letter, trusted, mechanism):
    versions = interpreters()
    for number, version in enumerate((min(versions), max(versions)), 1):
        service = serve()
        secrets = {"mechanism": mechanism, "user": USER, "password": PASSWORD}
        options = {"tls": "starttls", "authority": str(trusted), **secrets}
        sent = smtplib(service, letter, versions[version], **options)
        assert sent["refused"] == [], version
        assert service.event("auth")["mechanism"] == mechanism
        assert len(deliveries(service.home.maildir)) == number


def test_smtp_source_in_clear(serve):
    service = serve()
    ended = smtp_source(service, "-S", "from Postfix", "-l", 1000)
    assert (ended.status, ended.output) == (0, "")
    found = delivery(service.home.maildir)
    assert b"\nSubject: from Postfix\n" in found.data
    assert found.received.split(" by ")[1].startswith("mail.example.org with SMTP; ")


def refused_by_swaks(service, letter, trusted):
    return swaks(service, "--tls", *swaks_auth("PLAIN", *WRONG)).output


def refused_by_curl(service, letter, trusted):
    options = ["--ssl-reqd", "--cacert", trusted, *curl_auth("LOGIN", *WRONG)]
    return curl(service, letter, *options).output


def refused_by_msmtp(service, letter, trusted):
    options = ["--tls=on", f"--tls-trust-file={trusted}", *msmtp_auth("CRAM-MD5", *WRONG)]
    return msmtp(service, letter, *options).output


def refused_by_smtplib(service, letter, trusted):
    secrets = {"mechanism": "PLAIN", "user": WRONG[0], "password": WRONG[1]}
    answer = smtplib(service, letter, tls="starttls", authority=str(trusted), **secrets)
    return f"{answer['error']} {answer['code']}"


def refused_for_want_of_a_secret(service, letter, trusted):
    options = ["--tls=on", f"--tls-trust-file={trusted}"]
    return msmtp(service, letter, *options, *msmtp_auth("CRAM-MD5", NO_CRAM_USER, PASSWORD)).output


REFUSED = (
    refused_by_swaks,
    refused_by_curl,
    refused_by_msmtp,
    refused_by_smtplib,
    refused_for_want_of_a_secret,
)


def test_failed_auth(serve, letter, trusted):
    """Each waits for its refusal, so they do it together."""
    service = serve(SMTPAUTH="!+cram")
    with ThreadPoolExecutor(len(REFUSED)) as pool:
        answers = [pool.submit(refused, service, letter, trusted) for refused in REFUSED]
    assert all(re.search(r"\b535\b", answer.result()) for answer in answers)
    auths = service.events("auth", sessions=len(REFUSED))
    assert {(auth["result"], auth["code"]) for auth in auths} == {("failed", "535")}
    tried = [("CRAM-MD5", USER), ("CRAM-MD5", NO_CRAM_USER), ("LOGIN", USER), ("PLAIN", USER)]
    assert sorted({(auth["mechanism"], auth["user"]) for auth in auths}) == tried
    service.log.wait_for("^checkpassword-users.*refused", count=len(REFUSED))
    assert WRONG[1] not in service.log.text()
    assert deliveries(service.home.maildir) == []
