"""The chain of programs that a run file ends in, each of which becomes the next one.

    softlimit -m 64000000 tcpserver -u 1002 -g 1002 0 587 rblsmtpd -b qmail-smtpd checkprogram true

`Chain.follow` goes along it to qmail-smtpd and keeps what each program changes on the way: limits,
user, environment, the port and the rules.  None of them is run.
"""

from __future__ import annotations

import getopt
import grp
import os
import pwd
import socket

from . import options
from .unknown import Unknown, is_known, joined, number_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SMTPD, LISTENER = "qmail-smtpd", options.NAME

_SHELLS = ("sh", "bash", "dash", "ksh")

SERVERS = {
    "tcpserver": (options.SHORT, ()),
    "sslserver": ("01346aAb:B:c:dDeEfFg:hHiIjJl:mMnNoOpPqQrRsSt:u:UvVw:x:XyYzZ", ()),
    LISTENER: (options.SHORT, options.LONG),
}
"""Options of the programs that listen; host and port come behind them."""

_WRAPPERS = {
    "envdir": ("c", 1),
    "s6-envdir": ("ifIn", 1),
    "envuidgid": ("", 1),
    "setuidgid": ("s", 1),
    "s6-setuidgid": ("", 1),
    "gosu": ("", 1),
    "su-exec": ("", 1),
    "softlimit": ("a:c:d:f:l:m:o:p:r:s:t:", 0),
    "s6-softlimit": ("Hha:c:d:f:l:m:o:p:r:s:t:", 0),
    "nice": ("n:0123456789", 0),
    "ionice": ("c:n:t", 0),
    "nohup": ("", 0),
    "setlock": ("nNxX", 1),
    "pgrphack": ("", 0),
    "setsid": ("cfw", 0),
    "fixcrio": ("", 0),
    "recordio": ("", 0),
    "tcp-env": ("rRt:", 0),
    "rblsmtpd": ("a:bBcCr:t:", 0),
}
"""Programs that run another: their options, and how many words follow before it."""

_SOFTLIMITS = {
    "a": ("as",),
    "d": ("data",),
    "m": ("as", "data", "memlock", "stack"),
    "o": ("nofile",),
    "p": ("nproc",),
    "f": ("fsize",),
    "s": ("stack",),
    "l": ("memlock",),
}
"""What each option of softlimit(8) limits, in the words of setrlimit(2)."""

_TAKE_NUMBERS = ("gosu", "su-exec", "s6-setuidgid")
"""Of the programs that become a user, those that can be given ids as well."""

_NO_LIMIT = 2**63 - 1
_LARGEST_ID = 2**32 - 2
_LARGEST_PORT = 65535

PORTS = {"smtp": 25, "submission": 587, "smtps": 465, "submissions": 465, "ssmtp": 465, "urd": 465}

DEFAULT_CONCURRENCY = 40


class _KnownOptions(options.Options):
    """The listener's command line, read by the listener's code, but for values that are not known.

    User and group id are told of by Chain, as those of the other servers are.
    """

    def _take(self, flag: str, value: str) -> None:
        try:
            super()._take(flag, value)
        except ValueError:
            if is_known(value) and flag not in ("-u", "-g", "-U"):
                raise


class Chain:
    """What the programs of a chain say.

    `uid` and `gid` are None where nobody says; `limits` are in octets or a number, or None where
    they are not known; so is `concurrency`.  `server` is what listens, with its `server_flags`;
    `wrappers` are the programs before it that are known.  `program` is the qmail-smtpd or
    qmail-smtpd-listen that was found, with its `arguments`, the check program's; `program_uid` is
    whose it is when it starts, None where nobody says, and `program_search` the PATH by then.
    `programs` are the others: each as it is named, the directory, and where PATH has it looked for;
    `files` are what the listener makes as it starts, by option.  `script` is that of a shell in the
    chain.

    `troubles` are what keeps the chain from getting to its end, and remedies; `odd_ids` the words
    for a server's -u and -g that are no numbers.  `has_gap` is whether a program in it may change
    more than is known, `may_set_anything` and `has_cleared` what that is of the environment,
    `doubtful` the variables that it sets to what is not known, and `lacks_rules` whether there are
    rules whose file is not known.
    """

    def __init__(self, directory: str, note: Callable[[str], None]) -> None:
        self.directory = directory
        self._note = note
        self.limits: dict[str, int | None] = {}
        self.uid: int | None = None
        self.gid: int | None = None
        self.server: str | None = None
        self.host = ""
        self.port: int | None = None
        self.concurrency: int | None = DEFAULT_CONCURRENCY
        self.rules: str | None = None
        self.is_rules_file_optional = False
        self.local_host: str | None = None
        self.helper: str | None = None
        self.logs_by_itself = False
        self.program: str | None = None
        self.program_uid: int | None = None
        self.program_search = os.defpath
        self.programs: list[tuple[str, str, str | None]] = []
        self.files: dict[str, str] = {}
        self.script: str | None = None
        self.arguments: list[str] = []
        self.wrappers: set[str] = set()
        self.server_flags: set[str] = set()
        self.troubles: list[tuple[str, str]] = []
        self.odd_ids: list[tuple[str, str]] = []
        self.has_gap = False
        self.has_cleared = False
        self.may_set_anything = False
        self.doubtful: set[str] = set()
        self.lacks_rules = False

    def limit(self, resource: str, number: int | None) -> None:
        """setrlimit(2), where None is a limit that is not known."""
        self.limits[resource] = None if number is None else min(number, _NO_LIMIT)

    def follow(self, words: list[str], environ: dict[str, str]) -> bool:
        """Go along the chain, changing the environment; whether qmail-smtpd was found."""
        before = len(self.programs)
        while words and self.program is None:
            name = os.path.basename(words[0])
            try:
                words = self._step(name, words, environ)
            except getopt.GetoptError as error:
                if name == LISTENER:
                    self._tell_that_it_does_not_start(error)
                else:
                    self._note(f"{name}: {error}")
                self.has_gap = True
                words = self._search(words[1:])
        if self.program is None and self.script is None:
            del self.programs[before:]  # they need be no programs: builtins, functions
        return self.program is not None

    def _step(self, name: str, words: list[str], environ: dict[str, str]) -> list[str]:
        """Take one program; the words that it runs."""
        rest = words[1:]
        if name not in (SMTPD, LISTENER):
            self.programs.append((words[0], self.directory, environ.get("PATH")))
        if name == SMTPD:
            self._find_program(words[0], environ)
            self.arguments = rest
        elif _is_shell(words):
            self.script, rest = rest[1], []
        elif name in SERVERS:
            rest = self._serve(name, words, environ)
        elif name == "env":
            rest = self._env(rest, environ)
        elif name == "chpst":
            rest = self._chpst(rest, environ)
        elif name == "argv0":
            rest = [*rest[:1], *rest[2:]]
        elif name in _WRAPPERS:
            rest = self._wrap(name, rest, environ)
        else:
            if not is_known(name) or name == "prlimit":
                self.limit("as", None)
            rest = self._search(words, told=False)
        return rest

    def _wrap(self, name: str, words: list[str], environ: dict[str, str]) -> list[str]:
        """A program that changes one thing, or nothing, for what it runs."""
        self.wrappers.add(name)
        short, positional = _WRAPPERS[name]
        flags, rest = self._options(name, words, short)
        argument = rest[0] if rest and positional else ""
        if name.endswith("softlimit"):
            self._limit(name, flags)
        elif name.endswith("envdir"):
            self._take_envdir(name, argument, environ)
        elif name.endswith(("setuidgid", "envuidgid", "gosu", "su-exec")):
            self._become(name, argument, environ, is_for_server=name.endswith("envuidgid"))
        return rest[positional:]

    def _search(self, words: list[str], told: bool = True) -> list[str]:
        """The chain from qmail-smtpd on, behind a program that is not known."""
        known = (SMTPD, *SERVERS)
        for at, word in enumerate(words):
            is_one_word = not any(map(str.isspace, word))
            if (is_one_word and os.path.basename(word) in known) or _is_shell(words[at:]):
                self.has_gap = True
                if not told:
                    self._note(f"what `{words[0]}` changes for qmail-smtpd is not counted")
                return words[at:]
        return []

    def _options(
        self, name: str, words: list[str], short: str, long: Sequence[str] = ()
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """The options of a program, and the words behind them; raises GetoptError.

        What is not known there is passed over, and a letter that is not known is taken for an
        option without a value, as servers have patches.
        """
        found: list[tuple[str, str]] = []
        while True:
            try:
                flags, rest = getopt.getopt(words, short, long)
            except getopt.GetoptError as error:
                is_patched = name in SERVERS and name != LISTENER
                if not is_patched or len(error.opt) != 1 or error.opt in short:
                    raise
                self._note(f"{name}: {error}")
                self.has_gap = True
                short += error.opt
                continue
            found += flags
            if not _may_be_options(rest, name in SERVERS):
                return found, rest
            self._note(f"what `{rest[0]}` says to {name} is not counted")
            self.has_gap = True
            words = rest[1:]

    def _limit(self, name: str, flags: Sequence[tuple[str, str]]) -> None:
        for flag, value in flags:
            number = number_in(value)
            if number is None and is_known(value) and value != "=":
                what = f"{name} {flag} {value!a} is no number, so the service does not start"
                self.troubles.append((what, "write digits only, without a unit"))
            for resource in _SOFTLIMITS.get(flag[1:], ()):
                hard = self.limits.get(resource, number)
                is_lower = hard is not None and number is not None and hard < number
                self.limit(resource, hard if is_lower else number)

    def _take_envdir(self, name: str, path: str, environ: dict[str, str]) -> None:
        path = joined(self.directory, path)
        if not is_known(path):
            self.may_set_anything = self.has_gap = True
            return
        try:
            read_envdir(path, environ)
        except (OSError, ValueError) as error:  # or it is no name at all
            why = error.strerror if isinstance(error, OSError) else error
            what = f"{name} can not read {path}: {why}, so the service does not start"
            self.troubles.append((what, "make that directory, or correct its name"))
            self.may_set_anything = self.has_gap = True

    def _become(
        self, name: str, account: str, environ: dict[str, str], is_for_server: bool = False
    ) -> None:
        """A program becomes a user, with its group or another; or says whom -U is to become."""
        takes_numbers = account.startswith(":") or name in _TAKE_NUMBERS
        user, _, group = account.lstrip(":").partition(":")
        if not is_known(account):
            self.has_gap = True
            if is_for_server:
                environ.update(UID="$UID", GID="$GID")
            return
        ids = _ids_of(user, group, takes_numbers)
        if ids is None:
            what = f"{name}: there is no user {user}, so the service does not start"
            self.troubles.append((what, "make the user, or correct the name"))
        elif is_for_server:
            environ.update(UID=str(ids[0]), GID=str(ids[1]))
        else:
            self.uid, self.gid = ids

    def _chpst(self, words: list[str], environ: dict[str, str]) -> list[str]:
        """chpst(8) of runit, which does what several of the others do."""
        flags, rest = self._options("chpst", words, "u:U:b:e:/:n:l:L:m:d:o:p:f:c:C:r:t:vP012")
        self._limit("chpst", [found for found in flags if found[0][1] in "mdopf"])
        for flag, value in flags:
            if flag == "-e":
                self._take_envdir("chpst", value, environ)
            elif flag in ("-u", "-U"):
                self._become("chpst", value, environ, is_for_server=flag == "-U")
        return rest

    def _env(self, words: list[str], environ: dict[str, str]) -> list[str]:
        """env(1): `-`, `-i`, `-u NAME` and NAME=value; the words of what it runs."""
        flags, rest = self._options("env", words, "iu:", ["ignore-environment", "unset="])
        if rest[:1] == ["-"]:
            flags, rest = [*flags, ("-i", "")], rest[1:]
        for flag, value in flags:
            if flag in ("-i", "--ignore-environment"):
                environ.clear()
                self.doubtful.clear()
                self.has_cleared, self.may_set_anything = True, False
            else:
                environ.pop(value, None)
        while rest and "=" in rest[0]:
            word = rest.pop(0)
            name, _, value = word.partition("=")
            environ.pop(name, None)
            self.doubtful.discard(name)
            if is_known(word):
                environ[name] = value
            else:
                self.doubtful.add(name)
        return rest

    def _serve(self, name: str, words: list[str], environ: dict[str, str]) -> list[str]:
        """A program that listens: its options, host and port; the words of what it starts."""
        short, long = SERVERS[name]
        self.server = name
        starter = self.uid  # before -u counts
        if name == LISTENER:
            self._find_program(words[0], environ)
        flags, rest = self._options(name, words[1:], short, long)
        self.server_flags = {flag for flag, _ in flags}
        for flag, value in flags:
            self._take(flag, value, environ)
        if name == LISTENER:
            self._try_options(words[1 : len(words) - len(rest)], rest)
        self.logs_by_itself = {"--daemon", "--log-file"} <= self.server_flags
        if not self.helper:
            self.host, port = (*rest[:2], "", "")[:2]
            self._find_port(name, port, starter)
            rest = rest[2:]
        if name == LISTENER:
            self.arguments = rest
        return rest

    def _find_program(self, word: str, environ: dict[str, str]) -> None:
        """The program that all of this is for: as it is named, and with what it starts."""
        self.program, self.program_uid = word, self.uid
        self.program_search = environ.get("PATH", os.defpath)

    def _find_port(self, server: str, port: str, uid: int | None) -> None:
        """The port that a server names, which is started by `uid`, or by nobody knows whom."""
        self.port = PORTS.get(port, number_in(port))
        if self.port is None and port and is_known(port):
            try:
                self.port = socket.getservbyname(port, "tcp")
            except (OSError, ValueError):  # or it is no name at all
                what = f"{server} does not start: there is no port {port!a}"
                self.troubles.append((what, "name another, or say its number"))
        elif self.port is None:
            self._note(f"port {port or '(none)'} is not known")
        elif self.port > _LARGEST_PORT:
            what = f"{server} does not listen there: there is no port {port}"
            self.troubles.append((what, "name another"))
        elif uid and self.port < _first_free_port():
            what = f"{server} does not start: uid {uid} may not listen on port {self.port}"
            self.troubles.append((what, f"start it as root, and give {server} -u and -g"))

    def _try_options(self, words: list[str], rest: list[str]) -> None:
        """Have the listener's own code read its options and what stands behind them."""
        if not all(map(is_known, rest)):  # nor is how many words they are
            rest = [] if self.helper else ["0", "0"]
        try:
            _KnownOptions([*words, *rest])
        except options.StartError as error:
            self._tell_that_it_does_not_start(error)

    def _tell_that_it_does_not_start(self, error: Exception) -> None:
        remedy = f"correct its command line in the run file; {LISTENER}(8) has the options"
        self.troubles.append((f"{LISTENER} does not start: {error}", remedy))

    def _take(self, flag: str, value: str, environ: dict[str, str]) -> None:
        """One option of a server."""
        if flag == "-u":
            self.uid = self._id(flag, value)
        elif flag == "-g":
            self.gid = self._id(flag, value)
        elif flag == "-U":
            self.uid = self._id("-u", environ.get("UID", "$UID"))
            self.gid = self._id("-g", environ.get("GID", "$GID"))
        elif flag == "-c":
            self._limit_connections(value)
        elif flag == "-l":
            self.local_host = value
        elif flag == "-x":
            path = joined(self.directory, value)
            self.rules = path if is_known(path) else None
            self.lacks_rules = not self.rules
        elif flag == "-X":
            self.is_rules_file_optional = True
        elif flag in ("--helper", "--pid-file", "--log-file"):
            if flag == "--helper":
                self.helper = value
            path = joined(self.directory, value)
            self.files[flag] = os.path.normpath(path) if is_known(path) else path

    def _limit_connections(self, value: str) -> None:
        """-c of a server; to those that are not ours it is the number that it begins with, or 0."""
        if not is_known(value) or os.path.isfile(joined(self.directory, value)):
            self.concurrency = None  # to patched servers it may be the name of a file
            return
        value = value.strip() if self.server == LISTENER else value
        digits = value[: len(value) - len(value.lstrip("0123456789"))]
        self.concurrency = number_in(digits) or 0
        if not self.concurrency and self.server != LISTENER:
            what = f"-c {value!r}: {self.server} serves no connection"
            self.troubles.append((what, "name a number, such as -c 100"))

    def _id(self, flag: str, value: str) -> int | None:
        number = number_in(value)
        if number is not None and number <= _LARGEST_ID:
            return number
        self.odd_ids.append((flag, value))
        return None

    @property
    def lacks_memory_limit(self) -> bool:
        """Whether there may be a limit on memory that is not known."""
        return self.limits.get("as", _NO_LIMIT) is None

    @property
    def is_for_everybody(self) -> bool:
        """Whether the server listens to more than this host itself."""
        if self.helper:
            return False
        return not (self.host == "localhost" or self.host.startswith("127.") or self.host == "::1")


def _first_free_port() -> int:
    """The first port that is not root's alone (ip(7))."""
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024


def _is_shell(words: list[str]) -> bool:
    """Whether these words are a shell with a script: `sh -c '...'`, `sh -ec '...'`."""
    if os.path.basename(words[0]) not in _SHELLS or len(words) < 3:
        return False
    return words[1].startswith("-") and words[1].endswith("c") and words[1][1:].isalpha()


def _may_be_options(words: list[str], is_server: bool) -> bool:
    """Whether what is not known may be options, or nothing, as more options stand behind it, or
    host and port of a server.
    """
    if len(words) < 2 or not isinstance(words[0], Unknown) or words[0].is_one:
        return False
    return words[1].startswith("-") or (is_server and len(words) > 2 and _is_port(words[2]))


def _is_port(word: str) -> bool:
    return word.isdecimal() or word in PORTS


def _ids_of(user: str, group: str, takes_numbers: bool) -> tuple[int, int | None] | None:
    """The ids that user and group stand for, or are; None for a user that is not there."""
    if takes_numbers and user.isdecimal():
        return int(user[:10]), number_in(group)
    try:
        found = pwd.getpwnam(user)
    except (KeyError, ValueError):  # or it is no name at all
        return None
    try:
        gid = grp.getgrnam(group).gr_gid if group else found.pw_gid
    except (KeyError, ValueError):
        return found.pw_uid, number_in(group)
    return found.pw_uid, gid


def read_envdir(path: str, environ: dict[str, str]) -> None:
    """Change the environment as envdir(8) does: a file a variable; raises OSError."""
    for name in sorted(os.listdir(path)):
        file = os.path.join(path, name)
        if name.startswith(".") or "=" in name or not os.path.isfile(file):
            continue
        with open(file, encoding="utf-8", errors="surrogateescape") as opened:
            text = opened.read(65536)
        if text:
            environ[name] = text.partition("\n")[0].rstrip(" \t").replace("\0", "\n")
        else:
            environ.pop(name, None)
