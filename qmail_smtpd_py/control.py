"""Control files, read as qmail's control.c reads them (qmail-control(5)).

Names are relative to the qmail home, which is the current directory.  A file that is not there is a
default; one that is there and can not be read is a ControlError, which says who was not allowed to
read what: to go on without it could mean an open relay.
"""

from __future__ import annotations

import os

from .effects import ControlError
from .path import number

DIRECTORY = "control/"


def read_line(name: str) -> bytes | None:
    """The first line of a control file, or None if there is no such file."""
    text = _read(name)
    return None if text is None else text.partition(b"\n")[0].rstrip(b" \t")


def read_number(name: str, default: int) -> int:
    """The number that the first line starts with, or the default where there is none."""
    line = read_line(name)
    return number(line) if line and line[:1].isdigit() else default


def read_list(name: str) -> list[bytes] | None:
    """The lines that are neither empty nor comments, or None if there is no such file."""
    text = _read(name)
    if text is None:
        return None
    lines = (line.rstrip(b" \t") for line in text.split(b"\n"))
    return [line for line in lines if line and not line.startswith(b"#")]


def open_file(name: str) -> int | None:
    """A descriptor for a control file that is looked up in place, or None if there is none."""
    try:
        return os.open(DIRECTORY + name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(name, error) from None


def unusable(name: str, error: OSError) -> ControlError:
    """What to tell of a control file that the operating system would not let us use."""
    return ControlError(f"cannot read {DIRECTORY}{name}: {error.strerror} (uid {os.geteuid()})")


def _read(name: str) -> bytes | None:
    descriptor = open_file(name)
    if descriptor is None:
        return None
    pieces = []
    try:
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    except OSError as error:
        raise unusable(name, error) from None
    finally:
        os.close(descriptor)
    return b"".join(pieces)
