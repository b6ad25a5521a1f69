"""AUTH attempts that failed, by address and over time: a table on disk, without a daemon.

The file has a fixed size, made when it is first used: a header with a random key, and 4096 sets of
8 slots.  A slot is 24 octets: a mark for the address, when its first failure was, when it expires
and is free again, how many failures there were, and whether they reached the limit.  Address, for
IPv6 the /64 network, to set and mark is a hash with the key, so that nobody can choose addresses
that meet in a set.

Where all slots of a set are in use the one with the fewest failures makes room, the oldest of
these, but none that has reached the limit: an address that is shut out can not be let in by the
failures of others, and where there is no room a failure is not remembered.  Services with limits
and periods of their own can use one table: what a slot says is what counts to all of them, and the
longest period of those where the address has failed is how long it says so.

Attempts that run at the same time can be more than the limit.  So each is judged when it ends, too:
where the limit was reached meanwhile its outcome, even a right password, counts for nothing.

Each use opens the file, locks it (flock(2)) and closes it.  Whatever is wrong with it, nobody is
refused for that: the log is told, and attempts are not counted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from _socket import AF_INET, AF_INET6, inet_pton  # socket takes longer to import

try:
    from _blake2 import blake2b  # hashlib loads OpenSSL, which takes longer to import
except ImportError:  # an interpreter that was built without it
    from hashlib import blake2b

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SETS, WAYS = 4096, 8
LOCK_SECONDS = 1.0
"""How long to wait for others who use the table; each of them is done within a millisecond."""

_MAGIC = b"qmail-smtpd auth"
_KEY = 16  # octets
_HEADER = 64
_MARK = 8
_SLOT = struct.Struct(f">{_MARK}sIII?3x")
SIZE = _HEADER + SETS * WAYS * _SLOT.size
_END_OF_TIME = (1 << 32) - 1

_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address as IPv6 (RFC 4291 section 2.5.5.2)
_NETWORK = 8  # octets: who has one address of a /64 has them all


class Slot:
    """What is known of an address: `since` is the time of its first failure, `until` when that is
    forgotten, in seconds since 1970; `is_full` whether it has reached a limit.
    """

    __slots__ = ("count", "is_full", "mark", "since", "until")

    def __init__(
        self, mark: bytes, since: int, until: int = 0, count: int = 0, is_full: bool = False
    ) -> None:
        self.mark = mark
        self.since = since
        self.until = until
        self.count = count
        self.is_full = is_full

    def pack(self) -> bytes:
        """The octets of the slot; raises struct.error for a time that it can not hold."""
        return _SLOT.pack(self.mark, self.since, self.until, self.count, self.is_full)

    def is_live(self, now: int) -> bool:
        """Whether it counts."""
        return self.count > 0 and self.since <= now < self.until

    def is_of(self, mark: bytes, now: int) -> bool:
        """Whether it counts, and is that of an address."""
        return self.mark == mark and self.is_live(now)

    def worth(self, mark: bytes, now: int) -> tuple[bool, int, int]:
        """Sort key of the slot to use for an address: its own, a free one, then who makes room."""
        if self.is_of(mark, now):
            return False, -1, 0
        return (self.is_full, self.count, self.since) if self.is_live(now) else (False, 0, 0)

    def add(self, limit: int, period: int) -> None:
        """Count one more failure, where there may be `limit` of them in `period` seconds."""
        self.count += 1
        self.until = min(max(self.until, self.since + period), _END_OF_TIME)
        self.is_full = self.is_full or self.count >= limit


class AuthFailures:
    """The failed attempts of one address.

    `limit` is how many it may have in `period` seconds, `path` that of the table; `tell` takes
    words for the log where the table can not be used.
    """

    def __init__(
        self, path: bytes, ip: bytes, limit: int, period: int, tell: Callable[[str], None]
    ) -> None:
        self.path = path
        self._who = network(ip)
        self.limit = limit
        self.period = period
        self._tell = tell

    def are_too_many(self) -> bool:
        """Whether the limit is reached, so that no attempt should be made."""
        return self._use(fcntl.LOCK_SH, self._find) >= self.limit

    def end(self, has_failed: bool) -> bool:
        """An attempt has ended: count it, if it has failed; False where the limit was reached
        meanwhile, so that nobody should hear of its outcome.
        """
        if has_failed:
            return self._use(fcntl.LOCK_EX, self._count) < self.limit
        return not self.are_too_many()

    def _use(self, lock: int, act: Callable[[int, int, bytes], int]) -> int:
        """Act on the open table, the place of the address' set and its mark; 0 without success."""
        if self._who is None:
            return 0
        try:
            descriptor = os.open(self.path, _FLAGS, 0o600)
            try:
                _lock(descriptor, lock)
                return act(descriptor, *_place(self._who, _key(descriptor)))
            finally:
                os.close(descriptor)
        except (OSError, ValueError, struct.error) as error:  # a NUL in its name; an odd clock
            why = getattr(error, "strerror", None) or str(error)
            name = os.fsdecode(self.path)
            self._tell(f"failed auth attempts not counted: {name}: {why} (uid {os.geteuid()})")
            self._who = None  # told once is enough
            return 0

    def _read(self, descriptor: int, place: int) -> list[Slot]:
        octets = os.pread(descriptor, WAYS * _SLOT.size, place)
        return [Slot(*fields) for fields in _SLOT.iter_unpack(octets)]

    def _find(self, descriptor: int, place: int, mark: bytes) -> int:
        """How many failures there are."""
        now = int(time.time())
        slots = self._read(descriptor, place)
        return max((slot.count for slot in slots if slot.is_of(mark, now)), default=0)

    def _count(self, descriptor: int, place: int, mark: bytes) -> int:
        """Count one more, up to the limit; how many there were."""
        now = int(time.time())
        number, slot = min(
            enumerate(self._read(descriptor, place)), key=lambda each: each[1].worth(mark, now)
        )
        if not slot.is_of(mark, now):
            if slot.is_live(now) and slot.is_full:
                return 0
            slot = Slot(mark, now)
        before = slot.count
        if before < self.limit:
            slot.add(self.limit, self.period)
            os.pwrite(descriptor, slot.pack(), place + number * _SLOT.size)
        return before


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def network(ip: bytes) -> bytes | None:
    """The octets that stand for a client in the table; None where the text is no address."""
    text = ip.decode("latin-1").partition("%")[0]
    try:
        if ":" not in text:
            return inet_pton(AF_INET, text)
        octets = inet_pton(AF_INET6, text)
    except OSError:
        return None
    return octets[12:] if octets.startswith(_MAPPED) else octets[:_NETWORK]


def _lock(descriptor: int, kind: int) -> None:
    """Lock the file, or raise OSError when that takes too long."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EWOULDBLOCK, "somebody keeps it locked") from None
            time.sleep(0.002)
        else:
            return


def _key(descriptor: int) -> bytes:
    """The key in the header of the table, which is made if the file is new; raises OSError."""
    size, header = _look(descriptor)
    if _is_new(size, header):
        _lock(descriptor, fcntl.LOCK_EX)
        size, header = _look(descriptor)  # somebody may have made it meanwhile
        if _is_new(size, header):
            size, header = SIZE, _MAGIC + os.urandom(_KEY)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, header, 0)
    if size != SIZE or not header.startswith(_MAGIC):
        raise OSError(errno.EINVAL, "not a table of failed attempts; remove it, or name another")
    return header[len(_MAGIC) :]


def _look(descriptor: int) -> tuple[int, bytes]:
    """The size of the file, and its header; raises OSError, too, where it is no file."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a file")
    return found.st_size, os.pread(descriptor, len(_MAGIC) + _KEY, 0)


def _is_new(size: int, header: bytes) -> bool:
    """Whether the file is empty; or it has its size, and no header: when it was made the disk was
    full, or the power went.
    """
    return size in (0, SIZE) and not any(header)


def _place(who: bytes, key: bytes) -> tuple[int, bytes]:
    """The place of a client's set in the file, and its mark."""
    digest = blake2b(who, key=key, digest_size=4 + _MARK).digest()
    number = int.from_bytes(digest[:4], "big") % SETS
    return _HEADER + number * WAYS * _SLOT.size, digest[4:]
