"""TLS sessions are resumed, whichever worker has the client the second time, where it is safe."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from conformance.cases import FIXTURES
from conformance.stage import Stage
from e2e.programs import need
from listener.listening import ADDRESS, PATIENCE, Listening, eventually
from listener.mail import quit_, send_message
from listener.peers import compile_rules
from listener.world import address

pytestmark = pytest.mark.tls
pytest_plugins = ["listener.fixtures"]

VERSIONS = ["1.2", "1.3"]


class OpenSSL:
    """`openssl s_client` at a listener: what it keeps of a session, and whether that is resumed."""

    def __init__(self, listener: Listening, version: str, directory: Path) -> None:
        (self._program,) = need("openssl")
        self._listener = listener
        self._version = version
        self._session = directory / "session"

    def connect(self, *options: str) -> tuple[bool, str]:
        """Whether the session was resumed, and the server's words under TLS."""
        keep = ["-sess_out", self._session]
        if self._session.exists():
            keep += ["-sess_in", self._session]
        command = [self._program, "s_client", "-starttls", "smtp", "-ign_eof"]
        command += ["-connect", f"{ADDRESS}:{self._listener.port}"]
        command += [f"-tls{self._version.replace('.', '_')}", *keep, *options]
        lines = [b"EHLO x", b"MAIL FROM:<a@example.com>", b"RCPT TO:<u@elsewhere.example>", b"QUIT"]
        ended = subprocess.run(
            command,
            input=b"".join(line + b"\r\n" for line in lines),
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        text = ended.stdout.decode()
        found = re.search(rf"^(New|Reused), TLSv{self._version}, ", text, re.M)
        assert found, text
        return found[1] == "Reused", text

    def resumes(self) -> bool:
        """Whether the session of one connection is resumed by the next."""
        self._session.unlink(missing_ok=True)
        assert self.connect()[0] is False
        return self.connect()[0]


def ask_for_certificates(mx: Stage) -> None:
    mx.control({"clientca.pem": "@client-ca.pem", "tlsclients": "alice@clients.example\n"})


@pytest.mark.parametrize("version", VERSIONS)
def test_by_another_worker(mx: Stage, tmp_path: Path, version: str) -> None:
    with Listening(mx, "--max-use=1") as listener:
        client = OpenSSL(listener, version, tmp_path)
        assert client.resumes()
        assert client.connect()[0], "a second time"
        assert len({worker for worker, _ in listener.ends(3)}) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_not_where_there_are_no_tickets(mx: Stage, tmp_path: Path, version: str) -> None:
    mx.environment({"TLSTICKETS": "0"})
    with Listening(mx, "-c", "1") as listener:
        OpenSSL(listener, version, tmp_path).connect()
        assert not (tmp_path / "session").exists()


def test_variables_of_the_library_reach_no_child(mx: Stage) -> None:
    mx.environment({"TLSTICKETS": "0"})
    with Listening(mx, "-c", "1") as listener:
        client = listener.greeted()
        send_message(client)
        quit_(client)
    (delivery,) = mx.deliveries()
    assert "OPENSSL_CONF" not in delivery.environ


@pytest.mark.parametrize("version", VERSIONS)
def test_not_where_client_certificates_are_asked_for(
    mx: Stage, tmp_path: Path, version: str
) -> None:
    ask_for_certificates(mx)
    with Listening(mx, "-c", "1") as listener:
        assert not OpenSSL(listener, version, tmp_path).resumes()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_certificate_counts_in_its_own_connection(
    mx: Stage, tmp_path: Path, version: str
) -> None:
    """And not in a later one that is resumed without it."""
    ask_for_certificates(mx)
    path = str(FIXTURES / "client-alice.pem")
    with Listening(mx, "-c", "1") as listener:
        client = OpenSSL(listener, version, tmp_path)
        _, text = client.connect("-cert", path, "-key", path)
        assert text.count("250 ok") == 2, "alice may relay"
        resumed, text = client.connect()
        assert not resumed
        assert "rcpthosts" in text


@pytest.mark.parametrize("version", VERSIONS)
def test_not_from_a_client_that_is_asked_for_none(
    mx: Stage, tmp_path: Path, version: str
) -> None:
    """A session that was begun without a certificate is no way round being asked for one."""
    friend = address()
    ask_for_certificates(mx)
    rules = compile_rules(tmp_path / "rules.cdb", f'{friend}:allow,RELAYCLIENT=""\n')
    with Listening(mx, "-c", "1", "-x", str(rules)) as listener:
        client = OpenSSL(listener, version, tmp_path)
        client.connect("-bind", f"{friend}:0")
        assert client.connect("-bind", f"{friend}:0")[0]
        assert not client.connect()[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_not_after_another_certificate_was_put_there(
    mx: Stage, tmp_path: Path, version: str
) -> None:
    with Listening(mx, "-c", "1") as listener:
        client = OpenSSL(listener, version, tmp_path)
        assert client.resumes()
        mx.control({"servercert.pem": "@server-ecdsa.pem"})
        assert not client.connect()[0]
        assert client.resumes()


@pytest.mark.parametrize("how", ["USR2", "HUP", "age"])
def test_not_for_ever(mx: Stage, tmp_path: Path, how: str) -> None:
    """The keys of the tickets are new after a restart, and after some time."""
    age = ["--max-age=2"] if how == "age" else []
    with Listening(mx, "-c", "1", "--max-use=1", *age) as listener:
        client = OpenSSL(listener, "1.3", tmp_path)
        assert client.resumes()
        if how != "age":
            listener.signal(signal.SIGUSR2 if how == "USR2" else signal.SIGHUP)
        eventually(lambda: not client.connect()[0], "a session is not resumed")
        assert client.connect()[0]
