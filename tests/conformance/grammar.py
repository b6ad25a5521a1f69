"""The grammar of replies (RFC 5321 section 4.2.1), as strict as it stands there.

    Reply-line = *( Reply-code "-" [ textstring ] CRLF ) Reply-code [ SP textstring ] CRLF
    Reply-code = %x32-35 %x30-35 %x30-39
    textstring = 1*(%d09 / %d32-126)

and section 4.5.3.1.5: no line is longer than 512 octets; and all lines of a reply have one code.
The only blank that may end a reply is that of an empty challenge (RFC 4954 section 4):

    continue-req = "334" SP [base64] CRLF
"""

from __future__ import annotations

import re

_TEXT = rb"[\t -~]+"
_LAST = re.compile(rb"(?:334 |[2-5][0-5][0-9](?: " + _TEXT + rb")?)\r\n")
_MORE = re.compile(rb"[2-5][0-5][0-9]-(?:" + _TEXT + rb")?\r\n")
_LONGEST = 512


def replies(octets: bytes) -> list[str]:
    """The replies that the octets are, lines parted by LF; raises ValueError where they are not."""
    found, lines, at = [], [], 0
    while at < len(octets):
        line = _LAST.match(octets, at) or _MORE.match(octets, at)
        if not line or len(line[0]) > _LONGEST:
            raise ValueError(f"no reply line: {octets[at : at + 80]!r}")
        if lines and lines[0][:3] != line[0][:3]:
            raise ValueError(f"two codes in a reply: {lines[0]!r}, {line[0]!r}")
        lines.append(line[0][:-2])
        at = line.end()
        if line.re is _LAST:
            found.append(b"\n".join(lines).decode("ascii"))
            lines = []
    if lines:
        raise ValueError(f"the reply has no last line: {lines!r}")
    return found


def split(octets: bytes) -> list[str]:
    """The replies, parted, whatever stands in them; a name that an administrator left empty too."""
    lines = re.findall(rb"((?:\d\d\d-[^\n]*\r\n)*[^\n]*)\r\n", octets)
    return [line.replace(b"\r\n", b"\n").decode("latin-1") for line in lines]


def codes(octets: bytes) -> list[int]:
    """The codes of the replies that the octets are."""
    return [int(reply[:3]) for reply in replies(octets)]
