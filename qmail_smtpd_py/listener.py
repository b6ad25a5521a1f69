"""qmail-smtpd-listen: takes the place of tcpserver and of the program that it would start.

The options are tcpserver's, with tcpserver's meaning, so that a run file changes in one place; some
long ones are our own.  Order of events: bind, detach (--daemon), give up privileges, load all that
workers share, fork.  Not an octet of a client's is read by a process that may do more than -u and
-g say.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from errno import EACCES

# What nobody names below is what sessions import late: here before the first, as the files may be
# gone by then, if a newer version was installed meanwhile.
from . import (
    activation,  # noqa: F401
    afterfork,
    authfailures,  # noqa: F401
    background,
    checkpassword,  # noqa: F401
    heap,
    localip,  # noqa: F401
    log,
    sockets,
    tls,
    transcript,  # noqa: F401
    ucspitls,  # noqa: F401
    watched,  # noqa: F401
)
from .control import CachedControlFiles
from .effects import ControlError
from .encryption import why_not_loaded
from .options import NAME, USAGE, Options, StartError, UsageError
from .prefork import Place, Pool
from .process import environment, fill_descriptors, give_no_tickets
from .rehearsal import rehearse
from .smtpd import Resources, Server, home_of
from .worker import Helper, Service, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGALRM,
    signal.SIGUSR2, signal.SIGCHLD,
)  # fmt: skip

_KILL_SECONDS = 3.0  # after which a worker that was to end is stopped, or stuck

_TRIAL_SECONDS = 10  # for a program to show its usage

_LOOK_SECONDS = 1.0  # between two looks of the parent for what forks are to share


class Listener:
    """The parent: its socket, its signals and its pool."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._directory = _current_directory()  # which names may be relative to
        self._heritage = sockets.inherit()
        self._environ = environment()  # now, as -u may not be able to see all of it
        self._socket = self._heritage.socket or sockets.bind(options)
        if not options.helper:
            sockets.set_no_delay(self._socket, options.no_delay)
        self._socket.setblocking(False)
        self._stop_at: float | None = None
        self._look_at = 0.0
        self._renew_at = 0.0
        self._filling = heap.Filling()
        self._old_code: list[object] = []
        self._signals: list[int] = []

    @property
    def is_successor(self) -> bool:
        """Whether another listener was restarted as this one."""
        return self._heritage.is_successor

    @property
    def descriptor(self) -> int:
        """The descriptor of the socket that we listen on."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """The port that we listen on."""
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def _home(self) -> str:
        """The qmail home of those clients for whom rules set no other."""
        return os.fsdecode(home_of(self._environ))

    def run(self) -> None:
        """Serve until a signal says stop, and then until the last session is over."""
        options = self._options
        if options.helper:
            self._socket.listen(options.backlog)  # SO_PEERCRED tells who did this: -u, not root
        gc.disable()  # parent and workers: what it writes to would be copied; see _prepare
        service = self._load()
        hear, wake = self._catch_signals()
        pool = Pool(
            options.limit,
            options.idle,
            2 * options.idle,
            lambda place: self._worker(service, place).run,
            lambda: self._prepare(service),
            self._tell,
            self._tell_end,
            parents_own=(hear, wake),
        )
        pool.adopt(self._heritage.workers)
        if service.is_verbose:
            _complain(f"status: 0/{options.limit}")
        while True:
            self._heed_signals(pool)
            pool.maintain()
            if pool.board.stopping and not pool.workers:
                return
            pool.wait(self._time_left(pool), hear)

    def _load(self) -> Service:
        """Load what all workers share, as the user that they will be."""
        options, environ = self._options, self._environ
        if environ.get(b"TLSTICKETS") == b"0":
            give_no_tickets(environ)
        arguments = [os.fsencode(word) for word in options.arguments]
        start = os.fsencode(self._directory)
        resources = Resources(CachedControlFiles(), tls.CachedContexts(), start)
        service = Service(environ, arguments, resources, options.look_ups)
        service.rules = options.rules
        service.proxies = options.proxies
        service.banner = os.fsencode(options.banner)
        service.keep_ip_options = options.keep_ip_options
        service.limit = options.limit
        service.is_verbose = options.verbosity > 1
        service.complain = self._tell
        try:
            resources.go_home(environ)
        except ControlError as error:
            raise StartError(str(error)) from None
        return service

    def _prepare(self, service: Service) -> None:
        """Have ready what the next fork is to share: files, and TLS contexts.

        Not before each, where forks follow each other: what is looked at costs the parent copies of
        pages.  With the contexts go the keys of session tickets, which are not to be good for ever.
        """
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        if now <= self._renew_at:
            _preload(service)
            return
        service.resources.contexts = tls.CachedContexts()
        service.resources.leave_home()
        gc.unfreeze()  # what is of no use any more, circles among it, would be there for good
        gc.collect()
        _preload(service)
        if self._old_code:
            _rehearse(service)
        else:
            self._arrange(service)
        self._renew_at = time.monotonic() + self._options.max_age

    def _arrange(self, service: Service) -> None:
        """Arrange memory for what sessions do with it; once, as it stays like that."""
        with heap.watching() as ran:
            can_rehearse = _rehearse(service)
        gc.collect()
        try:
            self._filling.fill()
            if can_rehearse:
                self._old_code = heap.move(ran)
                _rehearse(service)  # the copies, too, are to be specialised
                self._filling.fill_mallocs()  # there it has left holes
        except MemoryError:
            self._filling.empty()

    def _tell(self, line: str) -> None:
        """Log a line, unless -q says that nothing is to be told."""
        if self._options.verbosity:
            _complain(line)

    def _tell_end(self, pid: int, status: int) -> None:
        """Log the end of a connection as its worker would have, with -v."""
        if self._options.verbosity > 1:
            _complain(f"end {pid} status {status}")

    def _worker(self, service: Service, place: Place) -> Worker:
        """A worker, before it is forked."""
        options = self._options
        kind = Helper if options.helper else Worker
        return kind(service, self._socket, place, options.max_use, options.max_age)

    # Signals

    def _catch_signals(self) -> tuple[int, int]:
        """Note signals as they come; the two ends of the pipe that becomes readable with them."""
        hear, wake = os.pipe()
        os.set_blocking(hear, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        note = self._note  # one object for all: workers that let go of some need not take it apart
        for number in _SIGNALS:
            signal.signal(number, note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # main, or a predecessor, blocked them
        return hear, wake

    def _note(self, number: int, frame: object) -> None:
        """Note a signal."""
        self._signals.append(number)

    def _heed_signals(self, pool: Pool) -> None:
        """Do what the signals ask: the table of signals in qmail-smtpd-listen(8)."""
        signals, self._signals = self._signals, []
        for number in signals:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(pool, self._options.drain if self._stop_at is None else 0)
            elif number == signal.SIGQUIT:
                self._stop(pool, 0)
            elif number == signal.SIGHUP:
                self._look_at = self._renew_at = 0.0
                pool.replace_all()
            elif number == signal.SIGALRM:
                _complain(f"status: {pool.board.busy}/{self._options.limit}")
        late = 0.0 if self._stop_at is None else time.monotonic() - self._stop_at
        if late > 0:
            pool.signal_all(signal.SIGTERM if late < _KILL_SECONDS else signal.SIGKILL)
        if signal.SIGUSR2 in signals and self._stop_at is None:
            self._restart(pool)  # last, as it does not come back

    def _stop(self, pool: Pool, seconds: float) -> None:
        """Accept no more, and let the sessions that are there end within so many seconds."""
        self._stop_at = time.monotonic() + seconds
        if pool.board.stopping:
            return
        pool.stop()
        if self._heritage.owns_socket:
            self._socket.shutdown(socket.SHUT_RDWR)
        left = pool.board.busy
        self._tell(f"stopping: {left} connection{'' if left == 1 else 's'} left")

    def _time_left(self, pool: Pool) -> float | None:
        """Seconds until sessions are cut; None where none are to be."""
        if self._stop_at is None:
            return None
        return max(0.2, self._stop_at - time.monotonic())

    def _restart(self, pool: Pool) -> None:
        """Become a new listener, with new code, on the same socket and under the same process id.

        The workers that are there end after the connection that they serve.
        """
        self._tell("restarting")
        try:
            here = os.open(".", os.O_PATH)  # it may have no name any more
        except OSError as error:
            why = f"{self._home}: {error.strerror} (uid {os.geteuid()})"
            self._tell(f"warning: cannot restart: {why}")
            return
        try:
            with open("/proc/self/cmdline", "rb") as file:  # with the interpreter's own options
                words = file.read().split(b"\0")[:-1]
            self._go_to_start()
            self._try_to_start(words[: len(words) - len(sys.argv) + 1])
            # Until the new one has handlers, what comes would end it: it is to wait instead.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            while self._signals:
                os.kill(os.getpid(), self._signals.pop())  # and so is what came a moment ago
            heritage = self._heritage.leave(self._socket, pool.workers)
            pool.replace_all()
            os.execve(sys.executable, words, {**self._environ, **heritage})
        except OSError as error:
            os.fchdir(here)
            os.close(here)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._socket.set_inheritable(False)
            what = f"{error.filename or sys.executable}: {error.strerror} (uid {os.geteuid()})"
            self._tell(f"warning: cannot restart: {what}")

    def _go_to_start(self) -> None:
        """Go to the directory of the start; raises OSError where a name depends on it.

        It may be one that -u may not enter, such as root's home, or that is there no more.
        """
        try:
            os.chdir(self._directory)
        except OSError:
            names = sys.argv[0], self._home
            if self._options.has_relative_names or not all(map(os.path.isabs, names)):
                raise

    def _try_to_start(self, command: Sequence[bytes]) -> None:
        """See that the program that is there now can be started, and the qmail home be entered;
        raises OSError.

        The interpreter would end us where it does not find it, or not all that it imports.
        """
        try:
            import subprocess
        except ImportError as error:  # the interpreter that we are may be gone
            raise OSError(0, str(error), sys.executable) from None
        os.stat(self._home)
        if not os.access(self._home, os.X_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), self._home)
        open(sys.argv[0]).close()
        try:
            done = subprocess.run(
                [*command, b"--help"],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TRIAL_SECONDS,
                check=True,
            )
        except subprocess.SubprocessError as error:
            raise OSError(0, f"it does not start: {_ending(error)}", sys.argv[0]) from None
        if not done.stdout.startswith(f"usage: {NAME} ".encode()):
            raise OSError(0, "it is another program", sys.argv[0])


def _ending(error: subprocess.SubprocessError) -> str:
    """How a program ended that was tried: the last line that it said, if any."""
    said = (getattr(error, "stderr", None) or b"").splitlines()
    if said:
        return os.fsdecode(said[-1])
    status = getattr(error, "returncode", None)
    return f"no usage in {_TRIAL_SECONDS} s" if status is None else f"exit status {status}"


def _current_directory() -> str:
    """Where we are; empty where that is there no more, or may not be known."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _fill_streams() -> None:
    """Have the streams of the descriptors 0, 1 and 2, which have to be there: the interpreter has
    None for one that was closed when it started, and python-daemon takes that for a stream.
    """
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _preload(service: Service) -> None:
    """Have control files and TLS contexts as they are now in memory, for the next fork to share."""
    service.resources.files.refresh()
    try:
        service.resources.go_home(service.environ)
        server = Server(service.environ, service.arguments, service.resources)
        try:
            server.preload()
        finally:
            server.close()
    except ControlError as error:
        service.complain(f"warning: cannot load ahead: {error}")
    except Exception as error:  # each connection may have it, the parent must not
        service.complain(f"warning: cannot load ahead: {_cause(error)}")


def _rehearse(service: Service) -> bool:
    """Have the first sessions behind us, for the next fork to share what they set up; whether that
    could be.
    """
    try:
        rehearse(service)
    except Exception as error:  # as above
        service.complain(f"warning: cannot rehearse: {_cause(error)}")
        return False
    return True


def _cause(error: Exception) -> str:
    """What may be told of an exception: what it is a sign of, or else where the defect is."""
    if isinstance(error, (ImportError, MemoryError, SystemError)):
        return why_not_loaded(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return log.where(error)


def _drop_privileges(options: Options) -> None:
    """Become -g and -u, with no way back; raises StartError."""
    who = f"gid {options.gid}"
    try:
        if options.gid is not None:
            os.setgroups([options.gid])
            os.setgid(options.gid)
        if options.uid is not None:
            who = f"uid {options.uid}"
            os.setuid(options.uid)
    except OSError as error:
        raise StartError(f"cannot become {who}: {error.strerror}") from None


def _print_port(port: int) -> None:
    """Tell the port on descriptor 1, if anybody is there to be told."""
    try:
        os.write(1, b"%d\n" % port)
    except OSError:
        pass


_LOG = log.Log()


def _complain(line: str) -> None:
    _LOG.write_line(f"{NAME}: {line}")


def main() -> int:
    """The program; the exit status is 111 where it could not start, as tcpserver's."""
    afterfork.leave_out()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until they can be heeded
    fill_descriptors()
    _fill_streams()
    try:
        options = Options(sys.argv[1:])
        if options.wants_help:
            print(USAGE, end="")
            return 0
        listener = Listener(options)
        if not listener.is_successor:  # of one that has done all this
            if options.print_port:
                _print_port(listener.port)
            if options.daemon:
                background.detach(options, listener.descriptor)
            _drop_privileges(options)
        listener.run()
        if options.daemon:
            background.remove_pid_file(options.pid_file)
    except StartError as error:
        _complain(f"fatal: {error}")
        if isinstance(error, UsageError):
            sys.stderr.write(USAGE)
        elif options.daemon:
            background.remove_pid_file(options.pid_file)
        return error.status
    return 0
