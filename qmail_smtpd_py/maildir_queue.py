"""qmail-queue-maildir: a qmail-queue for hosts without qmail, which delivers to a Maildir.

It is started as qmail-queue(8) is, in the qmail home directory, with the message on descriptor 0
and the envelope on descriptor 1:

    F sender NUL  T recipient NUL  T recipient NUL ...  NUL

The message is read to its end first, and the envelope after it, so the fields that are made from
the envelope can not be written in front of the message as it comes in.  It waits in a spool that
has no name, and what becomes the delivered file is written in one go:

    Return-Path, one Envelope-To for each recipient, Received     from the envelope
    the message, octet for octet                                  from the spool

Neither message nor envelope is ever in memory whole.  The file is written in tmp, is on the disk
before it is renamed into new, and the new name is on the disk before the program exits 0.  Whatever
goes wrong before that removes it: what is in new is whole, and what was refused is not there.

An octet below 32, or 127, in an address is an envelope error.  Put into a field it could end the
line and forge others, and made harmless it would be an address that nobody sent or asked for.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal, without its enums
import os
import time

from .log import Log
from .trace import date

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

# Exit statuses of qmail-queue(8): 11 to 40 are permanent, all others temporary.
DELIVERED = 0
ADDRESS_TOO_LONG = 11
OUT_OF_MEMORY = 51
TIMED_OUT = 52
CANNOT_WRITE = 53
CANNOT_READ = 54
NO_HOME = 61
NO_MAILDIR = 62
CANNOT_CREATE = 63
CANNOT_PUBLISH = 64
ENDED = 71
INTERNAL_ERROR = 81
BAD_ENVELOPE = 91

MESSAGE = 0
ENVELOPE = 1

BLOCK = 65536
"""Octets read and written at a time."""

ADDRESS_LIMIT = 1002
"""Octets in an address; qmail-queue's limit of 1003 counts the NUL behind it."""

DEADLINE = 86400
"""Seconds that a delivery may take, as in qmail-queue."""

_CONTROLS = bytes([*range(32), 127])
_ATOM = b"!#$%&'*+-./0123456789=?ABCDEFGHIJKLMNOPQRSTUVWXYZ^_`abcdefghijklmnopqrstuvwxyz{|}~"
_ATOM += bytes(range(128, 256))
_IGNORED = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGPIPE,
    _signal.SIGVTALRM,
    _signal.SIGPROF,
    _signal.SIGXCPU,
    _signal.SIGXFSZ,
)


class Failure(Exception):
    """The message is not delivered: the exit status that says so, and why, for the log."""

    def __init__(self, status: int, cause: str) -> None:
        super().__init__(cause)
        self.status = status


class Attempt:
    """A step that may fail: `with` makes an OSError in it a Failure of this status.

    `what` completes the sentence "cannot ...".
    """

    __slots__ = ("_status", "_what")

    def __init__(self, status: int, what: str) -> None:
        self._status = status
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise Failure(self._status, f"cannot {self._what}: {error.strerror}") from None


def main() -> int:
    """Deliver one message; returns the exit status.  Trouble is one line on descriptor 2."""
    try:
        watch_signals()
        check_surroundings()
        deliver(os.environ.get("QMAILMAILDIR") or "Maildir")
    except Failure as failure:
        log(str(failure))
        return failure.status
    except MemoryError:
        log("out of memory")
        return OUT_OF_MEMORY
    except Exception as error:
        log(f"internal error: {error!a}")
        return INTERNAL_ERROR
    return DELIVERED


def check_surroundings() -> None:
    """See that the caller gave what a delivery needs: two descriptors and a home directory.

    A descriptor that is closed would be the next file's, and the spool be read as the envelope.
    """
    with Attempt(CANNOT_READ, "use descriptors 0 and 1"):
        os.fstat(MESSAGE)
        os.fstat(ENVELOPE)
    with Attempt(NO_HOME, "use the current directory"):
        os.getcwd()


def log(cause: str) -> None:
    """Write one line to descriptor 2: what happened, with whose rights and where.

    The process id is what qmail-smtpd's log and replies have as `qp`.
    """
    try:
        home = ascii(os.getcwd())
    except OSError:
        home = "a directory that is gone"
    line = f"qmail-queue-maildir[{os.getpid()}]: {cause} (uid {os.geteuid()}, in {home})"
    Log().write_line(line)  # If it is lost, the exit status has to do.


def watch_signals() -> None:
    """Start the deadline, and let only it and SIGTERM end the delivery, both in order.

    SIGXFSZ is among the ignored, so that a file size limit is a write error.
    """
    for number in _IGNORED:
        _signal.signal(number, _signal.SIG_IGN)
    _signal.signal(_signal.SIGALRM, _end)
    _signal.signal(_signal.SIGTERM, _end)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    _signal.alarm(DEADLINE)


def ignore_signals() -> None:
    """From here on nothing but SIGKILL ends the program; a signal that was first still does."""
    _signal.signal(_signal.SIGALRM, _signal.SIG_IGN)
    _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)


def _end(number: int, _frame: FrameType | None) -> None:
    ignore_signals()  # A second signal would break off the removal of what was written.
    if number == _signal.SIGALRM:
        raise Failure(TIMED_OUT, f"no end after {DEADLINE} seconds")
    raise Failure(ENDED, "ended by SIGTERM")


def deliver(maildir: str) -> None:
    """Read the message and the envelope, and put the message into the Maildir, or raise Failure."""
    os.umask(0o077)
    make_maildir(maildir)
    now = time.time_ns()
    name = unique_name(now)
    spool = open_spool(f"{maildir}/tmp/{name}.spool")
    with Attempt(CANNOT_WRITE, f"spool the message in {maildir!a}"):
        copy(MESSAGE, spool)
        os.lseek(spool, 0, os.SEEK_SET)
    tmp = f"{maildir}/tmp/{name}"
    new = f"{maildir}/new/{name}"
    try:
        file = create(tmp)
        with Attempt(CANNOT_WRITE, f"write {tmp!a}"):
            write_fields(file, now // 10**9)
            copy(spool, file)
            os.fsync(file)
            os.close(file)
        ignore_signals()  # What is visible has been delivered, and the exit status has to say so.
        with Attempt(CANNOT_PUBLISH, f"move {tmp!a} to {new!a}"):
            os.rename(tmp, new)
            sync_directory(f"{maildir}/new")
    except BaseException:
        remove(tmp)
        remove(new)
        raise


def make_maildir(maildir: str) -> None:
    """Make the directories of the Maildir that are not there yet, for its owner alone."""
    for path in (maildir, f"{maildir}/tmp", f"{maildir}/new", f"{maildir}/cur"):
        if os.path.isdir(path):
            continue
        with Attempt(NO_MAILDIR, f"make the directory {path!a}"):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                if not os.path.isdir(path):  # Otherwise another delivery was faster.
                    raise
            sync_directory(f"{path}/..")


def unique_name(now: int) -> str:
    """A file name that no other delivery has; `now` is in nanoseconds since 1970.

    The time, the process, random octets and the host, as in the Maildir specification
    (cr.yp.to/proto/maildir.html), which also says how to write a host's slashes and colons.
    """
    seconds, nanoseconds = divmod(now, 10**9)
    host = os.uname().nodename.replace("/", "\\057").replace(":", "\\072")
    unique = f"M{nanoseconds // 1000}P{os.getpid()}R{os.urandom(8).hex()}"
    return f"{seconds}.{unique}.{host}"


def open_spool(path: str) -> int:
    """A descriptor of a new file that has no name any more: it goes when the program does."""
    try:
        return create(path)
    finally:
        remove(path)


def create(path: str) -> int:
    """A descriptor, for reading and writing, of a file that was not there before."""
    with Attempt(CANNOT_CREATE, f"create {path!a}"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)


def copy(source: int, target: int) -> None:
    """Copy all that is left in one descriptor to another; raises OSError where it can not write."""
    while True:
        block = read(source, "the message")
        if not block:
            return
        write(target, block)


def read(descriptor: int, what: str) -> bytes:
    """The next octets, no more than BLOCK; none at the end."""
    with Attempt(CANNOT_READ, f"read {what}"):
        return os.read(descriptor, BLOCK)


def write(descriptor: int, data: bytes) -> None:
    """Write all octets; raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_fields(file: int, now: int) -> None:
    """Write the fields in front of the message; `now` is in seconds since 1970."""
    envelope = addresses()
    write(file, b"Return-Path: <%s>\n" % quoted(next(envelope)))
    recipients = 0
    for recipient in envelope:
        write(file, b"Envelope-To: %s\n" % quoted(recipient))
        recipients += 1
    if not recipients:
        raise Failure(BAD_ENVELOPE, "the envelope has no recipient")
    invoked = b"qmail %d invoked by uid %d" % (os.getpid(), os.getuid())
    write(file, b"Received: (%s); %s\n" % (invoked, date(now)))


def addresses() -> Iterator[bytes]:
    """The addresses of the envelope, the sender first, read as they are asked for.

    As in qmail-queue, what stands behind the closing NUL is not looked at.
    """
    letter = b"F"
    rest = b""
    while True:
        block = read(ENVELOPE, "the envelope")
        if not block:
            raise Failure(CANNOT_READ, "the envelope ends too early: the message was given up")
        *fields, rest = (rest + block).split(b"\0")
        for field in fields:
            if letter == b"T" and not field:
                return
            yield address(field, letter)
            letter = b"T"
        if rest:
            address(rest, letter)  # However it goes on, what is wrong with it by now stays wrong.


def address(field: bytes, letter: bytes) -> bytes:
    """The address in a field of the envelope, which has to begin with this letter."""
    if field[:1] != letter:
        raise Failure(BAD_ENVELOPE, f"envelope format error: {field[:1]!a} instead of {letter!a}")
    found = field[1:]
    if len(found) > ADDRESS_LIMIT:
        raise Failure(ADDRESS_TOO_LONG, f"an address is longer than {ADDRESS_LIMIT} octets")
    if len(found) != len(found.translate(None, _CONTROLS)):
        raise Failure(BAD_ENVELOPE, "envelope format error: control octet in an address")
    return found


def quoted(address: bytes) -> bytes:
    """The address as a header field has it: envelopes have neither quotes nor escapes.

    The local part is quoted where it is no dot-atom (RFC 5322 section 3.4.1, RFC 6532 section 3.2).
    """
    local, at, domain = address.rpartition(b"@") if b"@" in address else (address, b"", b"")
    dot_atom = not local.translate(None, _ATOM) and all(local.split(b"."))
    if dot_atom or not address:
        return address
    return b'"%s"' % local.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + at + domain


def sync_directory(path: str) -> None:
    """Have the names in a directory on the disk; raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)
    except OSError:
        pass  # It was never made; and if it was, nothing better can be done about it.
