"""Records of TLS 1.3 that OpenSSL would not send by itself, made with the keys of its own client
(RFC 8446 sections 5.2 and 7.3).
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from OpenSSL import SSL

APPLICATION_DATA, HANDSHAKE = 23, 22

_SUITES = {"TLS_AES_128_GCM_SHA256": (16, "sha256"), "TLS_AES_256_GCM_SHA384": (32, "sha384")}


class Secrets:
    """What a context's clients agree upon, as OpenSSL tells it."""

    def __init__(self, context: SSL.Context) -> None:
        self._found: dict[str, bytes] = {}
        context.set_keylog_callback(self._note)

    def _note(self, connection: SSL.Connection, line: bytes) -> None:
        label, _, secret = line.decode().split()
        self._found[label] = bytes.fromhex(secret)

    def records(self, cipher: str) -> Records:
        """What seals records as the client would, beginning with the first behind the handshake."""
        return Records(cipher, self._found["CLIENT_TRAFFIC_SECRET_0"])


class Records:
    """Seals records one after the other."""

    def __init__(self, cipher: str, secret: bytes) -> None:
        self._cipher, self._secret = cipher, secret
        self._length, self._hash = _SUITES[cipher]
        self._key = AESGCM(self._expand(b"key", self._length))
        self._iv = self._expand(b"iv", 12)
        self._number = 0

    def seal(self, kind: int, octets: bytes) -> bytes:
        """One record."""
        text = octets + bytes([kind])
        header = b"\x17\x03\x03" + (len(text) + 16).to_bytes(2, "big")
        number = self._number.to_bytes(12, "big")
        self._number += 1
        nonce = bytes(a ^ b for a, b in zip(self._iv, number))
        return header + self._key.encrypt(nonce, text, header)

    def updated(self) -> Records:
        """The same behind a KeyUpdate."""
        length = hashlib.new(self._hash).digest_size
        return Records(self._cipher, self._expand(b"traffic upd", length))

    def _expand(self, label: bytes, length: int) -> bytes:
        """HKDF-Expand-Label, for no more than one block."""
        label = b"tls13 " + label
        info = length.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0\x01"
        return hmac.new(self._secret, info, self._hash).digest()[:length]
