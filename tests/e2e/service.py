"""A qmail home, and the service in front of it: a run file that ends in softlimit and tcpserver.

Nothing is shared between two of them: each has its own directory, a port that the kernel chose, and
a process group that is gone when it is stopped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from .log import Log, parse
from .programs import CHECKOUT, mail_user, need

ADDRESS = "127.0.0.1"
NAME = "mail.example.org"
DOMAIN = "example.org"
RUN = CHECKOUT / "run"
MEMORY = int(re.search(r"softlimit -m (\d+)", (RUN / "smtp" / "run").read_text())[1])
"""Octets for softlimit, as in the run files."""

RELAY, DENIED, MUST_AUTHENTICATE, NO_AUTH = (f"127.0.0.{number}" for number in (2, 3, 4, 5))
"""Client addresses that RULES treats in a way of its own."""

RULES = f"""\
# tcprules
{RELAY}:allow,RELAYCLIENT=""
{DENIED}:deny
{MUST_AUTHENTICATE}:allow,SMTPAUTH="!"
{NO_AUTH}:allow,SMTPAUTH="-"
127.:allow
:deny
"""

_PORT = r"^(?:@[0-9a-f]{24} )?(\d+)$"
"""The line in which tcpserver says where it listens; multilog puts a stamp before it."""

_GOODBYE = 15  # seconds for all processes of a service to end


class Home:
    """A qmail home of the mail user's, with the embedded qmail-queue in its bin."""

    def __init__(self, programs):
        self.programs = programs
        self.path = Path(tempfile.mkdtemp(prefix="qmail-home-"))
        self.path.chmod(0o755)
        self.maildir = self.path / "Maildir"
        for name in ("bin", "control", "Maildir"):
            (self.path / name).mkdir()
        if os.getuid() == 0:
            os.chown(self.maildir, mail_user().pw_uid, mail_user().pw_gid)
        self.use_queue(programs / "qmail-queue-maildir")
        self.control("me", NAME)
        self.control("rcpthosts", DOMAIN)
        self.control("timeoutsmtpd", "30")

    def use_queue(self, program):
        """Make this program the qmail-queue."""
        queue = self.path / "bin" / "qmail-queue"
        queue.unlink(missing_ok=True)
        queue.symlink_to(program)

    def control(self, name, text, mode=0o644):
        """Write a control file; the mail user's group is its group."""
        path = self.path / "control" / name
        path.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())
        path.chmod(mode)
        if os.getuid() == 0:
            os.chown(path, 0, mail_user().pw_gid)
        return path

    def certificate(self, text):
        """Write control/servercert.pem as it has to be: for root and the mail user alone."""
        return self.control("servercert.pem", text, 0o640)

    def program(self, name, script):
        """A program of the test's own in the home, in sh."""
        path = self.path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def writable(self, name):
        """A directory that the mail user may write."""
        path = self.path / name
        path.mkdir()
        if os.getuid() == 0:
            os.chown(path, mail_user().pw_uid, mail_user().pw_gid)
        return path

    def remove(self):
        """Remove all of it, and what a test closed."""
        for directory in filter(Path.is_dir, self.path.iterdir()):
            directory.chmod(0o755)
        shutil.rmtree(self.path)


class Service:
    """A running service; `port` is where it listens, `log` what it says.

    `environ` is exported by the run file; `check` is the check program, and with `true` behind it
    the arguments of qmail-smtpd, or None for none.
    """

    def __init__(self, home, environ=None, check=None, concurrency=40, memory=MEMORY, rules=RULES):
        self.home = home
        self.environ = {"QMAILHOME": str(home.path), **(environ or {})}
        self.check = check
        self.concurrency = concurrency
        self.memory = memory
        self.rules = self._compile(rules)
        self._processes = []

    def _compile(self, rules):
        """Have tcprules make the cdb of the rules."""
        (tcprules,) = need("tcprules")
        cdb = self.home.path / "tcp.smtp.cdb"
        command = [tcprules, cdb, f"{cdb}.tmp"]
        subprocess.run(command, input=rules.encode(), check=True, timeout=30)
        return cdb

    def run_file(self):
        """The text of the run file."""
        tcpserver, softlimit, true = need("tcpserver", "softlimit", "true")
        command = [softlimit, "-m", self.memory]
        command += [tcpserver, "-v", "-1", "-R", "-H", "-l", NAME, "-c", self.concurrency]
        command += ["-b", 100, "-x", self.rules, *_user_options(), ADDRESS, 0]
        command += [self.home.programs / "qmail-smtpd"]
        command += [self.check, true] if self.check else []
        exports = [f"export {name}={shlex.quote(text)}" for name, text in self.environ.items()]
        line = shlex.join(map(str, command))
        return "\n".join(["#!/bin/sh", *exports, f"exec {line} 2>&1", ""])

    def start(self):
        """Start what the run file says, and wait until it listens."""
        _write_run(self.home.path, self.run_file())
        self._read_log(self._spawn([self.home.path / "run"], stderr=subprocess.STDOUT))
        return self

    def _spawn(self, command, stdin=subprocess.DEVNULL, stderr=None):
        # The environment of a service is what its run file says: what the tests inherited is not
        # there to be found by a program that should not look for it.
        process = subprocess.Popen(
            [str(word) for word in command],
            env={"PATH": os.environ.get("PATH", os.defpath)},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def _read_log(self, process, port=_PORT):
        self.log = Log(process.stdout)
        self.port = int(self.log.wait_for(port)[0][1])

    def stop(self):
        """End all of its processes; the end of its log says that they have ended."""
        self._tell_to_end()
        ended = self.log.wait_for_end(_GOODBYE)
        if not ended:
            self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait(_GOODBYE)
        self.log.wait_for_end(_GOODBYE)
        for process in self._processes:
            process.stdout.close()
        assert ended, f"processes of the service did not end on SIGTERM:\n{self.log.text()}"
        self._check_no_traceback()

    def _tell_to_end(self):
        self._signal(signal.SIGTERM)

    def _signal(self, number):
        for process in self._processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                pass  # That is the aim.

    def _check_no_traceback(self):
        """See that none of our programs left a traceback.

        Where the interpreter has not even the memory to start it shows one of its own.
        """
        text = self.log.text()
        assert "Traceback" not in text or "Fatal Python error" in text, text

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self._signal(signal.SIGKILL)
            raise

    def __exit__(self, *_):
        self.stop()

    def events(self, name=None, sessions=1, end=r"tcpserver: end \d+ status"):
        """What our program logged, once this many connections are over."""
        self.log.wait_for(end, sessions)
        events = [event for event in map(parse, self.log.lines()) if event]
        return [event for event in events if name in (None, event.name)]

    def event(self, name, sessions=1):
        """The one event of this name."""
        events = self.events(name, sessions)
        assert len(events) == 1, self.log.text()
        return events[0]


class ShippedService(Service):
    """One of the service directories in run/, under supervise and multilog.

    Its files are as they are shipped but for what only a real host has: see _on_this_host.
    multilog shows on descriptor 2 each line that it writes to its directory, `logged`.
    """

    def __init__(self, home, name):
        rules = RUN / ("tcp.smtp" if name == "smtp" else "tcp.submission")
        super().__init__(home, rules=rules.read_text())
        self._shipped = RUN / name
        self.directory = home.path / name
        self.logged = home.path / "logged"

    def start(self):
        """Start both as svscan does, with a pipe from the service to its log."""
        (supervise, *_) = need("supervise", "multilog", "setuidgid", "softlimit", "tcpserver")
        self.home.writable("logged")
        for part in (".", "log"):
            (self.directory / part).mkdir()
            text = (self._shipped / part / "run").read_text()
            _write_run(self.directory / part, self._on_this_host(text))
        service = self._spawn([supervise, self.directory])
        log = self._spawn([supervise, self.directory / "log"], stdin=service.stdout)
        self._read_log(log)
        return self

    def _on_this_host(self, text):
        """A run file with our directories and users, on a free port of loopback, without DNS."""
        text = text.replace("\\\n", "")
        for pattern, new in (
            (r"^#!/bin/sh\n", f"#!/bin/sh\nexport QMAILHOME={self.home.path}\n"),
            (r"/var/qmail/", f"{self.home.path}/"),
            (r"/etc/tcp\.\w+\.cdb", str(self.rules)),
            (r"/usr/local/qmail-smtpd-py/bin", str(self.home.programs)),
            (r"tcpserver -v (.*) 0 \d+ ", rf"tcpserver -1 -H -v \1 {ADDRESS} 0 "),
            (r"multilog t (.*) /var/log/\S+", rf"multilog t e \1 {self.logged} 2>&1"),
            (r"\bqmail[dl]\b", mail_user().pw_name),
        ):
            text = re.sub(pattern, new, text)
        return text if os.getuid() == 0 else re.sub(r"setuidgid \w+|-u \S+ -g \S+", "", text)

    def restart(self):
        """Have supervise end tcpserver and start it again, with a port of its own."""
        self.svc("-t")
        self.port = int(self.log.wait_for(_PORT, count=2)[1][1])

    def svc(self, option, *parts):
        """Tell supervise something."""
        (svc,) = need("svc")
        subprocess.run([svc, option, self.directory.joinpath(*parts)], check=True, timeout=30)

    def _tell_to_end(self):
        self.svc("-dx")
        self.svc("-dx", "log")


def _write_run(directory, text):
    run = directory / "run"
    run.write_text(text)
    run.chmod(0o755)


def _user_options():
    """How tcpserver is told whose rights to take, if it can."""
    user = mail_user()
    return ["-u", user.pw_uid, "-g", user.pw_gid] if os.getuid() == 0 else []
