"""AUTH mechanisms as generators, and what SMTPAUTH stands for."""

from __future__ import annotations

import re
from binascii import b2a_base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmail_smtpd_py import sasl

CHALLENGE = b"<1896.697170952@postoffice.example.net>"  # that of RFC 2195 section 3, renamed


def base64(octets: bytes) -> bytes:
    return b2a_base64(octets, newline=False)


def run(
    mechanism: bytes, initial: bytes | None, *responses: bytes
) -> tuple[list[bytes], sasl.Credentials]:
    """The challenges and the credentials of an exchange."""
    exchange = sasl.MECHANISMS[mechanism](initial, lambda: CHALLENGE)
    challenges = []
    try:
        challenges.append(next(exchange))
        for response in responses:
            challenges.append(exchange.send(response))
    except StopIteration as end:
        return challenges, end.value
    raise AssertionError("the exchange wants more")


def triple(credentials: sasl.Credentials) -> tuple[bytes, bytes, bytes]:
    return credentials.user, credentials.secret, credentials.challenge


fields = st.binary(min_size=1, max_size=60).map(lambda octets: octets.replace(b"\0", b"x"))


@given(fields, fields, st.binary(max_size=20).map(lambda octets: octets.replace(b"\0", b"z")))
def test_plain_and_login_pass_octets_on_as_they_are(user: bytes, secret: bytes, as_: bytes) -> None:
    response = base64(b"%s\0%s\0%s" % (as_, user, secret))
    assert run(b"PLAIN", response)[0] == []
    assert triple(run(b"PLAIN", response)[1]) == (user, secret, b"")
    assert run(b"PLAIN", None, response)[0] == [b""]
    assert triple(run(b"PLAIN", None, response)[1]) == (user, secret, b"")
    challenges, credentials = run(b"LOGIN", None, base64(user), base64(secret))
    assert challenges == [b"Username:", b"Password:"]
    assert triple(credentials) == (user, secret, b"")
    challenges, credentials = run(b"LOGIN", base64(user), base64(secret))
    assert challenges == [b"Password:"]
    assert triple(credentials) == (user, secret, b"")


@given(fields)
def test_cram_md5_parts_at_the_last_blank(user: bytes) -> None:
    digest = b"b913a602c7eda7a495b4e6e7334d3890"
    challenges, credentials = run(b"CRAM-MD5", b"ignored", base64(user + b" " + digest))
    assert challenges == [CHALLENGE]
    assert triple(credentials) == (user, digest, CHALLENGE)


def is_base64(text: bytes) -> bool:
    """RFC 4648 section 4, without line ends."""
    digit = rb"[A-Za-z0-9+/]"
    final = digit + rb"{2}==|" + digit + rb"{3}="
    return bool(re.fullmatch(rb"(?:" + digit + rb"{4})*(?:" + final + rb")?", text))


texts = st.one_of(
    st.text("ABab01+/=", max_size=12).map(str.encode),
    st.binary(max_size=12),
    st.binary(max_size=12).map(base64),
)


@given(texts)
@example(b"=")
@example(b"====")
@example(b"AAAA====")
@example(b"AGEAYg==\n")
@example(b" AGEAYg==")
def test_what_is_no_base64_is_malformed(text: bytes) -> None:
    """As the user, the answer is the password prompt, or nothing at all."""
    exchange = sasl.MECHANISMS[b"LOGIN"](text, lambda: CHALLENGE)
    if is_base64(text) and text and b"\0" not in decoded(text):
        assert next(exchange) == b"Password:"
    else:
        with pytest.raises(sasl.Malformed):
            next(exchange)


def decoded(text: bytes) -> bytes:
    bits = "".join(f"{_DIGITS.index(digit):06b}" for digit in text.rstrip(b"="))
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) // 8 * 8, 8))


_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@pytest.mark.parametrize(
    ("mechanism", "responses"),
    [
        (b"PLAIN", [b""]),
        (b"PLAIN", [b"user\0secret"]),
        (b"PLAIN", [b"\0user"]),
        (b"PLAIN", [b"\0user\0"]),
        (b"PLAIN", [b"\0\0secret"]),
        (b"PLAIN", [b"\0\0"]),
        (b"LOGIN", [b"", b"secret"]),
        (b"LOGIN", [b"user", b""]),
        (b"LOGIN", [b"us\0er", b"secret"]),
        (b"LOGIN", [b"user", b"sec\0ret"]),
        (b"CRAM-MD5", [b""]),
        (b"CRAM-MD5", [b"user"]),
        (b"CRAM-MD5", [b"user "]),
        (b"CRAM-MD5", [b" digest"]),
        (b"CRAM-MD5", [b"user\0x digest"]),
        (b"CRAM-MD5", [b"user digest\0x"]),
    ],
)
def test_malformed(mechanism: bytes, responses: list[bytes]) -> None:
    with pytest.raises(sasl.Malformed) as caught:
        run(mechanism, None, *map(base64, responses))
    assert str(caught.value) == "", "an error may end up in a log: it says nothing of what was sent"


def test_credentials_show_nothing() -> None:
    credentials = sasl.Credentials(b"user", b"sesame")
    assert "sesame" not in repr(credentials) + str(credentials)
