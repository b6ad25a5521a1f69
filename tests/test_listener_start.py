"""How a listener starts: where it listens, whose rights it keeps, what stops it from starting."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.stage import Stage
from conformance.transport import SocketConnection
from e2e.programs import need
from listener.listening import (
    ADDRESS,
    PATIENCE,
    USUAL,
    Listening,
    children,
    eventually,
    free_port,
    listening_on,
    octet_environment,
    program,
    refusal,
    without,
)
from listener.mail import authenticate, quit_, send_message
from listener.world import address, need_root, taken_port


@pytest.fixture
def mx(stage: Stage) -> Stage:
    """A host that takes mail for example.org."""
    stage.control({"me": "mx.example.org\n", "rcpthosts": "example.org\n"})
    return stage


def says_hello(listener: Listening) -> bool:
    return listener.greeted().command(b"QUIT") == "221 mx.example.org"


PR_CAPBSET_DROP, CAP_SETGID = 24, 6  # prctl(2), capabilities(7)

FATAL = "qmail-smtpd-listen: fatal: "

# Where


@pytest.mark.parametrize(
    "host, local, remote",
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("0", "0.0.0.0", "127.0.0.1"),
        ("", "0.0.0.0", "127.0.0.1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "::1"),
        ("::", "::", "127.0.0.1"),
        ("::", "::", "::1"),
    ],
)
def test_host(mx: Stage, host: str, local: str, remote: str) -> None:
    with Listening(mx, host=host) as listener:
        listener.address = remote
        assert says_hello(listener)  # it has rehearsed, on a port of its own
        assert {address for address, _ in listening_on(listener.pid)} == {local}
        listener.log.wait_for(rf": pid \d+ from {remote}$")
        client = listener.greeted()
        send_message(client)
    [delivery] = mx.deliveries()
    assert delivery.environ["TCPREMOTEIP"] == delivery.environ["TCPLOCALIP"] == remote
    assert delivery.environ["PROTO"] == ("TCP6" if ":" in remote else "TCP")
    assert "(HELO mx.example.org)" not in delivery.read[0].decode()


def test_who_reads_the_port_comes_to_an_end(mx: Stage) -> None:
    """As tcpserver, it keeps descriptors 0 and 1 from nobody."""
    with Listening(mx) as listener:
        assert listener._process.stdout
        assert listener._process.stdout.read() == b""
        for pid in (listener.pid, *listener.workers):
            files = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1)]
            assert files == [os.devnull] * 2


def test_the_port_is_not_told_before_rights_are_given_up(mx: Stage) -> None:
    need_root()

    def lose_rights() -> None:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SETGID)

    ended = subprocess.run(
        [*program(), "-1", "-u", "65534", "-g", "65534", "127.0.0.1", "0"],
        capture_output=True,
        check=False,
        timeout=PATIENCE,
        preexec_fn=lose_rights,
    )
    assert (ended.returncode, ended.stdout) == (111, b"")
    assert b"cannot become gid 65534: Operation not permitted" in ended.stderr


def test_port_by_name(mx: Stage) -> None:
    need_root()
    with Listening(mx, host=address(), port="smtp") as listener:
        assert listener.port == 25
        assert says_hello(listener)


# What stops it


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["127.0.0.1"],
        ["-z", "127.0.0.1", "0"],
        ["-V", "127.0.0.1", "0"],
        ["-c", "many", "127.0.0.1", "0"],
        ["-c", "0", "127.0.0.1", "0"],
        ["-b", "-1", "127.0.0.1", "0"],
        ["-t", "soon", "127.0.0.1", "0"],
        ["-u", "nobody", "127.0.0.1", "0"],
        ["-g", "-1", "127.0.0.1", "0"],
        ["-u", "-1", "127.0.0.1", "0"],
        ["-U", "127.0.0.1", "0"],
        ["-c"],
        ["--max-use=0", "127.0.0.1", "0"],
        ["--max-age=-1", "127.0.0.1", "0"],
        ["--max-age=0", "127.0.0.1", "0"],
        ["--drain=9999999", "127.0.0.1", "0"],
        ["-c", "999999999999", "127.0.0.1", "0"],
        ["-c", "9" * 5000, "127.0.0.1", "0"],
        ["--idle=99999999", "127.0.0.1", "0"],
        ["--drain=nan", "127.0.0.1", "0"],
        ["--proxy-from=10.0.0.1/8", "127.0.0.1", "0"],
        ["--proxy-from=", "127.0.0.1", "0"],
        ["--no-such-option", "127.0.0.1", "0"],
        ["--daemon=yes", "127.0.0.1", "0"],
        ["--helper=", "127.0.0.1", "0"],
        ["--helper=socket", "127.0.0.1", "0"],
        ["--helper=socket", "-1"],
        ["--helper=socket", "-x", "rules.cdb"],
        ["--helper=socket", "--proxy-from=10.0.0.0/8"],
        ["--pid-file=pid", "127.0.0.1", "0"],
        ["--log-file=log", "127.0.0.1", "0"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_is_wrong(mx: Stage, words: list[str]) -> None:
    status, text = refusal(mx, *words)
    assert status == 100
    lines = text.splitlines()
    assert lines[0].startswith("qmail-smtpd-listen: fatal: ")
    assert "usage: qmail-smtpd-listen [tcpserver's options]" in text


@pytest.mark.parametrize(
    "words, why",
    [
        (["-U"], "-U: UID is not set"),
        (["-u", ""], "-u: empty, not a number"),
        (["-t", "soon"], "-t soon: not a number of seconds"),
        (["--helper="], "--helper: the name of a file is missing"),
        (["--log-file=log"], "--pid-file and --log-file need --daemon"),
    ],
)
def test_what_is_wrong_with_a_command_line(mx: Stage, words: list[str], why: str) -> None:
    _, text = refusal(mx, *words, "127.0.0.1", "0")
    assert text.splitlines()[0] == f"qmail-smtpd-listen: fatal: {why}"


def test_help() -> None:
    done = subprocess.run([*program(), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: qmail-smtpd-listen [tcpserver's options]")
    assert not done.stderr


@pytest.mark.parametrize("megabytes", [14, 18, 25, *range(29, 39)])
def test_too_little_memory(mx: Stage, megabytes: int) -> None:
    """Whatever it is not enough for: there are words for it, and not a traceback."""
    mx.control({"servercert.pem": "@server-rsa.pem"})
    limit = f"ulimit -v {megabytes * 1000}; exec timeout 1.5 \"$@\""
    command = [*program(), "-R", "-H", "127.0.0.1", "0"]
    done = subprocess.run(
        ["sh", "-c", limit, "sh", *command],
        env=octet_environment(mx),
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert b"Traceback" not in done.stderr or b"Fatal Python error" in done.stderr
    if done.returncode == 111:
        assert b"is the memory limit too low?" in done.stderr


@pytest.mark.parametrize(
    "host, port, why",
    [
        ("127.0.0.1", "no-such-service", "there is no such port"),
        ("127.0.0.1", "70000", "there is no such port"),
        ("127.0.0.1", "-1", ""),
        ("127.0.0.1", "+2525", "there is no such port"),
        ("127.0.0.1", " 2525", "there is no such port"),
        ("no.such.host.invalid", "0", ""),
        ("a..b", "0", ""),
        (64 * "x" + ".example", "0", ""),
        ("h\udcff", "0", "this is no name"),
        ("192.0.2.1", "0", "Cannot assign requested address"),
    ],
)
def test_an_address_that_can_not_be(mx: Stage, host: str, port: str, why: str) -> None:
    status, text = refusal(mx, "-1", host, port)
    assert status == 111
    shown = host.encode("utf-8", "backslashreplace").decode()
    assert text.startswith(f"{FATAL}cannot listen on {shown} port {port}: {why}")
    assert text.count("\n") == 1


def test_a_digit_that_is_none(mx: Stage) -> None:
    status, text = refusal(mx, "127.0.0.1", "\N{SUPERSCRIPT TWO}")
    assert status == 111
    assert text.endswith(": there is no such port\n")


def test_a_port_that_is_taken(mx: Stage) -> None:
    with taken_port("127.0.0.1") as port:
        status, text = refusal(mx, "127.0.0.1", str(port))
    why = "Address already in use"
    assert text == f"qmail-smtpd-listen: fatal: cannot listen on 127.0.0.1 port {port}: {why}\n"
    assert status == 111


def test_a_successor_of_nobody(mx: Stage) -> None:
    mx.environment({"QMAIL_SMTPD_LISTEN": "x"})
    status, text = refusal(mx, "127.0.0.1", "0")
    assert status == 111
    assert text == f"{FATAL}QMAIL_SMTPD_LISTEN is not what a listener leaves its successor\n"


@pytest.mark.parametrize("given", [None, os.devnull], ids=["nothing", "a file"])
def test_a_socket_from_systemd_that_is_none(mx: Stage, given: str | None) -> None:
    words = ["127.0.0.1", "0"]
    there = f"exec 3<{given}; " if given else ""
    script = f'{there}LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *program(), *words],
        env=octet_environment(mx),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 111
    assert done.stderr.startswith("qmail-smtpd-listen: fatal: descriptor 3 was to be a socket: ")


def test_a_socket_from_systemd_that_is_a_connection(mx: Stage) -> None:
    """As with Accept=yes: the listener is not for that."""
    script = 'exec 3<&0; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()), server.accept()[0] as connection:
        done = subprocess.run(
            ["sh", "-c", script, "sh", *program(), "127.0.0.1", "0"],
            env=octet_environment(mx),
            stdin=connection,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    assert done.returncode == 111
    assert done.stderr == f"{FATAL}descriptor 3: no listening socket; is it Accept=yes?\n"


@pytest.mark.parametrize(
    ("port", "why"),
    [("1" * 5000, "cannot listen on 127.0.0.1 port 111"), ("", "the port is empty")],
    ids=["long", "empty"],
)
def test_a_port_that_is_none(mx: Stage, port: str, why: str) -> None:
    status, text = refusal(mx, "127.0.0.1", port)
    assert status in (100, 111)
    assert why in text.partition("\n")[0]


def test_a_successor_of_nobody_that_counts_far(mx: Stage) -> None:
    mx.environment({"QMAIL_SMTPD_LISTEN": "9" * 20 + ",1"})
    status, text = refusal(mx, "127.0.0.1", "0")
    assert status == 111
    assert text.endswith("was to be a socket: there is no such descriptor\n")


def test_a_home_that_is_not_there(mx: Stage, tmp_path: Path) -> None:
    mx.environment({"QMAILHOME": str(tmp_path / "nowhere")})
    status, text = refusal(mx, "127.0.0.1", "0")
    assert status == 111
    assert f"fatal: cannot change to {tmp_path}/nowhere: No such file or directory" in text


# Descriptors


def test_nothing_that_was_inherited_is_passed_on(mx: Stage, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of whoever started the listener")
    mx.arguments("@checkpassword", "@true")
    mx.environment({"SMTPAUTH": "", "FORCETLS": "0"})
    with secret.open() as file, Listening(mx, pass_fds=[file.fileno()]) as listener:
        client = listener.greeted()
        authenticate(client)
        send_message(client)
    for record in (*mx.deliveries(), *mx.checks()):
        known = {0, 1, 2, 3} if 3 in record.read else {0, 1, 2}
        assert {
            number for number, what in record.descriptors.items() if "/proc/" not in what
        } == known
        assert str(secret) not in record.descriptors.values()


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_descriptors_that_are_not_there(mx: Stage, closed: list[int]) -> None:
    """Nothing of ours, such as a connection that then gets the log, takes their numbers."""
    mx.arguments("@checkpassword", "@true")
    mx.environment({"SMTPAUTH": "", "FORCETLS": "0"})
    port = free_port()
    started = subprocess.Popen(
        without(closed, *program(), "-R", "-H", "127.0.0.1", str(port), *mx.args),
        env=octet_environment(mx),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: is_listening(port), "it listens")
        client = Client(SocketConnection(socket.create_connection(("127.0.0.1", port))))
        assert client.reply() == "220 mx.example.org ESMTP"
        authenticate(client)
        send_message(client)
        quit_(client)
        for pid in (started.pid, *children(started.pid)):
            for number in range(3):
                assert "socket:" not in os.readlink(f"/proc/{pid}/fd/{number}")
    finally:
        started.send_signal(signal.SIGQUIT)
        assert started.wait(PATIENCE) == 0


def test_a_port_that_nobody_can_be_told(mx: Stage) -> None:
    port = free_port()
    with open("/dev/full", "wb") as full:
        started = subprocess.Popen(
            [*program(), *USUAL, "127.0.0.1", str(port)],
            env=octet_environment(mx),
            stdout=full,
            stderr=subprocess.DEVNULL,
        )
    try:
        eventually(lambda: is_listening(port), "it listens")
    finally:
        started.send_signal(signal.SIGQUIT)
        assert started.wait(PATIENCE) == 0


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# A socket that systemd has opened (sd_listen_fds(3))

ACTIVATE = """
import os, socket, sys
number = int(sys.argv[1])
os.dup2(number, 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2], LISTEN_FDNAMES="smtp")
os.execv(sys.argv[3], sys.argv[3:])
"""


def activated(server: socket.socket, sockets: int = 1) -> tuple[str, ...]:
    """What starts a listener as systemd does."""
    return (sys.executable, "-IS", "-c", ACTIVATE, str(server.fileno()), str(sockets))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_socket_that_is_there_already(mx: Stage, restarts: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = activated(server)
        with Listening(mx, port=0, before=before, pass_fds=[server.fileno()]) as listener:
            assert listener.port == server.getsockname()[1]
            for _ in range(restarts):
                listener.signal(signal.SIGUSR2)
                listener.log.wait_for(r": restarting$")
            client = listener.greeted()
            send_message(client)
            quit_(client)
            listener.signal(signal.SIGTERM)
            assert listener.wait() == 0
        told = mx.deliveries()[0].environ.keys()
        assert not {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} & told
        # It is systemd's, and still good: connections wait in it for the next listener.
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()


def test_more_sockets_than_one(mx: Stage) -> None:
    """Are not left to clients who would wait in them in vain."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = [*activated(server, 2), *program(), ADDRESS, "0"]
        ended = subprocess.run(
            words,
            env=octet_environment(mx),
            pass_fds=[server.fileno()],
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    why = b"fatal: systemd has 2 sockets for us: a listener has one"
    assert (ended.returncode, ended.stderr) == (111, b"qmail-smtpd-listen: " + why + b"\n")


class Activated(Listening):
    """A listener behind the real systemd-socket-activate, which starts it for its first client."""

    def __init__(self, stage: Stage) -> None:
        (activate,) = need("systemd-socket-activate")
        self.address = ADDRESS
        with socket.create_server((ADDRESS, 0)) as free:
            self.port = free.getsockname()[1]
        kept = [f"--setenv={name}" for name in stage.env]
        words = [activate, f"--listen={ADDRESS}:{self.port}", *kept, *program(), *USUAL]
        self._start(stage, [*words, ADDRESS, str(self.port), *stage.args], {})
        self.log.wait_for(r"^Listening on ")


def test_behind_systemd_socket_activate(mx: Stage) -> None:
    with Activated(mx) as listener:
        for _ in range(2):
            client = listener.greeted()
            send_message(client)
            quit_(client)
            listener.signal(signal.SIGUSR2)
            listener.log.wait_for(r": restarting$")
        listener.signal(signal.SIGTERM)
        assert listener.wait() == 0
    assert len(mx.deliveries()) == 2
