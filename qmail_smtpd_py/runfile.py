"""A run file read, without running it: what qmail-smtpd will be started with, and as whom.

A run file is a sh script that ends in a chain of programs, each of which becomes the next one:

    export SMTPAUTH='!'
    exec softlimit -m 64000000 tcpserver ... 0 587 qmail-smtpd checkprogram subprogram 2>&1

`script.py` follows the script, and `chain.py` the programs.
"""

from __future__ import annotations

import contextlib
import os

from .chain import LISTENER, SMTPD, Chain
from .script import Script, used_variables
from .shellvariables import Variables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .shellwords import Command, Redirection, Word

_MOST_SHELLS = 20  # with a script of their own, which may start the next


class RunFile(Script):
    """What a run file says.

    `environ` is what it exports, `chain` the programs that it ends in.  `unexported` are variables
    that are set and not exported, with where, their value, and whether the script uses them;
    `dropped` those that a program of the chain takes away; `has_joined_log` is whether descriptor 2
    goes to the log (`2>&1`); `needs_no_exec` whether what it ends in is started with exec, or that
    would change nothing, as a pipe (`is_piped`) is around it; `ends_at_once` whether nothing of it
    waits for the program.
    """

    def __init__(self, script: str, directory: str) -> None:
        super().__init__(directory)
        self.chain = Chain(directory, self._note)
        self.dropped: list[str] = []
        self.has_joined_log = False
        self.needs_no_exec = self.is_piped = self.ends_at_once = False
        self._shells = 0
        self._started_with: dict[str, str] | None = None
        try:
            self._read(script.replace("\0", ""), "the script")  # sh passes over them
        except (MemoryError, RecursionError):
            self._note("the script is too deep to be read to its end")
            self._doubt_all()
        started, unexported = self._started_with, self._variables.unexported(self._read_so_far)
        self.environ = self._variables.environ if started is None else started
        self.unexported = [
            found
            for found in unexported
            if found[1] not in self.environ and found[1] not in self.chain.doubtful
        ]

    def may_set(self, name: str) -> bool:
        """Whether it may export a variable, or a program of the chain may, with a value that is not
        known.
        """
        if name in self.environ:
            return False
        if name in self.chain.doubtful or self.chain.may_set_anything:
            return True
        return not self.chain.has_cleared and self._variables.may_have(name)

    def never_set(self, word: str) -> list[str]:
        """The variables in a word, as it is written, that nothing in the script can have set."""
        if self._sets_anything or self.chain.has_gap:
            return []
        return [name for name in used_variables(word) if name not in self._named]

    def _start(
        self, command: Command, assigned: dict[str, str | None], words: Sequence[Word]
    ) -> None:
        """A program is started; if the chain that it begins is ours, the script is over."""
        texts = [text for word in words for text in self._words.texts(word)]
        replaces_shell = texts[:1] == ["exec"]
        texts = texts[1:] if replaces_shell else texts
        if not texts:  # of variables that are empty
            return
        exported = self._variables.environ
        environ = self._environ_with(assigned)
        self.chain.directory = self.directory
        if self.chain.follow(texts, environ):
            self._started_with = environ
            self.dropped = [name for name in exported if name not in environ]
            is_last = replaces_shell or command.after in ("|", "|&", "&")
            self.needs_no_exec = is_last and not self._parentheses
            self.is_piped = command.after in ("|", "|&")
            self.ends_at_once = command.after == "&" and command is self._last
            self._join(command.redirections)
            self._is_over = True
        elif self.chain.script is not None:
            self._join(command.redirections)
            self._follow_shell(self.chain.script, environ)
        elif replaces_shell:
            self._note(f"`exec {texts[0]}` ends the script, and no qmail-smtpd was found behind it")
            self._is_over = True
        else:
            self._note(f"what `{texts[0]}` does is not known")

    def _environ_with(self, assigned: dict[str, str | None]) -> dict[str, str]:
        """The environment of a program with variables of its own, where None is not known."""
        environ = dict(self._variables.environ)
        for name, value in assigned.items():
            environ.pop(name, None)
            if value is None:
                self._variables.doubt(name)
            else:
                environ[name] = value
        return environ

    def _follow_shell(self, script: str, environ: dict[str, str]) -> None:
        """A shell with a script of its own; what that sets is gone with it."""
        self.chain.script = None
        self._shells += 1
        if self._shells > _MOST_SHELLS:
            self._note("so many shells with scripts are not followed")
            return
        with self._shell_of_its_own():
            self._words.variables = Variables(environ)
            self._functions, self._words.positional = {}, None
            self._read(script, "the script of a shell")

    @contextlib.contextmanager
    def _shell_of_its_own(self) -> Iterator[None]:
        limits = dict(self.chain.limits)
        with super()._shell_of_its_own():
            yield
        self._is_over = self.chain.program is not None
        if not self._is_over:
            self.chain.limits = limits

    def _join(self, redirections: Sequence[Redirection]) -> None:
        """Heed where `exec 2>&1`, or the last command, sends descriptor 2."""
        is_lost = False  # descriptor 1
        for redirection in redirections:
            operator, target = redirection.operator, redirection.target.source
            is_null = target == "/dev/null"
            if operator in (">", ">>", "1>", "1>>", "&>", "&>>"):
                is_lost = is_null
            if operator == "2>&":
                self.has_joined_log = not is_lost or target != "1"
            elif operator in ("2>", "2>>", "&>", "&>>") or (
                operator == ">&" and not target.isdecimal()
            ):
                self.has_joined_log = not is_null

    def _limit(self, resource: str, number: int | None) -> None:
        self.chain.limit(resource, number)

    def _stop_before(self, commands: Sequence[Command]) -> None:
        """Note what stands behind the program that was found, and would be another."""
        for command in commands:
            names = [os.path.basename(word.source) for word in command.words]
            if self.chain.program and {SMTPD, LISTENER} & set(names):
                self._line = command.line
                self._note("another qmail-smtpd, which is not looked at")
