"""What is set up wrongly: a client is told what it may know, the log says what is to be done.

All of it is seen as the mail user sees it, who may not read what root may.
"""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from e2e.certificates import Certificate
from e2e.clients import netcat, swaks, swaks_auth
from e2e.letter import HELO, PASSWORD, RECIPIENT, USER
from e2e.maildir import deliveries
from e2e.programs import mail_user
from e2e.service import NAME

pytest_plugins = ["e2e.fixtures"]

IN_CLEAR = {"SMTPAUTH": "", "FORCETLS": "0"}
WHO = f"(uid {mail_user().pw_uid})"
DENIED = f"Permission denied {WHO}"
UNREADABLE = 0o000
CONTROLS = "421 unable to read controls (#4.3.0)"


def say(service, *lines):
    """The replies to the lines."""
    with netcat(service) as client:
        client.reply()
        replies = [client.say(line) for line in lines]
        client.say("QUIT")
    return replies


def errors(service):
    """The reasons of the error events."""
    return [event["why"] for event in service.events("error")]


# servercert.pem


def test_servercert_that_the_mail_user_can_not_read(start, home, server_certificate):
    home.control("servercert.pem", no_key(server_certificate, None, None), UNREADABLE)
    service = start()
    extensions, answer = say(service, f"EHLO {HELO}", "STARTTLS")
    assert "STARTTLS" not in extensions
    assert answer == "454 TLS missing certificate: Permission denied (#4.3.0)"
    why = f"cannot read control/servercert.pem: {DENIED}"
    assert f"STARTTLS not offered: {why}" in errors(service)


def test_message_in_clear_where_servercert_can_not_be_read(start, home):
    """It is no reason to refuse mail."""
    home.control("servercert.pem", "", UNREADABLE)
    assert swaks(start()).status == 0
    assert len(deliveries(home.maildir)) == 1


def test_smtps_without_a_servercert_that_can_be_read(start, home):
    home.control("servercert.pem", "", UNREADABLE)
    service = start(environ={"SMTPS": "1"})
    with netcat(service) as client:
        assert client.reply().startswith("454 TLS missing certificate")
        assert client.end() == b""
    (why,) = errors(service)
    assert "control/servercert.pem" in why
    assert DENIED in why
    assert service.event("disconnect")["why"] == "no TLS"


def encrypted_key(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))


def wrong_key(made, other, issuer):
    return other.key_pem + made.chain


def wrong_order(made, other, issuer):
    return made.key_pem + issuer.pem + made.pem


def no_key(made, other, issuer):
    return made.chain


def no_certificate(made, other, issuer):
    return made.key_pem


def key_with_passphrase(made, other, issuer):
    return encrypted_key(made.key) + made.chain


def garbled(made, other, issuer):
    return (made.key_pem + made.chain).replace(b"\nM", b"\n!")


def nothing(made, other, issuer):
    return b""


MISMATCH = "key values mismatch; the key is that of"


@pytest.mark.parametrize(
    ("text", "what", "cause"),
    [
        (wrong_key, "no valid private key", f"{MISMATCH} no certificate in it"),
        (wrong_order, "no valid private key", f"{MISMATCH} certificate 2 in it, which has to be"),
        (no_key, "no valid private key", "no private key in it; append the key"),
        (no_certificate, "missing certificate", "no certificate in it"),
        (key_with_passphrase, "no valid private key", "the private key has a passphrase"),
        (garbled, "missing certificate", "bad base64 decode"),
        (nothing, "missing certificate", "no certificate in it"),
    ],
)
def test_servercert_that_is_wrong(start, home, authority, server_certificate, text, what, cause):
    """454, before any handshake; the session goes on, and a message in clear is taken."""
    other = Certificate(NAME, issuer=authority)
    home.control("servercert.pem", text(server_certificate, other, authority), 0o640)
    service = start()
    ended = swaks(service, "--tls-optional", "--quit-after", "RCPT")
    assert f"<** 454 TLS {what}: " in ended.output
    assert f" -> RCPT TO:<{RECIPIENT}>\n<-  250 ok" in ended.output
    (why,) = errors(service)
    assert why.startswith(f"TLS not available: control/servercert.pem: {cause}")


def test_servercert_that_is_not_there(start, home):
    (home.path / "control" / "servercert.pem").unlink()
    service = start()
    extensions, answer = say(service, f"EHLO {HELO}", "STARTTLS")
    assert "STARTTLS" not in extensions
    assert answer == "454 TLS missing certificate: No such file or directory (#4.3.0)"
    (why,) = errors(service)
    assert "control/servercert.pem: No such file or directory" in why


# The check program


def broken(home, name, text, mode):
    path = home.program(name, "")
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("text", "mode", "cause"),
    [
        (None, 0, f"No such file or directory {WHO}"),
        ("#!/bin/sh\nexit 0\n", 0o644, DENIED),
        ("exit 0\n", 0o755, f"Exec format error {WHO}"),
        ("#!/nonexistent/interpreter\n", 0o755, f"No such file or directory {WHO}"),
    ],
)
def test_check_program_that_can_not_be_started(start, home, text, mode, cause):
    program = home.path / "bin" / "check"
    if text:
        broken(home, "check", text, mode)
    service = start(environ=IN_CLEAR, check=program)
    ended = swaks(service, *swaks_auth("PLAIN", USER, PASSWORD))
    assert "<** 454 oops, child won't start and I can't auth (#4.3.0)" in ended.output
    assert errors(service) == [f"cannot start check program {program}: {cause}"]
    assert service.event("auth")["code"] == "454"


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("exit 111", "check program has temporary trouble: exit status 111"),
        ("kill -SEGV $$", "check program ended by signal 11"),
    ],
)
def test_check_program_in_trouble(start, home, script, cause):
    """Nobody is told that a password is wrong that was not looked at."""
    service = start(environ=IN_CLEAR, check=home.program("check", script))
    ended = swaks(service, *swaks_auth("PLAIN", USER, PASSWORD))
    assert "<** 454 oops, problem with child and I can't auth (#4.3.0)" in ended.output
    assert errors(service) == [cause]


def test_users_file_that_the_mail_user_can_not_read(start, home, users_file, check):
    home.control("smtpusers", users_file, UNREADABLE)
    service = start(environ=IN_CLEAR, check=check)
    ended = swaks(service, *swaks_auth("PLAIN", USER, PASSWORD))
    assert "<** 454 oops, problem with child" in ended.output
    service.log.wait_for(r"^checkpassword-users.*control/smtpusers")
    assert PASSWORD not in service.log.text()


def test_no_check_program_at_all(start):
    service = start(environ=IN_CLEAR)
    ended = swaks(service, *swaks_auth("PLAIN", USER, PASSWORD))
    assert ended.status != 0
    assert "235" not in ended.output


# qmail-queue


@pytest.mark.parametrize(
    ("text", "mode", "cause"),
    [
        (None, 0, f"No such file or directory {WHO}"),
        ("#!/bin/sh\nexit 0\n", 0o644, DENIED),
    ],
)
def test_queue_that_can_not_be_started(start, home, text, mode, cause):
    home.use_queue(home.path / "bin" / "queue")
    if text:
        broken(home, "queue", text, mode)
    service = start()
    assert "<** 451 unable to exec qq (#4.3.0)" in swaks(service).output
    assert errors(service) == [f"cannot start bin/qmail-queue: {cause}"]
    mail = service.event("mail")
    assert (mail["result"], mail["code"], mail["qp"]) == ("refused", "451", "0")


@pytest.mark.parametrize(
    ("script", "reply"),
    [
        ("exit 31", "554 mail server permanently rejected message (#5.3.0)"),
        ("exit 53", "451 qq write error or disk full (#4.3.0)"),
        ("kill -SEGV $$", "451 qq crashed (#4.3.0)"),
        ("exit 0", "451 qq read error (#4.3.0)"),
    ],
)
def test_queue_that_does_not_take_the_message(start, home, tmp_path, script, reply):
    """The last one says yes to a message that it did not read, and is not believed."""
    home.use_queue(home.program("queue", script))
    service = start()
    body = tmp_path / "body"
    body.write_text("x" * 70 + "\n" + 4000 * ("y" * 70 + "\n"))
    ended = swaks(service, "--body", f"@{body}", "--suppress-data")
    assert f"<** {reply}" in ended.output
    assert service.event("mail")["code"] == reply[:3]


def test_queue_with_a_maildir_that_it_may_not_write(start, home):
    home.maildir.chmod(0o500)
    service = start()
    ended = swaks(service)
    assert "<** 451 qq trouble creating files in queue (#4.3.0)" in ended.output
    service.log.wait_for(r"^qmail-queue-maildir.*Maildir.*Permission denied.*uid \d+")


# Control files and the home


@pytest.mark.parametrize(
    "name",
    ["me", "smtpgreeting", "localiphost", "databytes", "timeoutsmtpd", "rcpthosts", "badmailfrom"],
)
def test_control_file_that_the_mail_user_can_not_read(start, home, name):
    """Going on without could mean an open relay."""
    home.control(name, "1", UNREADABLE)
    service = start()
    with netcat(service) as client:
        assert client.reply() == CONTROLS
        assert client.end() == b""
    assert errors(service) == [f"cannot read control/{name}: {DENIED}"]
    service.log.wait_for(r"tcpserver: end \d+ status 256")


@pytest.mark.parametrize("name", ["morercpthosts.cdb", "tlsclients"])
def test_control_file_that_is_needed_later_and_can_not_be_read(start, home, authority, name):
    """A recipient is not refused for good because of it."""
    home.control("clientca.pem", authority.pem)
    home.control(name, "1", UNREADABLE)
    service = start()
    ended = swaks(service, "--tls", "--to", "someone@elsewhere.example")
    assert CONTROLS in ended.output
    assert "553 sorry" not in ended.output
    assert errors(service) == [f"cannot read control/{name}: {DENIED}"]


@pytest.mark.parametrize("is_pipe", [False, True], ids=["unreadable", "a pipe"])
@pytest.mark.parametrize("name", ["clientca.pem", "clientcrl.pem", "dh2048.pem"])
def test_pem_file_that_can_not_be_read(start, home, authority, name, is_pipe):
    """TLS goes on as well as it can, and OpenSSL does not tell why it can not read the file."""
    home.control("clientca.pem", authority.pem)
    home.control("tlsclients", "alice@example.org")
    if is_pipe:
        (home.path / "control" / name).unlink(missing_ok=True)
        os.mkfifo(home.path / "control" / name)
        (home.path / "control" / name).chmod(0o644)
    else:
        home.control(name, "", UNREADABLE)
    service = start()
    assert "221 " in swaks(service, "--tls", "--quit-after", "EHLO").output
    consequence = "; no client certificate counts" if name == "clientcrl.pem" else ""
    why = f"not a file {WHO}" if is_pipe else DENIED
    assert errors(service) == [f"control/{name}: {why}{consequence}"]


def test_home_that_is_not_there(start, home):
    missing = home.path / "missing"
    service = start(environ={"QMAILHOME": str(missing)})
    with netcat(service) as client:
        assert client.reply() == CONTROLS
    why = f"cannot change to {missing}: No such file or directory {WHO}"
    assert errors(service) == [why]


def test_home_that_the_mail_user_may_not_enter(start, home):
    closed = home.path / "closed"
    closed.mkdir(mode=UNREADABLE)
    service = start(environ={"QMAILHOME": str(closed)})
    with netcat(service) as client:
        assert client.reply() == CONTROLS
    assert errors(service) == [f"cannot change to {closed}: {DENIED}"]


def test_home_without_configuration(start, home):
    (home.path / "control" / "me").unlink()
    service = start()
    with netcat(service) as client:
        assert client.reply() == CONTROLS
    assert errors(service) == ["neither control/me nor control/smtpgreeting is there"]


# softlimit


def test_too_little_memory_for_tls(start):
    """Enough for mail in clear, though: the message is taken."""
    service = start(memory=24_000_000)
    ended = swaks(service, "--tls-optional")
    assert ended.status == 0, ended.output
    assert "<** 454 TLS not available (#4.3.0)" in ended.output
    (why,) = errors(service)
    assert why.startswith("TLS not available: ")
    assert why.endswith("is the memory limit too low?")
    assert len(deliveries(service.home.maildir)) == 1


def test_too_little_memory_for_anything(start):
    """The interpreter itself, or what it loads, says so; the client is not answered wrongly."""
    service = start(memory=8_000_000)
    with netcat(service) as client:
        assert client.end() in (b"", b"421 out of memory (#4.3.0)\r\n")
    (ended,) = service.log.wait_for(r"tcpserver: end \d+ status ((?!0)\d+)")
    if int(ended[1]) >= 256:  # and not by a signal, before it could say anything
        service.log.wait_for(r"(?i)memory|shared libraries")


@pytest.mark.parametrize("memory", range(12_000_000, 48_000_000, 2_000_000))
def test_little_memory(start, memory):
    """However much there is: every reply is one, what was accepted was delivered, and where TLS
    could not be, the log says that it may be the limit.
    """
    service = start(memory=memory)
    ended = swaks(service, "--tls-optional", "--suppress-data", "--timeout", 10)
    replies = [line for line in ended.output.splitlines() if line.startswith("<")]
    assert all(line[4:7].isdigit() for line in replies), ended.output
    service.log.wait_for("tcpserver: end")
    assert len(deliveries(service.home.maildir)) == ended.output.count("250 ok 1")
    if replies and "TLS started" not in ended.output:
        service.log.wait_for("is the memory limit too low[?]")
