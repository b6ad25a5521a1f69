"""The check program: who somebody is, is decided by a program with checkpassword's interface.

It reads `user \\0 password \\0` from descriptor 3, and the challenge as a third field where
SMTPAUTH names CRAM-MD5, and answers by its exit status.  Of ours it gets nothing else: /dev/null
for input, the log for output, and no other descriptor; what it leaves running delays nothing.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py
import time
from _signal import SIGPIPE, SIGXFSZ  # type: ignore[import-not-found]  # signal, without its enums

from . import reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .reply import Reply
    from .sasl import Credentials

ACCEPTED = 0
TEMPORARY_FAILURE = 111  # checkpassword's interface: trouble, not a wrong password

FAILURE_DELAY = 5.0
"""Seconds before a refusal is told, against guessing."""

_DEFAULT_PATH = b"/bin:/usr/bin"  # execvp(3)

_RESET_SIGNALS = (SIGPIPE, SIGXFSZ)  # which the interpreter ignores
_SHORTEST_WAIT, _LONGEST_WAIT = 0.0005, 0.02  # seconds between looks at the child
_REAP_SECONDS = 1.0


def patience(timeout: float) -> float:
    """Seconds that a check program may take, given timeoutsmtpd."""
    return min(max(10.0, timeout), 60.0)


def fields(credentials: Credentials, with_challenge: bool) -> bytes:
    """What the check program reads from descriptor 3."""
    text = b"%s\0%s\0" % (credentials.user, credentials.secret)
    return text + credentials.challenge + b"\0" if with_challenge else text


def authenticate(
    arguments: Sequence[bytes],
    text: bytes,
    environ: Mapping[bytes, bytes],
    seconds: float,
    tell: Callable[[str], None],
    left: list[int],
    counts: Callable[[bool], bool] | None = None,
) -> Reply:
    """Run the check program on the text for descriptor 3; the reply to what it made of it.

    `seconds` is how long it may take; `tell` takes the words for the log where it is in trouble;
    `left` gets the process id of one that was given up and has not ended; `counts` is told, before
    the delay, whether the program said no, and says whether that, or its yes, counts.
    """
    answer = _ask(arguments, text, environ, seconds, tell, left)
    has_failed = answer is reply.AUTH_FAILED
    if counts and (has_failed or answer is reply.AUTHENTICATED) and not counts(has_failed):
        answer = reply.AUTH_TOO_OFTEN
    if answer in (reply.AUTH_FAILED, reply.AUTH_TOO_OFTEN):
        time.sleep(FAILURE_DELAY)
    return answer


def _ask(
    arguments: Sequence[bytes],
    text: bytes,
    environ: Mapping[bytes, bytes],
    seconds: float,
    tell: Callable[[str], None],
    left: list[int],
) -> Reply:
    try:
        child_end, our_end = os.pipe()
    except OSError as error:
        tell(f"no pipe for the check program: {error.strerror}")
        return reply.AUTH_NO_PIPE
    try:
        pid = _start(arguments, child_end, environ)
    except OSError as error:
        name = arguments[0].decode("ascii", "backslashreplace")
        tell(f"cannot start check program {name}: {error.strerror} (uid {os.geteuid()})")
        os.close(our_end)
        return reply.AUTH_NO_CHILD
    finally:
        os.close(child_end)
    deadline = time.monotonic() + seconds
    _write(our_end, text, deadline)
    os.close(our_end)
    status = _wait(pid, deadline)
    if status is None:
        tell(f"check program {_give_up(pid, left)}: no answer in {seconds:g} s")
        return reply.AUTH_TROUBLE
    return _reply_to(status, tell)


def _reply_to(status: int, tell: Callable[[str], None]) -> Reply:
    """The reply to a wait status."""
    if os.WIFSIGNALED(status):
        tell(f"check program ended by signal {os.WTERMSIG(status)}")
        return reply.AUTH_TROUBLE
    exit_status = os.WEXITSTATUS(status)
    if exit_status == ACCEPTED:
        return reply.AUTHENTICATED
    if exit_status == TEMPORARY_FAILURE:
        tell("check program has temporary trouble: exit status 111")
        return reply.AUTH_TROUBLE
    return reply.AUTH_FAILED


def _start(arguments: Sequence[bytes], descriptor: int, environ: Mapping[bytes, bytes]) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, 2, 1),
        (os.POSIX_SPAWN_DUP2, descriptor, 3),
    ]
    if descriptor == 3:  # then that is no copy, and before glibc 2.29 it would be closed at exec
        os.set_inheritable(3, True)
    why = "No such file or directory"
    for path in _paths(arguments[0], environ):
        try:
            return os.posix_spawn(
                path, list(arguments), environ, file_actions=actions, setsigdef=_RESET_SIGNALS
            )
        except ValueError as error:  # an environment that no process can have
            raise OSError(0, str(error)) from None
        except (FileNotFoundError, NotADirectoryError):
            pass  # as in execvp(3): it may be in the next directory
        except PermissionError as error:
            why = error.strerror or why
    raise OSError(0, why)


def _paths(name: bytes, environ: Mapping[bytes, bytes]) -> list[bytes]:
    """Where execvp(3) looks for a program; by the PATH of the session, which rules may have set,
    and not by that of the process.
    """
    if b"/" in name:
        return [name]
    directories = environ.get(b"PATH", _DEFAULT_PATH).split(b":")
    return [b"%s/%s" % (directory or b".", name) for directory in directories]


def _write(descriptor: int, text: bytes, deadline: float) -> None:
    """Write the text; a program that does not want all of it says what it thinks on exit."""
    os.set_blocking(descriptor, False)
    wait = _SHORTEST_WAIT
    while text and time.monotonic() < deadline:
        try:
            text = text[os.write(descriptor, text) :]
        except BlockingIOError:
            time.sleep(wait)
            wait = min(wait * 1.5, _LONGEST_WAIT)
        except OSError:
            return


def _wait(pid: int, deadline: float) -> int | None:
    """The child's wait status; None if it has not ended in time.

    The child alone is waited for, not the end of a pipe, which a daemon of its own would hold.
    """
    wait = _SHORTEST_WAIT
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(wait)
        wait = min(wait * 1.5, _LONGEST_WAIT)


def _give_up(pid: int, left: list[int]) -> str:
    """Kill a child, and say what became of it.

    It may not be ours to kill any more, as it becomes whoever it has found, and one that waits for
    a disk does not die: nobody waits for either.
    """
    try:
        os.kill(pid, 9)
    except PermissionError:
        left.append(pid)
        return "left alone, as it runs as another user"
    if _wait(pid, time.monotonic() + _REAP_SECONDS) is None:
        left.append(pid)
    return "killed"
