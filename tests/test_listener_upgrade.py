"""A listener whose files are gone, as those of the version before the last are: once it serves, it
needs them no more.
"""

from __future__ import annotations

import base64
import ssl
import sys
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.stage import Stage
from e2e.certificates import Certificate
from listener.listening import Listening
from listener.mail import authenticate, quit_, send_message

pytestmark = pytest.mark.tls
pytest_plugins = ["listener.fixtures"]

LISTENER = """
import os, sys

def tell(event, arguments):
    if event == "import":
        os.write(2, b"a worker imports %s\\n" % arguments[0].encode())

os.register_at_fork(after_in_child=lambda: sys.addaudithook(tell))

from qmail_smtpd_py.listener import main
sys.exit(main())
"""
"""A program that tells of each module that is looked for behind the fork."""

NAMED = "mail.example.net"

VERSIONS = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


class Clients:
    """A client certificate, and an authority that control files name, which has revoked others."""

    def __init__(self, mx: Stage, directory: Path) -> None:
        authority = Certificate("authority", authority=True)
        mine = Certificate("client", issuer=authority, email="client@example.org")
        self._file = directory / "client.pem"
        self._file.write_bytes(mine.key_pem + mine.chain)
        revoked = Certificate("revoked", issuer=authority)
        mx.control(
            {
                "clientca.pem": authority.pem.decode(),
                "clientcrl.pem": authority.revoke(revoked).decode(),
                "tlsclients": "client@example.org\n",
            }
        )

    def start_tls(self, client: Client, version: ssl.TLSVersion) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = version
        context.load_cert_chain(self._file)
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.handshake(context, NAMED) == "ok"


def renew(mx: Stage, path: str, is_whole: bool = True) -> None:
    made, other = Certificate("renewed"), Certificate("other", "RSA-2048")
    place = mx.home / "control" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes((made if is_whole else other).key_pem + made.chain)


def cram(client: Client) -> None:
    assert (client.command(b"AUTH CRAM-MD5") or "").startswith("334 ")
    answer = base64.b64encode(b"joe " + b"0" * 32)
    assert client.command(answer) == "235 ok, go ahead (#2.0.0)"


def test_what_sessions_need_is_there_before_the_first(mx: Stage, tmp_path: Path) -> None:
    clients = Clients(mx, tmp_path)
    mx.environment(
        {
            "AUTHFAILTABLE": str(tmp_path / "failures"),
            "SMTPAUTH": "+cram",
            "SMTPTRACE": "=log",
            "TLSHELPER": str(tmp_path / "none"),
        }
    )
    command = (sys.executable, "-I", "-c", LISTENER)
    with Listening(mx, "-c", "1", "-h", "--max-use=1000", command=command) as listener:
        for version in VERSIONS:
            client = listener.greeted()
            clients.start_tls(client, version)
            authenticate(client)
            send_message(client)
            quit_(client)
            client = listener.greeted()
            clients.start_tls(client, version)
            assert client.command(b"MAIL FROM:<a@example.com>") == "250 ok"
            assert client.command(b"RCPT TO:<user@elsewhere.example>") == "250 ok"
            assert client.command(b"RCPT TO:<user@[127.0.0.1]>") == "250 ok"
            quit_(client)
            renew(mx, "servercert.pem")
            renew(mx, f"servercerts/{NAMED}/servercert.pem")
        cram(client := listener.greeted())
        quit_(client)
        renew(mx, f"servercerts/{NAMED}/servercert.pem", is_whole=False)
        clients.start_tls(client := listener.greeted(), VERSIONS[1])
        quit_(client)
        renew(mx, "servercert.pem", is_whole=False)
        client = listener.greeted()
        assert (client.command(b"STARTTLS") or "").startswith("454 ")
        mx.plan("checkpassword", {"exit": 1})
        assert (client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=") or "").startswith("535 ")
        quit_(client)
        assert len({worker for worker, _ in listener.ends(7)}) == 1
    late = [line.split()[3] for line in listener.log.lines() if "a worker imports" in line]
    assert late == []
