"""The listener's service directories under daemontools, at their own ports of an own address."""

from __future__ import annotations

import re

from e2e.log import Log
from e2e.service import RULES, ShippedService

from .world import address

PORTS = {"listen-smtp": 25, "listen-submission": 587, "listen-smtps": 465}


class ShippedListener(ShippedService):
    """One of run/listen-*, as root starts it: it gives its rights up after it has its port."""

    def __init__(self, home: object, name: str) -> None:
        super().__init__(home, name)
        self.address = address()
        self.rules = self._compile(RULES)

    def _on_this_host(self, text: str) -> str:
        text = super()._on_this_host(text)
        options = rf"qmail-smtpd-listen -1 -H -v \1 {self.address} \2"
        return re.sub(r"qmail-smtpd-listen -v (.*) 0 (\d+)", options, text)

    @property
    def pid(self) -> int:
        """The process that supervise started."""
        status = (self.directory / "supervise" / "status").read_bytes()
        return int.from_bytes(status[12:16], "little")


class ShippedHelper(ShippedService):
    """run/listen-helper; `socket` is where it listens."""

    def __init__(self, home: object) -> None:
        super().__init__(home, "listen-helper")
        self.socket = home.path / "helping" / "tls"

    def _on_this_host(self, text: str) -> str:
        text = super()._on_this_host(text).replace("/var/run/qmail-smtpd", str(self.socket.parent))
        return text.replace("qmail-smtpd-listen -c", "qmail-smtpd-listen -v -c")

    def _read_log(self, process: object) -> None:
        self.log = Log(process.stdout)
        self.log.wait_for(r"qmail-smtpd-listen: status: 0/")

