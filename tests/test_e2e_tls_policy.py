"""What an administrator can say about TLS: versions, ciphers, whether it is there or needed."""

from __future__ import annotations

import re

import pytest
from e2e.clients import handshake, netcat, s_client, swaks
from e2e.letter import HELO, SENDER

pytest_plugins = ["e2e.fixtures"]

STARTTLS_FIRST = "530 Must issue a STARTTLS command first (#5.7.0)"


def errors(service, sessions=1):
    return [event["why"] for event in service.events("error", sessions)]


# Ciphers

WEAK = "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA384"
"""Ciphers that OpenSSL would have by default, and we have not."""


def test_unknown_ciphers_are_logged_one_by_one(start, home):
    """And the known ones count, those of TLS 1.3 among them."""
    names = "ECDHE+CHACHA20:NO-SUCH-CIPHER:TLS_AES_128_GCM_SHA256 TLS_NOR_THIS,!RC4:ECDHE+NOTHING"
    names += ";+ECDHE;@STRENGTH;-RSA"
    home.control("tlsserverciphers", f"# a list\n{names}")
    service = start()
    assert handshake(service, "-tls1_2")[1] == "ECDHE-ECDSA-CHACHA20-POLY1305"
    assert handshake(service, "-tls1_3")[1] == "TLS_AES_128_GCM_SHA256"
    unknown = ["NO-SUCH-CIPHER", "TLS_NOR_THIS", "ECDHE+NOTHING"]
    expected = [f"tlsserverciphers: no such cipher: {name}; left out" for name in unknown]
    assert errors(service, 2) == expected * 2


@pytest.mark.parametrize("names", ["NOTHING:OF:THIS", "!ECDHE", "ECDHE+AESGCM:!ALL"])
def test_where_no_cipher_is_left_there_is_no_tls_1_2(start, names):
    service = start(environ={"TLSCIPHERS": names})
    assert handshake(service, "-tls1_2")[1] is None
    assert handshake(service, "-tls1_3")[1] == "TLS_AES_256_GCM_SHA384"
    why = f"no ciphers of TLS 1.2 in {names}; TLS 1.3 alone is served"
    assert errors(service)[-1] == f"tlsserverciphers: {why}"


def test_ciphers_of_tls_1_2_by_their_names_in_the_registry(start):
    """They begin with TLS_ as well."""
    service = start(environ={"TLSCIPHERS": "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"})
    assert handshake(service, "-tls1_2")[1] == "ECDHE-ECDSA-AES128-GCM-SHA256"
    assert handshake(service, "-tls1_3")[1] == "TLS_AES_256_GCM_SHA384"
    assert errors(service, 2) == []


def test_a_list_for_tls_1_3_alone(start):
    service = start(environ={"TLSCIPHERS": "TLS_CHACHA20_POLY1305_SHA256"})
    assert handshake(service, "-tls1_3")[1] == "TLS_CHACHA20_POLY1305_SHA256"
    assert handshake(service, "-tls1_2")[1] is None
    assert errors(service, 2) == []


@pytest.mark.parametrize(
    "names", ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"]
)
def test_the_client_knows_best(start, home, names):
    """All ciphers are good: what it would like best is taken, as by netqmail's."""
    service = start()
    others = "ECDHE-ECDSA-AES256-GCM-SHA384"
    assert handshake(service, "-tls1_2", "-cipher", f"{names}:{others}")[1] == names
    newest = "TLS_AES_128_GCM_SHA256"
    choice = f"{newest}:TLS_AES_256_GCM_SHA384"
    assert handshake(service, "-tls1_3", "-ciphersuites", choice)[1] == newest


# Versions


@pytest.mark.parametrize("how", ["variable", "control file"])
def test_tls_1_3_alone(start, home, how):
    if how == "control file":
        home.control("tlsminversion", "1.3")
    service = start(environ={"TLSMINVERSION": "1.3"} if how == "variable" else {})
    assert handshake(service, "-tls1_2")[1] is None
    assert handshake(service, "-tls1_3")[1]
    assert service.events("tls", 2)[0]["why"] == "unsupported protocol"


def test_the_default_by_its_name(start, home):
    home.control("tlsminversion", "1.2")
    every = "ALL:@SECLEVEL=0"
    service = start(environ={"TLSCIPHERS": every})
    assert handshake(service, "-tls1_1", "-cipher", every)[1] is None
    assert handshake(service, "-tls1_2")[1]
    assert errors(service, 2) == []


@pytest.mark.parametrize("version", ["1.1", "TLS", ""])
def test_a_version_that_is_none_is_the_default(start, home, version):
    home.control("tlsminversion", version)
    service = start()
    said, cipher = handshake(service, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
    assert (cipher, "alert protocol version" in said) == (None, True)
    assert handshake(service, "-tls1_2")[1]
    expected = f"tlsminversion: {version}: neither 1.2 nor 1.3; 1.2 is in force"
    assert errors(service, 2) == ([expected] * 2 if version else [])


# ALPN


@pytest.mark.parametrize(
    ("protocols", "version", "starttls"),
    [("http/1.1", "-tls1_2", False), ("h2,http/1.1", "-tls1_3", False), ("SMTP", "-tls1_3", True)],
)
def test_another_protocol_is_turned_away(start, protocols, starttls, version):
    """What a browser would say, that somebody has led here with a certificate that is good."""
    service = start(environ={} if starttls else {"SMTPS": "1"})
    said, _ = handshake(service, version, "-alpn", protocols, starttls=starttls)
    assert "alert no application protocol" in said
    assert "250" not in said.partition("alert")[2]
    tls = service.event("tls")
    wanted = protocols.replace(",", ", ")
    why = f"no application protocol: the client wants {wanted}, and this is smtp"
    assert (tls["result"], tls["why"]) == ("failed", why)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_smtp_or_no_protocol_is_welcome(start, version):
    service = start()
    assert "\nALPN protocol: smtp\n" in handshake(service, version, "-alpn", "smtp")[0]
    assert "\nALPN protocol: smtp\n" in handshake(service, version, "-alpn", "h2,smtp")[0]
    assert "\nNo ALPN negotiated\n" in handshake(service, version)[0]


def test_the_log_shows_what_was_wanted_in_printable_octets(start):
    service = start()
    with s_client(service, "-alpn", 'a"b c') as client:
        client.end()
    assert service.event("tls")["why"].endswith('the client wants a"b c, and this is smtp')


# No TLS, or nothing without it


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False)])
def test_disabletls(start, value, off):
    service = start(environ={"DISABLETLS": value})
    with netcat(service) as client:
        client.reply()
        offered = client.say(f"EHLO {HELO}")
        assert ("STARTTLS" in offered) is not off
        answer = client.say("STARTTLS")
        assert answer == ("502 unimplemented (#5.5.1)" if off else "220 ready for tls")


def test_smtps_in_spite_of_disabletls(start):
    assert handshake(start(environ={"DISABLETLS": "1", "SMTPS": "1"}), starttls=False)[1]


def test_mail_needs_tls(start):
    service = start(environ={"REQUIRETLS": "1", "SMTPAUTH": "", "FORCETLS": "0"})
    with netcat(service) as client:
        client.reply()
        for command in (
            *(f"HELO {HELO}", f"MAIL FROM:<{SENDER}>", "RCPT TO:<joe@example.org>", "DATA"),
            *("RSET", "VRFY joe", "HELP"),
        ):
            assert client.say(command) == STARTTLS_FIRST
        assert client.say("NOOP") == "250 ok"
        offered = client.say(f"EHLO {HELO}")
        assert "STARTTLS" in offered
        assert "AUTH" not in offered
        assert client.say(f"MAIL FROM:<{SENDER}>") == STARTTLS_FIRST
        assert client.say("QUIT").startswith("221")
    refused = service.events("mail")
    assert {(event["code"], event["why"]) for event in refused} == {("530", STARTTLS_FIRST[4:])}


def test_auth_without_tls_ends_the_session_where_mail_needs_it(start, check):
    service = start(check=check, environ={"REQUIRETLS": "1", "SMTPAUTH": "", "FORCETLS": "0"})
    with netcat(service) as client:
        client.reply()
        answer = client.say("AUTH LOGIN")
        assert answer == "538 auth not available without TLS (#5.3.3)"
        client.end()
    assert service.event("disconnect")["why"] == "closed"


def test_mail_under_tls_where_it_needs_it(start):
    service = start(environ={"REQUIRETLS": "1"})
    ended = swaks(service, "--tls", "--data", "Subject: x\n\nx\n")
    assert ended.status == 0, ended.output
    assert service.event("mail")["result"] == "accepted"
    ended = swaks(service, "--data", "Subject: x\n\nx\n")
    assert re.search(r"^<\*\* 530 Must issue", ended.output, re.M), ended.output


def test_smtps_has_tls(start):
    service = start(environ={"REQUIRETLS": "1", "SMTPS": "1"})
    assert "250 ok" in swaks(service, "--tls-on-connect", "--quit-after", "MAIL").output
