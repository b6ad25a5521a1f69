"""qmail-queue: one run of it is one delivery (qmail-queue(8)).

It reads the message from descriptor 0 and the envelope from descriptor 1, and says by its exit
status what became of them.  The envelope is written last and its end last of all: whatever happens
before, qmail-queue sees an envelope that is cut off and queues nothing.
"""

from __future__ import annotations

import os
import time

from . import effects
from .reply import Reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PROGRAM = b"bin/qmail-queue"

REPLIES = {
    11: Reply(554, b"envelope address too long for qq (#5.1.3)"),
    31: Reply(554, b"mail server permanently rejected message (#5.3.0)"),
    51: Reply(451, b"qq out of memory (#4.3.0)"),
    52: Reply(451, b"qq timeout (#4.3.0)"),
    53: Reply(451, b"qq write error or disk full (#4.3.0)"),
    54: Reply(451, b"qq read error (#4.3.0)"),
    55: Reply(451, b"qq unable to read configuration (#4.3.0)"),
    56: Reply(451, b"qq trouble making network connection (#4.3.0)"),
    61: Reply(451, b"qq trouble in home directory (#4.3.0)"),
    62: Reply(451, b"qq trouble creating files in queue (#4.3.0)"),
    63: Reply(451, b"qq trouble creating files in queue (#4.3.0)"),
    64: Reply(451, b"qq trouble creating files in queue (#4.3.0)"),
    65: Reply(451, b"qq trouble creating files in queue (#4.3.0)"),
    66: Reply(451, b"qq trouble creating files in queue (#4.3.0)"),
    71: Reply(451, b"mail server temporarily rejected message (#4.3.0)"),
    72: Reply(451, b"connection to mail server timed out (#4.4.1)"),
    73: Reply(451, b"connection to mail server rejected (#4.4.1)"),
    74: Reply(451, b"communication with mail server failed (#4.4.2)"),
    81: Reply(451, b"qq internal bug (#4.3.0)"),
    91: Reply(451, b"qq internal bug (#4.3.0)"),
    115: Reply(554, b"envelope address too long for qq (#5.1.3)"),
    120: Reply(451, b"unable to exec qq (#4.3.0)"),
}
"""What an exit status of qmail-queue means to the client, as in netqmail's qmail.c."""

CRASHED = Reply(451, b"qq crashed (#4.3.0)")
PERMANENT = Reply(554, b"qq permanent problem (#5.3.0)")
TEMPORARY = Reply(451, b"qq temporary problem (#4.3.0)")

_READ_ERROR = 54
_CANNOT_EXEC = 120

_RESET_SIGNALS = (13, 25)  # SIGPIPE and SIGXFSZ, which the interpreter ignores

_PIECE = 32768
_REAP_SECONDS = 1.0


def reply_to(status: int) -> Reply | None:
    """The reply to an exit status, None for the one that means that the message is queued."""
    if status == 0:
        return None
    return REPLIES.get(status) or (PERMANENT if 11 <= status <= 40 else TEMPORARY)


def open_delivery(program: bytes, environ: Mapping[bytes, bytes]) -> QueueDelivery | None:
    """Start qmail-queue; None where pipes or processes are short.

    A program that can not be executed is told of at the end, as if it had been and had exited 120.
    """
    try:
        message_out, message_in = os.pipe()
    except OSError:
        return None
    try:
        envelope_out, envelope_in = os.pipe()
    except OSError:
        os.close(message_out)
        os.close(message_in)
        return None
    actions = [(os.POSIX_SPAWN_DUP2, message_out, 0), (os.POSIX_SPAWN_DUP2, envelope_out, 1)]
    trouble = None
    try:
        pid = os.posix_spawn(
            program, [program], environ, file_actions=actions, setsigdef=_RESET_SIGNALS
        )
    except OSError as error:
        pid, trouble = 0, error
    finally:
        os.close(message_out)
        os.close(envelope_out)
    delivery = QueueDelivery(pid, message_in, envelope_in, trouble)
    if isinstance(trouble, (BlockingIOError, MemoryError)):
        delivery.cancel()
        return None
    return delivery


class QueueDelivery(effects.Delivery):
    """A run of qmail-queue, from its start to its exit status.

    `trouble` is why it could not be started, or None.
    """

    __slots__ = ("_envelope", "_failed", "_message", "_pieces", "_size", "pid", "trouble")

    def __init__(self, pid: int, message: int, envelope: int, trouble: OSError | None) -> None:
        self.pid = pid
        self.trouble = trouble
        self._message = message
        self._envelope = envelope
        self._failed = trouble is not None
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Pass on a piece of the message; a qmail-queue that ended shows in its exit status."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _PIECE:
            self._flush()

    def _flush(self) -> None:
        self._write_all(self._message, b"".join(self._pieces))
        self._pieces.clear()
        self._size = 0

    def _write_all(self, descriptor: int, data: bytes) -> None:
        try:
            while data and not self._failed:
                data = data[os.write(descriptor, data) :]
        except OSError:
            self._failed = True

    def close(self, envelope: bytes) -> Reply | None:
        """End the message, hand over the envelope and wait for what qmail-queue says."""
        self._flush()
        os.close(self._message)
        self._write_all(self._envelope, envelope)
        os.close(self._envelope)
        if self.trouble:
            return reply_to(_CANNOT_EXEC)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return CRASHED
        exit_status = os.WEXITSTATUS(status)
        # It said yes to something that it did not read to the end.
        return reply_to(_READ_ERROR if self._failed and exit_status == 0 else exit_status)

    def cancel(self) -> None:
        """Give up: qmail-queue finds no envelope, removes what it has and exits.

        It is waited for, lest it stay as a zombie, but not for long: nobody needs its status.
        """
        os.close(self._message)
        os.close(self._envelope)
        self._pieces.clear()
        deadline = time.monotonic() + _REAP_SECONDS
        while self.pid and not os.waitpid(self.pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
