"""The PROXY protocol: headers of any form, and the real haproxy in front of the listener."""

from __future__ import annotations

import ipaddress
import random
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conformance.cdb_writer import make_cdb
from conformance.client import Client
from conformance.stage import Stage
from e2e.programs import need
from listener.listening import ADDRESS, PATIENCE, Listening, Tcp, eventually
from listener.mail import quit_, send_message, start_tls
from listener.peers import compile_rules
from listener.world import address

from qmail_smtpd_py.proxyprotocol import Addresses, Peers, ProxyError, read_header

pytest_plugins = ["listener.fixtures"]

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def v2(
    source: str = "192.0.2.7",
    destination: str = "198.51.100.1",
    ports: tuple[int, int] = (4711, 25),
    command: int = 0x21,
    family: int | None = None,
    rest: bytes = b"",
) -> bytes:
    """A header of version 2; `rest` are the TLVs behind the addresses."""
    ends = [ipaddress.ip_address(text) for text in (source, destination)]
    body = b"".join(end.packed for end in ends)
    body += b"".join(port.to_bytes(2, "big") for port in ports) + rest
    if family is None:
        family = 0x11 if ends[0].version == 4 else 0x21
    return SIGNATURE + bytes([command, family]) + len(body).to_bytes(2, "big") + body


V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n"
V1_IPV6 = b"PROXY TCP6 2001:db8::7 2001:DB8:0:0::1 4711 25\r\n"
TLVS = b"\x03\x00\x04abcd" + b"\x04\x00\x03" + bytes(3) + b"\x20\x00\x05\x01" + bytes(4)

TELLS = {
    "v1": (V1, ("192.0.2.7", 4711, "198.51.100.1", 25)),
    "v1 IPv6": (V1_IPV6, ("2001:db8::7", 4711, "2001:db8::1", 25)),
    "v1 mapped": (
        b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 1 65535\r\n",
        ("192.0.2.7", 1, "198.51.100.1", 65535),
    ),
    "v2": (v2(), ("192.0.2.7", 4711, "198.51.100.1", 25)),
    "v2 IPv6": (v2("2001:db8::7", "2001:db8::1"), ("2001:db8::7", 4711, "2001:db8::1", 25)),
    "v2 mapped": (
        v2("::ffff:192.0.2.7", "::ffff:198.51.100.1"),
        ("192.0.2.7", 4711, "198.51.100.1", 25),
    ),
    "v2 TLVs": (v2(rest=TLVS), ("192.0.2.7", 4711, "198.51.100.1", 25)),
    "v2 as long as can be": (v2(rest=bytes(2036)), ("192.0.2.7", 4711, "198.51.100.1", 25)),
}
"""Headers that tell of a client, and what they tell."""

TELLS_NOT = {
    "v1 UNKNOWN": b"PROXY UNKNOWN\r\n",
    "v1 UNKNOWN with more": b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n",
    "v1 as long as can be": b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n",
    "v2 LOCAL": v2(command=0x20),
    "v2 LOCAL, empty": SIGNATURE + b"\x20\x00\x00\x00",
    "v2 UNSPEC": v2(family=0x00),
    "v2 unix": v2(family=0x31, rest=bytes(204)),
}
"""Headers that tell of none."""

BROKEN = {
    "nothing": b"EHLO client.example.com\r\n",
    "a command": b"PROXY\r\n      ",
    "v1 no family": b"PROXY \r\n",
    "v1 lower case": b"proxy TCP4 192.0.2.7 198.51.100.1 4711 25\r\n",
    "v1 family": b"PROXY TCP5 192.0.2.7 198.51.100.1 4711 25\r\n",
    "v1 UDP": b"PROXY UDP4 192.0.2.7 198.51.100.1 4711 25\r\n",
    "v1 another family": b"PROXY TCP4 2001:db8::7 2001:db8::1 4711 25\r\n",
    "v1 IPv4 for IPv6": b"PROXY TCP6 192.0.2.7 198.51.100.1 4711 25\r\n",
    "v1 two families": b"PROXY TCP4 192.0.2.7 2001:db8::1 4711 25\r\n",
    "v1 no address": b"PROXY TCP4 client.example.com 198.51.100.1 4711 25\r\n",
    "v1 half an address": b"PROXY TCP4 192.0.2 198.51.100.1 4711 25\r\n",
    "v1 zone": b"PROXY TCP6 fe80::7%x 2001:db8::1 4711 25\r\n",
    "v1 our zone": b"PROXY TCP6 2001:db8::7 fe80::1%1 4711 25\r\n",
    "v1 ports": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 65536\r\n",
    "v1 negative": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 -25\r\n",
    "v1 underscore": b"PROXY TCP4 192.0.2.7 198.51.100.1 4_711 25\r\n",
    "v1 too few": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711\r\n",
    "v1 too many": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25 26\r\n",
    "v1 too many, the last none": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25 x\r\n",
    "v1 blank at its end": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25 \r\n",
    "v1 blanks": b"PROXY TCP4  192.0.2.7 198.51.100.1 4711 25\r\n",
    "v1 no CR": b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\n" + 100 * b"x",
    "v1 without end": b"PROXY UNKNOWN " + 200 * b"x",
    "v1 one too long": b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n",
    "v1 octets": b"PROXY TCP4 \xff\xfe \x00 1 2\r\n",
    "v2 version": SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
    "v2 command": v2(command=0x22),
    "v2 short": SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
    "v2 short IPv6": SIGNATURE + b"\x21\x21\x00\x23" + bytes(35),
    "v2 too long": SIGNATURE + b"\x21\x11\xff\xff" + bytes(3000),
    "v2 signature": SIGNATURE[:-1] + b"\r" + v2()[12:],
}


def ends(addresses: Addresses | None) -> tuple[str, int, str, int] | None:
    if addresses is None:
        return None
    found = addresses
    return found.remote_ip, found.remote_port, found.local_ip, found.local_port


class Header:
    """A connection on which octets come, each piece when the one before it was seen."""

    def __init__(self, *pieces: bytes) -> None:
        self._theirs, self.ours = socket.socketpair()
        self.ours.setblocking(False)
        self._pieces = pieces
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        for piece in self._pieces:
            self._theirs.sendall(piece)
            time.sleep(0.002)

    def read(self, seconds: float = PATIENCE) -> tuple[str, int, str, int] | None:
        return ends(read_header(self.ours, seconds))

    def rest(self) -> bytes:
        """What was left behind the header."""
        self._thread.join()
        self._theirs.close()
        octets = b""
        self.ours.setblocking(True)
        while piece := self.ours.recv(65536):
            octets += piece
        return octets

    def __enter__(self) -> Header:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._theirs.close()
        self.ours.close()


# Headers


@pytest.mark.parametrize("header, told", TELLS.values(), ids=TELLS)
def test_who_the_client_is(header: bytes, told: tuple[str, int, str, int]) -> None:
    with Header(header + b"EHLO x\r\n" * 500) as connection:
        assert connection.read() == told
        assert connection.rest() == b"EHLO x\r\n" * 500


@pytest.mark.parametrize("header", TELLS_NOT.values(), ids=TELLS_NOT)
def test_nobody_is_named(header: bytes) -> None:
    with Header(header + b"EHLO x\r\n") as connection:
        assert connection.read() is None
        assert connection.rest() == b"EHLO x\r\n"


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_what_is_no_header(header: bytes) -> None:
    with Header(header + bytes(3000)) as connection, pytest.raises(ProxyError) as caught:
        connection.read()
    assert "in time" not in str(caught.value), "nobody waits for more of it"


@pytest.mark.parametrize("header, told", [TELLS["v1"], TELLS["v1 IPv6"], TELLS["v2 TLVs"]])
@pytest.mark.parametrize("size", [1, 5, 13])
def test_a_header_in_pieces(header: bytes, told: tuple[str, int, str, int], size: int) -> None:
    pieces = [header[at : at + size] for at in range(0, len(header), size)]
    with Header(*pieces) as connection:
        assert connection.read() == told
        assert connection.rest() == b""


@pytest.mark.parametrize("header", [V1, V1_IPV6, v2(rest=TLVS)], ids=["v1", "v1 IPv6", "v2"])
@pytest.mark.parametrize("ends_there", [True, False], ids=["hung up", "silent"])
def test_a_header_that_is_cut_off(header: bytes, ends_there: bool) -> None:
    for size in (0, 1, 5, 6, 11, 12, 15, 16, 20, len(header) - 1):
        with Header(header[:size]) as connection:
            began = time.monotonic()
            if ends_there:
                connection._thread.join()
                connection._theirs.close()
            with pytest.raises(ProxyError):
                connection.read(PATIENCE if ends_there else 0.05)
            assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize("seed", range(4))
def test_any_octets(seed: int) -> None:
    """Either addresses come of them, or nobody, or an error that is ours."""
    chance = random.Random(seed)
    good = [header for header, _ in TELLS.values()] + list(TELLS_NOT.values())
    for _ in range(250):
        octets = bytearray(chance.choice(good))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(octets))
            octets[at] = chance.choice(b"\0\r\n 0:.P\xff\x21" + bytes(octets))
        theirs, ours = socket.socketpair()
        with theirs, ours:
            ours.setblocking(False)
            theirs.sendall(octets)
            theirs.close()
            try:
                found = read_header(ours, 0.02)
            except ProxyError:
                continue
            if found is not None:
                assert all(ipaddress.ip_address(ip) for ip in (found.remote_ip, found.local_ip))
                assert all(0 <= port <= 65535 for port in (found.remote_port, found.local_port))


@pytest.mark.parametrize("text", ["::ffff:192.0.2.10", "::ffff:192.0.2.0/120"])
def test_a_peer_in_ipv6_s_clothes(text: str) -> None:
    peers = Peers(text)
    assert "192.0.2.10" in peers
    assert "192.0.3.10" not in peers
    assert "192.0.2.10" in Peers("::ffff:0:0/96")
    assert "2001:db8::1" not in Peers("::ffff:0:0/96")


def test_peers() -> None:
    peers = Peers("192.0.2.10, 198.51.100.0/24,2001:db8::/32")
    for ip in ("192.0.2.10", "198.51.100.255", "2001:db8:1::1"):
        assert ip in peers
    for ip in ("192.0.2.11", "198.51.101.0", "2001:db9::1", "::1", "127.0.0.1"):
        assert ip not in peers


# The listener


def through(listener: Listening, header: bytes, source: str) -> Client:
    """A client, from the peer's address, with a header before all else."""
    connection = listener.socket(source)
    connection.sendall(header)
    return Client(Tcp(connection))


@pytest.mark.parametrize("header", [V1, v2()], ids=["v1", "v2"])
def test_the_client_is_who_the_header_says(mx: Stage, tmp_path: Path, header: bytes) -> None:
    peer = address()
    rules = compile_rules(tmp_path / "rules.cdb", f'192.0.2.7:allow,RELAYCLIENT=""\n{peer}:deny\n')
    with Listening(mx, f"--proxy-from={peer}", "-x", str(rules)) as listener:
        client = through(listener, header, peer)
        assert client.reply() == "220 mx.example.org ESMTP"
        assert client.command(b"MAIL FROM:<a@example.com>") == "250 ok"
        assert client.command(b"RCPT TO:<u@elsewhere.example>") == "250 ok"
        assert client.command(b"RSET") == "250 flushed"
        send_message(client)
        quit_(client)
        listener.log.wait_for(r": pid \d+ from 192\.0\.2\.7$")
        listener.log.wait_for(r": ok \d+ mx.example.org:198.51.100.1:25 :192.0.2.7::4711$")
        listener.log.wait_for(r" connect ip=192\.0\.2\.7 ")
    [delivery] = mx.deliveries()
    assert b"(192.0.2.7)" in delivery.read[0].partition(b"\n\n")[0]
    names = ("TCPREMOTEIP", "TCPREMOTEPORT", "TCPLOCALIP", "TCPLOCALPORT", "PROTO")
    told = {name: delivery.environ[name] for name in names}
    assert list(told.values()) == ["192.0.2.7", "4711", "198.51.100.1", "25", "TCP"]


def test_a_client_that_the_rules_turn_away(mx: Stage, tmp_path: Path) -> None:
    """Also where the balancer tells its IPv4 address as an IPv6 one."""
    peer = address()
    rules = compile_rules(tmp_path / "rules.cdb", "192.0.2.7:deny\n")
    with Listening(mx, f"--proxy-from={peer}", "-x", str(rules)) as listener:
        for header in (V1, v2(), TELLS["v1 mapped"][0], TELLS["v2 mapped"][0]):
            client = through(listener, header, peer)
            assert client.read_to_end() == b""
        assert [status for _, status in listener.ends(4)] == [100] * 4


@pytest.mark.parametrize(
    "listens, header", [("::1", V1), (ADDRESS, V1_IPV6)], ids=["4 in 6", "6 in 4"]
)
def test_another_family_behind_the_balancer(mx: Stage, listens: str, header: bytes) -> None:
    with Listening(mx, f"--proxy-from={listens}", host=listens) as listener:
        client = Client(Tcp(listener.socket()))
        client.connection.write(header)
        assert client.reply() == "220 mx.example.org ESMTP"
        send_message(client)
        quit_(client)
    [delivery] = mx.deliveries()
    assert delivery.environ["TCPREMOTEIP"] == ("192.0.2.7" if header == V1 else "2001:db8::7")
    assert delivery.environ["PROTO"] == ("TCP" if header == V1 else "TCP6")


@pytest.mark.parametrize("header", [TELLS_NOT["v1 UNKNOWN"], TELLS_NOT["v2 LOCAL"]])
def test_a_balancer_that_speaks_for_itself(mx: Stage, header: bytes) -> None:
    peer = address()
    with Listening(mx, f"--proxy-from={peer}") as listener:
        client = through(listener, header, peer)
        assert client.reply() == "220 mx.example.org ESMTP"
        quit_(client)
        listener.log.wait_for(rf" connect ip={peer} ")


@pytest.mark.parametrize("header", [V1, v2()], ids=["v1", "v2"])
def test_a_stranger_is_not_believed(mx: Stage, tmp_path: Path, header: bytes) -> None:
    rules = compile_rules(tmp_path / "rules.cdb", '192.0.2.7:allow,RELAYCLIENT=""\n')
    stranger = address()
    with Listening(mx, f"--proxy-from={address()}", "-x", str(rules)) as listener:
        client = through(listener, header, stranger)
        assert client.reply() == "220 mx.example.org ESMTP"
        if header == V1:
            assert client.read_to_end() == b"421 this is SMTP, goodbye (#4.5.0)\r\n"
        else:
            assert (client.reply() or "").startswith("502 ")
            assert b"221 mx.example.org\r\n" in client.read_to_end()  # there is QUIT in it
        listener.log.wait_for(rf" connect ip={stranger} ")


def test_a_listed_peer_without_a_header_is_hung_up_on(mx: Stage) -> None:
    peer = address()
    with Listening(mx, f"--proxy-from={peer}") as listener:
        for octets in (b"EHLO x\r\nMAIL FROM:<a@example.com>\r\n", b"\x16\x03\x01" + bytes(50)):
            client = through(listener, octets, peer)
            assert client.read_to_end() == b""
        listener.log.wait_for(rf": drop \d+ from {peer}: no PROXY header$", 2)


def test_no_broken_header_ends_a_worker(mx: Stage) -> None:
    """What it is has a line in the log, whatever is wrong with it."""
    peer = address()
    with Listening(mx, f"--proxy-from={peer}") as listener:
        for header in BROKEN.values():
            client = through(listener, header + bytes(3000), peer)
            assert client.read_to_end() == b""
        listener.log.wait_for(rf": drop \d+ from {peer}: .*PROXY header.*$", len(BROKEN))
        assert "fatal" not in listener.log.text()


# haproxy

CONFIGURATION = """\
global
    log stderr format raw local0
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend smtp
    bind {address}:{port}
    bind ::1:{port} v6only
    default_backend mx
backend mx
    source {source}
    server mx1 {server} {send} check inter 200ms
"""


class Haproxy:
    """A running haproxy; `port` is where it listens, `source` the address that it connects from."""

    def __init__(self, directory: Path, server: str, send: str, source: str) -> None:
        (program,) = need("haproxy")
        with socket.create_server((ADDRESS, 0)) as free:
            self.port = free.getsockname()[1]
        text = CONFIGURATION.format(
            address=ADDRESS, port=self.port, source=source, server=server, send=send
        )
        path = directory / "haproxy.cfg"
        path.write_text(text)
        with (directory / "haproxy.log").open("wb") as log:
            self._process = subprocess.Popen([program, "-db", "-f", path], stdout=log, stderr=log)
        eventually(self._listens, f"haproxy listens: {(directory / 'haproxy.log').read_text()}")

    def _listens(self) -> bool:
        assert self._process.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex((ADDRESS, self.port)) == 0

    def __enter__(self) -> Haproxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2"])
@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_behind_haproxy(mx: Stage, tmp_path: Path, send: str, family: str) -> None:
    need("haproxy")
    balancer, friend, enemy = (address() for _ in range(3))
    sources = {"IPv4": friend, "IPv6": "::1"}
    rules = tmp_path / "rules.cdb"  # of which tcprules could make none for an IPv6 address
    found = {sources[family]: b"+RELAYCLIENT=\0", enemy: b"D\0", balancer: b"D\0"}
    rules.write_bytes(make_cdb({ip.encode(): data for ip, data in found.items()}))
    options = [f"--proxy-from={balancer}", "-x", str(rules)]
    with ExitStack() as stack:
        listener = stack.enter_context(Listening(mx, *options))
        server = f"{ADDRESS}:{listener.port}"
        haproxy = stack.enter_context(Haproxy(tmp_path, server, send, balancer))
        where = ADDRESS if family == "IPv4" else "::1"
        source = (sources[family], 0)
        connection = socket.create_connection((where, haproxy.port), PATIENCE, source)
        client = Client(Tcp(connection))
        assert client.reply() == "220 mx.example.org ESMTP"
        start_tls(client)
        assert client.command(b"MAIL FROM:<a@example.com>") == "250 ok"
        assert client.command(b"RCPT TO:<u@elsewhere.example>") == "250 ok"
        assert client.command(b"RSET") == "250 flushed"
        send_message(client)
        quit_(client)
        if family == "IPv4":
            denied = socket.create_connection((where, haproxy.port), PATIENCE, (enemy, 0))
            assert Client(Tcp(denied)).read_to_end() == b""
    [delivery] = mx.deliveries()
    assert delivery.environ["TCPREMOTEIP"] == sources[family]
    assert delivery.environ["TCPREMOTEPORT"] == str(client.connection.local_port)
    assert delivery.environ["TCPLOCALPORT"] == str(haproxy.port)
    assert f"({sources[family]})".encode() in delivery.read[0].partition(b"\n\n")[0]
