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

from . import hugepages  # noqa: F401  isort: skip
from . import preload  # noqa: F401  isort: skip

# What nobody names below is what sessions import late: here before the first, as the files may be
# gone by then, if a newer version was installed meanwhile.
from . import (
    activation,  # noqa: F401
    afterfork,
    background,
    log,
    sockets,
    tls,
    ucspitls,  # noqa: F401
    workerwire,
)
from .board import Place
from .controlcache import CachedControlFiles
from .effects import ControlError
from .oomscore import OomScore
from .options import NAME, USAGE, Options, StartError, UsageError
from .prefork import Employer, Pool
from .process import environment, fill_descriptors, give_no_tickets
from .service import Service
from .smtpd import Resources
from .successor import Successor
from .warmup import WarmUp
from .worker import Helper, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGALRM,
    signal.SIGUSR2, signal.SIGCHLD,
)  # fmt: skip

_KILL_SECONDS = 3.0  # after which a worker that was to end is stopped, or stuck


class Listener:
    """The parent: its socket, its signals and its pool."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._heritage = sockets.inherit()
        self._environ = environment()  # now, as -u may not be able to see all of it
        self._successor = Successor(options, self._environ)
        self._socket = self._heritage.socket or sockets.bind(options)
        if not options.helper:
            sockets.set_no_delay(self._socket, options.no_delay)
            if self._heritage.owns_socket:  # another program may have systemd's after us
                workerwire.limit_reads(self._socket)
        self._socket.setblocking(False)
        self._log = log.Log()
        self._stop_at: float | None = None
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

    def run(self, score: OomScore) -> None:
        """Serve until a signal says stop, and then until the last session is over."""
        options = self._options
        if options.helper:
            self._socket.listen(options.backlog)  # SO_PEERCRED tells who did this: -u, not root
        gc.disable()  # parent and workers: what it writes to would be copied; see warmup
        service = self._load()
        warm_up = WarmUp(service, options.max_age)
        hear, wake = self._catch_signals()
        staff = Staff(options, self._socket, service, warm_up, (hear, wake))
        pool = Pool(options.limit, options.idle, staff, score, hear)
        pool.adopt(self._heritage.workers)
        if service.is_verbose:
            self._tell(f"status: 0/{options.limit}")
        while True:
            self._heed_signals(pool, warm_up)
            pool.maintain()
            if pool.board.stopping and not pool.workers:
                return
            pool.wait(self._time_left())

    def _load(self) -> Service:
        """Load what all workers share, as the user that they will be."""
        options, environ = self._options, self._environ
        if environ.get(b"TLSTICKETS") == b"0":
            give_no_tickets(environ)
        arguments = [os.fsencode(word) for word in options.arguments]
        start = os.fsencode(self._successor.directory)
        resources = Resources(CachedControlFiles(), tls.CachedContexts(), start, self._log)
        service = Service(
            environ,
            arguments,
            resources,
            options.look_ups,
            rules=options.rules,
            proxies=options.proxies,
            banner=os.fsencode(options.banner),
            keep_ip_options=options.keep_ip_options,
            limit=options.limit,
            is_verbose=options.verbosity > 1,
            complain=self._tell,
        )
        try:
            resources.go_home(environ)
        except ControlError as error:
            raise StartError(str(error)) from None
        return service

    def _tell(self, line: str) -> None:
        """Log a line, unless -q says that nothing is to be told."""
        if self._options.verbosity:
            self._complain(line)

    def _complain(self, line: str) -> None:
        self._log.write_line(f"{NAME}: {line}")

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

    def _heed_signals(self, pool: Pool, warm_up: WarmUp) -> None:
        """Do what the signals ask: the table of signals in qmail-smtpd-listen(8)."""
        signals, self._signals = self._signals, []
        for number in signals:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(pool, self._options.drain if self._stop_at is None else 0)
            elif number == signal.SIGQUIT:
                self._stop(pool, 0)
            elif number == signal.SIGHUP:
                warm_up.renew()
                pool.replace_all()
            elif number == signal.SIGALRM:
                self._complain(f"status: {pool.board.busy}/{self._options.limit}")
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

    def _time_left(self) -> float | None:
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
            why = f"{self._successor.home}: {error.strerror} (uid {os.geteuid()})"
            self._tell(f"warning: cannot restart: {why}")
            return
        try:
            words = self._successor.command()
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


class Staff(Employer):
    """The workers of a listener: what they do, and what is told of them."""

    def __init__(
        self,
        options: Options,
        listener: socket.socket,
        service: Service,
        warm_up: WarmUp,
        own_descriptors: tuple[int, ...],
    ) -> None:
        self.own_descriptors = own_descriptors
        self._options = options
        self._listener = listener
        self._service = service
        self._warm_up = warm_up

    def employ(self, place: Place) -> Callable[[], None]:
        options = self._options
        kind = Helper if options.helper else Worker
        return kind(self._service, self._listener, place, options.max_use, options.max_age).run

    def prepare(self) -> None:
        self._warm_up.prepare()

    def tell(self, line: str) -> None:
        self._service.complain(line)

    def tell_end(self, pid: int, status: int, busy: int) -> None:
        """Log the end of a connection as its worker would have, with -v."""
        if self._service.is_verbose:
            self._service.complain(f"end {pid} status {status}")
            self._service.complain(f"status: {busy}/{self._options.limit}")


def _fill_streams() -> None:
    """Have the streams of the descriptors 0, 1 and 2, which have to be there: the interpreter has
    None for one that was closed when it started, and python-daemon takes that for a stream.
    """
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


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


def _let_go_of_streams() -> None:
    """Let go of descriptors 0 and 1, as tcpserver does: who reads the port waits for an end."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
    except OSError:
        return  # in a root without it
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _start(listener: Listener, options: Options) -> None:
    """Serve, with the rights of -u; raises StartError.

    As tcpserver does, it tells the port when all that needs root is done; but before it detaches.
    """
    if listener.is_successor:  # of one that has done all this
        listener.run(OomScore())
        return
    if options.daemon:
        if options.print_port:
            _print_port(listener.port)
        background.detach(options, listener.descriptor)
    score = OomScore()
    _drop_privileges(options)
    if options.print_port and not options.daemon:
        _print_port(listener.port)
    _let_go_of_streams()
    listener.run(score)


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
        _start(Listener(options), options)
        if options.daemon:
            background.remove_pid_file(options.pid_file)
    except StartError as error:
        log.Log().write_line(f"{NAME}: fatal: {error}")
        if isinstance(error, UsageError):
            sys.stderr.write(USAGE)
        elif options.daemon:
            background.remove_pid_file(options.pid_file)
        return error.status
    return 0
