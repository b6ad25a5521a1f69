"""qmail-smtpd-listen: takes the place of tcpserver and of the program that it would start.

The options are tcpserver's, with tcpserver's meaning, so that a run file changes in one place; some
long ones are our own.  Order of events: bind, detach (--daemon), give up privileges, load all that
workers share, fork.  Not an octet of a client's is read by a process that may do more than -u and
-g say.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import time

from . import log, tls
from .control import CachedControlFiles
from .effects import ControlError
from .options import NAME, USAGE, Options, StartError, UsageError
from .prefork import Place, Pool
from .smtpd import HOME, Resources, Server, environment
from .worker import Helper, Service, Worker

_FDS_START = 3  # sd_listen_fds(3)
_MOST_DESCRIPTORS = 1024  # that we may inherit
_INHERITED = "QMAIL_SMTPD_LISTEN"  # what a predecessor leaves: descriptor, 1 if it is ours, workers
_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGALRM,
    signal.SIGUSR2, signal.SIGCHLD,
)  # fmt: skip


class Listener:
    """The parent: its socket, its signals and its pool."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._directory = os.getcwd()  # which names in the command line may be relative to
        self._is_successor = False
        self._predecessors: list[int] = []
        self._owns_socket = True
        self._socket = self._inherit() or (_bind_helper if options.helper else _bind)(options)
        if not options.helper:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, options.no_delay)
        self._socket.setblocking(False)
        self._stop_at: float | None = None
        self._renew_at = 0.0
        self._signals: list[int] = []

    def _inherit(self) -> socket.socket | None:
        """The socket that a predecessor or systemd left us (sd_listen_fds(3)), or None."""
        left = os.environ.pop(_INHERITED, None)
        if left:
            descriptor, owns_socket, *self._predecessors = map(int, left.split(","))
            self._owns_socket = bool(owns_socket)
            self._is_successor = True
            return _adopt(descriptor)
        if os.environ.pop("LISTEN_PID", None) == str(os.getpid()):
            os.environ.pop("LISTEN_FDS", None)
            self._owns_socket = False
            return _adopt(_FDS_START)
        os.closerange(3, _MOST_DESCRIPTORS)
        return None

    @property
    def is_successor(self) -> bool:
        """Whether another listener was restarted as this one."""
        return self._is_successor

    @property
    def descriptor(self) -> int:
        """The descriptor of the socket that we listen on."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """The port that we listen on."""
        port: int = self._socket.getsockname()[1]
        return port

    def run(self) -> None:
        """Serve until a signal says stop, and then until the last session is over."""
        options = self._options
        if options.helper:
            self._socket.listen(options.backlog)  # SO_PEERCRED tells who did this: -u, not root
        service = self._load()
        pool = Pool(
            options.limit,
            options.idle,
            2 * options.idle,
            lambda place: self._work(service, place),
            lambda: self._prepare(service),
            self._tell,
        )
        pool.predecessors.update(self._predecessors)
        wake = self._catch_signals()
        if service.is_verbose:
            _complain(f"status: 0/{options.limit}")
        while True:
            self._heed_signals(pool)
            pool.maintain()
            if pool.board.stopping and not pool.workers:
                return
            pool.wait(self._time_left(pool), wake)

    def _load(self) -> Service:
        """Load what all workers share, as the user that they will be."""
        options = self._options
        environ = environment()
        arguments = [os.fsencode(word) for word in options.arguments]
        resources = Resources(CachedControlFiles(), tls.CachedContexts())
        service = Service(environ, arguments, resources, options.look_ups)
        service.rules = options.rules
        service.proxies = options.proxies
        service.banner = os.fsencode(options.banner)
        service.keep_ip_options = options.keep_ip_options
        service.limit = options.limit
        service.is_verbose = options.verbosity > 1
        service.complain = self._tell
        try:
            resources.go_home(environ.get(b"QMAILHOME") or HOME)
        except ControlError as error:
            raise StartError(str(error)) from None
        return service

    def _prepare(self, service: Service) -> None:
        """Have ready what the next fork is to share: files, and TLS contexts.

        With the contexts go the keys of session tickets, which are not to be good for ever.
        """
        if time.monotonic() > self._renew_at:
            self._renew_at = time.monotonic() + self._options.max_age
            service.resources.contexts = tls.CachedContexts()
        _preload(service)

    def _tell(self, line: str) -> None:
        """Log a line, unless -q says that nothing is to be told."""
        if self._options.verbosity:
            _complain(line)

    def _work(self, service: Service, place: Place) -> None:
        """What a worker does."""
        options = self._options
        kind = Helper if options.helper else Worker
        kind(service, self._socket, place, options.max_use, options.max_age).run()

    # Signals

    def _catch_signals(self) -> int:
        """Note signals as they come; the descriptor that becomes readable with them."""
        hear, wake = os.pipe()
        os.set_blocking(hear, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: self._signals.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # main, or a predecessor, blocked them
        return hear

    def _heed_signals(self, pool: Pool) -> None:
        """Do what the signals ask: the table of signals in qmail-smtpd-listen(8)."""
        signals, self._signals = self._signals, []
        for number in signals:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(pool, self._options.drain if self._stop_at is None else 0)
            elif number == signal.SIGQUIT:
                self._stop(pool, 0)
            elif number == signal.SIGHUP:
                self._renew_at = 0.0
                pool.replace_all()
            elif number == signal.SIGALRM:
                _complain(f"status: {pool.board.busy}/{self._options.limit}")
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            pool.signal_all(signal.SIGTERM)
        if signal.SIGUSR2 in signals and self._stop_at is None:
            self._restart(pool)  # last, as it does not come back

    def _stop(self, pool: Pool, seconds: float) -> None:
        """Accept no more, and let the sessions that are there end within so many seconds."""
        self._stop_at = time.monotonic() + seconds
        if pool.board.stopping:
            return
        pool.stop()
        if self._owns_socket:
            self._socket.shutdown(socket.SHUT_RDWR)
        self._tell(f"stopping: {pool.board.busy} connections left")

    def _time_left(self, pool: Pool) -> float | None:
        """Seconds until sessions are cut; None where none are to be."""
        if self._stop_at is None:
            return None
        return max(0.2, self._stop_at - time.monotonic())

    def _restart(self, pool: Pool) -> None:
        """Become a new listener, with new code, on the same socket and under the same process id.

        The workers that are there end after the connection that they serve.
        """
        with open("/proc/self/cmdline", "rb") as file:  # with the interpreter's own options
            words = file.read().split(b"\0")[:-1]
        descriptor = self._socket.fileno()
        heritage = ",".join(map(str, [descriptor, int(self._owns_socket), *pool.workers]))
        os.set_inheritable(descriptor, True)
        pool.replace_all()
        self._tell("restarting")
        # Until the new one has handlers, what comes would end it: it is to wait instead.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for number in self._signals:
            os.kill(os.getpid(), number)  # and so is what came a moment ago
        here = os.getcwd()
        try:
            os.chdir(self._directory)
            os.execve(sys.executable, words, {**os.environ, _INHERITED: heritage})
        except OSError as error:
            os.chdir(here)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.set_inheritable(descriptor, False)
            self._tell(f"warning: cannot restart: {error.strerror}")


def _adopt(descriptor: int) -> socket.socket:
    """The socket that was inherited; what else was is closed, so that no child gets it."""
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, _MOST_DESCRIPTORS)
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def _fill_descriptors() -> None:
    """See that there are descriptors 0, 1 and 2: a connection in their place would get the log."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _preload(service: Service) -> None:
    """Have control files and TLS contexts as they are now in memory, for the next fork to share."""
    service.resources.files.refresh()
    try:
        server = Server(service.environ, service.arguments, service.resources)
        try:
            server.preload()
        finally:
            server.close()
    except ControlError as error:
        service.complain(f"warning: {error}")
    except Exception as error:  # a defect: each connection may have it, the parent must not
        service.complain(f"warning: cannot load ahead: {log.where(error)}")


def _bind(options: Options) -> socket.socket:
    """A socket that listens where the command line says; raises StartError."""
    host = "0.0.0.0" if options.host == "0" else options.host
    try:
        if options.port.isdigit() and int(options.port) > 65535:
            raise OSError(0, "there is no such port")  # of which the library would make another
        found = socket.getaddrinfo(
            host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # localhost is 127.0.0.1
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        listener.bind(address)
        listener.listen(options.backlog)
    except (OSError, UnicodeError) as error:
        where = f"{options.host} port {options.port}"
        why = error.strerror if isinstance(error, OSError) else "this is no name"
        raise StartError(f"cannot listen on {where}: {why}") from None
    return listener


def _bind_helper(options: Options) -> socket.socket:
    """A UNIX socket that only -u's processes will be able to connect to; raises StartError."""
    path = options.helper
    assert path
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
        helper = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            helper.bind(path)
        finally:
            os.umask(before)
        if options.uid is not None or options.gid is not None:
            keep = -1
            os.chown(
                path,
                keep if options.uid is None else options.uid,
                keep if options.gid is None else options.gid,
            )
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {error.strerror}") from None
    return helper


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


def _detach(options: Options, listener: Listener) -> None:
    """Go into the background (python-daemon, PEP 3143); raises StartError."""
    from daemon import DaemonContext

    _check_pid_file(options.pid_file)
    pid_file = _open_to_append(options.pid_file or os.devnull)
    if options.log_file:
        os.dup2(_open_to_append(options.log_file), log.DESCRIPTOR)
    DaemonContext(
        files_preserve=[listener.descriptor, pid_file],
        stderr=sys.stderr,
        working_directory="/",
        umask=0o022,
        detach_process=True,
        prevent_core=False,
        initgroups=False,
        signal_map={},
    ).open()
    if options.pid_file:
        os.ftruncate(pid_file, 0)
    os.write(pid_file, b"%d\n" % os.getpid())
    os.close(pid_file)


def _check_pid_file(path: str | None) -> None:
    """Raises StartError where the file has the process id of a listener that runs."""
    pid = _pid_in(path)
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            runs = NAME.encode() in file.read()
    except OSError:
        return
    if runs:
        raise StartError(f"{path} is there, and process {pid} runs")


def _remove_pid_file(path: str | None) -> None:
    """Remove our own file; one that -u may not remove is replaced at the next start."""
    if path and _pid_in(path) == os.getpid():
        try:
            os.unlink(path)
        except OSError:
            pass


def _pid_in(path: str | None) -> int:
    """The process id in a pid file; 0 if there is none."""
    try:
        with open(path or os.devnull) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _open_to_append(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}") from None


def _complain(line: str) -> None:
    log.write_line(f"{NAME}: {line}")


def main() -> int:
    """The program; the exit status is 111 where it could not start, as tcpserver's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until they can be heeded
    _fill_descriptors()
    try:
        options = Options(sys.argv[1:])
        listener = Listener(options)
        if not listener.is_successor:  # of one that has done all this
            if options.print_port:
                print(listener.port, flush=True)
            if options.daemon:
                _detach(options, listener)
            _drop_privileges(options)
        listener.run()
        if options.daemon:
            _remove_pid_file(options.pid_file)
    except StartError as error:
        _complain(f"fatal: {error}")
        if isinstance(error, UsageError):
            sys.stderr.write(USAGE)
        return error.status
    return 0
