"""The session under attack: smuggling, memory, what TLS and AUTH must not let through, the end."""

from __future__ import annotations

import tracemalloc
from typing import Callable

import pytest
from conformance import grammar
from conformance.world import all_replies, base64, open_session

from qmail_smtpd_py import reply
from qmail_smtpd_py.conduct import MOST_REFUSALS, Limits
from qmail_smtpd_py.session import CLOSED, LINE_LIMIT, Session
from qmail_smtpd_py.transaction import RECIPIENTS_LIMIT, Transaction

IN_A_MESSAGE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<u@here.example>\r\nDATA\r\n"
GOOD = b"AUTH PLAIN " + base64(b"\0joe\0secret") + b"\r\n"

# Smuggling: only CR LF . CR LF ends a message

LOOKALIKES = [
    *(b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\n\n.\r\n", b"\r\r\n.\n"),
    *(b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\r\n.\r\r\n"),
    *(b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\n .\r\n", b"\r\n. \r\n", b"\r\n..\r\n"),
    *(b"\r\n.\x85", b"\x85.\x85", b"\r\n.\x0b\x0c", b"\r\n\xef\xbc\x8e\r\n"),
    b"\xe2\x80\xa8.\xe2\x80\xa8",
]


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_what_looks_like_the_end_is_not_the_end(lookalike: bytes) -> None:
    """Whatever comes behind it is text, in one message or in none, however it was cut."""
    hidden = IN_A_MESSAGE.replace(b"a@", b"hidden@") + b"hidden\r\n.\r\n"
    data = b"Subject: x\r\n\r\ntext" + lookalike + hidden
    for at in range(len(data)):
        session, world = open_session()
        all_replies(session, IN_A_MESSAGE)
        all_replies(session, data[:at])
        all_replies(session, data[at:])
        session.connection_lost()
        (queue,) = world.queues
        assert queue.envelope in (b"", b"Fa@example.com\0Tu@here.example\0\0")
        if queue.envelope:
            assert queue.message.endswith(b"hidden\n")
        else:
            assert b"\n" in lookalike.replace(b"\r\n", b""), "refused without a bare line feed"


# Memory

STATES: dict[str, bytes] = {
    "in a command": b"",
    "in a response": b"AUTH LOGIN\r\n",
    "in a header": IN_A_MESSAGE,
    "in a body": IN_A_MESSAGE + b"\r\n",
    "closed": b"QUIT\r\n",
    "before a handshake": b"STARTTLS\r\n",
}


def peak_of(act: Callable[[], object]) -> int:
    """Octets of memory in use at the most, beyond those before."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("octet", [b"x", b"\0", b"\r", b"."])
@pytest.mark.parametrize("before", STATES.values(), ids=STATES)
def test_a_line_without_end_needs_no_memory(before: bytes, octet: bytes) -> None:
    session, world = open_session()
    all_replies(session, before)
    for queue in world.queues:
        queue.write = lambda data: None  # type: ignore[method-assign]
    piece = octet * 65536
    peak = peak_of(lambda: [all_replies(session, piece) for _ in range(64)])
    assert peak < 8 * len(piece), f"{peak} octets for pieces of {len(piece)}"


def test_many_small_lines_need_memory_for_one_piece_of_them() -> None:
    session, _ = open_session()
    piece = b"NOOP\r\n" * 2000

    def send(times: int) -> None:
        for _ in range(times):
            all_replies(session, piece)

    assert peak_of(lambda: send(20)) < 2 * peak_of(lambda: send(1))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_qmail_queue_gets_nothing_beyond_databytes(size: int) -> None:
    """Its disk is not to be filled by what will be refused."""
    session, world = open_session(databytes=50)
    all_replies(session, IN_A_MESSAGE)
    (queue,) = world.queues
    trace_field = len(queue.message)
    said = b"".join(all_replies(session, b"x" * size) for _ in range(200))
    said += all_replies(session, b"\r\n.\r\n")
    assert said == b"552 sorry, that message size exceeds my databytes limit (#5.3.4)\r\n"
    assert len(queue.message) - trace_field <= 50
    assert queue.envelope == b""


def test_recipients_are_bounded() -> None:
    session, _ = open_session()
    all_replies(session, b"MAIL FROM:<>\r\n")
    address = b"x" * 110 + b"@here.example"
    room = RECIPIENTS_LIMIT // (len(address) + 2)
    said = all_replies(session, b"RCPT TO:<%s>\r\n" % address * (room + 1))
    assert said == b"250 ok\r\n" * room + b"452 too many recipients (#4.5.3)\r\n"
    assert all_replies(session, b"RCPT TO:<x@here.example>\r\n") == b"250 ok\r\n", "it still fits"


@pytest.mark.parametrize("recipient", [b"", b"ab", b"x" * 900])
def test_recipients_need_the_memory_of_their_octets_however_short_they_are(
    recipient: bytes,
) -> None:
    transaction = Transaction(b"", blocked=False)

    def fill() -> None:
        while transaction.add(recipient):
            pass
        transaction.envelope()
        transaction.recipients  # noqa: B018

    assert peak_of(fill) < 4 * RECIPIENTS_LIMIT
    room = RECIPIENTS_LIMIT // (len(recipient) + 2)
    assert transaction.count == room
    assert transaction.envelope() == b"F\0%s\0" % (b"T%s\0" % recipient * room)
    assert transaction.recipients == b",".join([recipient] * room)


def test_the_log_shows_the_first_recipients_and_how_many_octets_all_of_them_have() -> None:
    session, world = open_session()
    addresses = [b"user%d@here.example" % number for number in range(1000)]
    all_replies(session, b"MAIL FROM:<>\r\n" + b"".join(b"RCPT TO:<%s>\r\n" % a for a in addresses))
    all_replies(session, b"DATA\r\n.\r\n")
    listed = b",".join(addresses)
    assert world.lines[-1].endswith(b'to="%s...(%d octets)"' % (listed[:1200], len(listed)))


# TLS

INJECTED = [b"NOOP\r\n", b"NOO", IN_A_MESSAGE, b"QUIT\r\n", b"\r\n", GOOD]


@pytest.mark.parametrize("injected", INJECTED)
@pytest.mark.parametrize("how", ["with it", "behind it"])
def test_nothing_said_before_tls_is_heard_after_it(injected: bytes, how: str) -> None:
    session, _ = open_session(smtpauth=b"!")
    if how == "with it":
        said = all_replies(session, b"EHLO x\r\nSTARTTLS\r\n" + injected)
    else:
        said = all_replies(session, b"EHLO x\r\nSTARTTLS\r\n") + all_replies(session, injected)
    assert said.endswith(b"220 ready for tls\r\n")
    session.tls_started(b"CIPHER")
    assert all_replies(session, b"") == b""
    assert all_replies(session, b"RCPT TO:<u@here.example>\r\n") == b"503 MAIL first (#5.5.1)\r\n"
    assert all_replies(session, b"MAIL FROM:<>\r\n").startswith(b"530 ")
    assert grammar.codes(all_replies(session, b"EHLO x\r\nSTARTTLS\r\n")) == [250, 502]


def test_tls_is_not_offered_under_tls() -> None:
    session, _ = open_session()
    assert b"STARTTLS" in all_replies(session, b"EHLO x\r\n")
    all_replies(session, b"STARTTLS\r\n")
    session.tls_started(b"CIPHER")
    assert b"STARTTLS" not in all_replies(session, b"EHLO x\r\n")


def test_the_client_certificate_is_asked_for_once_in_a_session() -> None:
    """It costs a look into the list, and its answer can be no other."""
    session, world = open_session()
    asked: list[int] = []

    def certified_client() -> tuple[bytes | None, bytes]:
        asked.append(1)
        return None, b"certificate has expired"

    world.certified_client = certified_client  # type: ignore[method-assign]
    all_replies(session, b"STARTTLS\r\n")
    session.tls_started(b"CIPHER")
    for _ in range(3):
        said = all_replies(session, b"MAIL FROM:<>\r\n" + b"RCPT TO:<u@elsewhere.example>\r\n" * 2)
        assert [code for code in grammar.codes(said) if code == 553] == [553, 553]
    assert asked == [1]


# What is refused, and in which order


@pytest.mark.parametrize(
    "command",
    [b"HELO x", b"MAIL FROM:<>", b"RCPT TO:<u@here.example>", b"DATA", b"RSET", b"VRFY x", b"HELP"],
)
@pytest.mark.parametrize("smtpauth", [None, b"!"])
def test_no_mail_without_tls_where_that_is_required(command: bytes, smtpauth: bytes) -> None:
    """And that comes before AUTH, as AUTH needs it."""
    session, _ = open_session(smtpauth=smtpauth, require_tls=True)
    assert all_replies(session, command + b"\r\n") == reply.TLS_REQUIRED.render()


def test_what_counts_is_the_length_of_the_address_as_it_is_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, world = open_session()
    monkeypatch.setattr(world, "localize", lambda address: address + b"x" * 899)
    assert grammar.codes(all_replies(session, b"MAIL FROM:<a@example.com>\r\n")) == [555]


def test_a_message_that_loops_and_is_too_big() -> None:
    session, _ = open_session(databytes=10)
    all_replies(session, IN_A_MESSAGE)
    hops = b"Received: x\r\n" * 101
    assert grammar.codes(all_replies(session, hops + b"\r\n.\r\n")) == [554]


def test_the_longest_command_line() -> None:
    session, _ = open_session()
    assert LINE_LIMIT == 16384
    for octets, code in ((16384, 250), (16385, 500)):
        line = b"NOOP ".ljust(octets, b"x") + b"\r\n"
        assert grammar.codes(all_replies(session, line)) == [code]


def test_what_is_pipelined_behind_a_message_is_not_obeyed_at_once() -> None:
    session, _ = open_session()
    all_replies(session, IN_A_MESSAGE)
    assert grammar.codes(session.receive(b"x\r\n.\r\nNOOP\r\n")) == [250]
    assert session.is_paused
    assert not session.is_half_sent, "it is we who take our time"
    assert grammar.codes(session.receive(b"")) == [250]


def test_mail_that_is_refused_counts_among_the_refusals_and_what_is_taken_is_always_told() -> None:
    session, world = open_session()

    def told(result: bytes) -> int:
        return sum(b"result=" + result in line for line in world.lines)

    for _ in range(303):  # the queue refuses each third one
        all_replies(session, IN_A_MESSAGE + b"x\r\n.\r\n")
    assert (told(b"accepted"), told(b"refused")) == (202, MOST_REFUSALS)


def test_auth_that_fails_counts_among_the_refusals_but_for_wrong_passwords() -> None:
    session, world = open_session(limits=Limits(auth_failures=0, bad_commands=0))
    for _ in range(MOST_REFUSALS + 5):
        all_replies(session, b"AUTH PLAIN =\r\n")
    assert sum(b"code=501" in line for line in world.lines) == MOST_REFUSALS
    all_replies(session, b"AUTH PLAIN AGEAYg==\r\n")
    assert b"code=535" in world.lines[-1]


# AUTH


@pytest.mark.parametrize("line", b"AUTH PLAIN,auth LOGIN,AUTH CRAM-MD5,AUTH X,AUTH".split(b","))
def test_auth_in_clear_under_forcetls_closes_and_no_password_is_looked_at(line: bytes) -> None:
    session, world = open_session(force_tls=True)
    password = base64(b"\0joe\0secret")
    said = all_replies(session, line + b" " + password + b"\r\n" + GOOD + b"NOOP\r\n")
    assert grammar.codes(said) == [538]
    assert session.state == CLOSED
    assert all_replies(session, b"NOOP\r\n") == b""
    assert not any(b"secret" in entry or password in entry for entry in world.lines)


@pytest.mark.parametrize("force_tls", [True, False])
@pytest.mark.parametrize("is_encrypted", [True, False])
def test_auth_is_advertised_where_it_can_be_used_and_only_there(
    force_tls: bool, is_encrypted: bool
) -> None:
    session, _ = open_session(force_tls=force_tls)
    if is_encrypted:
        all_replies(session, b"STARTTLS\r\n")
        session.tls_started(b"CIPHER")
    is_advertised = b"AUTH LOGIN PLAIN CRAM-MD5" in all_replies(session, b"EHLO x\r\n")
    assert is_advertised == (is_encrypted or not force_tls)
    assert all_replies(session, GOOD).startswith(b"235 " if is_advertised else b"538 ")


@pytest.mark.parametrize("start", b",AUTH PLAIN ,AUTH LOGIN ,AUTH CRAM-MD5 ,NOOP ".split(b","))
@pytest.mark.parametrize("then", [b"", b"*", b"AUTH PLAIN ", b"AUTH LOGIN "])
def test_no_secret_is_ever_said_or_logged(start: bytes, then: bytes) -> None:
    secrets = [b"Tell-Nobody", base64(b"Tell-Nobody"), base64(b"\0joe\0Tell-Nobody")]
    session, world = open_session()
    said = b""
    for secret in secrets:
        said += all_replies(session, start + secret + b"\r\n" + then + secret + b"\r\n")
        said += all_replies(session, base64(b"joe") + b"\r\n" + secret + b"\r\n")
    logged = [line for line in world.lines if b"user=Tell-Nobody" not in line]
    for text in [said, *logged]:
        assert not any(secret in text for secret in secrets)


@pytest.mark.parametrize("cancel", [b"*", b"*\0", b"*\0=="])
def test_an_exchange_that_is_canceled(cancel: bytes) -> None:
    """qmail: a line ends at a NUL."""
    session, _ = open_session()
    assert all_replies(session, b"AUTH LOGIN\r\n").startswith(b"334 ")
    canceled = b"501 auth exchange canceled (#5.0.0)\r\n"
    assert all_replies(session, cancel + b"\r\n") == canceled


@pytest.mark.parametrize("smtpauth", [None, b""])
def test_nothing_waits_for_auth_that_asks_nobody(smtpauth: bytes) -> None:
    """As there is none, or as there was one."""
    session, _ = open_session(smtpauth=smtpauth)
    all_replies(session, GOOD)
    assert grammar.codes(session.receive(b"NOOP\r\n" + GOOD * 3)) == [250, 503, 503, 503]
    session.receive(IN_A_MESSAGE)
    assert grammar.codes(session.receive(b"Author: joe\r\n.\r\n")) == [250]


def test_a_star_and_more_is_a_response() -> None:
    session, _ = open_session()
    malformed = reply.AUTH_MALFORMED.render()
    assert all_replies(session, b"AUTH PLAIN\r\n*x\r\n").endswith(b"\r\n" + malformed)


def test_auth_behind_auth_and_in_a_transaction() -> None:
    """The first reason that there is, is told: in a transaction, too, a user is one already."""
    session, _ = open_session()
    all_replies(session, GOOD + b"MAIL FROM:<a@example.com>\r\n")
    assert all_replies(session, GOOD) == reply.AUTH_ALREADY.render()
    session, _ = open_session(force_tls=True)
    all_replies(session, b"MAIL FROM:<a@example.com>\r\n")
    assert all_replies(session, GOOD) == reply.AUTH_IN_TRANSACTION.render()


def test_a_failed_attempt_has_the_user_in_its_line() -> None:
    session, world = open_session()
    all_replies(session, b"AUTH PLAIN " + base64(b"\0eve\0secret") + b"\r\n")
    assert b" user=eve" in world.lines[-1]


def test_auth_without_tls_has_a_line() -> None:
    session, world = open_session(force_tls=True)
    all_replies(session, GOOD)
    assert b"auth result=refused code=538" in world.lines[-1]


@pytest.mark.parametrize("answer", [reply.AUTH_TROUBLE, reply.AUTH_NO_CHILD, reply.AUTH_NO_PIPE])
def test_trouble_with_the_check_program_has_an_end(
    monkeypatch: pytest.MonkeyPatch, answer: reply.Reply
) -> None:
    session, world = open_session()
    monkeypatch.setattr(world, "authenticate", lambda *_: answer)
    assert grammar.codes(all_replies(session, GOOD * 30)) == [454] * 20 + [421]


@pytest.mark.parametrize(
    "auth",
    [
        b"auth PLAIN " + base64(b"\0joe\0secret") + b"\r\n",
        b"AUTH LOGIN\r\n%s\r\n%s\r\n" % (base64(b"joe"), base64(b"secret")),
    ],
    ids=["plain", "login"],
)
def test_what_there_is_to_tell_leaves_before_a_check_program_takes_its_time(auth: bytes) -> None:
    session, _ = open_session()
    said = [session.receive(b"NOOP\r\n" + auth + b"NOOP\r\n")]
    while session.is_paused:
        said.append(session.receive(b""))
    assert said[0] == b"250 ok\r\n"
    assert said[-2:] == [b"235 ok, go ahead (#2.0.0)\r\n", b"250 ok\r\n"]
    assert all(replies.count(b"\r\n") == 1 for replies in said)


@pytest.mark.parametrize(
    "before", [b"", b"HELO x", b"RSET", b"AUTH PLAIN =", b"AUTH PLAIN " + base64(b"\0eve\0x")]
)
def test_mail_needs_authentication_whatever_comes_before(before: bytes) -> None:
    session, _ = open_session(smtpauth=b"!")
    all_replies(session, before + b"\r\n")
    assert all_replies(session, b"MAIL FROM:<>\r\n").startswith(b"530 ")
    assert all_replies(session, b"RCPT TO:<u@here.example>\r\n").startswith(b"503 ")


# Who sends

LOGIN = {
    b"plain": GOOD,
    b"login": b"AUTH LOGIN\r\n%s\r\n%s\r\n" % (base64(b"joe"), base64(b"secret")),
    b"cram-md5": b"AUTH CRAM-MD5\r\n%s\r\n" % base64(b"joe 0123"),
}


@pytest.mark.parametrize("method", LOGIN)
def test_children_learn_who_has_authenticated_and_how(method: bytes) -> None:
    session, world = open_session()
    for before in (b"", LOGIN[method] + b"RSET\r\nEHLO x\r\n", b"STARTTLS\r\n"):
        all_replies(session, before)
        if before == b"STARTTLS\r\n":
            session.tls_started(b"CIPHER")
        all_replies(session, IN_A_MESSAGE + b".\r\n")
    assert world.users == [(None, None), (b"joe", method), (None, None)]


FROM_WHOM = {
    b"<joe>": 250,
    b"<JOE>": 250,
    b"<joe@here.example>": 503,
    b"<joes>": 503,
    b"<jo>": 503,
    b"<>": 503,
    b'<"joe">': 250,
    b"<@relay.example:joe>": 250,
}


@pytest.mark.parametrize("sender", FROM_WHOM)
def test_a_user_sends_as_nobody_else_where_that_is_asked_for(sender: bytes) -> None:
    session, world = open_session(force_auth_mail_from=True)
    mail = b"MAIL FROM:" + sender + b"\r\n"
    assert all_replies(session, mail) == b"250 ok\r\n", "nobody has authenticated"
    all_replies(session, b"RSET\r\n" + GOOD)
    assert grammar.codes(all_replies(session, mail)) == [FROM_WHOM[sender]]
    if FROM_WHOM[sender] == 503:
        assert b'code=503 why="from and auth not the same' in world.lines[-1]
        assert all_replies(session, b"RCPT TO:<u@here.example>\r\n").startswith(b"503 MAIL first")
        assert all_replies(session, b"MAIL FROM:<joe>\r\n") == b"250 ok\r\n", "and may try again"
    all_replies(session, b"RSET\r\nSTARTTLS\r\n")
    session.tls_started(b"CIPHER")
    assert all_replies(session, mail) == b"250 ok\r\n", "nobody has, any more"


def test_capitals_do_not_matter_for_who_a_user_sends_as(monkeypatch: pytest.MonkeyPatch) -> None:
    session, world = open_session(force_auth_mail_from=True)
    monkeypatch.setattr(world, "authenticate", lambda *_: reply.AUTHENTICATED)
    all_replies(session, b"AUTH PLAIN " + base64(b"\0Joe\0secret") + b"\r\n")
    assert all_replies(session, b"MAIL FROM:<jOE>\r\n") == b"250 ok\r\n"


def test_a_user_may_send_as_anybody_where_nothing_is_asked_for() -> None:
    session, _ = open_session()
    all_replies(session, GOOD)
    assert all_replies(session, b"MAIL FROM:<ann@here.example>\r\n") == b"250 ok\r\n"


@pytest.mark.parametrize("hide_host", [False, True])
def test_where_a_user_is_can_be_left_out_of_received(hide_host: bool) -> None:
    session, world = open_session(hide_host=hide_host)
    message = IN_A_MESSAGE + b".\r\n"
    all_replies(session, b"EHLO laptop.home\r\n" + message + GOOD + message)
    stranger, user = (queue.message for queue in world.queues)
    assert stranger.startswith(b"Received: from unknown (HELO laptop.home) (192.0.2.1)\n")
    seen = b"from unknown (HELO laptop.home) (joe@192.0.2.1)"
    hidden = b"from unknown (joe@unknown)"
    assert user.startswith(b"Received: %s\n  by here.example" % (hidden if hide_host else seen))


# The end

LETTER = b"Subject: x\r\n\r\ntext\r\n.\r\n"


@pytest.mark.parametrize("end", [Session.connection_lost, Session.time_out])
@pytest.mark.parametrize("cut", range(len(LETTER)))
def test_a_message_that_is_cut_off_has_no_envelope(
    cut: int, end: Callable[[Session], object]
) -> None:
    session, world = open_session()
    all_replies(session, IN_A_MESSAGE + LETTER[:cut])
    end(session)
    assert world.queues[0].envelope == b""
    assert b"result=cut-off" in world.lines[-1]
    assert session.exit_status == 1
    assert all_replies(session, b"\n.\r\n") == b""


def test_out_of_descriptors_is_a_temporary_failure_and_the_session_goes_on() -> None:
    session, world = open_session()
    world.open_delivery = lambda identity: None  # type: ignore[method-assign]
    said = all_replies(session, IN_A_MESSAGE + b"NOOP\r\n")
    assert grammar.replies(said)[2:] == ["451 qqt failure (#4.3.0)", "250 ok"]


def test_a_control_file_that_breaks_ends_the_session() -> None:
    session, world = open_session()
    said = all_replies(session, b"MAIL FROM:<>\r\nRCPT TO:<u@broken.example>\r\nNOOP\r\n")
    assert grammar.replies(said)[1:] == ["421 unable to read controls (#4.3.0)"]
    assert session.state == CLOSED
    assert b"error why=" in world.lines[-1]
