"""What qmail-smtpd-check found: facts, problems with their remedies, what was not understood.

A report is text for people, one line a fact and the problems last, or JSON for programs; and it is
how the child that has given up its privileges tells its parent.  qmail-smtpd-check(8) documents the
JSON.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FINE, WARNED, FAILED = 0, 1, 2
"""Exit statuses: nothing to do, warnings only, errors."""

WARNING, ERROR = "warning", "error"

_NAME_WIDTH = 13
_LEVEL_WIDTH = 9
_WIDTH = 100


class Report:
    """Facts, problems and notes in the order in which they were found.

    A fact is a name, a text and values for programs.  A problem has a level, a code that stays the
    same from version to version, what is wrong, its cause where that is not said by it, and its
    remedy.  A note is something that was not understood.
    """

    def __init__(self) -> None:
        self.facts: list[dict[str, object]] = []
        self.problems: list[dict[str, str]] = []
        self.notes: list[str] = []

    def fact(self, name: str, text: str, **values: object) -> None:
        """Something that is on, off, or so."""
        self.facts.append({"name": name, "text": printable(text), **values})

    def warning(self, code: str, what: str, remedy: str, cause: str = "") -> None:
        """Something that is probably not meant, or will be a problem."""
        self._problem(WARNING, code, what, remedy, cause)

    def error(self, code: str, what: str, remedy: str, cause: str = "") -> None:
        """Something that does not work, or opens the host to strangers."""
        self._problem(ERROR, code, what, remedy, cause)

    def _problem(self, level: str, code: str, what: str, remedy: str, cause: str) -> None:
        words = {"what": what, "cause": cause, "remedy": remedy}
        texts = {name: printable(text) for name, text in words.items()}
        problem = {"level": level, "code": code, **texts}
        if problem not in self.problems:  # two ways can lead to the same
            self.problems.append(problem)

    def note(self, text: str) -> None:
        """Something that was not understood, and so is not part of what was checked."""
        self.notes.append(printable(text))

    def count(self, level: str) -> int:
        """How many problems there are of a level."""
        return sum(problem["level"] == level for problem in self.problems)

    def has(self, code: str) -> bool:
        """Whether there is a problem of this code."""
        return any(problem["code"] == code for problem in self.problems)

    @property
    def exit_status(self) -> int:
        """0: nothing to do, 1: warnings, 2: errors."""
        if self.count(ERROR):
            return FAILED
        return WARNED if self.count(WARNING) else FINE

    def add(self, text: str) -> None:
        """Take in another report's JSON, of a process whose user is not ours; raises ValueError."""
        other = _printable(json.loads(text))
        self.facts += other["facts"]
        self.problems += [problem for problem in other["problems"] if problem not in self.problems]
        self.notes += other["notes"]

    def as_json(self) -> str:
        """The report for programs."""
        return json.dumps(
            {
                "version": 1,
                "status": self.exit_status,
                "errors": self.count(ERROR),
                "warnings": self.count(WARNING),
                "facts": self.facts,
                "notes": self.notes,
                "problems": sorted(self.problems, key=_by_level),
            },
            indent=2,
        )

    def as_text(self) -> str:
        """The report for people."""
        lines = [f"{fact['name']:<{_NAME_WIDTH}} {fact['text']}" for fact in self.facts]
        if self.notes:
            lines += ["", "not understood, and so not checked:"]
            lines += [f"  {note}" for note in self.notes]
        for problem in sorted(self.problems, key=_by_level):
            lines += ["", *_render(problem)]
        counts = [counted(self.count(level), level) for level in (ERROR, WARNING)]
        return "\n".join([*lines, "", ", ".join(counts)]) + "\n"


def _by_level(problem: dict[str, str]) -> int:
    return 0 if problem["level"] == ERROR else 1


def _render(problem: dict[str, str]) -> Iterable[str]:
    """The lines of a problem: what, cause, remedy."""
    yield from _wrap(problem["level"].upper(), problem["what"])
    for name in ("cause", "remedy"):
        if problem[name]:
            yield from _wrap(f"  {name}", problem[name])


def _wrap(name: str, text: str) -> Iterable[str]:
    margin = " " * (_LEVEL_WIDTH + 1)
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{name:<{_LEVEL_WIDTH}} ",
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def counted(number: int, noun: str) -> str:
    """So many things; none is `no`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text without what could do things to a terminal: names of files come from anybody."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _printable(value: Any) -> Any:
    """The same for all texts in what JSON can be."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, dict):
        return {name: _printable(each) for name, each in value.items()}
    return value
