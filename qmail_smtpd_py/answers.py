"""What the small commands of run files print, and what `test` says, without running any of them.

    MAX=$(cat /var/qmail/control/concurrencyincoming 2>/dev/null || echo 20)
    QMAILDIR=$(getent passwd qmaild | cut -d: -f6)

Only what reads and changes nothing is answered, and only in the forms that are met; for all else
the answer is None: it is not known.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import socket
from typing import NamedTuple

from .unknown import is_known, joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .shellwords import Command, Word

_LARGEST = 65536  # characters of a file that is read
_OF_THE_KERNEL = ("/proc/", "/sys/", "/dev/")


class Answer(NamedTuple):
    """What was printed, and whether the exit status was 0."""

    text: str
    is_ok: bool = True


_NOTHING = Answer("", is_ok=False)


class NotKnown(Exception):
    """What a file has, or whether it is there, is not known."""


class Asker:
    """What is asked in one script: `value` is the text of a word, or None; `directory` and `search`
    say where the script is, and PATH.  `missing_users` are those that `id` would not find.
    """

    def __init__(
        self,
        value: Callable[[Word], str | None],
        directory: Callable[[], str],
        search: Callable[[], str],
    ) -> None:
        self._value = value
        self._directory = directory
        self._search = search
        self.missing_users: list[str] = []
        self._missing = ""

    def ask(self, commands: Sequence[Command], is_for_value: bool = False) -> Answer | None:
        """What commands would print, as `$(...)` has it; a user who is not there is told of where
        that is a value.
        """
        printed, answer, self._missing = "", Answer(""), ""
        for command in commands:
            if command.before in ("&&", "||") and answer.is_ok is not (command.before == "&&"):
                continue
            if command.before not in ("", "\n", ";", "&&", "||", "|"):
                return None
            try:
                found = self._ask_one(command, answer.text if command.before == "|" else "")
            except NotKnown:
                return None
            if found is None:
                return None
            answer = found
            printed += "" if command.after == "|" else answer.text
        if is_for_value and self._missing and not answer.is_ok:
            self.missing_users.append(self._missing)
            return None
        return Answer(printed.rstrip("\n"), answer.is_ok)

    def _ask_one(self, command: Command, text: str) -> Answer | None:
        """What one command prints that is given a text."""
        is_lost = False
        for redirection in command.redirections:
            target = self._value(redirection.target)
            if redirection.operator == "<" and target is not None:
                text = self.content(target) or ""
            elif not redirection.operator.startswith("2>"):
                if target != os.devnull:
                    return None
                is_lost = True
        words = [self._value(word) for word in command.words]
        known = [word for word in words if word is not None]
        if len(known) != len(words) or not known:
            return None
        asked = _COMMANDS.get(os.path.basename(known[0]))
        answer = asked(self, known[1:], text) if asked else None
        return answer._replace(text="") if answer and is_lost else answer

    def content(self, path: str) -> str | None:
        """A file's text, or None where there is none; no pipe or device is waited for.  Raises
        NotKnown.
        """
        path = self._found(path)
        try:
            if not os.path.isfile(path):
                return None
            if os.path.realpath(path).startswith(_OF_THE_KERNEL):
                raise NotKnown
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise NotKnown
            return text
        except PermissionError:
            raise NotKnown from None
        except (OSError, ValueError):  # or it is no name at all
            return None

    def _found(self, path: str) -> str:
        """A path from where the script is; raises NotKnown where nobody knows, or may look."""
        whole = joined(self._directory(), path)
        if not is_known(whole):
            raise NotKnown
        try:
            os.stat(whole)
        except PermissionError:
            raise NotKnown from None
        except (OSError, ValueError):
            pass  # it is not there, or is no name at all
        return whole

    def knows(self, name: str | None) -> bool:
        """Whether it may have an answer for a command."""
        return name is not None and os.path.basename(name) in _COMMANDS

    # Commands

    def _cat(self, words: Sequence[str], text: str) -> Answer | None:
        if any(word.startswith("-") for word in words):
            return None
        found = [self.content(path) for path in words]
        if not words:
            return Answer(text)
        return Answer("".join(text or "" for text in found), None not in found)

    def _head(self, words: Sequence[str], text: str) -> Answer | None:
        for first in (("-n", "1"), ("-1",), ("-n1",)):
            rest = words[len(first) :]
            if tuple(words[: len(first)]) == first and len(rest) < 2:
                content = self.content(rest[0]) if rest else text
                line = (content or "").partition("\n")[0]
                return Answer(f"{line}\n" if line else "", content is not None)
        return None

    def _cut(self, words: Sequence[str], text: str) -> Answer | None:
        options = "".join(words)
        mark, _, field = options.removeprefix("-d").partition("-f")
        if not options.startswith("-d") or len(mark) != 1 or field not in _FIELDS:
            return None
        lines = [line.split(mark) for line in text.splitlines()]
        at = _FIELDS.index(field)
        cut = [line[0] if len(line) == 1 else "".join(line[at : at + 1]) for line in lines]
        return Answer("".join(f"{word}\n" for word in cut))

    def _echo(self, words: Sequence[str], _: str) -> Answer | None:
        if words and words[0].startswith("-"):
            return None
        return Answer(" ".join(words) + "\n")

    def _true(self, *_: object) -> Answer:
        return Answer("")

    def _hostname(self, words: Sequence[str], _: str) -> Answer | None:
        if words in (["-f"], ["--fqdn"]):
            return Answer(socket.getfqdn() + "\n")
        name = socket.gethostname()
        if words in (["-s"], ["--short"]):
            name = name.partition(".")[0]
        return Answer(name + "\n") if words in ([], ["-s"], ["--short"]) else None

    def _uname(self, words: Sequence[str], _: str) -> Answer | None:
        return Answer(os.uname().nodename + "\n") if words == ["-n"] else None

    def _id(self, words: Sequence[str], _: str) -> Answer | None:
        options = [word for word in words if word.startswith("-")]
        names = [word for word in words if not word.startswith("-")]
        if options not in (["-u"], ["-g"]) or len(names) != 1:
            return None
        entry = _entry("passwd", names[0])
        if entry is None:
            self._missing = names[0]
            return None if names[0].isdecimal() else _NOTHING
        return Answer(entry[2 if options == ["-u"] else 3] + "\n")

    def _getent(self, words: Sequence[str], _: str) -> Answer | None:
        if len(words) != 2 or words[0] not in ("passwd", "group"):
            return None
        entry = _entry(*words)
        return Answer(":".join(entry) + "\n") if entry else _NOTHING

    def _which(self, words: Sequence[str], _: str) -> Answer | None:
        if words[:1] == ["-v"]:  # command -v
            words = words[1:]
        if len(words) != 1 or words[0].startswith("-"):
            return None
        if words[0] in _OF_SHELLS:
            return Answer(words[0] + "\n")
        path = shutil.which(words[0], path=self._search())
        return Answer(path + "\n") if path else _NOTHING

    def _dirname(self, words: Sequence[str], _: str) -> Answer | None:
        if len(words) != 1:
            return None
        path = words[0].rstrip("/") or "/"
        return Answer(
            (os.path.dirname(path).rstrip("/") or ("/" if path[0] == "/" else ".")) + "\n"
        )

    def _basename(self, words: Sequence[str], _: str) -> Answer | None:
        if len(words) != 1:
            return None
        return Answer((os.path.basename(words[0].rstrip("/")) or words[0][:1]) + "\n")

    # Tests

    def test(self, words: Sequence[str]) -> bool | None:
        """What `[ ... ]` says, or None."""
        for operator, combine in (("-o", any), ("-a", all)):
            if operator in words[1:-1]:
                at = words.index(operator, 1)
                both = [self.test(words[:at]), self.test(words[at + 1 :])]
                decisive = operator == "-o"
                return None if None in both and decisive not in both else combine(map(bool, both))
        if words[:1] == ["!"] and len(words) > 1:
            found = self.test(words[1:])
            return None if found is None else not found
        if len(words) == 2:
            return self._test_one(*words)
        if len(words) == 3:
            return _compare(*words)
        return bool(words and words[0]) if len(words) < 2 else None

    def _test_one(self, operator: str, operand: str) -> bool | None:
        if operator in ("-n", "-z"):
            return bool(operand) is (operator == "-n")
        test = _OF_FILES.get(operator)
        if test is None:
            return None
        try:
            return bool(operand) and test(self._found(operand))
        except NotKnown:
            return None
        except (OSError, ValueError):
            return False


def _entry(database: str, name: str) -> list[str] | None:
    """An entry of passwd(5) or group(5)."""
    try:
        found = pwd.getpwnam(name) if database == "passwd" else grp.getgrnam(name)
    except (KeyError, ValueError):  # or it is no name at all
        return None
    if isinstance(found, grp.struct_group):
        return [found.gr_name, "x", str(found.gr_gid), ",".join(found.gr_mem)]
    return [found.pw_name, "x", *map(str, found[2:])]


def _compare(left: str, operator: str, right: str) -> bool | None:
    if operator in ("=", "==", "!="):
        return (left == right) is (operator != "!=")
    if operator in _OF_NUMBERS and left.isdecimal() and right.isdecimal():
        difference = (int(left[:25]) > int(right[:25])) - (int(left[:25]) < int(right[:25]))
        return difference in _OF_NUMBERS[operator]
    return None


_FIELDS = [str(number) for number in range(1, 100)]

_OF_SHELLS = {
    *("cd", "command", "echo", "eval", "exec", "export", "printf", "read", "set", "test", "["),
    *("trap", "type", "ulimit", "umask", "unset", "wait"),
}
"""What `command -v` finds in no directory."""

_OF_NUMBERS = {
    "-eq": (0,),
    "-ne": (-1, 1),
    "-lt": (-1,),
    "-le": (-1, 0),
    "-gt": (1,),
    "-ge": (0, 1),
}

_OF_FILES: dict[str, Callable[[str], bool]] = {
    "-e": os.path.exists,
    "-f": os.path.isfile,
    "-d": os.path.isdir,
    "-h": os.path.islink,
    "-L": os.path.islink,
    "-s": lambda path: os.stat(path).st_size > 0,
    "-r": lambda path: os.access(path, os.R_OK),
    "-w": lambda path: os.access(path, os.W_OK),
    "-x": lambda path: os.access(path, os.X_OK),
}

_COMMANDS: dict[str, Callable[[Asker, Sequence[str], str], Answer | None]] = {
    "basename": Asker._basename,
    "cat": Asker._cat,
    "command": Asker._which,
    "cut": Asker._cut,
    "dirname": Asker._dirname,
    "echo": Asker._echo,
    "getent": Asker._getent,
    "head": Asker._head,
    "hostname": Asker._hostname,
    "id": Asker._id,
    "true": Asker._true,
    "uname": Asker._uname,
    "which": Asker._which,
}
