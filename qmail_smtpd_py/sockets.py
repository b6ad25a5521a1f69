"""Where the listener listens: its own socket, or one that systemd or a predecessor has left it."""

from __future__ import annotations

import errno
import os
import socket
import stat

from .options import Options, StartError
from .process import close_inherited

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_FDS_START = 3  # sd_listen_fds(3)
_NO_PORT = "there is no such port"
_VARIABLE = "QMAIL_SMTPD_LISTEN"  # what a predecessor leaves: descriptor, 1 if it is ours, workers


class Heritage:
    """What whoever started us has left: the socket, or None; whether it is ours to shut down, or
    systemd's; and the workers of a predecessor, if that is what left it.
    """

    def __init__(self, descriptor: int | None, owns_socket: bool = True) -> None:
        self.socket = None if descriptor is None else _adopt(descriptor)
        self.owns_socket = owns_socket
        self.is_successor = False
        self.workers: list[int] = []

    def leave(self, listener: socket.socket, workers: Iterable[int]) -> dict[bytes, bytes]:
        """The variable by which a successor finds all this again; the socket stays open for it."""
        listener.set_inheritable(True)
        numbers = [listener.fileno(), int(self.owns_socket), *workers]
        return {_VARIABLE.encode(): ",".join(map(str, numbers)).encode()}


def inherit() -> Heritage:
    """Take what we were left; all other descriptors are closed, so that no child gets them.

    No variable of it stays, as children are to have the environment of the listener's start.
    Raises StartError where it makes no sense: systemd has one socket for us, and a predecessor
    says what it has.
    """
    left = os.environ.pop(_VARIABLE, None)
    if left:
        try:
            descriptor, owns_socket, *workers = map(int, left.split(","))
        except ValueError:
            raise StartError(f"{_VARIABLE} is not what a listener leaves its successor") from None
        heritage = Heritage(descriptor, bool(owns_socket))
        heritage.is_successor = True
        heritage.workers = workers
        return heritage
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        del os.environ["LISTEN_PID"]
        sockets = os.environ.pop("LISTEN_FDS", "")
        os.environ.pop("LISTEN_FDNAMES", None)
        if sockets != "1":
            raise StartError(f"systemd has {sockets} sockets for us: a listener has one")
        return Heritage(_FDS_START, owns_socket=False)
    close_inherited([])
    return Heritage(None)


def _adopt(descriptor: int) -> socket.socket:
    """The socket that was inherited; what else was is closed.  Raises StartError."""
    close_inherited([descriptor])
    try:
        os.set_inheritable(descriptor, False)
        left = socket.socket(fileno=descriptor)
        is_listening = left.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no such descriptor"
        raise StartError(f"descriptor {descriptor} was to be a socket: {why}") from None
    if not is_listening:
        raise StartError(f"descriptor {descriptor}: no listening socket; is it Accept=yes?")
    return left


def bind(options: Options) -> socket.socket:
    """A socket where the command line says; raises StartError."""
    return _bind_helper(options.helper, options) if options.helper else _bind_port(options)


def set_no_delay(listener: socket.socket, is_on: bool) -> None:
    """Whether TCP is to send at once what is written; raises StartError, as what we were left may
    be another kind of socket.
    """
    try:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, is_on)
    except OSError as error:
        raise StartError(f"cannot listen on what is no TCP socket: {error.strerror}") from None


def _bind_port(options: Options) -> socket.socket:
    """A socket that listens where the command line says; raises StartError."""
    host = "0.0.0.0" if options.host in ("", "0") else options.host
    try:
        is_number = options.port.isdecimal()
        if (is_number and int(options.port[:6]) > 65535) or options.port[:1] in ("+", "-", " "):
            raise OSError(0, _NO_PORT)  # of which the library would make another
        found = socket.getaddrinfo(
            host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # localhost is 127.0.0.1
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        listener.bind(address)
        listener.listen(options.backlog)
    except (OSError, UnicodeError) as error:
        where = f"{options.host} port {options.port}"
        why = error.strerror if isinstance(error, OSError) else "this is no name"
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_SERVICE:
            why = _NO_PORT
        raise StartError(f"cannot listen on {where}: {why}") from None
    return listener


def _bind_helper(path: str, options: Options) -> socket.socket:
    """A UNIX socket that only -u's processes will be able to connect to; raises StartError."""
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            _remove_left_socket(path)
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
                follow_symlinks=False,  # the directory may be that of -u, and we may be root
            )
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {error.strerror or error}") from None
    return helper


def _remove_left_socket(path: str) -> None:
    """Remove a UNIX socket that nobody listens to any more; raises OSError if somebody does, or if
    that can not be found out.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # where there is no room in the queue it would wait
        trouble = probe.connect_ex(path)
    if trouble in (0, errno.EAGAIN):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if trouble != errno.ECONNREFUSED:
        raise OSError(trouble, os.strerror(trouble))
    os.unlink(path)
