"""TLS for one connection: whether it can be had, with what, and its beginning.

Decides what `tls` works with: the administrator's choice of ciphers, whom to ask for a certificate,
and whether a helper does the work.  What goes wrong becomes a reply and a line in the log.  Loaded
when a session first needs it.
"""

from __future__ import annotations

import os
import sys

from . import certificates, lean, log, memory, reply
from .certificates import TlsError
from .connection import cipher_in
from .effects import ControlError
from .wire import ConnectionLost, HandedOver, TimedOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .channel import Channel
    from .connection import Connection
    from .handover import Offer
    from .reply import Reply
    from .settings import Sources
    from .tls import CachedContexts, Context, Policy
    from .wire import Wire

    Log = Callable[[str, Mapping[str, object]], None]


class Encryption:
    """What a session's TLS needs of the world; `channel` is there once the handshake began.

    `arguments` are for a helper; `contexts` are there where the process serves many connections.
    `variables` are what the program that started us tells of the TLS that it made.
    """

    def __init__(
        self,
        sources: Sources,
        arguments: Sequence[bytes],
        connection: Connection,
        contexts: CachedContexts | None,
        log: Log,
    ) -> None:
        self._sources = sources
        self._environ = sources.environ
        self._files = sources.files
        self._arguments = arguments
        self._connection = connection
        self._contexts = contexts
        self._log = log
        self._ciphers: list[bytes] = []
        self._minimum: bytes | None = None
        self._offer: Offer | None = None
        self._context: Context | None = None
        self.channel: Channel | None = None
        self.variables: dict[bytes, bytes] = {}

    @property
    def is_ucspi(self) -> bool:
        """Whether the program that started us makes TLS (UCSPI-TLS); never in a listener, as its
        three descriptors belong to one connection.
        """
        return b"SSLCTLFD" in self._environ and not self._contexts

    def prepare(self) -> Reply | None:
        """See that a handshake can begin: None if so; raises ControlError."""
        if self.is_ucspi or self._finds_helper():
            return None
        try:
            if "OpenSSL.SSL" not in sys.modules:
                lean.leave_out()
                memory.see_room_for(self._try_all, _FOR_MANY if self._contexts else _FOR_ONE)
            self._choose()
            if self._contexts:
                self._context = self._contexts.get(self._policy(), self._files)
            else:
                certificates.check()
        except _NOT_LOADED as error:
            self._log("error", {"why": f"TLS not available: {why_not_loaded(error)}"})
            return reply.tls_unavailable(b"not available")
        except TlsError as error:
            self._log("error", {"why": f"TLS not available: {error}"})
            if isinstance(error, certificates.Unavailable):
                return reply.tls_unavailable(error.what, error.reason.encode("ascii", "replace"))
            return reply.tls_unavailable(b"not available")
        return None

    def _try_all(self) -> None:
        """Load all that TLS takes, and make a handshake with ourselves; raises MemoryError, and
        what `prepare` has words for.
        """
        try:
            from .tls import CachedContexts

            self._choose()
            CachedContexts().get(self._policy(), self._files)
        except _NOT_LOADED as error:
            if why_not_loaded(error).endswith(log.OUT_OF_MEMORY):
                raise MemoryError from None
            raise

    def _choose(self) -> None:
        """Read what the administrator has chosen; raises ControlError, or TlsError where there is
        no certificate either, as that comes first in the C program.
        """
        chosen = self._environ.get(b"TLSCIPHERS")
        try:
            self._ciphers = [chosen] if chosen else self._files.list("tlsserverciphers") or []
            self._minimum = self._sources.line(b"TLSMINVERSION", "tlsminversion")
        except ControlError:
            certificates.check()
            raise

    def _start_ucspi(self, wire: Wire) -> bytes:
        """Have the program that started us make the handshake; the name of the cipher."""
        from . import ucspitls

        try:
            control, read_fd, write_fd = ucspitls.descriptors(self._environ)
            self.variables = ucspitls.start(control, wire.patience)
            version = self.variables.get(b"SSL_PROTOCOL", b"unknown")
            name = cipher_in(self.variables)
            if name is None:
                why = f"SSL_PROTOCOL: {log.text(version)} is not TLS 1.2 or newer"
                raise ucspitls.UcspiError(why)
        except ucspitls.UcspiError as error:
            self._log("tls", {"result": "failed", "why": f"UCSPI-TLS: {error}"})
            raise ConnectionLost("TLS handshake failed") from None
        wire.move(read_fd, write_fd)
        self._log("tls", {"result": "ok", "version": version, "cipher": name})
        return name

    def _finds_helper(self) -> bool:
        """Whether a helper is there that will serve the session from the handshake on."""
        path = self._environ.get(b"TLSHELPER")
        if not path or self._contexts:
            return False
        from . import handover

        try:
            environ = self._environ
            if not environ.get(b"QMAILHOME", b"/").startswith(b"/"):
                environ = {**environ, b"QMAILHOME": os.getcwdb()}  # the helper is somewhere else
            self._offer = handover.offer(path, self._arguments, environ)
        except handover.HandoverError as error:
            why = f"no help from {os.fsdecode(path)}: {error}; doing TLS ourselves"
            self._log("error", {"why": why})
        return self._offer is not None

    def start(self, wire: Wire) -> bytes:
        """Make the handshake; the name of the cipher.  Raises ConnectionLost, or HandedOver."""
        if self.is_ucspi:
            return self._start_ucspi(wire)
        if self._offer:
            raise HandedOver(self._offer.complete((0, 1, 2)))
        try:
            context = self._context or self._new_context()
            self._warn(context.warnings)
            self.channel = channel = context.channel()
            try:
                wire.start_tls(channel)
            finally:
                self._warn(channel.notes.warnings)
        except TimedOut:
            why = "timeout"
        except _NOT_LOADED as error:
            why = why_not_loaded(error)
        except (ConnectionLost, TlsError) as error:
            why = str(error)
        else:
            self._log("tls", {"result": "ok", **channel.facts()})
            return channel.cipher().encode()
        self._log("tls", {"result": "failed", "why": why})
        raise ConnectionLost("TLS handshake failed")

    def _warn(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self._log("error", {"why": warning})

    def _new_context(self) -> Context:
        from .tls import Context

        return Context(self._policy())

    def _policy(self) -> Policy:
        """What the administrator wants; tickets are for processes that outlive a connection."""
        from .tls import Policy

        tickets = self._contexts is not None and self._environ.get(b"TLSTICKETS") != b"0"
        asks = self.asks_for_certificates()
        return Policy(tuple(self._ciphers), self._minimum or None, asks, tickets)

    def asks_for_certificates(self) -> bool:
        """Whether a client certificate could make a difference."""
        if self._connection.relay_client is not None:
            return False
        return self._files.exists("tlsclients") and self._files.exists("clientca.pem")

    def certified_client(self) -> tuple[bytes | None, bytes]:
        """The address that the client's certificate vouches for, or None and why not; raises
        ControlError.
        """
        clients = self._files.list("tlsclients")
        if self.channel is None or clients is None:
            return None, b""
        return self.channel.certified_address([client.lower() for client in clients])


_FOR_ONE = 1 << 20
"""Octets of address space that a session takes beside what TLS does."""

_FOR_MANY = 5 << 20
"""The same for a listener, which arranges its memory, and whose interpreter may not even end where
that runs out.
"""

_NOT_LOADED = (ImportError, MemoryError, OSError, RuntimeError, SystemError)
"""What importing a library raises where it is not there, or memory runs out."""


def why_not_loaded(error: Exception) -> str:
    """Why a library could not be loaded, and what to do."""
    if isinstance(error, ModuleNotFoundError):
        return f"the module {error.name} is not installed; run make install again"
    if "write+execute" in str(error):
        return "memory that can be written and executed is forbidden, and pyOpenSSL needs it"
    return f"{error}; {log.OUT_OF_MEMORY}" if str(error) else log.OUT_OF_MEMORY
