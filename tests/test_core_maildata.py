"""Mail data, against a model that goes octet by octet.

The model is RFC 5321 sections 2.3.8, 4.1.1.4 and 4.5.2 as a table, with what qmail makes of them:
a line feed without its carriage return ends everything, and a dot before a carriage return that
ends no line stays.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
from examples import examples
from hypothesis import example, given
from hypothesis import strategies as st

from qmail_smtpd_py.maildata import MailData

LINE_START, INSIDE, AFTER_CR, AFTER_DOT, AFTER_DOT_CR = range(5)
STRAY, END, MORE = "stray newline", "end", "more"
CR, LF, DOT, OTHER = b"\r", b"\n", b".", b""
ITSELF = b"?"

# (where we are, the octet): what that adds to the message, and where we are then.
TABLE = {
    (LINE_START, CR): (b"", AFTER_CR),
    (LINE_START, LF): STRAY,
    (LINE_START, DOT): (b"", AFTER_DOT),
    (LINE_START, OTHER): (ITSELF, INSIDE),
    (INSIDE, CR): (b"", AFTER_CR),
    (INSIDE, LF): STRAY,
    (INSIDE, DOT): (ITSELF, INSIDE),
    (INSIDE, OTHER): (ITSELF, INSIDE),
    (AFTER_CR, CR): (b"\r", AFTER_CR),
    (AFTER_CR, LF): (b"\n", LINE_START),
    (AFTER_CR, DOT): (b"\r" + ITSELF, INSIDE),
    (AFTER_CR, OTHER): (b"\r" + ITSELF, INSIDE),
    (AFTER_DOT, CR): (b"", AFTER_DOT_CR),
    (AFTER_DOT, LF): STRAY,
    (AFTER_DOT, DOT): (ITSELF, INSIDE),
    (AFTER_DOT, OTHER): (ITSELF, INSIDE),
    (AFTER_DOT_CR, CR): (b".\r", AFTER_CR),
    (AFTER_DOT_CR, LF): END,
    (AFTER_DOT_CR, DOT): (b".\r" + ITSELF, INSIDE),
    (AFTER_DOT_CR, OTHER): (b".\r" + ITSELF, INSIDE),
}


class Read(NamedTuple):
    """What comes of some octets."""

    outcome: str
    message: bytes
    rest: bytes
    hops: int


def model(data: bytes) -> Read:
    state, message = LINE_START, bytearray()
    for at in range(len(data)):
        octet = data[at : at + 1]
        then = TABLE[state, octet if octet in (CR, LF, DOT) else OTHER]
        if isinstance(then, str):
            rest = data[at + 1 :] if then == END else b""
            return Read(then, bytes(message), rest, hops_in(data[: at + 1]))
        added, state = then
        message += added.replace(ITSELF, octet)
    return Read(MORE, bytes(message), b"", hops_in(data))


def hops_in(data: bytes) -> int:
    hops = 0
    for line in data.split(b"\n"):
        if line == b"\r":
            break
        hops += line.lower().startswith((b"received", b"delivered"))
    return hops


def read(pieces: list[bytes]) -> tuple[MailData, bytes, bytes]:
    """The reader after all the pieces, the message, and what it was not given."""
    reader, message = MailData(), b""
    for number, piece in enumerate(pieces):
        message += reader.receive(piece)
        if reader.complete or reader.stray_newline:
            return reader, message, b"".join(pieces[number + 1 :])
    return reader, message, b""


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted(at % (len(data) + 1) for at in cuts)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)])]


def compare(data: bytes, pieces: list[bytes]) -> None:
    wanted = model(data)
    reader, message, untouched = read(pieces)
    assert reader.complete == (wanted.outcome == END)
    assert reader.stray_newline == (wanted.outcome == STRAY)
    if wanted.outcome == STRAY:
        return  # whatever of it went to qmail-queue is taken back
    assert reader.size == len(message)
    if wanted.outcome == END:
        assert message == wanted.message
        assert reader.rest + untouched == wanted.rest
        assert reader.hops == wanted.hops
    else:
        assert wanted.message.startswith(message)
        assert len(wanted.message) - len(message) <= 2, "more is kept back than could be the end"


tokens = st.sampled_from(
    [b"\r\n"] * 4
    + [b"\r", b".", b".", b"..", b"x", b"text", b"\r\n.\r\n", b"\r\n.\r", b"\r\n\r\n", b"\r\r\n"]
    + [b"Received: x", b"received", b"DeliVered", b"Receive", b"\xe9\x85\xff\x00", b"y" * 40]
)
dialogues = st.one_of(
    st.lists(tokens, max_size=20).map(b"".join),
    st.lists(st.one_of(tokens, st.just(b"\n")), max_size=20).map(b"".join),
    st.binary(max_size=60),
)


@given(dialogues, st.lists(st.integers(0, 1 << 16), max_size=8))
@examples(3000)
@example(b"\r\n.\r\nQUIT\r\n", [3])
@example(b"Received: a\r\nReceived: b\r\n\r\nReceived: c\r\n.\r\n", [8, 9, 21, 22])
def test_any_chunking_agrees_with_the_model(data: bytes, cuts: list[int]) -> None:
    compare(data, cut(data, cuts))


@pytest.mark.parametrize("length", range(8))
def test_all_short_strings_agree_with_the_model(length: int) -> None:
    """Whole, octet by octet, and cut in two at each place."""
    for data in map(b"".join, product((b"\r", b"\n", b".", b"x"), repeat=length)):
        compare(data, [data])
        compare(data, [data[at : at + 1] for at in range(length)])
        if length < 7:
            for at in range(1, length):
                compare(data, [data[:at], data[at:]])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 10, 11, 64, 1000])
@pytest.mark.parametrize("hop", [b"Received", b"RECEIVED", b"delivered", b"DeliVered-To: x"])
def test_hops_are_counted_whatever_the_pieces(hop: bytes, size: int) -> None:
    header = b"".join(
        hop + b": %d\r\nX: Received\r\n Received\r\n" % number for number in range(50)
    )
    data = header + b"\r\n" + hop + b"\r\n.\r\n"
    reader, _, _ = read([data[at : at + size] for at in range(0, len(data), size)])
    assert (reader.complete, reader.hops) == (True, 50)


def test_every_octet_but_the_line_feed_arrives_as_it_came() -> None:
    octets = bytes(octet for octet in range(256) if octet not in b"\r\n")
    lines = b"\r\n".join(bytes([octet]) + octets for octet in octets if octet != ord("."))
    reader, message, _ = read([lines + b"\r\n.\r\n"])
    assert reader.complete
    assert message == lines.replace(b"\r\n", b"\n") + b"\n"
