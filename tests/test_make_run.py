"""make run, as somebody who is not root types it in a fresh checkout, and what it says to type."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance.program import ROOT
from e2e.programs import mail_user, need

INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
NOT_CHECKED_IN = (".git", ".venv", ".run", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of this checkout that is the mail user's own."""
    with tempfile.TemporaryDirectory(prefix="checkout-") as name:
        directory = Path(name) / "checkout"
        shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(*NOT_CHECKED_IN))
        if os.getuid() == 0:
            for path in (directory.parent, *directory.parent.rglob("*")):
                os.chown(path, mail_user().pw_uid, mail_user().pw_gid)
        yield directory


def as_mail_user(*command: object) -> list[str]:
    """The command, with the rights of the mail user under root."""
    if os.getuid() == 0:
        (setpriv,) = need("setpriv")
        ids = [f"--reuid={mail_user().pw_uid}", f"--regid={mail_user().pw_gid}"]
        command = (setpriv, *ids, "--clear-groups", "--", *command)
    return [str(word) for word in command]


def environ(checkout: Path) -> dict[str, str]:
    """The environment of the user's shell."""
    kept = {name: text for name, text in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    return {**kept, "PATH": os.environ["PATH"], "HOME": str(checkout.parent)}


class Running:
    """`make run`, from its start until Ctrl-C; `said` is what it said before it took mail."""

    def __init__(self, checkout: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        system = os.environ.get("SYSTEM", "")  # as `make test` was given it
        make = ("make", "run", f"PORT={self.port}", f"PYTHON={INTERPRETER}", f"SYSTEM={system}")
        self._process = subprocess.Popen(
            as_mail_user(*make),
            cwd=checkout,
            env=environ(checkout),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout
        self._output = self._process.stdout
        self.said = ""
        for line in self._output:
            self.said += line
            if line.startswith("What qmail-smtpd has to say"):
                break

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGINT)

    def end(self, number: int) -> None:
        """Press Ctrl-C, or the like; all that it started has ended when its output has."""
        if self._output.closed:
            return
        os.killpg(self._process.pid, number)
        self.log = self._output.read()
        self._output.close()
        self._process.wait()

    def command(self, first: str) -> str:
        """A command that it said to type: from the line that begins with this to an empty one."""
        found = re.search(rf"^{first}.*?(?=^$)", self.said, re.M | re.S)
        assert found, self.said
        return found[0]


def test_what_it_says_to_type_sends_a_message(checkout: Path) -> None:
    need("make", "openssl", "swaks")
    with Running(checkout) as running:
        wait_for_port(running.port)
        python = running.command("python3 ").replace("python3", INTERPRETER, 1)
        for command in (running.command("swaks "), python):
            subprocess.run(
                as_mail_user("sh", "-c", command), cwd=checkout, env=environ(checkout), check=True
            )
    assert running.log.count(" mail ip=127.0.0.1 result=accepted ") == 2
    assert running.log.count(" auth ip=127.0.0.1 result=ok ") == 2
    assert "Traceback" not in running.log
    delivered = [path.read_text() for path in (checkout / ".run/Maildir/new").iterdir()]
    assert len(delivered) == 2
    for text in delivered:
        assert text.startswith("Return-Path: <me@example.org>\nEnvelope-To: you@example.net\n")
        assert "encrypted, authenticated)" in text
    assert any("Subject: first\n" in text for text in delivered)
    assert str(checkout / ".run/Maildir/new") in running.said

    with Running(checkout) as again:
        wait_for_port(again.port)
        with socket.create_connection(("127.0.0.1", again.port)) as waiting:
            assert waiting.recv(100) == b"220 localhost ESMTP\r\n"
            again.end(signal.SIGTERM)  # it does not wait for a client that does nothing
            assert waiting.recv(100) == b""
    for log in (running.log, again.log):
        assert "qmail-smtpd-listen: stopping: " in log
        assert "Traceback" not in log
    password = re.compile(r"whose password is (\w+)")
    assert password.findall(again.said) == password.findall(running.said)


def wait_for_port(port: int) -> None:
    """Connect until it is there: the program says what to type a moment before."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
    raise TimeoutError(port)
