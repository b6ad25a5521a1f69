"""The simple commands of a shell, as far as they can be followed without running them.

What changes variables, the directory, limits, or where the script goes on is done here; what only
asks is answered (`answers.py`); a program that is started is a subclass's to follow.
"""

from __future__ import annotations

import contextlib
import os
import re

from . import shellwords
from .answers import NotKnown
from .expansion import Expansion
from .shellvariables import Variables
from .shellwords import COMMAND, assignment, first_word, written
from .unknown import Unknown, is_known, joined, number_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .shellwords import Command, Redirection, Word

HARMLESS = {
    *("echo", "printf", "true", ":", "test", "[", "[[", "logger", "sleep", "hash", "trap"),
    *("mkdir", "chown", "chmod", "chgrp", "rm", "ln", "touch", "mkfifo", "wait", "umask"),
    *("exit", "return", "tcprules", *shellwords.OPENING, *shellwords.CLOSING),
    *("then", "do", "else", "elif", "!"),
}
"""Commands that change nothing of what the last one is started with, or are told of elsewhere."""

TESTS = ("[", "test", "[[")
_ASKING = {
    *("grep", "egrep", "fgrep", "pgrep", "pidof", "cmp", "diff", "hash", "type", "read", "id"),
    *("ls", "expr", "awk", "sed", "find", "stat", *TESTS),
}
"""Commands that may well fail; all others are expected to succeed."""

SUCCEEDS, FAILS, EXPECTED, OPEN = range(4)
"""What is known of an exit status: 0, another, most likely 0, nothing."""

_APPENDS = re.compile(r"([A-Za-z_]\w*)\+=", re.ASCII)

MOST_STEPS = 5000  # commands
MOST_SCRIPTS = 20  # files, functions and shells with scripts of their own
_MOST_NOTES = 30
_MOST_WORDS = 1000  # that stand for "$@"


class Shell:
    """A shell, and what came of its commands.

    `notes` are what was not understood, `missing_users` whom `id` would not find,
    `made_directories` those that are made.
    """

    def __init__(self, directory: str) -> None:
        self.notes: list[str] = []
        self.made_directories: set[str] = set()
        self.directory = directory
        variables = Variables({"PATH": os.environ.get("PATH", os.defpath)})
        self._words = Expansion(variables, self, self._note)
        self.missing_users = self._words.asker.missing_users
        self._named: set[str] = set()
        self._sets_anything = False
        self._read_so_far = ""
        self._passed_over: set[str] = set()
        self._functions: dict[str, Sequence[Command]] = {}
        self._file = ""
        self._line = self._line_of_eval = 0
        self._last: Command | None = None
        self._scripts = self._steps = self._depth = 0
        self._parentheses = 0
        self._is_over = False
        self._leaving = ""  # a function, a file or a loop, by the command that does
        self._may_leave = False
        self._calls = 0
        self._locals: set[str] = set()

    @property
    def _variables(self) -> Variables:
        return self._words.variables

    @property
    def here(self) -> str:
        """Where in the script it is; or in a file that the script reads."""
        return f"{self._file}line {self._line}"

    def _note(self, text: str) -> None:
        note = f"{self.here}: {text}" if self._line else text
        if len(self.notes) >= _MOST_NOTES:
            note = "and more"
        if note not in self.notes:
            self.notes.append(note)

    # What a subclass has to say to

    def _start(
        self, command: Command, assigned: dict[str, str | None], words: Sequence[Word]
    ) -> None:
        """A program is started, with variables of its own; if nothing comes behind that, the script
        is over.
        """
        raise NotImplementedError

    def _join(self, redirections: Sequence[Redirection]) -> None:
        """Descriptors are redirected, those of the shell or of what it starts at last."""

    @contextlib.contextmanager
    def _shell_of_its_own(self) -> Iterator[None]:
        """What is done in it changes nothing of this shell."""
        variables, directory = self._variables, self.directory
        positional, functions = self._words.positional, self._functions
        self._words.variables = variables.copy()
        self._functions = dict(functions)
        yield
        self._words.variables = variables
        self.directory, self._functions = directory, functions
        self._words.positional = positional
        self._is_over, self._leaving = False, ""

    def _limit(self, resource: str, number: int | None) -> None:
        """`ulimit` limits a resource (setrlimit(2)), in octets; None is a number not known."""

    def _stop_before(self, commands: Sequence[Command]) -> None:
        """Nothing gets to these, as the script is over."""

    def _read(self, script: str, called: str) -> int | None:
        """Follow a script; what is known of its exit status, None if it can not be taken apart."""
        raise NotImplementedError

    def _follow(self, commands: Sequence[Command]) -> int:
        """Go through commands as sh would; what is known of the exit status."""
        raise NotImplementedError

    def _pass_over(self, commands: Sequence[Command]) -> None:
        """Leave out commands that may or may not be run; what they would set is not known."""
        raise NotImplementedError

    def _doubt_all(self) -> None:
        self._sets_anything = True
        self._variables.doubt_all()

    # Simple commands

    def _heed_mkdir(self, command: Command) -> None:
        """Keep the names of directories that are made, whether or not it is clear that they are."""
        if first_word(command) not in ("mkdir", "install"):
            return
        for word in command.words[1:]:
            path = self._words.expand(word)
            if path is not None and not path.startswith("-"):
                path = os.path.join(self.directory, path)
                self.made_directories.add(os.path.normpath(path))

    def _obey(self, command: Command) -> int:
        """Do what a command would do to what is started; what is known of its exit status."""
        self._heed_mkdir(command)
        assigned, words = self._split(command)
        name = words[0].literal if words else None
        if not words:
            return self._status_of_assignments(command)
        if name == "!":
            status = self._obey(command._replace(words=words[1:]))
            return {SUCCEEDS: FAILS, FAILS: SUCCEEDS}.get(status, OPEN)
        if name == "command" and len(words) > 1 and not words[1].source.startswith("-"):
            return self._obey(command._replace(words=words[1:]))
        if name in TESTS:
            return self._test(command, words)
        if name in _BUILTINS or name in self._functions:
            for variable, value in assigned:
                self._variables.assign(variable, value, self.here)
                if name in self._functions:
                    self._variables.export(variable)
        if name == "exec" and len(words) == 1:
            self._join(command.redirections)
        elif name in _BUILTINS:
            return _BUILTINS[name](self, command, words[1:])
        elif name in self._functions:
            return self._call(self._functions[name], words[1:])
        elif name in HARMLESS or name in _ASKING or self._words.asker.knows(name):
            return self._ask(command)
        elif found := _APPENDS.match(words[0].source):
            self._note(f"what `{written(command)}` sets is not counted")
            self._variables.doubt(found[1])
        else:
            self._start(command, dict(assigned), words)
        return EXPECTED

    def _split(self, command: Command) -> tuple[list[tuple[str, str | None]], list[Word]]:
        """The assignments that a command begins with, and its words."""
        assigned, words = [], list(command.words)
        is_for_us = all(map(assignment, words))
        while words and (found := assignment(words[0])):
            value = self._words.value(found[1], found[0])
            assigned.append((found[0], value))
            if is_for_us:
                self._variables.assign(found[0], value, self.here)
            words.pop(0)
        return assigned, words

    def _status_of_assignments(self, command: Command) -> int:
        """That of the last command in them."""
        if not any(part.kind == COMMAND for word in command.words for part in word.parts):
            return SUCCEEDS
        answer = self._words.answered
        return OPEN if answer is None else _STATUS[answer.is_ok]

    def _test(self, command: Command, words: Sequence[Word]) -> int:
        last = {"[": "]", "[[": "]]"}.get(words[0].source, "")
        is_of_bash = last == "]]" and (
            command.redirections or any(w.has_pattern for w in words[1:-1])
        )
        if is_of_bash or (last and words[-1].source != last):
            return OPEN
        texts = []
        for word in words[1:-1] if last else words[1:]:
            text = self._words.expand(word)
            if text is None or word.has_pattern:
                return OPEN
            texts += self._words.parted(word, text)
        return _STATUS[self._words.asker.test(texts)]

    def _ask(self, command: Command) -> int:
        """The exit status of a command that changes nothing, where that can be known."""
        answer = self._words.asker.ask([command._replace(before="", after="")])
        if answer is None:
            return OPEN if first_word(command) in _ASKING else EXPECTED
        return _STATUS[answer.is_ok]

    def _call(self, function: Sequence[Command], words: Sequence[Word]) -> int:
        self._scripts += 1
        if self._scripts > MOST_SCRIPTS:
            self._pass_over(function)
            return EXPECTED
        self._calls += 1
        before = self._words.positional
        self._words.positional = [text for word in words for text in self._words.texts(word)]
        status = self._follow(function)
        self._words.positional = before
        self._calls -= 1
        self._leave_behind("return")
        for name in self._locals:
            self._variables.doubt(name)
        self._locals.clear()
        return status

    def _leave(self, command: Command, words: Sequence[Word]) -> int:
        """`return`, `break` or `continue`."""
        self._leaving = command.words[0].source
        return FAILS if words and words[0].source != "0" else SUCCEEDS

    def _leave_behind(self, *kinds: str) -> None:
        """What was left is over: a function or a file, or a loop."""
        if self._leaving in kinds:
            self._leaving = ""
        self._may_leave = False

    def _shift(self, _: Command, words: Sequence[Word]) -> int:
        if self._words.positional and not words:
            self._words.positional.pop(0)
        else:
            self._words.positional = None
        return EXPECTED

    def _true(self, _: Command, words: Sequence[Word]) -> int:
        for word in words:
            self._words.expand(word)  # `: ${NAME:=value}` sets it
        return SUCCEEDS

    def _false(self, *_: object) -> int:
        return FAILS

    def _exit(self, command: Command, _: Sequence[Word]) -> int:
        self._is_over = True
        self._note(f"`{written(command)}` ends the script")
        return OPEN

    def _content(self, path: str | None) -> str | None:
        """The text of a file, where that is known."""
        try:
            return self._words.asker.content(path) if path else None
        except NotKnown:
            return None

    def _source_file(self, command: Command, words: Sequence[Word]) -> int:
        """`. FILE`: it is read here, too."""
        path = self._words.expand(words[0]) if words else None
        script = self._content(path)
        self._scripts += 1
        if script is None or self._scripts > MOST_SCRIPTS:
            self._note(f"what `{written(command)}` sets is not counted")
            self._doubt_all()
            return EXPECTED
        line, where = self._line, self._file
        self._file = f"{path}, "
        self._calls += 1
        status = self._read(script, path or "")
        if status is None:
            self._doubt_all()
        self._calls -= 1
        self._leave_behind("return")
        self._line, self._file = line, where
        return OPEN if status is None else status

    def _eval(self, command: Command, words: Sequence[Word]) -> int:
        texts = [self._words.expand(word) for word in words]
        self._scripts += 1
        if None in texts or self._scripts > MOST_STEPS:
            self._note(f"what `{written(command)}` sets is not counted")
            self._doubt_all()
            return EXPECTED
        before, self._line_of_eval = self._line_of_eval, self._line
        status = self._read(" ".join(text or "" for text in texts), "what `eval` is given")
        self._line_of_eval = before
        return OPEN if status is None else status

    def _cd(self, _: Command, words: Sequence[Word]) -> int:
        texts = [text for word in words for text in self._words.texts(word)]
        while texts[:1] in (["-P"], ["-L"], ["--"]):
            texts.pop(0)
        is_plain = len(texts) == 1 and not texts[0].startswith("-")
        path = joined(self.directory, texts[0]) if is_plain else Unknown("cd")
        is_made = os.path.normpath(path) in self.made_directories
        if is_known(path) and not is_made and _is_missing(path):
            return FAILS
        self.directory = path
        return EXPECTED

    def _ulimit(self, _: Command, words: Sequence[Word]) -> int:
        self._heed_ulimit(words)
        return SUCCEEDS

    def _heed_ulimit(self, words: Sequence[Word], is_known: bool = True) -> None:
        """`ulimit`, whose numbers are KiB; it does nothing where it is not given one."""
        texts = [text for word in words for text in self._words.texts(word)]
        if not texts or texts[-1].startswith("-") or texts[-1] == "unlimited":
            return
        number = number_in(texts[-1]) if is_known else None
        letters = "".join(text[1:] for text in texts[:-1] if text.startswith("-"))
        for letter, resource in (("v", "as"), ("d", "data")):
            if letter in letters:
                self._limit(resource, None if number is None else number * 1024)

    def _read_line(self, command: Command, words: Sequence[Word]) -> int:
        """`read NAME < FILE`."""
        names = [word.source for word in words if not word.source.startswith("-")]
        files = [found.target for found in command.redirections if found.operator == "<"]
        text = self._content(self._words.expand(files[0]) if files else None)
        if text is None:
            self._note(f"what `{written(command)}` sets is not counted")
        for name in names:
            if text is None or len(names) > 1:
                self._variables.doubt(name)
            else:
                self._variables.assign(name, text.partition("\n")[0].strip(" \t"), self.here)
        return OPEN if text is None else _STATUS["\n" in text]

    def _export(self, _: Command, words: Sequence[Word]) -> int:
        options = [word.source for word in words if word.source.startswith("-")]
        for word in words[len(options) :]:
            names = [self._assign(word)] if assignment(word) else self._words.texts(word)
            for name in names:
                if isinstance(name, Unknown):
                    self._doubt_all()
                    self._variables.doubt_exports()
                    continue
                name, equals, value = name.partition("=")
                if equals:
                    self._variables.assign(name, value, self.here)
                change = self._variables.keep if "-n" in options else self._variables.export
                change(name)
        return SUCCEEDS

    def _declare(self, command: Command, words: Sequence[Word]) -> int:
        """`declare`, `typeset`, `local` and `readonly`, with their options."""
        options = [word.source for word in words if word.source.startswith("-")]
        if any("x" in option for option in options):
            return self._export(command, words)
        for word in words[len(options) :]:
            name = self._assign(word) if assignment(word) else ""
            if not name and not word.is_plain:
                self._doubt_all()
            if command.words[0].source == "local":
                self._locals.add(name)
        return SUCCEEDS

    def _assign(self, word: Word) -> str:
        """NAME=value as an argument; the name."""
        name, value = assignment(word) or ("", word)
        self._variables.assign(name, self._words.value(value, name), self.here)
        return name

    def _unset(self, _: Command, words: Sequence[Word]) -> int:
        for word in words:
            for name in self._words.texts(word):
                self._variables.unset(name)
        return SUCCEEDS

    def _set(self, _: Command, words: Sequence[Word]) -> int:
        texts = [text for word in words for text in self._words.texts(word)]
        while texts and texts[0][:1] in ("-", "+") and texts[0] != "--":
            option = texts.pop(0)
            names = [texts.pop(0)] if option.endswith("o") and texts else []
            if "a" in option or "allexport" in names:
                self._variables.exports_all = option[0] == "-"
        if texts:
            texts = texts[texts[0] == "--" :]
            self._words.positional = texts if len(texts) <= _MOST_WORDS else None
        return SUCCEEDS


_STATUS = {True: SUCCEEDS, False: FAILS, None: OPEN}

_BUILTINS: dict[str | None, Callable[[Shell, Command, Sequence[Word]], int]] = {
    ".": Shell._source_file,
    ":": Shell._true,
    "break": Shell._leave,
    "cd": Shell._cd,
    "continue": Shell._leave,
    "declare": Shell._declare,
    "eval": Shell._eval,
    "exit": Shell._exit,
    "export": Shell._export,
    "false": Shell._false,
    "local": Shell._declare,
    "read": Shell._read_line,
    "readonly": Shell._declare,
    "return": Shell._leave,
    "set": Shell._set,
    "shift": Shell._shift,
    "source": Shell._source_file,
    "true": Shell._true,
    "typeset": Shell._declare,
    "ulimit": Shell._ulimit,
    "unset": Shell._unset,
}
"""The shell's own commands that change variables, or where and how it goes on."""


def _is_missing(path: str) -> bool:
    """Whether there is surely no directory."""
    try:
        return not os.path.isdir(path) and bool(os.stat(path))
    except PermissionError:
        return False
    except (OSError, ValueError):
        return True
