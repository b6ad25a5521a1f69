"""checkpassword-users: a checkpassword for hosts without one, which asks the users file.

It is started as cr.yp.to/checkpwd/interface.html says, in the qmail home directory.  Descriptor 3
has what the client gave, each field with a NUL behind it:

    user NUL password NUL                        PLAIN and LOGIN
    user NUL password NUL NUL                    the same, where CRAM-MD5 is on offer
    user NUL digest NUL challenge NUL            CRAM-MD5, the digest in hexadecimal

If they are right, the program becomes the one that its arguments name, as the same user and in the
same environment: the users of the file are no users of the host.  Otherwise it exits:

    1     refused            the user is not known, or the password or digest is another
    2     misused            no program to run, or descriptor 3 has no credentials
    111   temporary trouble  the users file can not be used, no memory, the program can not be run

A user that is not known costs the time of one that is.  Passwords, digests and secrets are in
memory and nowhere else: no log line, no error text, no argument and no variable has one.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal, without its enums
import errno
import os
import sys

from .log import Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .users_file import User, UsersFile

REFUSED = 1
MISUSED = 2
TROUBLE = 111

CREDENTIALS = 3

CREDENTIALS_LIMIT = 65536
"""Octets on descriptor 3; qmail-smtpd takes lines of 12288, where checkpassword has 512 for all."""

SHOWN = 255
"""Octets of a user's name in a log line."""


class Misuse(Exception):
    """The program is not started as a check program is."""


def main() -> int:
    """Check the credentials and become the program in the arguments, or return the exit status."""
    try:
        # Not at the top: where memory is short, this is the first that does not fit into it, and
        # an import that fails would end the interpreter with 1, a refusal.
        from .users_file import Trouble, load_configured
    except (ImportError, MemoryError) as error:
        log(f"trouble: the program can not be loaded (see softlimit): {str(error)!a}")
        return TROUBLE
    try:
        return check(sys.argv[1:], load_configured)
    except Misuse as misuse:
        log(f"misused: {misuse}")
        return MISUSED
    except Trouble as trouble:
        log(f"trouble: {trouble}")
    except MemoryError:
        log("trouble: out of memory (see softlimit)")
    except OSError as error:
        log(f"trouble: cannot read descriptor {CREDENTIALS}: {error.strerror}")
    except Exception as error:
        log(f"trouble: {type(error).__name__}")  # Its text could have a secret.
    return TROUBLE


def check(command: list[str], load: Callable[[], UsersFile]) -> int:
    """Become the command if descriptor 3 has the right credentials; otherwise the exit status."""
    if not command:
        raise Misuse("there is no program to run: checkpassword-users PROGRAM [ARGUMENT...]")
    user, secret, challenge = parse_credentials(read_credentials())
    users = load()
    if challenge:
        accepted = users.accepts_digest(user, challenge, secret)
    else:
        accepted = users.accepts_password(user, secret)
    if not accepted:
        log_refusal(user, users.users.get(user), challenge)
        return REFUSED
    return become(command)


def read_credentials() -> bytes:
    """All that is on descriptor 3; raises OSError, and Misuse if it is too much or not open."""
    data = b""
    try:
        while len(data) <= CREDENTIALS_LIMIT:
            block = os.read(CREDENTIALS, CREDENTIALS_LIMIT + 1 - len(data))
            if not block:
                os.close(CREDENTIALS)
                return data
            data += block
    except OSError as error:
        if error.errno == errno.EBADF:
            raise Misuse("descriptor 3 is not open for reading") from None
        raise
    raise Misuse(f"more than {CREDENTIALS_LIMIT} octets on descriptor 3")


def parse_credentials(data: bytes) -> tuple[bytes, bytes, bytes]:
    """User, password or digest, and challenge, empty if there is none; raises Misuse."""
    *fields, rest = data.split(b"\0")
    if rest or len(fields) not in (2, 3):
        raise Misuse("descriptor 3 has neither two nor three fields with a NUL behind each")
    user, secret, challenge = (*fields, b"")[:3]
    return user, secret, challenge


def log_refusal(name: bytes, user: User | None, challenge: bytes) -> None:
    """Log who was refused, from where and why; the client is told none of it."""
    if user is None:
        cause = "no such user"
    elif not challenge:
        cause = "wrong password"
    elif user.cram_secret is None:
        cause = "no secret for CRAM-MD5 is kept (qmail-smtpd-users set --cram)"
    else:
        cause = "wrong CRAM-MD5 digest"
    shown = name[:SHOWN].decode("latin-1")
    remote_ip = os.environ.get("TCPREMOTEIP", "unknown")
    log(f"refused: user {shown!a} from {remote_ip!a}: {cause}")


def become(command: list[str]) -> int:
    """Run the command in this program's place; returns the exit status if that can not be."""
    # What the interpreter ignores would stay ignored; the command is to find what is usual.
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it has no name"
    log(f"trouble: cannot run {command[0]!a} (uid {os.geteuid()}): {cause}")
    return TROUBLE


def log(event: str) -> None:
    """Write one line to descriptor 2, in printable ASCII."""
    line = f"checkpassword-users[{os.getpid()}]: {event}"
    Log().write_line(line)  # If it is lost, the exit status has to do.
