"""What qmail-smtpd-check says of AUTH: what is on offer and when, and the check program."""

from __future__ import annotations

import os
import re
import shutil

from . import users_file
from .rights import has_setuid, obstacle, owner, program_trouble, user_name
from .settings import auth_policy
from .unknown import is_known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .findings import Report
    from .subject import Subject

_SMTPAUTH = re.compile(rb"!?(\+?cram(-?md5)?)?|-|0", re.IGNORECASE)
"""Values that mean what they look like."""

_YES = (b"", b"0", b"1", b"yes", b"true", b"on", b"y")
_NO = (b"0", b"no", b"off", b"false", b"n", b"none", b"-")

_NEEDS_SETUID = {
    "vchkpw": "vpopmail's database",
    "checkpassword": "/etc/shadow",
    "checkpassword-pam": "what PAM asks",
    "checkpw": "the users' mail directories",
    "cmd5checkpw": "its password file",
    "true-checkpassword": "/etc/shadow",
}
"""Check programs that must read what the user of qmail-smtpd may not."""


_OF_EVERYBODY = ("true", "false")
"""Programs that are put in the place of a check program where users are not to authenticate."""


def examine_variables(variables: Mapping[bytes, bytes], where: str, report: Report) -> None:
    """Values that mean something else than they look like; `where` says whose they are."""
    smtpauth = variables.get(b"SMTPAUTH")
    if smtpauth is not None and not _SMTPAUTH.fullmatch(smtpauth):
        means = _meaning(smtpauth)
        what = f"{where}SMTPAUTH={os.fsdecode(smtpauth)!a} is none of the values; it means: {means}"
        remedy = "say what is meant: '', '!', 'cram', '+cram', '!cram', '!+cram' or '-'"
        report.warning("smtpauth-value", what, remedy)
    forcetls = variables.get(b"FORCETLS")
    if forcetls is not None and forcetls.lower() not in _YES:
        what = (
            f"{where}FORCETLS={os.fsdecode(forcetls)!a} means that it is in force: AUTH needs TLS"
        )
        report.warning("forcetls-value", what, "only FORCETLS=0 turns it off; FORCETLS=1 is plain")
    smtps = variables.get(b"SMTPS")
    if smtps is not None and smtps.lower() in _NO:
        what = f"{where}SMTPS={os.fsdecode(smtps)!a} means that it is on: TLS begins at once"
        report.warning("smtps-value", what, "unset SMTPS to turn it off")


def _meaning(smtpauth: bytes | None) -> str:
    """What a value of SMTPAUTH means, in words."""
    policy = auth_policy(smtpauth)
    mechanisms = b" ".join(policy.mechanisms).decode()
    return (
        f"{mechanisms}{'; MAIL needs it' if policy.required else ''}" if mechanisms else "no AUTH"
    )


def examine(subject: Subject, report: Report) -> None:
    """Say what is on offer, and look at the check program."""
    settings = subject.server.settings
    examine_variables(subject.environ, "", report)
    if not settings.auth.mechanisms:
        _tell_that_it_is_off(subject, report)
        return
    when = "under TLS only" if settings.force_tls else "in clear, too"
    text = f"{b' '.join(settings.auth.mechanisms).decode()}, {when}"
    if settings.auth.required:
        text += "; MAIL needs it"
    report.fact(
        "AUTH",
        text,
        mechanisms=[name.decode() for name in settings.auth.mechanisms],
        needs_tls=settings.force_tls,
        required=settings.auth.required,
    )
    if settings.can_authenticate:
        _examine_program(subject, report)
    elif subject.is_found:
        what = "AUTH is on offer, and there is no check program: every user is refused"
        remedy = "name one behind qmail-smtpd: qmail-smtpd /home/vpopmail/bin/vchkpw /bin/true"
        report.error("no-check-program", what, remedy)


def _tell_that_it_is_off(subject: Subject, report: Report) -> None:
    if subject.may_have("SMTPAUTH"):
        report.fact("AUTH", "not known")
        return
    value = subject.environ.get(b"SMTPAUTH")
    why = "SMTPAUTH is unset" if value is None else f"SMTPAUTH={os.fsdecode(value)}"
    report.fact("AUTH", f"none ({why})", mechanisms=[], needs_tls=True, required=False)
    if "SMTPAUTH" in subject.unexported:
        return  # that is told, with its line
    remedy = "export SMTPAUTH='!' above the last command of the run file"
    if subject.is_for_users:
        what = f"port {subject.port} is for users, and there is no AUTH: {why}"
        report.warning("no-auth", what, remedy)
    elif subject.arguments and value is None:
        what = "a check program is named, and never asked: SMTPAUTH is unset"
        remedy = "take the check program off"
        if os.path.basename(os.fsdecode(subject.arguments[0])) not in _OF_EVERYBODY:
            remedy = f"export SMTPAUTH='', or {remedy}"
        report.warning("no-auth", what, remedy)


def _examine_program(subject: Subject, report: Report) -> None:
    """See that the check program can be started, and can do what it has to."""
    words = [os.fsdecode(word) for word in subject.arguments]
    report.fact("check program", " ".join(words))
    if not all(map(is_known, words[:2])):
        return
    path = _find(words[0], subject)
    if path is None or program_trouble(path)[0]:
        _tell_of_trouble(words, path, report)
        return
    _examine_what_it_does(path, report)
    if os.path.basename(os.path.realpath(path)) == "checkpassword-users":
        _examine_users(subject, report)
    if len(words) < 2:
        what = f"{words[0]} is given no program to run once it is content: nobody can authenticate"
        report.error("no-subprogram", what, "put /bin/true behind it")
        return
    behind = _find(words[1], subject)
    trouble = program_trouble(behind)[0] if behind else f"{words[1]} is not there"
    if trouble:
        what = f"what the check program runs once it is content can not be started: {trouble}"
        report.error("subprogram", what, "put /bin/true there")


def _find(name: str, subject: Subject) -> str | None:
    """Where the check program is, as execvp(3) looks for it; relative to the qmail home."""
    if "/" in name:
        return subject.path(name)
    search = os.fsdecode(subject.environ.get(b"PATH", os.fsencode(os.defpath)))
    return shutil.which(name, path=search)


def _tell_of_trouble(words: list[str], path: str | None, report: Report) -> None:
    trouble, remedy = program_trouble(path) if path else (f"{words[0]} is not in PATH", "")
    cause = ""
    if "." in words[0] and "/" not in words[0] and len(words) > 1:
        cause = "older patches for AUTH had the host's name as first argument"
        remedy = f"take {words[0]} off: the check program, {words[1]}, comes first"
    what = f"the check program can not be started: {trouble}"
    report.error("check-program", what, remedy or "name it with its whole path", cause)


def _examine_what_it_does(path: str, report: Report) -> None:
    name = os.path.basename(path)
    real_name = os.path.basename(os.path.realpath(path))
    if "true" in (name, real_name):
        what = f"the check program is {path}, which is content with every password"
        cause = "whoever authenticates may send to everywhere: an open relay to everybody"
        remedy = "put a check program before it, such as vchkpw or checkpassword-users"
        report.error("check-program-true", what, remedy, cause)
    elif "false" in (name, real_name):
        what = f"the check program is {path}, which refuses every password"
        report.warning("check-program-false", what, "name a check program, or set SMTPAUTH=-")
    elif name in _NEEDS_SETUID:
        _examine_setuid(path, name, report)


def _examine_users(subject: Subject, report: Report) -> None:
    """The file that checkpassword-users asks."""
    path = os.fsdecode(subject.environ.get(b"SMTPUSERS") or b"control/smtpusers")
    try:
        users = users_file.load(path).users
    except users_file.Trouble as trouble:
        what, remedy = f"checkpassword-users: {trouble.what}", trouble.remedy
        report.error("users-file", what, remedy or "put a file of users there", obstacle(path))
    else:
        report.fact("users", f"{len(users)} in {path}", users=len(users))


def _examine_setuid(path: str, name: str, report: Report) -> None:
    found = os.stat(path)
    if os.geteuid() in (0, found.st_uid) or has_setuid(path):
        return
    what = f"{path} is not setuid, and is run by {user_name(os.geteuid())}: {owner(found)}"
    cause = f"it can not read {_NEEDS_SETUID[name]}, and every password is wrong, or 454"
    remedy = (
        f"chmod 4711 {path}, owned by who may read it (and no nosuid file system), or -u and -g"
    )
    report.warning("check-program-setuid", what, remedy, cause)
