"""The users file, and qmail-smtpd-users as an administrator knows it."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import subprocess
import sys
from binascii import a2b_base64
from pathlib import Path

import pytest

from qmail_smtpd_py.users_file import (
    PasswordHash,
    Trouble,
    User,
    UsersFile,
    base64,
    change,
    load,
)

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, str(ROOT / "bin" / "qmail-smtpd-users")]
CHECK = [sys.executable, "-IS", str(ROOT / "bin" / "checkpassword-users")]

CHEAP = b"$scrypt$ln=4,r=8,p=1$" + b"A" * 22 + b"$" + b"A" * 43
USERS = b"# first\nalice:%s\n\nbob:%s:c2VjcmV0\n# last\n" % (CHEAP, CHEAP)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "control").mkdir()
    return tmp_path


@pytest.fixture
def path(home):
    return home / "control" / "smtpusers"


@pytest.fixture
def users(path):
    """A users file with two users and comments, and a mode that is not that of new files."""
    path.write_bytes(USERS)
    path.chmod(0o640)
    return path


def tool(home, *arguments, password=None, env=None, **popen):
    """Run the tool to its end; its exit status, standard output and standard error."""
    done = subprocess.run(
        [*PROGRAM, *arguments],
        input=b"" if password is None else password + b"\n",
        capture_output=True,
        env={"QMAILHOME": str(home), **(env or {})},
        check=False,
        **popen,
    )
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def accepts(home, user, password):
    """Whether checkpassword-users takes them; any exit status but 0 and 1 is an error."""
    done = subprocess.run(
        ["sh", "-c", 'exec 3<&0; exec "$@"', "sh", *CHECK, "true"],
        input=user + b"\0" + password + b"\0",
        stderr=subprocess.PIPE,
        cwd=home,
        check=False,
    )
    assert done.returncode in (0, 1), done
    return done.returncode == 0


# The format


def test_scrypt_is_that_of_rfc_7914():
    """Section 12, third vector: N=16384, r=8, p=1."""
    digest = bytes.fromhex(
        "7023bdcb3afd7348461c06cd81fd38eb fda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9 e61e85dc0d651e40dfcf017b45575887"
    )
    phc = PasswordHash(b"SodiumChloride", digest, ln=14, r=8, p=1)
    assert phc.matches(b"pleaseletmein")
    assert not phc.matches(b"pleaseletmeout")
    assert PasswordHash.parse(phc.render()).matches(b"pleaseletmein")


def test_a_new_hash_has_the_default_costs_and_its_own_salt():
    first, second = PasswordHash.of(b"same"), PasswordHash.of(b"same")
    pattern = rb"\$scrypt\$ln=14,r=8,p=5\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}"
    assert re.fullmatch(pattern, first.render())
    assert first.salt != second.salt
    assert first.digest != second.digest
    assert first.matches(b"same")


def test_what_is_read_is_written():
    users = UsersFile(USERS)
    assert users.render() == USERS
    assert list(users.users) == [b"alice", b"bob"]
    assert users.users[b"alice"].cram_secret is None
    assert users.users[b"bob"].cram_secret == b"secret"
    assert UsersFile(b" \t\n").render() == b" \t\n"


def test_a_user_keeps_its_place():
    users = UsersFile(USERS)
    other = PasswordHash(bytes(8), bytes(16), 1, 1, 1)
    users.put(User(b"alice", other))
    users.put(User(b"carol", other, b"\0\xff:#\n"))
    assert users.render() == (
        b"# first\nalice:%s\n\nbob:%s:c2VjcmV0\n# last\ncarol:%s:AP86Iwo=\n"
        % (other.render(), CHEAP, other.render())
    )
    assert UsersFile(users.render()).users[b"carol"].cram_secret == b"\0\xff:#\n"
    users.remove(b"alice")
    users.remove(b"carol")
    assert users.render() == b"# first\n\nbob:%s:c2VjcmV0\n# last\n" % CHEAP
    with pytest.raises(KeyError):
        users.remove(b"alice")


@pytest.mark.parametrize("octets", [b"x", b"xy", b"xyz", bytes(range(256))])
def test_any_octets_can_be_a_cram_secret(octets):
    user = User(b"alice", PasswordHash.parse(CHEAP), octets)
    assert User.parse(user.render()).cram_secret == octets
    assert b"\n" not in user.render()


def test_an_error_names_the_line_and_shows_nothing_of_it():
    with pytest.raises(ValueError, match=r"^line 3 is malformed$") as caught:
        UsersFile(b"#\nalice:%s\nbob:secret\n" % CHEAP)
    assert caught.value.__suppress_context__


def test_a_hash_that_asks_for_too_much_memory_is_malformed(path):
    path.write_bytes(b"alice:" + CHEAP.replace(b"ln=4", b"ln=16,r=9").replace(b",r=8", b""))
    path.chmod(0o600)
    with pytest.raises(Trouble, match="line 1 is malformed"):
        load(str(path))


def test_a_list_that_nobody_takes(home, users):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PROGRAM, "list"], stdout=full, stderr=subprocess.PIPE, env={"QMAILHOME": str(home)}
        )
    assert done.returncode == 111
    assert done.stderr == b"qmail-smtpd-users: cannot write: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("list >&-", b"standard output is closed"),
        ("check --stdin joe <&-", b"no password could be read from standard input"),
        (
            "check --stdin joe 0>/dev/null",
            b"no password could be read from standard input: Bad file descriptor",
        ),
    ],
)
def test_descriptors_that_are_closed(home, users, words, why):
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {words}', "sh", *PROGRAM],
        stderr=subprocess.PIPE,
        env={"QMAILHOME": str(home)},
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr == b"qmail-smtpd-users: %s\n" % why


# set


def test_set_makes_the_file(home, path):
    status, out, errors = tool(home, "set", "alice", "--stdin", password=b"sesame")
    assert (status, errors) == (0, b"")
    file = repr(str(path)).encode()
    assert out.endswith(b": chgrp GROUP %b; chmod 640 %b\n" % (file, file))
    assert path.stat().st_mode & 0o7777 == 0o600
    assert re.fullmatch(rb"alice:\$scrypt\$ln=14,r=8,p=5\$[^$:]+\$[^$:]+\n", path.read_bytes())
    assert accepts(home, b"alice", b"sesame")
    assert not accepts(home, b"alice", b"Sesame")


def test_set_keeps_mode_lines_and_the_other_users(home, users):
    assert tool(home, "set", "alice", "--stdin", password=b"sesame") == (0, b"", b"")
    assert users.stat().st_mode & 0o7777 == 0o640
    before, after = USERS.split(b"\n"), users.read_bytes().split(b"\n")
    assert after[1] != before[1]
    assert after[:1] + after[2:] == before[:1] + before[2:]
    assert accepts(home, b"alice", b"sesame")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
def test_set_keeps_the_owner(home, users):
    os.chown(users, 65533, 65534)
    assert tool(home, "set", "carol", "--stdin", password=b"sesame")[0] == 0
    assert (users.stat().st_uid, users.stat().st_gid) == (65533, 65534)
    assert users.stat().st_mode & 0o7777 == 0o640


def test_what_a_killed_run_left_is_in_nobodys_way(home, users):
    (users.parent / "smtpusers.new").write_bytes(b"half a us")
    assert tool(home, "remove", "alice")[0] == 0
    assert {name.name for name in users.parent.iterdir()} == {"smtpusers", "smtpusers.lock"}
    assert b"half" not in users.read_bytes()


def test_set_cram_keeps_the_secret_until_the_next_set(home, path):
    assert tool(home, "set", "alice", "--cram", "--stdin", password=b"se\xffsame ")[0] == 0
    assert a2b_base64(path.read_bytes().rpartition(b":")[2]) == b"se\xffsame "
    assert tool(home, "set", "alice", "--stdin", password=b"another")[0] == 0
    assert path.read_bytes().count(b":") == 1


@pytest.mark.parametrize("name", ["grün@example.org", "two words", "a#b", "-x", "a" * 300])
def test_names_that_a_user_may_have(home, name):
    assert tool(home, "set", "--stdin", "--", name, password=b"sesame")[0] == 0
    assert accepts(home, name.encode(), b"sesame")


@pytest.mark.parametrize(
    "name", [b"", b"#a", b"a:b", b"a\nb", b"a\x7f", b" a", b"a ", b"\xff", "a\u0085".encode()]
)
def test_names_that_a_user_may_not_have(home, path, name):
    status, _, errors = tool(home, "set", "--stdin", name, password=b"sesame")
    assert status == 1
    assert re.fullmatch(rb"qmail-smtpd-users: no name for a user: [ -~]+\n", errors)
    assert not path.exists()


@pytest.mark.parametrize("password", [b"", b"a\0b"])
def test_passwords_that_are_none(home, path, password):
    status, _, errors = tool(home, "set", "alice", "--stdin", password=password)
    assert (status, errors) == (1, b"qmail-smtpd-users: a password is not empty, and has no NUL\n")
    assert not path.exists()


@pytest.mark.parametrize("end", [b"", b"\n", b"\nignored", b"\r\n"])
def test_a_password_is_a_line_without_its_end(home, end):
    password = b" \t\xe4'\"$\r\\ "
    assert tool(home, "set", "alice", "--stdin", password=password + end)[0] == 0
    assert accepts(home, b"alice", password)


# remove, list, check


def test_remove(home, users):
    assert tool(home, "remove", "alice") == (0, b"", b"")
    assert users.read_bytes() == b"# first\n\nbob:%s:c2VjcmV0\n# last\n" % CHEAP
    status, out, errors = tool(home, "remove", "alice")
    assert (status, out) == (1, b"")
    assert errors.startswith(b"qmail-smtpd-users: there is no such user in '")


def test_list_shows_no_hash_and_no_secret(home, users):
    expected = b"alice: scrypt ln=4,r=8,p=1\nbob: scrypt ln=4,r=8,p=1 CRAM-MD5\n"
    assert tool(home, "list") == (0, expected, b"")


def test_list_shows_names_in_any_locale(home, path):
    path.write_bytes("grün:".encode() + CHEAP)
    path.chmod(0o600)
    for locale in ("C", "POSIX", "C.UTF-8"):
        assert tool(home, "list", env={"LC_ALL": locale})[1].startswith("grün: ".encode())


def test_check(home, path):
    assert tool(home, "set", "alice", "--stdin", password=b"sesame")[0] == 0
    before = path.read_bytes()
    assert tool(home, "check", "alice", "--stdin", password=b"sesame") == (0, b"accepted\n", b"")
    for user, password in (("alice", b"Sesame"), ("nobody", b"sesame")):
        status, out, errors = tool(home, "check", user, "--stdin", password=password)
        assert (status, out) == (1, b"")
        assert errors.startswith(b"qmail-smtpd-users: refused: ")
    assert path.read_bytes() == before


# Where the file is


def test_where_the_file_is(home, tmp_path):
    other = tmp_path / "other"
    password = b"sesame"
    assert tool(home, "set", "a", "--stdin", password=password, env={"SMTPUSERS": "other"})[0] == 0
    assert [*UsersFile(other.read_bytes()).users] == [b"a"]
    assert tool(home, "--file", str(other), "set", "b", "--stdin", password=password)[0] == 0
    assert tool("/absent", "list", env={"SMTPUSERS": str(other)})[1].count(b"\n") == 2


def test_a_symbolic_link_stays_one(home, users):
    target = home / "elsewhere"
    users.rename(target)
    users.symlink_to(target)
    assert tool(home, "remove", "bob")[0] == 0
    assert users.is_symlink()
    assert b"bob" not in target.read_bytes()


# Trouble


def test_a_lock_that_is_a_pipe_holds_nobody_up(home, users):
    os.mkfifo(users.with_name("smtpusers.lock"))
    assert tool(home, "remove", "bob")[0] == 111


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: a file of somebody else's")
def test_a_link_in_a_directory_of_a_service_is_not_followed(home, users):
    target = home / "elsewhere"
    users.rename(target)
    users.symlink_to(target)
    os.chown(users.parent, 65534, -1)
    before = target.read_bytes()
    status, _, errors = tool(home, "remove", "bob")
    assert status == 111
    assert b"is a link, and others can write to" in errors
    assert target.read_bytes() == before
    assert not target.with_name("elsewhere.lock").exists()


@pytest.mark.parametrize("name", ["smtpusers.lock", "smtpusers.new"])
def test_a_link_that_a_service_has_put_there_leads_nowhere(home, users, name):
    """The directory may be writable for it, and whoever calls us may be root."""
    link, elsewhere = users.with_name(name), home / "elsewhere"
    link.symlink_to(elsewhere)
    tool(home, "remove", "bob")
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    "arguments", [["set", "alice", "--stdin"], ["remove", "alice"], ["list"], ["check", "alice"]]
)
def test_a_file_that_can_not_be_used_is_left_alone(home, users, arguments):
    for text, mode in ((USERS + b"garbage\n", 0o640), (USERS, 0o644)):
        users.write_bytes(text)
        users.chmod(mode)
        status, out, errors = tool(home, *arguments, password=b"sesame")
        assert (status, out) == (111, b"")
        assert re.fullmatch(rb"qmail-smtpd-users: [ -~]*smtpusers[ -~]+\n", errors)
        assert users.read_bytes() == text


@pytest.mark.parametrize("arguments", [["list"], ["check", "alice", "--stdin"]])
def test_no_file(home, arguments):
    status, _, errors = tool(home, *arguments, password=b"sesame")
    assert status == 111
    assert b"there is no '" in errors


def test_no_directory(home):
    status, _, errors = tool(home / "absent", "set", "alice", "--stdin", password=b"sesame")
    assert status == 111
    assert b"No such file or directory" in errors


def test_what_is_put_in_place_is_on_the_disk(users, monkeypatch):
    """A crash behind rename(2) would else leave a file with a name and without its octets."""
    new = users.with_name("smtpusers.new")
    order = []
    for name in ("fsync", "rename"):
        act = getattr(os, name)

        def note(*arguments, name=name, act=act):
            order.append((name, new.stat().st_size if new.exists() else None))
            return act(*arguments)

        monkeypatch.setattr(os, name, note)
    change(str(users), lambda kept: kept.remove(b"alice"))
    size = users.stat().st_size
    assert order == [("fsync", size), ("rename", size), ("fsync", None)]


def test_a_full_disk_leaves_the_file_as_it_was(home, users):
    status, _, errors = tool(
        home,
        *("set", "alice", "--stdin"),
        password=b"sesame",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert status == 111
    assert b"cannot write" in errors
    assert users.read_bytes() == USERS
    assert {name.name for name in users.parent.iterdir()} == {"smtpusers", "smtpusers.lock"}


@pytest.mark.parametrize("arguments", [[], ["set"], ["unknown"], ["set", "a", "password"]])
def test_misuse(home, path, arguments):
    assert tool(home, *arguments)[0] == 2
    assert not path.exists()


def test_changes_at_the_same_time_are_all_made(home, path):
    names = [f"user{number}" for number in range(8)]
    processes = [
        subprocess.Popen(
            [*PROGRAM, "set", name, "--stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={"QMAILHOME": str(home)},
        )
        for name in names
    ]
    for process in processes:
        process.stdin.write(b"sesame\n")
        process.stdin.close()
    for process in processes:
        process.wait()
    assert [process.returncode for process in processes] == [0] * 8
    assert sorted(load(str(path)).users) == sorted(name.encode() for name in names)


def test_kill_at_any_moment_leaves_the_old_file_or_the_new(home, users):
    for moment in range(20):
        users.write_bytes(USERS)
        process = subprocess.Popen([*PROGRAM, "remove", "bob"], env={"QMAILHOME": str(home)})
        try:
            process.wait(timeout=0.02 + moment * 0.002)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert users.read_bytes() in (USERS, USERS.replace(b"bob:%s:c2VjcmV0\n" % CHEAP, b""))


# The terminal


def talk(home, arguments, *answers):
    """Run the tool on a terminal, answering each prompt; the exit status, and what was seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["QMAILHOME"] = str(home)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored in the background of a shell
        os.execv(PROGRAM[0], [*PROGRAM, *arguments])
    seen = b""
    answers = list(answers)
    while True:
        try:
            block = os.read(terminal, 4096)
        except OSError:  # Linux: the other end is closed.
            block = b""
        if not block:
            break
        seen += block
        if block.endswith(b": ") and answers:
            os.write(terminal, answers.pop(0))
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


@pytest.mark.parametrize("costs", [b"ln=1,r=262144,p=16", b"ln=1,r=4096,p=16", b"ln=16,r=9,p=1"])
def test_costs_that_take_more_memory_than_the_limit(costs: bytes) -> None:
    with pytest.raises(ValueError, match="out of bounds"):
        PasswordHash.parse(CHEAP.replace(b"ln=4,r=8,p=1", costs))


@pytest.mark.parametrize(
    ("salt", "digest", "costs", "is_in_bounds"),
    [
        (8, 16, b"ln=1,r=1,p=1", True),
        (7, 16, b"ln=1,r=1,p=1", False),
        (8, 15, b"ln=1,r=1,p=1", False),
        (8, 64, b"ln=16,r=8,p=16", True),
        (8, 65, b"ln=16,r=8,p=16", False),
        (8, 64, b"ln=16,r=8,p=17", False),
        (8, 64, b"ln=19,r=1,p=1", True),
        (8, 64, b"ln=20,r=1,p=1", False),
    ],
)
def test_what_a_hash_may_be_like(salt: int, digest: int, costs: bytes, is_in_bounds: bool) -> None:
    parts = [costs, *(base64(bytes(length)).rstrip(b"=") for length in (salt, digest))]
    text = b"$scrypt$" + b"$".join(parts)
    if is_in_bounds:
        assert PasswordHash.parse(text).render() == text
    else:
        with pytest.raises(ValueError, match="out of bounds"):
            PasswordHash.parse(text)


def test_a_digest_that_differs_in_its_last_octet_only() -> None:
    right = PasswordHash.of(b"sesame")
    wrong = PasswordHash(right.salt, right.digest[:-1] + bytes([right.digest[-1] ^ 1]))
    assert right.matches(b"sesame")
    assert not wrong.matches(b"sesame")


def test_an_unknown_user_costs_what_those_in_the_file_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    cheaper = CHEAP.replace(b"ln=4,r=8", b"ln=3,r=8")
    users = UsersFile(b"bob:" + cheaper + b"\nalice:" + CHEAP + b"\n")
    costs = []

    def derive(asked: PasswordHash, password: bytes) -> bytes:
        costs.append((asked.ln, asked.r, asked.p))
        return asked.digest

    monkeypatch.setattr(PasswordHash, "derive", derive)
    assert users.accepts_password(b"alice", b"x")
    assert not users.accepts_password(b"eve", b"x"), "though the hash is right"
    assert costs == [(4, 8, 1)] * 2


def test_the_terminal_is_asked_twice_and_shows_nothing(home):
    status, seen = talk(home, ["set", "alice"], "süß\n".encode(), "süß\n".encode())
    assert status == 0
    assert seen.startswith(b"Password: \r\nOnce more: \r\n")
    assert "süß".encode() not in seen
    assert accepts(home, b"alice", "süß".encode())
    assert talk(home, ["check", "alice"], "süß\n".encode()) == (0, b"Password: \r\naccepted\r\n")


def test_two_different_passwords(home, path):
    status, seen = talk(home, ["set", "alice"], b"one\n", b"two\n")
    assert status == 1
    assert seen.endswith(b"qmail-smtpd-users: the two are not the same\r\n")
    assert not path.exists()


@pytest.mark.parametrize(
    ("answer", "words"), [(b"\x03", b"given up"), (b"\x04", b"--stdin"), (b"\n", b"not empty")]
)
def test_no_answer(home, path, answer, words):
    status, seen = talk(home, ["set", "alice"], answer, answer)
    assert status == 1
    assert words in seen
    assert b"Traceback" not in seen
    assert not path.exists()


def test_without_a_terminal_nothing_is_read_that_could_be_seen(home, path):
    status, _, errors = tool(home, "set", "alice", password=b"sesame", start_new_session=True)
    assert status == 1
    assert errors == (
        b"qmail-smtpd-users: no password could be read from the terminal (see --stdin)\n"
    )
    assert not path.exists()
