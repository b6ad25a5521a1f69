"""Run files, read without running them: what is understood, and what is said of the rest."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given
from hypothesis.strategies import lists, sampled_from

from qmail_smtpd_py import shellwords
from qmail_smtpd_py.runfile import RunFile
from qmail_smtpd_py.shellwords import is_for_shell

ROOT = Path(__file__).resolve().parent.parent
LAST = "exec tcpserver 0 25 qmail-smtpd 2>&1\n"


def read(script: str, directory: str = "/service/smtp") -> RunFile:
    return RunFile(f"#!/bin/sh\n{script}", directory)


def variables(run: RunFile) -> dict[str, str]:
    return {name: text for name, text in run.environ.items() if name != "PATH"}


@pytest.mark.parametrize(
    ("first", "is_one"),
    [
        ("#!/bin/sh", True),
        ("#!/bin/bash -e", True),
        ("#! /usr/bin/env dash", True),
        ("exec tcpserver", True),
        ("#!/command/with-contenv sh", True),
        ("\n# a unit\n[Unit]", False),
        ("service smtp\n{", False),
        ("smtp stream tcp nowait qmaild /var/qmail/bin/tcp-env tcp-env", False),
        ("[ -d /x ] || exit", True),
        ("#!/command/execlineb -P", False),
        ("#!/usr/bin/env python3", False),
        ("#!/usr/bin/perl", False),
    ],
)
def test_a_script_that_is_none_for_a_shell(first: str, is_one: bool) -> None:
    assert is_for_shell(f"{first}\nexec x\n") is is_one


# Words


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("a b  c", ["a", "b", "c"]),
        ("'a b' \"c d\" e\\ f", ["a b", "c d", "e f"]),
        ("a'b'\"c\"d", ["abcd"]),
        ("a \\\n b", ["a", "b"]),
        ('"a\\"b\\\\c\\d"', ['a"b\\c\\d']),
        ("'a\\b'", ["a\\b"]),
        ("a # not this", ["a"]),
        ("a#b", ["a#b"]),
        ("'' \"\"", ["", ""]),
        ("a=1$", ["a=1$"]),
    ],
)
def test_words(script: str, words: list[str]) -> None:
    (command,) = shellwords.parse(script)
    assert [word.literal for word in command.words] == words


def test_operators_part_commands() -> None:
    commands = shellwords.parse("a && b || c; d | e & f\n(g)\n")
    assert [command.words[0].literal for command in commands] == list("abcdef(g)")
    operators = ["", "&&", "||", ";", "|", "&", "\n", "", ")"]
    assert [command.before for command in commands] == operators


def test_lines_are_counted() -> None:
    commands = shellwords.parse("a\n\n# b\nc \\\n  d\ne 'f\ng'\nh\n")
    assert [command.line for command in commands] == [1, 4, 6, 8]


@pytest.mark.parametrize(
    ("script", "redirections"),
    [
        ("a 2>&1", ["2>&1"]),
        ("a > /dev/null 2>&1", [">/dev/null", "2>&1"]),
        ("a 2> /dev/null b", ["2>/dev/null"]),
        ("a 0 25 < b", ["<b"]),
    ],
)
def test_redirections(script: str, redirections: list[str]) -> None:
    (command,) = shellwords.parse(script)
    assert list(map(str, command.redirections)) == redirections
    assert "25" not in redirections


@pytest.mark.parametrize("script", ["'a", '"a', "$(a", "${a", "`a"])
def test_scripts_that_are_not_understood_at_all(script: str) -> None:
    with pytest.raises(shellwords.ScriptError):
        shellwords.parse(script)
    assert len(read(script).notes) == 1


def test_a_shell_s_script_without_its_end_is_all_that_is_not_read() -> None:
    run = read(f"export SMTPAUTH='!'\nsh -c 'echo \"there'\n{LAST}")
    what = 'line 3: the script of a shell has a " without its end'
    assert run.notes == [f"{what}; nothing of it was read"]
    assert variables(run) == {"SMTPAUTH": "!"}
    assert run.chain.program == "qmail-smtpd"


# Variables


@pytest.mark.parametrize(
    "script",
    [
        "export A='x y'",
        "A='x y'; export A",
        "readonly A='x y'; export A",
        "export A\nA='x y'\nexport A",
        "A=old\nexport A\nA='x y'",
        "set -a\nA='x y'",
        "set -o allexport\nA='x y'",
        'B=y\nexport A="x $B"',
        "B='x y'\nexport A=\"${B}\"",
        'export A="${B:-x y}"',
        'B=\nexport A="${B:-x y}"',
        "true && export A='x y'",
        "cd /tmp && export A='x y'",
        "export A=z; unset A; export A='x y'",
    ],
)
def test_exported(script: str) -> None:
    run = read(f"{script}\n{LAST}")
    assert variables(run) == {"A": "x y"}
    assert run.notes == []


@pytest.mark.parametrize("prefix", ["A='x y' ", "env A='x y' ", "/usr/bin/env - A='x y' B= "])
def test_set_for_the_last_command(prefix: str) -> None:
    run = read(f"{prefix}tcpserver 0 25 qmail-smtpd 2>&1")
    assert variables(run).pop("A") == "x y"
    assert run.chain.port == 25


def test_env_with_nothing_else() -> None:
    assert read(f"export A=1\nexec env - B=2 {LAST[5:]}").environ == {"B": "2"}


def test_envdir(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    files = {"A": "one \t\ntwo", "B": "", "C": "x\0y", ".hidden": "z"}
    for name, text in files.items():
        (tmp_path / "env" / name).write_text(text)
    run = read("export B=1\nexec envdir ./env tcpserver 0 25 qmail-smtpd 2>&1", str(tmp_path))
    assert variables(run) == {"A": "one", "C": "x\ny"}


def test_unexported() -> None:
    run = read(f"SMTPAUTH='!'\nUNUSED=1\nUSED=2\necho \"$USED\"\nexport DONE=3\n{LAST}")
    assert run.unexported == [
        ("line 2", "SMTPAUTH", "!", False),
        ("line 3", "UNUSED", "1", False),
        ("line 4", "USED", "2", True),
    ]


def test_path_is_exported_already() -> None:
    run = read(f"PATH=/opt/bin:$PATH\n{LAST}")
    assert run.environ["PATH"].startswith("/opt/bin:")
    assert (run.unexported, run.notes) == ([], [])


def test_answers_that_need_no_running(tmp_path: Path) -> None:
    (tmp_path / "me").write_text("mail.example.org\nsecond\n")
    me, root = tmp_path / "me", pwd.getpwnam("root")
    script = (
        f'export A=$(head -n 1 {me}) B=`head -1 {me}` C="$(cat {tmp_path}/none 2>/dev/null)"\n'
        "U=$(id -u root) || exit 1\n"
        f'exec tcpserver -u $U -g "`id -g root`" -l "$A" 0 smtp qmail-smtpd 2>&1'
    )
    run = read(script)
    assert variables(run) == {"A": "mail.example.org", "B": "mail.example.org", "C": ""}
    assert (run.chain.uid, run.chain.gid, run.chain.port) == (root.pw_uid, root.pw_gid, 25)
    assert (run.chain.local_host, run.notes) == ("mail.example.org", [])


@pytest.mark.parametrize(
    "script",
    [
        "export A=$(date)",
        "export A=`uname -n | cut -c1`",
        "export A=$((1 + 1))",
        "export A=${B#c}",
        "export A=$UNKNOWN",
        "A=$1; export A",
    ],
)
def test_values_that_are_not_known(script: str) -> None:
    """They are no values: neither of the variable, nor of a missing export."""
    run = read(f"{script}\n{LAST}")
    assert variables(run) == {}
    assert run.unexported == []
    assert len(run.notes) == 1
    assert run.notes[0].startswith("line 2: ")


def test_what_is_too_deep_is_not_followed() -> None:
    nested = "NAME=" + "$(cat " * 400 + "x" + ")" * 400
    shells = "export SHELLS='sh -c \"$SHELLS\"; sh -c \"$SHELLS\"'\nsh -c \"$SHELLS\""
    run = read(f"{nested}\n{shells}\n{LAST}")
    assert run.chain.program == "qmail-smtpd"
    assert len(run.notes) == 2


def test_nothing_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for script in (f"export A=$(touch {made})", f"A=`touch {made}`", f"touch {made}", f". {made}"):
        read(f"{script}\n{LAST}")
    assert not made.exists()


def test_no_pipe_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert variables(read(f"export A=$(cat {tmp_path}/pipe)\n{LAST}")) == {"A": ""}


# Control flow


def test_tests_that_only_exit_change_nothing() -> None:
    script = 'if [ -z "$A" -o ! -f b ]; then\n  echo "no b"\n  exit 1\nfi\n[ "$C" ] || exit 1\n'
    run = read(script + LAST)
    assert (run.notes, run.chain.program) == ([], "qmail-smtpd")


@pytest.mark.parametrize(
    "script",
    [
        "if [ -z \"$C\" ]; then export A=1; else export A=2; fi",
        "if pick; then export A=1; fi",
        "[ -z $C ] && export A=1",
        "grep -q a b && export A=1",
        "case $B in\n x) export A=1 ;;\n *) export A=2 ;;\nesac",
        "for x in $C; do export A=$x; done",
        "while pick; do export A=1; done",
        ". ./common",
        "source /etc/mail.conf",
        "/usr/local/bin/prepare",
    ],
)
def test_what_depends_on_something_is_noted(script: str) -> None:
    run = read(f"{script}\n{LAST}")
    assert len(run.notes) == 1, run.notes
    assert variables(run) == {}
    assert run.chain.program == "qmail-smtpd"


# Chains


def test_the_whole_chain() -> None:
    run = read(
        "exec 2>&1\nexec /usr/local/bin/softlimit -m 30000000 -o 20 nice -n 5 \\\n"
        "  tcpserver -vRHl0 -c50 -u 78 -g '81' -x /etc/tcp.smtp.cdb 192.0.2.1 587 \\\n"
        "  rblsmtpd -b -r bl.example fixcrio /opt/qmail-smtpd check -x true"
    )
    chain = run.chain
    assert (chain.uid, chain.gid, chain.port, chain.host) == (78, 81, 587, "192.0.2.1")
    assert (chain.concurrency, chain.rules) == (50, "/etc/tcp.smtp.cdb")
    assert (chain.limits["as"], chain.limits["nofile"]) == (30000000, 20)
    assert (chain.program, chain.arguments) == ("/opt/qmail-smtpd", ["check", "-x", "true"])
    assert run.has_joined_log
    assert run.notes == []


@pytest.mark.parametrize("empty", ["$V", "${V}", "exec $V", "X=1 $V"])
def test_command_that_is_nothing(empty: str) -> None:
    run = read(f"V=\n{empty}\nexec tcpserver 0 25 qmail-smtpd 2>&1")
    assert (run.chain.port, run.notes) == (25, [])


def test_programs_are_those_of_the_chain() -> None:
    """Not what else is called, which may be the shell's own."""
    script = "local x\nsetup\nexec softlimit -m 9 sh -c 'read y; exec tcpserver 0 25 qmail-smtpd'"
    assert [name for name, _, _ in read(script).chain.programs] == ["softlimit", "sh", "tcpserver"]


def test_numbers_that_are_none_or_too_large() -> None:
    much = "9" * 26
    run = read(f"ulimit -v ²\nulimit -d {much}\nexec tcpserver -u {much} 0 25 qmail-smtpd 2>&1")
    assert run.chain.limits == {"as": None, "data": 2**63 - 1}
    assert run.chain.odd_ids == [("-u", much)]
    assert read(f"exec softlimit -m {much} qmail-smtpd").chain.limits["as"] == 2**63 - 1


def test_setuidgid_and_envuidgid() -> None:
    nobody = pwd.getpwnam("nobody")
    for script in ("setuidgid nobody tcpserver 0 2525", "envuidgid nobody tcpserver -U 0 25"):
        chain = read(f"exec {script} qmail-smtpd 2>&1").chain
        assert (chain.uid, chain.gid) == (nobody.pw_uid, nobody.pw_gid)


def test_shell_in_the_chain() -> None:
    script = "exec envdir /nonexistent sh -c 'exec tcpserver -c ${MAX:-7} 0 465 qmail-smtpd'"
    run = read(script.replace("envdir /nonexistent ", "") + " 2>&1")
    assert (run.chain.concurrency, run.chain.port, run.has_joined_log) == (7, 465, True)


def test_shell_behind_programs(tmp_path: Path) -> None:
    """It has what they set, and what it sets itself."""
    (tmp_path / "UID").write_text("78\n")
    script = "export A=1; exec tcpserver -u $UID -c \"$A\" 0 465 /opt/qmail-smtpd a"
    run = read(f"exec softlimit -m 9 envdir {tmp_path} sh -c '{script}' 2>&1")
    assert (run.chain.uid, run.chain.concurrency, run.chain.port) == (78, 1, 465)
    assert (run.chain.program, run.chain.arguments) == ("/opt/qmail-smtpd", ["a"])
    assert variables(run) == {"A": "1", "UID": "78"}
    assert (run.has_joined_log, run.notes) == (True, [])


def test_shell_that_starts_something_else() -> None:
    """What it sets is not set for what comes behind."""
    assert variables(read(f"B=2 sh -c 'export A=1'\n{LAST}")) == {}


def test_listener_and_its_helper() -> None:
    chain = read("exec qmail-smtpd-listen -c 9 --idle=3 0 587 check true 2>&1").chain
    assert (chain.program, chain.port) == ("qmail-smtpd-listen", 587)
    assert chain.arguments == ["check", "true"]
    chain = read("exec qmail-smtpd-listen --helper=/run/tls 2>&1").chain
    assert (chain.program, chain.helper, chain.port) == ("qmail-smtpd-listen", "/run/tls", None)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("-v 0", "host and port are missing"),
        ("-u 78 $HOST", ""),
        ("--proxy-from=foo 0 25", "--proxy-from foo: "),
        ("--proxy-from=foo $HOST 25 check", "--proxy-from foo: "),
        ("--proxy-from=10.0.0.0/8 0 25", ""),
        ('--proxy-from="$PROXIES" -c $(max) 0 25', ""),
        ("-c none 0 25", "-c none: "),
        ("-vZ 0 25", "option -Z not recognized"),
        ("0 25 -Z", ""),
        ("--helper=/run/tls", ""),
        ("--helper=/run/tls $MORE", ""),
    ],
)
def test_command_line_with_which_the_listener_does_not_start(words: str, why: str) -> None:
    chain = read(f"exec /opt/qmail-smtpd-listen {words} 2>&1").chain
    assert chain.program == "/opt/qmail-smtpd-listen"
    found = [what.partition("qmail-smtpd-listen does not start: ")[2] for what, _ in chain.troubles]
    assert len(found) == bool(why)
    assert all(what.startswith(why) for what in found)


def test_files_that_a_listener_makes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    script = "cd sub\nmkdir -p ./tls $UNKNOWN\n[ -d a ] || mkdir a\n"
    run = read(f"{script}exec qmail-smtpd-listen --helper=./tls/socket 2>&1", str(tmp_path))
    assert run.chain.files == {"--helper": f"{tmp_path}/sub/tls/socket"}
    assert run.made_directories == {f"{tmp_path}/sub/tls", f"{tmp_path}/sub/a"}


@pytest.mark.parametrize(
    ("options", "is_told"),
    [("", False), ("--log-file=/log", False), ("--daemon --log-file=/log", True)],
)
def test_log_of_a_listener_without_a_supervisor(options: str, is_told: bool) -> None:
    chain = read(f"qmail-smtpd-listen {options} 0 25").chain
    assert chain.logs_by_itself is is_told


# Whose rights: -u and -g that may be nothing


@pytest.mark.parametrize(
    ("before", "word", "unset"),
    [
        ("", "$QMAILDUID", ["QMAILDUID"]),
        ("", '"${QMAILDUID}"', ["QMAILDUID"]),
        ("echo $QMAILDUID # QMAILDUID=78", "$QMAILDUID", ["QMAILDUID"]),
        ("QMAILDUID=$(pick)", "$QMAILDUID", []),
        ("if a; then QMAILDUID=78; fi", "$QMAILDUID", []),
        ("read QMAILDUID < uid", "$QMAILDUID", []),
        (". /etc/qmail.conf", "$QMAILDUID", []),
        ("if a; then . /etc/qmail.conf; fi", "$QMAILDUID", []),
        ('eval "$(settings)"', "$QMAILDUID", []),
        ("", "${QMAILDUID:?}", []),
        ("", "$1", []),
        ("", "$(pick)", []),
    ],
)
def test_ids_that_nothing_sets(before: str, word: str, unset: list[str]) -> None:
    run = read(f"{before}\nexec tcpserver -u {word} -g 81 0 25 qmail-smtpd 2>&1")
    ((flag, written),) = run.chain.odd_ids
    assert (flag, run.chain.uid, run.chain.gid) == ("-u", None, 81)
    assert run.never_set(written) == unset


@pytest.mark.parametrize("value", ["qmaild", "''", "-1"])
def test_ids_that_are_no_numbers(value: str) -> None:
    run = read(f"exec tcpserver -u 78 -g {value} 0 25 qmail-smtpd 2>&1")
    assert run.chain.odd_ids == [("-g", value.strip("'"))]
    assert (run.chain.uid, run.notes) == (78, [])


@pytest.mark.parametrize(
    ("chain", "unset"),
    [
        ("tcpserver -U", ["UID", "GID"]),
        ("envuidgid nobody tcpserver -U", []),
        ("env UID=78 GID=81 tcpserver -U", []),
        ("envdir /nonexistent tcpserver -U", []),
        ("chpst -U qmaild tcpserver -U", []),
    ],
)
def test_ids_of_the_environment(chain: str, unset: list[str]) -> None:
    run = read(f"exec {chain} 0 25 qmail-smtpd 2>&1")
    assert [name for _, word in run.chain.odd_ids for name in run.never_set(word)] == unset


def test_value_that_is_not_known_is_one_word() -> None:
    assert read("exec tcpserver -c $(pick a b) 0 465 qmail-smtpd 2>&1").chain.port == 465


def test_program_that_is_not_known() -> None:
    run = read("exec tcpserver 0 25 spamdyke -f /etc/spamdyke.conf /opt/qmail-smtpd a b 2>&1")
    assert (run.chain.program, run.chain.arguments) == ("/opt/qmail-smtpd", ["a", "b"])
    assert run.notes == ["line 2: what `spamdyke` changes for qmail-smtpd is not counted"]


def test_option_that_is_not_known() -> None:
    run = read("exec tcpserver --new 0 25 qmail-smtpd 2>&1")
    assert run.chain.program == "qmail-smtpd"
    assert len(run.notes) == 1


@pytest.mark.parametrize(
    ("host", "is_for_everybody"),
    [("0", True), ("192.0.2.1", True), ("127.0.0.1", False), ("localhost", False), ("::1", False)],
)
def test_who_can_connect(host: str, is_for_everybody: bool) -> None:
    chain = read(f"exec tcpserver {host} 25 qmail-smtpd 2>&1").chain
    assert chain.is_for_everybody is is_for_everybody


@pytest.mark.parametrize(
    ("end", "has_joined_log"),
    [
        ("", False),
        ("2>/dev/console", True),
        (">&2", False),
        ("2>&1", True),
        (">/dev/null 2>&1", False),
        ("2>&1 >/dev/null", True),
        ("2>/dev/null", False),
        ("&>/log", True),
        (">&/log", True),
    ],
)
def test_where_the_log_goes(end: str, has_joined_log: bool) -> None:
    assert read(f"exec tcpserver 0 25 qmail-smtpd {end}").has_joined_log is has_joined_log
    assert read(f"exec {end}\nexec tcpserver 0 25 qmail-smtpd").has_joined_log is has_joined_log
    group = f"{{ exec tcpserver 0 25 qmail-smtpd; }} {end}"
    assert read(group).has_joined_log is has_joined_log


def test_pipe_behind_the_last_command() -> None:
    run = read("tcpserver 0 25 qmail-smtpd 2>&1 | splogger smtpd 3 &")
    assert (run.has_joined_log, run.chain.program, run.notes) == (True, "qmail-smtpd", [])


@pytest.mark.parametrize("command", ["envdir /nonexistent", "setuidgid no.such.user"])
def test_what_keeps_the_service_from_starting(command: str) -> None:
    run = read(f"exec {command} tcpserver 0 25 qmail-smtpd 2>&1")
    assert run.chain.program == "qmail-smtpd"
    ((what, remedy),) = run.chain.troubles
    assert what.endswith("so the service does not start")
    assert remedy


PIECES = (
    *("exec ", "export ", "env ", "envdir ", "softlimit -m ", "tcpserver ", "sh -c ", "-u ", "0 "),
    *("qmail-smtpd", "A=", "$A", "${A", "}", "$(", ")", "`", "'", '"', "\\", "\n", "id -u root"),
    *("if ", "then ", "fi", "case ", "esac", "{ ", "&&", "||", ";", "|", "<", ">", "<<", "#", " "),
    *("1" * 5000, "ulimit -v "),
    *("for x in 1 2 3; do ", "done", "while :; do ", "f() {", "f ", ". ./run ", "eval ", "set -- "),
    *("$@", "<<EOF", "EOF", "=(", "(", ")", "[ ", " ]", "! ", "else ", "elif ", "~root", "${A:="),
    *("-:", "cd ", "read ", "unset "),
)


@pytest.mark.parametrize(
    "script",
    [
        'U="$(id -u "a\0b")"',
        "tcpserver 0 a\0b qmail-smtpd",
        "envdir a\0b tcpserver 0 25 qmail-smtpd",
        f"tcpserver 0 {'1' * 5000} qmail-smtpd",
        f"ulimit -v {'1' * 5000}; softlimit -m {'1' * 5000} tcpserver -c {'1' * 5000} 0 25 true",
    ],
)
def test_names_that_can_be_none(script: str) -> None:
    read(script)


@given(lists(sampled_from(PIECES), max_size=25))
@examples(1000)
def test_any_script_is_read_without_an_error(pieces: list[str]) -> None:
    run = read("".join(pieces))
    assert all(note.isprintable() or "\n" in note for note in run.notes)


# The documents' run files


def run_files_of(document: str) -> list[str]:
    """The scripts in a document: indented, from #! to the last line of qmail-smtpd's."""
    found, script = [], None
    for line in (ROOT / document).read_text().splitlines():
        if line.startswith("    #!/bin/sh"):
            script = []
        if script is not None and line.startswith("    "):
            script.append(line[4:])
        elif script:
            found.append("\n".join(script))
            script = None
    return [text for text in found if "tcpserver" in text or "qmail-smtpd-listen" in text]


@pytest.fixture
def has_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host may not have those of a qmail."""
    monkeypatch.setattr(
        pwd, "getpwnam", lambda name: pwd.struct_passwd((name, "x", 1001, 1002, "", "/", "/bin/sh"))
    )


@pytest.mark.usefixtures("has_all_users")
def test_the_run_file_of_readme() -> None:
    (script,) = run_files_of("README.md")
    run = read(script.partition("\n")[2])
    assert variables(run) == {"SMTPAUTH": "!"}
    assert (run.chain.port, run.chain.concurrency) == (587, 100)
    assert run.chain.limits["as"] == 64_000_000
    assert run.chain.arguments == ["/home/vpopmail/bin/vchkpw", "/bin/true"]
    assert run.has_joined_log
    assert run.notes == []
    assert [name for _, word in run.chain.odd_ids for name in run.never_set(word)] == []


@pytest.mark.usefixtures("has_all_users")
@pytest.mark.parametrize("path", sorted(ROOT.glob("run/*/run")), ids=lambda path: path.parent.name)
def test_run_files_that_are_shipped(path: Path) -> None:
    """All is understood."""
    run = read(path.read_text().partition("\n")[2])
    assert run.chain.program is not None
    assert run.has_joined_log
    assert [name for _, name, _, is_used in run.unexported if not is_used] == []
    assert run.chain.limits["as"] == 64_000_000
    assert run.notes == []
