"""What holds for every dialogue, whatever is in it, and however it comes.

- any chunking of what the client sends gives the same replies, messages and log
- replies are those of the grammar in RFC 5321 section 4.2.1
- what qmail-queue is given is a whole envelope, or none
- commands in any order are answered as a model of RFC 5321 section 4.1.4 says, up to the limits
"""

from __future__ import annotations

import random

import pytest
from conformance import cases, grammar, logs
from conformance.world import NOW, all_replies, base64, cut, open_session
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from qmail_smtpd_py.conduct import Limits
from qmail_smtpd_py.session import CLOSED, TLS_HANDSHAKE

# Dialogues: sensible lines, and what can be made of them.

WORDS = [
    *b"<a@example.com> <u@here.example> <u@elsewhere.example> <bad@example.com> <>".split(),
    *b'<u@broken.example> <u@[127.0.0.1]> <"a\\ b"@here.example> @a,@b: < > \\ " ='.split(),
    *(b"", b" SIZE=10", b" SIZE=99999999999999999999999", b" AUTH=<>", b" AUTH=x+3Dy"),
    *(b"x" * 900, b"\0", b"\t", b"\r", b"\xff\xfe", b"\x1b[2J", b"\x7f", b" BODY=8BITMIME"),
]
VERBS = [
    *b"HELO h,EHLO h,MAIL FROM:,RCPT TO:,DATA,RSET,NOOP,VRFY x,HELP,mail from:".split(b","),
    *b"AUTH PLAIN ,AUTH LOGIN,AUTH CRAM-MD5,AUTH X,ETRN,*,,BDAT 3 LAST,XCLIENT NAME=x".split(b","),
]
RESPONSES = [b"joe", b"\0joe\0secret", b"\0eve\0x", b"joe 0123abcd", b"", b"\0", b"joe\0"]
TEXT = [b"Received: x", b"Delivered-To: y", b"", b"..", b".x", b"text", b"\r", b".\r", b"\0\xff"]
BEGIN = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<u@here.example>\r\nDATA\r\n"

arguments = st.lists(st.sampled_from(WORDS), max_size=2).map(b"".join)
commands = st.tuples(st.sampled_from(VERBS), arguments).map(b"".join)
responses = st.sampled_from(RESPONSES).map(base64)
line_ends = st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r\r\n", b""])
lines = st.tuples(st.one_of(commands, responses), line_ends).map(b"".join)
texts = st.lists(st.sampled_from(TEXT), max_size=6).map(
    lambda rows: b"\r\n".join([*rows, b".\r\n"])
)
turns = st.one_of(lines, lines, texts.map(lambda text: BEGIN + text), st.binary(max_size=12))
dialogues = st.lists(turns, max_size=14).map(b"".join)
places = st.lists(st.integers(0, 1 << 20), max_size=10)
options = st.fixed_dictionaries(
    {
        "smtpauth": st.sampled_from([None, b"", b"cram", b"+cram", b"!"]),
        "force_tls": st.booleans(),
        "databytes": st.sampled_from([0, 0, 50]),
        "limits": st.sampled_from([Limits(), Limits(), Limits(2, 3, 2, 1), Limits(1, 1, 1, 2)]),
    }
)


class Outcome:
    """All that comes of a dialogue, to its end."""

    def __init__(self, pieces: list[bytes], **options: object) -> None:
        session, world = open_session(**options)
        self.said = session.greet()
        for piece in pieces:
            self.said += all_replies(session, piece)
            if session.state in (CLOSED, TLS_HANDSHAKE):
                break
        session.connection_lost()
        self.queues = world.queues
        self.lines = world.lines
        delivered = [(queue.envelope, queue.envelope and queue.message) for queue in world.queues]
        self.seen = (delivered, world.identities, world.lines, session.exit_status)


def check(outcome: Outcome, data: bytes) -> None:
    """What holds for every outcome."""
    replies = grammar.replies(outcome.said)
    assert len(replies) <= 2 + data.count(b"\n"), "a reply to each line, and one that ends it all"
    for queue in outcome.queues:
        assert queue.envelope is not None, "a qmail-queue was left behind"
        assert queue.envelope == b"" or is_envelope(queue.envelope)
        assert queue.message.startswith(b"Received: from unknown ")
    accepted = [reply for reply in replies if reply.startswith(f"250 ok {NOW} qp ")]
    assert len(accepted) <= sum(bool(queue.envelope) for queue in outcome.queues)
    for line in outcome.lines:
        assert logs.read(line).event in ("mail", "auth", "limit", "error")


def is_envelope(octets: bytes) -> bool:
    """F, the sender, and at least one T with a recipient, without a control octet in any."""
    sender, *recipients = octets[:-2].split(b"\0")
    return (
        octets.endswith(b"\0\0")
        and sender.startswith(b"F")
        and recipients != []
        and all(recipient.startswith(b"T") for recipient in recipients)
        and all(32 <= octet != 127 for octet in b"".join([sender, *recipients]))
    )


@given(dialogues, places, options)
@examples(600)
def test_any_chunking_gives_the_same(data: bytes, at: list[int], chosen: dict) -> None:
    whole = Outcome([data], **chosen)
    assert Outcome(cut(data, at), **chosen).said == whole.said
    octet_by_octet = Outcome([data[at : at + 1] for at in range(len(data))], **chosen)
    assert octet_by_octet.said == whole.said
    if not any(b"cut-off" in line for line in whole.lines):  # how much came of it may differ
        assert octet_by_octet.seen == whole.seen


@given(dialogues, options)
@examples(800)
def test_whatever_is_sent_all_that_comes_of_it_is_well_formed(data: bytes, chosen: dict) -> None:
    check(Outcome([data], **chosen), data)


# Recorded dialogues with a few things wrong

RECORDED = [b"".join(b"".join(step.writes) for step in case.steps) for case in cases.ALL]
SHORT = [dialogue for dialogue in RECORDED if len(dialogue) < 3000]
SPLICES = [*b"\0|\r|\n|\r\n|\r\n.\r\n|.|\xff|<|>|=|\\".split(b"|"), b'"', b"A" * 300]


def mutated(chance: random.Random) -> bytes:
    data = bytearray(chance.choice(SHORT))
    for _ in range(chance.randrange(1, 12)):
        start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        how = chance.randrange(5)
        if how == 0:
            data[start : start + 1] = bytes([chance.randrange(256)])
        elif how == 1:
            data[start:start] = chance.choice(SPLICES)
        elif how == 2:
            del data[start : min(end, start + 20)]
        elif how == 3:
            data[start:start] = data[start:end][:500]
        else:
            rows = bytes(data).split(b"\r\n")
            chance.shuffle(rows)
            data = bytearray(b"\r\n".join(rows))
    return bytes(data)


@pytest.mark.parametrize("seed", range(20))
def test_mutated_dialogues(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(80):
        data = mutated(chance)
        outcome = Outcome([data])
        check(outcome, data)
        if b"STARTTLS" not in data.upper():  # what is thrown away there depends on the pieces
            at = [chance.randrange(1 << 20) for _ in range(8)]
            assert Outcome(cut(data, at)).said == outcome.said


# Commands in any order

GOOD, BAD = base64(b"\0joe\0secret"), base64(b"\0eve\0secret")


class Model:
    """What is known of a session, and which codes its commands are answered with."""

    def __init__(self, auth_required: bool) -> None:
        self.auth_required = auth_required
        self.recipients: int | None = None  # None where there is no transaction
        self.is_authenticated = self.is_encrypted = False
        self.queues = self.auth_failures = self.bad_commands = 0

    def is_over(self) -> bool:
        """Whether a limit of the defaults is reached."""
        return self.auth_failures >= 3 or self.bad_commands >= 20

    def turn(self) -> list[int]:
        self.bad_commands += 1
        return [502]

    def hello(self) -> list[int]:
        self.recipients = None
        return [250]

    def mail(self) -> list[int]:
        if self.auth_required and not self.is_authenticated:
            return [530]
        self.recipients = 0
        return [250]

    def rcpt(self, is_ours: bool) -> list[int]:
        if self.recipients is None:
            return [503]
        if not is_ours and not self.is_authenticated:
            return [553]
        self.recipients += 1
        return [250]

    def data(self) -> list[int]:
        if not self.recipients:
            text = self.turn()  # and what was meant for a message are commands
            return [503, *text, *([] if self.is_over() else self.turn())]
        self.recipients = None
        self.queues += 1
        return [354, 250 if self.queues % 3 else 451]

    def auth(self, is_good: bool) -> list[int]:
        if self.is_authenticated or self.recipients is not None:
            return [503]
        self.is_authenticated = is_good
        self.auth_failures += not is_good
        return [235 if is_good else 535]

    def starttls(self) -> list[int]:
        if self.is_encrypted:
            return self.turn()
        self.recipients = None
        self.is_authenticated, self.is_encrypted = False, True
        return [220]


COMMANDS = {
    b"HELO x": Model.hello,
    b"EHLO x": Model.hello,
    b"RSET": Model.hello,
    b"MAIL FROM:<a@example.com>": Model.mail,
    b"RCPT TO:<u@here.example>": lambda model: model.rcpt(is_ours=True),
    b"RCPT TO:<u@elsewhere.example>": lambda model: model.rcpt(is_ours=False),
    b"DATA\r\ntext\r\n.": Model.data,
    b"AUTH PLAIN " + GOOD: lambda model: model.auth(is_good=True),
    b"AUTH PLAIN " + BAD: lambda model: model.auth(is_good=False),
    b"STARTTLS": Model.starttls,
    b"NOOP": lambda model: [250],
    b"VRFY x": lambda model: [252],
    b"HELP": lambda model: [214],
    b"TURN": Model.turn,
}


@given(st.lists(st.sampled_from(list(COMMANDS)), max_size=40), st.booleans())
@examples(600)
def test_commands_in_any_order(order: list[bytes], auth_required: bool) -> None:
    session, _ = open_session(smtpauth=b"!" if auth_required else b"")
    model = Model(auth_required)
    for command in order:
        wanted = COMMANDS[command](model) + ([421] if model.is_over() else [])
        assert grammar.codes(all_replies(session, command + b"\r\n")) == wanted, command
        if model.is_over():
            assert session.state == CLOSED
            return
        if session.state == TLS_HANDSHAKE:
            session.tls_started(b"CIPHER")
