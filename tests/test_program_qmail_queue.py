"""One run of qmail-queue: what it is given, what its end means, and what a cancelled one sees."""

from __future__ import annotations

import errno
import os
import posix
import re
import resource
import time
from pathlib import Path

import pytest
from conformance.stage import Stage, inheritable
from hypothesis import given as given_
from hypothesis import strategies as st
from listener.listening import eventually

from qmail_smtpd_py import qmail_queue
from qmail_smtpd_py.qmail_queue import QueueDelivery

# Without LC_ALL the interpreter of the stand-in would add LC_CTYPE of its own.
ENVIRON = {b"PATH": b"/usr/bin:/bin", b"LC_ALL": b"C", b"RELAYCLIENT": b""}
ENVELOPE = b"Fa@example.com\0Tb@example.org\0\0"
READ_ALL = "cat <&0 >message; cat <&1 >envelope"
LARGE = b"0123456789abcde\n" * 100_000

STATUSES = sorted({*qmail_queue.REPLIES, 0, 1, 10, 12, 40, 41, 99, 100, 111, 116, 121, 127, 255})


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No descriptor, no child and no zombie."""
    descriptors = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


class Queue:
    """Starts shell scripts as qmail-queue, in a directory where they leave what they saw."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.left: list[int] = []

    def start(self, script: str, with_text: bool = False) -> QueueDelivery:
        path = self.directory / "qmail-queue"
        path.write_text(f"#!/bin/sh\ncd {self.directory}\n{script}\n")
        path.chmod(0o755)
        delivery = qmail_queue.open_delivery(os.fsencode(path), ENVIRON, self.left, with_text)
        assert delivery
        return delivery

    def deliver(
        self, script: str, message: bytes = b"Subject: x\n\nx\n", with_text: bool = False
    ) -> bytes | None:
        """The reply to a whole delivery as octets, None where the message is queued."""
        delivery = self.start(script, with_text)
        for at in range(0, len(message), 40_000):
            delivery.write(message[at : at + 40_000])
        answer = delivery.close(ENVELOPE)
        return answer and answer.render()

    def wrote(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


def rendered(status: int) -> bytes | None:
    answer = qmail_queue.reply_to(status)
    return answer and answer.render()


@pytest.mark.parametrize("status", STATUSES)
def test_exit_status(queue: Queue, status: int) -> None:
    assert queue.deliver(f"{READ_ALL}; exit {status}") == rendered(status)


@pytest.mark.parametrize("signal", [6, 9, 11, 13, 15, 25])
@pytest.mark.parametrize("before", ["", "cat <&0 >/dev/null", READ_ALL])
def test_a_signal_is_a_crash(queue: Queue, before: str, signal: int) -> None:
    """SIGPIPE and SIGXFSZ too, which the interpreter ignores and its children would."""
    assert queue.deliver(f"{before}\nkill -{signal} $$; exit 0") == b"451 qq crashed (#4.3.0)\r\n"


@pytest.mark.parametrize("size", [0, 1, 32767, 32768, 65536, 65537, len(LARGE)])
def test_message_and_envelope_arrive_whole(queue: Queue, size: int) -> None:
    assert queue.deliver(READ_ALL, LARGE[:size]) is None
    assert queue.wrote("message") == LARGE[:size]
    assert queue.wrote("envelope") == ENVELOPE


def test_a_message_is_passed_on_while_it_comes(queue: Queue) -> None:
    """Whatever its size, no more than a piece of it is kept."""
    delivery = queue.start("head -c 32768 <&0 >/dev/null; : >begun; " + READ_ALL)
    delivery.write(LARGE[:32_767])
    delivery.write(LARGE[32_767:32_768])
    eventually((queue.directory / "begun").exists, "the first piece was read")
    assert delivery.close(ENVELOPE) is None


def test_one_that_ends_while_what_it_started_keeps_the_pipe(queue: Queue) -> None:
    began = time.monotonic()
    assert queue.deliver("exec 3<&0; sleep 20 <&3 & exit 53", LARGE) == rendered(53)
    assert time.monotonic() - began < 10


def test_giving_up_one_that_ends_while_what_it_started_keeps_the_pipe(queue: Queue) -> None:
    delivery = queue.start("exec 3<&0; sleep 20 <&3 & exit 0")
    delivery.write(LARGE)
    delivery.cancel()
    assert queue.left == []


def test_a_large_envelope_arrives_whole(queue: Queue) -> None:
    envelope = b"Fa@example.com\0" + b"Tb@example.org\0" * 20_000 + b"\0"
    delivery = queue.start(READ_ALL)
    assert delivery.close(envelope) is None
    assert queue.wrote("envelope") == envelope


@pytest.mark.parametrize("message", [b"small", LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("status", "answer"), [(0, rendered(54)), (31, rendered(31)), (53, rendered(53))]
)
def test_one_that_does_not_read_to_the_end(
    queue: Queue, message: bytes, status: int, answer: bytes
) -> None:
    """Its status counts, but for a yes to what it never read."""
    assert queue.deliver(f"exec 0<&-; exec 1<&-; : >ready; exit {status}", message) in (
        [answer] if message is LARGE else [answer, rendered(status)]
    )


def test_a_yes_to_an_envelope_that_was_not_read_is_no_yes(queue: Queue) -> None:
    delivery = queue.start("cat <&0 >/dev/null; exit 0")
    delivery.write(b"x")
    assert delivery.close(b"F\0" + b"Tx\0" * 100_000 + b"\0") is qmail_queue.reply_to(54)


@pytest.mark.parametrize("kind", ["missing", "not executable", "directory", "no interpreter"])
@pytest.mark.parametrize("message", [b"small", LARGE], ids=["small", "large"])
def test_one_that_can_not_be_started(tmp_path: Path, kind: str, message: bytes) -> None:
    path = tmp_path / "qmail-queue"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_text("#!/no/such/interpreter\n" if kind == "no interpreter" else "words\n")
        path.chmod(0o755 if kind == "no interpreter" else 0o644)
    delivery = qmail_queue.open_delivery(os.fsencode(path), ENVIRON, [])
    assert delivery
    assert isinstance(delivery.trouble, OSError)
    delivery.write(message)
    assert delivery.close(ENVELOPE) is qmail_queue.reply_to(120)


def test_what_it_is_given(stage: Stage) -> None:
    """Message and envelope on descriptors 0 and 1, the log, and the environment as given."""
    program = stage.env["QMAILQUEUE"]
    delivery = qmail_queue.open_delivery(os.fsencode(program), ENVIRON, [])
    assert delivery
    delivery.write(b"x\n")
    assert delivery.close(ENVELOPE) is None
    (given,) = stage.deliveries()
    assert given.read == {0: b"x\n", 1: ENVELOPE}
    assert given.argv == [program]
    assert given.environ == {name.decode(): value.decode() for name, value in ENVIRON.items()}
    assert given.descriptors[2] == os.readlink("/proc/self/fd/2")
    assert given.descriptors.keys() - inheritable() == {0, 1, 2}


def test_the_process_is_the_one_that_is_named(queue: Queue) -> None:
    delivery = queue.start("echo $$ >pid; " + READ_ALL)
    assert delivery.close(ENVELOPE) is None
    assert int(queue.wrote("pid")) == delivery.pid


@pytest.mark.parametrize("message", [b"", b"half", LARGE], ids=["nothing", "little", "much"])
def test_a_cancelled_one_sees_no_envelope(queue: Queue, message: bytes) -> None:
    delivery = queue.start(READ_ALL)
    delivery.write(message)
    delivery.cancel()
    assert queue.wrote("envelope") == b""
    assert message.startswith(queue.wrote("message"))


def test_a_cancelled_one_that_does_not_end_is_not_waited_for_long(queue: Queue) -> None:
    delivery = queue.start("exec sleep 100")
    began = time.monotonic()
    delivery.cancel()
    assert time.monotonic() - began < 10
    assert queue.left == [delivery.pid]
    queue.start("exit 53").cancel()
    assert queue.left == [delivery.pid], "it is still running"
    os.kill(delivery.pid, 9)
    os.waitid(os.P_PID, delivery.pid, os.WEXITED | os.WNOWAIT)
    queue.start("exit 53").cancel()
    assert queue.left == []
    assert not os.path.exists(f"/proc/{delivery.pid}"), "it is a zombie"


def test_cancelling_what_has_ended_already(queue: Queue) -> None:
    delivery = queue.start("exit 53")
    os.waitid(os.P_PID, delivery.pid, os.WEXITED | os.WNOWAIT)
    delivery.write(LARGE)
    delivery.cancel()


# Words of its own for the client: a text on descriptor 4 or 6

TEXTS = {
    b"Dno viruses here (#5.7.1)": b"554 no viruses here (#5.7.1)\r\n",
    b"Dtry another day\n": b"554 try another day\r\n",
    b"Zscanner is busy (#4.3.0)": b"451 scanner is busy (#4.3.0)\r\n",
    b"Dx": b"554 x\r\n",
    # Nothing makes a second line, or is anything but text.
    b"Dfirst\r\n250 ok\r\n": b"554 first 250 ok\r\n",
    b"Dfirst\n\n.\n": b"554 first .\r\n",
    b"Da\x1b[2Jb\x7fc\xe9d\x85": b"554 a?[2Jb?c?d?\r\n",
    b"D5.\x007.1": b"554 5.\r\n",
    b"D5.\x017.1 x": b"554 5.?7.1 x\r\n",
    b"D5.\r\n7.1 x": b"554 5. 7.1 x\r\n",
    b"D" + b"x" * 254: b"554 " + b"x" * 254 + b"\r\n",
    b"D" + b"x" * 255: b"554 " + b"x" * 254 + b"\r\n",
}
NO_TEXTS = [b"", b"D", b"Z", b"D\r\n", b"Z \t ", b"D\0x", b"\0Dx", b"250 ok", b"Kok", b"dx", b" Dx"]
NO_TEXT = b"451 qq temporary problem (#4.3.0)\r\n"
"""What 82 and 88 are without a text, as in netqmail."""


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_the_reply(text: bytes) -> None:
    answer = qmail_queue.reply_of(text)
    assert answer
    assert answer.render() == TEXTS[text]


@pytest.mark.parametrize("text", NO_TEXTS)
def test_what_is_no_text(text: bytes) -> None:
    assert qmail_queue.reply_of(text) is None


@given_(st.binary(max_size=300))
def test_whatever_is_written_is_one_reply_or_none(text: bytes) -> None:
    answer = qmail_queue.reply_of(b"D" + text)
    if answer:
        assert re.fullmatch(rb"554 [\x20-\x7e]{1,254}\r\n", answer.render())


def say(text: bytes, descriptor: int) -> str:
    octal = "".join(f"\\{octet:03o}" for octet in text)
    return f"printf '{octal}' >&{descriptor}"


@pytest.mark.parametrize("descriptor", [4, 6])
@pytest.mark.parametrize("status", [82, 88])
def test_a_text_on_either_descriptor(queue: Queue, status: int, descriptor: int) -> None:
    for text, answer in ((b"Dno\n", b"554 no\r\n"), (b"Znot now", b"451 not now\r\n")):
        script = f"{READ_ALL}; {say(text, descriptor)}; exit {status}"
        assert queue.deliver(script, with_text=True) == answer


@pytest.mark.parametrize("message", [b"small", LARGE], ids=["small", "large"])
def test_a_text_of_one_that_has_not_read_to_the_end(queue: Queue, message: bytes) -> None:
    script = f"{say(b'Dno', 4)}; exit 82"
    assert queue.deliver(script, message, with_text=True) == b"554 no\r\n"


@pytest.mark.parametrize("status", [status for status in STATUSES if status not in (82, 88)])
def test_a_text_with_another_exit_status_is_not_told(queue: Queue, status: int) -> None:
    script = f"{READ_ALL}; {say(b'Dno', 4)}; exit {status}"
    assert queue.deliver(script, with_text=True) == rendered(status)


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("status", [82, 88])
def test_no_text(queue: Queue, status: int, with_text: bool) -> None:
    assert queue.deliver(f"{READ_ALL}; exit {status}", with_text=with_text) == NO_TEXT


def test_a_text_that_is_far_too_long_stops_nobody(queue: Queue) -> None:
    """The pipe takes what it holds; who goes on writing is told so, and not kept waiting."""
    script = f"{READ_ALL}; {say(b'D', 4)}; yes no 2>/dev/null >&4; exit 82"
    answer = queue.deliver(script, with_text=True)
    assert answer == b"554 " + (b"no " * 100)[:254] + b"\r\n"


@pytest.mark.parametrize("text", [b"", b"Dno"])
def test_a_pipe_that_somebody_keeps_open_is_not_waited_for(queue: Queue, text: bytes) -> None:
    script = f"{READ_ALL}\nsleep 100 & echo $! >pid\n{say(text, 6)}; exit 82"
    began = time.monotonic()
    try:
        answer = queue.deliver(script, with_text=True)
        assert time.monotonic() - began < 20
        assert answer == (b"554 no\r\n" if text else NO_TEXT)
    finally:
        os.kill(int(queue.wrote("pid")), 9)


def test_one_that_closes_the_pipe(queue: Queue) -> None:
    assert queue.deliver(f"{READ_ALL}; exec 4>&- 6>&-; exit 82", with_text=True) == NO_TEXT


def test_a_cancelled_one_is_not_asked_for_a_text(queue: Queue) -> None:
    delivery = queue.start(f"{READ_ALL}; {say(b'Dno', 4)}; exit 82", with_text=True)
    delivery.cancel()


def test_one_with_a_text_that_can_not_be_started() -> None:
    delivery = qmail_queue.open_delivery(b"/no/such/queue", ENVIRON, [], True)
    assert delivery
    assert delivery.close(ENVELOPE) is qmail_queue.reply_to(120)


@pytest.mark.parametrize("with_text", [False, True])
def test_the_descriptors_of_a_text(stage: Stage, with_text: bool) -> None:
    """4 and 6 are one pipe; without it they are not open at all, and nothing else ever is."""
    program = os.fsencode(stage.env["QMAILQUEUE"])
    delivery = qmail_queue.open_delivery(program, ENVIRON, [], with_text)
    assert delivery
    assert delivery.close(ENVELOPE) is None
    (given,) = stage.deliveries()
    text = {4, 6} if with_text else set()
    assert given.descriptors.keys() - inheritable() == {0, 1, 2} | text
    if with_text:
        assert given.descriptors[4] == given.descriptors[6]
        assert given.descriptors[4].startswith("pipe:")
        assert given.descriptors[4] not in (given.descriptors[0], given.descriptors[1])


PROGRAMS = {
    b"/var/qmail/bin/simscan": True,
    b"/var/qmail/bin/qmail-scanner-queue.pl": True,
    b"/var/qmail/bin/qmail-scanner-queue": True,
    b"/usr/local/bin/qmail-qfilter": True,
    b"simscan": True,
    b"/usr/local/bin/qsheff": True,
    b"bin/qmail-dkim": True,
    b"bin/qmail-queue": False,
    b"/simscan/qmail-queue": False,
    b"/var/qmail/bin/my-simscan": False,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_who_writes_texts(program: bytes) -> None:
    assert qmail_queue.writes_text(program) == PROGRAMS[program]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_no_processes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def spawn(*arguments: object, **more: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(posix, "posix_spawn", spawn)
    assert qmail_queue.open_delivery(b"/bin/true", ENVIRON, []) is None


def test_an_environment_that_no_process_can_have() -> None:
    delivery = qmail_queue.open_delivery(b"/bin/true", {b"": b"x"}, [])
    assert delivery
    assert delivery.trouble
    assert delivery.trouble.strerror == "illegal environment variable name"
    assert delivery.close(ENVELOPE) is qmail_queue.reply_to(120)


@pytest.mark.parametrize(
    ("free", "with_text"), [*((n, False) for n in range(4)), *((n, True) for n in range(6))]
)
def test_no_descriptors(queue: Queue, free: int, with_text: bool) -> None:
    """Two pipes take four, a third two more; with fewer there is no delivery, and nothing is left
    of those that were made.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, limits[1]))
    try:
        assert qmail_queue.open_delivery(b"/bin/true", ENVIRON, [], with_text) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
