"""A connection that systemd has accepted (systemd.socket(5), Accept=yes), told as tcpserver would.

systemd says in REMOTE_ADDR and REMOTE_PORT who the client is, and of our end nothing: there the
kernel is asked.  Names are not looked up, and there are no rules; what an address may do is a
matter of the socket unit.
"""

from __future__ import annotations

from .connection import plain_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def tcp_environ(environ: Mapping[bytes, bytes], descriptor: int) -> dict[bytes, bytes]:
    """The environment with the variables of tcp-environ(5) for a connection from systemd.

    It is left as it is where a launcher has said who the client is, and where systemd has not.
    """
    found = dict(environ)
    remote_ip = environ.get(b"REMOTE_ADDR")
    if not remote_ip or b"TCPREMOTEIP" in environ:
        return found
    found[b"PROTO"] = b"TCP6" if b":" in plain_ip(remote_ip) else b"TCP"
    found[b"TCPREMOTEIP"] = plain_ip(remote_ip)
    remote_port = environ.get(b"REMOTE_PORT")
    if remote_port:
        found[b"TCPREMOTEPORT"] = remote_port
    local = _local_end(descriptor)
    if local:
        found[b"TCPLOCALIP"], found[b"TCPLOCALPORT"] = local
    return found


def _local_end(descriptor: int) -> tuple[bytes, bytes] | None:
    """Our address and port, or None where the descriptor is no TCP connection."""
    import socket

    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        ip, port = connection.getsockname()[:2]
        return plain_ip(ip.encode()), b"%d" % port
    except OSError:
        return None
    finally:
        connection.detach()
