"""A watched session: it is the same session, and what is written down has no secret."""

from __future__ import annotations

import gc
import weakref

import pytest
from conformance import cases
from conformance.world import NOW, World, all_replies, base64, cut, open_session
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from qmail_smtpd_py.connection import Connection, Settings
from qmail_smtpd_py.session import CLOSED, TLS_HANDSHAKE
from qmail_smtpd_py.settings import auth_policy
from qmail_smtpd_py.watched import Transcript, WatchedSession, show_command


class Written(Transcript):
    """What was written down."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, bytes]] = []
        self.is_closed = False

    def write(self, who: str, text: bytes) -> None:
        assert not self.is_closed
        self.lines.append((who, text))

    def close(self) -> None:
        self.is_closed = True


def watched(smtpauth: bytes | None = b"+cram", force_tls: bool = False):
    """A watched session, its world, and what is written down of it."""
    world, written = World(), Written()
    connection = Connection({b"TCPREMOTEIP": b"192.0.2.1", b"TCPLOCALHOST": b"here.example"})
    chosen = Settings(b"here.example", 0, auth_policy(smtpauth), True, force_tls)
    return WatchedSession(connection, chosen, world, written), world, written


def test_a_whole_dialogue() -> None:
    session, _, written = watched()
    session.greet()
    all_replies(session, b"EHLO client.example\r\nSTARTTLS\r\n")
    session.tls_started(b"TLS_X")
    all_replies(session, b"auth login\r\n")
    all_replies(session, base64(b"joe") + b"\r\n" + base64(b"secret") + b"\r\n")
    envelope = b"MAIL FROM:<a@example.com> AUTH=<>\r\nRCPT TO:<u@here.example>\r\n"
    all_replies(session, envelope + b"DATA\r\n")
    all_replies(session, b"Subject: x\r\n\r\ntext\r\n.\r\nNOOP\r\nETRN example.com\r\nQUIT\r\n")
    session.connection_lost()
    assert written.lines == [
        ("server", b"220 here.example ESMTP"),
        ("client", b"EHLO client.example"),
        ("server", b"250-here.example"),
        ("server", b"250-STARTTLS"),
        ("server", b"250-PIPELINING"),
        ("server", b"250-8BITMIME"),
        ("server", b"250-AUTH LOGIN PLAIN CRAM-MD5"),
        ("server", b"250 SIZE 0"),
        ("client", b"STARTTLS"),
        ("server", b"220 ready for tls"),
        ("note", b"TLS: TLS_X"),
        ("client", b"AUTH login"),
        ("server", b"334 (12 octets)"),
        ("client", b"(4 octets)"),
        ("server", b"334 (12 octets)"),
        ("client", b"(8 octets)"),
        ("server", b"235 ok, go ahead (#2.0.0)"),
        ("client", b"MAIL FROM:<a@example.com> AUTH=<>"),
        ("server", b"250 ok"),
        ("client", b"RCPT TO:<u@here.example>"),
        ("server", b"250 ok"),
        ("client", b"DATA"),
        ("server", b"354 go ahead"),
        ("client", b"(a message, 17 octets)"),
        ("server", b"250 ok %d qp 1" % NOW),
        ("client", b"NOOP"),
        ("server", b"250 ok"),
        ("client", b"ETRN (11 octets)"),
        ("server", b"502 unimplemented (#5.5.1)"),
        ("client", b"QUIT"),
        ("server", b"221 here.example"),
    ]
    assert written.is_closed


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"AUTH PLAIN AGpvZQBzZWNyZXQ=", b"AUTH PLAIN (16 octets)"),
        (b"auth  Plain   AGpvZQ==", b"AUTH Plain (8 octets)"),
        (b"AUTH", b"AUTH"),
        (b"AUTH LOGIN", b"AUTH LOGIN"),
        (b"AUTH AGpvZQ==", b"AUTH (8 octets)"),
        (b"AUTH PLAIN\tAGpvZQ==", b"AUTH (14 octets)"),
        (b"AUTH\tPLAIN AGpvZQ==", b"(19 octets)"),
        (b"AUTH\0PLAIN AGpvZQ==", b"AUTH (15 octets)"),
        (b"AUTH PLAIN\0AGpvZQ==", b"AUTH (14 octets)"),
        (b"AUTHPLAIN AGpvZQ==", b"(18 octets)"),
        (b" AUTH PLAIN AGpvZQ==", b"(20 octets)"),
        (b"PASS secret", b"PASS (6 octets)"),
        (b"AGpvZQBzZWNyZXQ=", b"(16 octets)"),
        (b"Subject: secret", b"(15 octets)"),
        (b"NOOP secret", b"NOOP (6 octets)"),
        (b"EHLO client.example", b"EHLO client.example"),
        (b"mail from:<a@b> AUTH=<c@d>", b"mail from:<a@b> AUTH=<c@d>"),
        (b"", b"(0 octets)"),
        (b"secret", b"(6 octets)"),
        (b"bdat 100 LAST", b"bdat (8 octets)"),
    ],
)
def test_what_is_shown_of_a_command(line: bytes, shown: bytes) -> None:
    assert show_command(line) == shown


def test_what_comes_behind_an_auth_that_was_refused_is_hidden() -> None:
    """A client that does not wait for the answer says its password as a command."""
    session, _, written = watched(smtpauth=None)
    all_replies(session, b"AUTH LOGIN\r\nam9l\r\nsecret\r\nSECRET secret\r\nNOOP\r\n")
    said = [text for who, text in written.lines if who == "client"]
    assert said == [b"AUTH LOGIN", b"(4 octets)", b"(6 octets)", b"(13 octets)", b"NOOP"]


def test_what_opens_another_protocol_is_counted_only() -> None:
    session, _, written = watched()
    all_replies(session, b"GET / HTTP/1.1\r\nAuthorization: Basic c2VjcmV0\r\n")
    assert written.lines == [
        ("note", b"another protocol: (47 octets)"),
        ("server", b"421 this is SMTP, goodbye (#4.5.0)"),
    ]


def test_a_message_that_is_cut_off_and_a_silent_client() -> None:
    session, _, written = watched()
    all_replies(session, b"MAIL FROM:<>\r\nRCPT TO:<u@here.example>\r\nDATA\r\nsecret\r\n")
    session.time_out()
    assert written.lines[-2:] == [
        ("client", b"(a message, 6 octets)"),
        ("server", b"451 timeout (#4.4.2)"),
    ]


# Whatever is sent, and however it is cut

SECRET = b"Tell-Nobody-What-I-Am"
SECRETS = [
    *(SECRET, base64(SECRET), base64(b"\0joe\0" + SECRET), base64(b"joe " + SECRET)),
    *(base64(b"\0eve\0" + SECRET), base64(b"joe\0" + SECRET)),
]
# What of them would be one, wherever it is cut: the password in clear, and its base64.
FRAGMENTS = [SECRET] + [secret[8:] for secret in SECRETS[1:]]

heads = st.sampled_from(
    [
        *(b"", b"AUTH PLAIN ", b"AUTH LOGIN ", b"AUTH CRAM-MD5 ", b"auth plain  ", b"AUTH ", b" "),
        *(b"AUTH\tPLAIN ", b"AUTH PLAIN\t", b"AUTH PLAIN\0", b"AUTH\0", b"\0", b"PASS ", b"NOOP "),
        *(b"AUTH NTLM ", b"XAUTH ", b"\xff", b"HELP ", b"DATA ", b"QUITTER "),
    ]
)
secret_lines = st.tuples(heads, st.sampled_from(SECRETS)).map(b"".join)
other_lines = st.sampled_from(
    [
        *(b"AUTH LOGIN", b"AUTH PLAIN", b"AUTH CRAM-MD5", base64(b"joe"), b"*", b"=", b"EHLO x"),
        *(b"MAIL FROM:<a@example.com>", b"RCPT TO:<u@here.example>", b"RSET", b"STARTTLS"),
        b"x" * 99,
        b"MAIL FROM:<>\r\nRCPT TO:<u@here.example>\r\nDATA\r\n" + SECRET + b"\r\n.",
    ]
)
dialogues = st.lists(st.one_of(secret_lines, other_lines), max_size=14).map(
    lambda lines: b"".join(line + b"\r\n" for line in lines)
)
places = st.lists(st.integers(0, 1 << 20), max_size=10)
options = st.fixed_dictionaries(
    {
        "smtpauth": st.sampled_from([None, b"", b"cram", b"+cram", b"!"]),
        "force_tls": st.booleans(),
    }
)


def converse(session, pieces: list[bytes]) -> bytes:
    said = session.greet()
    for piece in pieces:
        said += all_replies(session, piece)
        if session.state == TLS_HANDSHAKE:
            session.tls_started(b"CIPHER")
        if session.state == CLOSED:
            break
    session.connection_lost()
    return said


@given(dialogues, places, options)
@examples(800)
def test_no_secret_is_written_down(data: bytes, at: list[int], chosen: dict) -> None:
    for pieces in ([data], cut(data, at), [data[at : at + 1] for at in range(len(data))]):
        session, _, written = watched(**chosen)
        converse(session, pieces)
        for _, text in written.lines:
            assert not any(fragment in text for fragment in FRAGMENTS), text


@given(dialogues, places, options)
@examples(300)
def test_it_is_the_same_session(data: bytes, at: list[int], chosen: dict) -> None:
    plain, world = open_session(**chosen)
    session, other, _ = watched(**chosen)
    pieces = cut(data, at)
    assert converse(session, pieces) == converse(plain, pieces)
    assert other.lines == world.lines
    assert other.identities == world.identities
    assert [queue.envelope for queue in other.queues] == [queue.envelope for queue in world.queues]


def test_recorded_dialogues_are_the_same_too() -> None:
    for case in cases.ALL:
        pieces = [octets for step in case.steps for octets in step.writes]
        plain, _ = open_session()
        session, _, _ = watched()
        assert converse(session, pieces) == converse(plain, pieces), case.name


def test_it_is_gone_when_it_is_over() -> None:
    """Without the collector, as a worker has none: nothing that it held leads back to it."""
    session, _, _ = watched()
    gone = weakref.ref(session)
    gc.disable()
    try:
        session.greet()
        all_replies(session, b"EHLO x\r\nQUIT\r\n")
        session.connection_lost()
        del session
        assert gone() is None
    finally:
        gc.enable()
