"""Failed AUTH attempts by address and over time: the table, and who is refused for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from conformance import logs
from conformance.program import ROOT, Program
from conformance.stage import Stage
from conformance.world import base64
from listener.listening import Listening

from qmail_smtpd_py import authfailures
from qmail_smtpd_py.authfailures import SIZE, WAYS, AuthFailures, network

pytest_plugins = ["listener.fixtures"]

WRONG, RIGHT = (b"AUTH PLAIN " + base64(b"\0joe\0" + word) for word in (b"wrong", b"secret"))
TOO_OFTEN = "454 too many failed auth attempts, try again later (#4.7.0)"
NOW = 1_800_000_000


class Table:
    """A table and what the log was told of it; `clock` is the time in seconds."""

    def __init__(self, path: Path, limit: int = 3, period: int = 600) -> None:
        self.path = path
        self.limit = limit
        self.period = period
        self.clock = NOW
        self.told: list[str] = []

    def of(self, ip: str) -> AuthFailures:
        path = os.fsencode(self.path)
        return AuthFailures(path, ip.encode(), self.limit, self.period, self.told.append)

    def add(self, ip: str, times: int = 1) -> None:
        for _ in range(times):
            self.of(ip).end(has_failed=True)

    def shuts_out(self, ip: str) -> bool:
        return self.of(ip).are_too_many()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    made = Table(tmp_path / "failures")
    monkeypatch.setattr(authfailures.time, "time", lambda: made.clock)
    return made


# The table


def test_an_address_is_shut_out_when_the_limit_is_reached(table: Table) -> None:
    for _ in range(3):
        assert not table.shuts_out("192.0.2.7")
        table.add("192.0.2.7")
    assert table.shuts_out("192.0.2.7")
    assert not table.shuts_out("192.0.2.8")
    assert table.told == []


def test_it_is_let_in_again_by_time(table: Table) -> None:
    table.add("192.0.2.7", 2)
    table.clock += 599
    table.add("192.0.2.7")
    assert table.shuts_out("192.0.2.7")
    table.clock += 1
    assert not table.shuts_out("192.0.2.7"), "600 seconds after the first of them"
    table.add("192.0.2.7", 2)
    assert not table.shuts_out("192.0.2.7"), "a new count"


def test_attempts_at_the_same_time_find_out_no_more_than_the_limit_allows(table: Table) -> None:
    """They are judged when they end, whoever was first to begin."""
    guesses = [table.of("192.0.2.7") for _ in range(6)]
    assert not any(guess.are_too_many() for guess in guesses)
    assert guesses[0].end(has_failed=False), "a right one, in time"
    assert [guess.end(has_failed=True) for guess in guesses[1:5]] == [True, True, True, False]
    assert not guesses[5].end(has_failed=False), "a right one, too late"
    assert table.of("192.0.2.8").end(has_failed=False)


def test_a_clock_that_goes_back_lets_in(table: Table) -> None:
    table.add("192.0.2.7", 3)
    table.clock -= 1000
    assert not table.shuts_out("192.0.2.7")


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8::ff00:0:0:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.7", "192.0.2.7", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.7", "192.0.2.8", False),
    ],
)
def test_what_is_one_address(table: Table, one: str, other: str, is_same: bool) -> None:
    table.add(one, 3)
    assert table.shuts_out(one)
    assert table.shuts_out(other) is is_same


@pytest.mark.parametrize("ip", ["unknown", "", "192.0.2", "1.2.3.4.5", "::g", "\xff", "1\n"])
def test_what_is_no_address_is_not_counted(table: Table, ip: str) -> None:
    table.add(ip, 9)
    assert not table.shuts_out(ip)
    assert not table.path.exists()


def test_the_file_is_private_and_does_not_grow(table: Table) -> None:
    table.add("192.0.2.7")
    assert table.path.stat().st_mode & 0o7777 == 0o600
    for number in range(3000):
        table.add(f"10.0.{number >> 8}.{number & 255}")
    assert table.path.stat().st_size == SIZE < 1 << 20
    assert table.told == []


def test_each_table_has_a_key_of_its_own(tmp_path: Path) -> None:
    first, second = Table(tmp_path / "1"), Table(tmp_path / "2")
    for made in (first, second):
        made.add("192.0.2.7")
    marks = {made.path.read_bytes()[64:].strip(b"\0")[:8] for made in (first, second)}
    assert len(marks) == 2
    address = network(b"192.0.2.7")
    assert address
    assert address not in first.path.read_bytes()


@pytest.fixture
def one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """All addresses meet in one set, as if somebody knew the key."""
    monkeypatch.setattr(authfailures, "SETS", 1)


@pytest.mark.usefixtures("one_set")
def test_a_crowd_lets_nobody_in_who_is_shut_out(table: Table) -> None:
    table.add("192.0.2.7", 3)
    for number in range(200):
        table.add(f"198.51.100.{number}", 1 + number % 2)
    assert table.shuts_out("192.0.2.7")


@pytest.mark.usefixtures("one_set")
def test_those_with_fewer_failures_make_room(table: Table) -> None:
    table.limit = 10
    for number in range(WAYS):
        table.add(f"192.0.2.{number}", 9 if number else 1)
    table.add("198.51.100.1")
    for number in range(1, WAYS):
        table.add(f"192.0.2.{number}")
        assert table.shuts_out(f"192.0.2.{number}")
    table.add("198.51.100.1", 9)
    assert table.shuts_out("198.51.100.1")


def remembered(table: Table, addresses: list[str]) -> list[str]:
    """Those of the addresses that have failures; a table that is full stays as it is."""
    table.limit = 1
    return [ip for ip in addresses if table.shuts_out(ip)]


@pytest.mark.usefixtures("one_set")
def test_of_those_with_the_fewest_failures_the_oldest_makes_room(table: Table) -> None:
    addresses = [f"192.0.2.{number}" for number in range(WAYS + 1)]
    for ip in addresses:
        table.add(ip, 2 if ip == addresses[0] else 1)
        table.clock += 1
    assert remembered(table, addresses) == [addresses[0], *addresses[2:]]


@pytest.mark.usefixtures("one_set")
def test_what_has_expired_makes_room_first(table: Table) -> None:
    addresses = [f"192.0.2.{number}" for number in range(WAYS + 1)]
    table.add(addresses[0], 2)
    table.clock += table.period
    for ip in addresses[1:]:
        table.add(ip)
    assert remembered(table, addresses) == addresses[1:]


@pytest.mark.usefixtures("one_set")
def test_where_there_is_no_room_nobody_new_is_shut_out(table: Table) -> None:
    for number in range(WAYS):
        table.add(f"192.0.2.{number}", 3)
    table.add("198.51.100.1", 9)
    assert not table.shuts_out("198.51.100.1")
    table.clock += table.period
    table.add("198.51.100.1", 3)
    assert table.shuts_out("198.51.100.1"), "the others have expired"


def other(table: Table, limit: int, period: int) -> Table:
    """The same table, as a service with another limit and period has it."""
    return Table(table.path, limit, period)


def test_a_shorter_period_elsewhere_lets_nobody_in(table: Table) -> None:
    hasty = other(table, limit=3, period=3)
    table.add("192.0.2.7", 3)
    table.clock += 4
    hasty.add("192.0.2.7")
    assert table.shuts_out("192.0.2.7")
    hasty.add("192.0.2.8")
    table.add("192.0.2.8")
    table.clock += 4
    table.add("192.0.2.8")
    assert table.shuts_out("192.0.2.8"), "the longest period counts, whoever was first"


@pytest.mark.usefixtures("one_set")
def test_a_crowd_at_a_service_with_a_higher_limit_lets_nobody_in(table: Table) -> None:
    table.add("192.0.2.7", 3)
    patient = other(table, limit=30, period=3)
    for number in range(50):
        patient.add(f"198.51.100.{number}", 5)
    assert table.shuts_out("192.0.2.7")
    assert not patient.shuts_out("192.0.2.7")


ADDING = """
import sys
from qmail_smtpd_py.authfailures import AuthFailures
for _ in range(200):
    AuthFailures(sys.argv[1].encode(), b"192.0.2.7", 5000, 600, print).end(True)
"""


def test_no_failure_is_lost_among_many_processes(tmp_path: Path) -> None:
    """And the first of them, who all find no file, make one table."""
    path = tmp_path / "failures"
    command = [sys.executable, "-c", ADDING, str(path)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(5)]
    assert [process.communicate()[0] for process in running] == [b""] * 5
    assert Table(path, limit=1000).shuts_out("192.0.2.7")
    assert not Table(path, limit=1001).shuts_out("192.0.2.7")


# A table that can not be used


def truncated(path: Path) -> None:
    Table(path).add("192.0.2.7")
    os.truncate(path, SIZE - 1)


def somebody_elses(path: Path) -> None:
    path.write_bytes(b"root:x:0:0::/root:/bin/sh\n")


def overwritten(path: Path) -> None:
    path.write_bytes(os.urandom(SIZE))


def a_link(path: Path) -> None:
    Table(path.with_name("elsewhere")).add("192.0.2.7")
    path.symlink_to("elsewhere")


def never_there(path: Path) -> None:
    path.parent.rmdir()


WRECKS: list[tuple[Callable[[Path], object], str]] = [
    (truncated, "not a table of failed attempts"),
    (somebody_elses, "not a table of failed attempts"),
    (overwritten, "not a table of failed attempts"),
    (a_link, "Too many levels of symbolic links"),
    (os.mkfifo, "not a file"),
    (Path.mkdir, "Is a directory"),
    (never_there, "No such file or directory"),
]


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    table = Table(Path(f"{tmp_path}/a\0b"))
    table.add("192.0.2.7", 1)
    assert not table.shuts_out("192.0.2.7")
    assert len(table.told) == 2
    assert all("embedded null" in told for told in table.told)


@pytest.mark.parametrize(("wreck", "why"), WRECKS)
def test_a_table_that_is_none_is_left_alone_and_refuses_nobody(
    tmp_path: Path, wreck: Callable[[Path], object], why: str
) -> None:
    table = Table(tmp_path / "there" / "failures")
    table.path.parent.mkdir()
    wreck(table.path)
    before = table.path.read_bytes() if table.path.is_file() else b""
    table.add("192.0.2.7", 9)
    assert not table.shuts_out("192.0.2.7")
    assert len(table.told) == 10
    assert all(why in told and str(table.path) in told for told in table.told)
    assert (table.path.read_bytes() if table.path.is_file() else b"") == before


def test_a_table_that_was_not_made_to_the_end_is_made(table: Table) -> None:
    """The disk was full, or the power went: it has its size, and no header."""
    os.truncate(os.open(table.path, os.O_CREAT | os.O_WRONLY, 0o600), SIZE)
    table.add("192.0.2.7", 3)
    assert table.shuts_out("192.0.2.7")
    assert table.told == []


def test_zeros_that_are_no_table_are_left_alone(table: Table) -> None:
    table.path.write_bytes(bytes(SIZE + 1))
    table.add("192.0.2.7")
    assert "not a table of failed attempts" in table.told[0]
    assert table.path.read_bytes() == bytes(SIZE + 1)


def test_what_is_damaged_behind_the_header_does_no_harm(table: Table) -> None:
    table.add("192.0.2.7", 3)
    header = table.path.read_bytes()[:64]
    table.path.write_bytes(header + b"\xff" * (SIZE - 64))
    assert not table.shuts_out("192.0.2.7")
    table.add("192.0.2.7", 3)
    assert table.shuts_out("192.0.2.7")
    assert table.told == []


@pytest.mark.parametrize("clock", [-1, 1 << 32])
def test_a_time_that_no_slot_can_hold(table: Table, clock: int) -> None:
    table.clock = clock
    table.add("192.0.2.7", 3)
    assert not table.shuts_out("192.0.2.7")
    assert len(table.told) == 3
    assert all("failed auth attempts not counted" in told for told in table.told)


def test_a_lock_that_somebody_keeps_holds_nobody_up(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = [0.0]
    monkeypatch.setattr(authfailures.time, "monotonic", lambda: sum(waited))
    monkeypatch.setattr(authfailures.time, "sleep", waited.append)
    table.add("192.0.2.7", 3)
    with table.path.open("rb") as keeper:
        fcntl.flock(keeper, fcntl.LOCK_EX)
        assert not table.shuts_out("192.0.2.7")
    assert "somebody keeps it locked" in table.told[0]
    assert sum(waited) < 2
    assert table.shuts_out("192.0.2.7")


def test_no_descriptor_is_left(table: Table, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    table.add("192.0.2.7", 3)
    Table(tmp_path).add("192.0.2.7")
    assert os.listdir("/proc/self/fd") == before


# The program


def say(program: Program, *commands: bytes) -> list[str | None]:
    """The replies to these commands, and to the greeting."""
    client = program.client
    return [client.reply(), *(client.command(command) for command in commands)]


def test_it_is_the_address_that_is_refused_and_not_its_mail(host: Stage) -> None:
    host.control({"authfailtable": f"{host.home}/failures\n", "authfaillimit": "1\n"})
    host.plan("checkpassword", [{"exit": 1}, {"exit": 0}])
    with Program(host) as program:
        assert say(program, WRONG, RIGHT)[1:] == ["535 authentication failed (#5.7.1)", TOO_OFTEN]
        assert program.client.command(b"MAIL FROM:<>") == "250 ok"
    program.wait()
    failed, refused = [line.fields for line in logs.read_all(program.log) if line.event == "auth"]
    assert failed["code"] == "535"
    assert (refused["ip"], refused["code"], refused["user"]) == ("192.0.2.25", "454", "joe")
    with Program(host) as program:
        assert say(program, RIGHT)[1:] == [TOO_OFTEN], "in another session, and whatever it says"
    assert len(host.checks()) == 1, "and the check program is not asked"
    host.environment({"TCPREMOTEIP": "192.0.2.26"})
    with Program(host) as program:
        assert (say(program, RIGHT)[1] or "").startswith("235 ")


@pytest.mark.parametrize(
    "variables",
    [{}, {"AUTHFAILTABLE": "@table", "AUTHFAILLIMIT": "0"}, {"AUTHFAILTABLE": ""}],
)
def test_it_is_off_unless_it_is_asked_for(host: Stage, variables: dict[str, str]) -> None:
    table = Table(host.home / "failures", limit=1)
    table.add("192.0.2.25", 50)
    host.environment(
        {name: value.replace("@table", str(table.path)) for name, value in variables.items()}
    )
    with Program(host) as program:
        assert (say(program, RIGHT)[1] or "").startswith("235 ")


def test_sessions_at_the_same_time_find_out_no_more(
    host: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.control({"authfailtable": f"{host.home}/failures\n", "authfaillimit": "1\n"})
    slow, gate = host.tools / "slow", host.home / "gate"
    wait = f"until [ -e {gate}.$word ]; do sleep 0.01; done"
    slow.write_text(f"#!/bin/sh\nread word <&3\n{wait}\n[ $word != wrong ]\n")
    slow.chmod(0o755)
    host.arguments(str(slow), "@true")
    guesses = [b"AUTH PLAIN " + base64(b"\0%s\n\0x" % word) for word in (b"wrong", b"right")]
    with Program(host) as wrong, Program(host) as right:
        for program, guess in zip((wrong, right), guesses):
            say(program)
            program.client.send(guess + b"\r\n")
        Path(f"{gate}.wrong").touch()
        assert wrong.client.reply() == "535 authentication failed (#5.7.1)"
        Path(f"{gate}.right").touch()
        assert right.client.reply() == TOO_OFTEN


def test_what_is_no_failure_is_not_counted(host: Stage) -> None:
    host.control({"authfailtable": f"{host.home}/failures\n", "authfaillimit": "1\n"})
    host.plan("checkpassword", [{"exit": 111}, {"signal": 9}, {"exit": 0}, {"exit": 1}])
    for code in ("454 oops", "454 oops", "235 ", "535 ", TOO_OFTEN):
        with Program(host) as program:
            assert (say(program, RIGHT)[1] or "").startswith(code)


def test_variables_come_before_control_files(host: Stage) -> None:
    table = Table(host.home / "failures", limit=5)
    table.add("192.0.2.25", 5)
    host.control({"authfailtable": "/nowhere/failures\n", "authfaillimit": "100\n"})
    host.environment({"AUTHFAILTABLE": "failures", "AUTHFAILLIMIT": "5"})
    with Program(host) as program:
        assert say(program, RIGHT)[1] == TOO_OFTEN, "a relative path is one in the qmail home"
    host.environment({"AUTHFAILPERIOD": "0"})
    with Program(host) as program:
        assert (say(program, RIGHT)[1] or "").startswith("235 ")


def test_a_broken_table_is_told_of_and_lets_everybody_in(host: Stage) -> None:
    (host.home / "failures").write_text("no table")
    host.environment({"AUTHFAILTABLE": "failures"})
    with Program(host) as program:
        assert (say(program, RIGHT)[1] or "").startswith("235 ")
    program.wait()
    (error,) = [line.fields["why"] for line in logs.read_all(program.log) if line.event == "error"]
    assert error == (
        "failed auth attempts not counted: failures: not a table of failed attempts; remove it,"
        f" or name another (uid {os.geteuid()})"
    )


def test_the_listener_counts_in_the_same_table(mx: Stage) -> None:
    mx.environment({"AUTHFAILTABLE": f"{mx.home}/failures", "AUTHFAILLIMIT": "2"})
    mx.plan("checkpassword", {"exit": 1})
    Table(mx.home / "failures").add("127.0.0.1")
    with Listening(mx) as listener:
        assert listener.greeted().command(WRONG) == "535 authentication failed (#5.7.1)"
        assert listener.greeted().command(RIGHT) == TOO_OFTEN
    mx.environment({"TCPREMOTEIP": "127.0.0.1"})
    with Program(mx) as program:
        assert say(program, RIGHT)[1] == TOO_OFTEN
