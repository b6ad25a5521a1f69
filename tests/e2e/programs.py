"""Which programs there are: ours, which are tested, and those of others, which test it.

QMAIL_SMTPD names the installed PREFIX/bin/qmail-smtpd; the embedded programs are its neighbours.
Where it is unset, the programs of the checkout run with the interpreter of the tests.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = (
    "qmail-smtpd",
    "qmail-smtpd-listen",
    "qmail-queue-maildir",
    "checkpassword-users",
    "qmail-smtpd-users",
    "qmail-smtpd-check",
)

_PLACES = ("/usr/sbin", "/usr/lib/postfix/sbin", "/usr/libexec/postfix")


def lack(what):
    """Skip the test because of what this host has not; in CI nothing may be lacking."""
    if os.environ.get("CI"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def find(command):
    """The path of a command, or None."""
    return shutil.which(command, path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


def need(*commands):
    """The paths of the commands, all of which the test needs."""
    paths = [find(command) for command in commands]
    absent = [command for command, path in zip(commands, paths) if path is None]
    if absent:
        lack(f"not on this host: {', '.join(absent)}")
    return paths


def mail_user():
    """Whose rights the service has: nobody's under root, otherwise those of the tests."""
    return pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def prepare(directory):
    """The directory with our programs: PREFIX/bin, or `directory` with launchers for the checkout.

    Skips the tests if the mail user could not start those of the checkout.
    """
    installed = os.environ.get("QMAIL_SMTPD")
    if installed:
        bin_directory = Path(installed).resolve().parent
    else:
        bin_directory = directory
        for name in OURS:
            _write_launcher(directory / name, CHECKOUT / "bin" / name)
    _check_startable(bin_directory / "qmail-smtpd")
    return bin_directory


def _write_launcher(path, program):
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I {program} "$@"\n')
    path.chmod(0o755)


def _check_startable(program):
    """See that the mail user can start it: it greets, or says that there is no qmail home."""
    started = as_mail_user([program], env={"QMAILHOME": "/nonexistent", "PATH": os.defpath})
    if not started.stdout.startswith(b"421 "):
        why = started.stderr.decode(errors="replace").strip()
        what = f"{mail_user().pw_name} cannot start {program}: {why}"
        if os.environ.get("QMAIL_SMTPD"):
            pytest.fail(what, pytrace=False)
        lack(f"{what}; QMAIL_SMTPD can name one that is installed")


def as_mail_user(command, **options):
    """Run a command with the rights of the mail user, without input."""
    if os.getuid() == 0:
        user = mail_user()
        (setpriv,) = need("setpriv")
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        command = [setpriv, *ids, "--", *command]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False, **options
    )
