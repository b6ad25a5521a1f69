"""The check program: what it is given, what its end means, and that it can not hold anything up.

Fake programs, each a few words of shell, run by the same function that a session uses.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest
from conformance.program import ROOT
from conformance.stage import Stage, inheritable

from qmail_smtpd_py import checkpassword, reply
from qmail_smtpd_py.reply import Reply
from qmail_smtpd_py.sasl import Credentials

TEXT = b"user\0sesame\0"
# Without LC_ALL the interpreter of the stand-in would add LC_CTYPE of its own.
ENVIRON = {b"PATH": b"/usr/bin:/bin", b"LC_ALL": b"C", b"TCPREMOTEIP": b"192.0.2.1"}
SOON = 5.0  # seconds; what is not held up takes a small part of that

MORE_THAN_A_PIPE_HOLDS = b"x" * 200_000


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    """No descriptor, no child and no zombie; and a refusal, which would take seconds, does not."""
    monkeypatch.setattr(checkpassword, "FAILURE_DELAY", 0)
    descriptors = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


class Check:
    """Runs check programs; `told` is what the log was told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[str] = []
        self.left: list[int] = []

    def shell(self, script: str, text: bytes = TEXT, seconds: float = 60) -> Reply:
        """The reply to what a shell script says."""
        path = self.directory / "check"
        path.write_text(f"#!/bin/sh\ncd {self.directory}\n{script}\n")
        path.chmod(0o755)
        return self.run([str(path)], text, seconds)

    def run(self, arguments: list[str], text: bytes = TEXT, seconds: float = 60) -> Reply:
        words = [os.fsencode(word) for word in arguments]
        tell, left = self.told.append, self.left
        return checkpassword.authenticate(words, text, ENVIRON, seconds, tell, left)

    def wrote(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


@pytest.mark.parametrize("status", [0, 1, 2, 100, 110, 111, 112, 126, 127, 128, 255])
def test_exit_status(check: Check, status: int) -> None:
    wanted = {0: reply.AUTHENTICATED, 111: reply.AUTH_TROUBLE}.get(status, reply.AUTH_FAILED)
    assert check.shell(f"cat <&3 >/dev/null; exit {status}") is wanted
    assert check.told == (
        ["check program has temporary trouble: exit status 111"] * (status == 111)
    )


@pytest.mark.parametrize("signal", [6, 9, 11, 13, 15, 25])
def test_a_signal_is_trouble(check: Check, signal: int) -> None:
    """SIGPIPE and SIGXFSZ too, which the interpreter ignores and its children would."""
    assert check.shell(f"kill -{signal} $$; exit 0") is reply.AUTH_TROUBLE
    assert check.told == [f"check program ended by signal {signal}"]


def test_a_refusal_is_slow_and_nothing_else_is(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpassword, "FAILURE_DELAY", 2.0)
    assert took(lambda: check.shell("exit 1")) >= 2.0
    assert took(lambda: check.shell("exit 0")) < 2.0
    assert took(lambda: check.shell("exit 111")) < 2.0


def took(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def test_what_it_is_given(check: Check, stage: Stage) -> None:
    """Text on descriptor 3, no input, the log for output, environment and arguments as given."""
    arguments = [stage.programs[name] for name in ("@checkpassword", "@true")]
    assert check.run([*arguments, "two words", "", "-x"]) is reply.AUTHENTICATED
    (given,) = stage.checks()
    assert given.read == {3: TEXT}
    assert given.argv == [*arguments, "two words", "", "-x"]
    assert given.environ == {name.decode(): value.decode() for name, value in ENVIRON.items()}
    assert given.descriptors[0] == "/dev/null"
    assert given.descriptors[1] == given.descriptors[2] == os.readlink("/proc/self/fd/2")
    assert given.descriptors.keys() - inheritable() == {0, 1, 2, 3}


def test_a_program_without_a_slash_is_looked_for(check: Check) -> None:
    assert check.run(["true"]) is reply.AUTHENTICATED


@pytest.mark.parametrize("path", [b"/etc/passwd:/nowhere:@", b"@:/nowhere", b":/nowhere", b"/bin:"])
def test_where_a_program_without_a_slash_is_looked_for(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    """As in execvp(3): what is no directory is passed over, and an empty one is where we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENVIRON, b"PATH", path.replace(b"@", os.fsencode(tmp_path)))
    (tmp_path / "a-check").symlink_to("/bin/true")
    assert check.run(["a-check"]) is reply.AUTHENTICATED


def test_a_program_that_reads_nothing(check: Check) -> None:
    assert check.shell("exit 0") is reply.AUTHENTICATED
    assert check.shell("exit 0", text=MORE_THAN_A_PIPE_HOLDS) is reply.AUTHENTICATED
    assert check.shell("exit 1", text=MORE_THAN_A_PIPE_HOLDS) is reply.AUTH_FAILED
    assert check.shell("exec 3<&-; exit 0", text=MORE_THAN_A_PIPE_HOLDS) is reply.AUTHENTICATED


def test_a_program_that_reads_late_gets_all(check: Check) -> None:
    assert check.shell("sleep 0.2; cat <&3 >text", MORE_THAN_A_PIPE_HOLDS) is reply.AUTHENTICATED
    assert check.wrote("text") == MORE_THAN_A_PIPE_HOLDS


@pytest.mark.parametrize("text", [TEXT, MORE_THAN_A_PIPE_HOLDS], ids=["small", "large"])
def test_a_program_that_hangs_is_killed(check: Check, text: bytes) -> None:
    seconds = took(lambda: check.shell("echo $$ >pid; exec sleep 100", text, seconds=0.3))
    assert 0.3 <= seconds < SOON
    assert check.told == ["check program killed: no answer in 0.3 s"]
    assert not os.path.exists(f"/proc/{check.wrote('pid').decode().strip()}")


def test_a_hang_is_trouble_and_no_refusal(check: Check) -> None:
    assert check.shell("exec sleep 100", seconds=0.2) is reply.AUTH_TROUBLE


def test_a_program_that_ignores_signals_is_killed_all_the_same(check: Check) -> None:
    script = "trap '' TERM INT HUP; while :; do sleep 0.01; done"
    assert check.shell(script, seconds=0.2) is reply.AUTH_TROUBLE


def test_one_that_has_become_another_user_is_left_alone(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill(2) is refused then, but not to root, who may run this."""

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkpassword.os, "kill", refuse)
    seconds = took(lambda: check.shell("echo $$ >pid; exec sleep 100", seconds=0.3))
    assert 0.3 <= seconds < SOON
    (pid,) = check.left
    assert pid == int(check.wrote("pid"))
    assert check.told == [
        "check program left alone, as it runs as another user: no answer in 0.3 s"
    ]
    monkeypatch.undo()
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_one_that_does_not_die_is_waited_for_later(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a disk."""
    monkeypatch.setattr(checkpassword, "_REAP_SECONDS", 0.1)
    monkeypatch.setattr(checkpassword.os, "kill", lambda pid, signal: None)
    assert check.shell("echo $$ >pid; exec sleep 100", seconds=0.3) is reply.AUTH_TROUBLE
    monkeypatch.undo()
    assert check.left == [int(check.wrote("pid"))]
    os.kill(check.left[0], 9)
    os.waitpid(check.left[0], 0)


def test_a_daemon_that_it_leaves_behind_delays_nothing(check: Check) -> None:
    """It has all of the program's descriptors."""
    script = "sleep 100 & echo $! >pid; exit 0"
    try:
        assert took(lambda: check.shell(script)) < SOON
    finally:
        os.kill(int(check.wrote("pid")), 9)


def test_a_flood_of_words_for_the_log_holds_nothing_up(
    check: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "cat <&3 >/dev/null; head -c 1000000 /dev/zero | tr '\\0' x; echo end >&2"
    assert check.shell(script) is reply.AUTHENTICATED
    out, err = capfd.readouterr()
    assert (out, err) == ("", "x" * 1_000_000 + "end\n")


@pytest.mark.parametrize("kind", ["missing", "not executable", "directory", "no interpreter"])
def test_a_program_that_can_not_be_started(check: Check, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "check"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_text("#!/no/such/interpreter\n" if kind == "no interpreter" else "words\n")
        path.chmod(0o755 if kind == "no interpreter" else 0o644)
    assert check.run([str(path)]) is reply.AUTH_NO_CHILD
    reason = (
        "No such file or directory"
        if kind in ("missing", "no interpreter")
        else "Permission denied"
    )
    assert check.told == [f"cannot start check program {path}: {reason} (uid {os.geteuid()})"]


def test_an_environment_that_no_process_can_have(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRON, b"", b"x")
    assert check.run(["true"]) is reply.AUTH_NO_CHILD
    why = "illegal environment variable name"
    assert check.told == [f"cannot start check program true: {why} (uid {os.geteuid()})"]


@pytest.mark.parametrize(
    ("program", "counts", "expected", "delay"),
    [
        (b"false", True, reply.AUTH_FAILED, [4711]),
        (b"false", False, reply.AUTH_TOO_OFTEN, [4711]),
        (b"true", True, reply.AUTHENTICATED, []),
        (b"true", False, reply.AUTH_TOO_OFTEN, [4711]),
    ],
)
def test_an_outcome_is_counted_before_the_delay(
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    program: bytes,
    counts: bool,
    expected: reply.Reply,
    delay: list[int],
) -> None:
    """Otherwise a client that hangs up meanwhile, or has many sessions, could try more often."""
    order: list[object] = []
    monkeypatch.setattr(checkpassword, "FAILURE_DELAY", 4711)
    monkeypatch.setattr(
        checkpassword.time, "sleep", lambda seconds: order.append(seconds) if seconds > 1 else None
    )

    def count(has_failed: bool) -> bool:
        order.append(has_failed)
        return counts

    answer = checkpassword.authenticate([program], TEXT, ENVIRON, 60, check.told.append, [], count)
    assert answer is expected
    assert order == [program == b"false", *delay]


def test_a_pipe_that_is_descriptor_3_already(check: Check) -> None:
    """As it is in the program: to copy it to itself does not make it stay at exec everywhere, so
    that has to be seen to before.
    """
    script = """
import os
from qmail_smtpd_py import checkpassword

os.closerange(3, 64)
reader, writer = os.pipe()
os.set_inheritable(reader, False)
checkpassword._start([b"true"], reader, {b"PATH": b"/bin:/usr/bin"})
print(reader, os.get_inheritable(reader))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == b"3 True\n"


def test_no_descriptors(check: Check) -> None:
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = os.open("/dev/null", os.O_RDONLY)
    os.close(in_use)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 1, hard))
    try:
        assert check.run(["true"]) is reply.AUTH_NO_PIPE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert check.told == ["no pipe for the check program: Too many open files"]


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(1, 10), (10, 10), (45, 45), (60, 60), (1200, 60)]
)
def test_patience(timeout: float, seconds: float) -> None:
    assert checkpassword.patience(timeout) == seconds


def test_fields() -> None:
    assert checkpassword.fields(Credentials(b"u", b"p"), with_challenge=False) == b"u\0p\0"
    assert checkpassword.fields(Credentials(b"u", b"p"), with_challenge=True) == b"u\0p\0\0"
    cram = Credentials(b"u", b"d", b"<c@h>")
    assert checkpassword.fields(cram, with_challenge=True) == b"u\0d\0<c@h>\0"
