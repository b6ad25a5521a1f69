"""checkpassword-users as qmail-smtpd knows it: descriptor 3, exit status, a log line, a command.

The real program runs in a home directory of its own, against a users file whose hashes are cheap
(ln=4) where the cost is not what is tested.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from binascii import b2a_base64
from pathlib import Path

import pytest
from conformance.logs import nobody_reads

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-IS", str(ROOT / "bin" / "checkpassword-users")]
NOBODY = 65534

# The program, loaded while its files can still be read, and then without privileges.
UNPRIVILEGED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from qmail_smtpd_py import users_file
from qmail_smtpd_py.users_check import main
if os.getuid() == 0:
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
os._exit(main())
"""

ODD_PASSWORD = bytes(octet for octet in range(1, 256))
CHALLENGE = b"<1896.697170952@postoffice.reston.mci.net>"


def base64(octets):
    return b2a_base64(octets, newline=False)


def password_hash(password, ln=4, r=8, p=1):
    salt = hashlib.sha256(password).digest()[:16]  # the same in each run: it is in names of tests
    digest = hashlib.scrypt(password, salt=salt, n=1 << ln, r=r, p=p, dklen=32, maxmem=1 << 27)
    costs = b"$scrypt$ln=%d,r=%d,p=%d" % (ln, r, p)
    return b"$".join([costs, base64(salt).rstrip(b"="), base64(digest).rstrip(b"=")])


ALICE = b"alice:" + password_hash(b"sesame")
USERS = b"\n".join(
    [
        b"# kept by qmail-smtpd-users",
        ALICE,
        b"",
        b"bob@example.org:" + password_hash(ODD_PASSWORD),
        "grün:".encode() + password_hash("süß".encode()),
        # The user, password, challenge and digest of RFC 2195 section 2.
        b"tim:%s:%s" % (password_hash(b"tanstaaftanstaaf"), base64(b"tanstaaftanstaaf")),
        b"odd:%s:%s" % (password_hash(ODD_PASSWORD), base64(ODD_PASSWORD)),
        b"",
    ]
)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "control").mkdir()
    write_users(tmp_path, USERS)
    return tmp_path


def write_users(home, text, mode=0o600):
    path = home / "control" / "smtpusers"
    path.write_bytes(text)
    path.chmod(mode)
    return path


def check(
    home, credentials, command=("true",), program=PROGRAM, env=None, log=subprocess.PIPE, **popen
):
    """Run the program with these octets on descriptor 3, as qmail-smtpd does."""
    shell = ["sh", "-c", 'exec 3<&0 </dev/null; exec "$@"', "sh"]
    with tempfile.TemporaryFile() as file:
        file.write(credentials)
        file.seek(0)
        return subprocess.run(
            [*shell, *program, *command],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=home,
            env={"PATH": os.environ["PATH"], **(env or {})},
            **popen,
        )


def assert_log(done, *words):
    """The log is one line of printable ASCII with these words in it."""
    assert re.fullmatch(rb"checkpassword-users\[\d+\]: [ -~]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


def fields(*values):
    return b"".join(value + b"\0" for value in values)


def digest(secret, challenge=CHALLENGE):
    return hmac.new(secret, challenge, "md5").hexdigest().encode()


# Accepted


@pytest.mark.parametrize(
    "credentials",
    [
        fields(b"alice", b"sesame"),
        fields(b"alice", b"sesame", b""),
        fields(b"bob@example.org", ODD_PASSWORD),
        fields("grün".encode(), "süß".encode(), b""),
        fields(b"tim", b"tanstaaftanstaaf", b""),
        fields(b"tim", b"b913a602c7eda7a495b4e6e7334d3890", CHALLENGE),
        fields(b"tim", b"B913A602C7EDA7A495B4E6E7334D3890", CHALLENGE),
        fields(b"odd", digest(ODD_PASSWORD), CHALLENGE),
    ],
)
def test_right_credentials_run_the_command(home, credentials):
    done = check(home, credentials, ["sh", "-c", "echo ran; exit 7"])
    assert (done.returncode, done.stdout, done.stderr) == (7, b"ran\n", b"")


def test_the_command_takes_the_programs_place(home):
    """It has the process id, the environment, and nothing that holds a password."""
    script = 'echo "$$ $PPID"; env; cat <&3'
    with tempfile.TemporaryFile() as file:
        file.write(fields(b"alice", b"sesame"))
        file.seek(0)
        process = subprocess.Popen(
            ["sh", "-c", 'exec 3<&0 </dev/null; exec "$@"', "sh", *PROGRAM, "sh", "-c", script],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=home,
            env={"PATH": os.environ["PATH"], "PWD": str(home), "MARK": "x"},
        )
        out, errors = process.communicate()
    first, *environment = out.splitlines()
    assert first == b"%d %d" % (process.pid, os.getpid())
    names = {line.partition(b"=")[0] for line in environment}
    # The shell adds some, and the interpreter, in the C locale, LC_CTYPE (PEP 538).
    assert names - {b"_", b"SHLVL", b"OLDPWD", b"LC_CTYPE"} == {b"PATH", b"PWD", b"MARK"}
    assert b"sesame" not in out
    assert b"3" in errors  # sh: descriptor 3 is closed
    assert process.returncode != 0


@pytest.mark.parametrize("number", [signal.SIGPIPE, signal.SIGXFSZ])
def test_the_command_finds_the_usual_signals(home, number):
    done = check(home, fields(b"alice", b"sesame"), ["sh", "-c", f"kill -{int(number)} $$; exit 7"])
    assert done.returncode == -number


def test_smtpusers_says_where_the_users_are(home):
    path = write_users(home, USERS)
    other = path.rename(home / "other")
    for name in (str(other), "other"):
        assert check(home, fields(b"alice", b"sesame"), env={"SMTPUSERS": name}).returncode == 0


def test_the_program_starts_by_its_first_line(home):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = check(home, fields(b"alice", b"sesame"), program=PROGRAM[2:], env={"PATH": path})
    assert (done.returncode, done.stderr) == (0, b"")


# Refused


@pytest.mark.parametrize(
    ("credentials", "cause"),
    [
        (fields(b"alice", b"Sesame"), b"wrong password"),
        (fields(b"alice", b"sesame "), b"wrong password"),
        (fields(b"alice", b""), b"wrong password"),
        (fields(b"alice", ALICE.partition(b":")[2]), b"wrong password"),
        (fields(b"alice", b"sesame", CHALLENGE), b"no secret for CRAM-MD5 is kept"),
        (fields(b"alice", digest(b"sesame"), CHALLENGE), b"no secret for CRAM-MD5 is kept"),
        (fields(b"alice", digest(b""), CHALLENGE), b"no secret for CRAM-MD5 is kept"),
        (fields(b"tim", digest(b""), CHALLENGE), b"wrong CRAM-MD5 digest"),
        (fields(b"tim", b"tanstaaftanstaaf", CHALLENGE), b"wrong CRAM-MD5 digest"),
        (fields(b"tim", digest(b"tanstaaftanstaaf"), b"<another>"), b"wrong CRAM-MD5 digest"),
        (fields(b"tim", b"", CHALLENGE), b"wrong CRAM-MD5 digest"),
        (fields(b"tim", b"\xff" * 32, CHALLENGE), b"wrong CRAM-MD5 digest"),
        (fields(b"tim", digest(b"tanstaaftanstaaf"), b""), b"wrong password"),
        (fields(b"", b""), b"no such user"),
        (fields(b"", b"", b""), b"no such user"),
        (fields(b"", digest(b""), CHALLENGE), b"no such user"),
        (fields(b"Alice", b"sesame"), b"no such user"),
        (fields(b"alice ", b"sesame"), b"no such user"),
        (fields(b"# kept by qmail-smtpd-users", b""), b"no such user"),
        (fields(b"nobody", b"sesame"), b"no such user"),
        (fields(b"nobody", digest(b""), CHALLENGE), b"no such user"),
    ],
)
def test_wrong_credentials_are_refused(home, credentials, cause):
    done = check(home, credentials, ["echo", "ran"], env={"TCPREMOTEIP": "192.0.2.1"})
    assert (done.returncode, done.stdout) == (1, b"")
    assert_log(done, b"refused: user ", b" from '192.0.2.1': ", cause)


def test_a_log_that_nobody_reads_holds_nobody_up(home):
    with nobody_reads() as log:
        done = check(home, fields(b"alice", b"wrong"), log=log, timeout=30)
    assert done.returncode == 1


def test_the_log_shows_no_secret_and_no_control(home):
    password = b"open-sesame"
    for credentials in (
        fields(b"alice", password),
        fields(b"tim", password, CHALLENGE),
        fields(b"x\n\x1b[31m\xff\r" + b"y" * 5000, password),
    ):
        done = check(home, credentials, env={"TCPREMOTEIP": "1\n2"})
        assert done.returncode == 1
        assert_log(done)
        assert len(done.stderr) < 1000
        for secret in (password, b"tanstaaf", base64(b"tanstaaftanstaaf"), digest(b"sesame")):
            assert secret not in done.stderr


def test_an_unknown_user_costs_as_much_as_a_known_one(home):
    write_users(home, b"alice:" + password_hash(b"sesame", ln=14, p=5))

    def seconds(user):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert check(home, fields(user, b"wrong")).returncode == 1
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    known = min(seconds(b"alice") for _ in range(3))
    unknown = min(seconds(b"nobody") for _ in range(3))
    assert 0.5 < unknown / known < 2  # Without the work it would be 0.1.


# Misused


@pytest.mark.parametrize(
    "credentials",
    [
        b"",
        b"\0",
        b"alice",
        b"alice\0",
        b"alice\0sesame",
        b"alice\0sesame\0challenge",
        b"alice\0sesame\0\0x",
        b"alice\0sesame\0\0\0",
        fields(b"alice", b"sesame").ljust(65537, b"x"),
        b"x" * 1_000_000,
    ],
)
def test_no_credentials_on_descriptor_3(home, credentials):
    done = check(home, credentials, ["echo", "ran"])
    assert (done.returncode, done.stdout) == (2, b"")
    assert_log(done, b"misused: ", b"descriptor 3")
    assert b"sesame" not in done.stderr


@pytest.mark.parametrize("redirection", ["3<&-", "3>/dev/null"])
def test_descriptor_3_that_can_not_be_read(home, redirection):
    script = f'exec "$@" {redirection}'
    command = ["sh", "-c", script, "sh", *PROGRAM, "true"]
    done = subprocess.run(command, cwd=home, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert_log(done, b"misused: descriptor 3 is not open")


def test_no_command(home):
    done = check(home, fields(b"alice", b"sesame"), [])
    assert done.returncode == 2
    assert_log(done, b"misused: there is no program to run")


def test_all_that_qmail_smtpd_can_send_is_taken(home):
    """An AUTH line has 12288 octets of base64, so a field no more than 9216; 65536 are read."""
    longest = b"x" * (65536 - len(fields(b"alice", b"")))
    write_users(home, b"alice:" + password_hash(longest))
    assert check(home, fields(b"alice", longest)).returncode == 0


# Temporary trouble


def assert_trouble(done, *words):
    assert (done.returncode, done.stdout) == (111, b"")
    assert_log(done, b"trouble: ", *words)


def check_alice(home, **options):
    return check(home, fields(b"alice", b"sesame"), ["echo", "ran"], **options)


def test_no_users_file(home):
    (home / "control" / "smtpusers").unlink()
    assert_trouble(check_alice(home), b"there is no 'control/smtpusers'", b"qmail-smtpd-users set")


def test_no_control_directory(home):
    shutil.rmtree(home / "control")
    assert_trouble(check_alice(home), b"there is no 'control/smtpusers'")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666, 0o644, 0o660])
def test_a_users_file_that_others_can_read_or_write(home, mode):
    write_users(home, USERS, mode)
    done = check_alice(home)
    words = b"'control/smtpusers' (mode %04o, owner uid %d)" % (mode, os.getuid())
    remedy = f"chmod g-w,o= '{home}/control/smtpusers'".encode()
    assert_trouble(done, words, b"uid %d to trust" % os.getuid(), remedy)


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600, 0o640])
def test_a_users_file_that_is_kept_well(home, mode):
    write_users(home, USERS, mode)
    assert check_alice(home).returncode == 0


def test_a_users_file_that_can_not_be_read():
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    (home / "control").mkdir()
    write_users(home, USERS, 0o600 if os.getuid() == 0 else 0)
    done = check_alice(home, program=[sys.executable, "-IS", "-c", UNPRIVILEGED])
    shutil.rmtree(home)
    uid = os.getuid() or NOBODY
    assert_trouble(done, b"uid %d may not read 'control/smtpusers'" % uid, b"chmod 640")


def test_a_directory_in_its_place(home):
    (home / "control" / "smtpusers").unlink()
    (home / "control" / "smtpusers").mkdir(mode=0o700)
    assert_trouble(check_alice(home), b"'control/smtpusers'")


def test_a_named_pipe_in_its_place(home):
    (home / "control" / "smtpusers").unlink()
    os.mkfifo(home / "control" / "smtpusers", 0o600)
    assert_trouble(check_alice(home, timeout=20), b"is not a file")


@pytest.mark.parametrize(
    "line",
    [
        b"carol",
        b"carol:",
        b"carol:secret",
        b":" + password_hash(b"x"),
        b" carol:" + password_hash(b"x"),
        b"carol\x1b:" + password_hash(b"x"),
        b"\xff:" + password_hash(b"x"),
        b"carol:" + password_hash(b"x") + b":",
        b"carol:" + password_hash(b"x") + b":secret",
        b"carol:" + password_hash(b"x") + b":c2VjcmV0:",
        b"carol:" + password_hash(b"x") + b":c2Vj cmV0",
        b"carol:" + password_hash(b"x").replace(b"scrypt", b"bcrypt"),
        b"carol:" + password_hash(b"x").replace(b"ln=4", b"ln=04"),
        b"carol:" + password_hash(b"x").replace(b"ln=4", b"N=16"),
        b"carol:" + password_hash(b"x").replace(b"ln=4", b"ln=0"),
        b"carol:" + password_hash(b"x").replace(b"ln=4", b"ln=-4"),
        b"carol:" + password_hash(b"x").replace(b"ln=4", b"ln=17"),
        b"carol:" + password_hash(b"x").replace(b"ln=4", b"ln=999999999999"),
        b"carol:" + password_hash(b"x").replace(b"r=8", b"r=0"),
        b"carol:" + password_hash(b"x").replace(b"p=1", b"p=17"),
        b"carol:" + password_hash(b"x").replace(b"p=1", b"p=1,q=1"),
        b"carol:" + password_hash(b"x")[:-30],
        b"carol:" + password_hash(b"x") + b"=",
        b"carol:" + password_hash(b"x").rpartition(b"$")[0] + b"$",
        b"carol:$scrypt$ln=4,r=8,p=1$$" + b"A" * 43,
        b"alice:" + password_hash(b"another"),
        b"\0" * 100,
    ],
)
def test_a_users_file_with_a_line_that_is_wrong(home, line):
    write_users(home, USERS + line + b"\n")
    done = check_alice(home)
    assert_trouble(done, b"'control/smtpusers': line %d " % (USERS.count(b"\n") + 1))
    assert b"carol" not in done.stderr


@pytest.mark.parametrize("end", [b"", b"\n", b" \t\n", b"\r\n", b"\n\n# end"])
def test_a_users_file_that_was_edited_by_hand(home, end):
    write_users(home, b"#\n\n" + ALICE + end)
    assert check_alice(home).returncode == 0


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("/absent", b"'/absent' (uid %d): No such file" % os.getuid()),
        ("absent-program", b"'absent-program'"),
        ("/", b"'/' (uid %d): Permission denied" % os.getuid()),
        ("", b"''"),
    ],
)
def test_a_command_that_can_not_be_run(home, command, cause):
    done = check(home, fields(b"alice", b"sesame"), [command])
    assert_trouble(done, b"cannot run ", cause)


def test_too_little_memory_is_no_refusal(home):
    """Below what scrypt needs: trouble with a word of softlimit; 1 would have users retype."""
    write_users(home, b"alice:" + password_hash(b"sesame", ln=14, p=5))
    seen = set()
    for limit in range(8 << 20, 200 << 20, 2 << 20):

        def confine(limit=limit):
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (5, 5))  # the interpreter may find no end

        done = check_alice(home, preexec_fn=confine)
        if done.returncode and b"checkpassword-users[" not in done.stderr:
            continue  # The shell or the interpreter could not start, and said so itself.
        assert done.returncode in (0, 111), (limit, done)
        seen.add(done.returncode)
        if done.returncode == 0:
            break
        assert b"softlimit" in done.stderr
    assert seen == {0, 111}


# What it costs


def test_it_imports_only_what_it_needs():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import qmail_smtpd_py.users_check, qmail_smtpd_py.users_file
print(*sorted(sys.modules))
"""
    out = subprocess.run([sys.executable, "-IS", "-c", code], stdout=subprocess.PIPE, check=True)
    costly = {"argparse", "enum", "getpass", "logging", "re", "signal", "socket", "subprocess"}
    costly |= {"base64", "contextlib", "dataclasses", "fcntl", "pathlib", "typing"}
    assert not set(out.stdout.decode().split()) & costly
