"""Mail data: from the octets between 354 and the closing dot to a message as qmail-queue wants it.

What it does (RFC 5321 sections 2.3.8, 4.1.1.4 and 4.5.2):

    line ends      CR LF becomes LF; every other CR stays
    transparency   a dot at the start of a line is taken off; qmail: not where a CR follows it
    closing dot    only CR LF . CR LF is the end; what follows it is left to the caller
    stray newline  a LF without its CR ends everything: whatever takes it for a line end could be
                   made to see two messages where there is one
    hops           Received and Delivered lines of the header are counted

How: whole chunks go through a few passes in C, never octet by octet.  A chunk that ends inside of
what could become CR LF . CR LF keeps that tail back until more is known, and a message starts as
if a CR LF stood before it, so that the first line is a line like any other.
"""

from __future__ import annotations

from _io import IncrementalNewlineDecoder  # io takes longer to import, from Python 3.14 on

_LINE_WITH_DOT = b"\r\n."
_END = b"\r\n.\r\n"
_HEADER_END = b"\r\n\r\n"
_HOPS = (b"\r\nreceived", b"\r\ndelivered")
_LONGEST_HOP = max(map(len, _HOPS))

# Had from glibc's malloc and given back: from now on twice as much stays at the end of the heap
# (mallopt(3), M_TRIM_THRESHOLD), which would shrink and grow again with each chunk of a large
# message otherwise, and that is a quarter of its time.
try:
    bytes(1 << 18)
except MemoryError:
    pass


class MailData:
    """Reader of one message.

    After each `receive`: `complete` tells that the closing dot was read, `rest` has what came
    behind it, `stray_newline` tells that the session must end.  `size` counts the octets returned,
    `hops` the lines that tell of a hop.
    """

    __slots__ = (
        "_decoder",
        "_header_tail",
        "_held",
        "_in_header",
        "_started",
        "complete",
        "hops",
        "rest",
        "size",
        "stray_newline",
    )

    def __init__(self) -> None:
        self.complete = False
        self.stray_newline = False
        self.rest = b""
        self.size = 0
        self.hops = 0
        self._started = False
        self._held = b"\r\n"
        self._in_header = True
        self._header_tail = b""
        self._decoder = IncrementalNewlineDecoder(None, translate=True)

    def receive(self, data: bytes) -> bytes:
        """Take in the next octets, whole or in any pieces; what they add to the message."""
        text = self._held + data
        dot = text.find(_LINE_WITH_DOT)
        end = text.find(_END, dot) if dot >= 0 else -1
        if end >= 0:
            body = text[: end + 2]
            self.complete, self.rest, self._held = True, text[end + len(_END) :], b""
        else:
            keep = _unfinished(text)
            body = text[: len(text) - keep]
            self._held = text[len(text) - keep :]
        if self._in_header:
            self._count_hops(body)
        return self._message(body, has_dots=0 <= dot <= len(body) - len(_LINE_WITH_DOT))

    def _message(self, body: bytes, has_dots: bool) -> bytes:
        """The octets of the message that stand in whole lines and pieces of lines, some of which
        begin with a dot if it `has_dots`.
        """
        decoder = self._decoder
        text = decoder.decode(body.decode("latin-1"), final=True)
        if decoder.newlines in ("\r\n", None):
            if has_dots:
                text = text.replace("\n.", "\n")
            message = text.encode("latin-1")
        else:
            decoder.reset()
            message = self._uneven_message(body)
        if not self._started and message:
            message = message[1:]  # the CR LF that no client sent
            self._started = True
        self.size += len(message)
        return message

    def _uneven_message(self, body: bytes) -> bytes:
        """The same where CR or LF stand alone."""
        if body.count(b"\n") != body.count(b"\r\n"):
            self.stray_newline = True
            self.complete = False
            return b""
        first, *lines = body.replace(b"\r\n", b"\n").split(b"\n.")
        kept = (b"\n." + line if line.startswith(b"\r") else b"\n" + line for line in lines)
        return first + b"".join(kept)

    def _count_hops(self, body: bytes) -> None:
        """Count the lines of the header that say the message has passed a host."""
        text = self._header_tail + body
        end = text.find(_HEADER_END)
        header = text if end < 0 else text[: end + 2]
        header = header.lower()
        known = len(self._header_tail)
        for hop in _HOPS:
            # Those that lie in the tail as a whole were counted when it came.
            self.hops += header.count(hop, max(0, known - len(hop) + 1))
        self._in_header = end < 0
        self._header_tail = text[1 - _LONGEST_HOP :]


def _unfinished(text: bytes) -> int:
    """How many octets at the end of the text may be the start of what ends the message."""
    for length in range(len(_END) - 1, 0, -1):
        if text.endswith(_END[:length]):
            return length
    return 0
