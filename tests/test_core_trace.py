"""The Received field: facts in their places, and nothing of a client's can forge it."""

from __future__ import annotations

import email.policy
import email.utils
import re
import sys
from email.parser import BytesParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmail_smtpd_py import trace
from qmail_smtpd_py.connection import Connection

NOW = 1700000000


def received(
    environ: dict[bytes, bytes],
    info: bytes | None = None,
    helo: bytes | None = None,
    protocol: bytes = b"SMTP",
) -> bytes:
    return trace.received(Connection(environ), info, helo, protocol, trace.date(NOW))


TCP = {
    b"TCPREMOTEHOST": b"client.example.com",
    b"TCPREMOTEIP": b"192.0.2.25",
    b"TCPLOCALHOST": b"mx.example.org",
    b"TCPLOCALIP": b"192.0.2.1",
}
END = b"  by mx.example.org with SMTP; 14 Nov 2023 22:13:20 -0000\n"


@pytest.mark.parametrize(
    ("info", "helo", "first"),
    [
        (None, None, b"from client.example.com (192.0.2.25)"),
        (None, b"me", b"from client.example.com (HELO me) (192.0.2.25)"),
        (b"joe", None, b"from client.example.com (joe@192.0.2.25)"),
        (b"joe", b"me", b"from client.example.com (HELO me) (joe@192.0.2.25)"),
        (b"", b"", b"from client.example.com (HELO ) (@192.0.2.25)"),
        (b"jo e", b"m(e)", b"from client.example.com (HELO m?e?) (jo?e@192.0.2.25)"),
    ],
)
def test_received(info: bytes | None, helo: bytes | None, first: bytes) -> None:
    assert received(TCP, info, helo) == b"Received: " + first + b"\n" + END


def test_what_tcpserver_did_not_tell_is_unknown() -> None:
    assert received({}) == b"Received: from unknown (unknown)\n" + END.replace(
        b"mx.example.org", b"unknown"
    )
    assert b"by 192.0.2.1 with" in received({b"TCPLOCALIP": b"192.0.2.1"})


@pytest.mark.parametrize(
    ("told", "ip"),
    [
        (b"2001:db8::25", b"2001:db8::25"),
        (b"fe80::25%eth0", b"fe80::25%eth0"),
        (b"::ffff:192.0.2.25", b"192.0.2.25"),
        (b"::FFFF:192.0.2.25", b"192.0.2.25"),
        (b"::ffff:0", b"::ffff:0"),
        (b"::192.0.2.25", b"::192.0.2.25"),
    ],
)
def test_an_ipv4_address_in_the_clothes_of_ipv6_is_what_it_is(told: bytes, ip: bytes) -> None:
    field = received({b"TCPREMOTEIP": told, b"TCPLOCALIP": told}, b"joe")
    assert field.startswith(b"Received: from unknown (joe@%s)\n  by %s with" % (ip, ip))


octets = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"x\r\nX-Forged: yes", b"x)\n(", b"; now", b"a\0b", b"\\"]),
)


@given(octets, octets, octets, octets)
@example(b"x\nSubject: forged", b"(", b")", b";")
def test_no_octet_forges_anything(host: bytes, ip: bytes, info: bytes, helo: bytes) -> None:
    field = received(
        {b"TCPREMOTEHOST": host, b"TCPREMOTEIP": ip, b"TCPLOCALHOST": host}, info, helo
    )
    word = rb"[A-Za-z0-9.@%+/=:?-]*"
    assert re.fullmatch(
        rb"Received: from " + word + rb" \(HELO " + word + rb"\) \(" + word + rb"\)\n"
        rb"  by " + word + rb" with SMTP; 14 Nov 2023 22:13:20 -0000\n",
        field,
    )


def test_another_parser_sees_one_field() -> None:
    field = received(TCP, b"joe", b"x\nX-Forged: 1") + b"Subject: hello\n\n"
    message = BytesParser(policy=email.policy.default).parsebytes(field)
    assert message.keys() == ["Received", "Subject"]


@pytest.mark.parametrize(
    ("cipher", "authenticated", "certificate", "protocol"),
    [
        (None, False, None, b"SMTP"),
        (None, True, None, b"ESMTPA"),
        (b"TLS_AES_256_GCM_SHA384", False, None, b"ESMTPS (TLS_AES_256_GCM_SHA384 encrypted)"),
        (b"A-B", True, None, b"ESMTPSA (A-B encrypted, authenticated)"),
        (b"A-B", False, b"a@b.example", b"ESMTPS (A-B encrypted)\n  (cert a@b.example)"),
        (b"A-B", False, b"a\nb (c)", b"ESMTPS (A-B encrypted)\n  (cert a?b??c?)"),
        (b"A(B", False, None, b"ESMTPS (A?B encrypted)"),
    ],
)
def test_protocol(
    cipher: bytes | None, authenticated: bool, certificate: bytes | None, protocol: bytes
) -> None:
    assert trace.protocol(cipher, authenticated, certificate) == protocol


@given(st.integers(0, 4_000_000_000 if sys.maxsize > 2**32 else 2**31 - 1))
def test_a_date_says_when_it_was(now: int) -> None:
    text = trace.date(now).decode()
    assert text.endswith(" -0000")
    assert email.utils.parsedate_to_datetime(text.replace("-0000", "+0000")).timestamp() == now


@pytest.mark.parametrize(
    ("now", "text"),
    [(0, b"1 Jan 1970 00:00:00 -0000"), (951782399, b"28 Feb 2000 23:59:59 -0000")],
)
def test_date(now: int, text: bytes) -> None:
    assert trace.date(now) == text
