"""What qmail-smtpd-check says of limits: those of a session, and that on memory."""

from __future__ import annotations

import os
import resource
import sys

from .chain import LISTENER
from .rights import obstacle, remedy_for_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .findings import Report
    from .subject import Subject
    from .trial import Trial

MEMORY_NEEDS: dict[int, tuple[int, int]] = {9: (11, 39), 11: (15, 37), 13: (14, 43)}
"""README's table: the memory limits from which on it works, in MB, by the minor version of Python
3: without TLS, and with TLS and AUTH."""

LISTENER_NEEDS = 50
"""The same in MB for a worker of qmail-smtpd-listen with TLS: docs/listener.md."""

_SMALLEST_DATABYTES = 10000
_UNITS = {"timeout": " s", "session": " s", "least_rate": " octets/s", "greeting_delay": " s"}


def examine(subject: Subject, trial: Trial, report: Report) -> None:
    """Tell of the limits, and compare that on memory with what is needed."""
    server = subject.server
    settings = server.settings
    limits = settings.limits
    values = {name: getattr(limits, name) for name in limits.__slots__}
    values = {"databytes": settings.databytes, "timeout": server.timeout, **values}
    values["session"] = server.longest_session
    values["least_rate"] = server.pace.rate
    values["greeting_delay"] = server.greeting_delay
    words = {name: name.replace("_", " ") for name in values}
    told = [
        f"{words[name]} {number}{_UNITS.get(name, '')}" for name, number in values.items() if number
    ]
    none = [words[name] for name, number in values.items() if not number]
    text = ", ".join(told) + (f"; none: {', '.join(none)}" if none else "")
    drops = server.drops_early_talkers
    if server.greeting_delay:
        text += f"; who speaks before the greeting is {'turned away' if drops else 'only logged'}"
    report.fact("limits", text, **values, drops_early_talkers=drops)
    if 0 < settings.databytes < _SMALLEST_DATABYTES:
        what = f"databytes is {settings.databytes}: hardly any message is that small"
        report.warning("databytes", what, "it is in octets: 10000000 are 10 MB; 0 is no limit")
    if subject.chain.server:
        sessions = subject.chain.concurrency
        report.fact("concurrency", str(sessions or "not known"), sessions=sessions)
    _examine_memory(subject, trial, report)
    _examine_table(subject, report)
    _examine_trace(subject, report)


def _examine_table(subject: Subject, report: Report) -> None:
    """The file in which failed AUTH attempts are counted, which the program makes if it may."""
    failures = subject.server.auth_failures()
    if not failures:
        return
    path = subject.path(os.fsdecode(failures.path))
    text = f"{failures.limit} of an address in {failures.period} s, counted in {path}"
    report.fact("failed AUTH", text, limit=failures.limit, seconds=failures.period)
    writable = path if os.path.exists(path) else os.path.dirname(path)
    if not os.access(writable, os.W_OK):
        what = f"failed AUTH attempts are not counted: {writable} is not writable"
        remedy = f"make a directory for it that uid {os.geteuid()} can write, and name that"
        report.warning("authfailtable", what, remedy, obstacle(writable))


def _examine_trace(subject: Subject, report: Report) -> None:
    """SMTPTRACE, which is meant for one address and a while."""
    trace = os.fsdecode(subject.environ.get(b"SMTPTRACE", b""))
    if not trace:
        return
    report.fact("trace", f"of every session, to {trace}")
    path = subject.path(trace)
    if not trace.startswith("=") and not os.access(path, os.W_OK | os.X_OK):
        what = f"sessions are not traced: {path} is not writable"
        remedy = remedy_for_directory(path, os.geteuid())
        report.warning("trace", what, remedy, obstacle(path))


def memory_limit(subject: Subject) -> int | None:
    """The limit on address space that a session has, in octets, None for none."""
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit = subject.chain.limits.get("as", own)
    return None if limit == resource.RLIM_INFINITY else limit


def needed(with_tls: bool, minor: int = sys.version_info.minor) -> int:
    """The smallest limit that works, in octets; for other versions, the largest of the table."""
    largest = tuple(max(column) for column in zip(*MEMORY_NEEDS.values()))
    return int(MEMORY_NEEDS.get(minor, largest)[with_tls]) * 1_000_000


def _examine_memory(subject: Subject, trial: Trial, report: Report) -> None:
    limit = memory_limit(subject)
    has_own_tls = subject.server.is_smtps or os.path.lexists("control/servercert.pem")
    with_tls = has_own_tls and not subject.has_tls_in_front
    need = needed(with_tls)
    if with_tls and subject.chain.server == LISTENER:
        need = max(need, LISTENER_NEEDS * 1_000_000)
    what_for = "with TLS" if with_tls else "without TLS"
    text = f"{need / 1e6:g} MB are needed {what_for}; the limit is "
    none = "not known" if subject.chain.lacks_memory_limit else "none"
    text += none if limit is None else f"{limit / 1e6:g} MB"
    report.fact("memory", text, limit=limit, needed=need)
    if limit is None or limit >= need:
        return
    what = f"the memory limit is {limit / 1e6:g} MB, and sessions {what_for} need {need / 1e6:g} MB"
    remedy = "softlimit -m 64000000 in the run file"
    if trial.failure or (with_tls and not trial.version):
        report.error("memory", what, remedy)
    else:
        report.warning("memory", what, remedy, "a session as small as ours worked, others may not")
