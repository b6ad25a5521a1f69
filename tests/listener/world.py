"""What a listener finds around it: addresses, names, ident answers, certificates, all of this
test's own.

Loopback has 16 million addresses, so that each test has its own for clients, for a name server and
for ident, and none of them is in the way of another.  The ports are those of the protocols, which
only root can bind: without it the tests that need them are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from conformance.stage import Stage
from e2e.certificates import Certificate
from e2e.programs import as_mail_user, find, lack, mail_user, need

from .listening import program

_NUMBERS = itertools.count(2)

_PTR, _A = 12, 1
_NOT_FOUND = 3


def address() -> str:
    """An IPv4 address of loopback that nobody else has, by the id of this process."""
    number = next(_NUMBERS)
    pid = os.getpid()
    return f"127.{1 + pid // 250 % 100 + number // 250}.{1 + pid % 250}.{1 + number % 250}"


class Server:
    """Something that answers on a socket, in a thread, until the end of the `with`."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._end, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def answer(self) -> None:
        """Take one request, and answer it."""
        raise NotImplementedError

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._server, self._end], [], [])
            if self._end in ready:
                return
            with contextlib.suppress(OSError):  # who asked is gone
                self.answer()

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._wake, b".")
        self._thread.join()
        self._server.close()
        os.close(self._end)
        os.close(self._wake)


class Ident(Server):
    """An ident server (RFC 1413) for a client's address: it says `answer_for(ports)`, or nothing
    where that is None; `asked` are the ports it was asked about.
    """

    def __init__(self, ip: str, line: str | None) -> None:
        super().__init__(_bound(socket.SOCK_STREAM, ip, 113))
        self._server.listen()
        self._line = line
        self._silent: list[socket.socket] = []
        self.asked: list[str] = []

    def answer(self) -> None:
        connection, _ = self._server.accept()
        with connection.makefile("rb") as lines:
            ports = lines.readline().decode().strip()
        self.asked.append(ports)
        if self._line is None:
            self._silent.append(connection)
            return
        with connection:
            connection.sendall(self._line.format(ports=ports).encode("latin-1"))

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for connection in self._silent:
            connection.close()


class Names(Server):
    """A name server that knows the names of addresses, and the addresses of names."""

    def __init__(self, names: dict[str, str], addresses: dict[str, str]) -> None:
        self.ip = address()
        super().__init__(_bound(socket.SOCK_DGRAM, self.ip, 53))
        self._records: dict[tuple[bytes, int], bytes] = {}
        for ip, name in names.items():
            reverse = ".".join(reversed(ip.split("."))) + ".in-addr.arpa"
            self._records[_encoded(reverse), _PTR] = _encoded(name)
        for name, ip in addresses.items():
            self._records[_encoded(name).lower(), _A] = socket.inet_aton(ip)

    def answer(self) -> None:
        """Answer a question of RFC 1035 section 4.1; a name without the record does not exist."""
        query, client = self._server.recvfrom(512)
        name = query[12 : query.index(b"\0", 12) + 1]
        (kind,) = struct.unpack_from(">H", query, 12 + len(name))
        data = self._records.get((name.lower(), kind))
        flags = 0x8580 | (0 if data else _NOT_FOUND)
        reply = query[:2] + struct.pack(">HHHHH", flags, 1, 1 if data else 0, 0, 0)
        reply += query[12 : 12 + len(name) + 4]
        if data:
            reply += b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 0, len(data)) + data
        self._server.sendto(reply, client)

    def heard_by(self, directory: Path) -> tuple[str, ...]:
        """What starts a command that asks this server, and no /etc/hosts, for names."""
        (unshare,) = need("unshare")
        files = {
            "resolv.conf": f"nameserver {self.ip}\noptions timeout:2 attempts:2\n",
            "hosts": "",
            "nsswitch.conf": "hosts: files dns\nservices: files\n",
        }
        lines = []
        for name, text in files.items():
            (directory / name).write_text(text)
            lines.append(f"mount --bind {directory / name} /etc/{name}")
        script = " && ".join([*lines, 'exec env -u PWD "$@"'])
        return (unshare, "--mount", "sh", "-c", script, "sh")


def need_private_etc() -> None:
    """Skip the test unless a process can have an /etc of its own."""
    unshare = find("unshare")
    command = [unshare, "--mount", "mount", "--bind", "/etc/hosts", "/etc/hosts"]
    if not unshare or subprocess.run(command, capture_output=True, check=False).returncode:
        lack("no right to a mount namespace")


def put(stage: Stage, path: str, made: Certificate) -> None:
    """Put a certificate in its place as a renewal does, in one step."""
    place = stage.home / "control" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_suffix(".new")
    new.write_bytes(made.key_pem + made.chain)
    new.replace(place)


def need_root() -> None:
    """Skip the test unless it runs as root."""
    if os.getuid() != 0:
        lack("only root can do that")


def need_mail_user() -> pwd.struct_passwd:
    """The user that a service gives its rights up for; skips the test unless it can run programs of
    ours, and we can become it.
    """
    need_root()
    started = as_mail_user([*program()], env={"PATH": os.defpath})
    if started.returncode != 100 or b"usage:" not in started.stderr:
        lack(f"{mail_user().pw_name} can not start {program()}")
    return mail_user()


def give(stage: Stage, user: pwd.struct_passwd) -> None:
    """Let a user read a stage, and write where the stand-ins do."""
    for directory in (stage.home, (stage.tools / "checkpassword").resolve().parent):
        for part in (directory, *directory.parents):
            if part.stat().st_uid == os.getuid() and not part.stat().st_mode & 0o001:
                part.chmod(part.stat().st_mode | 0o011)
    for directory in (stage.home, stage.home / "control"):
        directory.chmod(0o755)
    os.chown(stage.tools, user.pw_uid, user.pw_gid)


@contextlib.contextmanager
def taken_port(ip: str) -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server((ip, 0)) as server:
        yield server.getsockname()[1]


def _bound(kind: int, ip: str, port: int) -> socket.socket:
    """A socket with a port of a protocol's own."""
    server = socket.socket(socket.AF_INET, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((ip, port))
    except PermissionError:
        server.close()
        lack(f"no right to port {port}")
    return server


def _encoded(name: str) -> bytes:
    """A name as labels (RFC 1035 section 3.1)."""
    labels = (label.encode("latin-1") for label in name.split("."))
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
