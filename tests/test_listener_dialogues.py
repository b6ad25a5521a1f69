"""Every recorded dialogue through the listener, over TCP, all of them in one and the same worker.

What a case says of the environment comes as a rule of tcprules, its home directory among it; so
each connection has another home, other control files and another certificate than the one before.
A session that follows all others in a worker must be what it would be in a process of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from conformance import cases
from conformance.cases import Case
from conformance.cdb_writer import make_cdb
from conformance.play import compare_records, play
from conformance.stage import Stage
from conformance.words import Words
from listener.listening import Listening

ALWAYS_TOLD = {"TCPREMOTEIP", "TCPLOCALHOST"}
"""Variables that no connection over TCP is without: whoever listens knows the client's address, and
has a name.  Cases without them are the one-shot program's alone.
"""


class Theatre:
    """A listener with one worker for many stages: `arguments` are those that it was started with.

    The check program in them is that of whatever stage `current` leads to.
    """

    def __init__(self, directory: Path, recorder: Path, arguments: list[str]) -> None:
        self._recorder = recorder
        self._directory = directory
        self._current = directory / "current"
        self._rules = directory / "rules.cdb"
        self._played = 0
        self._put_rules({})
        lobby = Stage(self._make("lobby"), recorder)
        self.programs = {
            **lobby.programs,
            "@checkpassword": str(self._current / "tools" / "checkpassword"),
        }
        lobby.args = [self.programs.get(word, word) for word in arguments]
        del lobby.env["QMAILQUEUE"]
        once_for_all = ["-c", "1", "--max-use=1000000", "--max-age=1000000"]
        self.listener = Listening(lobby, *once_for_all, "-x", str(self._rules))

    def _make(self, name: str) -> Path:
        path = self._directory / name
        path.mkdir()
        return path

    def _put_rules(self, env: dict[str, str]) -> None:
        """Rules that set these variables for everybody, in the place of those that there are."""
        variables = b"".join(
            b"+%s=%s\0" % (name.encode(), value.encode("latin-1")) for name, value in env.items()
        )
        new = self._rules.with_suffix(".new")
        new.write_bytes(make_cdb({b"": variables}))
        new.replace(self._rules)

    def play(self, case: Case) -> None:
        """Play a case, and compare all that comes of it."""
        self._played += 1
        directory = self._make(f"{self._played}-{case.name}")
        stage = Stage.of(case, directory, self._recorder)
        self._current.unlink(missing_ok=True)
        self._current.symlink_to(directory)
        self._put_rules({name: value for name, value in stage.env.items() if name != "PATH"})
        words = Words(stage.env, time.time(), stage.queued_by)
        client = self.listener.connect()
        try:
            play(case, client, words)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.listener.log.text()}") from None
        [(self.worker, status)] = self.listener.ends()
        if not client.ended:
            client.connection.close()
        assert status == case.status
        cipher = client.cipher
        compare_records(case, stage.deliveries(), stage.checks(), self.programs, words, cipher)


Theatres = Callable[[Case], Theatre]


@pytest.fixture(scope="module")
def theatres(
    recorder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Theatre]]:
    """The theatre for a case: one for each set of arguments."""
    found: dict[tuple[str, ...], Theatre] = {}

    def theatre_for(case: Case) -> Theatre:
        arguments = tuple(case.args)
        if arguments not in found:
            directory = tmp_path_factory.mktemp("theatre")
            found[arguments] = Theatre(directory, recorder, case.args)
        return found[arguments]

    yield theatre_for
    for theatre in found.values():
        with theatre.listener:
            pass


OVER_TCP = [case for case in cases.ALL if set(case.env) >= ALWAYS_TOLD]


def parameter(case: Case) -> object:
    marks = [pytest.mark.tls] if case.uses_tls else []
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [parameter(case) for case in OVER_TCP])
def test_dialogue(case: Case, theatres: Theatres) -> None:
    theatres(case).play(case)


@pytest.mark.tls
@pytest.mark.parametrize("seed", range(2))
def test_dialogues_in_any_order(seed: int, theatres: Theatres) -> None:
    quick = [case for case in OVER_TCP if not waits(case)]
    order = random.Random(seed).choices(quick, k=120)
    workers = {}
    for number, case in enumerate(order):
        theatre = theatres(case)
        try:
            theatre.play(case)
        except AssertionError as error:
            before = [earlier.name for earlier in order[:number]]
            raise AssertionError(f"{case.name} after {before}: {error}") from None
        assert workers.setdefault(theatre, theatre.worker) == theatre.worker


def waits(case: Case) -> bool:
    """Whether it takes its time: so does the answer to a wrong password."""
    refused = "535 authentication failed (#5.7.1)"
    return any(step.after or step.wait or refused in step.replies for step in case.steps)
