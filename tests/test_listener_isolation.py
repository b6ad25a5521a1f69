"""Nothing of a connection is seen by the next one that the same worker serves."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.program import ROOT
from conformance.stage import Stage
from conformance.transport import SocketConnection
from listener.listening import PATIENCE, Listening, eventually, octet_environment
from listener.mail import (
    ENVELOPE,
    PLAIN,
    authenticate,
    begin_message,
    quit_,
    send_message,
    start_tls,
)
from listener.peers import compile_rules
from listener.world import address

pytest_plugins = ["listener.fixtures"]

LEFT = {
    "a greeting": [b"EHLO left-behind.example"],
    "a sender": [b"EHLO left-behind.example", *ENVELOPE[:1]],
    "an envelope": ENVELOPE[:2],
    "half a command": [b"MAIL FROM:<a@client.example.com>", b"RCPT TO:<user@exam"],
    "half a message": [*ENVELOPE, b"Subject: left behind"],
    "half of AUTH": [b"AUTH LOGIN"],
    "a user's name": [b"AUTH LOGIN", b"am9l"],
}
"""What a client says before it hangs up; the last line has no end."""


def fresh(client: Client) -> None:
    """See that a client stands at the very beginning."""
    assert client.command(b"RCPT TO:<user@example.org>") == "503 MAIL first (#5.5.1)"
    assert client.command(b"DATA") == "503 MAIL first (#5.5.1)"
    assert "STARTTLS" in (client.command(b"EHLO client.example.com") or "")
    assert client.command(ENVELOPE[0]) == "250 ok"
    relayed = client.command(b"RCPT TO:<u@elsewhere.example>") or ""
    assert relayed.startswith("553 sorry, that domain isn't in my list of allowed rcpthosts")
    assert client.command(b"RSET") == "250 flushed"


@pytest.mark.parametrize("broken", [b"no TLS at all\r\n", b"\x17\x03\x03\x00\x20" + bytes(32)])
def test_a_client_that_breaks_tls(mx: Stage, broken: bytes) -> None:
    """Behind a command, in one piece: that is the end of its session alone."""
    with Listening(mx, "-c", "1") as listener:
        first = listener.greeted()
        start_tls(first)
        first.connection.write(first.encrypt(b"NOOP\r\n") + broken)
        first.read_to_end()
        [(worker, status)] = listener.ends()
        assert status == 1
        listener.log.wait_for(r' disconnect ip=\S+ why="TLS: ')
        quit_(listener.greeted())
        assert listener.ends() == [(worker, 0)]
        assert "warning" not in listener.log.text()


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_what_a_client_leaves_behind(mx: Stage, left: list[bytes], tls: bool) -> None:
    with Listening(mx, "-c", "1") as listener:
        first = listener.greeted()
        if tls:
            start_tls(first)
        *whole, half = left
        for line in whole:
            first.command(line)
        first.send(half)
        first.settle()
        first.connection.close()
        second = listener.greeted()
        fresh(second)
        send_message(second)
        quit_(second)
        workers = {worker for worker, _ in listener.ends(2)}
    assert len(workers) == 1
    message = mx.deliveries()[-1]
    assert b"left" not in message.read[0]
    assert message.read[1] == b"Fa@client.example.com\0Tuser@example.org\0\0"


def test_who_a_client_was(mx: Stage) -> None:
    """Authenticated, and under TLS; then somebody else."""
    with Listening(mx, "-c", "1") as listener:
        first = listener.greeted()
        start_tls(first)
        authenticate(first)
        assert first.command(b"MAIL FROM:<a@client.example.com>") == "250 ok"
        assert first.command(b"RCPT TO:<u@elsewhere.example>") == "250 ok"
        assert first.command(b"RSET") == "250 flushed"
        send_message(first)
        quit_(first)
        second = listener.greeted()
        fresh(second)
        send_message(second)
        authenticate(second)
        quit_(second)
    theirs, ours = mx.deliveries()
    assert theirs.environ["TCPREMOTEINFO"] == "joe"
    assert "RELAYCLIENT" in theirs.environ
    assert theirs.environ["SMTPAUTHUSER"] == "joe"
    whose = {"TCPREMOTEINFO", "RELAYCLIENT", "SMTPAUTHUSER", "SMTP_AUTH_USER", "SMTPAUTHMETHOD"}
    assert not whose & ours.environ.keys()
    assert b"ESMTPSA" in theirs.read[0]
    assert b"with SMTP;" in ours.read[0] or b"with ESMTP;" in ours.read[0]
    assert theirs.descriptors.keys() == ours.descriptors.keys() == {0, 1, 2} | listing(ours)
    for check in mx.checks():
        assert not whose & check.environ.keys()
        assert check.descriptors.keys() == {0, 1, 2, 3} | listing(check)


def listing(record) -> set[int]:
    """The descriptor by which a stand-in looked for descriptors."""
    return {number for number, what in record.descriptors.items() if what.startswith("/proc/")}


def test_what_the_rules_said_of_a_client(mx: Stage, tmp_path: Path) -> None:
    friend, stranger = address(), address()
    home = tmp_path / "other"
    (home / "control").mkdir(parents=True)
    (home / "control" / "me").write_text("other.example.org\n")
    (home / "control" / "rcpthosts").write_text("example.net\n")
    queue = mx.env.pop("QMAILQUEUE")
    text = f"""\
{friend}:allow,RELAYCLIENT="",DATABYTES="100000",SMTPAUTH="-",ONLY="his",QMAILHOME="{home}"
:allow,QMAILQUEUE="{queue}"
"""
    rules = compile_rules(tmp_path / "rules.cdb", text)
    with Listening(mx, "-c", "1", "-x", str(rules)) as listener:
        for _ in range(2):
            first = listener.connect(friend)
            assert first.reply() == "220 other.example.org ESMTP"
            offers = first.command(b"EHLO x") or ""
            assert "SIZE 100000" in offers
            assert "AUTH" not in offers
            assert "STARTTLS" not in offers
            first.command(ENVELOPE[0])
            assert first.command(b"RCPT TO:<u@elsewhere.example>") == "250 ok"
            first.command(b"DATA")
            assert "unable to exec qq" in (first.command(b".") or "")  # he has no queue
            first.command(b"QUIT")
            second = listener.greeted(stranger)
            fresh(second)
            offers = second.command(b"EHLO x") or ""
            assert "AUTH" in offers
            assert "100000" not in offers
            send_message(second)
            quit_(second)
    for delivery in mx.deliveries():
        assert not {"ONLY", "DATABYTES", "RELAYCLIENT"} & delivery.environ.keys()
        assert delivery.environ["QMAILHOME"] == str(mx.home)


def test_a_session_that_was_cut_in_tls(mx: Stage) -> None:
    """Octets of a broken connection do not turn up in the next one."""
    with Listening(mx, "-c", "1") as listener:
        first = listener.greeted()
        start_tls(first)
        begin_message(first)
        first.connection.write(first.encrypt(b"Subject: half of a record")[:20])
        first.connection.close()
        second = listener.greeted()
        start_tls(second)
        send_message(second)
        quit_(second)
    assert b"half" not in mx.deliveries()[-1].read[0]


# Where names are looked for


def test_path_is_that_of_the_session(mx: Stage) -> None:
    """A rule may set where the check program is."""
    mx.arguments("checkpassword", "@true")
    sets = f'PATH="/nonexistent:{mx.home}/control/me:{mx.tools}:/usr/bin"'
    rules = compile_rules(mx.home / "rules.cdb", f"{(user := address())}:allow,{sets}\n:allow\n")
    with Listening(mx, "-c", "1", "-x", str(rules)) as listener:
        for source, answer in ((user, "235 "), (None, "454 "), (user, "235 ")):
            client = listener.greeted(source)
            assert (client.command(PLAIN) or "").startswith(answer)
            quit_(client)


def test_a_relative_home_is_that_of_the_start(mx: Stage, tmp_path: Path) -> None:
    """Whatever the home of the client before was."""
    second = tmp_path / "second"
    shutil.copytree(mx.home, second)
    (second / "control/me").write_text("second.example.org\n")
    (user, other) = (address(), address())
    lines = f'{user}:allow,QMAILHOME="{second}"\n{other}:allow,QMAILHOME="second"\n:allow\n'
    rules = compile_rules(tmp_path / "rules.cdb", lines)
    mx.environment({"QMAILHOME": os.path.relpath(mx.home, tmp_path)})
    first, others = "220 mx.example.org ESMTP", "220 second.example.org ESMTP"
    with Listening(mx, "-c", "1", "-x", str(rules), cwd=tmp_path) as listener:
        for source, greeting in ((None, first), (user, others), (None, first), (other, others)):
            assert listener.connect(source).reply() == greeting
        listener.signal(signal.SIGHUP)
        eventually(lambda: listener.connect().reply() == first, "it is found again")


# Secrets

SERVE_AND_LOOK = """
import gc, os, sys

sys.path.insert(0, sys.argv[1])
from qmail_smtpd_py import process, smtpd, tls
from qmail_smtpd_py.controlcache import CachedControlFiles

gc.disable()  # as in a worker
resources = smtpd.Resources(CachedControlFiles(), tls.CachedContexts())
arguments = [os.fsencode(word) for word in sys.argv[3:]]
number = int(sys.argv[2])
wire = smtpd.Wire(number, number, smtpd.TIMEOUT)
smtpd.serve(wire, process.environment(), arguments, resources)
os.close(number)
secrets = sys.stdin.buffer.read().split()
for holder in gc.get_objects():
    if holder is not secrets:
        for held in gc.get_referents(holder):
            if isinstance(held, (bytes, bytearray)) and any(part in held for part in secrets):
                print(type(holder), holder)
"""

PASSWORD = b"zyxwv-98765"
WORDS = {
    "PLAIN": [b"AUTH PLAIN " + base64.b64encode(b"\0joe\0" + PASSWORD)],
    "LOGIN": [b"AUTH LOGIN", base64.b64encode(b"joe"), base64.b64encode(PASSWORD)],
}


@pytest.mark.tls
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("end", ["quit", "hung up", "refused"])
def test_no_object_of_the_process_has_the_password(
    mx: Stage, words: list[bytes], tls: bool, end: str
) -> None:
    """Once the session is over, whatever its end.

    What memory that was freed has in it is not looked at: nothing of the program does either.
    """
    if end == "refused":
        mx.plan("checkpassword", [{"exit": 111}])
    ours, theirs = socket.socketpair()
    with theirs, subprocess.Popen(
        [sys.executable, "-I", "-c", SERVE_AND_LOOK, ROOT, str(theirs.fileno()), *mx.args],
        env=octet_environment(mx),
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        theirs.close()
        client = Client(SocketConnection(ours))
        assert client.reply() == "220 mx.example.org ESMTP"
        if tls:
            start_tls(client)
        for line in words:
            reply = client.command(line) or ""
        assert reply.startswith("454 " if end == "refused" else "235 ")
        assert mx.checks()[0].read[3] == b"joe\0" + PASSWORD + b"\0"
        if end == "hung up":
            client.connection.close()
        else:
            quit_(client)
        said, log = process.communicate(b"%s %s" % (PASSWORD, words[-1][-16:]), PATIENCE)
    assert process.returncode == 0, log
    assert said == b""
