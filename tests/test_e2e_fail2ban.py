"""The filter and the jail for fail2ban, by fail2ban itself, on what the program logs of sessions.

Each session has an address of its own: 192.0.2.x did something, 198.51.100.x did not, and
203.0.113.9 is never there but in what clients say.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Callable

import pytest
from conformance.program import ROOT, Program
from conformance.stage import Stage
from conformance.world import base64
from e2e.programs import need
from listener.listening import eventually

FILTER = ROOT / "fail2ban" / "filter.d" / "qmail-smtpd.conf"
JAIL = ROOT / "fail2ban" / "jail.d" / "qmail-smtpd.conf"

VICTIM = b"203.0.113.9"
LINE = (
    b"qmail-smtpd[1]: auth ip=%s result=failed mechanism=PLAIN tls=yes code=535"
    b' why="authentication failed (#5.7.1)" user=joe' % VICTIM
)
STAMP = b"@4000000067af000000000000 "
FORGED = [
    *(LINE, STAMP + LINE, b"\n" + STAMP + LINE + b"\n", b"\r" + LINE, LINE.replace(b'"', b"'")),
    *(b'x" ip=%s code=535' % VICTIM, b"x ip=%s" % VICTIM, b'\\x22 ip=%s "' % VICTIM),
    "\u2028".encode() + LINE,
    b"Nov 25 03:15:45 mx qmail-smtpd: " + LINE,
    b"2026-11-25T03:15:45+00:00 mx x[1]: " + LINE,
]


def plain(user: bytes, password: bytes = b"wrong") -> bytes:
    return b"AUTH PLAIN " + base64(b"\0" + user + b"\0" + password) + b"\r\n"


MAIL = b"MAIL FROM:<a@client.example.com>\r\n"
ELSEWHERE = b"RCPT TO:<u@elsewhere.example>\r\n"
HERE = b"RCPT TO:<u@example.org>\r\n"
LETTER = b"DATA\r\nSubject: x\r\n\r\ntext\r\n.\r\n"

GUILTY: list[tuple[bytes, dict[str, str]]] = [
    (plain(b"joe"), {}),
    *((plain(user), {}) for user in FORGED),
    (plain(b"joe"), {"MAXAUTHFAILURES": "1"}),
    (plain(b"joe"), {"FORCETLS": "1"}),
    (b"AUTH LOGIN\r\n", {"FORCETLS": "1"}),
    (b"XYZZY\r\n" * 20, {}),
    (MAIL + ELSEWHERE, {"BRTLIMIT": "1"}),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", {}),
    (b"SSH-2.0-x\r\n", {}),
    (b"\x03\0\0\x13\x0e", {}),
    (b"EHLO x\r\n", {"SMTPD_GREETDELAY": "20", "DROP_PRE_GREET": "1"}),
]

TRYING: list[tuple[bytes, dict[str, str]]] = [
    (MAIL + ELSEWHERE, {}),
    (b"\x16\x03\x01\x02\x00\x01", {}),
]
"""Those who are banned by mode=aggressive only."""

INNOCENT: list[tuple[bytes, dict[str, str]]] = [
    (b"EHLO x\r\n" + MAIL + HERE + LETTER + b"QUIT\r\n", {}),
    (plain(b"joe", b"secret") + MAIL + ELSEWHERE + LETTER, {"CHECK": "0"}),
    (plain(b"joe code=535", b"secret"), {"CHECK": "0"}),
    (plain(b"joe"), {"CHECK": "111"}),
    (b"AUTH PLAIN =\r\nNOOP\r\nTURN\r\n" + HERE + b"EHLO", {}),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 25\r\n", {}),
    (b"EHLO x\r\nQUIT\r\n", {"SMTPD_GREETDELAY": "1"}),
    *((b"HELO %s\r\n%sQUIT\r\n" % (text, MAIL), {"SMTPTRACE": "=log"}) for text in FORGED),
    *((b'MAIL FROM:<"%s"@example.com>\r\n' % text + HERE + LETTER, {}) for text in FORGED[:5]),
    *((b"MAIL FROM:<%s>\r\n\r\n" % text, {}) for text in FORGED),
    (b"HELO x\r\n", {"TCPREMOTEHOST": LINE.decode(), "TCPREMOTEINFO": LINE.decode()}),
]


class Sessions:
    """Sessions with the program; `log` is what it wrote, `banned` who is to be banned for it."""

    def __init__(self) -> None:
        self.log = b""
        self.normal: set[str] = set()
        self.aggressive: set[str] = set()


@pytest.fixture(scope="module")
def sessions(recorder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """All sessions at once, as each wrong password takes 5 seconds."""
    found = Sessions()
    numbers = count(1)

    def start(dialogue: bytes, variables: dict[str, str], network: str) -> tuple[Program, bytes]:
        number = next(numbers)
        ip = f"{network}.{number}"
        directory = tmp_path_factory.mktemp(f"session{number}")
        variables = dict(variables)
        stage = host(Stage(directory, recorder), int(variables.pop("CHECK", "1")))
        stage.environment({"TCPREMOTEIP": ip, **variables})
        if network == "192.0.2":
            found.aggressive.add(ip)
            if (dialogue, variables) not in TRYING:
                found.normal.add(ip)
        return Program(stage), dialogue

    with ExitStack() as stack:
        running = [
            *(start(*session, "192.0.2") for session in GUILTY + TRYING),
            *(start(*session, "198.51.100") for session in INNOCENT),
        ]
        for program, dialogue in running:
            stack.enter_context(program)
            program.client.push(dialogue)
            program.client.connection.end_writing()
        for program, _ in running:
            program.client.read_to_end()
            program.wait()
            found.log += program.log
    return found


def host(stage: Stage, check: int) -> Stage:
    stage.control({"me": "mx.example.org\n", "rcpthosts": "example.org\n"})
    stage.environment({"SMTPAUTH": "+cram", "FORCETLS": "0"})
    stage.arguments("@checkpassword", "@true")
    stage.plan("checkpassword", {"exit": check})
    return stage


def by_multilog(log: bytes, directory: Path) -> Path:
    """The log as multilog keeps it."""
    (multilog,) = need("multilog")
    subprocess.run([multilog, "t", "s1000000", str(directory / "main")], input=log, check=True)
    return directory / "main" / "current"


def behind(prefix: bytes) -> Callable[[bytes, Path], Path]:
    """The log as something else keeps it, with a prefix for each line."""

    def write(log: bytes, directory: Path) -> Path:
        path = directory / "log"
        path.write_bytes(b"".join(prefix + line + b"\n" for line in log.splitlines()))
        return path

    return write


KEEPERS = {
    "multilog": by_multilog,
    "syslog": behind(b"Nov 25 03:15:45 mx qmail-smtpd: "),
    "syslog with a day of one digit": behind(b"Nov  5 03:15:45 mx smtp/qmail[12]: "),
    "rsyslog": behind(b"2026-11-25T03:15:45.123456+00:00 mx qmail-smtpd[4711]: "),
    "the journal": behind(b"Nov 25 03:15:45 mx smtpd[4711]: "),
    "a file": behind(b"2026-11-25 03:15:45 "),
}


def matched(path: Path, mode: str) -> Iterator[str]:
    """The addresses that fail2ban finds in a log, one for each line that it acts on."""
    (program,) = need("fail2ban-regex")
    command = [program, "--out=<ip>", str(path), f"{FILTER}[mode={mode}]"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    yield from done.stdout.split()


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("mode", ["normal", "aggressive"])
def test_who_is_banned(sessions: Sessions, tmp_path: Path, keeper: str, mode: str) -> None:
    path = KEEPERS[keeper](sessions.log, tmp_path)
    assert VICTIM in path.read_bytes()
    assert set(matched(path, mode)) == getattr(sessions, mode)


def test_each_kind_of_line_is_there(sessions: Sessions) -> None:
    """Or the sessions would prove little."""
    for text in [
        *(b"code=535", b"code=538", b"code=454", b"code=553", b"auth ip=", b"result=ok"),
        *(b"too many bad commands", b"too many invalid addresses", b"too many failed auth"),
        *(b"not SMTP: HTTP", b"not SMTP: TLS", b"not SMTP: PROXY", b"code=554", b"result=accepted"),
        *(b"limit ip=198.51.100", b"trace ip=198.51.100"),
    ]:
        assert text in sessions.log, text


def test_an_address_that_failed_too_often(tmp_path: Path) -> None:
    """It is told 454, and a ban would be as right as for 535; trouble is 454 too, and is not."""
    log = tmp_path / "log"
    line = b"%sqmail-smtpd[1]: auth ip=%s result=failed mechanism=PLAIN tls=yes code=454 why=%s\n"
    often, trouble = (
        b'"too many failed auth attempts, try again later (#4.7.0)" user=joe',
        b'"oops, problem with child and I can\'t auth (#4.3.0)" user=joe',
    )
    log.write_bytes(line % (STAMP, b"2001:db8::7", often) + line % (STAMP, VICTIM, trouble))
    assert list(matched(log, "normal")) == ["2001:db8::7"]


@pytest.mark.parametrize("ip", ["unknown", "mx.example.org", '"203.0.113.9 x"', "203.0.113.9.x"])
def test_what_is_no_address_is_nobodys(tmp_path: Path, ip: str) -> None:
    log = tmp_path / "log"
    log.write_bytes(STAMP + LINE.replace(VICTIM, ip.encode()) + b"\n")
    assert list(matched(log, "aggressive")) == []


def test_what_the_units_are_called_in_the_journal() -> None:
    found = re.findall(r"^journalmatch = SYSLOG_IDENTIFIER=(\S+)$", FILTER.read_text(), flags=re.M)
    units = [path.read_text() for path in ROOT.glob("systemd/qmail-*@.service")]
    names = {name for unit in units for name in re.findall(r"^SyslogIdentifier=(\S+)$", unit, re.M)}
    assert set(found) == names
    assert units


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A running fail2ban with the jail: the directory of the log, and a file that bans go to."""
    server, client = need("fail2ban-server", "fail2ban-client")
    config, log, bans = tmp_path / "fail2ban", tmp_path / "log", tmp_path / "bans"
    log.mkdir()
    (log / "current").touch()
    bans.touch()
    shutil.copytree("/etc/fail2ban", config)
    for path in (config / "jail.d").iterdir():
        path.unlink()
    shutil.copy(FILTER, config / "filter.d")
    text, places = re.subn(r"/var/log/\S+/current$", f"{log}/current", JAIL.read_text(), flags=re.M)
    assert places == 3
    (config / "jail.d" / JAIL.name).write_text(text)
    (config / "jail.local").write_text("[qmail-smtpd]\naction = note\n")
    note = f"[Definition]\nactionban = echo <ip> >> {bans}\nactionunban = true\n"
    (config / "action.d" / "note.conf").write_text(note)
    settings = f"[Definition]\ndbfile = None\nlogtarget = {tmp_path}/fail2ban.log\n"
    (config / "fail2ban.local").write_text(settings)
    where = ["-c", str(config), "-s", str(tmp_path / "socket"), "-p", str(tmp_path / "pid")]
    subprocess.run([client, *where, "-t"], check=True, stdout=subprocess.DEVNULL)
    with subprocess.Popen([server, *where, "-f", "start"], stdout=subprocess.DEVNULL) as running:
        try:
            ping = [client, *where, "-q", "ping"]
            eventually(lambda: subprocess.call(ping, stderr=subprocess.DEVNULL) == 0, "it is there")
            yield log, bans
        finally:
            running.terminate()


def test_a_ban(jail: tuple[Path, Path], sessions: Sessions) -> None:
    """fail2ban itself: five lines are a ban, by the jail's maxretry; four are none."""
    log, bans = jail
    lines = [line for line in sessions.log.splitlines(keepends=True) if b"not SMTP: HTTP" in line]
    (http,) = lines
    found = re.search(rb"ip=(\S+)", http)
    assert found
    others = http.replace(found[1], b"198.51.100.200")
    text = others * 4 + sessions.log.replace(http, b"") + http * 5
    (multilog,) = need("multilog")
    subprocess.run([multilog, "t", "s1000000", str(log)], input=text, check=True)
    eventually(lambda: bans.read_bytes().endswith(b"\n"), "somebody is banned")
    assert bans.read_bytes().split() == [found[1]]
