"""What a hostile client can do to the program, and what does not come of it.

Dialogues that a recorded case already pins are not here; what any octets do to the session itself
is in test_core_session.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import ssl
import time
from binascii import b2a_base64
from pathlib import Path

import pytest
from conformance import cases, grammar, logs
from conformance.client import Client
from conformance.program import Program
from conformance.stage import Stage
from conformance.transport import TRANSPORTS, Transport, tcp

MB = 1 << 20
ROOM = 8 * MB
"""Octets of memory by which the program may grow, whatever it is sent."""

ENVELOPE = [b"MAIL FROM:<a@client.example.com>", b"RCPT TO:<user@example.org>", b"DATA"]
LETTER = b"Subject: x\r\n\r\ntext\r\n.\r\n"
FOREIGN = b"RCPT TO:<victim@elsewhere.example>"


def base64(octets: bytes) -> bytes:
    return b2a_base64(octets, newline=False)


PLAIN = b"AUTH PLAIN " + base64(b"\0joe\0secret")


def greeted(program: Program, tls: bool = False, version: str | None = None) -> Client:
    """The client, greeted, and under TLS if wanted, of any version or a certain one."""
    client = program.client
    assert client.reply() == "220 mx.example.org ESMTP"
    if tls:
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.start_tls(min=version, max=version) == "ok"
    return client


def begin_message(client: Client) -> None:
    assert [client.command(line) for line in ENVELOPE] == ["250 ok", "250 ok", "354 go ahead"]


def send_message(client: Client, letter: bytes = LETTER) -> str | None:
    begin_message(client)
    client.send(letter)
    return client.reply()


def codes(client: Client, count: int) -> list[str]:
    return [(client.reply() or "none")[:3] for _ in range(count)]


# STARTTLS


@pytest.mark.tls
@pytest.mark.parametrize(
    "injected",
    [
        b"NOOP\r\n" * 600,
        b"QUIT\r\n",
        b"MAIL FROM:<inj",
        b"EHLO inj\r\nMAIL FROM:<inj@example.com>\r\nRCPT TO:<user@example.org>\r\nDATA\r\nx",
        b"AUTH PLAIN\r\n" + base64(b"\0joe\0secret") + b"\r\n",
    ],
)
def test_what_comes_with_starttls_is_not_heard(host: Stage, injected: bytes) -> None:
    with Program(host) as program:
        client = greeted(program)
        client.send(b"STARTTLS\r\n" + injected)
        assert client.reply() == "220 ready for tls"
        assert client.start_tls() == "ok"
        assert client.command(b"RCPT TO:<user@example.org>") == "503 MAIL first (#5.5.1)"
        assert client.command(PLAIN) == "235 ok, go ahead (#2.0.0)"
        assert client.received == b""


@pytest.mark.tls
@pytest.mark.parametrize(
    "junk",
    [
        b"NOOP\r\n",
        b"MAIL FROM:<a@example.com>\r\n" * 30,
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(200),
        b"\x16\x03\x01\xff\xff" + b"\xff" * 300,
        b"\x16\x03\x01\x00\x00" * 20,
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x17\x03\x03\x00\x05hello",
        b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(35),
    ],
)
@pytest.mark.parametrize("smtps", [False, True])
def test_what_is_no_handshake_ends_the_session(host: Stage, junk: bytes, smtps: bool) -> None:
    host.control({"timeoutsmtpd": "1\n"})
    if smtps:
        host.environment({"SMTPS": "1"})
    with Program(host) as program:
        client = program.client
        if not smtps:
            greeted(program)
            assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.start_tls(instead=junk.decode("latin-1")) == "fail"
        assert program.wait() == 1
    assert host.deliveries() == []
    events = [(line.event, line.fields.get("result")) for line in logs.read_all(program.log)]
    assert ("tls", "failed") in events


@pytest.mark.tls
@pytest.mark.parametrize("octets", [1, 5, 60, 200])
def test_a_handshake_that_stalls_ends_by_the_timeout(host: Stage, octets: int) -> None:
    host.control({"timeoutsmtpd": "1\n"})
    hello = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls = context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="mx.example.org")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    with Program(host) as program:
        client = greeted(program)
        assert client.command(b"STARTTLS") == "220 ready for tls"
        began = time.monotonic()
        assert client.start_tls(instead=hello.read()[:octets].decode("latin-1")) == "fail"
        assert time.monotonic() - began >= 0.9
        assert program.wait() == 1
    assert b"result=failed why=timeout" in program.log


@pytest.mark.tls
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_refused(host: Stage, version: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with Program(host) as program:
        client = greeted(program)
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.handshake(context) == "fail"
        assert program.wait() == 1
    assert b'tls ip=192.0.2.25 result=failed why="unsupported protocol"' in program.log


@pytest.mark.tls
def test_why_a_handshake_failed_is_told_though_the_client_is_gone(host: Stage) -> None:
    """Its end is a reset, so that the alert can not leave."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA:@SECLEVEL=0")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = context.wrap_bio(incoming, outgoing)
    with Program(host, tcp) as program:
        client = greeted(program)
        assert client.command(b"STARTTLS") == "220 ready for tls"
        with pytest.raises(ssl.SSLWantReadError):
            theirs.do_handshake()
        program.signal(signal.SIGSTOP)
        client.connection.write(outgoing.read())
        client.connection.reset()
        program.signal(signal.SIGCONT)
        assert program.wait() == 1
    assert b'result=failed why="no shared cipher"' in program.log


@pytest.mark.tls
@pytest.mark.parametrize("tail", [b"", b"\r\n", b"\r\n.", b"\r\n.\r"])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("notify", [True, False], ids=["close_notify", "cut"])
def test_tls_that_ends_inside_a_message_queues_nothing(
    host: Stage, tail: bytes, version: str, notify: bool
) -> None:
    with Program(host) as program:
        client = greeted(program, True, version)
        begin_message(client)
        client.send(b"Subject: cut\r\n\r\nhalf" + tail)
        if notify:
            client.close("write")
        else:
            client.settle()
            client.connection.end_writing()
        assert client.read_to_end() == b""
        assert program.wait() == 1
    assert [delivery.read[1] for delivery in host.deliveries()] == [b""]
    assert logs.read_all(program.log)[-1].fields["why"] == "hung up"


BROKEN = {
    "another protocol": b"GET / HTTP/1.0\r\n\r\n",
    "a record that does not verify": b"\x17\x03\x03\x00\x20" + bytes(32),
    "a record that is too long": b"\x17\x03\x03\xff\xff" + bytes(300),
    "an alert in clear": b"\x15\x03\x03\x00\x02\x02\x28",
}


@pytest.mark.tls
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", [b"NOOP\r\n", b"QUIT\r\n", b"MAIL FROM:<>\r\n" * 30])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_tls_that_breaks_behind_a_command(
    host: Stage, version: str, command: bytes, broken: bytes
) -> None:
    """In one piece: what was said before counts, and the answer to it can not be given."""
    with Program(host) as program:
        client = greeted(program, True, version)
        client.connection.write(client.encrypt(command) + broken)
        client.read_to_end()
        program.wait()
    *lines, last = logs.read_all(program.log)
    assert last.event == "disconnect"
    assert last.fields["why"] == "quit" or last.fields["why"].startswith("TLS: ")
    assert last.fields["why"] != "TLS: connection ended"
    assert "error" not in {line.event for line in lines}


@pytest.mark.tls
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_tls_that_breaks_behind_a_message_queues_nothing(
    host: Stage, version: str, broken: bytes
) -> None:
    """In one piece: the client can not be told that it was taken, and would send it again."""
    with Program(host) as program:
        client = greeted(program, True, version)
        begin_message(client)
        client.connection.write(client.encrypt(b"Subject: x\r\n\r\nx\r\n.\r\n") + broken)
        client.read_to_end()
        assert program.wait() == 1
    assert [delivery.read[1] for delivery in host.deliveries()] == [b""]


@pytest.mark.tls
def test_tls_over_tcp_does_not_wait_for_acknowledgements(host: Stage) -> None:
    """Without TCP_NODELAY each exchange could stall for 40 ms (tcp(7))."""
    ends = tcp()
    with socket.socket(fileno=os.dup(ends[1])) as theirs, Program(host, lambda: ends) as program:
        greeted(program)
        assert not theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert program.client.command(b"STARTTLS") == "220 ready for tls"
        assert program.client.start_tls() == "ok"
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# AUTH


@pytest.mark.parametrize("line", [b"AUTH PLAIN", b"AUTH LOGIN", b"AUTH CRAM-MD5", b"AUTH"])
def test_with_forcetls_no_check_program_is_started_in_clear(host: Stage, line: bytes) -> None:
    host.environment({"FORCETLS": "1"})
    with Program(host) as program:
        client = greeted(program)
        client.send(line + b"\r\n" + base64(b"joe") + b"\r\n" + PLAIN + b"\r\nQUIT\r\n")
        assert client.reply() == "538 auth not available without TLS (#5.3.3)"
        assert client.read_to_end() == b""
        assert program.wait() == 1
    assert host.checked_by() == []


@pytest.mark.tls
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("status", [0, 111])
def test_the_password_is_nowhere(host: Stage, tls: bool, status: int) -> None:
    secret = b"Tell-Nobody-9fQ2"
    forms = [secret, base64(secret), base64(b"\0joe\0" + secret), secret.hex().encode()]
    host.plan("checkpassword", {"exit": status})
    with Program(host) as program:
        client = greeted(program, tls)
        said = [client.command(b"AUTH LOGIN " + base64(b"joe")), client.command(base64(secret))]
        said += [client.command(b"AUTH PLAIN " + base64(b"\0joe\0" + secret)), send_message(client)]
        places = {
            "the replies": repr(said).encode(),
            "its memory as others see it": Path(f"/proc/{program.pid}/cmdline").read_bytes()
            + Path(f"/proc/{program.pid}/environ").read_bytes(),
        }
        assert client.command(b"QUIT") == "221 mx.example.org"
        program.wait()
    places["the log"] = program.log
    for record in [*host.deliveries(), *host.checks()]:
        places[f"arguments of {record.argv[0]}"] = repr(record.argv).encode()
        places[f"environment of {record.argv[0]}"] = repr(record.environ).encode()
    for delivery in host.deliveries():
        places["the message"] = delivery.read[0] + delivery.read[1]
    assert len(host.checks()) == 2 - (status == 0)
    for place, text in places.items():
        assert not any(form in text for form in forms), place


def test_guesses_are_slow_however_they_come(host: Stage) -> None:
    host.plan("checkpassword", {"exit": 1})
    with Program(host) as program:
        client = greeted(program)
        began = time.monotonic()
        client.send((PLAIN + b"\r\n") * 40)
        while len(host.checked_by()) < 2:
            time.sleep(0.02)
            assert time.monotonic() - began < 20
        assert time.monotonic() - began >= 4.8
        program.signal(9)


def test_replies_do_not_wait_for_a_guess_that_was_pipelined_behind_them(host: Stage) -> None:
    host.plan("checkpassword", {"exit": 1})
    with Program(host) as program:
        client = greeted(program)
        began = time.monotonic()
        client.send(b"NOOP\r\n" + PLAIN + b"\r\n")
        assert client.reply() == "250 ok"
        assert time.monotonic() - began < 4
        program.signal(9)


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
def test_what_was_pipelined_is_not_obeyed_for_a_client_that_is_gone(
    host: Stage, transport: Transport
) -> None:
    """Behind what takes time it is looked for."""
    host.plan("checkpassword", {"exit": 111})
    with Program(host, transport) as program:
        client = greeted(program)
        client.push((PLAIN + b"\r\n") * 19)
        client.close()
        assert program.wait() == 1
    assert len(host.checks()) == 1


def test_what_was_pipelined_is_obeyed_for_a_client_that_only_listens(host: Stage) -> None:
    host.plan("checkpassword", {"exit": 111})
    with Program(host, tcp) as program:
        client = greeted(program)
        client.push((PLAIN + b"\r\n") * 3 + b"QUIT\r\n")
        client.connection.end_writing()
        assert grammar.codes(client.read_to_end()) == [454, 454, 454, 221]
        assert program.wait() == 0


def test_challenges_are_random_and_never_the_same(host: Stage) -> None:
    seen = set()
    for _ in range(2):
        with Program(host) as program:
            client = greeted(program)
            for _ in range(50):
                seen.add(client.command(b"AUTH CRAM-MD5"))
                assert client.command(b"*") == "501 auth exchange canceled (#5.0.0)"
    assert len(seen) == 100
    assert all(len(challenge or "") > 60 for challenge in seen), "room for 16 random octets"


# Forged lines

ODD = [
    *(b"\0", b"\t", b"\r", b"\x0b", b"\x0c", b"\x1b[2J", b"\x7f"),
    *(b"\x80", b"\x85", b"\xff", b"\xe2\x80\xa8"),
]


def test_no_octet_of_a_client_forges_a_line_anywhere(host: Stage) -> None:
    with Program(host) as program:
        client = greeted(program)
        for odd in ODD:
            for line in (
                b"EHLO x%sX-Forged: yes" % odd,
                b"MAIL FROM:<a%sauth result=ok@example.com>" % odd,
                b'RCPT TO:<a%s"b"@elsewhere.example>' % odd,
                b"AUTH LOGIN " + base64(b"joe" + odd + b"\nqmail-smtpd[1]: auth result=ok"),
                base64(b"x\n"),
                b"RSET",
            ):
                client.command(line)
            assert (send_message(client) or "").startswith("250 ok ")
        assert client.command(b"QUIT") == "221 mx.example.org"
        program.wait()
    assert len(host.deliveries()) == len(ODD)
    for delivery in host.deliveries():
        head, _, _ = delivery.read[0].partition(b"Subject: x\n")
        assert re.fullmatch(rb"Received: from [!-~ ]+\n  by [!-~ ]+\n", head)
    for line in logs.read_all(program.log):
        assert line.pid == program.pid
        assert line.fields["ip"] == "192.0.2.25"


# Memory and time


@pytest.fixture
def sums(host: Stage) -> Path:
    """Where a qmail-queue leaves the sum of each message, without the Received field."""
    path = host.tools / "summing-queue"
    path.write_text(f"#!/bin/sh\ncd {host.tools}\nsed 1,2d | sha256sum >>sums\ncat <&1 >envelope\n")
    path.chmod(0o755)
    host.environment({"QMAILQUEUE": str(path)})
    return host.tools / "sums"


def sum_of(message: bytes) -> str:
    return f"{hashlib.sha256(message).hexdigest()}  -\n"


@pytest.mark.parametrize("before", [b"NOOP", b"AUTH LOGIN"], ids=["command", "auth"])
def test_a_line_without_end_needs_no_memory(host: Stage, before: bytes) -> None:
    with Program(host) as program:
        client = greeted(program)
        client.command(before)
        base = program.memory
        for _ in range(64):
            client.send(b"A" * MB)
        assert program.memory - base < ROOM
        assert (client.command(b"") or "").startswith("500 ")
        assert client.command(b"NOOP") == "250 ok"


@pytest.mark.tls
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize(
    "piece", [b"A" * MB, (b"0123456789" * 7 + b"\r\n") * (MB // 72)], ids=["one line", "lines"]
)
def test_a_large_message_passes_through(host: Stage, sums: Path, tls: bool, piece: bytes) -> None:
    with Program(host) as program:
        client = greeted(program, tls)
        begin_message(client)
        base, faults = program.memory, program.page_faults
        for _ in range(100):
            client.send(piece)
        client.send(b"\r\n.\r\n")
        assert codes(client, 1) == ["250"]
        assert program.memory - base < ROOM
        # Each chunk has 16 pages: they are not given back and had anew.
        assert program.page_faults - faults < 8000
    assert sums.read_text() == sum_of(piece.replace(b"\r\n", b"\n") * 100 + b"\n")


@pytest.mark.tls
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_30000_pipelined_commands_are_answered_in_order(host: Stage, tls: bool) -> None:
    with Program(host) as program:
        client = greeted(program, tls)
        for _ in range(30):
            client.send(b"NOOP\r\n" * 999 + b"VRFY x\r\n")
        client.send(b"QUIT\r\n")
        said = client.read_to_end()
    pattern = b"250 ok\r\n" * 999 + b"252 send some mail, i'll try my best\r\n"
    assert said == pattern * 30 + b"221 mx.example.org\r\n"


@pytest.mark.tls
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_a_client_that_never_reads_is_given_up(host: Stage, tls: bool) -> None:
    host.control({"timeoutsmtpd": "1\n"})
    with Program(host) as program:
        client = greeted(program, tls)
        base = peak = program.memory
        deadline = time.monotonic() + 20
        commands = [b"NOOP\r\n" * 2000]
        while program.is_running and time.monotonic() < deadline:
            if client.push(*commands):
                commands = []  # no more goes
            with contextlib.suppress(OSError, IndexError):  # it ends at just this moment
                peak = max(peak, program.memory)
            time.sleep(0.001)
        assert not program.is_running
        assert peak - base < ROOM
        assert program.wait() == 1
    assert b"disconnect ip=192.0.2.25 why=timeout" in program.log


@pytest.mark.tls
@pytest.mark.parametrize(
    "state", ["clear", "half a command", "message", "handshake", "tls", "half a record"]
)
def test_an_idle_session_uses_no_processor_time(host: Stage, state: str) -> None:
    with Program(host) as program:
        client = greeted(program, tls=state in ("tls", "half a record"))
        if state == "half a command":
            client.send(b"MAIL FRO")
        elif state == "message":
            begin_message(client)
            client.send(b"Subject: x\r\n\r\nx\r\n.\r")
        elif state == "handshake":
            client.send(b"STARTTLS\r\n")
            assert client.reply() == "220 ready for tls"
            client.connection.write(b"\x16\x03\x01\x01\x00\x01")
        elif state == "half a record":
            client.connection.write(client.encrypt(b"NOOP\r\n")[:9])
        client.settle()
        time.sleep(0.2)
        before = program.cpu
        time.sleep(0.5)
        assert program.cpu - before <= 0.02


# Anything at all

DIALOGUES = [
    b"".join(b"".join(step.writes) for step in case.steps)
    for case in cases.ALL
    if sum(len(piece) for step in case.steps for piece in step.writes) < 2000
]


@pytest.mark.parametrize("seed", range(30))
def test_noise_ends_in_replies_and_log_lines(host: Stage, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(b"".join(chance.choice(DIALOGUES) for _ in range(4)))
    for _ in range(20):
        at = chance.randrange(len(data))
        data[at : at + chance.randrange(3)] = (
            chance.randbytes(chance.randrange(4)) if seed % 3 else b""
        )
    octets = re.sub(rb"(?i)starttls|auth", b"NOOP", bytes(data))
    with Program(host) as program:
        program.client.send(octets)
        if not program.client.ended:
            program.client.connection.end_writing()
        grammar.replies(program.client.read_to_end())
        assert program.wait() in (0, 1)
    assert all(line.event != "error" for line in logs.read_all(program.log))
