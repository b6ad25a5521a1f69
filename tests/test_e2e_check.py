"""qmail-smtpd-check: each problem, made for real, has its level, its cause and its remedy.

The service's user is a real one without privileges, and what is checked are the installed programs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from e2e.checking import FAILED, FINE, compile_rules
from e2e.programs import lack, mail_user, need
from e2e.service import DOMAIN, NAME, RUN

from qmail_smtpd_py import check

pytest_plugins = ["e2e.fixtures"]

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
with_tls = pytest.mark.usefixtures("tls")
"""For those to which TLS makes a difference; the others take less time without it."""


@pytest.fixture
def passwords(checked, users_file, tls):
    """The embedded check program with a users file, as arguments of qmail-smtpd."""
    checked.home.control("smtpusers", users_file, 0o640)
    return (checked.home.programs / "checkpassword-users", need("true")[0])


# Nothing wrong


@with_tls
def test_fine(checked):
    """A service without problems: each fact in its line, the counts at the end."""
    found = checked.find()
    assert (found.status, found.codes, found.report["notes"]) == (FINE, [], [])
    text = checked.text(found)
    assert text.endswith("\nno errors, no warnings\n")
    assert all(fact["text"] in text for fact in found.report["facts"])
    assert all(len(line) < 200 for line in text.splitlines())
    assert found.fact("greeting")["text"] == NAME
    assert found.fact("port")["port"] == 25
    assert found.fact("client sees")["offers"][1:] == [
        "STARTTLS", "PIPELINING", "8BITMIME", "SIZE 0",
    ]  # fmt: skip
    assert found.fact("TLS")["version"] == "TLSv1.3"
    assert found.fact("certificate")["days_left"] in (89, 90)
    assert found.fact("certificate")["key"] == "ECDSA secp256r1"
    assert found.fact("rcpthosts")["text"] == f"1: {DOMAIN}"
    assert {"me", "rcpthosts", "timeoutsmtpd"} <= set(found.fact("control files")["files"])


def test_nothing_is_changed_and_no_mail_is_taken(checked):
    before = sorted(path.name for path in checked.home.path.rglob("*"))
    checked.find()
    after = sorted(path.name for path in checked.home.path.rglob("*"))
    assert after == sorted([*before, "run"])


@as_root
def test_it_is_the_user_of_the_run_file(checked):
    found = checked.find()
    user = mail_user()
    assert found.fact("service")["uid"] == user.pw_uid
    assert f"as {user.pw_name}:" in found.fact("service")["text"]


def test_auth(checked, passwords):
    found = checked.find(port=587, exports={"SMTPAUTH": "!+cram"}, check=passwords)
    assert (found.status, found.codes) == (FINE, [])
    fact = found.fact("AUTH")
    assert fact["mechanisms"] == ["LOGIN", "PLAIN", "CRAM-MD5"]
    assert (fact["needs_tls"], fact["required"]) == (True, True)
    assert "AUTH LOGIN PLAIN CRAM-MD5" in found.fact("under TLS")["offers"]
    assert not any("AUTH" in line for line in found.fact("client sees")["offers"])
    assert found.fact("users")["users"] == 2


def test_auth_in_clear_is_told(checked, passwords):
    exports = {"SMTPAUTH": "", "FORCETLS": "0"}
    found = checked.find(port=587, exports=exports, check=passwords)
    assert (found.status, found.codes) == (FINE, [])
    assert found.fact("AUTH")["text"] == "LOGIN PLAIN, in clear, too"
    assert "AUTH LOGIN PLAIN" in found.fact("client sees")["offers"]


def test_port_465(checked, passwords):
    found = checked.find(port=465, exports={"SMTPAUTH": "!", "SMTPS": "1"}, check=passwords)
    assert (found.status, found.codes) == (FINE, [])
    assert found.fact("TLS")["text"].startswith("at once (SMTPS): TLSv1.3")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RUN.glob("*/run")))
def test_run_files_that_are_shipped(checked, passwords, name):
    """With the places and users of this host in them, there is nothing to be said of them."""
    home, text = checked.home, (RUN / name / "run").read_text()
    for rules in ("tcp.smtp", "tcp.submission"):
        compile_rules(home.path / rules, (RUN / rules).read_text())
    for old, new in (
        ("#!/bin/sh\n", f"#!/bin/sh\nexport QMAILHOME={home.path}\n"),
        ("/usr/local/qmail-smtpd-py/bin", str(home.programs)),
        ("/var/qmail", str(home.path)),
        ("/etc/tcp.", f"{home.path}/tcp."),
        ("-u qmaild)", f"-u {mail_user().pw_name})"),
        ("-g qmaild)", f"-g {mail_user().pw_name})"),
    ):
        assert old in text or old in ("/etc/tcp.", "/var/qmail"), old
        text = text.replace(old, new)
    found = checked.find("--env-from", checked.write_run(text))
    assert (found.status, found.codes, found.report["notes"]) == (FINE, [], [])


def test_environment_of_its_own(checked, passwords):
    """Without a run file: variables, --user, and the check program as arguments."""
    environ = {"QMAILHOME": str(checked.home.path), "SMTPAUTH": "!"}
    found = checked.find("--user", mail_user().pw_name, *passwords, environ=environ)
    assert (found.status, found.codes) == (FINE, [])
    assert found.fact("check program")["text"] == " ".join(map(str, passwords))


def test_service_directory(checked):
    """As svscan has it: its run file is taken."""
    checked.run_file()
    found = checked.find("--env-from", checked.home.path)
    assert found.codes == [], found
    assert found.fact("port")["port"] == 25


@as_root
def test_root_without_a_user(checked):
    found = checked.find("true", environ={"QMAILHOME": str(checked.home.path)})
    assert "no-user" in found.codes
    assert "--user NAME" in found.problem("no-user")["remedy"]


def test_envdir(checked, passwords):
    directory = checked.home.path / "env"
    directory.mkdir()
    for name, text in {"QMAILHOME": str(checked.home.path), "SMTPAUTH": "cram \nrest"}.items():
        (directory / name).write_text(text)
    found = checked.find("--env-from", directory, "--user", mail_user().pw_name, *passwords)
    assert found.codes == []
    assert found.fact("AUTH")["mechanisms"] == ["CRAM-MD5"]


@pytest.mark.parametrize(
    "arguments", [["--env-from", "/nonexistent"], ["--user", "no.such"], ["--no-such-option"]]
)
def test_misuse(checked, arguments):
    command = [checked.program, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (100, "")
    assert "\nqmail-smtpd-check: " in f"\n{ended.stderr}"


def test_help_has_each_exit_status(checked):
    text = " ".join(checked.run("--help").stdout.split())
    assert "1 for warnings, 2 for errors, 100 for wrong arguments" in text


@with_tls
@as_root
def test_another_user_can_not_become_the_service(checked):
    """It says so, and goes on with its own rights."""
    (setpriv,) = need("setpriv")
    run = checked.run_file()
    command = [setpriv, "--reuid=12345", "--regid=12345", "--clear-groups", checked.program]
    ended = subprocess.run(
        [*command, "--env-from", run], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == FAILED
    assert "run qmail-smtpd-check as root" in ended.stdout
    assert "Permission denied (uid 12345)" in ended.stdout


# Control files


@as_root
def test_control_file_that_the_user_can_not_read(checked):
    path = checked.home.control("badmailfrom", "joe@example.net", 0o600)
    os.chown(path, 0, 0)
    problem = checked.find().only("unreadable", "error")
    uid = mail_user().pw_uid
    assert problem["what"] == f"cannot read control/badmailfrom: Permission denied (uid {uid})"
    assert problem["cause"] == f"{path} is root:root 0600"
    assert problem["remedy"] == f"chmod a+r {path}"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_control_file_that_is_no_file(checked, make):
    """Nobody waits for a named pipe's writer."""
    path = checked.home.path / "control" / "badmailfrom"
    make(path)
    problem = checked.find().only("unreadable", "error")
    assert problem["what"].startswith("cannot read control/badmailfrom: ")
    assert problem["remedy"] == f"{path} is not a file: put one in its place"


@as_root
def test_two_of_them_are_both_told(checked):
    for name in ("badmailfrom", "rcpthosts"):
        checked.home.control(name, DOMAIN, 0o000)
    found = checked.find()
    whats = " ".join(problem["what"] for problem in found.report["problems"])
    assert found.codes == ["unreadable"] * 2
    assert "control/badmailfrom" in whats
    assert "control/rcpthosts" in whats


@with_tls
def test_text_has_each_problem_and_ends_in_the_counts(checked):
    (checked.home.path / "log").mkdir()
    found = checked.find(exports={"SMTPAUTH": "yes"}, end="")
    assert found.codes == ["no-check-program", "no-log", "smtpauth-value"]
    text = checked.text(found)
    assert text.endswith("\n1 error, 2 warnings\n")
    words = " ".join(text.split())
    for problem in found.report["problems"]:
        assert f"{problem['level'].upper()} {problem['what']}" in words
        assert f"remedy {problem['remedy']}" in words


@as_root
def test_directory_that_the_user_may_not_enter(checked):
    control = checked.home.path / "control"
    control.chmod(0o700)
    found = checked.find()
    assert found.status == FAILED
    problem = found.report["problems"][0]
    assert f"{control} (root:root 0700) may not be entered" in problem["cause"]
    assert problem["remedy"] == f"chmod a+x {control}"


def test_no_me(checked):
    (checked.home.path / "control/me").unlink()
    problem = checked.find().only("no-me", "error")
    assert "control/me" in problem["remedy"]


def test_no_home(checked):
    found = checked.find(exports={"QMAILHOME": "/nonexistent"})
    assert "QMAILHOME" in found.problem("no-home")["remedy"]


@pytest.mark.parametrize(("text", "counts"), [("10M", 10), ("20 MB", 20)])
def test_number_with_a_unit(checked, text, counts):
    checked.home.control("databytes", text)
    found = checked.find()
    assert found.codes == ["not-a-number", "databytes"]
    assert found.problem("not-a-number")["what"].endswith(f"counts as {counts}")
    assert found.fact("limits")["databytes"] == counts


def test_variable_with_a_unit(checked):
    """A version of TLS is no number."""
    found = checked.find(exports={"MAXRCPT": "10k", "TLSMINVERSION": "1.3"})
    assert found.only("not-a-number", "warning")["what"] == "MAXRCPT=10k is no number"


def test_limits_are_told(checked):
    checked.home.control("databytes", "10000000")
    checked.home.control("maxrcpt", "77")
    found = checked.find(options=["-c", "9"])
    assert found.codes == []
    limits = found.fact("limits")
    assert (limits["databytes"], limits["recipients"], limits["timeout"]) == (10000000, 77, 30)
    assert limits["least_rate"] == 1
    assert "least rate 1 octets/s" in limits["text"]
    assert found.fact("concurrency")["sessions"] == 9


# The run file


@pytest.mark.parametrize("line", ["SMTPAUTH=!", "FORCETLS=0"])
def test_not_exported(checked, line):
    problem = checked.find(script=line).only("not-exported", "error")
    name, _, value = line.partition("=")
    assert problem["what"].startswith(f"line 3 sets {name}={value.strip(chr(39))!r} without export")
    assert problem["remedy"] == f"export {name}"


@pytest.mark.parametrize("line", ["SMTPAUTH=0", "DISABLETLS=0", "REQUIRETLS=", "HIDE_HOST=0"])
def test_not_exported_and_nothing_lost(checked, line):
    assert checked.find(script=line).codes == []


def test_smtps_that_is_to_be_off_is_not_to_be_exported(checked):
    """It is on, whatever its value."""
    assert checked.find(script="SMTPS=0").only("not-exported", "error")["remedy"] == "take it out"


def test_relayclient_is_not_to_be_exported(checked):
    """That would be an open relay."""
    problem = checked.find(script="RELAYCLIENT=''").only("not-exported", "error")
    assert problem["remedy"].startswith("take it out")


def test_not_exported_on_a_port_for_users(checked, passwords):
    """The cause is told, and not what follows from it, once more."""
    checked.find(port=587, script="SMTPAUTH='!'", check=passwords).only("not-exported", "error")


def test_value_that_may_be_a_secret_is_not_shown(checked):
    found = checked.find(script="DBPASSWORD=geheim")
    assert found.only("not-exported", "warning")["remedy"] == "export DBPASSWORD"
    assert "geheim" not in f"{found}{checked.text(found)}"


def test_variable_that_the_script_uses_is_none_of_ours(checked):
    assert checked.find(script='MAX=20\necho "$MAX"').codes == []


def test_no_2_1(checked):
    assert checked.find(end="").codes == []  # whoever starts it has descriptor 2
    (checked.home.path / "log").mkdir()
    problem = checked.find(end="").only("no-log", "warning")
    assert "2>&1" in problem["remedy"]
    assert checked.find(end="", script="exec 2>&1").codes == []


@with_tls
@pytest.mark.parametrize("port", [587, 465])
def test_port_for_users_without_auth(checked, port):
    exports = {"SMTPS": "1"} if port == 465 else {}
    problem = checked.find(port=port, exports=exports).only("no-auth", "warning")
    assert problem["remedy"].startswith("export SMTPAUTH='!'")


def test_port_465_without_smtps(checked, passwords):
    found = checked.find(port=465, exports={"SMTPAUTH": "!"}, check=passwords)
    assert "export SMTPS=1" in found.only("no-smtps", "warning")["remedy"]


@with_tls
def test_port_25_with_smtps(checked):
    checked.find(exports={"SMTPS": "1"}).only("smtps-port", "warning")


def test_what_was_not_understood_is_said(checked):
    found = checked.find(script="export QMAILQUEUE=$(/bin/pick a queue)\n. /etc/mail.conf")
    assert "QMAILQUEUE" not in found.only("not-known", "warning")["what"]  # it is not alone
    assert found.fact("queue")["text"] == found.fact("AUTH")["text"] == "not known"
    assert len(found.report["notes"]) == 2
    assert all(note in checked.text(found) for note in found.report["notes"])


def test_no_qmail_smtpd_in_it(checked):
    script = f"#!/bin/sh\nexport QMAILHOME={checked.home.path}\nexec tcpserver 0 25 date\n"
    run = checked.write_run(script)
    found = checked.find("--env-from", run, "--user", mail_user().pw_name)
    found.only("no-program", "warning")


def test_no_such_user_in_it(checked):
    found = checked.find(script='ID=$(id -u no.such.user)\necho "$ID"')
    assert "no.such.user" in found.only("no-such-user", "error")["what"]


def test_run_file_that_can_not_be_started(checked):
    run = checked.run_file()
    text = run.read_text()
    run.chmod(0o644)
    problem = checked.find("--env-from", run).only("run-file", "error")
    assert "supervise does not start it" in problem["what"]
    assert problem["remedy"] == f"chmod a+rx {run}"
    for broken, why in (
        (text.replace("\n", "\r\n", 1), "names '/bin/sh\\r' as interpreter"),
        (text.partition("\n")[2], "begins neither with #!"),
    ):
        found = checked.find("--env-from", checked.write_run(broken))
        assert why in found.problem("run-file")["what"]


def test_last_command_without_exec(checked):
    run = checked.run_file()
    run.write_text(run.read_text().replace("exec softlimit", "softlimit"))
    checked.find("--env-from", run).only("no-exec", "warning")
    run.write_text(run.read_text().replace("2>&1", "2>&1 | splogger smtpd"))
    assert checked.find("--env-from", run).codes == []


def test_service_that_is_down(checked):
    (checked.home.path / "down").touch()
    checked.find().only("down", "warning")


@as_root
def test_log_that_can_not_be_written(checked):
    """With it tcpserver stands still."""
    home, user = checked.home.path, mail_user()
    (home / "log").mkdir()
    run = home / "log" / "run"
    run.write_text(f"#!/bin/sh\nexec setuidgid {user.pw_name} multilog t s100000 {home}/logged\n")
    run.chmod(0o755)
    problem = checked.find().only("log-directory", "error")
    logged = home / "logged"
    mended = f"mkdir -p {logged}; chown {user.pw_name} {logged}; chmod u+rwx {logged}"
    assert problem["remedy"] == mended
    (home / "logged").mkdir(0o755)
    problem = checked.find().only("log-directory", "error")
    assert f"{user.pw_name} can not write there" in problem["what"]
    assert problem["remedy"] == mended
    (home / "logged" / "current").touch()
    assert checked.find().problem("log-directory")["remedy"] == mended
    (home / "logged" / "syslog").touch()
    assert "of its own" in checked.find().problem("log-directory")["remedy"]
    os.chown(home / "logged", user.pw_uid, -1)
    assert checked.find().codes == []
    run.write_text(run.read_text().replace(user.pw_name, "no.such.user"))
    assert "there is no user no.such.user" in checked.find().problem("log-directory")["what"]
    run.write_text(f"#!/bin/sh\nexec multilog t {home}/logged setuidgid\n")
    assert checked.find().codes == []
    run.chmod(0o644)
    assert f"{run} is not executable" in checked.find().problem("run-file")["what"]


@as_root
@pytest.mark.parametrize("before", ["setuidgid", ""])
def test_port_of_root_s(checked, before):
    run = checked.run_file()
    if before:
        named = f"setuidgid {mail_user().pw_name} softlimit"
        run.write_text(run.read_text().replace("softlimit", named))
        problem = checked.find("--env-from", run).only("run-file", "error")
        assert problem["what"].endswith("may not listen on port 25")
    else:
        assert checked.find("--env-from", run).codes == []


def test_port_that_is_none(checked):
    problem = checked.find(port=70000).problem("run-file")
    assert problem["what"] == "tcpserver does not listen there: there is no port 70000"


@pytest.mark.parametrize("number", ["0", "''", "x20"])
def test_limit_that_lets_nobody_in(checked, number):
    run = checked.run_file()
    run.write_text(run.read_text().replace("tcpserver", f"tcpserver -c {number}"))
    problem = checked.find("--env-from", run).only("run-file", "error")
    assert problem["what"].endswith("tcpserver serves no connection")


def test_another_program_in_it(checked):
    other = checked.home.program("qmail-smtpd", "exit 1")
    problem = checked.find(program=other).only("other-program", "warning")
    assert str(other) in problem["what"]


@pytest.mark.parametrize(
    ("directory", "why"), [("/nonexistent", "is not there"), (".", "is not executable for uid")]
)
def test_program_that_can_not_be_started(checked, directory, why):
    program = checked.home.program("qmail-smtpd", "exit 1")
    program.chmod(0o644)
    started = program if directory == "." else f"{directory}/qmail-smtpd"
    problem = checked.find(program=started).only("run-file", "error")
    assert problem["what"].startswith(f"the run file starts {started}, and {started} {why}")
    assert f"what was checked is {checked.home.programs}/qmail-smtpd" in problem["remedy"]


@pytest.mark.parametrize("name", ["softlimit", "tcpserver"])
def test_program_before_ours_that_is_not_there(checked, name):
    run = checked.run_file()
    text = run.read_text()
    run.write_text(text.replace(name, f"/nonexistent/{name}"))
    problem = checked.find("--env-from", run).only("run-file", "error")
    assert problem["what"].startswith(f"the run file starts /nonexistent/{name}, and ")
    run.write_text(text.replace(name, f"tcp-rules {name}"))
    assert "there is none in /" in checked.find("--env-from", run).problem("run-file")["what"]


def test_port_that_nobody_knows(checked):
    found = checked.find(port="submision")
    assert found.problem("run-file")["what"].endswith("there is no port 'submision'")


def test_directory_that_is_no_service(checked):
    (checked.home.path / "log").mkdir()
    printed = checked.run("--env-from", checked.home.path / "log")
    assert (printed.returncode, "no run file" in printed.stderr) == (100, True)


@as_root
def test_program_that_only_root_can_reach(checked):
    program = checked.home.program("qmail-smtpd", "exit 1")
    program.parent.chmod(0o700)
    found = checked.find(program=program)
    assert "may not be entered" in found.problem("run-file")["what"]


def write_run_file(checked, last, before=""):
    """A run file with this last command; its path."""
    home = checked.home.path
    return checked.write_run(f"#!/bin/sh\nexport QMAILHOME={home}\n{before}\nexec {last} 2>&1\n")


@as_root
@pytest.mark.parametrize(
    ("server", "follows_u", "follows_g"),
    [
        (
            "tcpserver",
            "tcpserver runs the service as root",
            "tcpserver runs the service with the rights of group root",
        ),
        ("qmail-smtpd-listen", *["qmail-smtpd-listen does not start"] * 2),
    ],
)
def test_ids_that_may_be_nothing(checked, server, follows_u, follows_g):
    """As in a run file that was copied without the lines above its last one."""
    listener = checked.home.programs / "qmail-smtpd-listen"
    words = {"tcpserver": f"0 25 {checked.home.programs}/qmail-smtpd"}.get(server, "0 25")
    server = listener if server == "qmail-smtpd-listen" else server
    run = write_run_file(checked, f'{server} -u "$QMAILDUID" -g "$NOFILESGID" {words}')
    found = checked.find("--env-from", run)
    assert (found.status, found.codes) == (FAILED, ["no-user", "no-user"])
    of_user, of_group = found.report["problems"]
    sets = "nothing in the run file sets"
    assert of_user["what"] == f"{sets} QMAILDUID; where it is empty, {follows_u}"
    assert of_group["what"] == f"{sets} NOFILESGID; where it is empty, {follows_g}"
    assert of_group["remedy"].startswith("NOFILESGID=$(id -g qmaild) || exit 1; or say --user")
    assert checked.find("--env-from", run, "--user", mail_user().pw_name).codes == []


@as_root
def test_ids_of_an_environment_that_nothing_sets(checked):
    run = write_run_file(checked, f"tcpserver -U 0 25 {checked.home.programs}/qmail-smtpd")
    found = checked.find("--env-from", run)
    assert found.codes == ["no-user", "no-user"]
    assert "envuidgid qmaild in front of" in found.report["problems"][0]["remedy"]
    name = mail_user().pw_name
    run.write_text(run.read_text().replace("tcpserver", f"envuidgid {name} tcpserver"))
    assert checked.find("--env-from", run).codes == []


@as_root
def test_ids_that_come_from_elsewhere_are_not_known(checked):
    last = f"tcpserver -u $QMAILDUID -g 81 0 25 {checked.home.programs}/qmail-smtpd"
    run = write_run_file(checked, last, before=". /etc/qmail.conf")
    assert checked.find("--env-from", run).codes == ["not-known", "no-user"]


@as_root
@pytest.mark.parametrize("value", ["qmaild", ""])
def test_ids_that_are_no_numbers(checked, value):
    last = f"tcpserver -u '{value}' -g 81 0 25 {checked.home.programs}/qmail-smtpd"
    found = checked.find("--env-from", write_run_file(checked, last))
    problem = found.only("no-user", "error")
    assert problem["what"] == f"-u '{value}' is not a number: tcpserver runs the service as root"
    assert problem["remedy"] == '-u "$(id -u qmaild)"'


# A listener that does not start


def write_listener(checked, words, before="", user="-u {0.pw_uid} -g {0.pw_gid}"):
    """A run file with a listener that has these words; its path."""
    ids = user.format(mail_user()) if os.getuid() == 0 else ""
    last = f"{checked.home.programs}/qmail-smtpd-listen {ids} {words}"
    return write_run_file(checked, last, before)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--proxy-from=foo 0 25", "--proxy-from foo: "),
        ("-v 0", "host and port are missing"),
    ],
)
def test_command_line_of_a_listener(checked, words, why):
    found = checked.find("--env-from", write_listener(checked, words))
    problem = found.only("run-file", "error")
    assert problem["what"].startswith(f"qmail-smtpd-listen does not start: {why}")
    assert "qmail-smtpd-listen(8)" in problem["remedy"]


@pytest.mark.parametrize("name", ["/var/qmail/bin/qmail-smtpd", "rblsmtpd"])
def test_what_stood_behind_tcpserver(checked, name):
    """Every password would be wrong."""
    run = write_listener(checked, f"0 25 {name} checkpassword true")
    problem = checked.find("--env-from", run).problem("run-file")
    assert f"{name} is no check program: take it off" in problem["what"]


def test_option_that_a_listener_does_not_have(checked):
    found = checked.find("--env-from", write_listener(checked, "-Z 0 25"))
    problem = found.problem("run-file")
    assert problem["what"] == "qmail-smtpd-listen does not start: option -Z not recognized"
    assert set(found.codes) <= {"run-file", "no-user"}


@pytest.mark.parametrize(
    "option", ["--helper={}/x", "--daemon --pid-file={}/x 0 25", "--daemon --log-file={}/x 0 25"]
)
def test_directory_that_is_not_there(checked, option):
    directory = checked.home.path / "none"
    run = write_listener(checked, option.format(directory))
    problem = checked.find("--env-from", run).only("run-file", "error")
    assert problem["what"].endswith(f"{directory}/x: {directory} is not there")
    assert problem["remedy"] == f"mkdir -p {directory} || exit 1 in the run file"
    run = write_listener(checked, option.format(directory), before=f"mkdir -p {directory}")
    assert checked.find("--env-from", run).codes == []


def test_directory_that_is_there(checked):
    run = write_listener(checked, f"--helper={checked.home.writable('run.d')}/x")
    assert checked.find("--env-from", run).codes == []


def test_file_in_the_place_of_a_socket(checked):
    path = checked.home.path / "socket"
    path.write_text("")
    run = write_listener(checked, f"--helper={path}")
    problem = checked.find("--env-from", run).only("run-file", "error")
    assert "it is there, and is no socket" in problem["what"]


@as_root
@pytest.mark.parametrize("option", ["--helper={}/x", "--daemon --pid-file={}/x 0 25"])
def test_directory_that_the_listener_can_not_write(checked, option):
    """As whom it starts: root, whatever -u says, or setuidgid's."""
    directory = checked.home.path / "run.d"
    directory.mkdir()
    run = write_listener(checked, option.format(directory))
    assert checked.find("--env-from", run).codes == []
    as_user = f"exec setuidgid {mail_user().pw_name} "
    run.write_text(run.read_text().replace("exec ", as_user).replace(" 0 25", " 0 2525"))
    problem = checked.find("--env-from", run).only("run-file", "error")
    uid = mail_user().pw_uid
    assert problem["what"].endswith(f"{directory} is not writable for uid {uid}")
    assert f"chown {uid} {directory}" in problem["remedy"]
    (directory / "another's").touch()
    assert str(directory) not in checked.find("--env-from", run).problem("run-file")["remedy"]
    os.chown(directory, uid, -1)
    assert checked.find("--env-from", run).codes == []


# Whose rights


@as_root
def test_service_as_root(checked):
    command = f"tcpserver 0 25 {checked.home.programs}/qmail-smtpd 2>&1"
    run = checked.write_run(f"#!/bin/sh\nexport QMAILHOME={checked.home.path}\nexec {command}\n")
    checked.find("--env-from", run).only("root", "warning")
    run.write_text(run.read_text().replace("exec tcpserver", "exec tcpserver -u 0 -g 0"))
    checked.find("--env-from", run).only("root", "warning")
    run.write_text(run.read_text().replace("-u 0 -g 0 ", ""))
    run.write_text(run.read_text().replace("tcpserver 0", "tcpserver -u 65534 0"))
    assert "root-group" in checked.find("--env-from", run).codes


# AUTH


@pytest.mark.parametrize(
    ("value", "means"),
    [
        ("!login", "LOGIN PLAIN; MAIL needs it"),
        ("-cram", "no AUTH"),
        ("yes", "LOGIN PLAIN"),
        ("!-cram", "LOGIN PLAIN; MAIL needs it"),
    ],
)
def test_smtpauth_that_is_none_of_the_values(checked, passwords, value, means):
    found = checked.find(exports={"SMTPAUTH": value}, check=passwords)
    problem = found.only("smtpauth-value", "warning")
    assert problem["what"] == f"SMTPAUTH={value!r} is none of the values; it means: {means}"


@pytest.mark.parametrize(
    "value", ["", "-", "0", "!", "cram", "+cram", "!cram", "!+CRAM", "cram-md5"]
)
def test_smtpauth_that_means_what_it_says(checked, passwords, value):
    assert checked.find(exports={"SMTPAUTH": value}, check=passwords).codes == []


@pytest.mark.parametrize("value", ["no", "off", "00"])
def test_forcetls_that_does_not_turn_it_off(checked, passwords, value):
    exports = {"SMTPAUTH": "!", "FORCETLS": value}
    problem = checked.find(exports=exports, check=passwords).only("forcetls-value", "warning")
    assert "only FORCETLS=0 turns it off" in problem["remedy"]


@with_tls
def test_smtps_that_does_not_turn_it_off(checked):
    found = checked.find(exports={"SMTPS": "0"})
    assert found.codes == ["smtps-port", "smtps-value"]


@with_tls
def test_check_program_true(checked):
    (true,) = need("true")
    found = checked.find(port=587, exports={"SMTPAUTH": "!"}, check=(true, true))
    problem = found.only("check-program-true", "error")
    assert "an open relay to everybody" in problem["cause"]


@with_tls
def test_no_check_program(checked):
    found = checked.find(exports={"SMTPAUTH": "!"})
    found.only("no-check-program", "error")


def test_check_program_that_is_never_asked(checked, passwords):
    problem = checked.find(check=passwords).only("no-auth", "warning")
    assert problem["remedy"].startswith("export SMTPAUTH=''")


@with_tls
def test_check_program_that_is_not_there(checked):
    found = checked.find(exports={"SMTPAUTH": "!"}, check=("/no/such/vchkpw", "/bin/true"))
    assert "/no/such/vchkpw is not there" in found.only("check-program", "error")["what"]


def test_host_name_before_the_check_program(checked, passwords):
    found = checked.find(exports={"SMTPAUTH": "!"}, check=(NAME, *passwords))
    problem = found.only("check-program", "error")
    assert problem["cause"].startswith("older patches")
    assert problem["remedy"].startswith(f"take {NAME} off")


@with_tls
def test_check_program_that_is_not_executable(checked):
    program = checked.home.program("checkpw", "exit 0")
    program.chmod(0o644)
    found = checked.find(exports={"SMTPAUTH": "!"}, check=(program, "/bin/true"))
    assert f"chmod a+rx {program}" in found.only("check-program", "error")["remedy"]


@with_tls
def test_check_program_without_its_first_line(checked):
    program = checked.home.program("checker", "")
    program.write_text("exit 0\n")
    found = checked.find(exports={"SMTPAUTH": "!"}, check=(program, "/bin/true"))
    assert "#!/bin/sh" in found.only("check-program", "error")["remedy"]


@with_tls
def test_check_program_whose_interpreter_is_not_there(checked):
    program = checked.home.program("checker", "")
    program.write_bytes(b"#!/bin/sh\r\nexit 0\r\n")
    found = checked.find(exports={"SMTPAUTH": "!"}, check=(program, "/bin/true"))
    assert "'/bin/sh\\r'" in found.only("check-program", "error")["what"]


@with_tls
@as_root
def test_check_program_that_is_not_setuid(checked):
    program = checked.home.path / "bin/vchkpw"
    shutil.copy(need("true")[0], program)
    program.chmod(0o755)
    service = {"exports": {"SMTPAUTH": "!"}, "check": (program, "/bin/true")}
    problem = checked.find(**service).only("check-program-setuid", "warning")
    assert "vpopmail's database" in problem["cause"]
    program.chmod(0o4711)
    if os.statvfs(program).f_flag & os.ST_NOSUID:
        lack("a file system on which programs can be setuid")
    assert checked.find(**service).codes == []


@pytest.mark.parametrize(("behind", "code"), [((), "no-subprogram"), (("/no/such",), "subprogram")])
def test_what_the_check_program_runs(checked, passwords, behind, code):
    found = checked.find(exports={"SMTPAUTH": "!"}, check=(passwords[0], *behind))
    assert "/bin/true" in found.only(code, "error")["remedy"]


@as_root
def test_users_file(checked, passwords):
    service = {"exports": {"SMTPAUTH": "!"}, "check": passwords}
    path = checked.home.path / "control/smtpusers"
    path.chmod(0o644)
    assert "chmod g-w,o=" in checked.find(**service).only("users-file", "error")["remedy"]
    path.chmod(0o600)
    problem = checked.find(**service).only("users-file", "error")
    assert "root:" in problem["cause"]
    path.write_text("# users\nnone\n")
    os.chown(path, mail_user().pw_uid, -1)
    problem = checked.find(**service).only("users-file", "error")
    assert problem["what"].endswith("'control/smtpusers': line 2 is malformed")
    assert problem["remedy"] == "mend it, or take it out"
    path.unlink()
    problem = checked.find(**service).only("users-file", "error")
    assert problem["remedy"] == "qmail-smtpd-users set USER makes it"


# Relaying


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            "rcpthosts",
            ["example.org", ".example.org", "[192.0.2.1]", "example.net:26"],
            ["example.org\r", " example.org", "a.example b.example", "*.example.org", "u@a.com"],
        ),
        (
            "badmailfrom",
            ["user@example.com", "@example.com", '"a_b"@example.com'],
            ["example.com", "*@example.com", "user@example.com # spam"],
        ),
    ],
)
def test_entries_that_can_not_match(checked, name, right, wrong):
    file = checked.home.path / "control" / name
    file.write_text("\n".join([*right, ""]))
    assert checked.find().codes == []
    for entry in wrong:
        file.write_bytes("\n".join([*right, entry, ""]).encode())
        problem = checked.find().only("control-entry", "warning")
        assert ascii(entry) in problem["what"]


def test_no_rcpthosts(checked):
    (checked.home.path / "control/rcpthosts").unlink()
    problem = checked.find().only("no-rcpthosts", "error")
    assert "open relay" in problem["what"]
    assert str(checked.home.path / "control/rcpthosts") in problem["remedy"]


@as_root
def test_no_rcpthosts_is_told_whatever_else_can_not_be_read(checked):
    (checked.home.path / "control/rcpthosts").unlink()
    other = checked.home.path / "control/badmailfrom"
    other.touch(0o600)
    assert set(checked.find().codes) >= {"no-rcpthosts", "unreadable"}
    other.unlink()
    (checked.home.path / "control/rcpthosts").touch(0o600)
    assert "no-rcpthosts" not in checked.find().codes


def test_no_rcpthosts_where_mail_needs_auth(checked, passwords):
    (checked.home.path / "control/rcpthosts").unlink()
    found = checked.find(port=587, exports={"SMTPAUTH": "!"}, check=passwords)
    assert found.codes == []
    assert "who has authenticated" in found.fact("rcpthosts")["text"]


def test_no_rcpthosts_for_this_host_alone(checked):
    (checked.home.path / "control/rcpthosts").unlink()
    assert checked.find(host="127.0.0.1").codes == []


def test_relayclient_for_everybody(checked):
    checked.find(exports={"RELAYCLIENT": ""}).only("open-relay", "error")


def test_rules(checked):
    cdb = compile_rules(
        checked.home.path / "tcp.smtp", '127.:allow,RELAYCLIENT=""\n10.:deny\n:allow'
    )
    found = checked.find(options=["-x", cdb])
    assert found.codes == []
    assert found.fact("rules")["rules"] == 3
    assert "1 of which denies;" in found.fact("rules")["text"]
    assert found.fact("relaying")["addresses"] == ["127."]


def test_rules_that_let_everybody_relay(checked):
    cdb = compile_rules(checked.home.path / "tcp.smtp", ':allow,RELAYCLIENT=""\n')
    found = checked.find(options=["-x", cdb])
    assert "the rule for everybody" in found.only("open-relay", "error")["what"]


def test_rules_that_let_all_who_have_a_name_relay(checked):
    cdb = compile_rules(checked.home.path / "tcp.smtp", '=:allow,RELAYCLIENT=""\n:allow\n')
    assert "the rule =" in checked.find(options=["-x", cdb]).only("open-relay", "error")["what"]


def test_rules_that_turn_strangers_away(checked):
    """Who is left may relay: that is what such rules are for."""
    cdb = compile_rules(checked.home.path / "tcp.smtp", '10.:allow,RELAYCLIENT=""\n:deny\n')
    (checked.home.path / "control/rcpthosts").unlink()
    assert checked.find(options=["-x", cdb]).codes == []


def test_rule_with_a_value_that_is_none(checked):
    cdb = compile_rules(checked.home.path / "tcp.smtp", '10.:allow,FORCETLS="no"\n:allow\n')
    problem = checked.find(options=["-x", cdb]).only("forcetls-value", "warning")
    assert problem["what"].startswith(f"{cdb}: 10.: FORCETLS='no'")


def test_rules_that_are_older_than_their_source(checked):
    cdb = compile_rules(checked.home.path / "tcp.smtp", ":allow\n")
    source = checked.home.path / "tcp.smtp"
    os.utime(cdb, (1, 1))
    problem = checked.find(options=["-x", cdb]).only("rules-stale", "warning")
    assert problem["remedy"] == f"tcprules {cdb} {source}.tmp < {source}"


@as_root
def test_rules_that_the_user_can_not_read(checked):
    cdb = compile_rules(checked.home.path / "tcp.smtp", ":allow\n")
    cdb.chmod(0o600)
    problem = checked.find(options=["-x", cdb]).only("unreadable", "error")
    assert problem["remedy"] == f"chmod a+r {cdb}"


def test_rules_that_are_not_there(checked):
    cdb = checked.home.path / "none.cdb"
    problem = checked.find(options=["-x", cdb]).only("unreadable", "error")
    assert problem["remedy"].startswith(f"tcprules {cdb} ")
    assert checked.find(options=["-x", cdb, "-X"]).codes == []


@pytest.mark.parametrize("left", [1000, 2060])
def test_rules_that_are_damaged(checked, left):
    cdb = compile_rules(checked.home.path / "tcp.smtp", "10.:deny\n127.:allow\n:allow\n")
    os.truncate(cdb, left)
    found = checked.find(options=["-x", cdb])
    assert "tcprules" in found.only("rules-damaged", "error")["remedy"]


def more_hosts(home, *domains):
    """control/morercpthosts.cdb, as qmail-newmrh makes it, and its source."""
    compile_rules(
        home.path / "control/morercpthosts", "".join(f"{name}:allow\n" for name in domains)
    )
    return home.control("morercpthosts", "\n".join(domains))


def test_more_hosts(checked):
    more_hosts(checked.home, "example.com", ".example.net")
    found = checked.find()
    assert found.codes == []
    assert found.fact("more hosts")["domains"] == 2


def test_more_hosts_that_are_stale(checked):
    more_hosts(checked.home, "example.com")
    checked.home.control("morercpthosts", "example.com\nexample.edu")
    assert checked.find().only("morercpthosts-stale", "warning")["remedy"] == "run qmail-newmrh"
    (checked.home.path / "control/morercpthosts.cdb").unlink()
    checked.find().only("morercpthosts-stale", "warning")


def test_more_hosts_that_are_damaged(checked):
    more_hosts(checked.home, "example.com")
    os.truncate(checked.home.path / "control/morercpthosts.cdb", 2050)
    assert checked.find().only("morercpthosts-damaged", "error")["remedy"] == "run qmail-newmrh"


# qmail-queue


def test_qmail_queue_that_is_not_there(checked):
    (checked.home.path / "bin/qmail-queue").unlink()
    assert "is not there" in checked.find().only("qmail-queue", "error")["what"]


def test_qmailqueue_that_is_not_executable(checked):
    program = checked.home.program("filter", "exit 0")
    program.chmod(0o644)
    problem = checked.find(exports={"QMAILQUEUE": program}).only("qmail-queue", "error")
    assert problem["remedy"] == f"chmod a+rx {program}; it is named by QMAILQUEUE"


@as_root
def test_maildir_that_the_user_can_not_write(checked):
    os.chown(checked.home.maildir, 0, 0)
    problem = checked.find().only("maildir", "error")
    assert f"chown {mail_user().pw_uid} {checked.home.maildir}" in problem["remedy"]
    (checked.home.maildir / "cur").mkdir()
    assert "name a directory of its own" in checked.find().problem("maildir")["remedy"]


@pytest.fixture
def queue(checked):
    """A queue as qmail has it, and a compiled program in the place of qmail-queue."""
    program = checked.home.path / "bin/qmail-queue"
    program.unlink()
    shutil.copy(need("true")[0], program)
    owner = mail_user().pw_uid + 1 if os.getuid() == 0 else os.getuid()
    directory = checked.home.path / "queue"
    for name in ("pid", "intd", "todo", "mess/0", "lock"):
        (directory / name).mkdir(parents=True)
        os.chown(directory / name, owner, -1)
    os.mkfifo(directory / "lock/trigger")
    os.chown(program, owner, -1)
    program.chmod(0o4711)
    directory.chmod(0o750)
    return directory


@as_root
def test_queue(checked, queue):
    found = checked.find()
    assert (found.status, found.codes) == (FINE, [])


@as_root
def test_qmail_queue_that_is_not_setuid(checked, queue):
    (queue.parent / "bin/qmail-queue").chmod(0o711)
    problem = checked.find().only("qmail-queue-setuid", "error")
    assert "chmod 4711" in problem["remedy"]


@as_root
def test_queue_that_can_not_be_written(checked, queue):
    os.chown(queue / "todo", 0, 0)
    problem = checked.find().only("queue", "error")
    assert problem["what"].startswith(f"{queue}/todo is not writable for ")


@as_root
def test_queue_without_trigger(checked, queue):
    (queue / "lock/trigger").unlink()
    checked.find().only("queue-trigger", "warning")


@as_root
def test_queue_that_is_not_there(checked, queue):
    shutil.rmtree(queue)
    checked.find().only("queue", "error")


# Memory


@with_tls
def test_memory_limit_that_is_too_low_for_tls(checked):
    found = checked.find(memory=20_000_000)
    assert found.status == FAILED
    assert "memory" in found.codes
    assert any("softlimit -m 64000000" in problem["remedy"] for problem in found.report["problems"])
    assert found.fact("memory")["limit"] == 20_000_000
    assert found.fact("memory")["needed"] >= 30_000_000


def test_memory_limit_that_is_too_low_for_anything(checked):
    found = checked.find(memory=4_000_000)
    assert found.status == FAILED
    assert "-m 64000000" in found.problem("session")["remedy"]


def test_memory_limit_is_that_without_tls_where_there_is_none(checked):
    found = checked.find(memory=20_000_000)
    assert found.codes == []


def test_memory_needs_are_those_of_the_documents():
    from qmail_smtpd_py.check_limits import MEMORY_NEEDS

    readme = (RUN.parent / "README.md").read_text().partition("## Memory")[2]
    versions = re.search(r"\| \| Python 3\.(\d+) \| 3\.(\d+) \| 3\.(\d+) \|", readme)
    rows = re.findall(r"\| with(?:out)? TLS.* \| (\d+) MB \| (\d+) MB \| (\d+) MB \|", readme)
    assert versions and len(rows) == 2
    columns = zip(*([int(text) for text in row] for row in rows))
    assert dict(zip(map(int, versions.groups()), columns)) == MEMORY_NEEDS


@with_tls
@pytest.mark.parametrize(("limit", "codes"), [(49_000_000, ["memory"]), (51_000_000, [])])
def test_memory_limit_of_the_listener(checked, limit, codes):
    run = checked.run_file(memory=limit)
    text = run.read_text().replace(f" {checked.home.programs}/qmail-smtpd", "")
    run.write_text(text.replace("tcpserver", f"{checked.home.programs}/qmail-smtpd-listen"))
    assert checked.find("--env-from", run).codes == codes


def test_no_terminal_is_given_to_the_services_user(monkeypatch):
    """Who can look into a process of that user could type there what root is to run (TIOCSTI)."""
    leader = check.Report()
    monkeypatch.setattr(check, "_examine", lambda *_: leader)
    monkeypatch.setattr(leader, "as_json", lambda: json.dumps(os.getsid(0) == os.getpid()))
    assert check._in_child(None, "") == "true"


def test_what_the_services_user_says_is_printable():
    report = check.Report()
    report.add(json.dumps({"facts": [], "problems": [], "notes": ["\x1b[2J", {"x": ["\x07"]}]}))
    assert report.notes == ["?[2J", {"x": ["?"]}]


def test_a_report_that_nobody_takes(checked):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [checked.program], stdout=full, stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"]}
        )
    assert done.returncode == 111
    assert done.stderr == b"qmail-smtpd-check: cannot write: No space left on device\n"


# Where failed attempts are counted, and traces go


def test_table_of_failed_attempts(checked):
    directory = checked.home.writable("table")
    checked.home.control("authfailtable", f"{directory}/failed")
    found = checked.find()
    assert found.codes == []
    fact = found.fact("failed AUTH")
    assert fact["text"] == f"30 of an address in 3600 s, counted in {directory}/failed"
    assert (fact["limit"], fact["seconds"]) == (30, 3600)
    assert list(directory.iterdir()) == []


@as_root
def test_table_of_failed_attempts_that_can_not_be_made(checked):
    checked.home.control("authfailtable", "control/failed")
    problem = checked.find().only("authfailtable", "warning")
    assert "is not writable" in problem["what"]


def test_no_trace_is_left(checked):
    directory = checked.home.writable("traces")
    found = checked.find(exports={"SMTPTRACE": directory})
    assert found.codes == []
    assert str(directory) in found.fact("trace")["text"]
    assert list(directory.iterdir()) == []


@as_root
def test_trace_that_can_not_be_written(checked):
    problem = checked.find(exports={"SMTPTRACE": "/nonexistent"}).only("trace", "warning")
    assert "mkdir -p /nonexistent" in problem["remedy"]


def test_greeting_delay_is_waited_for_once(checked):
    checked.home.control("greetdelay", "1")
    found = checked.find()
    assert found.codes == []
    assert found.fact("limits")["greeting_delay"] == 1


@pytest.mark.parametrize("drops", [False, True])
def test_early_talkers(checked, drops):
    """What is said of them, where there is a greeting to be early for."""
    found = checked.find(exports={"DROP_PRE_GREET": int(drops), "MINRATE": 50})
    assert found.fact("limits")["drops_early_talkers"] is drops
    assert "least rate 50 octets/s" in found.fact("limits")["text"]
    assert "before the greeting" not in found.fact("limits")["text"]
    checked.home.control("greetdelay", "1")
    checked.home.control("droppregreet", str(int(drops)))
    found = checked.find()
    assert found.fact("limits")["drops_early_talkers"] is drops
    end = "turned away" if drops else "only logged"
    assert found.fact("limits")["text"].endswith(f"; who speaks before the greeting is {end}")
