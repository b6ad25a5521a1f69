"""What a session imports: every connection pays for it, so that it is a rule with a test."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from conformance.program import ROOT, Program
from conformance.stage import Stage

# Runs the program, and then tells what it has imported beyond what every interpreter has.
REPORTING = """
import sys
report = sys.argv.pop(1)
sys.path.insert(0, sys.argv.pop(1))
before = set(sys.modules)
from qmail_smtpd_py.smtpd import main
status = main()
names = " ".join(sys.modules.keys() - before)
with open(report, "wb") as file:
    file.write(names.encode())
sys.exit(status)
"""

PLAIN = {
    *("__future__", "select"),
    *("badmailfrom", "cdb", "conduct", "connection", "control", "effects", "lines", "log"),
    *("maildata", "path", "process", "rcpthosts", "reply", "sasl", "session", "settings", "smtpd"),
    *("trace", "transaction", "wire"),
}
"""Connect, EHLO, QUIT; modules of the package without its name."""

MAIL = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<u@example.org>\r\nDATA\r\n\r\nx\r\n.\r\n"


def imported(stage: Stage, dialogue: bytes) -> set[str]:
    """The modules that a session has imported at its end."""
    stage.control({"me": "mx.example.org\n", "rcpthosts": "example.org\n"})
    report = stage.home / "report"
    command = [sys.executable, "-I", "-S", "-c", REPORTING, str(report), str(ROOT)]
    with Program(stage, command=command) as program:
        program.client.send(dialogue + b"QUIT\r\n")
        assert program.client.read_to_end().endswith(b"221 mx.example.org\r\n")
        assert program.wait() == 0
    names = set(report.read_text().split()) - {"qmail_smtpd_py"}
    return {name[len("qmail_smtpd_py.") :] if name.startswith("qmail_") else name for name in names}


def test_a_plain_session(stage: Stage) -> None:
    assert imported(stage, b"EHLO client.example.com\r\n") == PLAIN


def test_a_message(stage: Stage) -> None:
    assert imported(stage, b"EHLO client.example.com\r\n" + MAIL) == PLAIN | {"qmail_queue"}


def test_auth(stage: Stage) -> None:
    stage.environment({"SMTPAUTH": "", "FORCETLS": "0"})
    stage.arguments("@checkpassword", "@true")
    dialogue = b"EHLO client.example.com\r\nAUTH PLAIN AGpvZQBzZWNyZXQ=\r\n" + MAIL
    assert imported(stage, dialogue) == PLAIN | {"qmail_queue", "checkpassword", "binascii"}


def test_an_address_literal_is_what_pays_for_sockets(stage: Stage) -> None:
    names = imported(stage, b"MAIL FROM:<u@[127.0.0.1]>\r\n")
    assert {"localip", "socket"} <= names - PLAIN


@pytest.mark.tls
def test_pyopenssl_is_imported_for_starttls_and_not_before(stage: Stage) -> None:
    code = "import qmail_smtpd_py.tls, sys; sys.exit('OpenSSL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    stage.control({"servercert.pem": "@server-rsa.pem"})
    assert imported(stage, b"EHLO client.example.com\r\n") == PLAIN


@pytest.mark.tls
def test_one_openssl_is_enough(stage: Stage) -> None:
    """Where the interpreter has hashes of its own; elsewhere hashlib could not do without."""
    stage.control({"me": "mx.example.org\n", "servercert.pem": "@server-rsa.pem"})
    with Program(stage) as program:
        client = program.client
        assert client.reply() == "220 mx.example.org ESMTP"
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.start_tls() == "ok"
        maps = Path(f"/proc/{program.pid}/maps").read_text()
        assert client.command(b"QUIT") == "221 mx.example.org"
    assert "_rust" in maps
    assert ("_hashlib" in maps) == ("_sha1" not in sys.builtin_module_names)


@pytest.mark.tls
def test_what_pyopenssl_imports_for_nothing_is_left_out(stage: Stage) -> None:
    """And what is asked for after all is there."""
    program = """
import sys
from qmail_smtpd_py import lean
lean.leave_out()
import OpenSSL.SSL
from cryptography import x509
names = "typing_extensions", "email.utils", "calendar"
print(*(name for name in names if hasattr(sys.modules.get(name), "__file__")))
assert str(x509.RFC822Name("a@example.org").value) == "a@example.org"
import email.utils
assert email.utils.parseaddr("A <a@example.org>") == ("A", "a@example.org")
assert email.utils.formataddr(("A", "a@example.org")) == "A <a@example.org>"
assert email.utils is sys.modules["email.utils"] and email.utils.__file__
import calendar
assert calendar.timegm((1970, 1, 2, 0, 0, 0)) == 86400
if sys.version_info < (3, 13):
    from typing_extensions import Self
    assert sys.modules["typing_extensions"].__file__
try:
    from email.utils import no_such_name
except ImportError:
    pass
lean._StandIn("colorsys")
from colorsys import *
assert rgb_to_hsv(0, 0, 0) == (0, 0, 0)
before = [sys.modules.get(name) for name in names]
lean.leave_out()
assert [sys.modules.get(name) for name in names] == before
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "\n"


def test_what_was_left_out_in_part_is_left_out_later() -> None:
    program = """
import importlib, sys
from qmail_smtpd_py import lean
import_module = importlib.import_module
def fail(name):
    raise MemoryError
importlib.import_module = fail
try:
    lean.leave_out()
    print("it did not fail")
except MemoryError:
    importlib.import_module = import_module
lean.leave_out()
import email.utils
assert email.utils is sys.modules["email.utils"]
print(email.utils.formatdate(0))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "Thu, 01 Jan 1970 00:00:00 -0000\n"


@pytest.mark.tls
@pytest.mark.parametrize("theirs", [None, "/dev/null"])
def test_children_do_not_see_how_openssl_is_configured(stage: Stage, theirs: str | None) -> None:
    """But by an administrator, who then has the tickets that OpenSSL gives by itself."""
    stage.control({"me": "mx.example.org\n", "servercert.pem": "@server-ecdsa.pem"})
    stage.environment({"OPENSSL_CONF": theirs} if theirs else {})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with Program(stage) as program:
        client = program.client
        assert client.reply() == "220 mx.example.org ESMTP"
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.handshake(context) == "ok"
        for line in (b"MAIL FROM:<>", b"RCPT TO:<u@example.org>", b"DATA", b"\r\nx\r\n."):
            assert (client.command(line) or "")[0] in "23"
        assert client.has_ticket is bool(theirs)
        assert client.command(b"QUIT") == "221 mx.example.org"
    (delivery,) = stage.deliveries()
    assert delivery.environ.get("OPENSSL_CONF") == theirs
