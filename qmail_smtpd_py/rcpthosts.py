"""rcpthosts and morercpthosts.cdb: the domains that mail is taken for (qmail-smtpd(8)).

An entry that starts with a dot stands for all subdomains.  Without rcpthosts every recipient is
allowed, and an address without a domain always is.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py

from . import cdb  # not a name of it: see Program.late in launcher.py
from .control import entries, unusable
from .effects import ControlError
from .path import domain_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .control import ControlFiles

_MORE = "morercpthosts.cdb"

_LONGEST_DOMAIN = 255  # octets (RFC 1035 section 2.3.4)
_MOST_PARENTS = 20  # labels of an entry for subdomains; more than IPv6's networks have


class RcptHosts:
    """The lists as they are when the session starts; raises ControlError.  `close` gives the
    descriptor back.
    """

    __slots__ = ("_domains", "_more")

    def __init__(self, files: ControlFiles) -> None:
        self._domains = files.load("rcpthosts", _domains)
        if self._domains is None and not files.lacks("rcpthosts"):
            # Where it is not there, everybody may relay: let nobody, as long as that is not sure.
            raise ControlError("control/rcpthosts is not there, or not yet: try again")
        self._more = None if self._domains is None else files.open(_MORE)

    def allows(self, recipient: bytes) -> bool:
        """Whether mail for the recipient is taken from anybody; raises ControlError."""
        domain = domain_of(recipient)
        if self._domains is None or domain is None:
            return True
        keys = _keys_for(domain.lower())
        if not self._domains.isdisjoint(keys):
            return True
        if self._more is None:
            return False
        # Each takes a hash, which would be work without an end where somebody sends many dots.
        likely = [*keys[:1], *keys[1:][-_MOST_PARENTS:]]
        return any(_is_in_more(self._more, key) for key in likely if len(key) <= _LONGEST_DOMAIN)

    def close(self) -> None:
        """Close morercpthosts.cdb."""
        if self._more is not None:
            os.close(self._more)
            self._more = None


def _domains(text: bytes | None) -> frozenset[bytes] | None:
    listed = entries(text)
    return None if listed is None else frozenset(domain.lower() for domain in listed)


def _keys_for(domain: bytes) -> list[bytes]:
    """The entries that would allow a domain: itself, and what follows it from each dot on."""
    keys = [domain] if domain else []
    dot = domain.find(b".", 1)
    while dot > 0:
        keys.append(domain[dot:])
        dot = domain.find(b".", dot + 1)
    return keys


def _is_in_more(descriptor: int, key: bytes) -> bool:
    try:
        return cdb.has(descriptor, key)
    except OSError as error:
        raise unusable(_MORE, error) from None
    except cdb.CdbError as error:
        raise ControlError(f"cannot use control/{_MORE}: {error}; run qmail-newmrh") from None
