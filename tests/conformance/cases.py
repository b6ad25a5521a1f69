"""Cases: each is one SMTP dialogue, with what must come of it; README.md explains the keys.

All texts are of octets, one a character; a key that is not known is an error in the case.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE / "fixtures"

_KEYS = {
    *("name", "about", "deviates", "reference"),
    *("control", "env", "args", "queue", "checkpassword"),
    *("steps", "exit", "eof", "close_notify", "messages", "auth"),
}
_STEP_KEYS = {
    *("send", "chunks", "cram", "starttls", "close", "wait"),
    *("expect", "after", "before", "cipher"),
}


def octets(text: str | list) -> bytes:
    """The octets of a text: a string, or a list of strings and [string, count] pairs."""
    if isinstance(text, str):
        return text.encode("latin-1")
    return b"".join(
        octets(part) if isinstance(part, str) else octets(part[0]) * part[1] for part in text
    )


class Step:
    """One turn of the client, and the replies to it.

    `writes` are the octets it sends, one write each; `handshake` the options of a TLS handshake and
    `outcome` what comes of it; `answer` the user and password for a CRAM-MD5 challenge; `close` and
    `wait` as in the file.  `replies` are to come after it, and not before `after` seconds or behind
    `before`.
    """

    def __init__(self, number: int, raw: dict) -> None:
        unknown = set(raw) - _STEP_KEYS
        assert not unknown, f"step {number}: {unknown}"
        self.number = number
        self.writes = [octets(text) for text in raw.get("chunks", [])]
        if "send" in raw:
            self.writes.insert(0, octets(raw["send"]))
        self.answer: dict | None = raw.get("cram")
        self.close: str | None = raw.get("close")
        self.wait: float = raw.get("wait", 0)
        self.handshake: dict | None = raw.get("starttls")
        self.cipher: str | None = raw.get("cipher")
        self.after: float = raw.get("after", 0)
        self.before: float | None = raw.get("before")
        expect = raw.get("expect", [])
        self.outcome: str = expect if self.handshake is not None else ""
        self.replies = [] if self.handshake is not None else _repeated(expect)

    @property
    def is_silence(self) -> bool:
        """Whether the client lets the time run out."""
        return bool(self.after) and not self.writes

    def __repr__(self) -> str:
        sent = b"".join(self.writes)
        shown = sent if len(sent) <= 60 else sent[:57] + b"..."
        return f"step {self.number} {shown!r}"


def _repeated(replies: list) -> list[str]:
    pairs = ((reply, 1) if isinstance(reply, str) else reply for reply in replies)
    return [reply for reply, count in pairs for _ in range(count)]


class Case:
    """A whole case; the names are those of the file, but for `status`, the exit status."""

    def __init__(self, raw: dict) -> None:
        unknown = set(raw) - _KEYS
        assert not unknown, f"{raw['name']}: {unknown}"
        self.name: str = raw["name"]
        self.control: dict = raw.get("control", {})
        self.env: dict[str, str] = raw.get("env", {})
        self.args: list[str] = raw.get("args", [])
        self.queue: dict | list = raw.get("queue", {"exit": 0})
        self.checkpassword: dict | list = raw.get("checkpassword", {"exit": 0})
        self.steps = [Step(number, step) for number, step in enumerate(raw["steps"], 1)]
        self.status: int = raw["exit"]
        self.eof: bool = raw["eof"]
        self.close_notify: bool | None = raw.get("close_notify")
        self.messages: list[dict] = [_with_octets(message) for message in raw["messages"]]
        self.auth: list[dict] = [_with_octets(check) for check in raw["auth"]]

    @property
    def uses_tls(self) -> bool:
        """Whether OpenSSL is needed to play it."""
        return "servercert.pem" in self.control or "SMTPS" in self.env

    def __repr__(self) -> str:
        return self.name


def _with_octets(record: dict) -> dict:
    texts = {key: octets(record[key]) for key in ("message", "envelope", "fd3") if key in record}
    return {**record, **texts}


def plan_of(plans: dict | list, number: int) -> dict:
    """What the stand-in does in its run of that number, from 1 on."""
    return plans[min(number, len(plans)) - 1] if isinstance(plans, list) else plans


ALL = [
    Case(json.loads(path.read_text("ascii"))) for path in sorted((HERE / "cases").glob("*.json"))
]
"""Every case, in the order of their names."""
