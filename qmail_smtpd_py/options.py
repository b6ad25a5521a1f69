"""The command line of qmail-smtpd-listen: tcpserver's options, and a few long ones of our own."""

from __future__ import annotations

import getopt
import os

from .proxyprotocol import Peers
from .settings import LONGEST_TIMEOUT
from .tcpenviron import LookUps
from .tcprules import Rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "qmail-smtpd-listen"

USAGE = f"""\
usage: {NAME} [tcpserver's options] [our options] host port [checkprogram subprogram ...]
       {NAME} [-v] [-c n] [-g gid] [-u uid] [our options] --helper=SOCKET
tcpserver's options: -1dDhHoOpPqQrRUvX -b n -B banner -c n -g gid -l localname -t n -u uid -x cdb
our options: --daemon --pid-file=FILE --log-file=FILE --max-use=N --max-age=SECONDS
             --idle=N --drain=SECONDS --proxy-from=ADDRESSES --help
"""

SHORT = "1b:B:c:dDg:hHl:oOpPqQrRt:u:Uvx:X"
LONG = (
    "helper=", "daemon", "pid-file=", "log-file=", "max-use=", "max-age=", "idle=", "drain=",
    "proxy-from=", "help",
)  # fmt: skip


_FILES = frozenset(("-x", "--helper", "--pid-file", "--log-file"))
_NO_CHECK_PROGRAMS = (
    *("qmail-smtpd", NAME, "tcpserver"),
    *("fixcrio", "greetdelay", "recordio", "rblsmtpd"),
)
"""What stands behind tcpserver, and not behind us: taken for the check program, it would make every
password wrong.
"""

_LARGEST, _DIGITS = 2**32 - 1, 10  # what ids can be; other numbers are smaller
_MOST_PROCESSES = 2**22  # proc(5), pid_max


class StartError(Exception):
    """The listener can not start; the text says why, and `status` is what it exits with."""

    status = 111


class UsageError(StartError):
    """The command line is wrong."""

    status = 100


class Options:
    """The command line, read."""

    def __init__(self, words: list[str]) -> None:
        self.look_ups = LookUps()
        self.limit = 40
        self.backlog = 512
        self.banner = ""
        self.no_delay = True
        self.keep_ip_options = False
        self.verbosity = 1
        self.print_port = False
        self.rules: Rules | None = None
        self.uid: int | None = None
        self.gid: int | None = None
        self.helper: str | None = None
        self.host = self.port = ""
        self.arguments: list[str] = []
        self.daemon = False
        self.pid_file: str | None = None
        self.log_file: str | None = None
        self.max_use = 100
        self.max_age = 3600.0
        self.idle = 2 * (os.cpu_count() or 1)
        self.drain = 60.0
        self.proxies: Peers | None = None
        self.wants_help = False
        try:
            flags, rest = getopt.getopt(words, SHORT, list(LONG))
            rules, optional = None, False
            for flag, value in flags:
                if flag == "-x":
                    rules = _path(value)
                elif flag == "-X":
                    optional = True
                else:
                    self._take(flag, value)
        except getopt.GetoptError as error:
            raise UsageError(str(error)) from None
        except ValueError as error:
            raise UsageError(f"{flag} {value}: {error}" if value else f"{flag}: {error}") from None
        self.has_relative_names = any(
            flag in _FILES and not os.path.isabs(name) for flag, name in flags
        )
        self.rules = Rules(rules, optional) if rules is not None else None
        if self.wants_help:
            return
        if self.helper and (rest or self.print_port or self.rules or self.proxies):
            raise UsageError("--helper takes no host, port or program, no -1, -x and --proxy-from")
        if not self.daemon and (self.pid_file or self.log_file):
            raise UsageError("--pid-file and --log-file need --daemon")
        if not self.helper:
            if len(rest) < 2:
                raise UsageError("host and port are missing")
            self.host, self.port, *self.arguments = rest
            if not self.port:
                raise UsageError("the port is empty")
            if os.path.basename(self.arguments[0] if self.arguments else "") in _NO_CHECK_PROGRAMS:
                what = f"{self.arguments[0]} is no check program"
                raise UsageError(f"{what}: take it off, the check program comes first here")

    def _take(self, flag: str, value: str) -> None:
        """Heed one option; raises ValueError where its value is not valid."""
        if flag in _SWITCHES:
            name, switch = _SWITCHES[flag]
            setattr(self, name, switch)
        elif flag in _LOOK_UPS:
            name, switch = _LOOK_UPS[flag]
            setattr(self.look_ups, name, switch)
        elif flag in _VALUES:
            name, convert = _VALUES[flag]
            setattr(self, name, convert(value))
        elif flag == "-t":
            self.look_ups.ident_seconds = _seconds(value)
        elif flag == "-l":
            self.look_ups.local_host = os.fsencode(value)
        elif flag == "-U":
            self.uid, self.gid = _id_in("UID"), _id_in("GID")


def _path(text: str) -> str:
    if not text:
        raise ValueError("the name of a file is missing")
    try:
        return os.path.abspath(text)
    except OSError as error:  # the current directory is there no more
        raise ValueError(f"relative, and the current directory is gone: {error.strerror}") from None


def _number(text: str) -> int:
    text = text.strip()  # of a file that has more than the number in its line
    if not text:
        raise ValueError("empty, not a number")
    if not (text.isascii() and text.isdigit()):
        raise ValueError("not a number")
    number = int(text[:_DIGITS])
    if len(text) > _DIGITS or number > _LARGEST:
        raise ValueError("too large")
    return number


def _backlog(text: str) -> int:
    return min(_number(text), 2**31 - 1)  # the kernel has a limit of its own


def _positive(text: str) -> int:
    number = _number(text)
    if not number:
        raise ValueError("not at least 1")
    return number


def _processes(text: str) -> int:
    number = _positive(text)
    if number > _MOST_PROCESSES:
        raise ValueError("more than there can be processes")
    return number


def _id(text: str) -> int:
    """A user or group id; the largest number means none (setuid(2))."""
    number = _number(text)
    if number >= _LARGEST:
        raise ValueError("not an id")
    return number


def _id_in(variable: str) -> int:
    """The id in a variable, as envuidgid sets it."""
    try:
        return _id(os.environ[variable])
    except KeyError:
        raise ValueError(f"{variable} is not set") from None
    except ValueError as error:
        raise ValueError(f"{variable} is {error}") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError("not a number of seconds")
    if seconds > LONGEST_TIMEOUT:
        raise ValueError(f"more than {LONGEST_TIMEOUT} seconds")
    return seconds


def _age(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 1:
        raise ValueError("not at least 1 second")
    return seconds


_SWITCHES: dict[str, tuple[str, int]] = {
    "-d": ("no_delay", False),
    "-D": ("no_delay", True),
    "-o": ("keep_ip_options", True),
    "-O": ("keep_ip_options", False),
    "-q": ("verbosity", 0),
    "-Q": ("verbosity", 1),
    "-v": ("verbosity", 2),
    "-1": ("print_port", True),
    "--daemon": ("daemon", True),
    "--help": ("wants_help", True),
}

_LOOK_UPS = {
    "-h": ("host", True),
    "-H": ("host", False),
    "-p": ("paranoid", True),
    "-P": ("paranoid", False),
    "-r": ("ident", True),
    "-R": ("ident", False),
}

_VALUES: dict[str, tuple[str, Callable[[str], object]]] = {
    "-b": ("backlog", _backlog),
    "-B": ("banner", str),
    "-c": ("limit", _processes),
    "-g": ("gid", _id),
    "-u": ("uid", _id),
    "--helper": ("helper", _path),
    "--pid-file": ("pid_file", _path),
    "--log-file": ("log_file", _path),
    "--max-use": ("max_use", _positive),
    "--max-age": ("max_age", _age),
    "--idle": ("idle", _processes),
    "--drain": ("drain", _seconds),
    "--proxy-from": ("proxies", Peers),
}
