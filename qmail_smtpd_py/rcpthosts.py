"""rcpthosts and morercpthosts.cdb: the domains that mail is taken for (qmail-smtpd(8)).

An entry that starts with a dot stands for all subdomains.  Without rcpthosts every recipient is
allowed, and an address without a domain always is.
"""

from __future__ import annotations

import os

from .cdb import CdbError, contains
from .control import open_file, read_list, unusable
from .effects import ControlError
from .path import domain_of

_MORE = "morercpthosts.cdb"


class RcptHosts:
    """The lists as they are when the session starts.  `close` gives the descriptor back."""

    __slots__ = ("_domains", "_more")

    def __init__(self) -> None:
        domains = read_list("rcpthosts")
        self._domains = None if domains is None else {domain.lower() for domain in domains}
        self._more = None if domains is None else open_file(_MORE)

    def allows(self, recipient: bytes) -> bool:
        """Whether mail for the recipient is taken from anybody; raises ControlError."""
        domain = domain_of(recipient)
        if self._domains is None or domain is None:
            return True
        entries = _entries_for(domain.lower())
        if any(entry in self._domains for entry in entries):
            return True
        return self._more is not None and any(_is_in_more(self._more, entry) for entry in entries)

    def close(self) -> None:
        """Close morercpthosts.cdb."""
        if self._more is not None:
            os.close(self._more)
            self._more = None


def _entries_for(domain: bytes) -> list[bytes]:
    """The entries that would allow a domain: itself, and what follows it from each dot on."""
    dots = (at for at in range(1, len(domain)) if domain[at : at + 1] == b".")
    return [domain, *(domain[at:] for at in dots)] if domain else []


def _is_in_more(descriptor: int, entry: bytes) -> bool:
    try:
        return contains(descriptor, entry)
    except OSError as error:
        raise unusable(_MORE, error) from None
    except CdbError as error:
        raise ControlError(f"cannot use control/{_MORE}: {error}; run qmail-newmrh") from None
