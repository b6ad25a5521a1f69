"""The process that a program was started as: its environment, and its descriptors.

Whoever starts us leaves more than is for us, or less: descriptors that no child may get, a number
below 3 that is closed and would be that of the next file, a variable that the interpreter made.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def environment() -> dict[bytes, bytes]:
    """The environment that the process was started with, as children are to have it.

    In the C locale the interpreter adds LC_CTYPE of its own accord (PEP 538).
    """
    environ = dict(os.environ)
    environ.pop(b"", None)  # no process can be started with it
    if environ.get(b"LC_CTYPE") == b"C.UTF-8":
        try:
            with open("/proc/self/environ", "rb") as file:
                if not any(word.startswith(b"LC_CTYPE=") for word in file.read().split(b"\0")):
                    del environ[b"LC_CTYPE"]
        except OSError:
            pass  # it does no harm
    return environ


def give_no_tickets(environ: Mapping[bytes, bytes]) -> None:
    """Have OpenSSL make no session tickets in this process, unless it has a configuration already;
    to be called before it is loaded.
    """
    if b"OPENSSL_CONF" not in environ:
        directory, _, _ = __file__.rpartition("/")
        os.putenv("OPENSSL_CONF", f"{directory}/openssl.cnf")


def tidy_descriptors(kept: Sequence[int]) -> None:
    """Close what was inherited and is not kept, so that no child gets it, and see that there are
    descriptors 0, 1 and 2.

    Where descriptor 2 is the client's connection, as inetd has it, it is not for the log or for
    children.  It is that of whoever tries the program at a terminal.
    """
    close_inherited(kept)
    fill_descriptors((os.O_WRONLY, os.O_RDONLY, os.O_RDWR))
    log_file = _behind(2)
    if log_file[0] != _DEVICE and log_file in (_behind(0), _behind(1)):
        nowhere = os.open("/dev/null", os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


def close_inherited(kept: Sequence[int]) -> None:
    """Close all descriptors but 0, 1, 2 and those that are kept, whatever their numbers."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        numbers = list(range(1024))
    for number in numbers:
        if number > 2 and number not in kept:
            try:
                os.close(number)
            except OSError:
                pass  # it was for the list itself


def fill_descriptors(flags: Sequence[int] = (os.O_RDWR,) * 3) -> None:
    """See that there are descriptors 0, 1 and 2.

    `flags` are those of open(2) for each: where it is for the other direction, reads and writes
    fail as if it were still closed.

    The next file that is opened would have the number of one that is not: a control file would be
    read as what the client says, a connection get the log, and a child never see the end of a pipe.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free.
            os.set_inheritable(os.open("/dev/null", flags[descriptor]), True)


_FILE_TYPE, _DEVICE = 0o170000, 0o020000  # inode(7): one for characters, as terminals are


def _behind(descriptor: int) -> tuple[int, int, int]:
    """The type, device and number of what a descriptor leads to."""
    found = os.fstat(descriptor)
    return found.st_mode & _FILE_TYPE, found.st_dev, found.st_ino
