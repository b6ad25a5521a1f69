"""Control files, read as qmail's control.c reads them (qmail-control(5)).

Names are relative to the qmail home, which is the current directory.  A file that is not there is a
default; one that is there and can not be read is a ControlError, which says who was not allowed to
read what: to go on without it could mean an open relay.

`ControlFiles` reads anew each time.  What lives longer than a connection uses `CachedControlFiles`,
which looks at each file's stat(2) once a connection and reads it again where that has changed.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py

from .effects import ControlError
from .path import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Parsed = TypeVar("Parsed")
    Signature = tuple[int, ...]

DIRECTORY = "control/"


def first_line(text: bytes | None) -> bytes | None:
    """The first line of a control file without blanks at its end; None for a file that is not."""
    return None if text is None else text.partition(b"\n")[0].rstrip(b" \t")


def entries(text: bytes | None) -> list[bytes] | None:
    """The lines that are neither empty nor comments; None for a file that is not."""
    if text is None:
        return None
    lines = (line.rstrip(b" \t") for line in text.split(b"\n"))
    return [line for line in lines if line and not line.startswith(b"#")]


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
        """A descriptor for the caller, or None if there is no such file; raises ControlError."""
        try:
            return os.open(DIRECTORY + name, os.O_RDONLY)
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


class CachedControlFiles(ControlFiles):
    """The same, for a process that serves many connections: what was read is kept until `refresh`
    finds the file changed.  Callers must not change what they are given.
    """

    def __init__(self) -> None:
        self._signatures: dict[str, Signature | None] = {}
        self._values: dict[tuple[str, object], object] = {}

    def refresh(self) -> None:
        """Forget what was read of files that have changed since."""
        for name, known in list(self._signatures.items()):
            if signature(DIRECTORY + name) != known:
                del self._signatures[name]
                self._values = {key: self._values[key] for key in self._values if key[0] != name}

    def load(self, name: str, parse: Callable[[bytes | None], Parsed]) -> Parsed:
        value = self._values.get((name, parse), self)
        if value is self:  # nothing is there
            self._note(name)
            value = self._values[name, parse] = super().load(name, parse)
        return value  # type: ignore[return-value]

    def is_readable(self, name: str) -> bool:
        value = self._values.get((name, "is_readable"))
        if value is None:
            self._note(name)
            value = self._values[name, "is_readable"] = super().is_readable(name)
        return bool(value)

    def _note(self, name: str) -> None:
        # Before it is read: a change in between shows at the next refresh.
        if name not in self._signatures:
            self._signatures[name] = signature(DIRECTORY + name)


def signature(path: str) -> Signature | None:
    """What changes when a file is changed or replaced (stat(2)); None if there is none, which is
    not the same as one that can not be reached.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return (error.errno or 0,)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def unusable(name: str, error: OSError) -> ControlError:
    """What to tell of a control file that the operating system would not let us use."""
    return ControlError(f"cannot read {DIRECTORY}{name}: {error.strerror} (uid {os.geteuid()})")


def _read_all(descriptor: int) -> bytes:
    pieces = []
    while piece := os.read(descriptor, 65536):
        pieces.append(piece)
    return b"".join(pieces)
