"""qmail-smtpd-check: what qmail-smtpd would do as it is set up, and what is wrong with that.

The run file is read, and not run; everything else is looked at by a child that has become the user
of the service, so that what it may not read is what the service may not read.  The settings come
from the code that serves, and a session is made with the installed program.  Facts come first and
problems last, each with its remedy.
"""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from typing import NoReturn

from . import (
    check_auth,
    check_limits,
    check_queue,
    check_relay,
    check_service,
    check_session,
    check_start,
)
from .chain import LISTENER, Chain, read_envdir
from .findings import Report
from .log import where
from .process import environment
from .rights import group_name, owner, user_name
from .runfile import RunFile
from .shellwords import is_for_shell
from .subject import SERVICE_VARIABLES, Subject
from .unknown import is_known

MISUSED = 100

_SWITCHES = ("DISABLETLS", "DROP_PRE_GREET", "FORCEAUTHMAILFROM", "HIDE_HOST", "REQUIRETLS")
_MOST_NAMES = 6
_AS_IF_UNSET = {
    ("SMTPAUTH", "0"),
    ("QMAILQUEUE", ""),
    *((name, value) for name in _SWITCHES for value in ("", "0")),
}
"""Variables with values that mean the same as if they were unset."""


class Misuse(Exception):
    """The arguments are wrong; the text says how."""


class Service:
    """What the command line, the run file or the environment say of the service."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.environ = environment()
        self.run: RunFile | None = None
        self.chain = Chain(os.getcwd(), report.note)
        self._report = report
        self.title, self.was_named = "this environment", False
        if arguments.env_from:
            self._read(arguments.env_from)
        if arguments.words:
            self.chain.arguments = arguments.words
        self.uid, self.gid = self._user(arguments.user)

    def _read(self, path: str) -> None:
        """Take the environment from a run file or an envdir; raises Misuse."""
        self.title, self.was_named = path, True
        variables = {"PATH": os.environ.get("PATH", os.defpath)}
        try:
            if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "run")):
                if not any(entry.is_file() for entry in os.scandir(path)):
                    raise Misuse(f"{path} has no run file in it, and is no envdir either")
                read_envdir(path, variables)
            else:
                path = os.path.join(path, "run") if os.path.isdir(path) else path
                with open(path, encoding="utf-8", errors="surrogateescape") as file:
                    script = file.read()
                if is_for_shell(script):
                    self.run = RunFile(script, os.path.dirname(os.path.abspath(path)))
                    self.chain, variables = self.run.chain, self.run.environ
                    self._tell_of_run_file(self.run)
                    if os.path.basename(path) == "run":
                        check_service.examine(path, self.run, self._report)
                else:
                    self._report.note(f"{path} is no script for sh: nothing of it was read")
        except OSError as error:
            raise Misuse(f"cannot read {path}: {error.strerror}") from None
        self.environ = {os.fsencode(k): os.fsencode(v) for k, v in variables.items()}

    def _tell_of_run_file(self, run: RunFile) -> None:
        report = self._report
        for note in run.notes:
            report.note(note)
        for name in run.missing_users:
            what = f"the run file asks for the user {name}, and there is no such user"
            report.error("no-such-user", what, "make the user, or correct the name")
        for what, remedy in run.chain.troubles:
            report.error("run-file", what, remedy)
        self._tell_of_unexported(run)
        self._tell_of_unknown(run)
        if not run.chain.program:
            what = "no qmail-smtpd was found in the run file: its environment may be incomplete"
            report.warning("no-program", what, "see what was not understood; check by hand")
        elif not run.has_joined_log and not run.chain.logs_by_itself and self._has_own_log(run):
            what = "2>&1 is missing: what qmail-smtpd logs does not get into the service's log"
            report.warning("no-log", what, "put 2>&1 at the end of the last command")

    def _has_own_log(self, run: RunFile) -> bool:
        """Whether what comes from descriptor 1 alone is kept: for others that start run files, such
        as systemd, that is no matter.
        """
        return run.is_piped or os.path.isdir(os.path.join(os.path.dirname(self.title), "log"))

    def _tell_of_unknown(self, run: RunFile) -> None:
        """Tell what is not known, and would not be missed."""
        names = [name for name in SERVICE_VARIABLES if run.may_set(name)]
        if len(names) > _MOST_NAMES:
            names = ["variables that the run file does not export itself"]
        names += ["its rules"] if run.chain.lacks_rules else []
        names += ["its memory limit"] if run.chain.lacks_memory_limit else []
        if names:
            what = f"not known of qmail-smtpd without running the run file: {', '.join(names)}"
            remedy = "see what was not understood; say it in a plainer way, or look yourself"
            self._report.warning("not-known", what, remedy)

    def _tell_of_unexported(self, run: RunFile) -> None:
        """Tell of variables that the run file sets and qmail-smtpd does not get."""
        for name in run.dropped:
            if name in SERVICE_VARIABLES:
                what = f"{name} is exported, and qmail-smtpd does not get it: `env -` takes it away"
                self._report.error("not-exported", what, f"env - {name}=..., or leave env - out")
        for place, name, value, is_used in run.unexported:
            is_ours = name in SERVICE_VARIABLES
            is_used = is_used or not place.startswith("line ")  # by others that read that file
            if (is_used and not is_ours) or (name, value) in _AS_IF_UNSET:
                continue
            tell = self._report.error if is_ours else self._report.warning
            shown = f"{name}={value!r}" if is_ours else name  # of others it may be a secret
            what = f"{place} sets {shown} without export: qmail-smtpd does not get it"
            remedy = f"export {name}"
            if name == "RELAYCLIENT":  # exported, it would let everybody relay
                remedy = "take it out, and set it in the rules, for your own addresses only"
            if name == "SMTPS" and value in ("", "0"):  # exported, it is on whatever it is
                remedy = "take it out"
            tell("not-exported", what, remedy)

    def _user(self, name: str | None) -> tuple[int, int]:
        """Whose rights the service has; raises Misuse."""
        if name:
            try:
                found = pwd.getpwnam(name)
            except KeyError:
                raise Misuse(f"there is no user {name}") from None
            return found.pw_uid, found.pw_gid
        uid, gid = self.chain.uid, self.chain.gid
        return os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid

    def examine_user(self, was_given: bool) -> None:
        """Tell who the service is, and whether that can be tried."""
        report, uid = self._report, self.uid
        is_told = self._tell_of_ids(was_given)
        who = f"{user_name(uid)}:{group_name(self.gid)} (uid {uid}, gid {self.gid})"
        report.fact("service", f"{self.title}, as {who}", uid=uid, gid=self.gid)
        if os.geteuid() not in (0, uid):
            what = (
                f"the service is {user_name(uid)}'s, and this was looked at by uid {os.geteuid()}"
            )
            remedy = "run qmail-smtpd-check as root, or as that user"
            report.warning("not-that-user", what, remedy, "what it can read may be something else")
        elif is_told:
            return
        elif uid == 0 and not was_given and self.run:
            is_said = self.chain.uid is not None
            if not is_said and (self.run.notes or self.chain.has_gap):
                report.warning(
                    "no-user", "whose rights the service has is not known", "--user NAME"
                )
            else:
                why = "the run file says" if is_said else "nobody says otherwise"
                what = f"the service runs as root, as {why}"
                report.warning("root", what, "-u and -g of tcpserver: qmaild and nofiles")
        elif uid == 0 and not was_given:
            what = "looked at as root, who may read everything: the service's user may not"
            remedy = "--user NAME" if self.was_named else "--user NAME, or --env-from RUNFILE"
            report.warning("no-user", what, remedy)
        is_said = bool({"-g", "-U"} & self.chain.server_flags) or self.chain.has_gap
        if uid != 0 and self.gid == 0 and self.chain.server and not (is_said and self.chain.gid):
            what = "-u without -g: the service has the rights of group root"
            report.warning("root-group", what, "add -g with a group of its own")

    def _tell_of_ids(self, was_given: bool) -> bool:
        """Tell of -u and -g that are no numbers, or may be nothing at all; whether there are any.

        To tcpserver and sslserver that is 0, and they stay who they are.  What the run file does
        not set may come from whoever starts it: that is for --user to say.
        """
        report, server, is_told = self._report, self.chain.server, False
        for flag, word in self.chain.odd_ids:
            whose = "as root" if flag == "-u" else "with the rights of group root"
            follows = f"{server} runs the service {whose}"
            if server == LISTENER:
                follows = f"{server} does not start"
            names = self.run.never_set(word) if self.run else []
            if is_known(word):
                what = f"{flag} {word!r} is not a number: {follows}"
                remedy = f'{flag} "$(id {flag} qmaild)"'
            elif names and not was_given:
                what = f"nothing in the run file sets {names[0]}; where it is empty, {follows}"
                remedy = f"{names[0]}=$(id {flag} qmaild) || exit 1"
                if names[0] in ("UID", "GID"):
                    remedy = f"envuidgid qmaild in front of {server}"
                remedy += "; or say --user NAME, if it comes from whoever starts the run file"
            else:
                continue
            report.error("no-user", what, remedy)
            is_told = True
        return is_told

    def examine_start(self, smtpd: str, report: Report) -> None:
        """Look at what the program needs to start, with the rights of whoever starts it: -u comes
        later, so that it is this process, unless setuidgid or the like stands before it.
        """
        made = self.run.made_directories if self.run else ()
        check_start.examine(self.chain, smtpd, made, report)


def main() -> int:
    """The program; the exit status is 0, 1 where there are warnings, 2 for errors."""
    arguments = _parser().parse_args()
    report = Report()
    smtpd = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "qmail-smtpd")
    try:
        service = Service(arguments, report)
        if not os.access(smtpd, os.X_OK):
            raise Misuse(f"there is no {smtpd}: this program has to stand beside it")
    except Misuse as misuse:
        print(f"qmail-smtpd-check: {misuse}", file=sys.stderr)
        return MISUSED
    service.examine_user(bool(arguments.user))
    if service.chain.program_uid is None and os.geteuid() in (0, service.uid):
        service.examine_start(smtpd, report)
    try:
        report.add(_in_child(service, smtpd))
    except ValueError:
        report.error("check", "the check itself ended early", "run it again, with more memory")
    if os.geteuid() in (0, service.uid):
        subject = Subject(service.environ, [], service.chain, smtpd)
        check_queue.examine_directories(check_queue.program_of(subject), report)
    text = report.as_json() + "\n" if arguments.json else report.as_text()
    try:
        print(text, end="", flush=True)
    except OSError as error:
        print(f"qmail-smtpd-check: cannot write: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in the buffer
        return 111
    return report.exit_status


class _Parser(argparse.ArgumentParser):
    """One that does not exit 2 for wrong arguments: that would be errors that were found."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(MISUSED, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qmail-smtpd-check",
        description="Say what qmail-smtpd would do as it is set up, and what is wrong with that.",
        epilog="Exit status: 0 if there is nothing to do, 1 for warnings, 2 for errors, 100 for "
        "wrong arguments or a run file that can not be read.",
    )
    parser.add_argument("--user", metavar="NAME", help="the user that the service runs as")
    parser.add_argument(
        "--env-from",
        metavar="FILE",
        help="take environment, user and limits from a run file, its directory, or an envdir",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="checkprogram subprogram",
        help="as qmail-smtpd's",
    )
    return parser


def _in_child(service: Service, smtpd: str) -> str:
    """What a child finds that has become the service's user: a report, in JSON."""
    reader, writer = os.pipe()
    print(end="", flush=True)
    pid = os.fork()
    if not pid:
        try:
            os.setsid()  # whoever can look into it may not type at our terminal (TIOCSTI)
            os.close(reader)
            with open(writer, "w", encoding="utf-8") as pipe:
                pipe.write(_examine(service, smtpd).as_json())
        finally:
            os._exit(0)  # whatever happens, the parent's work is not the child's
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def _examine(service: Service, smtpd: str) -> Report:
    """Everything that is looked at with the rights of the service's user."""
    report = Report()
    try:
        if os.geteuid() == 0:
            os.setgroups([service.gid])
            os.setgid(service.gid)
            os.setuid(service.uid)
        if service.chain.program_uid is not None:
            service.examine_start(smtpd, report)
        words = [os.fsencode(word) for word in service.chain.arguments]
        subject = Subject(service.environ, words, service.chain, smtpd)
        if service.run:
            subject.unexported = {name for _, name, *_ in service.run.unexported}
            subject.may_have = service.run.may_set
            subject.is_found = bool(service.chain.program or words)
        subject.apply_rules(report)
        report.fact("home", os.fsdecode(subject.home))
        _tell_of_port(subject, report)
        if subject.load(report):
            _examine_parts(subject, report)
    except Exception as error:  # a defect: what was found so far is told all the same
        report.error("check", f"the check itself failed: {where(error)}", "tell its authors")
    return report


def _tell_of_port(subject: Subject, report: Report) -> None:
    """Where it listens, and whether that fits to SMTPS."""
    chain, port = subject.chain, subject.port
    is_smtps = b"SMTPS" in subject.environ
    if port is not None:
        by = f" ({chain.server})" if chain.server else ""
        host = f"{chain.host} " if chain.host not in ("", "0") else ""
        report.fact("port", f"{host}{port}{by}", port=port)
    elif chain.helper:
        report.fact("helper", f"does TLS for other services, at {chain.helper}")
    if chain.has_gap or subject.may_have("SMTPS"):
        return
    if port == 465 and not is_smtps and chain.server != "sslserver":
        what = "port 465 without SMTPS: clients begin with TLS there, and wait for it for ever"
        report.warning("no-smtps", what, "export SMTPS=1 in the run file")
    elif port in (25, 587) and is_smtps:
        what = f"SMTPS on port {port}: clients expect a greeting in clear there, and STARTTLS"
        report.warning("smtps-port", what, "unset SMTPS; it is for port 465")


def _examine_parts(subject: Subject, report: Report) -> None:
    server = subject.server
    report.fact("greeting", os.fsdecode(server.settings.greeting))
    literal = subject.files.line("localiphost")
    if literal is not None:
        report.fact("localiphost", os.fsdecode(literal))
    check_auth.examine(subject, report)
    trial = check_session.examine(subject, report)
    check_relay.examine(subject, report)
    check_queue.examine(subject, report)
    check_limits.examine(subject, trial, report)
    names = sorted(subject.files.found)
    told = [_with_rights(subject, name) for name in names]
    report.fact("control files", ", ".join(told) or "none", files=names)
    server.close()


def _with_rights(subject: Subject, name: str) -> str:
    """The name of a control file, and whose it is where not everybody can read it."""
    found = os.stat(subject.path(f"control/{name}"))
    return name if found.st_mode & 0o004 else f"{name} ({owner(found)})"


if __name__ == "__main__":
    sys.exit(main())
