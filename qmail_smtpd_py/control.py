"""Control files, read as qmail's control.c reads them (qmail-control(5)).

Names are relative to the qmail home, which is the current directory.  A file that is not there is a
default; one that is there and can not be read is a ControlError, which says who was not allowed to
read what: to go on without it could mean an open relay.

`ControlFiles` reads anew each time; `controlcache` is for what lives longer than a connection.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py

from .effects import ControlError
from .path import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import Any, TypeVar

    Key = TypeVar("Key", bound=Hashable)
    Parsed = TypeVar("Parsed")
    Derived = TypeVar("Derived")
    Signature = tuple[int, ...]

DIRECTORY = "control/"


def first_line(text: bytes | None) -> bytes | None:
    """The first line of a control file, without blanks at its end; None where there is no file."""
    return None if text is None else text.partition(b"\n")[0].rstrip(b" \t")


def entries(text: bytes | None) -> list[bytes] | None:
    """The lines that are neither empty nor comments; None where there is no file.

    qmail: a NUL parts entries, and a line that begins with one is empty.
    """
    if text is None:
        return None
    lines = (line.rstrip(b" \t") for line in text.split(b"\n"))
    kept = [line for line in lines if line and line[0] not in b"\0#"]
    return [entry for entry in b"\0".join(kept).split(b"\0") if entry]


class ControlFiles:
    """The control files of the qmail home that is the current directory."""

    def refresh(self) -> None:
        """A connection begins: from now on files are as they are now."""

    def load(self, name: str, parse: Callable[[bytes | None], Parsed]) -> Parsed:
        """What `parse` makes of the file, or of None if there is none; raises ControlError."""
        descriptor = self.open(name)
        if descriptor is None:
            return parse(None)
        try:
            return parse(_read_all(descriptor))
        except OSError as error:
            raise unusable(name, error) from None
        finally:
            os.close(descriptor)

    def derive(self, key: Key, make: Callable[[Key, ControlFiles], Derived]) -> Derived:
        """What `make` makes of the key and of control files, and of nothing else; raises
        ControlError.  It may be kept as long as the files are the same.
        """
        return make(key, self)

    def line(self, name: str) -> bytes | None:
        """The first line, or None if there is no such file; raises ControlError."""
        return self.load(name, first_line)

    def number(self, name: str, default: int) -> int:
        """The number that the first line starts with, or the default where there is none."""
        line = self.line(name)
        return number(line) if line and line[:1].isdigit() else default

    def list(self, name: str) -> list[bytes] | None:
        """The lines that count, or None if there is no such file; raises ControlError."""
        return self.load(name, entries)

    def open(self, name: str) -> int | None:
        """A descriptor for the caller, or None if there is no such file; raises ControlError.

        It is to be read with pread(2): a named pipe, whose writer nobody waits for (qmail's
        open_read does not either), fails then, where read(2) would have it for an empty file.
        """
        try:
            return os.open(DIRECTORY + name, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(name, error) from None

    def is_readable(self, name: str) -> bool:
        """Whether there is such a file, whatever it is; raises ControlError where this user can not
        read it.
        """
        descriptor = self.open(name)
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    def exists(self, name: str) -> bool:
        """Whether there is such a file, readable or not."""
        try:
            os.stat(DIRECTORY + name)
        except OSError:
            return False
        return True

    def seen(self, name: str) -> Signature | None:
        """The signature of the file; None if there is none."""
        return signature(DIRECTORY + name)

    def lacks(self, name: str) -> bool:
        """Whether the directory is there and has no such file, asked without what is kept.

        A directory that is being replaced looks empty for a moment: hence a look before and behind.
        """
        before = signature(DIRECTORY + ".")
        is_there = has_entry(name)
        return before is not None and not is_there and signature(DIRECTORY + ".") == before


def has_entry(name: str) -> bool:
    """Whether the directory has the name, be it for a link that leads nowhere, or may have it."""
    try:
        os.lstat(DIRECTORY + name)
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


def signature(path: str) -> Signature | None:
    """What changes when a file is changed or replaced (stat(2)); None if there is none, which is
    not the same as one that can not be reached.
    """
    try:
        found: Any = os.stat(path)  # as its numbers are: compiled code makes others of int
    except FileNotFoundError:
        return None
    except OSError as error:
        return (error.errno or 0,)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def unusable(name: str, error: OSError) -> ControlError:
    """What to tell of a control file that the operating system would not let us use."""
    why = "not a file" if error.errno == _ESPIPE else error.strerror
    return ControlError(f"cannot read {DIRECTORY}{name}: {why} (uid {os.geteuid()})")


_ESPIPE = 29  # pread(2) on a pipe; errno would be one more module at start


def _read_all(descriptor: int) -> bytes:
    pieces, position = [], 0
    while piece := os.pread(descriptor, 65536, position):
        pieces.append(piece)
        position += len(piece)
    return b"".join(pieces)
