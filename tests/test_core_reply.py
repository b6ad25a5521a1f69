"""Replies as octets, and all the constants seen together."""

from __future__ import annotations

import re

import pytest
from conformance import grammar

from qmail_smtpd_py import qmail_queue, reply
from qmail_smtpd_py.reply import Reply

NAMED = {name: value for name, value in vars(reply).items() if isinstance(value, Reply)}
FROM_THE_QUEUE = [
    *qmail_queue.REPLIES.values(),
    *(value for value in vars(qmail_queue).values() if isinstance(value, Reply)),
]


@pytest.mark.parametrize(
    ("answer", "octets"),
    [
        (Reply(250, b"ok"), b"250 ok\r\n"),
        (Reply(250, b"a", b"b"), b"250-a\r\n250 b\r\n"),
        (Reply(250, b"a", b"b", b"c"), b"250-a\r\n250-b\r\n250 c\r\n"),
        (Reply(334, b""), b"334 \r\n"),
    ],
)
def test_render(answer: Reply, octets: bytes) -> None:
    assert answer.render() == octets


@pytest.mark.parametrize("answer", [*NAMED.values(), *FROM_THE_QUEUE], ids=repr)
def test_every_reply_is_one_of_the_grammar(answer: Reply) -> None:
    assert grammar.codes(answer.render()) == [answer.code]


@pytest.mark.parametrize("answer", [*NAMED.values(), *FROM_THE_QUEUE], ids=repr)
def test_enhanced_status_codes_are_of_the_class_of_the_code(answer: Reply) -> None:
    """RFC 3463 section 3: temporary is 4, permanent 5, as in the reply code."""
    enhanced = re.findall(rb"\(#(\d)\.\d\.\d\)", answer.lines[-1])
    assert enhanced in ([], [b"%d" % (answer.code // 100)])


def test_what_hangs_up() -> None:
    assert {name for name, value in NAMED.items() if value.final} == {
        *("AUTH_NEEDS_TLS", "CONTROLS_UNREADABLE", "OUT_OF_MEMORY", "STRAY_NEWLINE", "TIMEOUT"),
        *("NOT_SMTP", "SPOKE_TOO_EARLY", "TOO_SLOW", "SESSION_TOO_LONG"),
        *("TOO_MANY_AUTH_FAILURES", "TOO_MANY_BAD_COMMANDS", "TOO_MANY_BAD_RECIPIENTS"),
    }
    assert reply.goodbye(b"mx.example.org").final


@pytest.mark.parametrize(
    ("answer", "octets"),
    [
        (reply.greeting(b"mx.example.org"), b"220 mx.example.org ESMTP\r\n"),
        (reply.goodbye(b"mx.example.org"), b"221 mx.example.org\r\n"),
        (reply.challenge(b"VXNlcm5hbWU6"), b"334 VXNlcm5hbWU6\r\n"),
        (reply.accepted(1700000000, 4711), b"250 ok 1700000000 qp 4711\r\n"),
        (
            reply.relaying_denied(tls=False),
            b"553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)\r\n",
        ),
        (
            reply.relaying_denied(tls=True, reason=b"certificate has expired"),
            b"553 sorry, that domain isn't in my list of allowed rcpthosts; "
            b"no valid cert for gatewaying: certificate has expired (#5.7.1)\r\n",
        ),
        (
            reply.tls_unavailable(b"missing certificate", b"No such file or directory"),
            b"454 TLS missing certificate: No such file or directory (#4.3.0)\r\n",
        ),
        (reply.tls_unavailable(b"not available"), b"454 TLS not available (#4.3.0)\r\n"),
    ],
)
def test_replies_that_differ_from_session_to_session(answer: Reply, octets: bytes) -> None:
    assert answer.render() == octets


@pytest.mark.parametrize("status", range(256))
def test_every_exit_status_of_qmail_queue_has_a_reply(status: int) -> None:
    """Permanent are 11 to 40 and 115, as in qmail.c; 0 alone is success; all else may pass."""
    answer = qmail_queue.reply_to(status)
    if status == 0:
        assert answer is None
    else:
        permanent = 11 <= status <= 40 or status == 115
        assert answer is not None
        assert answer.code == (554 if permanent else 451)


@pytest.mark.parametrize(("status", "answer"), qmail_queue.REPLIES.items())
def test_known_exit_statuses_have_words_of_their_own(status: int, answer: Reply) -> None:
    assert qmail_queue.reply_to(status) is answer
    assert answer not in (qmail_queue.PERMANENT, qmail_queue.TEMPORARY)
