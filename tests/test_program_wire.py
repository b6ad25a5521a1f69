"""The connection: timeouts both ways, slow and gone clients, sockets and pipes, in clear."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Callable

import pytest
from conformance.transport import TRANSPORTS, Connection

from qmail_smtpd_py import workerwire
from qmail_smtpd_py.wire import PIECE, ConnectionLost, TimedOut, Wire
from qmail_smtpd_py.workerwire import SocketWire

LARGE = os.urandom(1 << 20) * 4
SHORT = 0.2  # seconds
LOOK = 0.05  # seconds, where a worker has some more


class Line:
    """A wire, and the client's end of it; `worker` is TCP with the wire that a worker has."""

    def __init__(self, transport: str, timeout: float) -> None:
        self.client: Connection
        self.looks = 0
        self._socket: socket.socket | None = None
        kind = "tcp" if transport == "worker" else transport
        self.client, self.read_fd, self.write_fd = TRANSPORTS[kind]()
        self.wire = self._wire(transport, timeout)
        self._is_open = True

    def _wire(self, transport: str, timeout: float) -> Wire:
        if transport != "worker":
            return Wire(self.read_fd, self.write_fd, timeout)
        self._socket = socket.socket(fileno=os.dup(self.read_fd))
        self._socket.setblocking(True)
        return SocketWire(self._socket, timeout, self._look)

    def _look(self) -> None:
        self.looks += 1

    def hang_up(self) -> None:
        self._is_open = False
        self.client.close()

    def close(self) -> None:
        for descriptor in {self.read_fd, self.write_fd}:
            os.close(descriptor)
        if self._socket:
            self._socket.close()
        if self._is_open:
            self.hang_up()

    def take_all(self, size: int, pause: float = 0) -> bytes:
        """Read so many octets as the client, with a pause before each piece."""
        taken = b""
        while len(taken) < size:
            time.sleep(pause)
            taken += self.client.read(time.monotonic() + 10)
        return taken


@pytest.fixture(params=["socketpair", "pipes", "tcp", "worker"])
def line(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[float], Line]]:
    lines: list[Line] = []
    monkeypatch.setattr(workerwire, "LOOK_SECONDS", LOOK)
    monkeypatch.setattr(workerwire, "_TIMEVAL", workerwire.timeval(0, int(LOOK * 1e6)))

    def open_line(timeout: float = 10) -> Line:
        lines.append(Line(request.param, timeout))
        return lines[-1]

    yield open_line
    for opened in lines:
        opened.close()


Open = Callable[..., Line]


def test_what_is_there_is_read_at_once(line: Open) -> None:
    end = line()
    end.client.write(b"EHLO x\r\n")
    assert end.wire.read() == b"EHLO x\r\n"


def test_a_large_piece_is_read_in_parts(line: Open) -> None:
    end = line()
    sender = threading.Thread(target=send_all, args=(end.client, LARGE))
    sender.start()
    taken, sizes = b"", []
    while len(taken) < len(LARGE):
        taken += (piece := end.wire.read())
        sizes.append(len(piece))
    sender.join()
    assert taken == LARGE
    assert max(sizes) <= PIECE


def send_all(client: Connection, data: bytes) -> None:
    while data:
        client.wait(time.monotonic() + 10, reading=False, writing=True)
        data = data[client.write(data) :]


def test_silence_times_out(line: Open) -> None:
    end = line(SHORT)
    began = time.monotonic()
    with pytest.raises(TimedOut):
        end.wire.read()
    assert SHORT <= time.monotonic() - began < SHORT + 5


@pytest.mark.parametrize("line", ["worker"], indirect=True)
def test_a_worker_looks_up_while_it_waits(line: Open) -> None:
    end = line(SHORT)
    with pytest.raises(TimedOut):
        end.wire.read()
    assert end.looks >= 2
    with pytest.raises(TimedOut):
        for _ in range(64):
            end.wire.write(LARGE)
    assert end.looks >= 4


def test_a_descriptor_that_nothing_can_be_done_with() -> None:
    path = os.open(os.devnull, os.O_PATH)
    try:
        wire = Wire(path, path, 1)
        with pytest.raises(ConnectionLost, match="Bad file descriptor"):
            wire.write(b"220\r\n")
        wire.close()
    finally:
        os.close(path)


def test_a_look_is_a_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wait of a worker is one in read(2); what is left is for those that follow."""
    monkeypatch.setattr(workerwire, "LOOK_SECONDS", LOOK)
    monkeypatch.setattr(workerwire, "_TIMEVAL", workerwire.timeval(0, int(LOOK * 1e6)))
    waits = []

    class Impatient(SocketWire):
        def _waits(self, descriptor: int, event: int, seconds: float) -> bool:
            waits.append(seconds)
            return False

    silent, ours = socket.socketpair()
    with silent, ours, pytest.raises(TimedOut):
        Impatient(ours, 10, lambda: None).read()
    assert waits == [pytest.approx(10 - LOOK)]


def test_what_was_said_to_be_there_and_is_not_is_waited_for(line: Open) -> None:
    """poll(2) may err, or another process that has the descriptor may have been faster."""
    end = line()
    waits = end.wire._waits

    def hasty(descriptor: int, event: int, seconds: float) -> bool:
        end.wire._waits = waits  # type: ignore[method-assign]
        threading.Timer(LOOK, end.client.write, [b"NOOP\r\n"]).start()
        return True

    os.set_blocking(end.read_fd, False)
    end.wire._waits = hasty  # type: ignore[method-assign]
    assert end.wire.read() == b"NOOP\r\n"


def test_each_read_has_the_whole_time(line: Open) -> None:
    end = line(1.0)

    def trickle() -> None:
        for _ in range(4):
            time.sleep(0.3)
            end.client.write(b"x")

    sender = threading.Thread(target=trickle)
    sender.start()
    assert b"".join(end.wire.read() for _ in range(4)) == b"xxxx"
    sender.join()


def test_a_client_that_takes_nothing_times_out(line: Open) -> None:
    end = line(SHORT)
    with pytest.raises(TimedOut):
        for _ in range(64):  # buffers of TCP grow, but not for ever
            end.wire.write(LARGE)


def test_a_client_that_takes_slowly_has_no_more_time_than_one_that_takes_nothing(
    line: Open,
) -> None:
    """Each octet that it takes makes room for one, but a write ends in time or not at all."""
    end = line(0.5)
    enough = threading.Event()

    def sip() -> None:
        while not enough.wait(0.02):
            with contextlib.suppress(TimeoutError):
                end.client.read(time.monotonic())

    reader = threading.Thread(target=sip)
    reader.start()
    try:
        with pytest.raises(TimedOut):
            for _ in range(8):
                end.wire.write(LARGE)
    finally:
        enough.set()
        reader.join()


class Farewell:
    """A channel with much to say at the end."""

    def handshake(self) -> bool:
        return True

    def pending(self) -> bytes:
        return b""

    def write(self, data: bytes) -> bytes:
        return data

    def close(self) -> bytes:
        return LARGE


def test_a_client_that_takes_nothing_is_not_waited_for_at_the_end(line: Open) -> None:
    end = line(SHORT)
    end.wire.start_tls(Farewell())
    with pytest.raises(TimedOut):
        for _ in range(64):
            end.wire.write(LARGE)
    end.wire.limit(60, 0)
    began = time.monotonic()
    end.wire.close()
    assert time.monotonic() - began < 20


def test_a_client_that_takes_slowly_gets_everything(line: Open) -> None:
    end = line()
    data = LARGE[: 1 << 20]
    taken: list[bytes] = []
    reader = threading.Thread(target=lambda: taken.append(end.take_all(len(data), pause=0.001)))
    reader.start()
    end.wire.write(data)
    reader.join()
    assert taken == [data]


def test_no_descriptor_is_left_behind(line: Open) -> None:
    """As TLS begins: one more would keep the stream open for the client."""
    opened = line("socketpair")
    before = os.listdir("/proc/self/fd")
    opened.wire._no_delay()
    assert os.listdir("/proc/self/fd") == before


def test_nothing_to_write_needs_no_client(line: Open) -> None:
    end = line()
    end.hang_up()
    end.wire.write(b"")


def test_the_end_of_the_stream(line: Open) -> None:
    end = line()
    end.client.write(b"NOO")
    end.client.end_writing()
    assert end.wire.read() == b"NOO"
    for _ in range(2):
        with pytest.raises(ConnectionLost, match="hung up"):
            end.wire.read()


def test_the_stream_may_end_one_way_only(line: Open) -> None:
    end = line()
    end.client.end_writing()
    end.wire.write(b"250 ok\r\n")
    assert end.take_all(8) == b"250 ok\r\n"


def test_a_client_that_has_gone_is_lost_and_no_signal(line: Open) -> None:
    end = line()
    end.hang_up()
    with pytest.raises(ConnectionLost):
        for _ in range(20):  # TCP tells it with a delay
            end.wire.write(LARGE[:PIECE])
            time.sleep(0.01)


@pytest.mark.parametrize("is_blocking", [True, False])
def test_the_descriptor_is_given_back_as_it_was(line: Open, is_blocking: bool) -> None:
    end = line()
    os.set_blocking(end.write_fd, is_blocking)
    wire = Wire(end.read_fd, end.write_fd, 1)
    assert not os.get_blocking(end.write_fd)
    wire.close()
    assert os.get_blocking(end.write_fd) == is_blocking


def test_a_file_may_be_read_and_written(tmp_path: os.PathLike) -> None:
    path = os.path.join(tmp_path, "dialogue")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    wire = Wire(descriptor, descriptor, 1)
    wire.write(LARGE)
    os.lseek(descriptor, 0, os.SEEK_SET)
    taken = b""
    with pytest.raises(ConnectionLost):
        while True:
            taken += wire.read()
    assert taken == LARGE
    os.close(descriptor)


def test_a_timeout_of_many_days() -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"x")
    assert Wire(read_fd, write_fd, 2_000_000).read() == b"x"
    os.close(read_fd)
    os.close(write_fd)
