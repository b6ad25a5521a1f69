"""The fixtures of the end-to-end tests; a test module names this one in `pytest_plugins`."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from .certificates import Certificate
from .checking import Checked
from .letter import NO_CRAM_USER, PASSWORD, USER, odd_letter
from .programs import need, prepare
from .service import NAME, Home, Service


@pytest.fixture(scope="session")
def programs():
    """The directory with our programs."""
    # Not one of pytest's, into which the mail user could not look.
    with TemporaryDirectory(prefix="qmail-bin-") as directory:
        Path(directory).chmod(0o755)
        yield prepare(Path(directory))


@pytest.fixture(scope="session")
def users_file(programs, tmp_path_factory):
    """The text of a users file that qmail-smtpd-users made."""
    path = tmp_path_factory.mktemp("users") / "smtpusers"
    for user, options in ((USER, ["--cram"]), (NO_CRAM_USER, [])):
        subprocess.run(
            [programs / "qmail-smtpd-users", "--file", path, "set", "--stdin", *options, user],
            input=PASSWORD.encode() + b"\n",
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )
    return path.read_bytes()


@pytest.fixture(scope="session")
def authority():
    """The authority that clients trust."""
    return Certificate("Test Root", authority=True)


@pytest.fixture(scope="session")
def trusted(authority, tmp_path_factory):
    """A file with the certificate of the authority, for clients."""
    path = tmp_path_factory.mktemp("authority") / "root.pem"
    path.write_bytes(authority.pem)
    return path


@pytest.fixture(scope="session")
def server_certificate(authority):
    """The certificate of the service."""
    return Certificate(NAME, issuer=authority)


@pytest.fixture
def home(programs, users_file, server_certificate):
    """A qmail home with a certificate and a users file."""
    made = Home(programs)
    made.control("smtpusers", users_file, 0o640)
    made.certificate(server_certificate.key_pem + server_certificate.chain)
    yield made
    made.remove()


@pytest.fixture
def start(home):
    """Start a service on the home, with the arguments of Service; it is stopped after the test."""
    with ExitStack() as stack:

        def start_service(**options):
            return stack.enter_context(Service(home, **options))

        yield start_service


@pytest.fixture
def check(programs):
    """The embedded check program."""
    return programs / "checkpassword-users"


@pytest.fixture
def letter(tmp_path):
    """A message that is hard to send; see odd_letter."""
    return odd_letter(tmp_path / "letter")


# For qmail-smtpd-check


@pytest.fixture(scope="session")
def long_authority():
    """An authority that is valid for long enough."""
    return Certificate("Check Root", authority=True, days=900)


@pytest.fixture(scope="session")
def long_certificate(long_authority):
    """A certificate of it that has nothing wrong."""
    return Certificate(NAME, issuer=long_authority, days=90)


@pytest.fixture
def checked(programs):
    """A home with nothing wrong in it, to be checked; without TLS, which takes time."""
    need("tcprules")
    home = Home(programs)
    yield Checked(home)
    home.remove()


@pytest.fixture
def tls(checked, long_certificate):
    """A certificate for that home."""
    checked.home.certificate(long_certificate.key_pem + long_certificate.chain)
