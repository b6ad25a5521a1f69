"""Scripts as administrators write them: what is followed, what is not known, and that nothing is
claimed of that.
"""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

import pytest

from qmail_smtpd_py import answers
from qmail_smtpd_py.runfile import RunFile

ROOT = pwd.getpwnam("root")
LAST = "exec tcpserver 0 25 qmail-smtpd 2>&1"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for scripts, with some files in it."""
    for name, text in {
        "me": "mail.example.org\nsecond\n",
        "limit": "7\n",
        "empty": "",
        "settings": "B='from a file'\nOPTS='-v -x rules.cdb'\n",
        "broken": "echo 'there",
        "long": "#" * 70000 + "\nexport A=x\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "A").write_text("of envdir\n")
    monkeypatch.setenv("HOME", "/nowhere")


def read(script: str, directory: Path) -> RunFile:
    return RunFile(f"#!/bin/sh\n{script}\n", str(directory))


# Values


@pytest.mark.parametrize(
    ("script", "value"),
    [
        # What stands for a variable
        ("A=${B:=x}; export A", "x"),
        ("B=y; export A=${B:=x}", "y"),
        (': "${A:=x}"; export A', "x"),
        ("B=; export A=${B-x}", ""),
        ("B=y; export A=${B:+x}", "x"),
        ("B=; export A=${B:+x}z", "z"),
        ('C=y; export A="${B:-a $C b}"', "a y b"),
        ("export A=~root", ROOT.pw_dir),
        ("A=~root/bin; export A", f"{ROOT.pw_dir}/bin"),
        ("export A='~root'", "~root"),
        ("export A=a~root", "a~root"),
        # How it comes to be exported
        ("export A; A=x", "x"),
        ("declare -x A=x", "x"),
        ("typeset -x A=x", "x"),
        ("set -ea; A=x", "x"),
        ("set -e -a; A=x; set +a", "x"),
        ("for v in A; do A=x; export $v; done", "x"),
        ("for v in 1 2; do export A=$v; done", "2"),
        ("for v in '*'; do export A=$v; done", "*"),
        ('export "A=x"', "x"),
        ('export A"=x"', "x"),
        ("declare -x 'A=x'", "x"),
        ("A=1; A=2 B=$A; export A=$B", "2"),
        ("for v in 1 2; do export A=$v; break; done", "1"),
        ("for v in 1 2; do [ $v = 2 ] && continue; export A=$v; done", "1"),
        ('export A="${B:-it\'s}"', "it's"),
        ("export A=x; set -euo pipefail", "x"),
        ("if true; then (cd env); fi; export A=$(cat limit)", "7"),
        ("set -a; { (set +a); }; A=x", "x"),
        ("command export A=x", "x"),
        ("B=x export A; A=$B", "x"),
        # What commands would print
        ("export A=$(cat limit)", "7"),
        ("cd env; export A=$(cat ../limit)", "7"),
        ("export A=$(cat nothing 2>/dev/null || echo 9)", "9"),
        ("export A=$(cat limit 2>/dev/null || echo 9)", "7"),
        ("export A=$(cat me | head -1)", "mail.example.org"),
        ("export A=$(head -n 1 < me)", "mail.example.org"),
        ("export A=$(getent passwd root | cut -d: -f6)", ROOT.pw_dir),
        ("export A=$(getent group root | cut -d : -f 3)", "0"),
        ("export A=$(id root -u)", "0"),
        ("export A=$(uname -n)", os.uname().nodename),
        ("export A=$(command -v no-such-program || echo none)", "none"),
        ("export A=$(basename $(dirname /a/b/c))", "b"),
        ('cd "$(dirname "$0")"; export A=$(cat limit)', "7"),
        ("cd ${0%/*}; export A=$(cat limit)", "7"),
        ("read A < limit; export A", "7"),
        ("A=$(cat none 2>/dev/null) || A=9; export A", "9"),
        ("A=$(cat limit) || A=9; export A", "7"),
        ("export A=`echo \\`cat limit\\``", "7"),
        ("export A=$(echo 20 | cut -d: -f2)", "20"),
        ("export A=$(echo a:b | cut -d: -f3)", ""),
        ("export A=$(basename /x/20/)", "20"),
        ("export A=$(dirname a/b/)$(dirname /b)$(dirname b)", "a/."),
        ("command -v ulimit > /dev/null && export A=x", "x"),
        ("export A=$(command -v sh >/dev/null 2>&1 && echo y || echo n)", "y"),
        ("export A=$(id -u no-such-user 2>/dev/null || echo 5)", "5"),
        ("if id -u no-such-user >/dev/null 2>&1; then export A=y; else export A=x; fi", "x"),
        ("read B < empty || B=9; export A=$B", "9"),
        ("cd nowhere 2>/dev/null || cd env; export A=$(cat ../limit)", "7"),
        # Branches
        ("if [ -f limit ]; then export A=x; else export A=y; fi", "x"),
        ("if [ ! -f limit ]; then export A=x; else export A=y; fi", "y"),
        ("if ! [ -s empty ]; then export A=x; fi", "x"),
        ("if [ -f none ]; then A=x; elif test -d env; then A=y; else A=z; fi; export A", "y"),
        ("if [ -f none ] || [ ! -d env ]; then export A=x; else export A=y; fi", "y"),
        ("if [ -f limit -a -d env ]; then export A=x; fi", "x"),
        ("B=1; if [ $B -ge 1 ] && [ $B != 2 ]; then export A=x; fi", "x"),
        ("[ -f limit ] && export A=x", "x"),
        ("[ -f none ] || export A=x", "x"),
        ("export A=x; [ -f none ] && export A=y", "x"),
        ("[ -d env ] && { A=x; export A; }", "x"),
        ("if [ -d env ]; then if [ -f none ]; then export A=x; else export A=y; fi; fi", "y"),
        ("true && export A=x || export A=y", "x"),
        ("false && export A=x || export A=y", "y"),
        # What is read, and called
        (". ./settings; export A=$B", "from a file"),
        ("[ -r settings ] && . ./settings; export A=$B", "from a file"),
        ("f() { export A=x; }\nf", "x"),
        ("f() {\n  export A=x\n}\nexport A=y", "y"),
        ("f() { return 0; export A=y; }\nexport A=x\nf", "x"),
        ("f() { return 1; }\nexport A=x\nf && export A=y", "x"),
        ("f() { if [ -d env ]; then return; fi; export A=y; }\nexport A=x\nf", "x"),
        ("function f {\n  export A=y\n}\nexport A=x", "x"),
        ("function f() { export A=x; }\nf", "x"),
        ("eval 'export A=x'", "x"),
        ("cat > /dev/null <<EOF\n'not \" this $(\nEOF\nexport A=x", "x"),
        ("cat <<-'END' >/dev/null\n\tnot this\n\tEND\nexport A=x", "x"),
    ],
)
def test_values_that_are_known(script: str, value: str, tmp_path: Path) -> None:
    run = read(f"{script}\n{LAST}", tmp_path)
    assert run.environ.get("A") == value
    assert run.notes == []
    assert [name for _, name, *_ in run.unexported if name == "A"] == []
    assert not run.may_set("A")


@pytest.mark.parametrize(
    "script",
    [
        "export A=$(date)",
        "if pick; then export A=x; fi",
        "A=x; if pick; then export A; fi",
        "grep -q y limit && export A=x",
        "case $1 in x) export A=x ;; esac",
        "for v in $(pick); do export A=$v; done",
        "for v in $(pick); do export $v; done; A=x",
        "for v in ./*; do export A=$v; done",
        "for v in [ab]; do export A=$v; done",
        "f() { export A=x; }\nif pick; then f; fi",
        "f() { g; }\ng() { f; export A=x; }\nif pick; then f; fi",
        "while pick; do export A=x; done",
        "A=x\npick && A=$(other) && export A",
        ". ./nothing",
        ". ./broken",
        "A=x\n. ./nothing",
        'eval "$(pick)"',
        'read A < "$1"; export A',
        "[ $1 ] && export A=x",
        "A=$(pick) exec tcpserver 0 25 qmail-smtpd",
        "export A=x\nA=$(pick) exec tcpserver 0 25 qmail-smtpd",
        "export $(pick)",
        "export A=${PWD:-x}",
        "export A=${HOME:-x}",
        "[[ mail == ma* ]] && export A=x",
        "[[ b < a ]] && export A=x",
        "cd $(pick)\n[ -f limit ] && export A=x",
        "cd $(pick)\nexport A=$(cat max || echo 20)",
        "if pick; then cd /; fi\n[ -f limit ] && export A=x",
        "cd -\n[ -f limit ] && export A=x",
        "true | pick && export A=x",
        "if true | false; then export A=x; fi",
        "[ -f lim* ] && export A=x",
        "export A=$(cat lim*)",
        "export A=$(cat long)",
        "export A=$(cat /proc/version)",
        "if pick; then set -a; fi; A=x",
        "id no-such-user && export A=x",
        'exec env - A="$(pick)" PATH=$PATH tcpserver 0 25 qmail-smtpd',
        'export A=x\nexec env A="$(pick)" tcpserver 0 25 qmail-smtpd',
        'A=$(pick)\nexec env A="$A" tcpserver 0 25 qmail-smtpd',
        "f() { [ $1 ] && return; export A=x; }\nf",
        "for v in 1 2; do if pick; then break; fi; export A=$v; done",
        "A=1; A+=2; export A",
    ],
)
def test_values_that_are_not_known(script: str, tmp_path: Path) -> None:
    """It is neither claimed that it is set, nor that it is not, nor that it is not exported."""
    run = read(f"{script}\n{LAST}", tmp_path)
    assert "A" not in run.environ
    assert run.may_set("A")
    assert [name for _, name, *_ in run.unexported if name == "A"] == []
    assert run.notes


@pytest.mark.parametrize(
    "script",
    [
        ". ./nothing\nunset A",
        "if pick; then export A=x; fi\nunset A",
        "( export A=x )",
        "{ export A=x; } | cat",
        "if [ -d env ]; then export A=x; fi | cat",
        "f() { export A=x; }\nf | cat",
        "f() { export A=x; }\nf &",
        "sh -c 'export A=x'",
        "if true; then ( export A=x ); fi",
        "{ ( export A=x ); }",
        "! ( export A=x )",
        "( case x in x) true;; esac; export A=x )",
        "export A=x | cat",
        "export A=x &",
        "export A=x; export -n A",
        "[ -f none ] && export A=x",
        "f() { export A=x; }",
    ],
)
def test_what_is_surely_unset(script: str, tmp_path: Path) -> None:
    run = read(f"{script}\n{LAST}", tmp_path)
    assert "A" not in run.environ
    assert not run.may_set("A")


def test_what_is_local_is_not_known_behind_its_function(tmp_path: Path) -> None:
    assert read(f"f() {{ local A=x; }}\nf\nexport A\n{LAST}", tmp_path).may_set("A")


def test_bash_s_quotation_marks_end_where_they_do(tmp_path: Path) -> None:
    run = read(f"IFS=$'\\n\\''; export A=x\n{LAST}", tmp_path)
    assert (run.environ["A"], len(run.notes)) == ("x", 1)


def test_what_a_shell_of_its_own_changes_is_gone_with_it(tmp_path: Path) -> None:
    for script in ("(cd /; ulimit -v 9)", "sh -c 'cd /; ulimit -v 9'", "{ cd /; } | cat"):
        chain = read(f"{script}\n{LAST}", tmp_path).chain
        assert (chain.directory, chain.limits) == (str(tmp_path), {})


def test_a_shell_has_what_is_exported_to_it(tmp_path: Path) -> None:
    script = "export MAX=20; B=1\nexec env MAX=99 sh -c 'exec tcpserver -c $MAX -x \"$B\" 0 25 %s'"
    chain = read(script % "qmail-smtpd", tmp_path).chain
    assert (chain.concurrency, chain.lacks_rules) == (99, True)


@pytest.mark.parametrize("script", ["[ -f limit ] && export A=x", "export A=$(cat limit || pick)"])
def test_a_file_that_may_not_be_looked_at(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, path)

    monkeypatch.setattr(answers.os, "stat", refuse)
    assert read(f"{script}\n{LAST}", tmp_path).may_set("A")


def test_set_plus_a_ends_set_minus_a(tmp_path: Path) -> None:
    run = read(f"set -a\nB=1\nset +a\nA=x\nset -o allexport\nC=2\n{LAST}", tmp_path)
    assert {name: run.environ.get(name) for name in "ABC"} == {"A": None, "B": "1", "C": "2"}
    assert run.unexported == [("line 5", "A", "x", False)]


def test_what_env_takes_away(tmp_path: Path) -> None:
    run = read(f"export A=x B=y\n. ./nothing\nexec env - B=z {LAST[5:]}", tmp_path)
    assert (run.environ, run.dropped, run.may_set("C")) == ({"B": "z"}, ["PATH", "A"], False)


def test_where_another_file_sets_something(tmp_path: Path) -> None:
    run = read(f". ./settings\n{LAST}", tmp_path)
    assert ("./settings, line 1", "B", "from a file", False) in run.unexported


# Programs


@pytest.mark.parametrize(
    "chain",
    [
        "softlimit -m 9 tcpserver",
        "s6-softlimit -m 9 tcpserver",
        "chpst -m 9 tcpserver",
        "nice -5 softlimit -a 9 tcpserver",
        "envdir -c env softlimit -m 9 tcpserver",
        "argv0 softlimit other -m 9 tcpserver",
        "softlimit $NOTHING -m 9 tcpserver",
    ],
)
def test_limits(chain: str, tmp_path: Path) -> None:
    assert read(f"exec {chain} 0 25 qmail-smtpd", tmp_path).chain.limits["as"] == 9


@pytest.mark.parametrize(
    "script",
    [
        "exec softlimit -m $(pick) tcpserver 0 25 qmail-smtpd",
        "exec softlimit $OPTS tcpserver 0 25 qmail-smtpd",
        "exec prlimit --as=9 tcpserver 0 25 qmail-smtpd",
        f"ulimit -v $((3 * 4))\n{LAST}",
        f"ulimit -v 9\nif pick; then ulimit -Sv 7; fi\n{LAST}",
    ],
)
def test_limits_that_are_not_known(script: str, tmp_path: Path) -> None:
    assert read(script, tmp_path).chain.limits["as"] is None


@pytest.mark.parametrize("options", ["-v 9", "-Sv 9", "-S -v 9", "-v -S 9"])
def test_ulimit(options: str, tmp_path: Path) -> None:
    assert read(f"ulimit {options}\n{LAST}", tmp_path).chain.limits == {"as": 9 * 1024}


@pytest.mark.parametrize("options", ["-v", "-v unlimited", "-n 9"])
def test_ulimit_that_limits_no_memory(options: str, tmp_path: Path) -> None:
    assert "as" not in read(f"ulimit {options}\n{LAST}", tmp_path).chain.limits


@pytest.mark.parametrize("chain", ["softlimit -m 64M", "chpst -m 64M", "softlimit -o many"])
def test_limits_that_are_no_numbers(chain: str, tmp_path: Path) -> None:
    ((what, _),) = read(f"exec {chain} {LAST[5:]}", tmp_path).chain.troubles
    assert what.endswith("is no number, so the service does not start")


@pytest.mark.parametrize(
    "chain",
    [
        "chpst -u root:daemon tcpserver",
        "gosu root:daemon tcpserver",
        "chpst -u :0:1 tcpserver",
        "gosu 0:1 tcpserver",
        "s6-setuidgid 0:1 tcpserver",
        "setuidgid -s root tcpserver -g 1",
        "s6-setuidgid root tcpserver -g 1",
        "chpst -U root:x tcpserver -U -g 1",
        "tcpserver -4 -u 0 -g 1",
        "sslserver -4 -6 -u 0 -g 1",
        "tcpserver $OPTS -u 0 -g 1",
        "tcpserver -v ${OPTS} -u 0 -g 1",
    ],
)
def test_users(chain: str, tmp_path: Path) -> None:
    chain_read = read(f"exec {chain} 0 25 qmail-smtpd", tmp_path).chain
    assert (chain_read.uid, chain_read.gid, chain_read.port) == (0, 1, 25)
    assert chain_read.troubles == []


@pytest.mark.parametrize(
    ("words", "host", "port"),
    [
        ("$OPTS 0 25", "0", 25),
        ("$OPTS -x a 0 25", "0", 25),
        ("-v $OPTS 0 smtp", "0", 25),
        ("$IP 25", "$IP", 25),
        ('"$IP" 25', '"$IP"', 25),
        ("${OPTS} ${IP} 25", "${IP}", 25),
        ('"$@" 0 25', "0", 25),
    ],
)
def test_words_that_may_be_options(words: str, host: str, port: int, tmp_path: Path) -> None:
    """Or none; and what may be any number of words is not taken for what stands behind it."""
    chain = read(f"exec tcpserver {words} /opt/qmail-smtpd check true", tmp_path).chain
    assert (chain.host, chain.port, chain.troubles) == (host, port, [])
    assert (chain.program, chain.arguments) == ("/opt/qmail-smtpd", ["check", "true"])


def test_options_of_a_file_and_of_the_arguments(tmp_path: Path) -> None:
    run = read(". ./settings\nset -- $OPTS -c 9\nexec tcpserver \"$@\" 0 25 qmail-smtpd", tmp_path)
    assert (run.chain.rules, run.chain.concurrency) == (f"{tmp_path}/rules.cdb", 9)
    assert run.notes == []


@pytest.mark.parametrize("word", ["$(pick)", '"$HOME_OF"/rules.cdb', "limit"])
def test_what_is_not_known_of_a_server(word: str, tmp_path: Path) -> None:
    """-c with a file's name is one that patched servers read."""
    chain = read(f"exec tcpserver -c {word} -x {word} 0 25 qmail-smtpd", tmp_path).chain
    assert chain.concurrency is None
    assert chain.lacks_rules is (word != "limit")


@pytest.mark.parametrize("script", ["cd $(pick)", "if pick; then cd /; fi", "cd"])
def test_directories_that_are_not_known(script: str, tmp_path: Path) -> None:
    run = read(f"{script}\nexec envdir env tcpserver -x a.cdb 0 25 ./qmail-smtpd", tmp_path)
    assert run.chain.troubles == []
    assert (run.chain.rules, run.chain.lacks_rules, run.may_set("A")) == (None, True, True)


@pytest.mark.parametrize("chain", ["envuidgid $WHO tcpserver -U", "setuidgid $WHO tcpserver"])
def test_users_that_are_not_known(chain: str, tmp_path: Path) -> None:
    run = read(f"exec {chain} 0 25 qmail-smtpd", tmp_path)
    assert (run.chain.uid, run.chain.troubles, run.chain.has_gap) == (None, [], True)
    assert [name for _, word in run.chain.odd_ids for name in run.never_set(word)] == []


# Where it ends


@pytest.mark.parametrize(
    ("script", "line"),
    [("exit 0", 2), ("[ -f none ] || exit 1", 2), ("f() {\n  exit 1\n}\nf", 3)],
)
def test_scripts_that_end_before(script: str, line: int, tmp_path: Path) -> None:
    run = read(f"{script}\n{LAST}", tmp_path)
    assert run.chain.program is None
    assert [note.partition(":")[0] for note in run.notes] == [f"line {line}"]
    assert run.notes[0].endswith("ends the script")


@pytest.mark.parametrize(
    ("script", "needs_no_exec", "ends_at_once"),
    [
        (LAST, True, False),
        (LAST[5:], False, False),
        (f"{LAST[5:]} &", True, True),
        (f"{LAST[5:]} &\nwait", True, False),
        (f"( {LAST} )", False, False),
        (f"{{ {LAST}; }}", True, False),
        (f"if [ -d env ]; then\n  {LAST}\nelse\n  exec other\nfi", True, False),
    ],
)
def test_the_last_command(
    script: str, needs_no_exec: bool, ends_at_once: bool, tmp_path: Path
) -> None:
    run = read(script, tmp_path)
    assert run.chain.program == "qmail-smtpd"
    assert (run.needs_no_exec, run.ends_at_once) == (needs_no_exec, ends_at_once)


def test_another_program_is_noted(tmp_path: Path) -> None:
    run = read(f"{LAST[5:]} &\nexport RELAYCLIENT=\n{LAST}", tmp_path)
    assert run.notes == ["line 4: another qmail-smtpd, which is not looked at"]


@pytest.mark.parametrize(
    "script",
    [
        "export A=x; B=" + 300 * "${C:-" + 300 * "}",
        "[ " + 3000 * "! " + "]",
        "[ x" + 3000 * " -a x" + " ]",
        3000 * "! " + "true",
        "B=aaaaaaaa\n" + 40 * "B=$B$B\n",
        "set -- a a\n" + 30 * 'set -- "$@" "$@"\n',
        3000 * "if pick; then other; fi\n",
    ],
)
def test_what_grows_beyond_all_bounds(script: str, tmp_path: Path) -> None:
    run = read(f"{script}\n{LAST}", tmp_path)
    assert len(run.notes) <= 32


def test_a_lower_limit_stays(tmp_path: Path) -> None:
    chain = read("ulimit -v 9\nexec softlimit -m 99999 tcpserver 0 25 qmail-smtpd", tmp_path).chain
    assert chain.limits["as"] == 9 * 1024


def test_calls_without_an_end(tmp_path: Path) -> None:
    for script in ("f() { f; }\nf", ". ./self", "eval \"$A\"", "while :; do :; done"):
        (tmp_path / "self").write_text(". ./self\n")
        assert read(f"A='eval \"$A\"'\n{script}\n{LAST}", tmp_path).chain.program
