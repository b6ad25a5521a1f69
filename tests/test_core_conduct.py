"""Conduct: what a client may do before the session ends, and that real clients never get there."""

from __future__ import annotations

import pytest
from conformance import cases, grammar
from conformance.world import all_replies, base64, open_session

from qmail_smtpd_py.conduct import MOST_REFUSALS, OPENINGS, Limits, Pace
from qmail_smtpd_py.reply import AUTH_TOO_OFTEN, AUTH_TROUBLE
from qmail_smtpd_py.session import CLOSED

BAD = b"AUTH PLAIN " + base64(b"\0eve\0wrong") + b"\r\n"
GOOD = b"AUTH PLAIN " + base64(b"\0joe\0right") + b"\r\n"
MAIL = b"MAIL FROM:<a@example.com>\r\n"


def last_line(world: object) -> bytes:
    return world.lines[-1].partition(b": ")[2]  # type: ignore[attr-defined]


# Counts


def test_the_third_failed_auth_is_told_and_then_it_ends() -> None:
    session, world = open_session()
    assert grammar.codes(all_replies(session, BAD + BAD)) == [535, 535]
    said = all_replies(session, BAD + GOOD + b"NOOP\r\n")
    assert grammar.replies(said) == [
        "535 authentication failed (#5.7.1)",
        "421 too many failed auth attempts, goodbye (#4.7.0)",
    ]
    assert session.state == CLOSED
    assert session.exit_status == 1
    assert last_line(world) == (
        b'limit code=421 why="too many failed auth attempts, goodbye (#4.7.0)"'
    )


def test_attempts_that_are_refused_for_those_before_count_too() -> None:
    session, world = open_session()
    world.authenticate = lambda *_: AUTH_TOO_OFTEN  # type: ignore[method-assign]
    assert grammar.codes(all_replies(session, BAD + GOOD)) == [454, 454]
    assert b"auth result=failed mechanism=PLAIN tls=no code=454" in world.lines[-1]
    assert grammar.codes(all_replies(session, GOOD)) == [454, 421]


def test_trouble_is_no_failed_attempt() -> None:
    session, world = open_session()
    world.authenticate = lambda *_: AUTH_TROUBLE  # type: ignore[method-assign]
    assert grammar.codes(all_replies(session, GOOD * 19)) == [454] * 19


def test_nor_can_check_programs_be_started_without_an_end() -> None:
    session, world = open_session()
    world.authenticate = lambda *_: AUTH_TROUBLE  # type: ignore[method-assign]
    assert grammar.codes(all_replies(session, GOOD * 100)) == [454] * 20 + [421]
    assert session.state == CLOSED
    assert b'limit code=421 why="too many failed auth attempts' in world.lines[-1]


def test_to_cancel_is_no_bad_command() -> None:
    session, _ = open_session()
    assert grammar.codes(all_replies(session, b"AUTH PLAIN\r\n*\r\n" * 30)) == [334, 501] * 30


def test_a_user_who_gets_it_right_the_third_time_is_welcome() -> None:
    session, _ = open_session()
    assert grammar.codes(all_replies(session, BAD + BAD + GOOD + MAIL)) == [535, 535, 235, 250]


def test_tls_does_not_forget_failed_attempts() -> None:
    session, _ = open_session()
    all_replies(session, BAD + BAD + b"STARTTLS\r\n")
    session.tls_started(b"CIPHER")
    assert grammar.codes(all_replies(session, BAD)) == [535, 421]


@pytest.mark.parametrize(
    "command",
    [
        *(b"ETRN x", b"", b"STARTTLS x", b"AUTH X", b"AUTH PLAIN ?"),
        b"x" * 20000,
    ],
)
def test_the_twentieth_bad_command_ends_it(command: bytes) -> None:
    session, world = open_session()
    for _ in range(19):
        all_replies(session, b"NOOP\r\n" + command + b"\r\n")
        assert session.state != CLOSED
    said = all_replies(session, command + b"\r\nNOOP\r\n")
    assert grammar.replies(said)[-1] == "421 too many bad commands, goodbye (#4.5.0)"
    assert session.state == CLOSED
    assert last_line(world) == b'limit code=421 why="too many bad commands, goodbye (#4.5.0)"'


def test_what_is_pipelined_behind_a_mail_that_is_refused_does_not_count() -> None:
    session, _ = open_session(smtpauth=b"!")
    batch = MAIL + b"RCPT TO:<u@here.example>\r\n" * 100 + b"DATA\r\n"
    codes = grammar.codes(all_replies(session, batch + b"RSET\r\n" + batch + GOOD + MAIL))
    assert codes == [*([530] + [503] * 101 + [250]), *([530] + [503] * 101), 235, 250]


def test_recipients_that_are_refused_end_it_where_brtlimit_says_so() -> None:
    session, world = open_session(limits=Limits(bad_recipients=3))
    wrong, right = b"RCPT TO:<u@elsewhere.example>\r\n", b"RCPT TO:<u@here.example>\r\n"
    assert grammar.codes(all_replies(session, MAIL + wrong + right + wrong)) == [250, 553, 250, 553]
    said = all_replies(session, b"RSET\r\n" + MAIL + wrong + right)
    assert grammar.codes(said) == [250, 250, 553, 421]
    assert last_line(world) == b'limit code=421 why="too many invalid addresses, goodbye (#4.3.0)"'


def test_recipients_beyond_maxrcpt_are_for_another_message() -> None:
    session, world = open_session(limits=Limits(recipients=2))
    rcpt = b"RCPT TO:<u@here.example>\r\n"
    said = all_replies(session, MAIL + rcpt * 3 + b"DATA\r\n.\r\n" + MAIL + rcpt * 2)
    assert grammar.codes(said) == [250, 250, 250, 452, 354, 250, 250, 250, 250]
    assert "452 too many recipients (#4.5.3)" in grammar.replies(said)
    assert world.queues[0].envelope == b"Fa@example.com\0Tu@here.example\0Tu@here.example\0\0"


def test_no_limit_is_no_limit() -> None:
    session, _ = open_session(limits=Limits(0, 0, 0, 0))
    wrong = b"RCPT TO:<u@elsewhere.example>\r\n"
    codes = grammar.codes(all_replies(session, BAD * 200 + b"TURN\r\n" * 200 + MAIL + wrong * 200))
    assert codes == [*[535] * 200, *[502] * 200, 250, *[553] * 200]


def test_recorded_dialogues_are_far_from_every_limit() -> None:
    """No client in them comes half as far as the defaults allow, but those that mean to."""
    for case in cases.ALL:
        if case.name.startswith("limit-"):
            continue
        replies = [reply for step in case.steps for reply in step.replies]
        bad = [reply for reply in replies if reply[:3] in ("500", "501", "502", "504")]
        failed = [reply for reply in replies if reply[:3] == "535"]
        assert len(bad) < 10, case.name
        assert len(failed) < 2, case.name


# The log


def test_refusals_do_not_fill_the_log() -> None:
    session, world = open_session()
    said = all_replies(session, MAIL + b"RCPT TO:<\xff@elsewhere.example>\r\n" * 1000 + b"NOOP\r\n")
    assert grammar.codes(said) == [250, *[553] * 1000, 250]
    lines = [line.partition(b": ")[2] for line in world.lines]
    assert len(lines) == MOST_REFUSALS + 1
    assert all(line.startswith(b"mail result=refused code=553") for line in lines[:-1])
    assert lines[-1] == b'limit why="more refusals are not told"'


# Openings

REQUESTS = {
    b"GET / HTTP/1.1\r\nHost: mx.example.org:25\r\n\r\n": b"HTTP",
    b"POST /x HTTP/1.1\r\n\r\nEHLO x\r\n" + MAIL: b"HTTP",
    b"CONNECT mx.example.org:25 HTTP/1.1\r\n\r\n": b"HTTP",
    b"OPTIONS / RTSP/1.0\r\n": b"HTTP",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": b"HTTP",
    b"DESCRIBE rtsp://x/ RTSP/1.0\r\n": b"RTSP",
    b"REGISTER sip:x SIP/2.0\r\n": b"SIP",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": b"TLS",
    b"SSH-2.0-OpenSSH_9.2p1\r\n": b"SSH",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 1 25\r\nEHLO x\r\n": b'"PROXY protocol"',
    b"PROXY UNKNOWN\r\n": b'"PROXY protocol"',
    b"\x03\0\0\x13\x0e\xe0\0\0\0\0\0\1\0\x08\0\3\0\0\0": b"RDP",
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_what_opens_another_protocol_ends_the_session_at_once(request_: bytes) -> None:
    for pieces in ([request_], [request_[at : at + 1] for at in range(len(request_))]):
        session, world = open_session()
        said = b"".join(all_replies(session, piece) for piece in pieces)
        assert said == b"421 this is SMTP, goodbye (#4.5.0)\r\n"
        assert session.state == CLOSED
        protocol = REQUESTS[request_].strip(b'"')
        assert [line.partition(b": ")[2] for line in world.lines] == [
            b'limit code=421 why="not SMTP: %s"' % protocol
        ]


def test_it_is_the_opening_that_counts() -> None:
    """A program that speaks SMTP may have a bad command, whatever its name."""
    session, _ = open_session()
    said = all_replies(session, b"EHLO x\r\nGET / HTTP/1.1\r\n\x16\x03\x01\r\nNOOP\r\n")
    assert grammar.codes(said) == [250, 502, 502, 250]
    session, _ = open_session()
    said = all_replies(session, b"x" * 20000 + b"\r\nGET / HTTP/1.1\r\n")
    assert grammar.codes(said) == [500, 502]


def test_what_opens_another_protocol_inside_of_tls_ends_the_session_too() -> None:
    session, _ = open_session()
    all_replies(session, b"EHLO x\r\nSTARTTLS\r\n")
    session.tls_started(b"CIPHER")
    assert grammar.codes(all_replies(session, b"GET / HTTP/1.1\r\n")) == [421]


def test_no_recorded_client_begins_like_that() -> None:
    for case in cases.ALL:
        sent = b"".join(b"".join(step.writes) for step in case.steps)
        assert sent.startswith(OPENINGS.get(sent[:2], ())) == (case.name in MEANT), case.name


MEANT = {"limit-opening-http", "limit-opening-tls", "limit-opening-ssh"}


# Time

IN_A_MESSAGE = MAIL + b"RCPT TO:<u@here.example>\r\nDATA\r\n"


def test_what_is_half_sent() -> None:
    session, _ = open_session()
    steps = [
        *((b"", False), (b"NO", True), (b"OP", True), (b"\r\n", False), (b"NOOP\r\nN", True)),
        *((b"OOP\r\nAUTH LOGIN\r\n", False), (b"x", True), (b"\r\n", False)),
        *((b"\r\n" + IN_A_MESSAGE, True), (b"x\r\n", True), (b".\r\n", False)),
        *((b"x" * 20000, True), (b"x", True), (b"\r\n", False)),
    ]
    for piece, is_half_sent in steps:
        all_replies(session, piece)
        assert session.is_half_sent is is_half_sent, piece


def test_a_client_that_sends_little_by_little_is_too_slow() -> None:
    pace = Pace(rate=1, window=1200)
    assert pace.keeps_up(1, 1000, is_half_sent=False), "it may think before it begins"
    assert pace.keeps_up(1, 1199, is_half_sent=True)
    assert not pace.keeps_up(1, 1199, is_half_sent=True)


def test_each_window_is_for_itself() -> None:
    pace = Pace(rate=10, window=60)
    assert pace.keeps_up(1_000_000, 60, is_half_sent=True)
    assert pace.keeps_up(599, 59, is_half_sent=True)
    assert not pace.keeps_up(1, 2, is_half_sent=True), "600 in 61 seconds"
    assert pace.keeps_up(1, 59, is_half_sent=True)
    assert pace.keeps_up(1, 59, is_half_sent=False), "a new command"
    assert pace.keeps_up(1, 59, is_half_sent=True)


@pytest.mark.parametrize("octets_a_second", [960, 30])
def test_a_slow_line_is_fast_enough(octets_a_second: int) -> None:
    """50 MB by a modem of 9600 bit/s, 14 hours; a packet of 536 octets at a time."""
    pace = Pace(rate=1, window=1200)
    seconds = 536 / octets_a_second
    assert all(pace.keeps_up(536, seconds, is_half_sent=True) for _ in range(50_000_000 // 536))


def test_a_line_that_is_dead_for_a_while_is_no_reason() -> None:
    pace = Pace(rate=1, window=1200)
    assert all(pace.keeps_up(1460, 1199, is_half_sent=True) for _ in range(100))


def test_no_rate_is_any_rate() -> None:
    pace = Pace(rate=0, window=1)
    assert all(pace.keeps_up(1, 1000, is_half_sent=True) for _ in range(10))


@pytest.mark.parametrize("name", ["TOO_SLOW", "SESSION_TOO_LONG"])
def test_a_message_that_takes_too_long_is_not_queued(name: str) -> None:
    from qmail_smtpd_py import reply

    session, world = open_session()
    all_replies(session, IN_A_MESSAGE + b"Subject: x\r\n")
    said = session.time_out(getattr(reply, name))
    assert grammar.codes(said) == [421]
    assert world.queues[0].envelope == b""
    events = [line.partition(b": ")[2].split(b" ")[0] for line in world.lines]
    assert events == [b"limit", b"mail"]
    assert b"result=cut-off code=421" in world.lines[-1]
    assert all_replies(session, b".\r\n") == b""
