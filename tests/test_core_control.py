"""Control files, and the lists made of them: rcpthosts, morercpthosts.cdb, badmailfrom."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path
from typing import Callable

import pytest
from conformance.cdb_writer import make_cdb
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from qmail_smtpd_py import cdb
from qmail_smtpd_py.badmailfrom import BadMailFrom
from qmail_smtpd_py.control import ControlFiles
from qmail_smtpd_py.controlcache import CachedControlFiles
from qmail_smtpd_py.effects import ControlError
from qmail_smtpd_py.rcpthosts import RcptHosts

NOBODY = 65534


@pytest.fixture(autouse=True)
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control directory of a qmail home that is the current directory."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "control"
    directory.mkdir()
    return directory


@pytest.fixture(params=[ControlFiles, CachedControlFiles])
def files(request: pytest.FixtureRequest) -> ControlFiles:
    return request.param()


# Control files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"mx.example.org\n", b"mx.example.org"),
        (b"mx.example.org", b"mx.example.org"),
        (b"mx.example.org \t \n", b"mx.example.org"),
        (b"  mx\n", b"  mx"),
        (b"first\nsecond\n", b"first"),
        (b"\nsecond\n", b""),
        (b"", b""),
        (b"#x\n", b"#x"),
        (b"mx\r\n", b"mx\r"),
    ],
)
def test_line(control: Path, files: ControlFiles, text: bytes, line: bytes) -> None:
    (control / "me").write_bytes(text)
    assert files.line("me") == line


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (b"", []),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a \t\n\n \n#c\nb", [b"a", b"b"]),
        (b" #no comment\n", [b" #no comment"]),
        (b"a\0b\n\0c\nd\0\n", [b"a", b"b", b"d"]),
    ],
)
def test_list(control: Path, files: ControlFiles, text: bytes, entries: list[bytes]) -> None:
    (control / "rcpthosts").write_bytes(text)
    assert files.list("rcpthosts") == entries


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"17\n", 17), (b"17x", 17), (b"0", 0), (b"", 7), (b"x17", 7), (b"-1", 7), (b" 1", 7)],
)
def test_number(control: Path, files: ControlFiles, text: bytes, value: int) -> None:
    (control / "databytes").write_bytes(text)
    assert files.number("databytes", 7) == value


def test_a_file_that_is_not_there_is_a_default(files: ControlFiles) -> None:
    assert files.line("me") is None
    assert files.list("rcpthosts") is None
    assert files.number("databytes", 7) == 7
    assert files.open("morercpthosts.cdb") is None
    assert not files.exists("me")


def test_a_large_file_is_read_whole(control: Path, files: ControlFiles) -> None:
    hosts = [b"host%d.example" % number for number in range(20000)]
    (control / "rcpthosts").write_bytes(b"\n".join(hosts))
    assert files.list("rcpthosts") == hosts


def test_what_can_not_be_read_says_which_file_and_why(control: Path, files: ControlFiles) -> None:
    (control / "me").mkdir()
    with pytest.raises(ControlError, match=r"^cannot read control/me: Is a directory \(uid \d+\)$"):
        files.line("me")


@pytest.mark.parametrize("has_writer", [False, True])
def test_a_named_pipe_is_no_empty_file_and_nobody_waits_for_its_writer(
    control: Path, files: ControlFiles, has_writer: bool
) -> None:
    words = r"^cannot read control/{}: not a file \(uid \d+\)$"
    for name in ("me", "morercpthosts.cdb"):
        os.mkfifo(control / name)
    (control / "rcpthosts").touch()
    writer = os.open(control / "me", os.O_RDWR) if has_writer else None
    try:
        with pytest.raises(ControlError, match=words.format("me")):
            files.line("me")
        hosts = RcptHosts(files)
        with pytest.raises(ControlError, match=words.format("morercpthosts.cdb")):
            hosts.allows(b"user@example.org")
        hosts.close()
    finally:
        if writer is not None:
            os.close(writer)


def test_a_control_directory_that_is_none_is_no_default(control: Path, files: ControlFiles) -> None:
    """Only a file that is not there is one (ENOENT), and not every path that leads nowhere."""
    control.rmdir()
    control.touch()
    for use in (files.line, files.list, files.open, files.is_readable):
        with pytest.raises(ControlError, match=r"^cannot read control/rcpthosts: Not a directory"):
            use("rcpthosts")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_says_who_may_not(control: Path, files: ControlFiles) -> None:
    (control / "me").touch(mode=0o600)
    os.chmod(control.parent, 0o755)
    try:
        os.seteuid(NOBODY)
        with pytest.raises(ControlError) as caught:
            files.line("me")
    finally:
        os.seteuid(0)
    assert str(caught.value) == f"cannot read control/me: Permission denied (uid {NOBODY})"


def test_an_empty_device_is_an_empty_file(control: Path, files: ControlFiles) -> None:
    (control / "rcpthosts").symlink_to("/dev/null")
    assert files.list("rcpthosts") == []


def test_a_file_of_any_size_is_read_whole(control: Path, files: ControlFiles) -> None:
    entries = [b"%d.example.org" % number for number in range(20_000)]
    (control / "rcpthosts").write_bytes(b"\n".join(entries))
    assert files.list("rcpthosts") == entries


def test_files_are_not_left_open(control: Path, files: ControlFiles) -> None:
    (control / "me").write_bytes(b"mx\n")
    (control / "rcpthosts").mkdir()
    before = os.listdir("/proc/self/fd")
    files.line("me")
    with pytest.raises(ControlError):
        files.list("rcpthosts")
    assert os.listdir("/proc/self/fd") == before


def test_what_was_read_is_kept_until_it_is_refreshed(control: Path) -> None:
    files = CachedControlFiles()
    (control / "me").write_bytes(b"one\n")
    assert files.line("me") == b"one"
    (control / "me").write_bytes(b"three\n")
    assert files.line("me") == b"one"
    files.refresh()
    assert files.line("me") == b"three"
    assert files.list("me") == [b"three"], "the same file, read otherwise"


def change(path: Path) -> None:
    path.write_bytes(b"new\n")


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(b"new\n")
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.rename(path)


def change_and_set_back_the_clock(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"new\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", [change, replace, change_and_set_back_the_clock])
def test_a_refresh_sees_that_a_file_is_another(control: Path, how: Callable[[Path], None]) -> None:
    files = CachedControlFiles()
    (control / "me").write_bytes(b"old\n")
    assert files.line("me") == b"old"
    how(control / "me")
    files.refresh()
    assert files.line("me") == b"new"


def test_a_refresh_sees_that_a_file_comes_and_goes_and_breaks(control: Path) -> None:
    files = CachedControlFiles()
    assert files.line("me") is None
    assert not files.is_readable("me")
    (control / "me").write_bytes(b"one\n")
    files.refresh()
    assert files.line("me") == b"one"
    assert files.is_readable("me")
    (control / "me").unlink()
    files.refresh()
    assert files.line("me") is None
    (control / "me").mkdir()
    files.refresh()
    with pytest.raises(ControlError):
        files.line("me")
    (control / "me").rmdir()
    files.refresh()
    assert files.line("me") is None


def settle(files: CachedControlFiles) -> None:
    """Let the directory be old enough to be relied on, and have it looked at."""
    while not files._directory:
        files.refresh()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> CachedControlFiles:
    """Files that have the directory looked at, and know of some that are not there."""
    monkeypatch.setattr("qmail_smtpd_py.controlcache._SETTLED_SECONDS", 0.05)
    files = CachedControlFiles()
    for name in ("databytes", "morercpthosts.cdb"):
        assert files.line(name) is None
        assert files.open(name) is None
        assert not files.exists(name)
    settle(files)
    return files


def come(path: Path) -> None:
    path.write_bytes(b"new\n")


def come_by_rename(path: Path) -> None:
    other = path.parent.parent / "new"
    other.write_bytes(b"new\n")
    other.rename(path)


def come_and_set_back_the_clock(path: Path) -> None:
    before = path.parent.stat()
    path.write_bytes(b"new\n")
    os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))


def come_in_another_directory(path: Path) -> None:
    new = path.parent.with_name("new")
    new.mkdir()
    (new / path.name).write_bytes(b"new\n")
    path.parent.rename(path.parent.with_name("old"))
    new.rename(path.parent)


@pytest.mark.parametrize(
    "how", [come, come_by_rename, come_and_set_back_the_clock, come_in_another_directory]
)
def test_a_file_that_comes_shows_by_the_directory(
    control: Path, settled: CachedControlFiles, how: Callable[[Path], None]
) -> None:
    how(control / "databytes")
    settled.refresh()
    assert settled.line("databytes") == b"new"
    assert settled.exists("databytes")
    assert settled.open("morercpthosts.cdb") is None


def test_a_link_that_leads_nowhere_is_followed_each_time(control: Path, tmp_path: Path) -> None:
    (control / "databytes").symlink_to(tmp_path / "first")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    files = CachedControlFiles()
    assert files.line("databytes") is None
    settle(files)
    (tmp_path / "second").write_bytes(b"new\n")
    files.refresh()
    assert files.line("databytes") == b"new"


def test_a_settled_directory_is_looked_at_once(
    settled: CachedControlFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr("qmail_smtpd_py.controlcache.has_entry", looked_at.append)
    settled.refresh()
    settled.line("databytes")
    assert not looked_at


def test_a_directory_that_changed_a_moment_ago_is_not_relied_on(control: Path) -> None:
    files = CachedControlFiles()
    assert files.line("me") is None
    files.refresh()
    assert files._directory is None


def _me(key: str, files: ControlFiles) -> bytes | None:
    return files.line("me")


def test_what_is_derived_is_kept_until_a_file_changes(control: Path) -> None:
    files = CachedControlFiles()
    (control / "me").write_bytes(b"one\n")
    assert files.derive("key", _me) == b"one"
    files.refresh()
    assert files.derive("key", lambda key, files: b"other") == b"one"
    assert files.derive("other key", lambda key, files: key.encode()) == b"other key"
    (control / "me").write_bytes(b"three\n")
    files.refresh()
    assert files.derive("key", _me) == b"three"


def test_what_is_derived_is_bounded() -> None:
    files = CachedControlFiles()
    for number in range(1000):
        assert files.derive(number, lambda key, files: key + 1) == number + 1
    assert len(files._derived) <= 100


# rcpthosts and morercpthosts.cdb

labels = st.sampled_from([b"a", b"b", b"mx", b"example", b"org", b"", b"A", b"Org"])
domains = st.lists(labels, min_size=1, max_size=4).map(b".".join)


def is_listed(domain: bytes, entries: set[bytes]) -> bool:
    """qmail-smtpd(8): the domain itself, or what follows it from a dot on."""
    domain = domain.lower()
    ends = [at for at in range(1, len(domain)) if domain.startswith(b".", at)]
    return bool(domain) and any(domain[at:] in entries for at in [0, *ends])


@given(st.sets(domains, max_size=6), st.sets(domains, max_size=6), st.lists(domains, max_size=8))
@examples(300)
def test_rcpthosts_are_what_the_lists_say(
    control: Path, listed: set[bytes], more: set[bytes], asked: list[bytes]
) -> None:
    """rcpthosts in any case; morercpthosts.cdb in lower case, as qmail-newmrh makes it."""
    (control / "rcpthosts").write_bytes(b"\n".join(listed))
    (control / "morercpthosts.cdb").write_bytes(make_cdb({entry.lower(): b"" for entry in more}))
    entries = {entry.lower() for entry in listed | more if entry}
    hosts = RcptHosts(ControlFiles())
    try:
        for domain in [*asked, *listed, *more]:
            assert hosts.allows(b"user@" + domain) == is_listed(domain, entries), domain
            assert hosts.allows(b"other@user@" + domain) == is_listed(domain, entries), domain
    finally:
        hosts.close()


@pytest.mark.parametrize("recipient", [b"user", b"", b"user@anything.example"])
def test_without_rcpthosts_everything_is_allowed(control: Path, recipient: bytes) -> None:
    (control / "morercpthosts.cdb").write_bytes(make_cdb({b"example.org": b""}))
    assert RcptHosts(ControlFiles()).allows(recipient)


def test_a_directory_that_is_away_for_a_moment_opens_no_relay(
    control: Path, files: ControlFiles
) -> None:
    (control / "rcpthosts").write_bytes(b"example.org\n")
    files.line("me")
    away = control.rename(control.with_name("away"))
    files.refresh()
    with pytest.raises(ControlError, match="control/rcpthosts is not there, or not yet"):
        RcptHosts(files)
    away.rename(control)
    files.refresh()
    assert not RcptHosts(files).allows(b"user@elsewhere.example")


def test_no_moment_of_such_an_exchange_opens_a_relay(control: Path, files: ControlFiles) -> None:
    (control / "rcpthosts").write_bytes(b"example.org\n")
    away = control.with_name("away")
    is_over = threading.Event()

    def exchange() -> None:
        while not is_over.is_set():
            control.rename(away)
            away.rename(control)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(1000):
            files.refresh()
            try:
                assert not RcptHosts(files).allows(b"user@elsewhere.example")
            except ControlError:
                pass
    finally:
        is_over.set()
        thread.join()


def test_an_address_without_domain_is_always_allowed(control: Path) -> None:
    (control / "rcpthosts").write_bytes(b"")
    hosts = RcptHosts(ControlFiles())
    assert hosts.allows(b"user")
    assert hosts.allows(b"")
    assert not hosts.allows(b"user@")


def test_a_domain_that_can_be_none_costs_no_more_than_one_that_can(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each dot has a key behind it to hash; of those that are as long as they get some count."""
    (control / "rcpthosts").write_bytes(b"")
    (control / "morercpthosts.cdb").write_bytes(make_cdb({b".example.org": b""}))
    hashed: list[bytes] = []
    original = cdb.cdb_hash
    monkeypatch.setattr(cdb, "cdb_hash", lambda key: hashed.append(key) or original(key))
    hosts = RcptHosts(ControlFiles())
    try:
        assert not hosts.allows(b"u@" + b"." * 890)
        assert not hosts.allows(b"u@" + b"a." * 127 + b"a")
        assert sum(map(len, hashed)) <= 1000
        assert not hosts.allows(b"u@" + b"long-label-." * 21 + b"com")
        assert sum(map(len, hashed)) <= 4000
        for length in (255, 256, 890):
            assert hosts.allows(b"u@" + (b"a." * 450 + b"a.example.org")[-length:])
        assert max(map(len, hashed)) == 255
    finally:
        hosts.close()


@pytest.mark.parametrize(("labels", "counts"), [(20, True), (21, False)])
def test_an_entry_for_subdomains_of_many_labels(control: Path, labels: int, counts: bool) -> None:
    (control / "rcpthosts").write_bytes(b"")
    (control / "morercpthosts.cdb").write_bytes(make_cdb({b".a" * labels: b""}))
    hosts = RcptHosts(ControlFiles())
    assert hosts.allows(b"u@x" + b".a" * labels) is counts
    hosts.close()


def test_close_gives_the_descriptor_back(control: Path) -> None:
    (control / "rcpthosts").write_bytes(b"")
    (control / "morercpthosts.cdb").write_bytes(make_cdb({}))
    before = os.listdir("/proc/self/fd")
    hosts = RcptHosts(ControlFiles())
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    hosts.close()
    assert os.listdir("/proc/self/fd") == before
    hosts.close()


def test_a_damaged_cdb_is_no_reason_to_refuse(control: Path) -> None:
    """As if nobody were listed in it: that would be for good, and this is for now."""
    (control / "rcpthosts").write_bytes(b"")
    (control / "morercpthosts.cdb").write_bytes(b"damaged")
    hosts = RcptHosts(ControlFiles())
    words = r"^cannot use control/morercpthosts\.cdb: the file is cut off; run qmail-newmrh$"
    with pytest.raises(ControlError, match=words):
        hosts.allows(b"user@example.org")
    hosts.close()


@given(st.binary(max_size=2600), st.integers(0, 2600))
def test_a_broken_cdb_gives_an_answer_or_an_error(control: Path, noise: bytes, cut: int) -> None:
    whole = make_cdb({b"example.org": b"", b"example.net": b""})
    (control / "rcpthosts").write_bytes(b"")
    for broken in (noise, whole[:cut], noise[:cut] + whole[cut:]):
        (control / "morercpthosts.cdb").write_bytes(broken)
        hosts = RcptHosts(ControlFiles())
        try:
            hosts.allows(b"user@example.org")
        except ControlError as error:
            assert "control/morercpthosts.cdb" in str(error)
        finally:
            hosts.close()


# cdb


@pytest.fixture
def database(control: Path) -> Callable[[bytes], int]:
    """Opens a database of these octets, for reading."""

    def opened(octets: bytes) -> int:
        (control / "x.cdb").write_bytes(octets)
        return os.open(control / "x.cdb", os.O_RDONLY)

    return opened


@given(
    st.dictionaries(st.binary(max_size=12), st.binary(max_size=30), max_size=40),
    st.lists(st.binary(max_size=12), max_size=10),
)
def test_cdb_has_what_was_put_in(
    database: Callable[[bytes], int], stored: dict[bytes, bytes], others: list[bytes]
) -> None:
    descriptor = database(make_cdb(stored))
    try:
        for key in [*stored, *others]:
            assert cdb.find(descriptor, key) == stored.get(key)
    finally:
        os.close(descriptor)


def test_cdb_with_every_key_in_one_table(database: Callable[[bytes], int]) -> None:
    """Keys whose hashes agree in the low 8 bits, so that they meet in the slots too."""
    numbers = (b"%d" % number for number in range(60000))
    keys = [key for key in numbers if cdb.cdb_hash(key) % 256 == 0]
    descriptor = database(make_cdb({key: key for key in keys[1::2]}))
    found = [cdb.find(descriptor, key) for key in keys]
    assert found == [key if at % 2 else None for at, key in enumerate(keys)]
    os.close(descriptor)


def test_cdb_with_keys_of_one_hash(database: Callable[[bytes], int]) -> None:
    keys = [b"a2", b"gt"]
    assert cdb.cdb_hash(keys[0]) == cdb.cdb_hash(keys[1])
    for stored in ([keys[0]], [keys[1]], keys, keys[::-1]):
        descriptor = database(make_cdb({key: key for key in stored}))
        assert [cdb.find(descriptor, key) for key in keys] == [
            key if key in stored else None for key in keys
        ]
        os.close(descriptor)


def test_a_large_cdb_is_not_read_into_memory(database: Callable[[bytes], int]) -> None:
    descriptor = database(make_cdb({b"large": b"x" * 20_000_000, b"small": b"data"}))
    tracemalloc.start()
    assert cdb.find(descriptor, b"small") == b"data"
    assert cdb.find(descriptor, b"missing") is None
    assert cdb.has(descriptor, b"large")
    assert not cdb.has(descriptor, b"missing")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    os.close(descriptor)
    assert peak < 10_000


def test_a_damaged_length_asks_for_no_memory(database: Callable[[bytes], int]) -> None:
    whole = make_cdb({b"key": b"data"})
    for length in (5000, 0x7FFFFFFF, 0xFFFFFFFF):
        descriptor = database(whole[:2052] + length.to_bytes(4, "little") + whole[2056:])
        tracemalloc.start()
        with pytest.raises(cdb.CdbError, match="cut off"):
            cdb.find(descriptor, b"key")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        os.close(descriptor)
        assert peak < 10_000


# badmailfrom


@pytest.mark.parametrize(
    ("sender", "is_blocked"),
    [
        (b"bad@example.com", True),
        (b"BAD@Example.Com", True),
        (b"good@example.com", False),
        (b"anybody@evil.example", True),
        (b"anybody@EVIL.example", True),
        (b"anybody@sub.evil.example", False),
        (b"a@b@evil.example", True),
        (b"evil.example", False),
        (b"local", True),
        (b"", False),
        (b"anybody@", False),
    ],
)
def test_badmailfrom(control: Path, sender: bytes, is_blocked: bool) -> None:
    (control / "badmailfrom").write_bytes(b"# spam\nBad@example.com \n@Evil.example\nlocal\n\n")
    assert BadMailFrom(ControlFiles()).blocks(sender) == is_blocked


def test_an_empty_domain_is_not_the_same_as_none(control: Path) -> None:
    (control / "badmailfrom").write_bytes(b"@\n")
    assert BadMailFrom(ControlFiles()).blocks(b"user@")
    for sender in (b"", b"user"):
        assert not BadMailFrom(ControlFiles()).blocks(sender), "bounces have no sender"


def test_without_badmailfrom_nobody_is_blocked() -> None:
    assert not BadMailFrom(ControlFiles()).blocks(b"bad@example.com")
