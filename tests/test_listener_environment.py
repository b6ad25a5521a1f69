"""tcpserver's options and rules, each compared with the real tcpserver.

Both are started with the same options, rules and environment, and a client connects to each from
the same address. What tcpserver's program and our qmail-queue then find in their environments must
be the same, and so must the lines of the log, but for process ids, ports, and why a connection was
dropped.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import pytest
from conformance.client import Client
from conformance.stage import Stage
from conformance.transport import SocketConnection
from e2e.log import Log
from e2e.programs import need
from listener.listening import USUAL, Listening
from listener.peers import Tcpserver, compile_rules
from listener.world import Ident, Names, address, need_private_etc

from qmail_smtpd_py import tcpenviron

OF_THE_PROCESS = {"PATH", "QMAILHOME", "QMAILQUEUE", "DNSCACHEIP"}
"""Variables that are no matter of the connection."""


class Outcome(NamedTuple):
    """What came of a connection: the variables that the program had, or None where none was
    started, and the lines of the log.
    """

    variables: Optional[dict[str, str]]  # noqa: UP045 - a NamedTuple's are evaluated on 3.9
    lines: list[str]

    @classmethod
    def of(
        cls, variables: dict[str, str] | None, log: Log, number: int, ports: tuple[int, int]
    ) -> Outcome:
        """The outcome of the connection of that number, between ports of the client and of ours."""
        if variables is not None:
            found = variables["TCPREMOTEPORT"], variables["TCPLOCALPORT"]
            assert found == tuple(map(str, ports))
            variables = {
                name: variables[name]
                for name in variables.keys() - OF_THE_PROCESS - {"TCPREMOTEPORT", "TCPLOCALPORT"}
            }
        return cls(variables, plain(log, number, ports))


def plain(log: Log, number: int, ports: tuple[int, int]) -> list[str]:
    """The lines about that connection, from 1 on, without what differs by nature.

    `status: 0/40` stands at the start of the log and at the end of each connection.
    """
    log.wait_for(r": status: 0/", number + 1)
    connections: list[list[str]] = [[]]
    for line in log.lines():
        name, _, text = line.partition(": ")
        if name not in ("tcpserver", "qmail-smtpd-listen"):
            continue
        text = re.sub(r"^(pid|ok|deny|end) \d+", r"\1 PID", text)
        text = re.sub(r"^(warning: dropping connection, |drop \d+ from [0-9.]+: ).*", "drop", text)
        # They may be the same number, as the addresses differ.
        text = re.sub(rf":{ports[1]} (.*):{ports[0]}$", r":OURS \1:THEIRS", text)
        connections[-1].append(text)
        if text.startswith("status: 0/"):
            connections.append([])
    return connections[number]


class Alike:
    """A tcpserver and a listener that are started alike; `before` starts the listener."""

    def __init__(
        self,
        stage: Stage,
        options: tuple[str, ...] = (),
        before: tuple[str, ...] = (),
        usual: tuple[str, ...] = USUAL,
    ) -> None:
        self._stage = stage
        self._connections = 0
        (env,) = need("env")
        self._exit = ExitStack()
        with ExitStack() as stack:
            self.theirs = stack.enter_context(
                Tcpserver(stage.env, [env, "-0"], *options, usual=usual)
            )
            listening = Listening(stage, *options, before=before, usual=usual)
            self.ours = stack.enter_context(listening)
            self._exit = stack.pop_all()

    def __enter__(self) -> Alike:
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.__exit__(*error)  # type: ignore[arg-type]

    def connect(self, source: str) -> Outcome:
        """What comes of a connection from that address, seen to be the same with both."""
        self._connections += 1
        theirs, ours = self._of_theirs(source), self._of_ours(source)
        assert ours == theirs
        return ours

    def _of_theirs(self, source: str) -> Outcome:
        with self.theirs.socket(source) as connection:
            ports = connection.getsockname()[1], self.theirs.port
            with connection.makefile("rb") as stream:
                text = stream.read()
        variables = parsed(text) if text else None
        return Outcome.of(variables, self.theirs.log, self._connections, ports)

    def _of_ours(self, source: str) -> Outcome:
        connection = self.ours.socket(source)
        ports = connection.getsockname()[1], self.ours.port
        client = Client(SocketConnection(connection))
        variables = None
        if client.reply():
            for line in (b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.org>", b"DATA"):
                client.command(line)
            assert (client.command(b".") or "").startswith("250 ")
            assert client.command(b"QUIT") == "221 mx.example.org"
            variables = parsed((self._stage.tools / "environment").read_bytes())
        assert client.read_to_end() == b""
        client.connection.close()
        return Outcome.of(variables, self.ours.log, self._connections, ports)


def parsed(text: bytes) -> dict[str, str]:
    """The variables of an environment as /proc has it."""
    return dict(line.split("=", 1) for line in text.decode("latin-1").split("\0")[:-1])


@pytest.fixture
def mx(stage: Stage) -> Stage:
    """A host that takes mail for everybody, with variables that no connection must see."""
    stage.control({"me": "mx.example.org\n"})
    queue = stage.tools / "noting-queue"
    noted = stage.tools / "environment"
    queue.write_text(f"#!/bin/sh\nexec 3<&1 >{noted}\ncat /proc/$$/environ\ncat >&2\ncat <&3 >&2\n")
    queue.chmod(0o755)
    stage.environment({"QMAILQUEUE": str(queue)})
    stale = ("PROTO", "TCPREMOTEIP", "TCPREMOTEHOST", "TCPREMOTEINFO", "TCPLOCALHOST")
    stage.environment(dict.fromkeys(stale, "stale") | {"KEPT": "as it is, \xe9 = too"})
    return stage


# Options


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-l", "0"),
        ("-l", ""),
        *[(f"-{letter}",) for letter in "dDoOqQvPp"],
        ("-b", "5"),
        ("-c", "7"),
        ("-t", "3"),
        ("-HRD", "-c7"),
    ],
    ids=" ".join,
)
def test_option(mx: Stage, options: tuple[str, ...]) -> None:
    with Alike(mx, (*options, "-v")) as alike:
        assert alike.connect("127.0.0.1").variables


@pytest.mark.parametrize("banner", ["hello there\r\n", "220-mx.example.org takes its time\r\n"])
def test_banner(mx: Stage, banner: str) -> None:
    with Alike(mx, ("-B", banner)) as alike:
        received = []
        for server in (alike.theirs, alike.ours):
            with server.socket() as connection, connection.makefile("rb") as stream:
                received.append(stream.read(len(banner)).decode())
        assert received == [banner, banner]


@pytest.mark.parametrize("letter, drops", [("q", 0), ("Q", 1), ("v", 1)])
def test_how_much_is_told(mx: Stage, tmp_path: Path, letter: str, drops: int) -> None:
    """Of a connection that is dropped, as the rules cannot be read."""
    options = ("-x", str(tmp_path / "missing.cdb"))
    texts = []
    with Alike(mx, options, usual=("-1", "-R", "-H", f"-{letter}")) as alike:
        for server in (alike.theirs, alike.ours):
            with server.socket() as connection:
                assert connection.recv(100) == b""
        logs = [alike.theirs.log, alike.ours.log]
    for log in logs:
        texts.append(log.text())
        assert len(re.findall(r": (?:warning: dropping|drop) ", log.text())) == drops
        assert ("status: 1/40" in log.text()) == (letter == "v")
    assert bool(texts[0]) == bool(texts[1])  # -q is silent


# Who the client is


def test_names(mx: Stage, tmp_path: Path) -> None:
    need_private_etc()
    honest, mixed, liar, nameless = (address() for _ in range(4))
    names = {honest: "mail.example.net", mixed: "Mail.EXAMPLE.com", liar: "mail.example.net"}
    known = {"mail.example.net": honest, "mail.example.com": mixed}
    mx.environment({"TCPREMOTEHOST": "stale"})
    with Names({**names, "127.0.0.1": "mx.example.org"}, known) as server:
        mx.environment({"DNSCACHEIP": server.ip})
        before = server.heard_by(tmp_path)
        with Alike(mx, ("-h",), before, usual=("-v", "-1", "-R")) as alike:
            found = [alike.connect(ip).variables for ip in (honest, mixed, liar, nameless)]
            assert [variables.get("TCPREMOTEHOST") for variables in found if variables] == [
                "mail.example.net",
                "mail.example.com",
                "mail.example.net",
                None,
            ]
            assert {(variables or {}).get("TCPLOCALHOST") for variables in found} == {
                "mx.example.org"
            }
        with Alike(mx, ("-h", "-p"), before) as alike:
            found = [alike.connect(ip).variables for ip in (honest, mixed, liar, nameless)]
            assert [variables.get("TCPREMOTEHOST") for variables in found if variables] == [
                "mail.example.net",
                "mail.example.com",
                None,
                None,
            ]


@pytest.mark.parametrize(
    "line",
    [
        "{ports} : USERID : UNIX : joe\r\n",
        "{ports}:USERID:OTHER, US-ASCII:joe\n",
        "{ports} : USERID : UNIX :joe:x\r\n",
        "{ports} : USERID : UNIX : joe x\r\n",
        "{ports} : USERID : UNIX : " + 400 * "j" + "\r\n",
        "{ports} : USERID : UNIX : \r\n",
        "{ports} : ERROR : NO-USER\r\n",
        "{ports} : USERID : UNIX : joe\0x\r\n",
        "{ports} : USERID : UNIX : joe",
        "\r\n",
        "",
        None,
    ],
)
def test_ident(mx: Stage, line: str | None) -> None:
    ip = address()
    with Ident(ip, line) as server, Alike(mx, ("-r", "-t", "1")) as alike:
        alike.connect(ip)
        _, ours = server.asked
        assert ours.count(",") == 1


def test_no_ident(mx: Stage) -> None:
    with Alike(mx, ("-r",)) as alike:
        variables = alike.connect(address()).variables
    assert variables and "TCPREMOTEINFO" not in variables


# Rules


RULES = """\
joe@{user}:deny
ann@{user}:allow,WHO="ann"
{user}:allow,WHO="anybody else"
{denied}:deny
{relay}:allow,RELAYCLIENT="",DATABYTES="1000",TCPREMOTEHOST="set by rule"
127.:allow,WHO="prefix",EMPTY="",TCPREMOTEINFO="x=y z"
:deny
"""

NAME_RULES = """\
=mail.example.net:allow,WHO="by name",RELAYCLIENT=""
=.example.net:deny
=.org:allow,WHO="by the end of its name"
=:allow,WHO="has a name"
{known}:allow,WHO="by address, which comes first"
127.0.0.:allow
:allow,WHO="has none"
"""


@pytest.fixture
def rules(tmp_path: Path) -> Callable[..., Path]:
    """Compile RULES with these addresses."""

    def compiled(**addresses: str) -> Path:
        usual = {name: address() for name in ("user", "denied", "relay")}
        return compile_rules(tmp_path / "rules.cdb", RULES.format(**{**usual, **addresses}))

    return compiled


def test_rules_by_address(mx: Stage, rules: Callable[..., Path]) -> None:
    denied, relay, other = (address() for _ in range(3))
    path = rules(denied=denied, relay=relay)
    with Alike(mx, ("-x", str(path))) as alike:
        assert alike.connect(denied).variables is None
        assert (alike.connect(relay).variables or {})["TCPREMOTEHOST"] == "set by rule"
        assert (alike.connect(other).variables or {})["WHO"] == "prefix"
        compile_rules(path, f'{other}:deny\n:allow,WHO="new"\n')
        assert (alike.connect(denied).variables or {})["WHO"] == "new"
        assert alike.connect(other).variables is None


def test_rules_by_ident(mx: Stage, rules: Callable[..., Path]) -> None:
    user = address()
    path = rules(user=user)
    for name, who in (("joe", None), ("ann", "ann"), ("eve", "anybody else")):
        answer = f"{{ports}} : USERID : UNIX : {name}\r\n"
        with Ident(user, answer), Alike(mx, ("-r", "-x", str(path))) as alike:
            assert (alike.connect(user).variables or {}).get("WHO") == who


def test_rules_by_name(mx: Stage, tmp_path: Path) -> None:
    need_private_etc()
    mail, bad, org, com, known, none = (address() for _ in range(6))
    path = compile_rules(tmp_path / "rules.cdb", NAME_RULES.format(known=known))
    names = {mail: "mail.example.net", bad: "OTHER.Example.Net", org: "a.b.example.org"}
    names |= {com: "example.com", known: "known.example.net"}
    with Names(names, {}) as server:
        mx.environment({"DNSCACHEIP": server.ip})
        with Alike(mx, ("-h", "-x", str(path)), server.heard_by(tmp_path)) as alike:
            found = [alike.connect(ip).variables for ip in (mail, bad, org, com, known, none)]
    assert [variables and variables["WHO"] for variables in found] == [
        "by name",
        None,
        "by the end of its name",
        "has a name",
        "by address, which comes first",
        "has none",
    ]


@pytest.mark.parametrize("what", ["missing", "damaged"])
@pytest.mark.parametrize("optional", [(), ("-X",)], ids=["", "-X"])
def test_rules_that_can_not_be_read(
    mx: Stage, tmp_path: Path, what: str, optional: tuple[str, ...]
) -> None:
    path = tmp_path / "rules.cdb"
    if what == "damaged":
        path.write_bytes(compile_rules(path, ":allow\n").read_bytes()[:-1])
    with Alike(mx, (*optional, "-x", str(path))) as alike:
        outcome = alike.connect("127.0.0.1")
    assert bool(outcome.variables) == (what == "missing" and bool(optional))


def test_rules_that_are_none(mx: Stage, tmp_path: Path) -> None:
    """Of an empty file or a directory tcpserver dies; nobody is let in here either."""
    for path in (tmp_path / "empty", tmp_path / "directory"):
        path.touch() if path.name == "empty" else path.mkdir()
        with Listening(mx, "-x", str(path)) as listener:
            assert listener.connect().read_to_end() == b""
            assert [status for _, status in listener.ends()] == [111]


def test_rules_are_found_from_where_the_listener_is_started(mx: Stage, tmp_path: Path) -> None:
    """Not from the qmail home, where it is then."""
    compile_rules(tmp_path / "rules.cdb", ':allow,WHO="found"\n')
    with Listening(mx, "-x", "rules.cdb", cwd=tmp_path) as listener:
        assert listener.greeted().command(b"QUIT") == "221 mx.example.org"


def test_our_own_name_is_looked_up_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS may be out of order for a moment, such as at the start of the host."""
    answers = [None, b"mx.example.org"]
    monkeypatch.setattr(tcpenviron, "_name_of", lambda ip: answers.pop(0))
    look_ups = tcpenviron.LookUps()
    assert [look_ups.local_name("192.0.2.1") for _ in range(3)] == [None, *[b"mx.example.org"] * 2]
