"""A sh script taken apart into commands and words, without running anything of it.

Quoting, comments and continued lines are those of sh(1).  What stands behind `$` and in backquotes
is kept as a part of its word, for the reader to replace where it knows by what.
"""

from __future__ import annotations

from typing import NamedTuple

TEXT, VARIABLE, COMMAND, UNKNOWN = "text", "variable", "command", "unknown"

_BLANKS = " \t\r"
_OPERATORS = ("&&", "||", ";;", "|&", ";", "|", "&", "(", ")", "\n")
_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789"


class Part(NamedTuple):
    """A piece of a word: its kind, its text, and whether it stood in quotation marks.

    Of a variable the text is its name, and `default` what stands for it where it is empty.
    """

    kind: str
    text: str
    quoted: bool
    default: str | None = None


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


class Command(NamedTuple):
    """A simple command: its words, its redirections as written, the operators around it."""

    line: int
    words: list[Word]
    redirections: list[str]
    before: str
    after: str


class ScriptError(Exception):
    """The script ends inside of something."""


def parse(script: str) -> list[Command]:
    """The commands of a script, in their order; raises ScriptError."""
    return _Parser(script).commands()


class _Parser:
    def __init__(self, script: str) -> None:
        self._text = script
        self._at = 0

    def commands(self) -> list[Command]:
        commands: list[Command] = []
        before = ""
        while self._at < len(self._text):
            line, words, redirections = self._skip_blanks(), [], []
            while (operator := self._operator()) is None:
                redirection = self._redirection()
                if redirection is None:
                    words.append(self._word())
                elif redirection:
                    redirections.append(redirection)
                self._skip_blanks()
            if words or redirections:
                commands.append(Command(line, words, redirections, before, operator))
            if words or redirections or operator != "\n":
                before = operator
        return commands

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
            if self._text.startswith(operator, self._at):
                self._at += len(operator)
                return operator
        return None

    def _redirection(self) -> str | None:
        """Take a redirection, such as `2>&1`; None where there is none."""
        start = self._at
        end = start
        while end < len(self._text) and self._text[end].isdigit():
            end += 1
        if end >= len(self._text) or self._text[end] not in "<>":
            return None
        if self._text.startswith("<<", end):
            raise ScriptError("a here-document")
        while end < len(self._text) and self._text[end] in "<>&|":
            end += 1
        operator = self._text[start:end]
        self._at = end
        self._skip_blanks()
        return operator + self._word().source

    def _word(self) -> Word:
        """Take a word."""
        start, parts = self._at, []
        while self._at < len(self._text) and self._text[self._at] not in " \t\r\n;&|()<>":
            parts += self._piece()
        return Word(parts, self._text[start : self._at].replace("\\\n", ""))

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
            return Part(COMMAND, self._until("`"), quoted)
        following = text[self._at + 1 : self._at + 2]
        if following == "(":
            start = self._at + 2
            self._at = _end_of_parentheses(text, start)
            inside = text[start : self._at - 1]
            return Part(UNKNOWN if inside.startswith("(") else COMMAND, inside, quoted)
        if following == "{":
            self._at += 1
            return _braced(self._until("}"), quoted)
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
    """`${NAME}`, or with a default behind `:-` or `-`; all else is not known."""
    end = next((at for at, letter in enumerate(inside) if letter not in _NAME), len(inside))
    name, rest = inside[:end], inside[end:]
    if name and not name[0].isdigit() and "$" not in rest and "`" not in rest:
        if not rest:
            return Part(VARIABLE, name, quoted)
        if rest.startswith((":-", "-")):
            return Part(VARIABLE, name, quoted, rest.partition("-")[2].strip("\"'"))
    return Part(UNKNOWN, f"${{{inside}}}", quoted)


def _end_of_parentheses(text: str, start: int) -> int:
    """Behind the parenthesis that ends `$(`; raises ScriptError."""
    depth, mark = 1, ""
    for at in range(start, len(text)):
        letter = text[at]
        if mark:
            mark = "" if letter == mark else mark
        elif letter in "'\"":
            mark = letter
        elif letter in "()":
            depth += 1 if letter == "(" else -1
            if not depth:
                return at + 1
    raise ScriptError("a $( without its end")
