"""A session with the installed qmail-smtpd, as a client has it: EHLO, STARTTLS, EHLO, NOOP, QUIT.

The program is started as tcpserver would start it: on a socket, with the environment, the arguments
and the limits of the run file, by a process that has the service's rights.  What it says in its log
is kept, too.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess

from OpenSSL import SSL

from .certificates import TlsError
from .channel import ClientChannel, note_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryptography import x509

CLIENT = b"203.0.113.1"
"""The address that the client says it has: one of RFC 5737, which no rule knows."""

_SECONDS = 75  # for each reply; a greeting may be delayed
_GOODBYE_SECONDS = 10
_PIECE = 65536

_VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}


class TrialError(Exception):
    """The session did not go as far as it should; the text says what a client saw."""


class Trial:
    """One session, and what came of it.

    `failure` is empty, or what a client saw at the end.  `greeting`, `offers` (EHLO in clear) and
    `tls_offers` (under TLS) are reply lines without their codes; `chain` the certificates that the
    client was sent, and `verify_error` OpenSSL's words for what is wrong with them to a client that
    trusts the authorities of this system, or empty.  `log` has the program's lines.
    """

    def __init__(self, is_smtps: bool = False, server_name: str | None = None) -> None:
        self._is_smtps = is_smtps
        self._server_name = server_name
        self.failure = ""
        self.greeting = ""
        self.offers: list[str] = []
        self.tls_offers: list[str] = []
        self.version = self.cipher = ""
        self.chain: list[x509.Certificate] = []
        self.verify_error = ""
        self.log: list[str] = []
        self.status: int | None = None
        self._socket: socket.socket
        self._tls: ClientChannel | None = None
        self._received = b""

    def run(
        self,
        program: str,
        environ: Mapping[bytes, bytes],
        arguments: Sequence[bytes],
        limits: Mapping[str, int],
        version: str | None = None,
        ciphers: bytes = b"",
    ) -> Trial:
        """Have the session; the object itself."""
        ours, theirs = socket.socketpair()
        log = os.memfd_create("log")
        with ours, open(log, "w+b") as log_file:
            process = subprocess.Popen(
                [os.fsencode(program), *arguments],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=log_file,
                env={os.fsdecode(k): os.fsdecode(v) for k, v in environ.items()},
                cwd="/",
                preexec_fn=lambda: _limit(limits),
            )
            theirs.close()
            self._socket = ours
            try:
                self._converse(version, ciphers)
            except (TrialError, OSError) as error:
                self.failure = str(error)
            self.status = _end(process, ours)
            log_file.seek(0)
            self.log = log_file.read().decode("utf-8", "replace").splitlines()
        return self

    def _converse(self, version: str | None, ciphers: bytes) -> None:
        if self._is_smtps:
            self._start_tls(version, ciphers)
        self.greeting = self._reply(220, "the connection")[0]
        offers = self._say("EHLO localhost", 250)
        if self._is_smtps:
            self.tls_offers = offers
        else:
            self.offers = offers
            if "STARTTLS" in offers:
                self._say("STARTTLS", 220)
                self._start_tls(version, ciphers)
                self.tls_offers = self._say("EHLO localhost", 250)
        self._say("NOOP", 250)
        self._say("QUIT", 221)

    def _say(self, command: str, code: int) -> list[str]:
        self._write(command.encode() + b"\r\n")
        return self._reply(code, command.split()[0])

    def _reply(self, code: int, command: str) -> list[str]:
        """The lines of a reply, which has to have this code; raises TrialError."""
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            while b"\n" not in self._received:
                piece = self._read()
                if not piece:
                    raise TrialError(f"hung up on, instead of a reply to {command}")
                self._received += piece
            line, _, self._received = self._received.partition(b"\n")
            lines.append(line.rstrip(b"\r").decode("utf-8", "replace"))
        if not lines[0].startswith(str(code)):
            raise TrialError(f"to {command}: {' / '.join(lines)}")
        return [line[4:] for line in lines]

    # Octets, in clear and under TLS

    def _receive(self) -> bytes:
        """What the program sends next, empty at the end; raises TrialError."""
        if not select.select([self._socket], [], [], _SECONDS)[0]:
            raise TrialError(f"nothing within {_SECONDS} seconds")
        try:
            return self._socket.recv(_PIECE)
        except ConnectionResetError:
            return b""

    def _read(self) -> bytes:
        """What the program says next, empty at the end; raises TrialError."""
        if self._tls is None:
            return self._receive()
        while not (said := self._tls.read()) and not self._tls.ended:
            data = self._receive()
            if not data:
                return b""
            self._tls.feed(data)
        return said

    def _write(self, data: bytes) -> None:
        self._socket.sendall(self._tls.write(data) if self._tls else data)

    def _start_tls(self, version: str | None, ciphers: bytes) -> None:
        """Make the handshake, whoever the server says that it is; raises TrialError."""
        name = self._server_name.encode("ascii", "replace") if self._server_name else None
        tls = ClientChannel(self._context(version, ciphers), name)
        try:
            while not tls.handshake():
                self._socket.sendall(tls.pending())
                data = self._receive()
                if not data:
                    raise TrialError("hung up on in the TLS handshake")
                tls.feed(data)
        except TlsError as error:
            raise TrialError(f"the TLS handshake failed: {error}") from None
        finally:
            self._socket.sendall(tls.pending())
        self._tls = tls
        self.version, self.cipher = tls.version(), tls.cipher()
        self.chain = tls.chain()
        self.verify_error = "".join(tls.notes.problems[:1])

    def _context(self, version: str | None, ciphers: bytes) -> SSL.Context:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_default_verify_paths()
        context.set_verify(SSL.VERIFY_PEER, note_problem)
        if version:
            context.set_min_proto_version(_VERSIONS[version])
            context.set_max_proto_version(_VERSIONS[version])
        if ciphers:
            context.set_cipher_list(ciphers)
        return context


def _limit(limits: Mapping[str, int]) -> None:
    """Set the soft limits, as softlimit(8) does; that of memory last, as it counts at once."""
    for name in sorted(limits, key=lambda name: name in ("as", "data")):
        number = getattr(resource, f"RLIMIT_{name.upper()}")
        hard = resource.getrlimit(number)[1]
        limit = limits[name] if hard == resource.RLIM_INFINITY else min(limits[name], hard)
        resource.setrlimit(number, (limit, hard))


def _end(process: subprocess.Popen[bytes], ours: socket.socket) -> int:
    """Wait until the program has ended, and if need be end it; its exit status."""
    ours.shutdown(socket.SHUT_WR)
    try:
        return process.wait(_GOODBYE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
