"""qmail-queue: one run of it is one delivery (qmail-queue(8)).

It reads the message from descriptor 0 and the envelope from descriptor 1, and says by its exit
status what became of them.  The envelope is written last and its end last of all: whatever happens
before, qmail-queue sees an envelope that is cut off and queues nothing.

Filters that stand in for it (simscan and others) may have words of their own for the client.  They
write them to descriptor 4 or 6, which are one pipe, as qmail-qfilter has a 4 of its own, and exit
82 or 88: a letter, D for good or Z for now, and a text (Flavio Curti's patch
qmail-queue-custom-error).
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py
import select
import time
from _signal import SIGPIPE, SIGXFSZ  # type: ignore[import-not-found]  # signal, without its enums

from . import effects
from .reply import Reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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

HAS_TEXT = (82, 88)
"""Exit statuses that say that the reply is the text on descriptor 4 or 6."""

CODES = {b"D": 554, b"Z": 451}
"""The reply code that the first octet of such a text stands for."""

_TEXT_WRITERS = (b"simscan", b"qmail-scanner", b"qmail-qfilter", b"qmail-dkim", b"qsheff")
_TEXT_DESCRIPTORS = (4, 6)
_LONGEST_TEXT = 255  # octets with the letter, as in the patch
_TO_PRINTABLE = bytes(octet if 32 <= octet < 127 else ord("?") for octet in range(256))

CRASHED = Reply(451, b"qq crashed (#4.3.0)")
PERMANENT = Reply(554, b"qq permanent problem (#5.3.0)")
TEMPORARY = Reply(451, b"qq temporary problem (#4.3.0)")

_READ_ERROR = 54
_CANNOT_EXEC = 120

_RESET_SIGNALS = (SIGPIPE, SIGXFSZ)  # which the interpreter ignores

_NO_PROCESS = (11, 12)  # EAGAIN and ENOMEM of fork(2)

_PIECE = 32768  # octets of a message that are written at a time
_ROOM = 4096  # octets that an empty pipe takes at least
_LOOK_SECONDS = 1.0  # between looks whether one that reads nothing has ended
_REAP_SECONDS = 1.0


def reply_to(status: int) -> Reply | None:
    """The reply to an exit status, None for the one that means that the message is queued."""
    if status == 0:
        return None
    return REPLIES.get(status) or (PERMANENT if 11 <= status <= 40 else TEMPORARY)


def writes_text(program: bytes) -> bool:
    """Whether the program is, by its name, one of those that have words of their own."""
    return program.rpartition(b"/")[2].startswith(_TEXT_WRITERS)


def reply_of(text: bytes) -> Reply | None:
    """The reply in what a filter wrote for the client, None if there is no reply in it.

    What is in it may be the sender's own (the name of a file, of a virus): no octet of it can end
    the line.  Line ends become blanks and what else is not printable question marks; nothing is
    left out, lest what stood on both sides of it should become a word that nobody wrote, such as
    an enhanced status code.
    """
    text = text[:_LONGEST_TEXT].partition(b"\0")[0]  # the end of a string in C
    code = CODES.get(text[:1])
    words = b" ".join(text[1:].split())
    return Reply(code, words.translate(_TO_PRINTABLE)) if code and words else None


def open_delivery(
    program: bytes, environ: Mapping[bytes, bytes], left: list[int], with_text: bool = False
) -> QueueDelivery | None:
    """Start qmail-queue, `with_text` with the pipe for a text; None where pipes or processes are
    short.

    A program that can not be executed is told of at the end, as if it had been and had exited 120.
    `left` are the process ids of those that were given up and had not ended by then.  It is the
    caller's, as they may outlive the session, and is kept up here.
    """
    reap(left)
    pipes = _pipes(with_text)
    if pipes is None:
        return None
    message_out, message_in = pipes[0]
    envelope_out, envelope_in = pipes[1]
    theirs = [message_out, envelope_out]
    text: int | None = None
    if with_text:
        text, text_in = pipes[2]
        theirs.append(text_in)
    trouble = None
    try:
        pid = _start(program, environ, theirs)
    except OSError as error:
        pid, trouble = 0, OSError(error.errno, error.strerror)  # that one holds us: a circle
    delivery = QueueDelivery(pid, message_in, envelope_in, trouble, left, text)
    if trouble and trouble.errno in _NO_PROCESS:
        delivery.cancel()
        return None
    return delivery


def _pipes(with_text: bool) -> list[tuple[int, int]] | None:
    """Pipes for message, envelope and text, of each the end to read and the end to write; None if
    there are not enough descriptors.
    """
    pipes: list[tuple[int, int]] = []
    try:
        pipes.append(os.pipe())
        pipes.append(os.pipe())
        if with_text:
            # Whatever is written to it, and whoever keeps it open: nobody waits for this pipe.
            pipes.append(os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        for ends in pipes:
            os.close(ends[0])
            os.close(ends[1])
        return None
    return pipes


def _start(program: bytes, environ: Mapping[bytes, bytes], ends: Sequence[int]) -> int:
    """Start the program with its ends of the pipes, which are closed here; raises OSError."""
    actions = [(os.POSIX_SPAWN_DUP2, ends[0], 0), (os.POSIX_SPAWN_DUP2, ends[1], 1)]
    if len(ends) > 2:
        actions += [(os.POSIX_SPAWN_DUP2, ends[2], number) for number in _TEXT_DESCRIPTORS]
    try:
        return os.posix_spawn(
            program, [program], environ, file_actions=actions, setsigdef=_RESET_SIGNALS
        )
    except ValueError as error:  # an environment that no process can have
        raise OSError(0, str(error)) from None
    finally:
        for end in ends:
            os.close(end)


def reap(left: list[int]) -> None:
    """Take those that have ended out of a list of process ids, and out of the system's."""
    if left:
        left[:] = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] != pid]


class QueueDelivery(effects.Delivery):
    """A run of qmail-queue, from its start to its exit status.

    `trouble` is why it could not be started, or None.
    """

    __slots__ = (
        *("_envelope", "_failed", "_left", "_message", "_pieces", "_size", "_status", "_text"),
        *("pid", "trouble"),
    )

    def __init__(
        self,
        pid: int,
        message: int,
        envelope: int,
        trouble: OSError | None,
        left: list[int],
        text: int | None = None,
    ) -> None:
        self.pid = pid
        self.trouble = trouble
        self._left = left
        self._message = message
        self._envelope = envelope
        self._text = text
        self._failed = trouble is not None
        self._status: int | None = None if pid else 0  # of wait(2), once it has ended
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
        if len(data) > _ROOM:
            os.set_blocking(descriptor, False)
        try:
            while data and not self._failed:
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:
                    self._await_reader(descriptor)
        except OSError:
            self._failed = True

    def _await_reader(self, descriptor: int) -> None:
        """Wait until the pipe takes more; not for ever where qmail-queue has ended, and something
        that it has started keeps the other end open.
        """
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while not poll.poll(_LOOK_SECONDS * 1000):
            if self._has_ended():
                self._failed = True
                return

    def _has_ended(self) -> bool:
        """Whether it has ended; then its status is there."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if ended else None
        return self._status is not None

    def close(self, envelope: bytes) -> Reply | None:
        """End the message, hand over the envelope and wait for what qmail-queue says."""
        self._flush()
        os.close(self._message)
        self._write_all(self._envelope, envelope)
        os.close(self._envelope)
        status = os.waitpid(self.pid, 0)[1] if self._status is None else self._status
        text = self._read_text()
        if self.trouble:
            return reply_to(_CANNOT_EXEC)
        if os.WIFSIGNALED(status):
            return CRASHED
        exit_status = os.WEXITSTATUS(status)
        if exit_status in HAS_TEXT:
            return reply_of(text) or reply_to(exit_status)
        # It said yes to something that it did not read to the end.
        return reply_to(_READ_ERROR if self._failed and exit_status == 0 else exit_status)

    def _read_text(self) -> bytes:
        """What there is of a text for the client; its writer has ended, so that all of it is."""
        if self._text is None:
            return b""
        try:
            return os.read(self._text, _LONGEST_TEXT)
        except OSError:  # there is none, and somebody else keeps the pipe open
            return b""
        finally:
            os.close(self._text)

    def cancel(self) -> None:
        """Give up: qmail-queue finds no envelope, removes what it has and exits.

        It is waited for, lest it stay as a zombie, but not for long: nobody needs its status, and
        the next delivery will look again.
        """
        os.close(self._message)
        os.close(self._envelope)
        self._pieces.clear()
        deadline = time.monotonic() + _REAP_SECONDS
        while not self._has_ended():
            if time.monotonic() > deadline:
                self._left.append(self.pid)
                break
            time.sleep(0.002)
        self._read_text()
