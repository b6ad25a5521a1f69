"""The log: one line an event on descriptor 2, made for multilog, grep and fail2ban.

    qmail-smtpd[PID]: EVENT key=value key="value with blanks" ...

No octet of a client's can forge a line or a field: a value that is not plain stands in quotation
marks, and in it every octet that is not printable ASCII, every quotation mark and every backslash
is written as \\xHH.  Values that are too long are cut off, and a line leaves in one write, so that
lines of many processes do not mix.  docs/log.md lists the events.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

DESCRIPTOR = 2

OUT_OF_MEMORY = "out of memory; is the memory limit too low?"

_VALUE_LIMIT = 1200
_PLAIN = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.@%+/=:_-<>[],!#&*~?"
_PRINTABLE = bytes(range(32, 127))
_QUOTABLE = _PRINTABLE.translate(None, b'"\\')
_LINE_LIMIT = 4000  # octets; what a pipe takes in one piece is 4096

_PATIENCE = 1.0  # seconds that a line waits for a reader that is slow, or stuck
_FILE_TYPE, _REGULAR = 0o170000, 0o100000  # inode(7)
_KNOWS_NOTHING = (22, 95)  # EINVAL and EOPNOTSUPP; errno would be one more module at start
_NOWAIT = getattr(os, "RWF_NOWAIT", 8)  # preadv2(2); interpreters that know an older kernel lack it

_takes_more = select.poll()
_takes_more.register(DESCRIPTOR, select.POLLOUT)


def _marking_all_but(kept: bytes) -> bytes:
    """A table for bytes.translate that makes question marks of all octets but these."""
    others = bytes(range(256)).translate(None, kept)
    return bytes.maketrans(others, b"?" * len(others))


_TO_PLAIN = _marking_all_but(_PLAIN)
_TO_PRINTABLE = _marking_all_but(_PRINTABLE)


def format_line(event: str, fields: Mapping[str, object], ip: bytes | None = None) -> bytes:
    """The line for an event, without its line feed; fields that are None are left out, and `ip`,
    the client's, stands before the others.
    """
    words = [b"qmail-smtpd[%d]: %s" % (os.getpid(), event.encode())]
    if ip is not None:
        words.append(b"ip=%s" % _octets_of(ip))
    for key, value in fields.items():
        if value is not None:
            words.append(b"%s=%s" % (key.encode(), _octets_of(value)))
    line = b" ".join(words)
    if len(line) <= _LINE_LIMIT:
        return line
    line = line[:_LINE_LIMIT]
    cut = line.rfind(b"\\", _LINE_LIMIT - 3)  # in the middle of \xHH
    return (line if cut < 0 else line[:cut]) + b'..."'


def _octets_of(value: object) -> bytes:
    """A value as it stands in a line."""
    if type(value) is int:
        return b"%d" % value
    octets = value if type(value) is bytes else _encoded(str(value))
    if octets and len(octets) <= _VALUE_LIMIT and octets.translate(_TO_PLAIN) == octets:
        return octets
    return b'"%s"' % escaped(octets, _QUOTABLE, _VALUE_LIMIT)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


class Log:
    """Writes lines.  Where the reader is stuck a line is lost, as a log that takes nothing is no
    reason to refuse mail; until one is read again, the reader is waited for no more.

    What it finds out about descriptor 2 it keeps, until that is another one.
    """

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Know nothing of descriptor 2: it leads somewhere else now."""
        self._is_stuck = False
        self._takes_nowait = True  # as long as it did not say that it knows nothing of RWF_NOWAIT
        self._is_file = False

    def write(self, event: str, fields: Mapping[str, object], ip: bytes | None = None) -> bool:
        """Write the line for an event, see `format_line`; False if it is lost."""
        return self._put(format_line(event, fields, ip))

    def write_line(self, line: str) -> bool:
        """Write a line that has a form of its own, as tcpserver's have; it is made printable."""
        return self._put(_encoded(line).translate(_TO_PRINTABLE)[:_LINE_LIMIT])

    def _put(self, line: bytes) -> bool:
        """Write a line.

        That there is room in a pipe is no promise: of all the processes that are told so, one has
        it.  So it is the write itself that must not wait.
        """
        octets = line + b"\n"
        until = 0.0
        try:
            while not self._write_at_once(octets):
                now = time.monotonic()
                until = until or now + (0.0 if self._is_stuck else _PATIENCE)
                if now >= until or not _takes_more.poll((until - now) * 1000):
                    self._is_stuck = True
                    return False
        except OSError:
            pass  # nobody is there to read it
        self._is_stuck = False
        return True

    def _write_at_once(self, octets: bytes) -> bool:
        """Write without a wait; False if there is no room now.  Raises OSError."""
        if self._takes_nowait:
            try:
                written = os.pwritev(DESCRIPTOR, (octets,), -1, _NOWAIT)
                if written < len(octets):  # of a line that began, the rest is not left out
                    os.write(DESCRIPTOR, octets[written:])
                return True
            except OSError as error:
                # Pipes know nothing of it before Linux 6.4, and few files do, which always have
                # room.
                self._is_file = os.fstat(DESCRIPTOR).st_mode & _FILE_TYPE == _REGULAR
                self._takes_nowait = not self._is_file and error.errno not in _KNOWS_NOTHING
                if isinstance(error, BlockingIOError) and not self._is_file:
                    return False
        if not self._is_file and not _takes_more.poll(0):
            return False
        os.write(DESCRIPTOR, octets)
        return True


def write(event: str, fields: Mapping[str, object]) -> bool:
    """Write the line for an event, of no session's or of one that is over; False if it is lost."""
    return Log().write(event, fields)


def text(octets: bytes) -> str:
    """Octets, such as a path, as they stand in the text of a field."""
    return octets.decode("ascii", "backslashreplace")


def words_of(error: Exception) -> str:
    """What an error says; the system's say it without their number."""
    return getattr(error, "strerror", None) or str(error)


def where(error: BaseException) -> str:
    """The kind of an exception and where it came from: what a log may tell of a defect.

    A traceback, and the text of an exception, could show what nobody may see.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if not trace:
        return type(error).__name__
    file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
    place = f"{type(error).__name__} at {file} line {trace.tb_lineno}"
    why = error.strerror if isinstance(error, OSError) else None
    return f"{place}: {why}" if why else place


def escaped(octets: bytes, plain: bytes, most: int) -> bytes:
    """Octets with `\\xHH` for each that is not among the plain ones; of more than `most`, the
    first, and how many there were.
    """
    start = octets[:most]
    shown = b"".join(b"%c" % octet if octet in plain else b"\\x%02x" % octet for octet in start)
    return shown if len(start) == len(octets) else b"%s...(%d octets)" % (shown, len(octets))
