"""When things break around the program: nothing is lost, nothing is half accepted, nobody hangs.

250 after the closing dot means that qmail-queue has the whole message; and what qmail-queue has
whole was sent whole.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conformance import grammar, logs
from conformance.client import Client
from conformance.program import ROOT, Program, under_test
from conformance.stage import Stage
from e2e.programs import lack

NOBODY = 65534

MAIL = b"MAIL FROM:<a@client.example.com>\r\n"
RCPT = b"RCPT TO:<user@example.org>\r\n"
ENVELOPE = b"Fa@client.example.com\0Tuser@example.org\0\0"


def greeted(program: Program) -> Client:
    assert program.client.reply() == "220 mx.example.org ESMTP"
    return program.client


def begin_message(client: Client) -> None:
    client.send(MAIL + RCPT + b"DATA\r\n")
    assert [client.reply() for _ in range(3)] == ["250 ok", "250 ok", "354 go ahead"]


def queued(stage: Stage) -> list[bytes]:
    """The messages that qmail-queue would have queued, without the Received field."""
    messages = []
    for delivery in stage.deliveries():
        if delivery.read.get(1, b"").endswith(b"\0\0"):
            assert delivery.read[1] == ENVELOPE
            messages.append(delivery.read[0].split(b"\n", 2)[2])
    return messages


# The program is killed


class Killing:
    """One run: a message of some size, cut off at some octet, and SIGKILL at some moment."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        size = chance.choice([100, 5_000, 70_000, 300_000])
        letters = (
            bytes(chance.choices(b"abcdefghij \r\n.", k=size))
            .replace(b"\r", b"")
            .replace(b"\n", b"\r\n")
        )
        text = b"Subject: %d\r\n\r\n%s\r\n" % (seed, letters)
        self.message = text.replace(b"\r\n", b"\n")
        self.stream = re.sub(rb"(?m)^\.", b"..", text) + b".\r\n"
        whole = len(self.stream)
        self.cut = chance.choice(
            [chance.randrange(whole), whole - chance.randrange(1, 8), whole, whole]
        )
        self.pause = chance.choice([0, chance.random() / 50, chance.random() / 10])
        self.waits_for_reply = self.cut == whole and chance.random() < 0.3


@pytest.mark.parametrize("seed", range(48))
def test_sigkill_at_any_moment_loses_nothing_and_queues_no_half(host: Stage, seed: int) -> None:
    plan = Killing(seed)
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        client.send(plan.stream[: plan.cut])
        if plan.waits_for_reply:
            assert (client.reply() or "").startswith("250 ok ")
        time.sleep(plan.pause)
        program.signal(signal.SIGKILL)
        said = client.read_to_end()
        program.wait()
    found = queued(host)
    assert found in ([], [plan.message])
    if plan.cut < len(plan.stream):
        assert found == []
        assert said == b""
    if said or plan.waits_for_reply:
        assert found == [plan.message]


# Whoever runs the tests may ignore some signals, and the program would inherit that.
HEEDING = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM])
def test_other_signals_end_it_and_queue_nothing(host: Stage, number: int) -> None:
    command = [sys.executable, "-I", "-c", HEEDING, *under_test()]
    with Program(host, command=command) as program:
        client = greeted(program)
        begin_message(client)
        client.send(b"Subject: x\r\n\r\nx\r\n")
        client.settle()
        program.signal(number)
        assert client.read_to_end() == b""
        assert program.wait() in (1, -number)
    assert queued(host) == []
    assert b"Traceback" not in program.log


# The client goes away

STEPS = [
    b"EHLO x\r\n",
    MAIL,
    RCPT,
    b"DATA\r\n",
    b"Subject: x\r\n",
    b"\r\ntext",
    b"\r\n",
    b".",
    b"\r",
]


@pytest.mark.parametrize("how", ["close", "half", "unread"])
@pytest.mark.parametrize("steps", range(len(STEPS) + 1))
def test_a_client_that_leaves_queues_nothing(host: Stage, steps: int, how: str) -> None:
    with Program(host) as program:
        client = greeted(program)
        client.send(*STEPS[:steps])
        if how == "half":
            client.close("write")
            grammar.replies(client.read_to_end())
        elif how == "close":
            client.close()
        else:  # it goes with replies unread, so that the connection is reset
            client.push(b"NOOP\r\n" * 2000)
            client.connection.close()
            client.ended = True
        assert program.wait() == 1
    assert queued(host) == []
    assert logs.read_all(program.log)[-1].event == "disconnect"


def test_a_client_that_does_not_hear_the_reply_to_quit(host: Stage) -> None:
    """As to netqmail, that is no orderly end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"QUIT\r\n")
        ours.shutdown(socket.SHUT_RD)
        done = subprocess.run(
            [*under_test(), *host.args], stdin=theirs, stdout=theirs, env=host.env, check=False
        )
    assert done.returncode == 1


@pytest.mark.parametrize("how", ["close", "half"])
def test_all_in_one_write_and_gone(host: Stage, how: str) -> None:
    """What was sent whole is taken, even if nobody waits for the answer."""
    with Program(host) as program:
        client = greeted(program)
        client.send(
            MAIL + RCPT + b"DATA\r\nSubject: x\r\n\r\n" + b"y" * 70_000 + b"\r\n.\r\nQUIT\r\n"
        )
        client.close("write" if how == "half" else "both")
        assert program.wait() in (0, 1)
    assert queued(host) == [b"Subject: x\n\n" + b"y" * 70_000 + b"\n"]


# qmail-queue and the check program


def test_a_slow_qmail_queue_is_waited_for(host: Stage) -> None:
    path = host.tools / "slow-queue"
    path.write_text("#!/bin/sh\ncat <&0 >/dev/null\ncat <&1 >/dev/null\nsleep 0.5\n")
    path.chmod(0o755)
    host.environment({"QMAILQUEUE": str(path)})
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        began = time.monotonic()
        client.send(b"x\r\n.\r\n")
        assert (client.reply() or "").startswith("250 ok ")
        assert time.monotonic() - began >= 0.5


def test_a_qmail_queue_that_is_slow_to_read_slows_the_client_down_and_fills_no_memory(
    host: Stage,
) -> None:
    path = host.tools / "slow-queue"
    path.write_text("#!/bin/sh\nsleep 0.5\ncat <&0 | wc -c >&2\ncat <&1 >/dev/null\n")
    path.chmod(0o755)
    host.environment({"QMAILQUEUE": str(path)})
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        base = program.memory
        client.send(*[b"x" * 100_000] * 100, b"\r\n.\r\n")
        assert (client.reply() or "").startswith("250 ok ")
        assert program.memory - base < 4 << 20
        client.command(b"QUIT")
        program.wait()
    assert re.search(rb"(?m)^100001\d\d$", program.log)


def test_a_qmail_queue_that_is_slow_to_give_up_is_no_zombie_for_ever(host: Stage) -> None:
    """The next message sees that it has ended."""
    path = host.tools / "slow-queue"
    path.write_text(
        "#!/bin/sh\ncat <&0 >/dev/null\ncat <&1 >/dev/null\n"
        "[ -e $0.ran ] || { : >$0.ran; read -r line <$0.end; }\n"
    )
    path.chmod(0o755)
    os.mkfifo(f"{path}.end")
    host.environment({"QMAILQUEUE": str(path)})
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        client.send(b"Received: x\r\n" * 100 + b".\r\n")
        assert client.reply() == "554 too many hops, this message is looping (#5.4.6)"
        (slow,) = program.children
        Path(f"{path}.end").write_text("now\n")
        deadline = time.monotonic() + 20
        while ") Z " not in Path(f"/proc/{slow}/stat").read_text():
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.01)
        begin_message(client)
        client.send(b"x\r\n.\r\n")
        assert (client.reply() or "").startswith("250 ok ")
        assert program.children == []


def test_no_child_is_left_whatever_became_of_it(host: Stage) -> None:
    host.plan("qmail-queue", [{"exit": 0}, {"exit": 53}, {"signal": 9}, {"exit": 0, "read": False}])
    host.plan("checkpassword", [{"exit": 111}, {"signal": 9}, {"exit": 0}])
    with Program(host) as program:
        client = greeted(program)
        for _ in range(4):
            begin_message(client)
            client.send(b"x\r\n.\r\n")
            assert client.reply()
        begin_message(client)
        client.send(b"Received: x\r\n" * 100 + b".\r\n")
        assert client.reply() == "554 too many hops, this message is looping (#5.4.6)"
        for _ in range(3):
            assert client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=")
        assert program.children == []


@pytest.mark.parametrize("kind", ["missing", "not executable", "directory", "no interpreter"])
def test_a_qmail_queue_that_can_not_be_started(host: Stage, kind: str) -> None:
    path = host.tools / "broken"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_text("#!/no/such/interpreter\n")
        path.chmod(0o755 if kind == "no interpreter" else 0o644)
    host.environment({"QMAILQUEUE": str(path)})
    with Program(host) as program:
        client = greeted(program)
        for _ in range(2):
            begin_message(client)
            client.send(b"x\r\n" * 100_000 + b".\r\n")
            assert client.reply() == "451 unable to exec qq (#4.3.0)"
        assert client.command(b"NOOP") == "250 ok"
    errors = [line.fields["why"] for line in logs.read_all(program.log) if line.event == "error"]
    assert len(errors) == 2
    assert all(str(path) in why and f"(uid {os.geteuid()})" in why for why in errors)


# What the program was started with


@pytest.mark.tls
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_children_get_their_descriptors_and_no_others(host: Stage, tls: bool) -> None:
    """Whatever the program was started with, and whatever OpenSSL has opened."""
    leaked = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    leaked.append(fcntl.fcntl(leaked[0], fcntl.F_DUPFD, min(1500, most - 1)))
    try:
        with Program(host, pass_fds=leaked) as program:
            client = greeted(program)
            if tls:
                assert client.command(b"STARTTLS") == "220 ready for tls"
                assert client.start_tls() == "ok"
            assert client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=") == "235 ok, go ahead (#2.0.0)"
            begin_message(client)
            client.send(b"x\r\n.\r\n")
            assert (client.reply() or "").startswith("250 ok ")
    finally:
        for descriptor in leaked:
            os.close(descriptor)
    (check,), (delivery,) = host.checks(), host.deliveries()
    assert check.descriptors.keys() == {0, 1, 2, 3}
    assert check.descriptors[0] == "/dev/null"
    assert check.descriptors[1] == check.descriptors[2]
    assert delivery.descriptors.keys() == {0, 1, 2}
    for descriptors in (check.descriptors, delivery.descriptors):
        assert not [target for target in descriptors.values() if target.startswith("socket:")]


DENIED = """
import ctypes, os, sys
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(111)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_memory_that_may_not_be_written_and_executed(host: Stage) -> None:
    """As with MemoryDenyWriteExecute= of systemd: mail in clear goes on, and the log says why."""
    host.control({"servercert.pem": "@server-rsa.pem"})
    command = [sys.executable, "-c", DENIED, *under_test()]
    with Program(host, command=command) as program:
        if program.client.reply() == "":
            lack("a kernel that can forbid it (Linux 6.3)")
        assert program.client.command(b"STARTTLS") == "220 ready for tls"
        assert program.client.start_tls() != "ok"
        assert program.wait() == 1
        why = logs.read_all(program.log)[1].fields["why"]
    assert why == "memory that can be written and executed is forbidden, and pyOpenSSL needs it"
    with Program(host, command=command) as program:
        begin_message(greeted(program))
        program.client.send(b"\r\nx\r\n.\r\n")
        assert program.client.reply().startswith("250 ok ")
    assert len(queued(host)) == 1


def status_of(host: Stage, connection: socket.socket, log: int) -> int:
    """The exit status of the program with this connection and this log."""
    command = [*under_test(), *host.args]
    done = subprocess.run(
        command, stdin=connection, stdout=connection, stderr=log, env=host.env, timeout=20
    )
    return done.returncode


def test_a_log_that_nobody_reads(host: Stage) -> None:
    """Mail is worth more than its log."""
    ours, theirs = socket.socketpair()
    with ours, theirs, logs.nobody_reads() as log:
        ours.sendall(b"QUIT\r\n")
        assert status_of(host, theirs, log) == 0


def test_a_log_that_nobody_reads_is_waited_for_once(host: Stage) -> None:
    refused = b"RCPT TO:<user@elsewhere.example>\r\n" * 5
    ours, theirs = socket.socketpair()
    with ours, theirs, logs.nobody_reads() as log:
        ours.sendall(MAIL + refused + b"QUIT\r\n")
        begin = time.monotonic()
        assert status_of(host, theirs, log) == 0
    assert time.monotonic() - begin < 5  # there are seven lines


def test_a_log_that_is_the_connection_itself(host: Stage) -> None:
    """As inetd has it: the client gets replies, and children do not get the client."""
    host.arguments("@checkpassword", "@true")
    host.environment({"SMTPAUTH": "", "FORCETLS": "0"})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        auth = b"AUTH PLAIN AHVzZXIAc2VzYW1l\r\n"
        ours.sendall(auth + MAIL + RCPT + b"DATA\r\n")
        started = subprocess.Popen(
            [*under_test(), *host.args], stdin=theirs, stdout=theirs, stderr=theirs, env=host.env
        )
        theirs.close()
        said = b""
        while b"354 " not in said:
            said += ours.recv(4096)
        ours.sendall(b"x\r\n.\r\nQUIT\r\n")
        while piece := ours.recv(4096):
            said += piece
    assert started.wait(20) == 0
    assert grammar.codes(said) == [220, 235, 250, 250, 354, 250, 221]
    (delivery,), (check,) = host.deliveries(), host.checks()
    assert check.descriptors[1] == check.descriptors[2] == "/dev/null"
    assert delivery.descriptors[2] == "/dev/null"


def test_a_log_that_is_the_pipe_to_the_client(host: Stage) -> None:
    done = subprocess.run(
        [*under_test(), *host.args],
        input=b"QUIT\r\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=host.env,
        timeout=20,
        check=True,
    )
    assert grammar.codes(done.stdout) == [220, 221]


def test_errors_do_not_fill_the_log(host: Stage) -> None:
    certificate = host.home / "control" / "servercert.pem"
    certificate.unlink(missing_ok=True)
    certificate.symlink_to(certificate.name)
    with Program(host) as program:
        client = greeted(program)
        client.send(b"EHLO x\r\n" * 500 + b"QUIT\r\n")
        client.read_to_end()
        assert program.wait() == 0
    events = [line.event for line in logs.read_all(program.log)]
    assert events == ["connect", *["error"] * 100, "limit", "disconnect"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_a_connection_that_is_none(host: Stage, closed: str) -> None:
    """No file that is opened takes its number: this one would be read as what the client says."""
    (host.home / "control" / "morercpthosts.cdb").write_bytes(b"HELP\r\n" * 1000)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *under_test(), *host.args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=host.env,
        check=False,
    )
    assert done.returncode == 1
    assert grammar.codes(done.stdout) == ([220] if closed == "<&-" else [])
    assert logs.read_all(done.stderr)[-1].fields["why"] == "Bad file descriptor"


def test_whoever_started_it_ignores_the_death_of_children(host: Stage) -> None:
    """It has to hear of it: the status of a child that nobody waits for is lost (wait(2))."""
    with Program(host, preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)) as program:
        client = greeted(program)
        assert client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=") == "235 ok, go ahead (#2.0.0)"
        begin_message(client)
        client.send(b"x\r\n.\r\n")
        assert (client.reply() or "").startswith("250 ok ")


@pytest.mark.tls
def test_control_files_that_are_needed_in_the_middle(host: Stage) -> None:
    """The log has the end of each connection of which it has the beginning."""
    host.environment({"SMTPS": "1"})
    (host.home / "control" / "tlsserverciphers").mkdir()
    with Program(host) as program:
        program.client.read_to_end()
        assert program.wait() == 1
    lines = logs.read_all(program.log)
    assert [line.event for line in lines] == ["connect", "error", "disconnect"]


def test_children_get_the_environment_that_the_program_was_started_with(host: Stage) -> None:
    host.environment({"LC_ALL": "C", "ANYTHING": "two words", "EMPTY": ""})
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        client.send(b"x\r\n.\r\n")
        assert client.reply()
        assert client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=") == "235 ok, go ahead (#2.0.0)"
        begin_message(client)
        client.send(b"x\r\n.\r\n")
        assert client.reply()
    (check,), (before, after) = host.checks(), host.deliveries()
    assert check.environ == before.environ == host.env
    joe = {"SMTPAUTHUSER": "joe", "SMTP_AUTH_USER": "joe", "SMTPAUTHMETHOD": "plain"}
    assert after.environ == {**host.env, "RELAYCLIENT": "", "TCPREMOTEINFO": "joe", **joe}


def test_the_interpreter_puts_nothing_into_the_environment(host: Stage) -> None:
    """In the C locale it adds LC_CTYPE (PEP 538); a stand-in that is no Python would show it."""
    path = host.tools / "shell-queue"
    path.write_text(
        f"#!/bin/sh\nenv >{host.tools}/environ\ncat <&0 >/dev/null\ncat <&1 >/dev/null\n"
    )
    path.chmod(0o755)
    host.environment({"QMAILQUEUE": str(path)})
    with Program(host) as program:
        client = greeted(program)
        begin_message(client)
        client.send(b"x\r\n.\r\n")
        assert (client.reply() or "").startswith("250 ok ")
    names = {line.partition("=")[0] for line in (host.tools / "environ").read_text().splitlines()}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == set(host.env)


def test_a_variable_without_a_name_is_not_handed_on(host: Stage) -> None:
    """No process could be started with it by posix_spawn."""
    with Program(host, command=["/usr/bin/env", "=x", *under_test()]) as program:
        client = greeted(program)
        assert client.command(b"AUTH PLAIN AGpvZQBzZWNyZXQ=") == "235 ok, go ahead (#2.0.0)"
        begin_message(client)
        client.send(b"x\r\n.\r\n")
        assert (client.reply() or "").startswith("250 ok ")
    (check,), (delivery,) = host.checks(), host.deliveries()
    assert "" not in {*check.environ, *delivery.environ}


def in_shell(words: str) -> list[str]:
    """The program, started by a shell that first does something; `"$@"` is the program."""
    return ["/bin/sh", "-c", words, "sh", *under_test()]


@pytest.mark.parametrize(
    "words", ['exec "$@" 2>&-', 'exec "$@" 2>/dev/full', 'exec "$@" 2</dev/null']
)
def test_a_log_that_takes_nothing_stops_nothing(host: Stage, words: str) -> None:
    """And no line of it goes anywhere else."""
    with Program(host, command=in_shell(words)) as program:
        client = greeted(program)
        client.command(b"RCPT TO:<x>")
        begin_message(client)
        client.command(b"x\r\n.")
        client.send(MAIL + b"RCPT TO:<user@elsewhere.example>\r\nQUIT\r\n")
        assert client.read_to_end().count(b"\r\n") == 3
        assert program.wait() == 0
    assert queued(host) == [b"x\n"]
    (delivery,) = host.deliveries()
    assert delivery.descriptors[2].startswith("/dev/")


@pytest.mark.parametrize("limit", [5, 6, 7, 8])
def test_few_descriptors_are_a_temporary_failure(host: Stage, limit: int) -> None:
    with Program(host, command=in_shell(f'ulimit -n {limit}; exec "$@"')) as program:
        client = program.client
        said = [client.reply()]
        for line in (MAIL + RCPT + b"DATA\r\nx\r\n.\r\n",):
            client.send(line)
            client.close("write")
        text = client.read_to_end()
        assert program.wait() in (1, 111)
    replies = [reply for reply in said if reply] + grammar.replies(text)
    if any(reply.startswith("250 ok ") and "qp" in reply for reply in replies):
        assert queued(host) == [b"x\n"]
    else:
        assert queued(host) == []


@pytest.mark.tls
@pytest.mark.parametrize("megabytes", [8, 12, 16, 20, 24, 26, 28, 30, 32, 34, 36, 40, 48, 64, 128])
def test_whatever_the_memory_limit_it_works_or_says_what_it_lacks(
    host: Stage, megabytes: int
) -> None:
    """From too little for the interpreter to enough for TLS: never a hang or half a message."""
    command = in_shell(f'ulimit -v {megabytes * 1024}; exec "$@"')
    with Program(host, command=command) as program:
        worked = whole_session(program.client)
        status = program.wait()
    assert len(queued(host)) == worked
    assert worked or megabytes < 128
    # In too little for itself the interpreter can end without a word: by a signal, or with 1.
    is_its_own_end = status < 0 or (status == 1 and megabytes <= 12)
    assert worked or program.log or is_its_own_end, "neither said a word"
    if b": connect ip=" in program.log:
        assert status >= 0, program.log
        assert worked or LACK_OF_MEMORY.search(program.log), program.log


LACK_OF_MEMORY = re.compile(
    rb"(?i)memory|failed to map segment|SystemError at <frozen importlib",  # as imports put it
)


def whole_session(client: Client) -> bool:
    """Whether TLS and a message work; to stop at any point is no error here."""
    client.reply()
    if client.command(b"STARTTLS") != "220 ready for tls":
        client.command(b"QUIT")
        return False
    if client.start_tls() != "ok":
        return False
    client.send(MAIL + RCPT + b"DATA\r\n")
    if [client.reply() for _ in range(3)] != ["250 ok", "250 ok", "354 go ahead"]:
        return False
    client.send(b"x\r\n.\r\n")
    return (client.reply() or "").startswith("250 ok ") and client.command(b"QUIT") is not None


def test_plain_files_as_descriptors(host: Stage) -> None:
    dialogue, replies = host.tools / "dialogue", host.tools / "replies"
    dialogue.write_bytes(MAIL + RCPT + b"DATA\r\nx\r\n.\r\nQUIT\r\n")
    with open(dialogue, "rb") as given, open(replies, "wb") as taken:
        done = subprocess.run(
            under_test(), stdin=given, stdout=taken, stderr=subprocess.PIPE, env=host.env
        )
    assert done.returncode == 0
    assert grammar.codes(replies.read_bytes()) == [220, 250, 250, 354, 250, 221]
    assert queued(host) == [b"x\n"]


# Files that an unprivileged user may not read

# The program, loaded while its files can be read, and then without privileges.
UNPRIVILEGED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from qmail_smtpd_py.smtpd import main
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
os._exit(main())
"""

CONTROL_FILES = {
    "me": "mx.example.org\n",
    "smtpgreeting": "mx.example.org\n",
    "rcpthosts": "example.org\n",
    "badmailfrom": "bad@example.com\n",
    "databytes": "1000\n",
    "timeoutsmtpd": "10\n",
    "localiphost": "mx.example.org\n",
    "morercpthosts.cdb": "@morercpthosts.cdb",
}

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def open_stage(recorder: Path):
    """A stage that everybody may enter."""
    directory = Path(tempfile.mkdtemp(prefix="qmail-smtpd-"))
    directory.chmod(0o755)
    yield Stage(directory, recorder)
    shutil.rmtree(directory)


def run_as_nobody(stage: Stage, dialogue: bytes) -> tuple[bytes, bytes, int]:
    """What it says, what it logs, and its exit status."""
    with Program(stage, command=[sys.executable, "-I", "-c", UNPRIVILEGED]) as program:
        program.client.send(dialogue)
        said = program.client.read_to_end()
        status = program.wait()
    return said, program.log, status


@as_root
@pytest.mark.parametrize("name", CONTROL_FILES)
def test_a_control_file_that_may_not_be_read_is_no_open_relay(open_stage: Stage, name: str) -> None:
    open_stage.control(CONTROL_FILES)
    (open_stage.home / "control" / name).chmod(0o600)
    said, log, status = run_as_nobody(
        open_stage, MAIL + b"RCPT TO:<u@elsewhere.example>\r\nQUIT\r\n"
    )
    assert said == b"421 unable to read controls (#4.3.0)\r\n"
    assert status == 1
    (line,) = logs.read_all(log)
    assert line.fields["why"] == f"cannot read control/{name}: Permission denied (uid {NOBODY})"


@as_root
def test_a_certificate_that_may_not_be_read_is_not_advertised(open_stage: Stage) -> None:
    open_stage.control({**CONTROL_FILES, "servercert.pem": "@server-rsa.pem"})
    (open_stage.home / "control" / "servercert.pem").chmod(0o600)
    said, log, status = run_as_nobody(open_stage, b"EHLO x\r\nQUIT\r\n")
    assert grammar.codes(said) == [220, 250, 221]
    assert b"STARTTLS" not in said
    assert status == 0
    (line,) = [line for line in logs.read_all(log) if line.event == "error"]
    assert "control/servercert.pem: Permission denied" in line.fields["why"]


@pytest.mark.parametrize("name", ["me", "rcpthosts"])
def test_a_named_pipe_holds_nobody_up(open_stage: Stage, name: str) -> None:
    open_stage.control({other: text for other, text in CONTROL_FILES.items() if other != name})
    os.mkfifo(open_stage.home / "control" / name)
    with Program(open_stage) as program:
        assert program.client.read_to_end() == b"421 unable to read controls (#4.3.0)\r\n"
        assert program.wait() == 1
    (line,) = logs.read_all(program.log)
    assert line.fields["why"] == f"cannot read control/{name}: not a file (uid {os.geteuid()})"


@pytest.mark.tls
@pytest.mark.parametrize("has_writer", [False, True])
def test_a_certificate_that_is_a_named_pipe_holds_nobody_up(
    open_stage: Stage, has_writer: bool
) -> None:
    open_stage.control(CONTROL_FILES)
    path = open_stage.home / "control" / "servercert.pem"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR) if has_writer else None
    try:
        with Program(open_stage) as program:
            client = program.client
            assert client.reply() == "220 mx.example.org ESMTP"
            answer = client.command(b"STARTTLS")
            assert answer == "454 TLS missing certificate: not a file (#4.3.0)"
            assert client.command(b"QUIT") == "221 mx.example.org"
    finally:
        if writer is not None:
            os.close(writer)


@as_root
def test_control_files_that_everybody_may_read_will_do(open_stage: Stage) -> None:
    open_stage.control(CONTROL_FILES)
    said, _, status = run_as_nobody(open_stage, MAIL + b"RCPT TO:<u@elsewhere.example>\r\nQUIT\r\n")
    assert grammar.codes(said) == [220, 250, 553, 221]
    assert status == 0


@pytest.mark.parametrize("what", ["no directory", "a file", "no control"])
def test_a_home_that_is_none(stage: Stage, what: str) -> None:
    if what == "no directory":
        stage.env["QMAILHOME"] += "/missing"
    elif what == "a file":
        (stage.home / "file").touch()
        stage.env["QMAILHOME"] += "/file"
    with Program(stage) as program:
        assert program.client.read_to_end() == b"421 unable to read controls (#4.3.0)\r\n"
        assert program.wait() == 1
    (line,) = logs.read_all(program.log)
    wanted = (
        "neither control/me"
        if what == "no control"
        else f"cannot change to {stage.env['QMAILHOME']}"
    )
    assert line.fields["why"].startswith(wanted)
