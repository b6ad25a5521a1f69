"""qmail-queue-maildir as its callers know it: descriptors, exit status, one log line, a Maildir.

The real program runs in a home directory of its own.  Where a moment in its run matters, the test
finds it by a pipe: more than a pipe holds can only be written while the program reads.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conformance.logs import nobody_reads

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-IS", str(ROOT / "bin" / "qmail-queue-maildir")]
ENVELOPE = b"Fsender@example.org\0Trcpt@example.com\0\0"
MESSAGE = b"Subject: test\n\nbody\n"
NOBODY = 65534

MORE_THAN_A_PIPE_HOLDS = 256 * 1024

needs_strace = pytest.mark.skipif(
    not shutil.which("strace"), reason="strace shows the system calls, and has them fail"
)

# The program, loaded while its files can still be read, and then without privileges.
UNPRIVILEGED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from qmail_smtpd_py.maildir_queue import main
if os.getuid() == 0:
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
os._exit(main())
"""


@pytest.fixture
def home(tmp_path):
    return tmp_path


def queue(home, message=MESSAGE, envelope=ENVELOPE, program=PROGRAM, env=None, limit=None):
    """Run the program to its end; `limit` is a resource limit and its value."""
    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
        for file, octets in ((first, message), (second, envelope)):
            file.write(octets)
            file.seek(0)
        done = subprocess.run(
            program,
            stdin=first,
            stdout=second,
            stderr=subprocess.PIPE,
            cwd=home,
            env={} if env is None else env,
            preexec_fn=limit and (lambda: resource.setrlimit(limit[0], (limit[1], limit[1]))),
        )
    check_log(done.returncode, done.stderr)
    return done


def check_log(status, log):
    """A failure is one line of printable ASCII; a delivery is none."""
    if status == 0:
        assert log == b""
    else:
        assert re.fullmatch(rb"qmail-queue-maildir\[\d+\]: [ -~]+ \(uid \d+, in [ -~]+\)\n", log), (
            log
        )


def start(home):
    """Start the program on pipes: the process, and the ends to write message and envelope to."""
    envelope_read, envelope = os.pipe()
    process = subprocess.Popen(
        PROGRAM, stdin=subprocess.PIPE, stdout=envelope_read, stderr=subprocess.PIPE, cwd=home
    )
    os.close(envelope_read)
    return process, process.stdin.fileno(), envelope


def end(process, envelope):
    """Wait for the program; its exit status and log."""
    log = process.stderr.read()
    status = process.wait()
    for file in (process.stdin, process.stderr):
        file.close()
    os.close(envelope)
    check_log(status, log)
    return status


def write_all(descriptor, octets):
    while octets:
        octets = octets[os.write(descriptor, octets) :]


def files(home, directory, maildir="Maildir"):
    path = home / maildir / directory
    return sorted(path.iterdir()) if path.is_dir() else []


def delivered(home, maildir="Maildir"):
    """The octets of the one message that is there."""
    (path,) = files(home, "new", maildir)
    assert not files(home, "tmp", maildir)
    return path.read_bytes()


def assert_nothing_left(home):
    assert not files(home, "new")
    assert not files(home, "tmp")


def split_fields(octets):
    """The fields that the program put in front, and what came behind them."""
    match = re.match(rb"(Return-Path: .*\n(?:Envelope-To: .*\n)+Received: .*\n)", octets)
    assert match, octets[:500]
    return match[0], octets[match.end() :]


# What is delivered


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\n",
        b"no line end",
        MESSAGE,
        b"Subject: x\r\n\r\n.\r\nFrom me\r\n",
        bytes(range(256)) * 3,
        os.urandom(65536),
        os.urandom(65537),
        os.urandom(300001),
    ],
    ids=["empty", "newline", "no-end", "plain", "crlf", "octets", "block", "block+1", "blocks"],
)
def test_the_message_is_delivered_octet_for_octet(home, message):
    assert queue(home, message).returncode == 0
    assert split_fields(delivered(home))[1] == message


def test_the_fields(home):
    before = int(time.time())
    process, message, envelope = start(home)
    write_all(message, MESSAGE)
    process.stdin.close()
    write_all(envelope, b"Fa@b\0Tc@d\0Te@f\0Tc@d\0\0")
    assert end(process, envelope) == 0
    fields, _ = split_fields(delivered(home))
    match = re.fullmatch(
        rb"Return-Path: <a@b>\n"
        rb"Envelope-To: c@d\nEnvelope-To: e@f\nEnvelope-To: c@d\n"
        rb"Received: \(qmail %d invoked by uid %d\); (\d+ ... \d{4} \d\d:\d\d:\d\d) -0000\n"
        % (process.pid, os.getuid()),
        fields,
    )
    assert match, fields
    at = time.mktime(time.strptime(match[1].decode(), "%d %b %Y %H:%M:%S")) - time.timezone
    assert before - 1 <= at <= time.time() + 1


@pytest.mark.parametrize(
    ("address", "field"),
    [
        (b"", b""),
        (b"plain@example.org", b"plain@example.org"),
        (b"first.last+x@example.org", b"first.last+x@example.org"),
        (b"no-domain", b"no-domain"),
        (b"two words@example.org", b'"two words"@example.org'),
        (b"two words", b'"two words"'),
        (b'a"b\\c@example.org', b'"a\\"b\\\\c"@example.org'),
        (b".dot@example.org", b'".dot"@example.org'),
        (b"dot..dot@example.org", b'"dot..dot"@example.org'),
        (b"a@b@example.org", b'"a@b"@example.org'),
        (b"@example.org", b'""@example.org'),
        (b"a>, <b@example.org", b'"a>, <b"@example.org'),
        ("grüße@example.org".encode(), "grüße@example.org".encode()),
        (b"\xff\x80@example.org", b"\xff\x80@example.org"),
    ],
)
def test_addresses_are_quoted_as_a_field_wants_them(home, address, field):
    assert queue(home, envelope=b"F%s\0T%s\0\0" % (address, address)).returncode == 0
    lines = delivered(home).split(b"\n")
    assert lines[0] == b"Return-Path: <%s>" % field
    assert lines[1] == b"Envelope-To: %s" % field


def test_a_mebibyte_of_recipients(home):
    recipients = [b"%d@example.org" % number for number in range(60000)]
    assert queue(home, envelope=b"F\0T" + b"\0T".join(recipients) + b"\0\0").returncode == 0
    fields, message = split_fields(delivered(home))
    assert re.findall(rb"^Envelope-To: (.*)$", fields, re.MULTILINE) == recipients
    assert message == MESSAGE


def test_what_stands_behind_the_envelope_is_not_looked_at(home):
    assert queue(home, envelope=ENVELOPE + b"Xgarbage\n").returncode == 0
    assert b"garbage" not in delivered(home)


# Where it is delivered


def test_the_maildir_is_made_for_its_owner_alone(home):
    assert queue(home).returncode == 0
    for directory in ("", "tmp", "new", "cur"):
        assert (home / "Maildir" / directory).stat().st_mode & 0o7777 == 0o700
    (path,) = files(home, "new")
    assert path.stat().st_mode & 0o7777 == 0o600
    assert re.fullmatch(r"\d+\.M\d+P\d+R[0-9a-f]{16}\.[^/:]+", path.name)


def test_a_maildir_that_is_there_stays_as_it_is(home):
    for directory in ("", "new", "tmp"):
        (home / "Maildir" / directory).mkdir(mode=0o750)
    (home / "Maildir" / "tmp" / "another").write_bytes(b"x")
    assert queue(home).returncode == 0
    assert (home / "Maildir").stat().st_mode & 0o7777 == 0o750
    assert [path.name for path in files(home, "tmp")] == ["another"]
    assert len(files(home, "new")) == 1
    assert (home / "Maildir" / "cur").is_dir()


@pytest.mark.parametrize("maildir", ["elsewhere", "/absolute", "trailing/", "näme with blank"])
def test_qmailmaildir_says_where(home, maildir):
    if maildir.startswith("/"):
        maildir = f"{home}{maildir}"
    assert queue(home, env={"QMAILMAILDIR": maildir}).returncode == 0
    assert delivered(home, maildir).endswith(MESSAGE)


def test_an_empty_qmailmaildir_says_nothing(home):
    assert queue(home, env={"QMAILMAILDIR": ""}).returncode == 0
    assert delivered(home).endswith(MESSAGE)


def test_the_program_starts_by_its_first_line(home):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert queue(home, program=PROGRAM[2:], env={"PATH": path}).returncode == 0
    assert delivered(home).endswith(MESSAGE)


def test_deliveries_at_the_same_time_do_not_meet(home):
    with tempfile.NamedTemporaryFile() as envelope:
        envelope.write(ENVELOPE)
        envelope.flush()
        processes = []
        for number in range(20):
            with open(envelope.name, "rb") as second:
                process = subprocess.Popen(
                    PROGRAM, stdin=subprocess.PIPE, stdout=second, cwd=home, env={}
                )
            process.stdin.write(b"%d\n" % number)
            processes.append(process)
        for process in processes:
            process.stdin.close()
        assert [process.wait() for process in processes] == [0] * 20
    bodies = {split_fields(path.read_bytes())[1] for path in files(home, "new")}
    assert bodies == {b"%d\n" % number for number in range(20)}


# What is refused


@pytest.mark.parametrize(
    ("envelope", "status"),
    [
        (b"", 54),
        (b"F", 54),
        (b"Fa@b", 54),
        (b"Fa@b\0", 54),
        (b"Fa@b\0T", 54),
        (b"Fa@b\0Tc@d", 54),
        (b"Fa@b\0Tc@d\0", 54),
        (b"Fa@b\0Tc@d\0Te@f", 54),
        (b"\0", 91),
        (b"\0\0", 91),
        (b"a@b\0Tc@d\0\0", 91),
        (b"Ta@b\0Tc@d\0\0", 91),
        (b"Fa@b\0Fc@d\0\0", 91),
        (b"Fa@b\0Tc@d\0x\0\0", 91),
        (b"X", 91),
        (b"Fa@b\0X", 91),
        (b"Fa@b\0\0", 91),
        (b"Fa@b\nBcc: x\0Tc@d\0\0", 91),
        (b"Fa@b\0Tc@d\nX: y\0\0", 91),
        (b"Fa@b\0Tc@d\rX: y\0\0", 91),
        (b"Fa@b\0Tc@d\x7f\0\0", 91),
        (b"Fa@b\0Tc\t@d\0\0", 91),
        (b"F" + b"a" * 1003 + b"\0Tc@d\0\0", 11),
        (b"Fa@b\0T" + b"a" * 1003 + b"\0\0", 11),
        (b"Fa@b\0Tc@d\0T" + b"a" * 200000, 11),
    ],
)
def test_envelopes_that_are_none(home, envelope, status):
    assert queue(home, envelope=envelope).returncode == status
    assert_nothing_left(home)


def test_the_longest_address(home):
    longest = b"a" * 990 + b"@example.org"
    assert len(longest) == 1002
    assert queue(home, envelope=b"F%s\0T%s\0\0" % (longest, longest)).returncode == 0
    assert delivered(home).count(longest) == 2


def test_every_envelope_that_is_cut_short(home):
    """However much of an envelope a caller that gives up has written, nothing is delivered."""
    for length in range(len(ENVELOPE)):
        assert queue(home, envelope=ENVELOPE[:length]).returncode == 54
    assert_nothing_left(home)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", ">/dev/null", "0>/dev/null"])
def test_descriptors_that_can_not_be_read(home, closed):
    program = ["sh", "-c", f'exec "$@" {closed}', "sh", *PROGRAM]
    assert queue(home, program=program).returncode == 54
    assert_nothing_left(home)


def test_a_home_directory_that_is_gone(home):
    gone = home / "gone"
    gone.mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    assert queue(home, program=["sh", "-c", script, str(gone), *PROGRAM]).returncode == 61


def test_a_maildir_that_can_not_be_made(home):
    (home / "Maildir").write_bytes(b"a file\n")
    assert queue(home).returncode == 62
    done = queue(home, env={"QMAILMAILDIR": str(home / "absent" / "Maildir")})
    assert done.returncode == 62
    assert b"absent/Maildir': No such file or directory" in done.stderr


@pytest.mark.parametrize("directory", ["tmp", "new", "cur"])
def test_a_file_where_a_directory_should_be(home, directory):
    (home / "Maildir").mkdir()
    (home / "Maildir" / directory).write_bytes(b"a file\n")
    done = queue(home)
    assert done.returncode == 62
    assert f"'Maildir/{directory}': File exists".encode() in done.stderr


@pytest.fixture
def shared_home():
    """A home directory that an unprivileged user can work in."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    for directory in path.glob("Maildir/*"):
        directory.chmod(0o700)
    shutil.rmtree(path)


@pytest.mark.parametrize(("directory", "status"), [("Maildir", 62), ("tmp", 63), ("new", 64)])
def test_a_directory_that_can_not_be_written(shared_home, directory, status):
    if directory == "Maildir":
        shared_home.chmod(0o555)
    else:
        for name in ("", "tmp", "new", "cur"):
            (shared_home / "Maildir" / name).mkdir(mode=0o777)
            (shared_home / "Maildir" / name).chmod(0o777)
        (shared_home / "Maildir" / directory).chmod(0o555)
    done = queue(shared_home, program=[sys.executable, "-IS", "-c", UNPRIVILEGED])
    assert done.returncode == status
    assert b"Permission denied" in done.stderr
    uid = os.getuid() or NOBODY
    assert b"(uid %d," % uid in done.stderr
    assert_nothing_left(shared_home)


# What runs out


@pytest.mark.parametrize(
    ("size", "where"), [(200_000, b"spool the message"), (99_990, b"write 'Maildir/tmp/")]
)
def test_a_full_disk(home, size, where):
    """The limit of 100,000 octets is met by the spool, or only with the fields in front."""
    done = queue(home, b"x" * size, limit=(resource.RLIMIT_FSIZE, 100_000))
    assert done.returncode == 53
    assert b"cannot " + where in done.stderr
    assert_nothing_left(home)


def test_memory_does_not_grow_with_the_message(home):
    """What is enough for a small message is, with 1 MiB on top, enough for one of 20 MB."""
    megabyte = 1 << 20

    def enough(limit, message):
        limits = (resource.RLIMIT_AS, limit * megabyte)
        return run_limited(home, message, limits) == 0

    smallest = next(limit for limit in range(8, 200) if enough(limit, MESSAGE))
    big = os.urandom(20_000_000)
    assert enough(smallest + 1, big)
    assert any(path.stat().st_size > len(big) for path in files(home, "new"))


def run_limited(home, message, limit):
    """The exit status of a run whose interpreter may fail to start, with words of its own, or never
    come to an end with that.
    """

    def confine():
        resource.setrlimit(limit[0], (limit[1], limit[1]))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
        for file, octets in ((first, message), (second, ENVELOPE)):
            file.write(octets)
            file.seek(0)
        return subprocess.run(
            PROGRAM,
            stdin=first,
            stdout=second,
            stderr=subprocess.DEVNULL,
            cwd=home,
            preexec_fn=confine,
        ).returncode


def test_too_little_memory_delivers_nothing(home):
    for limit in range(4 << 20, 40 << 20, 1 << 20):
        status = run_limited(home, MESSAGE, (resource.RLIMIT_AS, limit))
        assert len(files(home, "new")) == (status == 0)
        assert not files(home, "tmp")
        if status == 0:
            break


@needs_strace
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("write:error=ENOSPC:when=1", 53),  # the message, into the spool
        ("write:error=ENOSPC:when=2", 53),  # the first field
        ("write:error=ENOSPC:when=5", 53),  # the message, behind the fields
        ("fsync:error=EIO:when=1", 53),  # the file
        ("rename:error=EXDEV", 64),
        ("fsync:error=EIO:when=2", 64),  # the directory: the name in new may not last
    ],
)
def test_a_disk_that_fails(home, fault, status):
    queue(home)
    (path,) = files(home, "new")
    path.unlink()
    call = fault.partition(":")[0]
    strace = ["strace", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={fault}"]
    assert queue(home, program=[*strace, *PROGRAM]).returncode == status
    assert_nothing_left(home)


# What ends it


def read_part_of_message(message):
    write_all(message, b"x" * MORE_THAN_A_PIPE_HOLDS)


def read_part_of_envelope(envelope):
    recipient = b"T" + b"a" * 100 + b"\0"
    write_all(envelope, b"F\0" + recipient * (MORE_THAN_A_PIPE_HOLDS // len(recipient)))


@pytest.mark.parametrize("number_and_status", [(signal.SIGALRM, 52), (signal.SIGTERM, 71)])
@pytest.mark.parametrize("part", ["message", "envelope"])
def test_signals_that_end_it(home, part, number_and_status):
    number, status = number_and_status
    process, message, envelope = start(home)
    if part == "message":
        read_part_of_message(message)
        assert not files(home, "tmp")  # The spool has no name.
    else:
        process.stdin.close()
        read_part_of_envelope(envelope)
        assert len(files(home, "tmp")) == 1
    process.send_signal(number)
    assert end(process, envelope) == status
    assert_nothing_left(home)


def test_signals_that_do_not(home):
    process, message, envelope = start(home)
    read_part_of_message(message)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXCPU):
        process.send_signal(number)
    process.stdin.close()
    write_all(envelope, ENVELOPE)
    assert end(process, envelope) == 0
    assert split_fields(delivered(home))[1] == b"x" * MORE_THAN_A_PIPE_HOLDS


def test_the_deadline_is_set(home):
    """With a deadline of 1 s instead of 86400, a caller that says no more is left after 1 s."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from qmail_smtpd_py import maildir_queue
assert maildir_queue.DEADLINE == 86400
maildir_queue.DEADLINE = 1
os._exit(maildir_queue.main())
"""
    envelope_read, envelope = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-IS", "-c", code],
        stdin=subprocess.PIPE,
        stdout=envelope_read,
        stderr=subprocess.DEVNULL,
        cwd=home,
    ) as process:
        assert process.wait(timeout=20) == 52
    os.close(envelope_read)
    os.close(envelope)
    assert_nothing_left(home)


def test_kill_at_any_moment_leaves_no_half_message(home):
    """Killed while it reads, nothing is there; killed after that, nothing or all of it."""
    body = os.urandom(1_000_000)
    moments = 60
    for moment in range(moments):
        process, message, envelope = start(home)
        if moment % 3 == 0:
            write_all(message, body[: 100_000 + moment * 10_000])
        else:
            write_all(message, body)
            process.stdin.close()
            write_all(envelope, ENVELOPE if moment % 3 == 1 else ENVELOPE[:-1])
            try:
                process.wait(timeout=moment / moments * 0.04)
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        status = process.wait()
        for file in (process.stdin, process.stderr):
            file.close()
        os.close(envelope)
        new = files(home, "new")
        assert len(new) <= (moment % 3 == 1)
        assert status != 0 or len(new) == 1
        for path in new:
            assert split_fields(path.read_bytes())[1] == body
            path.unlink()


@needs_strace
def test_it_is_on_the_disk_before_it_is_told(home):
    """The message, then its name in new; both before the exit status."""
    calls = "trace=fsync,rename,renameat,renameat2,exit_group"
    trace = home / "trace"
    queue(home)
    done = queue(home, program=["strace", "-y", "-o", str(trace), "-e", calls, *PROGRAM])
    assert done.returncode == 0
    fsync, rename, fsync_new, leave, _ = trace.read_text().splitlines()[-5:]
    assert re.match(r"fsync\(\d+</.*/Maildir/tmp/[^/]+>\) += 0$", fsync)
    assert re.match(r'rename\w*\(.*"Maildir/tmp/.*"Maildir/new/', rename)
    assert re.match(r"fsync\(\d+</.*/Maildir/new>\) += 0$", fsync_new)
    assert leave.startswith("exit_group(0)")


def test_a_log_that_nobody_reads_holds_nobody_up(home):
    with nobody_reads() as log:
        done = subprocess.run(
            PROGRAM,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd=home,
            timeout=30,
        )
    assert done.returncode == 54, "the envelope ends too early"


# What it costs


def test_it_imports_only_what_is_cheap():
    code = f"""
import sys
before = set(sys.modules)
sys.path.insert(0, {str(ROOT)!r})
import qmail_smtpd_py.maildir_queue
print(*sorted(set(sys.modules) - before))
"""
    out = subprocess.run([sys.executable, "-IS", "-c", code], stdout=subprocess.PIPE, check=True)
    package = "qmail_smtpd_py"
    assert set(out.stdout.decode().split()) <= {
        *(package, f"{package}.maildir_queue", f"{package}.log", f"{package}.trace", "select"),
        *("__future__", "os", "posixpath", "genericpath", "os.path", "stat", "_stat"),
        *("_collections_abc", "_abc", "abc", "errno", "time", "_signal"),
    }
