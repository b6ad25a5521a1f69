"""The users file: what checkpassword-users knows of users, and qmail-smtpd-users keeps.

A line for each user, in octets; lines that begin with `#` and empty lines are left alone:

    user:PASSWORDHASH
    user:PASSWORDHASH:CRAMSECRET

    user            UTF-8, all of it printable, neither empty nor beginning with `#`, no colon
    PASSWORDHASH    $scrypt$ln=14,r=8,p=5$salt$hash, the PHC string form: scrypt (RFC 7914) with
                    N = 2^ln, salt and hash in base64 without padding
    CRAMSECRET      the password itself, in base64, so that it may have any octet

CRAM-MD5 (RFC 2195) can not be checked without the password, so CRAMSECRET is there only for those
users for whom the administrator asks for it.  The file is as secret as what is in it: one that
others could read or write is refused, with the command that mends it.  A file with a line that is
wrong is refused as a whole, because what was meant by it can not be known.

The file is never changed in place.  Under a lock, a new one is written beside it, with the same
owner and mode, and renamed over it, so that a reader sees the old users or the new ones.
"""

from __future__ import annotations

import _hashlib  # noqa: F401  Without it, for want of memory, hashlib would go on, and log why.
import hashlib
import hmac
import os
import stat
from binascii import a2b_base64, b2a_base64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_LIMIT = 64 * 1024 * 1024
"""Octets of memory that a password hash in the file may ask for."""


class Trouble(Exception):
    """The users file can not be used; the text names the file, the user id, and what to do, which
    is the `remedy`.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class Absent(Trouble):
    """There is no users file."""


class PasswordHash:
    """An scrypt hash of a password; the default costs are 16 MiB of memory and 0.2 s."""

    __slots__ = ("digest", "ln", "p", "r", "salt")

    def __init__(self, salt: bytes, digest: bytes, ln: int = 14, r: int = 8, p: int = 5) -> None:
        self.salt = salt
        self.digest = digest
        self.ln = ln
        self.r = r
        self.p = p

    @classmethod
    def of(cls, password: bytes) -> PasswordHash:
        """A new hash of a password, with a salt of its own."""
        blank = cls(os.urandom(16), bytes(32))
        return cls(blank.salt, blank.derive(password))

    @classmethod
    def parse(cls, text: bytes) -> PasswordHash:
        """The hash in a PHC string; raises ValueError if it is malformed, or out of bounds."""
        _, _, costs, salt, digest = text.split(b"$")
        ln, r, p = (int(cost.rpartition(b"=")[2]) for cost in costs.split(b","))
        parsed = cls(a2b_base64(salt + b"=="), a2b_base64(digest + b"=="), ln, r, p)
        bounded = 1 <= ln <= 20 and 1 <= p <= 16 and r > 0
        # Beside the 2**ln blocks there are p, more than once: these are to be few.
        bounded = bounded and 128 * r * max(1 << ln, 16 * p) <= MEMORY_LIMIT
        if not (bounded and len(parsed.salt) >= 8 and 16 <= len(parsed.digest) <= 64):
            raise ValueError("cost or length out of bounds")
        return parsed

    def render(self) -> bytes:
        """The PHC string of the hash."""
        salt, digest = (base64(octets).rstrip(b"=") for octets in (self.salt, self.digest))
        return b"$scrypt$ln=%d,r=%d,p=%d$%s$%s" % (self.ln, self.r, self.p, salt, digest)

    def work(self) -> int:
        """What time it takes, in no unit."""
        return (self.r * self.p) << self.ln

    def matches(self, password: bytes) -> bool:
        """Whether it is the hash of this password; raises Trouble where there is no memory."""
        return hmac.compare_digest(self.derive(password), self.digest)

    def derive(self, password: bytes) -> bytes:
        """What scrypt makes of a password with this salt, these costs and this length."""
        n = 1 << self.ln
        try:
            return hashlib.scrypt(
                password,
                salt=self.salt,
                n=n,
                r=self.r,
                p=self.p,
                maxmem=128 * self.r * (n + self.p + 2),
                dklen=len(self.digest),
            )
        except (ValueError, MemoryError):
            need = 128 * self.r * n >> 20
            raise Trouble(f"scrypt failed: it needs {need} MiB of memory (see softlimit)") from None


class User:
    """A user; `cram_secret` is None where CRAM-MD5 is not to be possible."""

    __slots__ = ("cram_secret", "name", "password_hash")

    def __init__(
        self, name: bytes, password_hash: PasswordHash, cram_secret: bytes | None = None
    ) -> None:
        self.name = name
        self.password_hash = password_hash
        self.cram_secret = cram_secret

    @classmethod
    def parse(cls, line: bytes) -> User:
        """The user in a line; raises ValueError unless it is a line as `render` writes it."""
        name, password_hash, *secrets = line.split(b":")
        cram_secret = a2b_base64(secrets[0]) if secrets else None
        user = cls(checked_name(name), PasswordHash.parse(password_hash), cram_secret or None)
        if user.render() != line:
            raise ValueError("not what it seems to say")
        return user

    def render(self) -> bytes:
        """The user's line, without its end."""
        fields = [self.name, self.password_hash.render()]
        if self.cram_secret is not None:
            fields.append(base64(self.cram_secret))
        return b":".join(fields)


# What an unknown user of an empty file is checked against: the result does not matter.
_NOBODY = User(b"", PasswordHash(bytes(16), bytes(32)))


class UsersFile:
    """The lines of a users file, each a User, or the octets of one that says nothing of users."""

    def __init__(self, text: bytes = b"") -> None:
        """Parse the file; raises ValueError, which names the line but shows nothing of it."""
        self._lines: list[User | bytes] = []
        self.users: dict[bytes, User] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith(b"#"):
                self._lines.append(line)
                continue
            try:
                user = User.parse(line.rstrip(b" \t"))
            except ValueError:
                raise ValueError(f"line {number} is malformed") from None
            if user.name in self.users:
                raise ValueError(f"line {number} has a user that an earlier line has")
            self.put(user)

    def render(self) -> bytes:
        """The file."""
        lines = (line.render() if isinstance(line, User) else line for line in self._lines)
        return b"".join(line + b"\n" for line in lines)

    def put(self, user: User) -> None:
        """Add a user, or put it in the place of the one of that name."""
        old = self.users.get(user.name)
        if old is None:
            self._lines.append(user)
        else:
            self._lines[self._lines.index(old)] = user
        self.users[user.name] = user

    def remove(self, name: bytes) -> None:
        """Remove a user; raises KeyError if there is none of that name."""
        self._lines.remove(self.users.pop(name))

    def accepts_password(self, name: bytes, password: bytes) -> bool:
        """Whether this is the user's password; for a user that is not known it takes as long as for
        those whose hash costs most.
        """
        user = self.users.get(name)
        hashes = (each.password_hash for each in self.users.values())
        costliest = max(hashes, key=PasswordHash.work, default=_NOBODY.password_hash)
        password_hash = user.password_hash if user else costliest
        return password_hash.matches(password) and user is not None

    def accepts_digest(self, name: bytes, challenge: bytes, digest: bytes) -> bool:
        """Whether this is the user's CRAM-MD5 digest, in hexadecimal (RFC 2195 section 2)."""
        user = self.users.get(name)
        secret = user.cram_secret if user else None
        try:
            right = hmac.new(secret or b"", challenge, "md5").hexdigest().encode()
        except ValueError:
            raise Trouble("CRAM-MD5 can not be checked: OpenSSL has no MD5 here") from None
        return hmac.compare_digest(right, digest.lower()) and secret is not None


def checked_name(name: bytes) -> bytes:
    """The name itself, if a user may have it; raises ValueError, whose text says why not."""
    text = name.decode("utf-8")
    if not text or text != text.strip() or text.startswith("#"):
        raise ValueError("it is empty, or begins with '#', or begins or ends with a blank")
    if ":" in text or not text.isprintable():
        raise ValueError("it has a colon or what can not be printed")
    return name


def base64(octets: bytes) -> bytes:
    """The octets in base64 (RFC 4648 section 4)."""
    return b2a_base64(octets, newline=False)


def configured_path() -> str:
    """Where the users file is, relative to the qmail home directory."""
    return os.environ.get("SMTPUSERS") or "control/smtpusers"


def load_configured() -> UsersFile:
    """The users file of a program that runs in the qmail home directory; raises Trouble."""
    return load(configured_path())


def load(path: str) -> UsersFile:
    """The users file at this path; raises Trouble."""
    try:
        # A path may turn out to be a named pipe, and to wait for its writer would be for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            _check_safe(path, os.fstat(descriptor))
            return UsersFile(file.read())
    except FileNotFoundError:
        remedy = "qmail-smtpd-users set USER makes it"
        raise Absent(f"there is no {path!a} (uid {os.geteuid()})", remedy) from None
    except PermissionError:
        name = f"{os.path.abspath(path)!a}"
        remedy = f"chgrp {os.getegid()} {name}; chmod 640 {name}"
        raise Trouble(f"uid {os.geteuid()} may not read {path!a}", remedy) from None
    except OSError as error:
        raise Trouble(f"cannot read {path!a} (uid {os.geteuid()}): {error.strerror}") from None
    except ValueError as error:
        raise Trouble(f"{path!a}: {error}", "mend it, or take it out") from None


def _check_safe(path: str, status: os.stat_result) -> None:
    """Raise Trouble if others can read or write the file, or its group can write it."""
    facts = f"{path!a} (mode {stat.S_IMODE(status.st_mode):04o}, owner uid {status.st_uid})"
    if not stat.S_ISREG(status.st_mode):
        raise Trouble(f"{facts} is not a file")
    if status.st_mode & (stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH):
        remedy = f"chmod g-w,o= {os.path.abspath(path)!a}"
        raise Trouble(f"{facts} is too open for uid {os.geteuid()} to trust it", remedy)


def change(path: str, edit: Callable[[UsersFile], None]) -> None:
    """Edit the users file, or a new one, and put it in place; raises Trouble, and what `edit` does.

    The lock is on a file beside it, `.lock`, which stays: the users file itself is not the same
    file afterwards.
    """
    import fcntl

    path = _followed(path)
    try:
        with open(path + ".lock", "ab", opener=_open_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                users = load(path)
            except Absent:
                users = UsersFile()
            edit(users)
            _replace(path, users.render())
    except OSError as error:
        where = f"{error.filename or path!a} (uid {os.geteuid()})"
        raise Trouble(f"cannot write {where}: {error.strerror}") from None


def _open_private(path: str, flags: int) -> int:
    # The directory may be a service's, and we root: no link of its choice leads us elsewhere.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _followed(path: str) -> str:
    """The path, behind a link if it is one, which may only be ours or root's; raises Trouble."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.islink(path):
        found = os.stat(directory)
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise Trouble(f"{path} is a link, and others can write to {directory}")
    return os.path.realpath(path)


def _replace(path: str, data: bytes) -> None:
    """Put a file in the place of another, on the disk, or leave all as it was; raises OSError."""
    new = path + ".new"
    _remove_file(new)  # A run that was killed may have left it.
    try:
        with open(new, "xb", opener=_open_private) as file:
            _keep_owner_and_mode(path, file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)
    except BaseException:
        _remove_file(new)
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _keep_owner_and_mode(path: str, descriptor: int) -> None:
    """Give a new file the owner, group and mode of the one at `path`, if there is one."""
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return
    new = os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
