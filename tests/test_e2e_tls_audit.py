"""What the TLS of the service lets nobody do: old protocols, weak ciphers, renegotiation.

testssl.sh looks from outside and finds no more than it should; openssl s_client tries by hand.
"""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from e2e.certificates import Certificate
from e2e.clients import handshake, run, s_client
from e2e.letter import HELO
from e2e.programs import find, lack, need
from e2e.service import ADDRESS, NAME

pytest_plugins = ["e2e.fixtures"]

CHECKS = ["--protocols", "--std", "--renegotiation", "--compression"]
ALL_CHECKS = ["--protocols", "--std", "--fs", "--vulnerable"]
HARMLESS = ("OK", "INFO", "DEBUG")
NOT_OFFERED = ("SSLv2", "SSLv3", "TLS1", "TLS1_1")
NO_CIPHERS = ("NULL", "aNULL", "EXPORT", "LOW", "3DES_IDEA")
RENAMED = {"AVERAGE": "OBSOLETED", "STRONG": "STRONG_FS"}  # in testssl 3.2
OF_THE_SCANNER = "engine_problem"  # says that its openssl has no GOST

EVERYTHING = "ALL:COMPLEMENTOFALL:eNULL:@SECLEVEL=0"
PREFERRED = ["AES256-GCM-SHA384", "AES128-GCM-SHA256", "CHACHA20-POLY1305"]


def scan(service, report, *options):
    """What testssl.sh finds: for each finding its severity and text."""
    program = find("testssl") or find("testssl.sh") or lack("not on this host: testssl.sh")
    (openssl,) = need("openssl")
    quiet = ["--quiet", "--color", "0", "--warnings", "off", "--nodns", "none"]
    command = [program, *quiet, "--openssl", openssl, "--jsonfile", report, *options]
    ended = run([*command, f"{ADDRESS}:{service.port}"], timeout=240)  # 30 on an idle host
    assert report.exists(), ended.output
    findings = json.loads(report.read_text())
    return {finding["id"]: (finding["severity"], finding["finding"]) for finding in findings}


@pytest.mark.parametrize(("tls", "key_type"), [("starttls", "RSA-2048"), ("smtps", "ECDSA-P256")])
def test_testssl_finds_nothing(start, home, authority, tmp_path, tls, key_type):
    made = Certificate(NAME, key_type, issuer=authority)
    home.certificate(made.key_pem + made.chain)
    service = start(environ={"SMTPS": "1"} if tls == "smtps" else {})
    options = ["--starttls", "smtp", *ALL_CHECKS] if tls == "starttls" else CHECKS
    found = scan(service, tmp_path / "report.json", *options)
    found.pop(OF_THE_SCANNER, None)
    assert {name: text for name, text in found.items() if text[0] not in HARMLESS} == {}
    assert [found[name][1] for name in NOT_OFFERED] == ["not offered"] * len(NOT_OFFERED)
    offered = [found[f"cipherlist_{name}"][1] for name in NO_CIPHERS]
    average, strong = (
        found.get(f"cipherlist_{older}") or found[f"cipherlist_{newer}"]
        for older, newer in RENAMED.items()
    )
    assert average[1] == "not offered"
    assert offered == ["not offered"] * len(NO_CIPHERS)
    assert (found["TLS1_2"][1], found["TLS1_3"][1]) == ("offered", "offered with final")
    assert strong == ("OK", "offered")
    assert "not vulnerable" in found["secure_client_renego"][1]
    assert "not vulnerable" in found["CRIME_TLS"][1]


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_versions_below_1_2(start, version):
    """Both sides allow every cipher that they have: it is the version that the server refuses."""
    service = start(environ={"TLSCIPHERS": EVERYTHING})
    said, cipher = handshake(service, version, "-cipher", EVERYTHING)
    assert (cipher, "alert protocol version" in said) == (None, True)
    tls = service.event("tls")
    assert (tls["result"], tls["why"]) == ("failed", "unsupported protocol")


@pytest.mark.parametrize(("key_type", "kind"), [("RSA-2048", "RSA"), ("ECDSA-P256", "ECDSA")])
def test_ciphers_of_tls_1_2(start, home, authority, key_type, kind):
    """Of all ciphers a client leaves out the one that was chosen, until none is left to choose."""
    made = Certificate(NAME, key_type, issuer=authority)
    home.certificate(made.key_pem + made.chain)
    service = start()
    chosen, offered = [], EVERYTHING
    while cipher := handshake(service, "-tls1_2", "-cipher", offered)[1]:
        assert cipher not in chosen
        chosen.append(cipher)
        offered = "".join(f"!{cipher}:" for cipher in chosen) + offered
    assert sorted(chosen) == sorted(f"ECDHE-{kind}-{cipher}" for cipher in PREFERRED)
    assert service.events("tls", sessions=len(chosen) + 1)[-1]["why"] == "no shared cipher"


def test_dhe_where_there_are_parameters_for_it(start, home, authority):
    made = Certificate(NAME, "RSA-2048", issuer=authority)
    home.certificate(made.key_pem + made.chain)
    name = "DHE-RSA-AES256-GCM-SHA384"
    assert handshake(start(), "-tls1_2", "-cipher", name)[1] is None
    (program,) = need("openssl")
    group = ["-algorithm", "DH", "-pkeyopt", "group:ffdhe2048"]
    home.control("dh2048.pem", subprocess.check_output([program, "genpkey", "-genparam", *group]))
    assert handshake(start(), "-tls1_2", "-cipher", name)[1] == name


@pytest.mark.parametrize("how", ["variable", "control file"])
def test_ciphers_that_the_administrator_chose(start, home, how):
    if how == "control file":
        home.control("tlsserverciphers", "ECDHE+CHACHA20")
    service = start(environ={"TLSCIPHERS": "ECDHE+CHACHA20"} if how == "variable" else {})
    assert handshake(service, "-tls1_2")[1] == "ECDHE-ECDSA-CHACHA20-POLY1305"
    assert handshake(service, "-tls1_2", "-cipher", "ECDHE+AESGCM")[1] is None


def test_renegotiation(start):
    """TLS 1.2: the client is told that there is none, and is not left waiting."""
    service = start()
    with s_client(service, "-tls1_2") as client:
        client.reply()
        assert client.say(f"EHLO {HELO}").startswith("250-")
        client.type("R")
        client.wait_for(b"RENEGOTIATING")
        assert b":no renegotiation:" in client.end()
    assert service.event("tls")["result"] == "ok"


def test_new_keys(start):
    """TLS 1.3 has new keys instead (RFC 8446 section 4.6.3), and the session goes on."""
    service = start()
    with s_client(service, "-tls1_3") as client:
        client.reply()
        client.type("K")
        client.wait_for(b"KEYUPDATE")
        assert client.say(f"EHLO {HELO}").startswith("250-")


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_no_compression(start, version):
    assert "Compression: NONE" in handshake(start(), version, "-comp")[0]


def test_no_session_to_resume_in_tls_1_2(start, tmp_path):
    session = tmp_path / "session"
    said, cipher = handshake(start(), "-tls1_2", "-sess_out", session)
    assert cipher
    assert re.search(r"^ *Session-ID: $", said, re.MULTILINE)
    assert not session.exists()


def test_no_session_to_resume_in_tls_1_3(start, tmp_path):
    service = start()
    session = tmp_path / "session"
    said, cipher = handshake(service, "-tls1_3", "-sess_out", session)
    assert cipher
    assert "\nReused, " not in said
    assert not session.exists(), "it was given no ticket at all"
