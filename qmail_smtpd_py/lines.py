"""What came from the client and was not read yet: lines, in bounded memory, or all of it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class LineTooLong(Exception):
    """A line had more octets than its limit; it was thrown away, up to its end."""


class Unread:
    """Octets in the order they came, taken out a line at a time, or all at once."""

    __slots__ = ("_at", "_octets", "_too_long")

    def __init__(self) -> None:
        self._octets = b""
        self._at = 0  # what stands before was taken
        self._too_long = False  # the start of a line was thrown away

    def add(self, data: bytes) -> None:
        """Put octets behind those that are there."""
        if data:
            self._octets = self._octets[self._at :] + data
            self._at = 0

    def take(self) -> bytes:
        """All there is."""
        data = self._octets[self._at :]
        self.discard()
        return data

    def discard(self) -> None:
        """Forget all there is."""
        self._octets, self._at = b"", 0

    def starts_with(self, starts: Mapping[bytes, tuple[bytes, ...]]) -> bool:
        """Whether what is there starts with one of these, which go by their first two octets."""
        longer = starts.get(self._octets[self._at : self._at + 2])
        return longer is not None and self._octets.startswith(longer, self._at)

    def starts_with_verb(self, verb: bytes) -> bool:
        """Whether what is there starts with this verb, in letters of either case."""
        return self._octets[self._at : self._at + len(verb)].upper() == verb

    def is_empty(self) -> bool:
        """Whether nothing is there, not even the start of a line."""
        return self._at == len(self._octets) and not self._too_long

    def line(self, limit: int) -> bytes | None:
        """The next line, or None if it is not all there; raises LineTooLong at its end.

        qmail: a line ends with LF; one CR before it belongs to the line end.  Of a line that is
        longer than `limit` octets no more than that is kept.
        """
        end = self._octets.find(b"\n", self._at)
        if end < 0:
            if len(self._octets) - self._at > limit + 1:  # one may be the CR of the line end
                self._too_long = True
                self.discard()
            return None
        line = self._octets[self._at : end]
        self._at = end + 1
        if line.endswith(b"\r"):
            line = line[:-1]
        if self._too_long or len(line) > limit:
            self._too_long = False
            raise LineTooLong
        return line
