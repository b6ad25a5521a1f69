"""A connection's TLS: from octets in memory to octets in memory, and what is known of its peer."""

from __future__ import annotations

from .certificates import Parsing, TlsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cryptography import x509

_RECORD = 16384  # octets in a TLS record (RFC 8446 section 5.1)
_PIECE = 65536  # octets that are taken from OpenSSL at a time


class Notes:
    """What OpenSSL's callbacks leave for the end of the handshake.

    `problems` are those of the client's certificate, `warnings` are for the administrator.
    """

    __slots__ = ("problems", "warnings")

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []


class Channel:
    """One connection's TLS, on octets in memory.

    `ended` is empty until the peer ended TLS or broke it, and then says how; `notes` are complete
    when the handshake is.  `library` is OpenSSL.SSL, and `context` one of its contexts.

    That there is nothing is an exception to pyOpenSSL, and costs as much as a record: so it is not
    asked for what it can not have.
    """

    def __init__(self, library: Any, context: Any, is_client: bool = False) -> None:
        self._ssl = library
        self._connection = library.Connection(context, None)
        self.notes = Notes()
        self._connection.set_app_data(self.notes)
        if is_client:
            self._connection.set_connect_state()
        else:
            self._connection.set_accept_state()
        self._up = False
        self._may_have_input = is_client  # who speaks first
        self._may_have_output = False
        self._unsent = b""
        self.ended = ""

    def feed(self, data: bytes) -> None:
        """Take in what came from the peer."""
        self._connection.bio_write(data)
        self._may_have_input = True

    def pending(self) -> bytes:
        """What is to be sent to the peer."""
        pieces = []
        try:
            while self._may_have_output:
                piece = self._connection.bio_read(_PIECE)
                pieces.append(piece)
                self._may_have_output = len(piece) == _PIECE
        except self._ssl.WantReadError:
            self._may_have_output = False
        return b"".join(pieces)

    def handshake(self) -> bool:
        """Go on with the handshake: True when it is complete; raises TlsError."""
        if not self._may_have_input:
            return False
        self._may_have_output = True
        try:
            self._connection.do_handshake()
        except self._ssl.WantReadError:
            self._may_have_input = False
            return False
        except self._ssl.Error as error:
            raise TlsError(reason(error)) from None
        self._up = True
        return True

    def read(self) -> bytes:
        """What the peer said, as far as it has come; empty where more is to be fed, or it ended."""
        if self.ended:
            return b""  # lest OpenSSL, asked again, has another reason
        if not self._may_have_input:
            return b""
        self._may_have_output = True
        pieces = []
        try:
            while True:
                pieces.append(self._connection.recv(_RECORD))
        except self._ssl.WantReadError:
            self._may_have_input = False
        except self._ssl.ZeroReturnError:
            self.ended = "hung up"
        except self._ssl.Error as error:
            self.ended = f"TLS: {reason(error)}"
            return b""  # nothing can be told any more: what ends a message here must not count
        if self._unsent:
            self._encrypt()
        return b"".join(pieces)

    def write(self, data: bytes) -> bytes:
        """The data, encrypted; where the peer has broken TLS meanwhile, an alert instead, and the
        next `read` tells of it.
        """
        self._unsent += data
        self._encrypt()
        return self.pending()

    def _encrypt(self) -> None:
        """Encrypt what is unsent.  Where the peer has begun a message of TLS's own, as a change
        of keys, OpenSSL wants the rest of that first.
        """
        self._may_have_output = True
        try:
            self._connection.sendall(self._unsent)
        except self._ssl.WantReadError:
            return
        except self._ssl.Error as error:
            self.ended = self.ended or f"TLS: {reason(error)}"
        self._unsent = b""

    def close(self) -> bytes:
        """The words that end TLS, if it was on."""
        if self._up:
            self._may_have_output = True
            try:
                self._connection.shutdown()
            except self._ssl.Error:
                pass  # broken already
        return self.pending()

    def version(self) -> str:
        """The version of TLS, as OpenSSL has it."""
        return str(self._connection.get_protocol_version_name())

    def cipher(self) -> str:
        """The name of the cipher, as OpenSSL has it."""
        return self._connection.get_cipher_name() or "unknown"

    def facts(self) -> dict[str, object]:
        """What was negotiated, for the log."""
        address, problem = self._client_certificate()
        return {
            "version": self.version(),
            "cipher": self.cipher(),
            "bits": self._connection.get_cipher_bits(),
            "cert": address or problem or "none",
        }

    def certified_address(self, clients: Sequence[bytes]) -> tuple[bytes | None, bytes]:
        """The address that the client's certificate vouches for, if it is one of the clients, given
        in lower case; otherwise None and, where there is a certificate, what is wrong with it.
        """
        address, problem = self._client_certificate()
        if address is not None and address.encode().lower() in clients:
            return address.encode(), b""
        if address is not None:
            problem = "email address not in my list of tlsclients"
        return None, problem.encode()

    def _client_certificate(self) -> tuple[str | None, str]:
        """The e-mail address in the subject of a certificate that verifies, or None and why not."""
        certificate = self._connection.get_peer_certificate()
        if certificate is None:
            return None, ""
        if self.notes.problems:
            return None, self.notes.problems[0]
        from cryptography.x509.oid import NameOID

        try:
            with Parsing():
                subject = certificate.to_cryptography().subject
        except Exception:  # whatever a library makes of what a client has made up
            return None, "malformed"
        for attribute in subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS):
            return str(attribute.value), ""
        return None, "contains no email address"


_VERIFY_ERRORS = {
    3: "unable to get certificate CRL",
    9: "certificate is not yet valid",
    10: "certificate has expired",
    12: "CRL has expired",
    18: "self-signed certificate",
    19: "self-signed certificate in certificate chain",
    20: "unable to get local issuer certificate",
    21: "unable to verify the first certificate",
    23: "certificate revoked",
    26: "unsuitable certificate purpose",
}
"""OpenSSL 3.0's words for the usual errors: clients are told them, and other versions differ."""


def note_problem(connection: Any, certificate: Any, code: int, depth: int, ok: int) -> bool:
    """Note what is wrong with a client certificate, and let the handshake go on.

    OpenSSL 3 leaves what it found wrong with a signature among its errors, and would tell of it at
    the next read, as if that had failed.
    """
    if not ok:
        from cryptography.hazmat.bindings.openssl.binding import Binding

        Binding.lib.ERR_clear_error()
        connection.get_app_data().problems.append(_VERIFY_ERRORS.get(code) or _words_for(code))
    return True


def _words_for(code: int) -> str:
    """What OpenSSL says of a verify error (X509_STORE_CTX_get_error(3))."""
    from cryptography.hazmat.bindings.openssl.binding import Binding

    words: bytes = Binding.ffi.string(Binding.lib.X509_verify_cert_error_string(code))
    return words.decode()


class ClientChannel(Channel):
    """The client's end, for sessions with ourselves: without a context it takes any certificate.

    `server_name` is the one to ask for (RFC 6066 section 3).
    """

    def __init__(self, context: Any = None, server_name: bytes | None = None) -> None:
        from OpenSSL import SSL

        super().__init__(SSL, context or SSL.Context(SSL.TLS_CLIENT_METHOD), is_client=True)
        if server_name:
            self._connection.set_tlsext_host_name(server_name)

    def chain(self) -> list[x509.Certificate]:
        """The certificates that the server has sent, its own first."""
        return [link.to_cryptography() for link in self._connection.get_peer_cert_chain() or []]


def reason(error: Exception) -> str:
    """OpenSSL's words for an error of pyOpenSSL."""
    entries = error.args[0] if error.args else []
    if not isinstance(entries, (list, tuple)):  # SysCallError has a number and words
        return str(error.args[-1])
    reasons = [entry[-1] for entry in entries if entry]
    return "; ".join(filter(None, reasons)) or "connection ended"
