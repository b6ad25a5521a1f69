"""TLS: what is negotiated, with which certificate, and whom to ask for one.

What needs OpenSSL stands in this module, in `certificates` and in `channel`, and all three import
it late.  Importing it takes far longer than all else that the program does, so it happens in two
steps: `certificates.check` needs the bindings alone, and after it 220 can be promised; `Context`
needs all of pyOpenSSL, and is made while 220 travels to the client and its first message comes
back.

Policy: TLS 1.2 and up, forward secrecy and authenticated encryption, no compression, no
renegotiation; a client that says by ALPN that it speaks another protocol is turned away (RFC 7301).
Client certificates are asked for in the first handshake and never required: a handshake succeeds
without one, and with one that does not verify.
"""

from __future__ import annotations

import os
from typing import NamedTuple  # which pyOpenSSL imports anyway

from . import certificates
from .certificates import BY_NAME, SERVER_CERTIFICATE, TlsError
from .channel import Channel, ClientChannel, note_problem, reason
from .control import signature

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .control import ControlFiles

CLIENT_AUTHORITIES = "control/clientca.pem"
REVOCATIONS = "control/clientcrl.pem"
DH_PARAMETERS = "control/dh2048.pem"

CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"
"""The ciphers of TLS 1.2 where nobody chose others; DHE counts where there is dh2048.pem."""

_SEPARATORS = b":, ;"  # openssl-ciphers(1)
_OPERATORS = b"!-+@"  # likewise; a word with one of them adds no cipher


class Policy(NamedTuple):
    """What handshakes are like, by the administrator's choice.

    `ciphers` are OpenSSL cipher strings, or none for the default; `minimum` is the oldest version
    of TLS, b"1.2" or b"1.3", or None for the default, which is 1.2; `ask_client` tells whether a
    client certificate is asked for, `resumable` whether clients are given session tickets, which is
    of use where the context outlives the connection.
    """

    ciphers: tuple[bytes, ...] = ()
    minimum: bytes | None = None
    ask_client: bool = False
    resumable: bool = False


class Context:
    """What handshakes are made with: a policy, and the certificate in a file.

    `warnings` lists what was wrong and left out.  Raises TlsError where nothing could be done with
    the certificate.
    """

    def __init__(self, policy: Policy, certificate: str = SERVER_CERTIFICATE) -> None:
        from OpenSSL import SSL

        self._library = SSL
        self.warnings: list[str] = []
        context = self.ssl = SSL.Context(SSL.TLS_SERVER_METHOD)
        # No order of ours: all ciphers are good, and the client knows which it has hardware for.
        context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
        if policy.ask_client or not policy.resumable:
            # A resumed session does not have its certificate looked at again.
            context.set_options(SSL.OP_NO_TICKET)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # of a connection that is idle
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_session_id(b"qmail-smtpd")
        self._choose_versions(policy.minimum)
        self._load_certificates(certificate)
        context.set_cipher_list(CIPHERS)
        if policy.ciphers:
            self._choose_ciphers(policy.ciphers)
        self._load_dh_parameters()
        if policy.ask_client:
            self._ask_for_certificate()
        context.set_alpn_select_callback(_choose_protocol)
        if certificate == SERVER_CERTIFICATE and os.path.exists(BY_NAME):
            named = NamedContexts(policy, self.warnings)
            context.set_tlsext_servername_callback(named.choose)

    def channel(self) -> Channel:
        """The server's end of a connection."""
        return Channel(self._library, self.ssl)

    def _choose_versions(self, minimum: bytes | None) -> None:
        versions = {
            None: self._library.TLS1_2_VERSION,
            b"1.2": self._library.TLS1_2_VERSION,
            b"1.3": self._library.TLS1_3_VERSION,
        }
        if minimum not in versions:
            text = (minimum or b"").decode("latin-1")
            self.warnings.append(f"tlsminversion: {text}: neither 1.2 nor 1.3; 1.2 is in force")
            minimum = None
        self.ssl.set_min_proto_version(versions[minimum])

    def _load_certificates(self, path: str) -> None:
        """Load the certificate, and that beside it which has a key of another type, if any."""
        self._load(path)
        beside = certificates.second(path)
        if not os.path.exists(beside):
            return
        try:
            certificates.check(beside)
            if certificates.same_type(path, beside):
                raise TlsError(f"{beside}: its key is of the same type as that in {path}")
            self._load(beside)
        except TlsError as error:
            self.warnings.append(f"{error}; left out")

    def _load(self, path: str) -> None:
        try:
            self.ssl.use_certificate_chain_file(path)
            self.ssl.use_privatekey_file(path)
        except self._library.Error as error:
            raise TlsError(f"{path}: {reason(error)}") from None

    def _choose_ciphers(self, ciphers: Sequence[bytes]) -> None:
        """Set the ciphers of TLS 1.2, and those of TLS 1.3.

        Without one of TLS 1.3 its default stays.  Without one of TLS 1.2 it is not spoken: who
        chose ciphers is not to get others.
        """
        older, newer, unknown = sort_ciphers(ciphers)
        source = "tlsserverciphers"
        self.warnings += [f"{source}: no such cipher: {_text(name)}; left out" for name in unknown]
        if newer:
            _set_suites(self.ssl, b":".join(newer))
        try:
            self.ssl.set_cipher_list(b":".join(older))
        except self._library.Error:
            self.ssl.set_cipher_list(CIPHERS)
            self.ssl.set_min_proto_version(self._library.TLS1_3_VERSION)
            if older or not newer:
                text = f"no ciphers of TLS 1.2 in {_text(b':'.join(ciphers))}"
                self.warnings.append(f"{source}: {text}; TLS 1.3 alone is served")

    def _load_dh_parameters(self) -> None:
        if os.path.exists(DH_PARAMETERS):
            try:
                certificates.read(DH_PARAMETERS)
                self.ssl.load_tmp_dh(DH_PARAMETERS)
            except (TlsError, self._library.Error) as error:
                self.warnings.append(_told_of(DH_PARAMETERS, error))

    def _ask_for_certificate(self) -> None:
        """Ask clients for a certificate of one of our authorities."""
        try:
            text = certificates.read(CLIENT_AUTHORITIES)
            self.ssl.load_verify_locations(CLIENT_AUTHORITIES)
            if certificates.can_be_named(text):
                self.ssl.load_client_ca(CLIENT_AUTHORITIES.encode())
            else:
                what = "too many authorities to name them to clients, who may show any certificate"
                self.warnings.append(f"{CLIENT_AUTHORITIES}: {what}")
        except (TlsError, self._library.Error) as error:
            self.warnings.append(_told_of(CLIENT_AUTHORITIES, error))
            return
        if signature(REVOCATIONS) is not None:  # one that can not be reached is there
            try:
                self._load_revocations()
            except (TlsError, ValueError) as error:
                # Who was revoked is not known: nobody's certificate can count.
                why = _told_of(REVOCATIONS, error)
                self.warnings.append(f"{why}; no client certificate counts")
                return
        self.ssl.set_verify(self._library.VERIFY_PEER, note_problem)

    def _load_revocations(self) -> None:
        from OpenSSL import crypto

        store = self.ssl.get_cert_store()
        assert store is not None  # a context has one
        # First of all: a connection that another context asks for a certificate can come to this
        # one (NamedContexts), where without a list nobody's is to count.
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
        lists = certificates.revocation_lists(certificates.read(REVOCATIONS))
        if not lists:
            raise ValueError("no certificate revocation list in it")
        try:
            for revoked in lists:
                store.add_crl(revoked)
        except crypto.Error as error:
            raise ValueError(reason(error)) from None


def _told_of(path: str, error: Exception) -> str:
    """What to tell of a file: our own words have its name, a library's have not."""
    if isinstance(error, TlsError):
        return str(error)
    return f"{path}: {error if isinstance(error, ValueError) else reason(error)}"


def sort_ciphers(ciphers: Sequence[bytes]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The words of cipher strings: those of TLS 1.2 and older, those of TLS 1.3, and those that
    OpenSSL does not know, which it would pass over in silence.
    """
    from OpenSSL import SSL

    def is_known(set_ciphers: Any, word: bytes) -> bool:
        try:
            set_ciphers(scratch, word)
        except SSL.Error:
            return False
        return True

    scratch = SSL.Context(SSL.TLS_SERVER_METHOD)
    older: list[bytes] = []
    newer: list[bytes] = []
    unknown: list[bytes] = []
    text = b":".join(ciphers).translate(bytes.maketrans(_SEPARATORS, b":" * len(_SEPARATORS)))
    for word in filter(None, text.split(b":")):
        if word[0] in _OPERATORS:
            older.append(word)  # it takes away, or puts in order: no harm if there is none
        elif is_known(SSL.Context.set_cipher_list, word):
            older.append(word)
        # After those: OpenSSL 3 takes a cipher of TLS 1.2 by its name in the registry here, too.
        elif word.startswith(b"TLS_") and is_known(_set_suites, word):
            newer.append(word)
        else:
            unknown.append(word)
    return older, newer, unknown


def _set_suites(context: Any, names: bytes) -> None:
    """Set the ciphers of TLS 1.3; raises Error.  Before 25.2.0 pyOpenSSL could not."""
    from OpenSSL import SSL

    if hasattr(context, "set_tls13_ciphersuites"):
        context.set_tls13_ciphersuites(names)
        return
    from cryptography.hazmat.bindings.openssl.binding import Binding

    if not Binding.lib.SSL_CTX_set_ciphersuites(context._context, names):
        Binding.lib.ERR_clear_error()
        raise SSL.Error


def _choose_protocol(connection: Any, offered: list[bytes]) -> bytes:
    """The protocol among those that the client names by ALPN (RFC 7301 section 3.2).

    A client that is led here by somebody in between, and believes to speak another protocol with
    another server of the same certificate, must not get through the handshake.
    """
    if b"smtp" in offered:
        return b"smtp"
    names = ", ".join(_text(name) for name in offered)
    raise TlsError(f"no application protocol: the client wants {names}, and this is smtp")


def _text(octets: bytes) -> str:
    return octets.decode("latin-1")


class NamedContexts:
    """The contexts for names that clients ask for (RFC 6066 section 3), kept while their files are
    the same; at most so many, as memory goes into each.
    """

    MOST = 100

    def __init__(self, policy: Policy, told: Sequence[str] = ()) -> None:
        self._policy = policy
        self._told = told  # of the default, so that nobody has to hear of it again
        self._kept: dict[str, tuple[object, Context | None, list[str]]] = {}

    def choose(self, connection: Any) -> None:
        """Called by OpenSSL in the middle of a handshake: give it the context for the name."""
        warnings = connection.get_app_data().warnings
        try:
            name = connection.get_servername()
            context = self.get(name, warnings) if name else None
            if context is not None:
                connection.set_context(context.ssl)
        except Exception as error:  # a defect; what is raised here OpenSSL would not understand
            warnings.append(f"{BY_NAME}: {type(error).__name__}; the default is served")

    def get(self, name: bytes, warnings: list[str]) -> Context | None:
        """The context for a name, or None where the default has to do; `warnings` is added to."""
        for path in certificates.named(name):
            seen = signature(path), signature(certificates.second(path))
            if seen[0] is not None:
                if path not in self._kept or self._kept[path][0] != seen:
                    self._keep(path, seen)
                _, context, wrong = self._kept[path]
                warnings += wrong
                return context
        return None

    def _keep(self, path: str, seen: object) -> None:
        context = None
        try:
            certificates.check(path)
            context = Context(self._policy, path)
            wrong = [text for text in context.warnings if text not in self._told]
        except TlsError as error:
            wrong = [f"{error}; the default is served"]
        except MemoryError:  # nothing may be raised into OpenSSL
            wrong = [f"{path}: out of memory; the default is served"]
        self._kept.pop(path, None)
        if len(self._kept) >= self.MOST:
            del self._kept[next(iter(self._kept))]  # the oldest
        self._kept[path] = seen, context, wrong


class CachedContexts:
    """Contexts for a process that serves many connections: made anew where a file has changed since
    the connection began; where clients are asked for certificates, since the last handshake.
    """

    def __init__(self) -> None:
        self._contexts: dict[Policy, tuple[object, Context]] = {}

    def get(self, policy: Policy, files: ControlFiles) -> Context:
        """The context for a policy; raises TlsError."""
        if policy.ask_client:  # what is revoked counts no more, however long the client was here
            seen = tuple(map(signature, _PATHS))
        else:
            seen = tuple(map(files.seen, _FILES))
        cached = self._contexts.get(policy)
        if cached is not None and cached[0] == seen:
            return cached[1]
        certificates.check()
        context = Context(policy)
        _rehearse(context)
        self._contexts[policy] = seen, context
        return context


_SERVERS = (SERVER_CERTIFICATE, certificates.second(SERVER_CERTIFICATE), DH_PARAMETERS, BY_NAME)
_PATHS = (*_SERVERS, CLIENT_AUTHORITIES, REVOCATIONS)
"""What a context is made of: files, and a directory, which changes when the first name is there."""

_FILES = tuple(map(os.path.basename, _SERVERS))
"""The same as control files, where clients are not asked."""


def _rehearse(context: Context) -> None:
    """Make a handshake with ourselves, in memory: what OpenSSL sets up at its first one is then
    there, and shared, in every process forked after it.
    """
    server, client = context.channel(), ClientChannel()
    try:
        for _ in range(3):  # TLS 1.3 needs two turns, TLS 1.2 three
            client.handshake()
            server.feed(client.pending())
            if server.handshake():
                return
            client.feed(server.pending())
    except TlsError:
        pass  # ciphers that our own client does not have, perhaps: others may
