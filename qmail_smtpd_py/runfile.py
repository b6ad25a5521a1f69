"""A run file read, without running it: what qmail-smtpd will be started with, and as whom.

A run file is a sh script that ends in a chain of programs, each of which becomes the next one:

    export SMTPAUTH='!'
    exec softlimit -m 64000000 tcpserver ... 0 587 qmail-smtpd checkprogram subprogram 2>&1

The script is followed as far as that is safe: variables, `export`, the few commands whose answer
can be had without running them.  `chain.py` follows the programs.  Whatever else could change what
is started is a note: it was not understood, and so was not checked.
"""

from __future__ import annotations

import os
import pwd
import re
import socket

from . import shellwords
from .chain import Chain, number_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .shellwords import Command, Part, Word

_OPENING = ("if", "while", "until", "for", "case", "{")
_CLOSING = ("fi", "done", "esac", "}")
_BETWEEN = ("then", "do", "else", "elif", "!")
_HARMLESS = {
    *("echo", "printf", "exit", "return", "true", ":", "test", "[", "[[", "logger", "sleep"),
    *("mkdir", "chown", "chmod", "chgrp", "rm", "ln", "touch", "mkfifo", "trap", "wait", "umask"),
    *("cd", "tcprules", "ulimit", *_BETWEEN, *_CLOSING),
}
"""Commands that change nothing of what the last one is started with, or are told of elsewhere."""

_EXPORTED = ("PATH", "HOME", "USER", "SHELL", "LANG", "TZ")
"""What init exports already: sh exports a variable that came with the environment again."""

_SETS_ANYTHING = (".", "source", "eval")
"""Commands that may set variables whose names do not stand in the script."""

_USE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
"""A variable that is used, and neither set nor tested."""

_LARGEST = 65536  # octets of a file that is read for `cat` or `head`

_DEEPEST = 20  # commands within commands that are looked into

_MOST_SHELLS = 20  # with a script of their own, which may start the next


class RunFile:
    """What a run file says.

    `environ` is what it exports, `chain` the programs that it ends in.  `unexported` are variables
    that are set and not exported, with their line, their value, and whether the script uses them;
    `notes` what was not understood; `missing_users` whom `id` would not find; `has_joined_log`
    whether descriptor 2 goes to the log (`2>&1`); `made_directories` those that the script makes;
    `replaces_shell` whether what it ends in does (`exec`), or has a shell or a pipe around it.
    """

    def __init__(self, script: str, directory: str) -> None:
        self.notes: list[str] = []
        self.chain = Chain(directory, self._note)
        self.environ: dict[str, str] = {"PATH": os.environ.get("PATH", os.defpath)}
        self.unexported: list[tuple[int, str, str, bool]] = []
        self.missing_users: list[str] = []
        self.has_joined_log = False
        self.replaces_shell = False
        self.made_directories: set[str] = set()
        self._named: set[str] = set()
        self._sets_anything = False
        self._variables: dict[str, str | None] = {}
        self._set_at: dict[str, int] = {}
        self._exports_all = False
        self._line = 0
        self._shells = 0
        self._is_over = False
        self._read(script.replace("\0", ""), "the script")  # sh passes over them
        for name, line in self._set_at.items():
            if name not in self.environ:
                is_used = bool(re.search(rf"\$\{{?{name}\b", script))
                self.unexported.append((line, name, self._variables.get(name) or "", is_used))

    def _read(self, script: str, called: str) -> None:
        """Follow a script, if it can be taken apart."""
        try:
            commands = shellwords.parse(script)
        except shellwords.ScriptError as error:
            self._note(f"{called} has {error}; nothing of it was read")
        else:
            self._follow(commands)

    def _note(self, text: str) -> None:
        note = f"line {self._line}: {text}" if self._line else text
        if note not in self.notes:
            self.notes.append(note)

    def never_set(self, word: str) -> list[str]:
        """The variables in a word, as it is written, that nothing in the script can have set."""
        if self._sets_anything or self.chain.has_gap:
            return []
        names = [plain or braced for plain, braced in _USE.findall(word)]
        return [name for name in names if name not in self._named]

    def _follow(self, commands: Sequence[Command]) -> None:
        """Go through the commands as sh would, for as long as it is clear what it would do."""
        for command in commands:
            self._sets_anything = self._sets_anything or _name(command) in _SETS_ANYTHING
            for word in command.words:
                self._named.update(re.findall(r"\w+", _USE.sub("", word.source)))
        at = 0
        while at < len(commands) and not self._is_over:
            command = commands[at]
            self._line = command.line
            if _first(command) in _OPENING:
                end = _end_of_block(commands, at)
                self._pass_over(commands[at:end])
                at = end
                continue
            if self._is_taken(commands, at):
                self._obey(command)
            at += 1

    def _is_taken(self, commands: Sequence[Command], at: int) -> bool:
        """Whether sh gets to a command that stands behind `&&`, `||` or `|`: a test may fail, all
        else is expected to succeed.
        """
        command = commands[at]
        if command.before not in ("&&", "||", "|", "|&"):
            return True
        if _first(commands[at - 1]) in ("[", "test", "[[") and command.before in ("&&", "||"):
            self._pass_over([command])
            return False
        return command.before == "&&"

    def _pass_over(self, commands: Sequence[Command]) -> None:
        """Leave out commands that may or may not be run; what they would set is not known."""
        for command in commands:
            self._heed_mkdir(command)
        odd = [command for command in commands if not _is_harmless(command)]
        if odd:
            words = " ".join(word.source for word in commands[0].words[:6])
            self._note(f"what depends on `{words}` is not counted")
        for command in odd:
            for word in command.words:
                name, equals, _ = word.source.partition("=")
                if equals:
                    self._variables[name] = None

    def _obey(self, command: Command) -> None:
        """Do what a command would do to what is started."""
        self._heed_mkdir(command)
        assigned, words = self._split(command)
        name = words[0].literal if words else None
        if name in _BUILTINS:
            _BUILTINS[name](self, words[1:])
        elif not words:
            for variable, value in assigned:
                self._assign(variable, value)
        elif name == "exec" and len(words) == 1:
            self._join(command)
        elif name in (".", "source"):
            self._note(f"what `{name} {words[-1].source}` sets is not counted")
        elif name == "cd" and len(words) == 2:
            self.chain.change_directory(self._text(words[1]))
        elif name == "ulimit":
            self._ulimit([self._text(word) for word in words[1:]])
        elif name not in _HARMLESS:
            self._start(command, dict(assigned), words)

    def _split(self, command: Command) -> tuple[list[tuple[str, str | None]], list[Word]]:
        """The assignments that a command begins with, and its words."""
        assigned, words = [], list(command.words)
        while words and (found := _assignment(words[0])):
            assigned.append((found[0], self._value(found[1])))
            words.pop(0)
        return assigned, words

    def _assign(self, name: str, value: str | None) -> None:
        self._variables[name] = value
        self._set_at[name] = self._line
        if self._exports_all or name in self.environ or name in _EXPORTED:
            self._put(name, value)

    def _put(self, name: str, value: str | None) -> None:
        if value is not None:
            self.environ[name] = value
        else:
            self._set_at.pop(name, None)  # it is exported, whatever it is
            self.environ.pop(name, None)

    # Commands

    def _export(self, words: Sequence[Word]) -> None:
        for word in words:
            assignment = _assignment(word)
            if assignment:
                name = assignment[0]
                self._variables[name] = self._value(assignment[1])
            else:
                name = self._text(word)
            if name in self._variables:
                self._put(name, self._variables[name])

    def _readonly(self, words: Sequence[Word]) -> None:
        for word in words:
            if assignment := _assignment(word):
                self._assign(assignment[0], self._value(assignment[1]))

    def _unset(self, words: Sequence[Word]) -> None:
        for word in words:
            for variables in (self._variables, self._set_at, self.environ):
                variables.pop(self._text(word), None)

    def _set(self, words: Sequence[Word]) -> None:
        text = " ".join(word.source for word in words)
        self._exports_all = self._exports_all or "-a" in text or "allexport" in text

    def _ulimit(self, words: Sequence[str]) -> None:
        number = number_in(words[-1]) if words else None
        if number is not None:
            for name in ("as", "data"):
                if f"-{'v' if name == 'as' else 'd'}" in words[:-1]:
                    self.chain.limit(name, number * 1024)

    def _join(self, command: Command) -> None:
        """Heed where `exec 2>&1`, or the last command, sends descriptor 2."""
        for target in command.redirections:
            if target.startswith(("2>", "&>", ">&")):
                self.has_joined_log = not target.endswith("/dev/null")

    def _start(
        self, command: Command, assigned: Mapping[str, str | None], words: Sequence[Word]
    ) -> None:
        """A program is started; if the chain that it begins is ours, the script is over."""
        texts = [text for word in words for text in self._texts(word)]
        replaces_shell = texts[:1] == ["exec"]
        texts = texts[1:] if replaces_shell else texts
        if not texts:  # of variables that are empty
            return
        environ = {**self.environ, **{k: v for k, v in assigned.items() if v is not None}}
        if self.chain.follow(texts, environ):
            self.environ = environ
            self.replaces_shell = replaces_shell or command.after in ("|", "|&", "&")
            self._join(command)
            self._is_over = True
        elif self.chain.script is not None:
            self._join(command)
            self._follow_shell(self.chain.script, environ)
        elif replaces_shell:
            self._note(f"`exec {texts[0]}` ends the script, and no qmail-smtpd was found behind it")
            self._is_over = True
        else:
            self._note(f"what `{texts[0]}` does is not known")

    def _follow_shell(self, script: str, environ: dict[str, str]) -> None:
        """A shell with a script of its own; what that sets is gone with it."""
        self.chain.script = None
        self._shells += 1
        if self._shells > _MOST_SHELLS:
            self._note("so many shells with scripts are not followed")
            return
        before, self.environ = self.environ, environ
        self._read(script, "the script of a shell")
        if not self._is_over:
            self.environ = before

    def _heed_mkdir(self, command: Command) -> None:
        """Keep the names of directories that are made, whether or not it is clear that they are."""
        if _name(command) not in ("mkdir", "install"):
            return
        for word in command.words[1:]:
            pieces = [self._part(part) for part in word.parts]
            path = "".join(piece or "" for piece in pieces)
            if None not in pieces and not path.startswith("-"):
                path = os.path.join(self.chain.directory, path)
                self.made_directories.add(os.path.normpath(path))

    # Words

    def _value(self, word: Word) -> str | None:
        """The text of a word, or None where it is not known; that is noted."""
        pieces = [self._part(part) for part in word.parts]
        if None in pieces:
            self._note(f"{word.source} is not known without running the script")
            return None
        return "".join(piece or "" for piece in pieces)

    def _text(self, word: Word) -> str:
        """The text of a word, or what is written where that is not known."""
        value = self._value(word)
        return word.source if value is None else value

    def _texts(self, word: Word) -> list[str]:
        """The words that sh makes of one: what is not quoted is parted at blanks."""
        text = self._value(word)
        if text is None:
            return [word.source]
        if any(part.kind != shellwords.TEXT and not part.quoted for part in word.parts):
            return text.split()
        return [text]

    def _part(self, part: Part) -> str | None:
        if part.kind == shellwords.TEXT:
            return part.text
        if part.kind == shellwords.COMMAND:
            return self._answer(part.text)
        if part.kind == shellwords.VARIABLE:
            known = {**self.environ, **self._variables}
            value = known.get(part.text, None if part.default is None else "")
            return part.default if value == "" and part.default is not None else value
        return None

    def _answer(self, script: str) -> str | None:
        """What a command would print, of those that need not be run to know it, or None."""
        if script.count("$(") > _DEEPEST:
            return None
        try:
            commands = shellwords.parse(script)
        except shellwords.ScriptError:
            return None
        if len(commands) != 1:
            return None
        words = [self._value(word) for word in commands[0].words]
        known = [word for word in words if word is not None]
        if len(known) != len(words) or not known:
            return None
        if os.path.basename(known[0]) == "id" and len(known) == 3 and known[1] in ("-u", "-g"):
            return self._id(*known[1:])
        return _answer(*known)

    def _id(self, option: str, name: str) -> str | None:
        """What `id -u NAME` and `id -g NAME` print."""
        try:
            user = pwd.getpwnam(name)
        except (KeyError, ValueError):  # or it is no name at all
            self.missing_users.append(name)
            return None
        return str(user.pw_uid if option == "-u" else user.pw_gid)


def is_for_shell(script: str) -> bool:
    """Whether the first line names no interpreter, or a shell."""
    if not script.startswith("#!"):
        return True
    words = script[2:].partition("\n")[0].split()
    names = [os.path.basename(word) for word in words if not word.startswith("-")]
    if names[:1] == ["env"]:
        names.pop(0)
    return not names or names[0] in _SHELLS


_SHELLS = ("sh", "ash", "bash", "busybox", "dash", "ksh", "mksh", "zsh")

_BUILTINS: dict[str, Callable[[RunFile, Sequence[Word]], None]] = {
    "export": RunFile._export,
    "readonly": RunFile._readonly,
    "unset": RunFile._unset,
    "set": RunFile._set,
}
"""Commands that change variables, or what happens to them."""


def _first(command: Command) -> str | None:
    """The first word of a command, if it has one, and that is a plain one."""
    return command.words[0].literal if command.words else None


def _name(command: Command) -> str | None:
    """The same behind `then` and the like."""
    first = _first(command)
    if first in _BETWEEN and len(command.words) > 1:
        first = command.words[1].literal
    return first


def _is_harmless(command: Command) -> bool:
    name = _name(command)
    return name is None or name in _HARMLESS or name in _OPENING


def _end_of_block(commands: Sequence[Command], start: int) -> int:
    """Behind the last command of what begins with `if`, `while`, `{` and the like."""
    depth = 0
    for at in range(start, len(commands)):
        command = commands[at]
        depth += (_first(command) in _OPENING) - (_first(command) in _CLOSING)
        if not depth:
            return at + 1
    return len(commands)


def _assignment(word: Word) -> tuple[str, Word] | None:
    """The name and the value of NAME=value, or None."""
    name, equals, _ = word.source.partition("=")
    if not equals or not name.isidentifier() or not name.isascii():
        return None
    parts, left = [], len(name) + 1
    for part in word.parts:
        if left and part.kind == shellwords.TEXT and not part.quoted:
            left -= 1
        else:
            parts.append(part)
    return name, type(word)(parts, word.source.partition("=")[2])


def _answer(name: str, *rest: str) -> str | None:
    """What `head`, `cat` or `hostname` print, or None for any other command."""
    if os.path.basename(name) == "hostname" and rest in ((), ("-f",), ("--fqdn",)):
        return socket.getfqdn() if rest else socket.gethostname()
    if os.path.basename(name) == "head" and rest[:-1] in (("-n", "1"), ("-1",), ("-n1",)):
        return _content(rest[-1]).partition("\n")[0]
    if os.path.basename(name) == "cat" and len(rest) == 1:
        return _content(rest[0]).rstrip("\n")
    return None


def _content(path: str) -> str:
    """A file's text; that of one that can not be read is empty, as `cat` would have it."""
    try:
        if not os.path.isfile(path):
            return ""
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(_LARGEST)
    except OSError:
        return ""
