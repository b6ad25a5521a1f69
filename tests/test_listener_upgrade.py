"""A listener whose files are gone, as those of the version before the last are: once it serves, it
needs them no more.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.stage import Stage
from e2e.certificates import Certificate
from listener.listening import Listening
from listener.mail import authenticate, quit_, send_message, start_tls
from listener.world import put

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
BY_NAME = f"servercerts/{NAMED}/servercert.pem"


def put_client_certificate(mx: Stage, path: Path) -> None:
    """Make a client's certificate; control files name its authority, which has revoked others."""
    authority = Certificate("authority", authority=True)
    mine = Certificate("client", issuer=authority, email="client@example.org")
    path.write_bytes(mine.key_pem + mine.chain)
    mx.control(
        {
            "clientca.pem": authority.pem.decode(),
            "clientcrl.pem": authority.revoke(Certificate("revoked", issuer=authority)).decode(),
            "tlsclients": "client@example.org\n",
        }
    )


def broken() -> Certificate:
    """A certificate with the key of another."""
    made = Certificate("broken")
    made.key = Certificate("other").key
    return made


def cram(client: Client) -> None:
    assert (client.command(b"AUTH CRAM-MD5") or "").startswith("334 ")
    answer = base64.b64encode(b"joe " + b"0" * 32)
    assert client.command(answer) == "235 ok, go ahead (#2.0.0)"


def test_what_sessions_need_is_there_before_the_first(mx: Stage, tmp_path: Path) -> None:
    put_client_certificate(mx, tmp_path / "client.pem")
    how = {"sni": NAMED, "cert": str(tmp_path / "client.pem")}
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
        for version in ("1.2", "1.3"):
            client = listener.greeted()
            start_tls(client, max=version, **how)
            authenticate(client)
            send_message(client)
            quit_(client)
            client = listener.greeted()
            start_tls(client, max=version, **how)
            assert client.command(b"MAIL FROM:<a@example.com>") == "250 ok"
            assert client.command(b"RCPT TO:<user@elsewhere.example>") == "250 ok"
            assert client.command(b"RCPT TO:<user@[127.0.0.1]>") == "250 ok"
            quit_(client)
            put(mx, "servercert.pem", Certificate("renewed"))
            put(mx, BY_NAME, Certificate("renewed"))
        cram(client := listener.greeted())
        quit_(client)
        put(mx, BY_NAME, broken())
        start_tls(client := listener.greeted(), **how)
        quit_(client)
        put(mx, "servercert.pem", broken())
        client = listener.greeted()
        assert (client.command(b"STARTTLS") or "").startswith("454 ")
        mx.plan("checkpassword", {"exit": 1})
        assert (client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=") or "").startswith("535 ")
        quit_(client)
        assert len({worker for worker, _ in listener.ends(7)}) == 1
    late = [line.split()[3] for line in listener.log.lines() if "a worker imports" in line]
    assert late == []
