"""--daemon: the listener without a supervisor, found again by its pid file."""

from __future__ import annotations

import os
import sys

from . import log
from .options import NAME, Options, StartError


def detach(options: Options, keep: int) -> None:
    """Go into the background with the descriptor `keep` (python-daemon, PEP 3143); raises
    StartError.
    """
    from daemon import DaemonContext

    _check_pid_file(options.pid_file)
    kept = [keep]
    if options.pid_file:
        pid_file = _open_for_writing(options.pid_file)
        kept.append(pid_file)
        try:
            _write_over(pid_file, b" ")  # later nobody could be told that the disk is full
        except OSError as error:
            raise _unwritable(options.pid_file, error) from None
    if options.log_file:
        os.dup2(_open_for_writing(options.log_file, os.O_APPEND), log.DESCRIPTOR)
    DaemonContext(
        files_preserve=kept,
        stderr=sys.stderr,
        working_directory="/",
        umask=0o022,
        detach_process=True,
        prevent_core=False,
        initgroups=False,
        signal_map={},
    ).open()
    if options.pid_file:
        _write_over(pid_file, b"%d\n" % os.getpid())
        os.close(pid_file)


def _write_over(pid_file: int, text: bytes) -> None:
    """Write a text over what is there; raises OSError."""
    os.pwrite(pid_file, text, 0)
    os.ftruncate(pid_file, len(text))


def _check_pid_file(path: str | None) -> None:
    """Raises StartError where the file has the process id of a listener that runs, and has it from
    there: after a restart of the system the process may be another one.
    """
    pid = _pid_in(path)
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command_line = os.fsdecode(file.read())
    except OSError:
        return
    names = {os.path.basename(word.rpartition("=")[2]) for word in command_line.split("\0")}
    if NAME in command_line and os.path.basename(path or "") in names:
        raise StartError(f"{path} is there, and process {pid} runs")


def remove_pid_file(path: str | None) -> None:
    """Remove our own file; one that -u may not remove is replaced at the next start."""
    if path and _pid_in(path) == os.getpid():
        try:
            os.unlink(path)
        except OSError:
            pass


def _pid_in(path: str | None) -> int:
    """The process id in a pid file; 0 if there is none."""
    try:
        with open(path or os.devnull, opener=_open_plainly) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _open_for_writing(path: str, flags: int = 0) -> int:
    try:
        descriptor = _open_plainly(path, os.O_WRONLY | os.O_CREAT | flags)
    except OSError as error:
        raise _unwritable(path, error) from None
    os.set_blocking(descriptor, True)
    return descriptor


def _unwritable(path: str, error: OSError) -> StartError:
    return StartError(f"cannot write {path}: {error.strerror} (uid {os.geteuid()})")


def _open_plainly(path: str, flags: int) -> int:
    """Open a file by no link, and a named pipe without waiting for its other end.

    The directory may be that of -u, and we may be root.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
