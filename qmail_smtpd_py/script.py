"""A sh script followed without running it, as far as that is safe.

Variables, branches whose test can be made here, functions, the files that it reads, and the few
commands whose answer can be had without running them (`answers.py`).  Whatever else could change
what it starts is a note: it was not understood, and what it may set counts as not known.
"""

from __future__ import annotations

import os
import re

from . import shellwords
from .chain import Unknown, number_in
from .expansion import Expansion
from .shellvariables import Variables
from .shellwords import OPENING, assignment, clauses, end_of_block, first_word, written

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .shellwords import Command, Redirection, Word

_HARMLESS = {
    *("echo", "printf", "true", ":", "test", "[", "[[", "logger", "sleep", "hash", "trap"),
    *("mkdir", "chown", "chmod", "chgrp", "rm", "ln", "touch", "mkfifo", "wait", "umask"),
    *("exit", "return", "tcprules", *shellwords.OPENING, *shellwords.CLOSING),
    *("then", "do", "else", "elif", "!"),
}
"""Commands that change nothing of what the last one is started with, or are told of elsewhere."""

_TESTS = ("[", "test", "[[")
_ASKING = (*("grep", "egrep", "fgrep", "pgrep", "cmp", "diff", "hash", "type", "read"), *_TESTS)
"""Commands that may well fail; all others are expected to succeed."""

_SUCCEEDS, _FAILS, _EXPECTED, _OPEN = range(4)
"""What is known of an exit status: 0, another, most likely 0, nothing."""

_USE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
"""A variable that is used, and neither set nor tested."""

_MAY_SET = re.compile(r"([A-Za-z_]\w*)\+?=|\$\{([A-Za-z_]\w*):?=", re.ASCII)
"""A variable that a word may set."""

_DEEPEST = 30  # commands within commands that are looked into
_MOST_STEPS = 5000  # commands
_MOST_NOTES = 30

_MOST_SCRIPTS = 20  # files, functions and shells with scripts of their own


class Script:
    """A script, and what came of it: a program that is started is its subclass's to follow.

    `notes` are what was not understood, `missing_users` whom `id` would not find.
    """

    def __init__(self, directory: str) -> None:
        self.notes: list[str] = []
        self.directory = directory
        self._variables = Variables({"PATH": os.environ.get("PATH", os.defpath)})
        self._words = Expansion(self._variables, self, self._note)
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
        self._is_over = False

    @property
    def here(self) -> str:
        """Where in the script it is; or in a file that the script reads."""
        return f"{self._file}line {self._line}"

    def _note(self, text: str) -> None:
        note = f"{self.here}: {text}" if self._line else text
        if len(self.notes) == _MOST_NOTES:
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

    def _make(self, command: Command) -> None:
        """Something may be made or not: this is said of each command, whether it is run or not."""

    def _end_of_shell(self, before: Variables) -> None:
        """A shell ends that this one waits for, which goes on with its variables."""
        self._variables = self._words.variables = before
        self._is_over = False

    def _limit(self, resource: str, number: int | None) -> None:
        """`ulimit` limits a resource (setrlimit(2)), in octets; None is a number not known."""

    def _leave(self, commands: Sequence[Command]) -> None:
        """Nothing gets to these, as the script is over."""

    # Control flow

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
        at, status = 0, _SUCCEEDS
        self._depth += 1
        while at < len(commands) and not self._is_over:
            command = commands[at]
            self._line = self._line_of_eval or command.line
            self._steps += 1
            is_function = command.after == "()" and bool(command.words)
            end = end_of_block(commands, at + is_function)
            block, at = commands[at:end], end
            if is_function:
                self._functions[command.words[0].source] = block[1:]
                continue
            is_reached = _is_reached(command.before, status)
            if is_reached is None:
                self._pass_over(block)
                status = _OPEN
            elif is_reached:
                status = self._run(block)
        self._leave(commands[at:])
        self._depth -= 1
        return status

    def _run(self, block: Sequence[Command]) -> int:
        """Run one command, simple or not; what is known of its exit status."""
        first = first_word(block[0])
        if self._depth > _DEEPEST or self._steps > _MOST_STEPS:
            self._pass_over(block)
        elif first == "if":
            return self._run_if(clauses(block))
        elif first == "for":
            self._run_for(block)
        elif first in ("{", "("):
            before = self._variables.copy() if first == "(" else None
            status = self._follow(block[1:-1])
            self._join(block[-1].redirections)
            if before:
                self._end_of_shell(before)
            return status
        elif first in OPENING:
            self._pass_over(block)
        else:
            return self._obey(block[0])
        return _EXPECTED

    def _run_if(self, clauses: Sequence[tuple[str, Sequence[Command]]]) -> int:
        status = _OPEN
        for at, (keyword, commands) in enumerate(clauses):
            if keyword == "else" or (keyword == "then" and status == _SUCCEEDS):
                return self._follow(commands)
            if keyword == "then" and status == _FAILS:
                continue
            if keyword != "then" and all(map(_is_question, commands)):
                status = self._follow(commands)
                continue
            self._pass_over([command for _, rest in clauses[at:] for command in rest])
            return _EXPECTED
        return _SUCCEEDS

    def _run_for(self, block: Sequence[Command]) -> None:
        """`for NAME in WORDS`, where all words are known."""
        words = block[0].words[1:]
        known = [None if word.has_pattern else self._words.expand(word) for word in words[2:]]
        if len(words) < 2 or None in known or list(map(first_word, block[1:2])) != ["do"]:
            self._pass_over(block)
            return
        for word, text in zip(words[2:], known):
            for item in self._words.parted(word, text or ""):
                self._variables.assign(words[0].source, item)
                self._follow(block[2:-1])

    def _pass_over(self, commands: Sequence[Command]) -> None:
        """Leave out commands that may or may not be run; what they would set is not known."""
        if not all(map(_is_harmless, commands)) and self.here not in self._passed_over:
            self._passed_over.add(self.here)
            words = [word.source for command in commands for word in command.words]
            self._note(f"what depends on `{' '.join(words[:6])}` is not counted")
        passed, called = list(commands), set()
        for command in passed:
            self._make(command)
            name = first_word(command)
            if name in self._functions and name not in called:
                called.add(name)
                passed += self._functions[name]
            for word in command.words:
                for name_set in filter(None, _MAY_SET.findall(word.source)):
                    self._variables.doubt(name_set[0] or name_set[1])
            if name in (".", "source", "eval"):
                self._doubt_all()
            elif name in _DECLARING:
                for word in command.words[1:]:
                    if word.source.isidentifier():
                        self._variables.doubt(word.source)
                    elif not word.is_plain and "=" not in word.source:
                        self._doubt_all()
                        self._variables.doubt_exports()
            elif name == "cd" and len(command.words) == 2:
                self._change_directory(Unknown(command.words[1].source))
            elif name == "ulimit":
                self._heed_ulimit(command.words[1:], is_known=False)
            elif name == "set":
                self._words.positional = None

    def _change_directory(self, path: str) -> None:
        is_known = not isinstance(path, Unknown)
        self.directory = os.path.join(self.directory, path) if is_known else path

    def _doubt_all(self) -> None:
        self._sets_anything = True
        self._variables.doubt_all()

    # Simple commands

    def _obey(self, command: Command) -> int:
        """Do what a command would do to what is started; what is known of its exit status."""
        self._make(command)
        assigned, words = self._split(command)
        name = words[0].literal if words else None
        if not words:
            for variable, value in assigned:
                self._variables.assign(variable, value, self.here)
            return _EXPECTED if None in dict(assigned).values() else _SUCCEEDS
        if name == "!":
            status = self._obey(command._replace(words=words[1:]))
            return {_SUCCEEDS: _FAILS, _FAILS: _SUCCEEDS}.get(status, _OPEN)
        if name in _TESTS:
            return self._test(words)
        if name == "exec" and len(words) == 1:
            self._join(command.redirections)
        elif name in _BUILTINS and command.after in ("|", "|&", "&"):
            pass  # another shell does that
        elif name in _BUILTINS:
            return _BUILTINS[name](self, command, words[1:])
        elif name in self._functions:
            return self._call(self._functions[name])
        elif name in _HARMLESS or name in _ASKING or self._words.asker.knows(name):
            return self._ask(command)
        else:
            self._start(command, dict(assigned), words)
        return _EXPECTED

    def _split(self, command: Command) -> tuple[list[tuple[str, str | None]], list[Word]]:
        """The assignments that a command begins with, and its words."""
        assigned, words = [], list(command.words)
        while words and (found := assignment(words[0])):
            assigned.append((found[0], self._words.value(found[1], found[0])))
            words.pop(0)
        return assigned, words

    def _test(self, words: Sequence[Word]) -> int:
        last = {"[": "]", "[[": "]]"}.get(words[0].source, "")
        if last and words[-1].source != last:
            return _OPEN
        texts = []
        for word in words[1:-1] if last else words[1:]:
            text = self._words.expand(word)
            if text is None:
                return _OPEN
            texts += self._words.parted(word, text)
        return _STATUS[self._words.asker.test(texts)]

    def _ask(self, command: Command) -> int:
        """The exit status of a command that changes nothing, where that can be known."""
        answer = self._words.asker.ask([command._replace(before="", after="")])
        if answer is None:
            return _OPEN if first_word(command) in _ASKING else _EXPECTED
        return _STATUS[answer.is_ok]

    def _call(self, function: Sequence[Command]) -> int:
        self._scripts += 1
        if self._scripts > _MOST_SCRIPTS:
            self._pass_over(function)
            return _EXPECTED
        return self._follow(function)

    def _true(self, _: Command, words: Sequence[Word]) -> int:
        for word in words:
            self._words.expand(word)  # `: ${NAME:=value}` sets it
        return _SUCCEEDS

    def _false(self, *_: object) -> int:
        return _FAILS

    def _exit(self, command: Command, _: Sequence[Word]) -> int:
        self._is_over = True
        self._note(f"`{written(command)}` ends the script")
        return _OPEN

    def _source_file(self, command: Command, words: Sequence[Word]) -> int:
        """`. FILE`: it is read here, too."""
        path = self._words.expand(words[0]) if words else None
        script = self._words.asker.content(path) if path else None
        self._scripts += 1
        if script is None or self._scripts > _MOST_SCRIPTS:
            self._note(f"what `{written(command)}` sets is not counted")
            self._doubt_all()
            return _EXPECTED
        line, where = self._line, self._file
        self._file = f"{path}, "
        if self._read(script, path or "") is None:
            self._doubt_all()
        self._line, self._file = line, where
        return _SUCCEEDS

    def _eval(self, command: Command, words: Sequence[Word]) -> int:
        texts = [self._words.expand(word) for word in words]
        self._scripts += 1
        if None in texts or self._scripts > _MOST_STEPS:
            self._note(f"what `{written(command)}` sets is not counted")
            self._doubt_all()
            return _EXPECTED
        before, self._line_of_eval = self._line_of_eval, self._line
        status = self._read(" ".join(text or "" for text in texts), "what `eval` is given")
        self._line_of_eval = before
        return _OPEN if status is None else status

    def _cd(self, _: Command, words: Sequence[Word]) -> int:
        if len(words) == 1:
            for path in self._words.texts(words[0])[:1]:
                self._change_directory(path)
        return _EXPECTED

    def _ulimit(self, _: Command, words: Sequence[Word]) -> int:
        self._heed_ulimit(words)
        return _SUCCEEDS

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
        path = self._words.expand(files[0]) if files else None
        text = self._words.asker.content(path) if path else None
        if text is None:
            self._note(f"what `{written(command)}` sets is not counted")
        for name in names:
            if text is None or len(names) > 1:
                self._variables.doubt(name)
            else:
                self._variables.assign(name, text.partition("\n")[0].strip(" \t"), self.here)
        return _OPEN if text is None else _SUCCEEDS

    def _export(self, _: Command, words: Sequence[Word]) -> int:
        options = [word.source for word in words if word.source.startswith("-")]
        for word in words[len(options) :]:
            names = [self._assign(word)] if assignment(word) else self._words.texts(word)
            for name in names:
                if isinstance(name, Unknown):
                    self._doubt_all()
                    self._variables.doubt_exports()
                change = self._variables.keep if "-n" in options else self._variables.export
                change(name)
        return _SUCCEEDS

    def _declare(self, command: Command, words: Sequence[Word]) -> int:
        """`declare`, `typeset`, `local` and `readonly`, with their options."""
        options = [word.source for word in words if word.source.startswith("-")]
        if any("x" in option for option in options):
            return self._export(command, words)
        for word in filter(assignment, words):
            self._assign(word)
        return _SUCCEEDS

    def _assign(self, word: Word) -> str:
        """NAME=value as an argument; the name."""
        name, value = assignment(word) or ("", word)
        self._variables.assign(name, self._words.value(value, name), self.here)
        return name

    def _unset(self, _: Command, words: Sequence[Word]) -> int:
        for word in words:
            for name in self._words.texts(word):
                self._variables.unset(name)
        return _SUCCEEDS

    def _set(self, _: Command, words: Sequence[Word]) -> int:
        texts = [word.source for word in words]
        for at, text in enumerate(texts):
            if text[:1] not in "-+" or text == "--":
                words = words[at + (text == "--") :]
                self._words.positional = [
                    text for word in words for text in self._words.texts(word)
                ]
                break
            letters = "a" if text[1:] == "o" and "allexport" in texts[at + 1 : at + 2] else text[1:]
            if "a" in letters:
                self._variables.exports_all = text[0] == "-"
        return _SUCCEEDS


_STATUS = {True: _SUCCEEDS, False: _FAILS, None: _OPEN}

_DECLARING = ("export", "readonly", "declare", "typeset", "local", "read", "unset", "for")

_BUILTINS: dict[str | None, Callable[[Script, Command, Sequence[Word]], int]] = {
    ".": Script._source_file,
    ":": Script._true,
    "cd": Script._cd,
    "declare": Script._declare,
    "eval": Script._eval,
    "exit": Script._exit,
    "export": Script._export,
    "false": Script._false,
    "local": Script._declare,
    "read": Script._read_line,
    "readonly": Script._declare,
    "set": Script._set,
    "source": Script._source_file,
    "true": Script._true,
    "typeset": Script._declare,
    "ulimit": Script._ulimit,
    "unset": Script._unset,
}
"""The shell's own commands that change variables, or where and how it goes on."""


def _is_harmless(command: Command) -> bool:
    """Whether it changes nothing of what is started, or no more than a variable of the script."""
    words = [word for word in command.words if not assignment(word)]
    return not words or words[0].literal in _HARMLESS


def _is_question(command: Command) -> bool:
    """Whether a command between `if` and `then` can be asked here, and does nothing else."""
    name = first_word(command)
    if name == "!" and len(command.words) > 1:
        name = command.words[1].literal
    return name in _TESTS or name in ("true", "false", ":", "command", "which", "id", "getent")


def _is_reached(before: str, status: int) -> bool | None:
    """Whether sh gets to a command behind an operator, None where that is not known."""
    if before in ("|", "|&"):
        return False
    if before not in ("&&", "||"):
        return True
    return None if status == _OPEN else (status != _FAILS) is (before == "&&")


def used_variables(word: str) -> list[str]:
    """The variables that a word uses, as it is written, and neither sets nor tests."""
    return [plain or braced for plain, braced in _USE.findall(word)]
