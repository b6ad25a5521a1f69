"""The clients, each as one call that ends with the session.

What they print comes back whole, with the status that they ended with: it is theirs to say whether
a message was taken.  A client that hangs is killed, and fails the test.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .conversation import Conversation
from .letter import HELO, RECIPIENT, SENDER
from .programs import lack, need
from .service import ADDRESS

_PATIENCE = 100  # seconds for the longest session
_SMTPLIB_CLIENT = Path(__file__).with_name("smtplib_client.py")


class Run(NamedTuple):
    """What a client said, standard error included, and how it ended."""

    status: int
    output: str


def run(command, timeout=_PATIENCE, **options):
    """Run a client to its end, for which it has `timeout` seconds."""
    ended = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
        **{"stdin": subprocess.DEVNULL, **options},
    )
    return Run(ended.returncode, ended.stdout.decode(errors="backslashreplace"))


def swaks(service, *options):
    """swaks; options given here come after, and so before, the usual ones."""
    (program,) = need("swaks")
    server = ["--server", ADDRESS, "--port", service.port, "--timeout", 60]
    envelope = ["--ehlo", HELO, "--from", SENDER, "--to", RECIPIENT]
    return run([program, *server, *envelope, *options])


def swaks_data(letter):
    """swaks's options for a letter, octet for octet.

    By itself it would put an empty line behind it, so it is given what DATA is to send (RFC 5321
    section 4.5.2).
    """
    wire = letter.path.with_suffix(".wire")
    wire.write_bytes((b"\r\n" + letter.sent).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n")
    return ["--no-data-fixup", "--data", f"@{wire}"]


def swaks_auth(mechanism, user, password):
    """swaks's options for AUTH."""
    return ["--auth", mechanism, "--auth-user", user, "--auth-password", password]


def curl(service, letter, *options, scheme="smtp", **how):
    """curl, with a letter or, where there is none, what the options say."""
    (program,) = need("curl")
    url = f"{scheme}://{ADDRESS}:{service.port}/{HELO}"
    envelope = ["--mail-from", SENDER, "--mail-rcpt", RECIPIENT]
    envelope += ["--upload-file", letter.path if letter else "-"]
    quiet = ["--disable", "--silent", "--show-error", "--verbose", "--noproxy", "*"]
    return run([program, *quiet, *envelope, "--max-time", 90, *options, url], **how)


def curl_auth(mechanism, user, password):
    """curl's options for AUTH."""
    return ["--login-options", f"AUTH={mechanism}", "--user", f"{user}:{password}"]


def msmtp(service, letter, *options):
    """msmtp, which has the TLS of GnuTLS; without a configuration of anyone's."""
    (program,) = need("msmtp")
    server = [f"--host={ADDRESS}", f"--port={service.port}", f"--domain={HELO}", "--timeout=60"]
    home = {**os.environ, "HOME": str(letter.path.parent)}
    with open(letter.path, "rb") as message:
        command = [program, "--debug", *server, f"--from={SENDER}", *options, "--", RECIPIENT]
        return run(command, env=home, stdin=message)


def msmtp_auth(mechanism, user, password):
    """msmtp's options for AUTH; it asks a command for the password, as it should not be seen."""
    asked = f"--passwordeval=printf %s '{password}'"
    return [f"--auth={mechanism.lower()}", f"--user={user}", asked]


def smtplib(service, letter, interpreter=sys.executable, **options):
    """The smtplib of an interpreter; see smtplib_client.py for the options, and what comes back."""
    usual = {
        "port": service.port,
        "tls": "",
        "version": "",
        "mechanism": "",
        "sender": SENDER,
        "recipients": [RECIPIENT],
        "message": str(letter.path),
    }
    ended = run([interpreter, "-I", _SMTPLIB_CLIENT, json.dumps({**usual, **options})])
    assert ended.status == 0, ended.output
    return json.loads(ended.output)


@functools.cache
def interpreters():
    """An interpreter for each version of Python on this host that we support, by version."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    names = [f"{place}/python3.{minor}" for place in places for minor in range(9, 14)]
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    names += [sys.executable, *glob.glob(f"{root}/versions/3.*/bin/python")]
    # What pyenv has in the path are scripts, which work or not.
    candidates = [name for name in names if os.path.exists(name) and "/shims/" not in name]
    found = {_version(path): path for path in candidates}
    if len(found) < 2:
        lack("no second version of Python on this host")
    return found


def _version(interpreter):
    asked = run([interpreter, "-IS", "-c", "import sys; print(*sys.version_info[:2])"])
    return tuple(map(int, asked.output.split()))


def smtp_source(service, *options):
    """Postfix's smtp-source: as many messages and sessions as the options say, in clear."""
    (program,) = need("smtp-source")
    envelope = ["-f", SENDER, "-t", RECIPIENT, "-M", HELO]
    return run([program, *envelope, *options, f"{ADDRESS}:{service.port}"])


def s_client(service, *options, starttls=True):
    """openssl s_client, to be typed into.

    Without -quiet or -ign_eof, lines that begin with K, Q or R are commands of its own.
    """
    (program,) = need("openssl")
    how = ["-starttls", "smtp", "-name", HELO] if starttls else []
    connect = ["-connect", f"{ADDRESS}:{service.port}", "-crlf"]
    return Conversation([program, "s_client", *how, *connect, *options])


def handshake(service, *options, **how):
    """What s_client says of one handshake, and the cipher that was chosen, or None."""
    with s_client(service, "-ign_eof", *options, **how) as client:
        client.type("QUIT")
        client.end()
    chosen = re.search(rb"^New, .*Cipher is (\(NONE\)|[\w-]+)", client.printed, re.MULTILINE)
    assert chosen, client.printed
    cipher = chosen[1].decode()
    return client.printed.decode(), None if cipher == "(NONE)" else cipher


def netcat(service):
    """nc, to be typed into."""
    (program,) = need("nc")
    return Conversation([program, "-C", ADDRESS, service.port])
