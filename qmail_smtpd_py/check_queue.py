"""What qmail-smtpd-check says of qmail-queue, and of the queue behind it."""

from __future__ import annotations

import os
import stat

from .qmail_queue import DEFAULT_PROGRAM
from .rights import has_setuid, owner, program_trouble, remedy_for_directory, user_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .findings import Report
    from .subject import Subject

QUEUE_DIRECTORIES = ("pid", "intd", "todo", "mess/0")
"""Where qmail-queue makes files (INTERNALS of qmail); mess/0 stands for all of mess."""

_LEAST_SPACE = 10_000_000  # octets
_LEAST_FILES = 100


def program_of(subject: Subject) -> str:
    """The path of the program that messages are handed to."""
    name = subject.environ.get(b"QMAILQUEUE") or DEFAULT_PROGRAM
    return subject.path(os.fsdecode(name))


def examine(subject: Subject, report: Report) -> None:
    """See that the program can be started, and may do what it has to."""
    if subject.may_have("QMAILQUEUE"):
        report.fact("queue", "not known")
        return
    path = program_of(subject)
    chosen = b"QMAILQUEUE" in subject.environ and bool(subject.environ[b"QMAILQUEUE"])
    report.fact("queue", path + (" (QMAILQUEUE)" if chosen else ""), program=path)
    trouble, remedy = program_trouble(path)
    if trouble:
        if chosen:
            remedy += "; it is named by QMAILQUEUE"
        what = f"qmail-queue can not be started: {trouble}"
        report.error("qmail-queue", what, remedy, "no message is taken: 451 unable to exec qq")
        return
    if is_real(path):
        if not has_setuid(path):
            what = f"{path} is not setuid: {owner(os.stat(path))}"
            remedy = f"chown qmailq:qmail {path}; chmod 4711 {path}; no nosuid file system"
            cause = "it can not write to the queue: 451 qq trouble"
            report.error("qmail-queue-setuid", what, remedy, cause)
    elif os.path.basename(os.path.realpath(path)) == "qmail-queue-maildir":
        _examine_maildir(subject, report)


def is_real(path: str) -> bool:
    """Whether it is qmail's own: a compiled program of that name."""
    real = os.path.realpath(path)
    if os.path.basename(real) != "qmail-queue":
        return False
    try:
        with open(real, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except PermissionError:
        return True  # qmail installs it so that nobody but root can read it
    except OSError:
        return False


def _examine_maildir(subject: Subject, report: Report) -> None:
    """The Maildir of qmail-queue-maildir, which makes it where it may."""
    maildir = subject.path(os.fsdecode(subject.environ.get(b"QMAILMAILDIR") or b"Maildir"))
    report.fact("Maildir", maildir)
    there = [path for path in (maildir, f"{maildir}/tmp", f"{maildir}/new") if os.path.exists(path)]
    for path in there or [os.path.dirname(maildir)]:
        if not os.access(path, os.W_OK | os.X_OK):
            what = f"{path} is not writable for uid {os.geteuid()}: {owner(os.stat(path))}"
            remedy = remedy_for_directory(maildir, os.geteuid())
            report.error("maildir", what, remedy, "qmail-queue-maildir delivers there")


def examine_directories(path: str, report: Report) -> None:
    """See that the queue is there, and writable for the owner of qmail-queue.

    Only root, and those of group qmail, can look: that is no task for the user of qmail-smtpd.
    """
    if not is_real(path) or not os.path.exists(path):
        return
    queue = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(path))), "queue")
    writer = os.stat(path).st_uid
    try:
        os.listdir(queue)
    except PermissionError:
        report.note(f"{queue} can not be looked into by this user; as root it can")
        return
    except OSError as error:
        what = f"{queue} is not there: {error.strerror}"
        report.error("queue", what, "make setup check in qmail's source makes it")
        return
    for name in QUEUE_DIRECTORIES:
        _examine_directory(os.path.join(queue, name), writer, report)
    _examine_space(queue, report)
    if not _is_pipe(os.path.join(queue, "lock/trigger")):
        what = f"{queue}/lock/trigger is no named pipe: what is queued waits for a while"
        report.warning("queue-trigger", what, "make setup check in qmail's source makes it")


def _examine_directory(path: str, writer: int, report: Report) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        report.error("queue", f"{path}: {error.strerror}", "make setup check in qmail's source")
        return
    if writer == 0 or (found.st_uid == writer and found.st_mode & 0o300 == 0o300):
        return
    name = user_name(writer)
    what = f"{path} is not writable for {name}, the owner of qmail-queue: {owner(found)}"
    report.error("queue", what, f"chown {name} {path}; chmod u+rwx {path}")


def _examine_space(queue: str, report: Report) -> None:
    """Room on the disk: octets and files."""
    found = os.statvfs(queue)
    octets = found.f_bavail * found.f_frsize
    if octets < _LEAST_SPACE:
        what = f"{queue}: {octets // 1000} kB are left on its disk"
        report.error("queue-space", what, "make room", "451 qq write error or disk full")
    elif found.f_files and found.f_favail < _LEAST_FILES:
        what = f"{queue}: {found.f_favail} files more can be made on its disk"
        report.error("queue-space", what, "make room", "451 qq trouble creating files in queue")


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
