"""What stands for a word in a script that is read and not run."""

from __future__ import annotations

import os
import pwd

from . import shellwords
from .answers import Answer, Asker
from .unknown import Unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .shell import Shell
    from .shellvariables import Variables
    from .shellwords import Part, Word

_DEEPEST = 20  # commands within words within commands that are looked into

_POSITIONAL = ('"$@"', "$@", "$*")

_OF_ONE_WORD = (shellwords.TEXT, shellwords.HOME)


class Expansion:
    """The expansions of sh(1), as far as they are known without running anything.

    `script` knows where it is, and its directory, which at first is the run file's; `note` is told
    of what is not known.  `asker` answers for commands, and `answered` is what it said at last.
    """

    def __init__(
        self,
        variables: Variables,
        script: Shell,
        note: Callable[[str], None],
    ) -> None:
        self.asker = Asker(
            lambda word: None if word.has_pattern else self.expand(word),
            lambda: script.directory,
            lambda: self.variables.value("PATH") or os.defpath,
        )
        self.variables = variables
        self._directory = script.directory
        self._note = note
        self._script = script
        self.positional: list[str] | None = None
        self.answered: Answer | None = None
        self._noted: set[str] = set()

    def value(self, word: Word, name: str = "") -> str | None:
        """The text of a word, or None where it is not known; that is noted, and once for a variable
        of that name that is given it.
        """
        text = self.expand(word)
        if text is None:
            used = {part.text for part in word.parts if part.kind == shellwords.VARIABLE}
            if not used & self._noted and not (used and all(map(self.variables.is_open, used))):
                self._note(f"{word.source} is not known without running the script")
            self._noted.add(name)
        return text

    def texts(self, word: Word) -> list[str]:
        """The words that sh makes of one: what is not quoted is parted at blanks."""
        if word.source in _POSITIONAL and self.positional is not None:
            return list(self.positional)
        text = None if word.has_pattern else self.value(word)
        if text is None:
            unknown = Unknown(word.source)
            unknown.is_one = not (is_bare(word) or word.has_pattern or "@" in word.source)
            return [unknown]
        return self.parted(word, text)

    def parted(self, word: Word, text: str) -> list[str]:
        """The words that sh makes of a word's text."""
        return text.split() if is_bare(word) else [text]

    def expand(self, word: Word) -> str | None:
        """The text of a word, or None where it is not known."""
        pieces = [self._part(part) for part in word.parts]
        return None if None in pieces else "".join(piece or "" for piece in pieces)

    def _part(self, part: Part) -> str | None:
        if part.kind == shellwords.TEXT:
            return part.text
        if part.kind == shellwords.COMMAND:
            self.answered = self._answer(part.text)
            return self.answered.text if self.answered else None
        if part.kind == shellwords.VARIABLE:
            return self._variable(part)
        if part.kind == shellwords.HOME:
            return self._home_of(part.text)
        return {"0": f"{self._directory}/run", "${0%/*}": self._directory}.get(part.text)

    def _variable(self, part: Part) -> str | None:
        """`$NAME`, or `${NAME:-argument}` and the like; what is unset may be the starter's."""
        value, operator = self.variables.value(part.text), part.operator
        if not operator or (value is None and not self.variables.is_unset(part.text)):
            return value
        is_there = value is not None and (value != "" or ":" not in operator)
        if is_there is not operator.endswith("+"):
            return value if is_there else ""
        try:
            text = self.expand(shellwords.inside_quotes(part.argument.strip("'")))
        except shellwords.ScriptError:
            return None
        if operator.endswith("="):
            self.variables.assign(part.text, text, self._script.here)
        return text

    def _home_of(self, user: str) -> str | None:
        if not user:
            return self.variables.value("HOME")
        try:
            return pwd.getpwnam(user).pw_dir
        except KeyError:
            return f"~{user}"

    def _answer(self, script: str) -> Answer | None:
        """What a command would print, of those that need not be run to know it, or None."""
        if script.count("$(") > _DEEPEST:
            return None
        try:
            commands = shellwords.parse(script)
        except shellwords.ScriptError:
            return None
        return self.asker.ask(commands, is_for_value=True)


def is_bare(word: Word) -> bool:
    """Whether something in it is replaced that does not stand in quotation marks."""
    return any(part.kind not in _OF_ONE_WORD and not part.quoted for part in word.parts)
