"""The warm helper: hand a connection over at STARTTLS to a process that has TLS loaded already.

For hosts that keep tcpserver.  The program that tcpserver started connects to the helper's UNIX
socket and sends its arguments and its environment.  STARTTLS forgets the rest of the session, so
that nothing else is needed but descriptors 0, 1 and 2, which come last: an offer that nobody took
holds no connection and no log open.

    helper    +   TLS can begin      (or ends the connection: the program does TLS itself)
    program   !   220 was sent: go, with the descriptors (or ends the connection: never mind)
    helper    N   one octet: the exit status of the session, for the program to end with

The program stays until then, so that tcpserver's -c counts the connection.  Either end talks only
to its own user id (SO_PEERCRED, unix(7)).

The C module _socket is used here, as the module socket takes longer to import than all the rest.
"""

from __future__ import annotations

import os
import time
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    SCM_RIGHTS,
    SO_PEERCRED,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from sys import byteorder

from .log import words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READY, GO = b"+", b"!"

PROGRAM_SECONDS = 5.0
"""Seconds that a program may take for what it has to say before TLS begins."""

HELPER_SECONDS = 2.0
"""Seconds that a helper may take: the client waits, and TLS can be had without it."""

_LENGTH = 4  # octets of the number before the text: an order of our own, not the machine's
_LONGEST = 1 << 22  # octets of environment and arguments; Linux takes 2 MiB at most
_INT = 4  # octets of a C int
_CREDENTIALS = 12  # octets of struct ucred: pid, uid, gid


class HandoverError(Exception):
    """The other end is not there, not ours, or says no; the text says which."""


def offer(path: bytes, arguments: Sequence[bytes], environ: Mapping[bytes, bytes]) -> Offer:
    """Offer a connection to the helper at a path; raises HandoverError unless it takes it."""
    try:
        helper = socket(AF_UNIX, SOCK_STREAM)
    except OSError as error:
        raise HandoverError(error.strerror) from None
    try:
        helper.settimeout(HELPER_SECONDS)
        helper.connect(path)
        check_peer(helper)
        helper.sendall(pack(arguments, environ))
        if helper.recv(1) != READY:
            raise HandoverError("the helper can not do TLS now")
    except (OSError, HandoverError) as error:
        helper.close()
        raise HandoverError(words_of(error)) from None
    return Offer(helper)


class Offer:
    """A helper that has said yes, and waits for the descriptors, which it gets when the client has
    its 220.
    """

    def __init__(self, helper: socket) -> None:
        self._helper = helper

    def complete(self, descriptors: Sequence[int]) -> int:
        """Let the helper begin, on these three, and wait for its end; the exit status of the
        session.
        """
        rights = b"".join(number.to_bytes(_INT, byteorder) for number in descriptors)
        try:
            self._helper.settimeout(None)
            self._helper.sendmsg([GO], [(SOL_SOCKET, SCM_RIGHTS, rights)])
            return (self._helper.recv(1) or b"\1")[0]
        except OSError:
            return 1
        finally:
            self._helper.close()


def take(program: socket) -> tuple[list[bytes], dict[bytes, bytes]]:
    """What a program offers: its arguments and its environment; raises HandoverError."""
    deadline = time.monotonic() + PROGRAM_SECONDS
    check_peer(program)
    try:
        text = b""
        while len(text) < _LENGTH or len(text) < _LENGTH + _length(text):
            program.settimeout(max(0.001, deadline - time.monotonic()))
            piece = program.recv(65536)
            text += piece
            if not piece or _length(text) > _LONGEST:
                raise HandoverError("malformed message")
        return _unpack(text[_LENGTH:])
    except (OSError, ValueError) as error:
        raise HandoverError(str(error)) from None


def begin(program: socket) -> list[int]:
    """Tell the program that TLS can begin; its three descriptors, once it has told the client, or
    none.
    """
    try:
        program.settimeout(PROGRAM_SECONDS)
        program.sendall(READY)
        said, ancillary, _, _ = program.recvmsg(1, CMSG_SPACE(3 * _INT), MSG_CMSG_CLOEXEC)
    except OSError:
        return []
    descriptors = []
    for level, kind, rights in ancillary:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            for at in range(0, len(rights) - len(rights) % _INT, _INT):
                descriptors.append(int.from_bytes(rights[at : at + _INT], byteorder))
    if said == GO and len(descriptors) == 3:
        return descriptors
    for descriptor in descriptors:
        os.close(descriptor)
    return []


def check_peer(other: socket) -> None:
    """See that the other end runs as our own user; raises HandoverError."""
    credentials = other.getsockopt(SOL_SOCKET, SO_PEERCRED, _CREDENTIALS)
    uid = int.from_bytes(credentials[4:8], byteorder)
    if uid != os.geteuid():
        raise HandoverError(f"the other end runs as uid {uid}, not as uid {os.geteuid()}")


def pack(arguments: Sequence[bytes], environ: Mapping[bytes, bytes]) -> bytes:
    """Arguments and environment as one text, its length before it."""
    variables = (b"%s=%s" % item for item in environ.items())
    words = [b"%d" % len(arguments), *arguments, *variables]
    text = b"".join(b"%s\0" % word for word in words)
    return len(text).to_bytes(_LENGTH, "little") + text


def _unpack(text: bytes) -> tuple[list[bytes], dict[bytes, bytes]]:
    count, *words = text.split(b"\0")[:-1]
    variables = (word.partition(b"=") for word in words[int(count) :])
    return words[: int(count)], {name: value for name, _, value in variables}


def _length(text: bytes) -> int:
    return int.from_bytes(text[:_LENGTH], "little")
