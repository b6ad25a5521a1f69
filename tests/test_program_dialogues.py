"""Every recorded dialogue, played with the program over a socketpair and over two pipes.

Where that was done with another interpreter, a socketpair is enough.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conformance import cases
from conformance.cases import Case
from conformance.play import compare_records, play
from conformance.program import Program
from conformance.stage import Stage
from conformance.transport import TRANSPORTS
from conformance.words import Words
from examples import IS_AGAIN

CASES = [
    pytest.param(case, id=case.name, marks=pytest.mark.tls if case.uses_tls else ())
    for case in cases.ALL
]


@pytest.mark.parametrize("transport", ["socketpair"] if IS_AGAIN else ["socketpair", "pipes"])
@pytest.mark.parametrize("case", CASES)
def test_dialogue(case: Case, transport: str, tmp_path: Path, recorder: Path) -> None:
    stage = Stage.of(case, tmp_path, recorder)
    words = Words(stage.env, time.time(), stage.queued_by)
    with Program(stage, TRANSPORTS[transport]) as program:
        play(case, program.client, words)
        assert program.wait() == case.status
    cipher = program.client.cipher
    compare_records(case, stage.deliveries(), stage.checks(), stage.programs, words, cipher)
    assert b"Traceback" not in program.log
    assert b"internal error" not in program.log
