"""A sh script taken apart into commands and words, without running anything of it.

Quoting, comments and continued lines are those of sh(1).  What stands behind `$` and in backquotes
is kept as a part of its word, for the reader to replace where it knows by what.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT, VARIABLE, COMMAND, HOME, UNKNOWN = "text", "variable", "command", "home", "unknown"

OPENING = ("if", "while", "until", "for", "case", "{", "(")
CLOSING = ("fi", "done", "esac", "}", ")")
"""The words that begin and end what is one command to sh, of several."""

_RESERVED = ("if", "then", "elif", "else", "while", "until", "do", "{")
"""Words that a command can stand behind, without an operator; here they are commands themselves."""

_SHELLS = ("sh", "ash", "bash", "busybox", "dash", "ksh", "mksh", "zsh")

_NO_SCRIPT = re.compile(r"\[\w+\]$|service\s+\w+\s*\{?$|\S+\s+stream\s+tcp")

_BLANKS = " \t\r"
_OPERATORS = ("&&", "||", ";;", "|&", ";", "|", "&", "()", "(", ")", "\n")
_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789"
_OF_VARIABLES = (":-", "-", ":=", "=", ":+", "+")


class Part(NamedTuple):
    """A piece of a word: its kind, its text, and whether it stood in quotation marks.

    Of a variable the text is its name, with the operator and what is behind it in `${NAME:-x}`; of
    a home directory it is the user, who may be nobody (`~`).
    """

    kind: str
    text: str
    quoted: bool
    operator: str = ""
    argument: str = ""


class Word(NamedTuple):
    """A word: its parts, and how it is written."""

    parts: list[Part]
    source: str

    @property
    def literal(self) -> str | None:
        """The text of a word that has nothing to be replaced, or None."""
        if any(part.kind != TEXT for part in self.parts):
            return None
        return "".join(part.text for part in self.parts)

    @property
    def has_pattern(self) -> bool:
        """Whether it may stand for names of files."""
        bare = [part.text for part in self.parts if part.kind == TEXT and not part.quoted]
        return "*" in bare or "?" in bare or ("[" in bare and "]" in bare)

    @property
    def is_plain(self) -> bool:
        """Whether it is written as it is meant, so that it can be one of the shell's own words."""
        return self.literal == self.source


class Redirection(NamedTuple):
    """A redirection: its operator, with the descriptor if that is named, and its word."""

    operator: str
    target: Word

    def __str__(self) -> str:
        return self.operator + self.target.source


class Command(NamedTuple):
    """A simple command: its words, its redirections, the operators around it.

    The shell's reserved words, and `(` and `)`, are commands of one word; the name of a function
    that is defined is one with `()` behind it.
    """

    line: int
    words: list[Word]
    redirections: list[Redirection]
    before: str
    after: str


class ScriptError(Exception):
    """The script ends inside of something."""


def is_for_shell(script: str) -> bool:
    """Whether the first line names no interpreter, or a shell; units of systemd and lines for inetd
    or xinetd name none, either.
    """
    if not script.startswith("#!"):
        lines = [line for line in map(str.strip, script.splitlines()) if line[:1] not in ("", "#")]
        return not lines or not _NO_SCRIPT.match(lines[0])
    words = script[2:].partition("\n")[0].split()
    names = [os.path.basename(word) for word in words if not word.startswith("-")]
    if names[:1] in (["env"], ["with-contenv"]):
        names.pop(0)
    return not names or names[0] in _SHELLS


def parse(script: str) -> list[Command]:
    """The commands of a script, in their order; raises ScriptError."""
    return _Parser(script).commands()


def inside_quotes(text: str) -> Word:
    """A text as it is in double quotation marks, those in it left out; raises ScriptError."""
    return _Parser('"' + text.replace('"', "") + '"').word()


def first_word(command: Command) -> str | None:
    """The first word of a command, if it has one, and that is a plain one."""
    return command.words[0].literal if command.words else None


def written(command: Command) -> str:
    """A command as it is written, without its redirections."""
    return " ".join(word.source for word in command.words)


def end_of_block(commands: Sequence[Command], start: int) -> int:
    """Behind the last command of what begins with `if`, `while`, `{` and the like."""
    depth = 0
    for at in range(start, len(commands)):
        first = first_word(commands[at])
        depth += (first in OPENING) - (first in CLOSING)
        if depth <= 0:
            return at + 1
    return len(commands)


def clauses(block: Sequence[Command]) -> list[tuple[str, Sequence[Command]]]:
    """What stands behind `if`, `then`, `elif` and `else` of one `if`."""
    found: list[tuple[str, Sequence[Command]]] = []
    depth, start, keyword = 0, 1, "if"
    for at, command in enumerate(block):
        first = first_word(command)
        depth += (first in OPENING) - (first in CLOSING)
        if (depth == 1 and first in ("then", "elif", "else")) or not depth or at + 1 == len(block):
            found.append((keyword, block[start:at]))
            start, keyword = at + 1, first or ""
    return found


def assignment(word: Word) -> tuple[str, Word] | None:
    """The name and the value of NAME=value, or None."""
    name, equals, _ = word.source.partition("=")
    if not equals or not name.isidentifier() or not name.isascii():
        return None
    parts, left = [], len(name) + 1
    for part in word.parts:
        if left and part.kind == TEXT and not part.quoted:
            left -= 1
        else:
            parts.append(part)
    return name, Word(parts, word.source.partition("=")[2])


class _Parser:
    def __init__(self, script: str) -> None:
        self._text = script
        self._at = 0
        self._commands: list[Command] = []
        self._before = ""
        self._depth = self._cases = 0
        self._documents: list[tuple[str, bool]] = []

    def commands(self) -> list[Command]:
        while self._at < len(self._text):
            self._take_command()
        return self._commands

    def _take_command(self) -> None:
        """Take what stands before the next operator, and that."""
        line = self._skip_blanks()
        words: list[Word] = []
        redirections: list[Redirection] = []
        while True:
            operator = self._operator()
            is_pattern = self._cases or (words and words[0].source == "case")
            if operator == ")" and self._depth and not is_pattern:
                self._add(line, words, redirections, operator)
                self._depth -= 1
                words, redirections = [Word([Part(TEXT, ")", False)], ")")], []
            elif operator == "(" and all(word.source in (*_RESERVED, "!") for word in words):
                self._depth += 1
                for word in words:
                    self._add(line, [word], [], "")
                self._add(line, [Word([Part(TEXT, "(", False)], "(")], [], "")
                words = []
            elif operator is not None:
                self._add(line, words, redirections, operator)
                return
            elif (redirection := self._redirection()) is not None:
                redirections.append(redirection)
            else:
                words.append(self.word())
            self._skip_blanks()

    def _add(
        self, line: int, words: list[Word], redirections: list[Redirection], operator: str
    ) -> None:
        """Add a command, apart from the reserved words before it."""
        while len(words) > 1 and words[0].is_plain and words[0].source in _RESERVED:
            self._commands.append(Command(line, words[:1], [], self._before, ""))
            words, self._before = words[1:], ""
        if len(words) > 2 and words[0].source == "function":  # bash's way
            self._commands.append(Command(line, words[1:2], [], self._before, "()"))
            self._before = "()"
            self._add(line, words[2:], redirections, operator)
            return
        if words or redirections:
            first = words[0].source if words else ""
            self._cases = max(0, self._cases + (first == "case") - (first == "esac"))
            self._commands.append(Command(line, words, redirections, self._before, operator))
        if words or redirections or operator != "\n":
            self._before = operator

    def _skip_blanks(self) -> int:
        """Go on to the next word, over blanks, comments and continued lines; the line number."""
        text = self._text
        while self._at < len(text):
            if text[self._at] in _BLANKS:
                self._at += 1
            elif text.startswith("\\\n", self._at):
                self._at += 2
            elif text[self._at] == "#":
                end = text.find("\n", self._at)
                self._at = len(text) if end < 0 else end
            else:
                break
        return text.count("\n", 0, self._at) + 1

    def _operator(self) -> str | None:
        """Take the operator that ends a command, or the end of the script; None at another word."""
        if self._at >= len(self._text):
            return "\n"
        for operator in _OPERATORS:
            if self._text.startswith("&>", self._at):
                break
            if self._text.startswith(operator, self._at):
                self._at += len(operator)
                if operator == "\n":
                    self._skip_documents()
                return operator
        return None

    def _skip_documents(self) -> None:
        """Go on behind the here-documents that begin with this line."""
        for delimiter, has_tabs in self._documents:
            while self._at < len(self._text):
                line, _, _ = self._text[self._at :].partition("\n")
                self._at += len(line) + 1
                if (line.lstrip("\t") if has_tabs else line) == delimiter:
                    break
        self._documents.clear()

    def _redirection(self) -> Redirection | None:
        """Take a redirection, such as `2>&1`; None where there is none."""
        start = self._at
        end = start
        while end < len(self._text) and self._text[end].isdigit():
            end += 1
        if self._text.startswith("&>", end):
            end += 1
        if end >= len(self._text) or self._text[end] not in "<>":
            return None
        while end < len(self._text) and self._text[end] in "<>&|":
            end += 1
        has_tabs = self._text.startswith("<<-", end - 2)
        self._at = end + has_tabs
        operator = self._text[start:end]
        self._skip_blanks()
        target = self.word()
        if operator.endswith("<<") and not operator.endswith("<<<"):
            self._documents.append(("".join(part.text for part in target.parts), has_tabs))
        return Redirection(operator, target)

    def word(self) -> Word:
        """Take a word."""
        start, parts = self._at, []
        while self._at < len(self._text) and self._text[self._at] not in " \t\r\n;&|()<>":
            before = self._text[start : self._at]
            is_value = before.endswith("=") and before[:-1].isidentifier()
            if self._text[self._at] == "~" and (is_value or not before):
                parts.append(self._tilde())
                continue
            parts += self._piece()
            if self._text.startswith("=(", self._at - 1) and before.isidentifier():
                self._at = _end_of(self._text, self._at + 1, "()")
                parts.append(Part(UNKNOWN, "", False))
        return Word(parts, self._text[start : self._at].replace("\\\n", ""))

    def _tilde(self) -> Part:
        """Take `~` or `~USER`."""
        end = self._at + 1
        while end < len(self._text) and (self._text[end] in _NAME or self._text[end] in ".-"):
            end += 1
        user = self._text[self._at + 1 : end]
        self._at = end
        return Part(HOME, user, False)

    def _piece(self) -> list[Part]:
        """Take what is quoted in one way, or one substitution."""
        letter = self._text[self._at]
        if letter == "'":
            return [Part(TEXT, self._until("'"), True)]
        if letter == '"':
            return self._double_quoted()
        if letter in "$`":
            return [self._substitution(False)]
        self._at += 1
        if letter == "\\":
            escaped = self._text[self._at : self._at + 1]
            self._at += 1
            return [] if escaped == "\n" else [Part(TEXT, escaped, True)]
        return [Part(TEXT, letter, False)]

    def _until(self, mark: str) -> str:
        """Take what stands between here and the next mark; raises ScriptError."""
        start = self._at + 1
        end = self._text.find(mark, start)
        if end < 0:
            raise ScriptError(f"a {mark} without its end")
        self._at = end + 1
        return self._text[start:end]

    def _in_backquotes(self) -> str:
        """Take a command in backquotes, in which others are escaped; raises ScriptError."""
        start = self._at + 1
        self._at = _end_of_quote(self._text, start, "`")
        return re.sub(r"\\([$`\\])", r"\1", self._text[start : self._at - 1])

    def _double_quoted(self) -> list[Part]:
        self._at += 1
        parts = [Part(TEXT, "", True)]
        while self._at < len(self._text):
            letter = self._text[self._at]
            if letter == '"':
                self._at += 1
                return parts
            if letter in "$`":
                parts.append(self._substitution(True))
                continue
            if letter == "\\" and self._text[self._at + 1 : self._at + 2] in ("$", "`", '"', "\\"):
                self._at += 1
                letter = self._text[self._at]
            elif self._text.startswith("\\\n", self._at):
                self._at += 2
                continue
            self._at += 1
            parts.append(Part(TEXT, letter, True))
        raise ScriptError('a " without its end')

    def _substitution(self, quoted: bool) -> Part:
        """Take `$NAME`, `${...}`, `$(...)` or a command in backquotes."""
        text = self._text
        if text[self._at] == "`":
            return Part(COMMAND, self._in_backquotes(), quoted)
        following = text[self._at + 1 : self._at + 2]
        if following == "(":
            start = self._at + 2
            self._at = _end_of(text, start, "()")
            inside = text[start : self._at - 1]
            return Part(UNKNOWN if inside.startswith("(") else COMMAND, inside, quoted)
        if following == "{":
            start = self._at + 2
            self._at = _end_of(text, start, "{}", quoted)
            return _braced(text[start : self._at - 1], quoted)
        if following == "'" and not quoted:  # bash's way to write a line feed
            self._at = _end_of_quote(text, self._at + 2)
            return Part(UNKNOWN, "", quoted)
        end = self._at + 1
        while end < len(text) and text[end] in _NAME:
            end += 1
        name = text[self._at + 1 : end]
        if not name:
            self._at += 1
            if following in ("", " ", '"', "\n", "/", "="):
                return Part(TEXT, "$", quoted)
            self._at += 1
            return Part(UNKNOWN, f"${following}", quoted)
        self._at = end
        return Part(UNKNOWN if name[0].isdigit() else VARIABLE, name, quoted)


def _braced(inside: str, quoted: bool) -> Part:
    """`${NAME}`, or with an operator that tells what stands for it; all else is not known."""
    end = next((at for at, letter in enumerate(inside) if letter not in _NAME), len(inside))
    name, rest = inside[:end], inside[end:]
    if name and not name[0].isdigit():
        if not rest:
            return Part(VARIABLE, name, quoted)
        for operator in _OF_VARIABLES:
            if rest.startswith(operator):
                return Part(VARIABLE, name, quoted, operator, rest[len(operator) :])
    return Part(UNKNOWN, f"${{{inside}}}", quoted)


def _end_of_quote(text: str, start: int, mark: str = "'") -> int:
    """Behind the mark that ends what is quoted from `start` on, where a backslash escapes; raises
    ScriptError.
    """
    found = re.compile(rf"(?:[^\\{mark}]|\\.)*{mark}", re.DOTALL).match(text, start)
    if not found:
        raise ScriptError(f"a {mark} without its end")
    return found.end()


def _end_of(text: str, start: int, pair: str, is_quoted: bool = False) -> int:
    """Behind the parenthesis, or brace, that ends what is inside from `start` on; raises
    ScriptError.  In double quotation marks a single one is itself.
    """
    depth, mark, is_escaped = 1, "", False
    for at in range(start, len(text)):
        letter = text[at]
        if is_escaped:
            is_escaped = False
        elif letter == "\\" and mark != "'":
            is_escaped = True
        elif mark:
            mark = "" if letter == mark else mark
        elif letter == '"' or (letter == "'" and not is_quoted):
            mark = letter
        elif letter in pair:
            depth += 1 if letter == pair[0] else -1
            if not depth:
                return at + 1
    raise ScriptError(f"a {pair[0]} without its end")
