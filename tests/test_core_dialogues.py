"""Every recorded dialogue, replayed on the session itself: whole, and octet by octet.

Whole: all that a client can send without waiting for an answer goes in at once.  Octet by octet:
the replies to a step must come with its last octet, not with a later one.  Both give the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from conformance import cases
from conformance.cases import Case, Step
from conformance.grammar import split
from conformance.planned import CIPHER, NOW, Rehearsal
from conformance.play import compare_records
from conformance.stage import Stage
from conformance.words import Words
from conformance.world import all_replies

from qmail_smtpd_py.effects import ControlError
from qmail_smtpd_py.session import CLOSED

LEFT_TO_THE_PROGRAM = {
    "queue-early-0": "what a pipe does whose reader has gone",
    "queue-early-31": "what a pipe does whose reader has gone",
    "queue-early-53": "what a pipe does whose reader has gone",
    "smtps-ciphers-unreadable": "TLS is refused before there is a session",
    "smtps-no-cert": "TLS is refused before there is a session",
    "smtps-no-key": "TLS is refused before there is a session",
}
"""Cases that say nothing of the session, and why; test_program_dialogues has them all."""

WITHOUT_SESSION = {"421 unable to read controls (#4.3.0)"}
"""The only reply where control files do not let a session begin."""


class Turn(NamedTuple):
    """What the client does, sends, and is answered before it goes on."""

    step: Step
    data: bytes
    replies: list[str]


def turns(case: Case, joined: bool) -> list[Turn]:
    """The case as turns: a step each, or joined as far as a client need not wait.

    It waits for a challenge, a handshake and the clock; and what is sent behind STARTTLS is thrown
    away.
    """
    result: list[Turn] = []
    for step in case.steps:
        turn = Turn(step, b"".join(step.writes), step.replies)
        if joined and result and _need_not_wait(result[-1], step):
            before = result.pop()
            turn = Turn(before.step, before.data + turn.data, before.replies + turn.replies)
        result.append(turn)
    return result


def _need_not_wait(before: Turn, step: Step) -> bool:
    waits = step.answer or step.close or step.wait or step.is_silence or step.handshake is not None
    return not waits and b"STARTTLS" not in before.data.upper()


class Replay:
    """One replay of a case: what was said, reply by reply and octet by octet."""

    def __init__(self, case: Case, stage: Stage) -> None:
        self.rehearsal = Rehearsal(case, stage)
        self.words = Words(stage.env, NOW, self.rehearsal.server.queued_by)
        self.said = b""

    def take(self, turn: Turn, cut: int) -> list[str]:
        """Take a turn, its data in pieces of `cut` octets; the replies, with words in them."""
        said = self.rehearsal.take(turn.step)
        if turn.replies:
            said += self.rehearsal.greet()
        data = self.words.answer(**turn.step.answer) if turn.step.answer else b""
        for piece in pieces(data + turn.data, cut):
            said += all_replies(self.rehearsal.session, piece)
        self.said += said
        return [self.words.in_reply(reply) for reply in split(said)]


def pieces(data: bytes, size: int) -> list[bytes]:
    """The data in pieces, but what stands behind STARTTLS in one with the end of its line.

    What is thrown away is what came with STARTTLS: here a cut makes a difference.
    """
    found = re.search(rb"(?i)STARTTLS.*\r", data)
    end = found.end() if found else len(data)
    cut = [data[at : min(at + size, end)] for at in range(0, end, size)]
    return [*cut, data[end:]] if found else cut


def replay(case: Case, stage: Stage, joined: bool, cut: int) -> bytes:
    """Replay a case, compare all that can be seen, and return all that was said."""
    played = Replay(case, stage)
    for turn in turns(case, joined):
        assert played.take(turn, cut) == turn.replies, turn.step
    session, server = played.rehearsal.session, played.rehearsal.server
    hung_up = any(step.close for step in case.steps)
    assert (session.state == CLOSED) == (case.eof or hung_up)
    played.rehearsal.end()
    assert session.exit_status == case.status
    cipher = CIPHER.decode()
    compare_records(case, server.deliveries, server.checks, stage.programs, played.words, cipher)
    return played.said


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name)
        for case in cases.ALL
        if case.name not in LEFT_TO_THE_PROGRAM
    ],
)
def test_dialogue(
    case: Case, tmp_path: Path, recorder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage.of(case, tmp_path, recorder)
    monkeypatch.chdir(stage.home)
    if set(case.steps[0].replies) == WITHOUT_SESSION:
        with pytest.raises(ControlError):
            Replay(case, stage)
        return
    whole = replay(case, stage, joined=True, cut=1 << 30)
    octet_by_octet = replay(case, stage, joined=False, cut=1)
    assert octet_by_octet == whole


def test_all_that_is_left_out_exists() -> None:
    assert set(LEFT_TO_THE_PROGRAM) <= {case.name for case in cases.ALL}
