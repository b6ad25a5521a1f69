"""TLS: the certificate, what is negotiated, and the channel that a session then runs through.

The only module that imports pyOpenSSL, and it does so late.  Importing it takes far longer than all
else that the program does, so it happens in two steps: `check` needs the bindings alone, and after
it 220 can be promised; `Context` needs all of pyOpenSSL, and is made while 220 travels to the
client and its first message comes back.

Policy: TLS 1.2 and up, forward secrecy and authenticated encryption, no compression, no
renegotiation.  Client certificates are asked for in the first handshake and never required: a
handshake succeeds without one, and with one that does not verify.
"""

from __future__ import annotations

import os

from .control import signature

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

SERVER_CERTIFICATE = "control/servercert.pem"
CLIENT_AUTHORITIES = "control/clientca.pem"
REVOCATIONS = "control/clientcrl.pem"
DH_PARAMETERS = "control/dh2048.pem"
_FILES = (SERVER_CERTIFICATE, CLIENT_AUTHORITIES, REVOCATIONS, DH_PARAMETERS)

CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"
"""The ciphers of TLS 1.2 where nobody chose others; DHE counts where there is dh2048.pem."""

_RECORD = 16384  # octets in a TLS record (RFC 8446 section 5.1)


class TlsError(Exception):
    """TLS can not be had; the text says why, in words for an administrator."""


class Unavailable(TlsError):
    """The same, before the client was told to begin.

    `what` is netqmail's word for it and `reason` a short one: these the client may know.
    """

    def __init__(self, what: bytes, reason: str, remedy: str = "") -> None:
        super().__init__(f"{SERVER_CERTIFICATE}: {reason}{remedy}")
        self.what = what
        self.reason = reason


def check() -> None:
    """See that servercert.pem has a certificate and its key; raises Unavailable."""
    text = _read_certificate()
    if b"-----BEGIN CERTIFICATE-----" not in text:
        raise Unavailable(_NO_CERTIFICATE, "no certificate in it")
    if b"PRIVATE KEY-----" not in text:
        raise Unavailable(_NO_KEY, "no private key in it", "; append the key to the certificate")
    if b"-----BEGIN ENCRYPTED" in text or b"Proc-Type: 4,ENCRYPTED" in text:
        raise Unavailable(_NO_KEY, "the private key has a passphrase", "; take it off")
    _check_pair()


_NO_CERTIFICATE = b"missing certificate"
_NO_KEY = b"no valid private key"


def _read_certificate() -> bytes:
    try:
        with open(SERVER_CERTIFICATE, "rb") as file:
            return file.read()
    except OSError as error:
        who = f" (uid {os.geteuid()})"
        raise Unavailable(_NO_CERTIFICATE, str(error.strerror), who) from None


def _check_pair() -> None:
    """Let OpenSSL load certificate and key, by the bindings that pyOpenSSL itself uses."""
    from cryptography.hazmat.bindings.openssl.binding import Binding

    lib, ffi = Binding.lib, Binding.ffi
    path = SERVER_CERTIFICATE.encode()
    context = ffi.gc(lib.SSL_CTX_new(lib.TLS_method()), lib.SSL_CTX_free)

    def reason() -> str:
        code = lib.ERR_get_error()
        lib.ERR_clear_error()
        return ffi.string(lib.ERR_reason_error_string(code)).decode() if code else "unknown error"

    if not lib.SSL_CTX_use_certificate_chain_file(context, path):
        raise Unavailable(_NO_CERTIFICATE, reason())
    if not lib.SSL_CTX_use_PrivateKey_file(context, path, lib.SSL_FILETYPE_PEM):
        raise Unavailable(_NO_KEY, reason(), "; is it the key of the first certificate in it?")


class Context:
    """What handshakes are made with: certificate, ciphers, and whom to ask for a certificate.

    `ciphers` are OpenSSL cipher strings, or none for the default; `ask_client` tells whether a
    client certificate is asked for, `resumable` whether clients are given session tickets, which is
    of use where the context outlives the connection.  `warnings` lists what was wrong and left out.
    """

    def __init__(self, ciphers: Sequence[bytes], ask_client: bool, resumable: bool = False) -> None:
        from OpenSSL import SSL

        self.warnings: list[str] = []
        context = self.ssl = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_options(
            SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE
        )
        if ask_client or not resumable:
            # A resumed session does not have its certificate looked at again.
            context.set_options(SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_session_id(b"qmail-smtpd")
        try:
            context.use_certificate_chain_file(SERVER_CERTIFICATE)
            context.use_privatekey_file(SERVER_CERTIFICATE)
        except SSL.Error as error:
            raise TlsError(f"{SERVER_CERTIFICATE}: {_reason(error)}") from None
        self._choose_ciphers(ciphers)
        self._load_dh_parameters()
        if ask_client:
            self._ask_for_certificate()

    def _choose_ciphers(self, ciphers: Sequence[bytes]) -> None:
        """Set the ciphers of TLS 1.2, and those of TLS 1.3 where some are named."""
        from OpenSSL import SSL

        names = [name for text in ciphers for name in text.split(b":") if name]
        suites = [name for name in names if name.startswith(b"TLS_")]
        others = [name for name in names if not name.startswith(b"TLS_")]
        self.ssl.set_cipher_list(CIPHERS)
        try:
            if others:
                self.ssl.set_cipher_list(b":".join(others))
            if suites:
                self.ssl.set_tls13_ciphersuites(b":".join(suites))
        except SSL.Error:
            text = b":".join(names).decode("latin-1")
            self.warnings.append(f"no such ciphers: {text}; check control/tlsserverciphers")

    def _load_dh_parameters(self) -> None:
        from OpenSSL import SSL

        if os.path.exists(DH_PARAMETERS):
            try:
                self.ssl.load_tmp_dh(DH_PARAMETERS)
            except SSL.Error as error:
                self.warnings.append(f"{DH_PARAMETERS}: {_reason(error)}")

    def _ask_for_certificate(self) -> None:
        """Ask clients for a certificate of one of our authorities."""
        from OpenSSL import SSL

        try:
            self.ssl.load_verify_locations(CLIENT_AUTHORITIES)
            self.ssl.load_client_ca(CLIENT_AUTHORITIES.encode())
        except SSL.Error as error:
            self.warnings.append(f"{CLIENT_AUTHORITIES}: {_reason(error)}")
            return
        if os.path.exists(REVOCATIONS):
            try:
                self._load_revocations()
            except (OSError, ValueError, SSL.Error) as error:
                # Who was revoked is not known: nobody's certificate can count.
                self.warnings.append(f"{REVOCATIONS}: {error}; no client certificate counts")
                return
        self.ssl.set_verify(SSL.VERIFY_PEER, _note_problem)

    def _load_revocations(self) -> None:
        from cryptography import x509
        from OpenSSL import crypto

        with open(REVOCATIONS, "rb") as file:
            lists = file.read().split(_END_OF_LIST)[:-1]
        if not lists:
            raise ValueError("no certificate revocation list in it")
        store = self.ssl.get_cert_store()
        assert store is not None  # a context has one
        for text in lists:
            store.add_crl(x509.load_pem_x509_crl(text + _END_OF_LIST))
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)


_END_OF_LIST = b"-----END X509 CRL-----"

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
"""What a verify error means (openssl-verification-options(1), X509_STORE_CTX_get_error(3))."""


def _note_problem(connection: Any, certificate: Any, code: int, depth: int, ok: int) -> bool:
    """Note what is wrong with a client certificate, and let the handshake go on."""
    if not ok:
        problem = _VERIFY_ERRORS.get(code, f"certificate verify error {code}")
        connection.get_app_data().append(problem)
    return True


class CachedContexts:
    """Contexts for a process that serves many connections: made anew where a file has changed."""

    def __init__(self) -> None:
        self._contexts: dict[tuple[object, ...], tuple[object, Context]] = {}

    def get(self, ciphers: Sequence[bytes], ask_client: bool) -> Context:
        """The context; raises TlsError."""
        seen = [signature(path) for path in _FILES]
        key = (*ciphers, ask_client)
        cached = self._contexts.get(key)
        if cached is not None and cached[0] == seen:
            return cached[1]
        check()
        context = Context(ciphers, ask_client, resumable=True)
        _rehearse(context)
        self._contexts[key] = seen, context
        return context


class Channel:
    """One connection's TLS, on octets in memory.

    `ended` is empty until the peer ended TLS or broke it, and then says how.
    """

    def __init__(self, context: Context) -> None:
        from OpenSSL import SSL

        self._errors = SSL
        self._connection = SSL.Connection(context.ssl, None)
        self._problems: list[str] = []  # of the client certificate
        self._connection.set_app_data(self._problems)
        self._connection.set_accept_state()
        self._up = False
        self.ended = ""

    def feed(self, data: bytes) -> None:
        """Take in what came from the peer."""
        self._connection.bio_write(data)

    def pending(self) -> bytes:
        """What is to be sent to the peer."""
        pieces = []
        try:
            while True:
                pieces.append(self._connection.bio_read(65536))
        except self._errors.WantReadError:
            return b"".join(pieces)

    def handshake(self) -> bool:
        """Go on with the handshake: True when it is complete; raises TlsError."""
        try:
            self._connection.do_handshake()
        except self._errors.WantReadError:
            return False
        except self._errors.Error as error:
            raise TlsError(_reason(error)) from None
        self._up = True
        return True

    def read(self) -> bytes:
        """What the peer said, as far as it has come; empty where more is to be fed, or it ended."""
        pieces = []
        try:
            while True:
                pieces.append(self._connection.recv(_RECORD))
        except self._errors.WantReadError:
            pass
        except self._errors.ZeroReturnError:
            self.ended = "hung up"
        except self._errors.Error as error:
            self.ended = f"TLS: {_reason(error)}"
        return b"".join(pieces)

    def write(self, data: bytes) -> bytes:
        """The data, encrypted."""
        self._connection.sendall(data)
        return self.pending()

    def close(self) -> bytes:
        """The words that end TLS, if it was on."""
        if self._up:
            try:
                self._connection.shutdown()
            except self._errors.Error:
                pass  # broken already
        return self.pending()

    def cipher(self) -> str:
        """The name of the cipher, as OpenSSL has it."""
        return self._connection.get_cipher_name() or "unknown"

    def facts(self) -> dict[str, object]:
        """What was negotiated, for the log."""
        address, problem = self._client_certificate()
        return {
            "version": self._connection.get_protocol_version_name(),
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
        if self._problems:
            return None, self._problems[0]
        from cryptography.x509.oid import NameOID

        try:
            subject = certificate.to_cryptography().subject
        except ValueError:
            return None, "malformed"
        for attribute in subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS):
            return str(attribute.value), ""
        return None, "contains no email address"


def _rehearse(context: Context) -> None:
    """Make a handshake with ourselves, in memory: what OpenSSL sets up at its first one is then
    there, and shared, in every process forked after it.
    """
    from OpenSSL import SSL

    server = Channel(context)
    client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    client.set_connect_state()
    try:
        for _ in range(3):  # TLS 1.3 needs two turns, TLS 1.2 three
            try:
                client.do_handshake()
            except SSL.WantReadError:
                pass
            server.feed(client.bio_read(65536))
            if server.handshake():
                return
            client.bio_write(server.pending())
    except (SSL.Error, TlsError):
        pass  # ciphers that our own client does not have, perhaps: others may


def _reason(error: Exception) -> str:
    """OpenSSL's words for an error of pyOpenSSL."""
    reasons = [entry[-1] for entry in (error.args[0] if error.args else []) if entry]
    return "; ".join(filter(None, reasons)) or "connection ended"
