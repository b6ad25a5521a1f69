"""The listener on a real host: root and the mail user, daemontools, clients of others."""

from __future__ import annotations

import os
import pwd
import re
import signal
import socket
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.program import Program, under_test
from conformance.stage import Stage
from e2e.clients import run, swaks_auth
from e2e.letter import PASSWORD, RECIPIENT, SENDER, USER
from e2e.log import parse
from e2e.maildir import deliveries, delivery
from e2e.programs import as_mail_user, mail_user, need
from e2e.service import ADDRESS, NAME, Home, ShippedService
from e2e.systemd import ListenManager
from listener.daemon import Daemon
from listener.listening import (
    Helping,
    Listening,
    Tcp,
    children,
    eventually,
    oom_score,
    program,
    wait_for_death,
)
from listener.mail import begin_message, end_message, quit_, send_message, start_tls
from listener.peers import Tcpserver, compile_rules
from listener.shipped import PORTS, ShippedHelper, ShippedListener
from listener.world import address, give, need_mail_user, need_root

pytest_plugins = ["e2e.fixtures", "listener.fixtures"]

STRANGER = "someone@elsewhere.example"
AUTH = ["--to", STRANGER, *swaks_auth("PLAIN", USER, PASSWORD)]


# Rights


@pytest.fixture
def user(mx: Stage) -> pwd.struct_passwd:
    """The mail user, who may read the stage."""
    found = need_mail_user()
    give(mx, found)
    return found


@pytest.fixture
def ids(user: pwd.struct_passwd) -> list[str]:
    """The options that give all other rights up."""
    return ["-u", str(user.pw_uid), "-g", str(user.pw_gid)]


def rights(pid: int) -> dict[str, str]:
    """What a process may do, by /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapAmb")
    return {name: " ".join(fields[name].split()) for name in names}


def none_but(user: pwd.struct_passwd) -> dict[str, str]:
    """The rights of a process that has those of the user, and no way back."""
    return {
        "Uid": " ".join([str(user.pw_uid)] * 4),
        "Gid": " ".join([str(user.pw_gid)] * 4),
        "Groups": str(user.pw_gid),
        **dict.fromkeys(("CapEff", "CapPrm", "CapAmb"), "0" * 16),
    }


@pytest.mark.parametrize("how", ["-u -g", "-U", "helper"])
def test_rights_are_given_up_for_good(
    mx: Stage, user: pwd.struct_passwd, ids: list[str], how: str, tmp_path: Path
) -> None:
    mx.environment({"UID": str(user.pw_uid), "GID": str(user.pw_gid)})
    options = ["-U"] if how == "-U" else ids
    if how == "helper":
        running: Listening = Helping(mx, tmp_path / "helper", *options)
    else:
        running = Listening(mx, *options, host=address(), port=25)
    with running as listener:
        eventually(lambda: listener.workers, "there are workers")
        for pid in (listener.pid, *listener.workers):
            assert rights(pid) == none_but(user)
        ours = oom_score(os.getpid())
        theirs = min(ours + 200, 1000)
        eventually(lambda: {*map(oom_score, listener.workers)} == {theirs}, "workers have more")
        assert oom_score(listener.pid) == ours
        for pid in listener.workers:
            assert os.stat(f"/proc/{pid}/mem").st_uid == 0, "nobody may look into it"
        if how != "helper":
            quit_(listener.greeted())
            listener.signal(signal.SIGUSR2)
            listener.log.wait_for(r": status: 0/40$", 3)
            client = listener.greeted()
            send_message(client)
            quit_(client)
            assert rights(listener.pid) == none_but(user)


@pytest.mark.parametrize("name", ["rules", None], ids=["a relative name", "none"])
def test_a_restart_where_the_directory_of_the_start_is_closed(
    mx: Stage, ids: list[str], tmp_path: Path, name: str | None
) -> None:
    """To -u; that does no harm where no file is named that would be looked for there."""
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    rules = compile_rules(mx.home / "rules.cdb", ":allow\n")
    named = os.path.relpath(rules, closed) if name else str(rules)
    with Listening(mx, *ids, "-x", named, cwd=closed) as listener:
        quit_(listener.greeted())
        listener.signal(signal.SIGUSR2)
        if name:
            why = rf"{closed}: Permission denied \(uid \d+\)"
            listener.log.wait_for(rf": warning: cannot restart: {why}$")
        else:
            listener.log.wait_for(r": status: 0/40$", 3)
        quit_(listener.greeted())


def test_children_get_no_variable_of_the_interpreter_s(mx: Stage, ids: list[str]) -> None:
    """In the C locale it adds LC_CTYPE (PEP 538), and -u may not see what there was before."""
    queue = mx.tools / "shell-queue"
    queue.write_text("#!/bin/sh\nenv >&2\ncat <&0 >/dev/null\ncat <&1 >/dev/null\n")
    queue.chmod(0o755)
    mx.environment({"QMAILQUEUE": str(queue)})
    with Listening(mx, *ids) as listener:
        for restarts in range(2):
            client = listener.greeted()
            send_message(client)
            quit_(client)
            listener.log.wait_for("^QMAILQUEUE=", restarts + 1)
            listener.signal(signal.SIGUSR2)
            listener.log.wait_for(": restarting$", restarts + 1)
        assert "LC_CTYPE" not in listener.log.text()


def test_rights_that_can_not_be_taken(mx: Stage, user: pwd.struct_passwd) -> None:
    words = [*program(), "-g", "1", "-u", "1", "127.0.0.1", "0"]
    ended = as_mail_user(words, env={"QMAILHOME": str(mx.home)})
    assert ended.returncode == 111
    assert b"fatal: cannot become gid 1: Operation not permitted\n" in ended.stderr


def test_what_the_mail_user_may_not_read(
    mx: Stage, user: pwd.struct_passwd, ids: list[str]
) -> None:
    """Is not read with the rights that root had: neither at the start nor for a connection."""
    (mx.home / "control" / "rcpthosts").chmod(0o600)
    with Listening(mx, *ids) as listener:
        client = listener.connect()
        assert client.reply() == "421 unable to read controls (#4.3.0)"
        why = rf"cannot read control/rcpthosts: Permission denied \(uid {user.pw_uid}\)"
        listener.log.wait_for(why)
        (mx.home / "control" / "rcpthosts").chmod(0o644)
        quit_(listener.greeted())


def test_a_daemon_of_the_mail_user(mx: Stage, ids: list[str], tmp_path: Path) -> None:
    """Who may remove no file of root's, so that the next one has to."""
    for _ in range(2):
        with Daemon(mx, tmp_path, *ids) as daemon:
            client = daemon.greeted()
            send_message(client)
            quit_(client)
            os.kill(daemon.pid, signal.SIGUSR2)
            daemon.says("restarting")
            quit_(daemon.greeted())
            daemon.stop()
        daemon.log_file.unlink()


def test_helper_and_program_of_the_same_user(
    mx: Stage, user: pwd.struct_passwd, ids: list[str], tmp_path: Path
) -> None:
    path = mx.home / "helper"
    mx.environment({"TLSHELPER": str(path)})
    with Helping(mx, path, *ids) as helper:
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (user.pw_uid, 0o600)
        with Tcpserver(mx.env, [*under_test(), *mx.args], *ids) as server:
            client = Client(Tcp(server.socket()))
            assert client.reply() == "220 mx.example.org ESMTP"
            start_tls(client)
            send_message(client)
            quit_(client)
            assert helper.ends()[0][1] == 0
            assert "no help from" not in server.log.text()


def test_helper_and_program_of_different_users(
    mx: Stage, user: pwd.struct_passwd, ids: list[str]
) -> None:
    path = mx.home / "helper"
    mx.environment({"TLSHELPER": str(path)})
    with Helping(mx, path, *ids) as helper:
        with Program(mx) as ours:
            assert ours.client.reply() == "220 mx.example.org ESMTP"
            start_tls(ours.client)
            quit_(ours.client)
            assert ours.wait() == 0
        why = f"the other end runs as uid {user.pw_uid}, not as uid 0; doing TLS ourselves"
        assert why in ours.log.decode()
        with socket.socket(socket.AF_UNIX) as stranger:  # who does not look whom it talks to
            stranger.connect(str(path))
            assert stranger.recv(1) == b""
        helper.log.wait_for(rf": drop \d+: the other end runs as uid 0, not as uid {user.pw_uid}$")


# Under daemontools


def swaks(service: ShippedListener, *options: str):
    (client,) = need("swaks")
    where = ["--server", service.address, "--port", str(service.port), "--timeout", "60"]
    return run([client, *where, "--from", SENDER, "--to", RECIPIENT, *options])


@pytest.mark.parametrize(
    ("name", "options", "recipient"),
    [
        ("listen-smtp", ["--tls"], RECIPIENT),
        ("listen-submission", ["--tls", *AUTH], STRANGER),
        ("listen-smtps", ["--tls-on-connect", *AUTH], STRANGER),
    ],
)
def test_a_shipped_service(home, name: str, options: list[str], recipient: str) -> None:
    need_root()
    with ShippedListener(home, name) as service:
        assert service.port == PORTS[name]
        service.log.wait_for(r": status: 0/20$")
        for pid in (service.pid, *children(service.pid)):
            assert rights(pid) == none_but(mail_user())
        ended = swaks(service, *options)
        assert ended.status == 0, ended.output
        service.log.wait_for(r"qmail-smtpd-listen: end \d+ status 0$")
    stamped = (service.logged / "current").read_text().splitlines()
    assert all(re.match(r"@[0-9a-f]{24} ", line) for line in stamped)
    events = [event for event in (parse(line[26:]) for line in stamped) if event]
    auth = [] if name == "listen-smtp" else ["auth"]
    assert [event.name for event in events] == ["connect", "tls", *auth, "mail", "disconnect"]
    found = delivery(home.maildir)
    assert (events[-2]["qp"], events[-2]["to"]) == (str(found.qp), recipient)


@pytest.fixture
def smtp(home):
    """run/listen-smtp, running."""
    need_root()
    with ShippedListener(home, "listen-smtp") as service:
        yield service


def connected(service: ShippedListener) -> Client:
    client = Client(Tcp(socket.create_connection((service.address, service.port))))
    assert client.reply() == f"220 {NAME} ESMTP"
    return client


def test_svc(smtp: ShippedListener, home) -> None:
    """-a tells, -h replaces workers, -t lets the session that is open end, and starts anew."""
    client = connected(smtp)
    begin_message(client)
    smtp.svc("-a")
    smtp.log.wait_for(r": status: 1/20$", 2)
    before, pid = children(smtp.pid), smtp.pid
    smtp.svc("-h")
    eventually(lambda: len(before & children(smtp.pid)) == 1, "idle workers are replaced")
    smtp.svc("-t")
    smtp.log.wait_for(r": stopping: 1 connection")
    end_message(client)
    assert client.command(b"QUIT") == f"221 {NAME}"
    wait_for_death(pid)
    smtp.log.wait_for(r"^\S* ?25$", 2)
    assert smtp.pid != pid
    assert swaks(smtp, "--tls").status == 0
    assert len(deliveries(home.maildir)) == 2


def test_svc_kill(smtp: ShippedListener, home) -> None:
    """A listener that was killed is replaced, although a session of its goes on."""
    client = connected(smtp)
    begin_message(client)
    smtp.svc("-k")
    smtp.log.wait_for(r"^\S* ?25$", 2)
    assert swaks(smtp, "--tls").status == 0
    end_message(client)
    assert client.command(b"QUIT") == f"221 {NAME}"
    assert len(deliveries(home.maildir)) == 2


@pytest.mark.parametrize("options", [["-s", "20", "-m", "200"], ["-d", "-s", "5", "-m", "100"]])
def test_smtp_source(smtp: ShippedListener, home, options: list[str]) -> None:
    """Postfix's load generator: many sessions at once, and many messages in a session."""
    (client,) = need("smtp-source")
    envelope = ["-f", SENDER, "-t", RECIPIENT, "-l", "3000"]
    ended = run([client, *options, *envelope, f"{smtp.address}:{smtp.port}"])
    assert (ended.status, ended.output) == (0, "")
    assert len(deliveries(home.maildir)) == int(options[-1])


# Under a real systemd


@pytest.fixture
def systemd(home):
    need_root()
    with ListenManager(home) as running:
        running.wait_for_status(1)
        yield running


def from_systemd(systemd: ListenManager) -> Client:
    client = Client(Tcp(socket.create_connection((ADDRESS, systemd.port))))
    assert client.reply() == f"220 {NAME} ESMTP"
    return client


def test_systemd_units(systemd: ListenManager, home) -> None:
    """Reload keeps process id and sessions; restart lets sessions end; nobody is refused."""
    pid = systemd.pid
    for process in (pid, *children(pid)):
        assert rights(process) == {**none_but(mail_user()), "Groups": rights(process)["Groups"]}
    client = from_systemd(systemd)
    begin_message(client)
    before = children(pid)
    systemd.control("reload", f"{systemd.unit}.service")
    systemd.wait_for_status(2)
    eventually(lambda: len(before & children(pid)) == 1, "of the old workers the client's is left")
    assert systemd.pid == pid
    second = from_systemd(systemd)
    end_message(client)
    systemd.control("restart", "--no-block", f"{systemd.unit}.service")
    eventually(lambda: any(": stopping: 2" in line for line in systemd.log("listen")), "it stops")
    third = Client(Tcp(socket.create_connection((ADDRESS, systemd.port))))  # waits for the next one
    send_message(second)
    for old in (client, second):
        assert old.command(b"QUIT") == f"221 {NAME}"
    assert third.reply() == f"220 {NAME} ESMTP"
    send_message(third)
    third.connection.close()  # a worker of the old one has it, if it was told to end that moment
    eventually(lambda: systemd.pid not in (0, pid), "it is another process")
    assert len(deliveries(home.maildir)) == 3


# The helper, as it is shipped


@pytest.fixture
def home_of_helper(programs):
    """A home of its own, as the sessions have that of whoever hands them over."""
    made = Home(programs)
    yield made
    made.remove()


def test_the_shipped_helper(home, home_of_helper) -> None:
    """With the one-shot program under tcpserver, whose run file names it."""
    need_root()
    with ShippedHelper(home_of_helper) as helper:
        with HelpedService(home, "smtp", helper.socket) as service:
            (client,) = need("swaks")
            where = ["--server", "127.0.0.1", "--port", str(service.port), "--tls"]
            ended = run([client, *where, "--from", SENDER, "--to", RECIPIENT])
            assert ended.status == 0, ended.output
            service.log.wait_for(r"tcpserver: end \d+ status 0$")
            assert "no help from" not in service.log.text()
        helper.log.wait_for(r": end \d+ status 0$")
    assert delivery(home.maildir)


class HelpedService(ShippedService):
    """One of run/*, with the line that its helper asks for."""

    def __init__(self, home, name: str, socket_: Path) -> None:
        super().__init__(home, name)
        self._socket = socket_

    def _on_this_host(self, text: str) -> str:
        text = super()._on_this_host(text)
        return text.replace("#!/bin/sh\n", f"#!/bin/sh\nexport TLSHELPER={self._socket}\n", 1)
