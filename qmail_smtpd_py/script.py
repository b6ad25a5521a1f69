"""A sh script followed without running it, as far as that is safe.

Branches whose test can be made here, groups, functions, the files that it reads: control flow is
here, and simple commands are in `shell.py`.  Whatever else could change what the script starts is
a note: it was not understood, and what it may set counts as not known.
"""

from __future__ import annotations

import re

from . import shellwords
from .shell import EXPECTED, FAILS, HARMLESS, MOST_STEPS, OPEN, SUCCEEDS, TESTS, Shell
from .shellwords import OPENING, assignment, clauses, end_of_block, first_word
from .unknown import Unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .shellwords import Command

_USE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
"""A variable that is used, and neither set nor tested."""

_MAY_SET = re.compile(r"([A-Za-z_]\w*)\+?=|\$\{([A-Za-z_]\w*):?=", re.ASCII)
"""A variable that a word may set."""

_LEAVING = ("return", "break", "continue")

_DECLARING = ("export", "readonly", "declare", "typeset", "local", "read", "unset", "for")

_DEEPEST = 30  # commands within commands that are looked into


class Script(Shell):
    """A shell that reads a script."""

    def _read(self, script: str, called: str) -> int | None:
        """Follow a script; what is known of its exit status, None if it can not be taken apart."""
        try:
            commands = shellwords.parse(script)
        except shellwords.ScriptError as error:
            self._note(f"{called} has {error}; nothing of it was read")
            return None
        self._read_so_far += script
        self._last = self._last or (commands[-1] if commands else None)
        for command in commands:
            for word in command.words:
                self._named.update(re.findall(r"\w+", _USE.sub("", word.source)))
        return self._follow(commands)

    def _follow(self, commands: Sequence[Command]) -> int:
        """Go through commands as sh would; what is known of the exit status."""
        at, status = 0, SUCCEEDS
        self._depth += 1
        while at < len(commands) and not self._is_over and not self._leaving:
            command = commands[at]
            self._line = self._line_of_eval or command.line
            self._steps += 1
            is_function = command.after == "()" and bool(command.words)
            end = end_of_block(commands, at + is_function)
            block, at = commands[at:end], end
            if is_function:
                self._functions[command.words[-1].source] = block[1:]
                continue
            is_reached = _is_reached(command.before, status)
            if is_reached is None or (is_reached and self._may_leave):
                self._pass_over(block)
                status = OPEN
            elif is_reached:
                status = self._run(block)
            elif command.before in ("|", "|&"):
                status = OPEN  # that of a pipeline is its last command's
        self._stop_before(commands[at:])
        self._depth -= 1
        return status

    def _run(self, block: Sequence[Command]) -> int:
        """Run one command, simple or not, in whatever shell; what is known of its exit status."""
        if first_word(block[0]) != "(" and block[-1].after not in ("|", "|&", "&"):
            return self._run_here(block)
        with self._shell_of_its_own():
            return self._run_here(block)

    def _run_here(self, block: Sequence[Command]) -> int:
        """The same, in this shell."""
        first = first_word(block[0])
        if self._depth > _DEEPEST or self._steps > MOST_STEPS:
            self._pass_over(block)
        elif first == "if":
            return self._run_if(clauses(block))
        elif first == "for":
            self._run_for(block)
        elif first in ("{", "("):
            self._parentheses += first == "("
            status = self._follow(block[1:-1])
            self._parentheses -= first == "("
            self._join(block[-1].redirections)
            return status
        elif first in OPENING:
            self._pass_over(block)
        else:
            return self._obey(block[0])
        return EXPECTED

    def _run_if(self, clauses: Sequence[tuple[str, Sequence[Command]]]) -> int:
        status = OPEN
        for at, (keyword, commands) in enumerate(clauses):
            if keyword == "else" or (keyword == "then" and status == SUCCEEDS):
                return self._follow(commands)
            if keyword == "then" and status == FAILS:
                continue
            if keyword != "then" and all(map(_is_question, commands)):
                status = self._follow(commands)
                continue
            self._pass_over([command for _, rest in clauses[at:] for command in rest])
            return EXPECTED
        return SUCCEEDS

    def _run_for(self, block: Sequence[Command]) -> None:
        """`for NAME in WORDS`, where all words are known."""
        words = block[0].words[1:]
        known = [None if word.has_pattern else self._words.expand(word) for word in words[2:]]
        if len(words) < 2 or None in known or list(map(first_word, block[1:2])) != ["do"]:
            self._pass_over(block)
            return
        for word, text in zip(words[2:], known):
            for item in self._words.parted(word, text or ""):
                if self._leaving in ("", "continue"):
                    self._leaving = ""
                    self._variables.assign(words[0].source, item)
                    self._follow(block[2:-1])
        self._leave_behind("break", "continue")

    def _pass_over(self, commands: Sequence[Command]) -> None:
        """Leave out commands that may or may not be run; what they would set is not known."""
        if not all(map(_is_harmless, commands)) and self.here not in self._passed_over:
            self._passed_over.add(self.here)
            words = [word.source for command in commands for word in command.words]
            self._note(f"what depends on `{' '.join(words[:6])}` is not counted")
        passed, called = list(commands), set()
        for command in passed:
            name = first_word(command)
            if name in _LEAVING and (self._calls or name != "return"):
                self._may_leave = True
            elif name in self._functions and name not in called:
                called.add(name)
                passed += self._functions[name]
            self._doubt_what_it_changes(name, command)

    def _doubt_what_it_changes(self, name: str | None, command: Command) -> None:
        """Have what a command would set or change be not known, if that is run or not."""
        self._heed_mkdir(command)
        for word in command.words:
            for plain, braced in _MAY_SET.findall(word.source):
                self._variables.doubt(plain or braced)
        arguments = command.words[1:]
        if name in (".", "source", "eval"):
            self._doubt_all()
        elif name in _DECLARING:
            for word in arguments:
                if word.source.isidentifier():
                    self._variables.doubt(word.source)
                elif not word.is_plain and "=" not in word.source:
                    self._doubt_all()
                    self._variables.doubt_exports()
        elif name == "cd":
            self.directory = Unknown("cd")
        elif name == "ulimit":
            self._heed_ulimit(arguments, is_known=False)
        elif name == "set":
            self._words.positional = None
            if any("a" in word.source for word in arguments):
                self._variables.exports_all = None


def _is_harmless(command: Command) -> bool:
    """Whether it changes nothing of what is started, or no more than a variable of the script."""
    words = [word for word in command.words if not assignment(word)]
    return not words or words[0].literal in HARMLESS


def _is_question(command: Command) -> bool:
    """Whether a command between `if` and `then` can be asked here, and does nothing else."""
    name = first_word(command)
    if name == "!" and len(command.words) > 1:
        name = command.words[1].literal
    return name in TESTS or name in ("true", "false", ":", "command", "which", "id", "getent")


def _is_reached(before: str, status: int) -> bool | None:
    """Whether sh gets to a command behind an operator, None where that is not known."""
    if before in ("|", "|&"):
        return False
    if before not in ("&&", "||"):
        return True
    return None if status == OPEN else (status != FAILS) is (before == "&&")


def used_variables(word: str) -> list[str]:
    """The variables that a word uses, as it is written, and neither sets nor tests."""
    return [plain or braced for plain, braced in _USE.findall(word)]
