"""Limits through the program: where they are set, what the client and the log are told.

What counts, and what does not, is in test_core_conduct.
"""

from __future__ import annotations

import sys
import time

import pytest
from conformance import logs
from conformance.client import Client
from conformance.program import ROOT, Program
from conformance.stage import Stage
from conformance.world import base64
from listener.listening import Listening

pytest_plugins = ["listener.fixtures"]

WRONG = b"AUTH PLAIN " + base64(b"\0eve\0wrong")
ENVELOPE = [b"MAIL FROM:<a@client.example.com>", b"RCPT TO:<user@example.org>", b"DATA"]
GREETING = "220 mx.example.org ESMTP"
CLIENT = {"ip": "192.0.2.25"}

# The program, which looks at a client's pace over timeoutsmtpd, be that ever so short.
HURRIED = [
    *(sys.executable, "-I", "-c"),
    f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from qmail_smtpd_py import smtpd
smtpd.SHORTEST_WINDOW = 0
sys.exit(smtpd.main())
""",
]


def greeted(program: Program) -> Client:
    assert program.client.reply() == GREETING
    return program.client


def limit_lines(program: Program) -> list[dict[str, str]]:
    """The fields of the log's lines on limits, once the program has ended."""
    program.wait()
    return [line.fields for line in logs.read_all(program.log) if line.event == "limit"]


def ended(program: Program, why: str) -> None:
    """The program ended the session, and the log has one line that says why."""
    assert program.client.read_to_end() == b""
    assert program.wait() == 1
    assert limit_lines(program) == [{**CLIENT, "code": "421", "why": why}]
    assert logs.read_all(program.log)[-1].fields == {**CLIENT, "why": "closed"}


# Counts


def test_failed_auth(host: Stage) -> None:
    host.plan("checkpassword", {"exit": 1})
    host.control({"maxauthfailures": "7\n"})
    host.environment({"MAXAUTHFAILURES": "1"})
    with Program(host) as program:
        client = greeted(program)
        assert client.command(WRONG) == "535 authentication failed (#5.7.1)"
        assert client.reply() == "421 too many failed auth attempts, goodbye (#4.7.0)"
        ended(program, "too many failed auth attempts, goodbye (#4.7.0)")
    assert len(host.checks()) == 1


def test_bad_commands(host: Stage) -> None:
    with Program(host) as program:
        client = greeted(program)
        said = [client.command(b"XYZZY") for _ in range(20)]
        assert said == ["502 unimplemented (#5.5.1)"] * 20
        assert client.reply() == "421 too many bad commands, goodbye (#4.5.0)"
        ended(program, "too many bad commands, goodbye (#4.5.0)")


@pytest.mark.parametrize(
    ("control", "variable", "most"),
    [("2\n", None, 2), ("7\n", "3", 3), ("2\n", "0", None), ("2\n", "", 2), (None, None, 20)],
)
def test_where_a_limit_is_set(
    host: Stage, control: str | None, variable: str | None, most: int | None
) -> None:
    if control:
        host.control({"maxbadcommands": control})
    if variable is not None:
        host.environment({"MAXBADCOMMANDS": variable})
    with Program(host) as program:
        client = greeted(program)
        client.send(b"XYZZY\r\n" * 30 + b"QUIT\r\n")
        assert client.read_to_end().count(b"502 ") == (most or 30)
        assert program.wait() == (1 if most else 0)


def test_recipients(host: Stage) -> None:
    host.control({"maxrcpt": "2\n"})
    with Program(host) as program:
        client = greeted(program)
        assert client.command(ENVELOPE[0]) == "250 ok"
        assert [client.command(ENVELOPE[1]) for _ in range(3)] == [
            *("250 ok", "250 ok", "452 too many recipients (#4.5.3)")
        ]
        assert client.command(b"DATA") == "354 go ahead"
        assert (client.command(b".") or "").startswith("250 ok ")
    (delivery,) = host.deliveries()
    assert delivery.read[1].count(b"Tuser@example.org\0") == 2


def test_bad_recipients(host: Stage) -> None:
    host.environment({"BRTLIMIT": "2"})
    with Program(host) as program:
        client = greeted(program)
        client.command(ENVELOPE[0])
        assert (client.command(b"RCPT TO:<a@elsewhere.example>") or "").startswith("553 ")
        assert (client.command(b"RCPT TO:<b@elsewhere.example>") or "").startswith("553 ")
        assert client.reply() == "421 too many invalid addresses, goodbye (#4.3.0)"
        ended(program, "too many invalid addresses, goodbye (#4.3.0)")


@pytest.mark.parametrize("name", ["maxbadcommands", "timeoutsession", "minrate", "brtlimit"])
def test_a_limit_that_can_not_be_read_is_an_error(host: Stage, name: str) -> None:
    host.control({name: "@loop"})
    with Program(host) as program:
        assert program.client.read_to_end() == b"421 unable to read controls (#4.3.0)\r\n"
        program.wait()
    assert f"cannot read control/{name}: " in logs.read_all(program.log)[0].fields["why"]


# Other protocols


@pytest.mark.parametrize(
    ("opening", "protocol"),
    [(b"GET / HTTP/1.0\r\n\r\n", "HTTP"), (b"\x16\x03\x01\x02\x00", "TLS"), (b"SSH-2.0-x", "SSH")],
)
def test_other_protocols(host: Stage, opening: bytes, protocol: str) -> None:
    with Program(host) as program:
        client = greeted(program)
        client.send(opening)
        assert client.reply() == "421 this is SMTP, goodbye (#4.5.0)"
        ended(program, f"not SMTP: {protocol}")


@pytest.mark.tls
def test_http_inside_of_tls(host: Stage) -> None:
    host.environment({"SMTPS": "1"})
    with Program(host) as program:
        client = program.client
        assert client.start_tls() == "ok"
        assert client.reply() == GREETING
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert client.reply() == "421 this is SMTP, goodbye (#4.5.0)"
        ended(program, "not SMTP: HTTP")


# Time


def begin_message(client: Client) -> None:
    assert [client.command(line) for line in ENVELOPE] == ["250 ok", "250 ok", "354 go ahead"]


def nothing_was_queued(host: Stage) -> None:
    (delivery,) = host.deliveries()
    assert delivery.read[1] == b""


def test_a_session_has_an_end(host: Stage) -> None:
    """However busy the client is, and in the middle of a message."""
    host.environment({"TIMEOUTSESSION": "1"})
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        begin = time.monotonic()
        while b"\r\n" not in client.received and not client.ended:
            client.push(b"Subject: again\r\n")
            client._take(time.monotonic() + 0.05)
        assert client.reply() == "421 session too long, goodbye (#4.4.2)"
        assert 0.5 < time.monotonic() - begin < 10
        ended(program, "session too long, goodbye (#4.4.2)")
    nothing_was_queued(host)


def test_a_silent_session_has_an_end(host: Stage) -> None:
    host.environment({"TIMEOUTSESSION": "1"})
    with Program(host) as program:
        client = greeted(program)
        assert client.reply() == "421 session too long, goodbye (#4.4.2)"
        ended(program, "session too long, goodbye (#4.4.2)")


def test_slow_is_not_too_slow_where_the_timeout_is_short(host: Stage) -> None:
    """As in the C program each read has its own time."""
    host.control({"timeoutsmtpd": "3\n"})
    with Program(host) as program:
        client = greeted(program)
        for octet in b"NOOP":
            client.push(bytes([octet]))
            client._take(time.monotonic() + 1.2)
        assert client.command(b"") == "250 ok"
        assert client.command(b"QUIT") == "221 mx.example.org"


@pytest.mark.parametrize("is_message", [False, True])
def test_a_client_that_trickles(host: Stage, is_message: bool) -> None:
    host.control({"timeoutsmtpd": "1\n", "minrate": "1000\n"})
    with Program(host, command=HURRIED) as program:
        client = greeted(program)
        if is_message:
            begin_message(client)
        while b"\r\n" not in client.received and not client.ended:
            client.push(b"x")
            client._take(time.monotonic() + 0.1)
        assert client.reply() == "421 too slow, goodbye (#4.4.2)"
        ended(program, "too slow, goodbye (#4.4.2)")
    if is_message:
        nothing_was_queued(host)


def test_who_is_too_slow_gets_the_replies_to_what_was_whole(host: Stage) -> None:
    """Each piece ends a command and begins another; so does the one that was too late."""
    host.control({"timeoutsmtpd": "2\n", "minrate": "1000\n"})
    with Program(host, command=HURRIED) as program:
        client = greeted(program)
        client.send(b"NOO")
        while not client.received:
            client._take(time.monotonic() + 0.25)
            client.send(b"P\r\nNOO")
            assert client.reply() == "250 ok"
        assert client.reply() == "421 too slow, goodbye (#4.4.2)"
        ended(program, "too slow, goodbye (#4.4.2)")


def test_who_comes_to_an_end_was_not_too_slow(host: Stage) -> None:
    """The last octets may be as late as any, and what is typed in a hurry need not be long."""
    host.control({"timeoutsmtpd": "2\n", "minrate": "1000\n"})
    with Program(host, command=HURRIED) as program:
        client = greeted(program)
        begin_message(client)
        for piece in (b"Subject: x\r\n", b"\r\n.\r\n"):
            client._take(time.monotonic() + 1.2)
            client.send(piece)
        assert (client.reply() or "").startswith("250 ok ")
        assert client.command(b"QUIT") == "221 mx.example.org"
        assert limit_lines(program) == []


def test_silence_is_still_a_timeout(host: Stage) -> None:
    host.control({"timeoutsmtpd": "1\n", "minrate": "1000\n"})
    with Program(host) as program:
        client = greeted(program)
        client.send(b"NOO")
        assert client.reply() == "451 timeout (#4.4.2)"
        assert limit_lines(program) == []


def test_a_client_may_think_between_commands(host: Stage) -> None:
    host.control({"timeoutsmtpd": "2\n", "minrate": "1000\n"})
    with Program(host) as program:
        client = greeted(program)
        for _ in range(4):
            client._take(time.monotonic() + 0.75)
            assert client.command(b"NOOP") == "250 ok"
        assert client.command(b"QUIT") == "221 mx.example.org"
        assert limit_lines(program) == []


# The greeting


def test_a_client_that_waits_is_greeted_late(host: Stage) -> None:
    host.environment({"SMTPD_GREETDELAY": "1", "DROP_PRE_GREET": "1"})
    begin = time.monotonic()
    with Program(host) as program:
        client = greeted(program)
        assert time.monotonic() - begin >= 1
        assert client.command(b"QUIT") == "221 mx.example.org"
        assert limit_lines(program) == []


def test_an_early_talker_is_turned_away(host: Stage) -> None:
    host.control({"greetdelay": "20\n", "droppregreet": "1\n"})
    begin = time.monotonic()
    with Program(host) as program:
        program.client.send(b"EHLO x\r\nMAIL FROM:<a@client.example.com>\r\n")
        assert program.client.read_to_end() == b"554 SMTP protocol violation\r\n"
        assert program.wait() == 1
    assert time.monotonic() - begin < 10
    assert limit_lines(program) == [{**CLIENT, "code": "554", "why": "spoke before the greeting"}]


def test_an_early_talker_is_heard_later(host: Stage) -> None:
    """Where it is not turned away; without a limit's code, as nothing was refused."""
    host.environment({"SMTPD_GREETDELAY": "1"})
    begin = time.monotonic()
    with Program(host) as program:
        program.client.send(b"HELO x\r\nQUIT\r\n")
        replies = f"{GREETING}\r\n250 mx.example.org\r\n221 mx.example.org\r\n"
        assert program.client.read_to_end() == replies.encode()
        assert time.monotonic() - begin >= 1
        assert program.wait() == 0
    assert limit_lines(program) == [{**CLIENT, "why": "spoke before the greeting"}]


def test_who_may_relay_does_not_wait(host: Stage) -> None:
    host.environment({"SMTPD_GREETDELAY": "60", "DROP_PRE_GREET": "1", "RELAYCLIENT": ""})
    with Program(host) as program:
        program.client.send(b"QUIT\r\n")
        assert program.client.read_to_end() == f"{GREETING}\r\n221 mx.example.org\r\n".encode()
        assert program.wait() == 0


def test_a_client_that_goes_away_before_it_is_greeted(host: Stage) -> None:
    host.environment({"SMTPD_GREETDELAY": "60"})
    with Program(host) as program:
        program.client.close()
        assert program.wait() == 1
    assert logs.read_all(program.log)[-1].fields == {**CLIENT, "why": "hung up"}


@pytest.mark.tls
@pytest.mark.parametrize("is_early", [False, True])
def test_with_smtps_it_is_inside_of_tls_that_the_client_has_to_wait(
    host: Stage, is_early: bool
) -> None:
    host.environment({"SMTPS": "1", "SMTPD_GREETDELAY": "1", "DROP_PRE_GREET": "1"})
    with Program(host) as program:
        client = program.client
        assert client.start_tls() == "ok"
        if is_early:
            client.send(b"EHLO x\r\n")
        assert client.reply() == ("554 SMTP protocol violation" if is_early else GREETING)


@pytest.mark.parametrize("is_early", [False, True])
def test_a_proxy_is_not_early(mx: Stage, is_early: bool) -> None:
    """Its header is read before; what comes behind it is the client's."""
    mx.environment({"SMTPD_GREETDELAY": "1", "DROP_PRE_GREET": "1"})
    with Listening(mx, "--proxy-from=127.0.0.1") as listener:
        client = listener.connect()
        header = b"PROXY TCP4 192.0.2.25 198.51.100.1 4711 25\r\n"
        client.send(header + (b"EHLO x\r\n" if is_early else b""))
        assert client.reply() == ("554 SMTP protocol violation" if is_early else GREETING)
