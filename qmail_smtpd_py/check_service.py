"""What qmail-smtpd-check says of a service directory: whether supervise(8) can start what is in it,
and whether multilog(8) can write the log.

A log that is not written stops more than itself: its pipe fills up, and tcpserver, which tells of
each connection, waits for room in it.
"""

from __future__ import annotations

import os
import pwd

from . import shellwords
from .rights import owner, program_trouble, remedy_for_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .findings import Report
    from .runfile import RunFile
    from .shellwords import Command

_OF_MULTILOG = ("@", "current", "lock", "newstate", "previous", "processed", "state")
"""What the names begin with that multilog makes in a directory."""


def examine(path: str, run: RunFile, report: Report) -> None:
    """Look at a run file, and at what lies beside it in a service directory."""
    directory = os.path.dirname(os.path.abspath(path))
    _examine_start(path, report)
    if run.chain.program and not run.needs_no_exec:
        what = "the last command is not started with exec: what svc sends, the shell gets"
        report.warning(
            "no-exec", what, "put exec in front of it", "svc -t would end the shell only"
        )
    if run.ends_at_once:
        what = "the last command ends with &: the run file ends, and supervise starts it again"
        report.error("no-exec", what, "exec without &", "each second one that finds the port taken")
    if os.path.exists(f"{directory}/down"):
        what = f"{directory}/down is there: supervise does not start the service by itself"
        report.warning("down", what, f"rm {directory}/down")
    log = f"{directory}/log/run"
    if os.path.exists(log):
        _examine_start(log, report)
        _examine_log(log, report)


def _examine_start(path: str, report: Report) -> None:
    trouble, remedy = program_trouble(path)
    if trouble:
        report.error("run-file", f"supervise does not start it: {trouble}", remedy)


def _examine_log(path: str, report: Report) -> None:
    """See that whoever multilog runs as can write its directories, as far as the script says."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            commands = shellwords.parse(file.read())
    except (OSError, shellwords.ScriptError):
        return
    for command in commands:
        user, directories = _multilog(command)
        for name in directories:
            _examine_directory(os.path.join(os.path.dirname(path), name), user, report)


def _multilog(command: Command) -> tuple[str, list[str]]:
    """Who runs multilog in this command, and its directories; empty where that is not known."""
    words = [word.literal for word in command.words]
    names = [os.path.basename(word) if word else "" for word in words]
    if None in words or "multilog" not in names:
        return "", []
    at = names.index("multilog")
    user = words[names.index("setuidgid") + 1] if "setuidgid" in names[:at] else ""
    return user or "", [word for word in words[at + 1 :] if word and word[0] in "./"]


def _examine_directory(path: str, user: str, report: Report) -> None:
    cause = "when the log's pipe is full, tcpserver waits for it, and nobody is served"
    path = os.path.normpath(path)
    try:
        account = pwd.getpwnam(user) if user else pwd.getpwuid(0)
    except (KeyError, ValueError):
        what = f"the log is not written: there is no user {user}"
        report.error("log-directory", what, "make the user, or correct log/run", cause)
        return
    try:
        found = os.stat(path)
    except PermissionError:
        return  # nobody but root can say
    except OSError as error:
        what = f"the log is not written: {path}: {error.strerror}"
        remedy = remedy_for_directory(path, account.pw_name)
        report.error("log-directory", what, remedy, cause)
        return
    if account.pw_uid and not _may_write(found, account):
        what = f"the log is not written: {path} is {owner(found)}, and {user} can not write there"
        remedy = remedy_for_directory(path, user, _OF_MULTILOG)
        report.error("log-directory", what, remedy, cause)


def _may_write(found: os.stat_result, account: pwd.struct_passwd) -> bool:
    """Whether a user may make files in a directory; of groups its first one counts."""
    if found.st_uid == account.pw_uid:
        return found.st_mode & 0o300 == 0o300
    needed = 0o030 if found.st_gid == account.pw_gid else 0o003
    return found.st_mode & needed == needed
