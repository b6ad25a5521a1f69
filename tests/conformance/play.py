"""Take a case through a client, whatever that is connected to, and compare what came of it."""

from __future__ import annotations

import time

from .cases import Case, Step
from .client import Client
from .stage import Record
from .words import Words

EARLY = 0.2
"""Seconds by which a reply may come sooner than a step says: the server's clock began before."""


def play(case: Case, client: Client, words: Words) -> None:
    """Take all steps, and compare what the client gets to see: replies, times, the end."""
    for step in case.steps:
        if step.handshake is not None:
            outcome = client.start_tls(**step.handshake)
            assert outcome == step.outcome, step
            assert step.cipher in (None, client.cipher), step
        else:
            _take(step, client, words)
    if client.ended and not case.eof:
        return  # we closed the connection ourselves
    assert client.read_to_end() == b"", "more than the replies to the last step"
    assert client.close_notify == bool(case.close_notify)


def _take(step: Step, client: Client, words: Words) -> None:
    began = time.monotonic()
    if step.answer:
        client.send(words.answer(**step.answer))
    client.send(*step.writes)
    if step.close:
        client.close(step.close)
    time.sleep(step.wait)
    replies = []
    for _ in step.replies:
        reply = client.reply()
        replies.append(reply if reply is None else words.in_reply(reply))
    assert replies == step.replies, step
    took = time.monotonic() - began
    assert took >= step.after - EARLY, f"{step}: too soon"
    assert step.before is None or took <= step.before, f"{step}: too late"


def compare_records(
    case: Case,
    deliveries: list[Record],
    checks: list[Record],
    programs: dict[str, str],
    words: Words,
    cipher: str | None,
) -> None:
    """Compare what qmail-queue and checkpassword were given; `programs` are those of the stage."""
    assert len(deliveries) == len(case.messages)
    for delivery, message in zip(deliveries, case.messages):
        assert delivery.read[1] == message["envelope"]
        assert delivery.client == message["env"]
        if "message" in message:  # how much there is of one that was given up is not said
            assert words.in_message(delivery.read[0], cipher) == message["message"]
    assert len(checks) == len(case.auth)
    names = {path: name for name, path in programs.items()}
    for check, expected in zip(checks, case.auth):
        assert words.in_credentials(check.read[3]) == expected["fd3"]
        assert [names.get(word, word) for word in check.argv] == expected["argv"]
        assert check.client == expected["env"]
