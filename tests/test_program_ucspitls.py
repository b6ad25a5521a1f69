"""TLS by the program that starts ours: sslserver -n, with UCSPI-TLS, and sslserver -s."""

from __future__ import annotations

import os
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator

import pytest
from conformance.cases import FIXTURES
from conformance.client import Client
from conformance.program import Program, under_test
from conformance.stage import Stage
from conformance.transport import SocketConnection

MAIL = [b"MAIL FROM:<a@example.com>", b"RCPT TO:<u@example.org>", b"DATA"]
PLAIN = b"AUTH PLAIN AGpvZQBzZWNyZXQ="


class Sslserver:
    """What sslserver -n is for one connection: it keeps the connection itself, and gives the
    program a control socket and two pipes; at Y it makes the handshake, and tells of it.

    `answer` makes the answer to Y of the variables, or None to refuse.
    """

    def __init__(self, stage: Stage, answer=None, environ=()) -> None:
        self.commands = b""
        self._answer = answer or (lambda variables: variables + b"\0")
        ours, self._network = socket.socketpair()
        self.client = Client(SocketConnection(ours))
        self._control, control = socket.socketpair()
        read_fd, self._to_program = os.pipe()
        self._from_program, write_fd = os.pipe()
        numbers = {"SSLCTLFD": control.fileno(), "SSLREADFD": read_fd, "SSLWRITEFD": write_fd}
        env = {**stage.env, **{name: str(number) for name, number in numbers.items()}}
        self._process = subprocess.Popen(
            [*under_test(), *stage.args],
            stdin=self._network,
            stdout=self._network,
            stderr=subprocess.PIPE,
            env={**env, **dict(environ)},
            pass_fds=tuple(numbers.values()),
        )
        control.close()
        os.close(read_fd)
        os.close(write_fd)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.commands = self._control.recv(1)
            if self.commands:
                self._start_tls()
        except OSError:
            pass  # the client is gone
        finally:
            self._control.close()
            os.close(self._to_program)
            os.close(self._from_program)
            self._network.close()

    def _start_tls(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(FIXTURES / "server-ecdsa.pem")
        with context.wrap_socket(self._network.dup(), server_side=True) as tls:
            cipher, _, _ = tls.cipher()
            told = f"SSL_PROTOCOL={tls.version()}\0SSL_CIPHER={cipher}\0PATH=/\0SSL_X=a=b\0"
            answer = self._answer(told.encode())
            if answer is None:
                return
            self._control.sendall(answer)
            self._copy(tls)

    def _copy(self, tls: ssl.SSLSocket) -> None:
        while True:
            ready = [tls] if tls.pending() else select.select([tls, self._from_program], [], [])[0]
            if tls in ready:
                data = tls.recv(65536)
                if not data:
                    return
                os.write(self._to_program, data)
            if self._from_program in ready:
                data = os.read(self._from_program, 65536)
                if not data:
                    tls.unwrap()
                    return
                tls.sendall(data)

    def end(self) -> tuple[int, str]:
        """The exit status of the program, and its log."""
        self.client.connection.close()
        _, log = self._process.communicate(timeout=20)
        self._thread.join(20)
        return self._process.returncode, log.decode()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self.end()


@pytest.fixture
def mx(host: Stage) -> Stage:
    """A host of its own without a certificate, as sslserver has one."""
    (host.home / "control" / "servercert.pem").unlink()
    host.environment({"FORCETLS": "1"})
    return host


@pytest.fixture
def started(mx: Stage) -> Iterator:
    servers = []

    def start(**how: object) -> Sslserver:
        servers.append(Sslserver(mx, **how))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def starttls(client: Client) -> str:
    assert client.reply() == "220 mx.example.org ESMTP"
    offered = client.command(b"EHLO clear.example.com")
    assert "STARTTLS" in offered
    assert "AUTH" not in offered
    assert client.command(b"STARTTLS") == "220 ready for tls"
    return client.start_tls()


def send_message(client: Client) -> None:
    answers = [client.command(line) for line in MAIL]
    assert answers == ["250 ok", "250 ok", "354 go ahead"]
    assert client.command(b"\r\ntext\r\n.").startswith("250 ok ")


def test_a_message_with_authentication(mx: Stage, started) -> None:
    """All that was said in clear is forgotten, and the session is one under TLS."""
    server = started()
    client = server.client
    assert starttls(client) == "ok"
    assert client.command(b"STARTTLS") == "502 unimplemented (#5.5.1)"
    assert client.command(PLAIN) == "235 ok, go ahead (#2.0.0)"
    send_message(client)
    assert client.command(b"QUIT") == "221 mx.example.org"
    status, log = server.end()
    assert status == 0
    assert server.commands == b"Y"
    assert f"result=ok version=TLSv1.3 cipher={client.cipher}" in log
    (delivery,) = mx.deliveries()
    received = delivery.read[0].decode()
    assert f"with ESMTPSA ({client.cipher} encrypted, authenticated)" in received
    assert "HELO" not in received, "what was said in clear"


def test_children(mx: Stage, started) -> None:
    """They have the variables that tell of TLS, and none of the descriptors."""
    server = started()
    assert starttls(server.client) == "ok"
    server.client.command(PLAIN)
    send_message(server.client)
    server.client.command(b"QUIT")
    server.end()
    (delivery,) = mx.deliveries()
    (check,) = mx.checks()
    for child in (delivery, check):
        assert child.environ["SSL_PROTOCOL"] == "TLSv1.3"
        assert child.environ["SSL_X"] == "a=b"
        assert child.environ.get("PATH") == mx.env.get("PATH")
        assert set(child.descriptors) <= {0, 1, 2, 3, 4, 6}


def test_smtps(mx: Stage, started) -> None:
    """TLS at once is asked for in the same way."""
    mx.environment({"SMTPS": "1"})
    client = started().client
    assert client.start_tls() == "ok"
    assert client.reply() == "220 mx.example.org ESMTP"
    assert client.command(b"EHLO a").count("AUTH") == 1


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_an_answer_in_pieces_and_a_long_one(mx: Stage, started, pieces: int) -> None:
    long = b"SSL_CLIENT_CERT=" + b"x" * 100_000 + b"\0"
    server = started(answer=lambda told: told + (long if pieces == 1000 else b"") + b"\0")
    if pieces != 1000:
        server._control = InPieces(server._control, pieces)
    assert starttls(server.client) == "ok"
    assert server.client.command(b"NOOP") == "250 ok"


class InPieces:
    """A socket that sends its data in pieces."""

    def __init__(self, inner: socket.socket, size: int) -> None:
        self._inner, self._size = inner, size

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def sendall(self, data: bytes) -> None:
        for at in range(0, len(data), self._size):
            self._inner.sendall(data[at : at + self._size])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda told: None, "refused by who started us, whose log may say why"),
        (lambda told: told[:-1], "refused by who started us, whose log may say why"),
        (lambda told: b"\0\0", "SSL_PROTOCOL: unknown is not TLS 1.2 or newer"),
        (lambda told: b"SSL_PROTOCOL=TLSv1.1\0\0", "SSL_PROTOCOL: TLSv1.1 is not TLS 1.2 or newer"),
        (lambda told: b"SSL_PROTOCOL=SSLv3\0\0", "SSL_PROTOCOL: SSLv3 is not TLS 1.2 or newer"),
        (lambda told: b"SSL_X=" + b"x" * (1 << 20), "no end of variables on SSLCTLFD"),
    ],
)
def test_an_answer_that_is_none_ends_the_session(mx: Stage, started, answer, why: str) -> None:
    def then_hang_up(told: bytes) -> bytes | None:
        said = answer(told)
        if said is not None:
            server._control.sendall(said)
        return None

    server = started(answer=then_hang_up)
    starttls(server.client)
    status, log = server.end()
    assert status == 1
    assert f'result=failed why="UCSPI-TLS: {why}"' in log
    assert "Traceback" not in log


def test_what_came_in_clear_behind_starttls_is_no_command(mx: Stage, started) -> None:
    server = started()
    client = server.client
    assert client.reply() == "220 mx.example.org ESMTP"
    client.send(b"STARTTLS\r\nRSET\r\nMAIL FROM:<evil@example.com>\r\n")
    assert client.reply() == "220 ready for tls"
    assert client.start_tls() == "ok"
    assert client.command(b"RCPT TO:<u@example.org>") == "503 MAIL first (#5.5.1)"


def test_disabletls(mx: Stage, started) -> None:
    mx.environment({"DISABLETLS": "1"})
    client = started().client
    client.reply()
    assert "STARTTLS" not in client.command(b"EHLO a")
    assert client.command(b"STARTTLS") == "502 unimplemented (#5.5.1)"


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"SSLREADFD": "900"}, "SSLREADFD is not the number of an open descriptor"),
        ({"SSLWRITEFD": "9" * 30}, "SSLWRITEFD is not the number of an open descriptor"),
        ({"SSLCTLFD": "x"}, "SSLCTLFD is not the number of a descriptor of its own"),
        ({"SSLCTLFD": "1"}, "SSLCTLFD is not the number of a descriptor of its own"),
        ({"SSLREADFD": ""}, "SSLREADFD is not the number of a descriptor of its own"),
    ],
)
def test_descriptors_that_are_none(mx: Stage, started, environ: dict, why: str) -> None:
    """Nor are any taken for them that happen to have their numbers later."""
    server = started(environ=environ)
    server.client.reply()
    assert "STARTTLS" not in server.client.command(b"EHLO a")
    send_message(server.client)
    server.client.command(b"QUIT")
    status, log = server.end()
    assert status == 0
    assert log.count(f'error ip=192.0.2.25 why="no UCSPI-TLS: {why}"') == 1
    assert server.commands == b""


# TLS that is there already


def encrypted(mx: Stage, **environ: str) -> Program:
    mx.environment(environ)
    return Program(mx)


@pytest.mark.parametrize("cipher", ["TLS_AES_256_GCM_SHA384", ""])
def test_sslserver_s(mx: Stage, cipher: str) -> None:
    """With what sslserver leaves of UCSPI-TLS, and an SMTPS that is still in the run file."""
    left = {"SSLCTLFD": "5", "SSLREADFD": "6", "SSLWRITEFD": "7", "SMTPS": "1", "REQUIRETLS": "1"}
    with encrypted(mx, SSL_PROTOCOL="TLSv1.3", SSL_CIPHER=cipher, **left) as program:
        client = program.client
        assert client.reply() == "220 mx.example.org ESMTP"
        offered = client.command(b"EHLO a")
        assert "STARTTLS" not in offered
        assert "AUTH LOGIN PLAIN CRAM-MD5" in offered
        assert client.command(b"STARTTLS") == "502 unimplemented (#5.5.1)"
        assert client.command(PLAIN) == "235 ok, go ahead (#2.0.0)"
        send_message(client)
        client.command(b"QUIT")
        assert program.wait() == 0
    name = cipher or "TLSv1.3"
    assert f"tls ip=192.0.2.25 result=ok cipher={name}\n" in program.log.decode()
    (delivery,) = mx.deliveries()
    assert f"with ESMTPSA ({name} encrypted, authenticated)" in delivery.read[0].decode()


@pytest.mark.parametrize("protocol", ["", "SSLv3", "TLSv1", "TLSv1.1", "unknown", "tlsv1.3"])
def test_what_is_no_tls_of_ours_is_clear(mx: Stage, protocol: str) -> None:
    """It fails towards asking for TLS."""
    with encrypted(mx, SSL_PROTOCOL=protocol, SSL_CIPHER="RC4-MD5") as program:
        program.client.reply()
        assert "AUTH" not in program.client.command(b"EHLO a")
        answer = program.client.command(PLAIN)
        assert answer == "538 auth not available without TLS (#5.3.3)"
    assert mx.checks() == []
