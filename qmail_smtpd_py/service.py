"""The service that workers are for: what is served, and to whom."""

from __future__ import annotations

from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .proxyprotocol import Peers
    from .smtpd import Resources
    from .tcpenviron import LookUps
    from .tcprules import Rules


class Service(NamedTuple):
    """What is served, and to whom; all of it is there before the first worker is forked.

    `limit` is the number of connections at a time, for the log; `complain` takes words for it.
    """

    environ: Mapping[bytes, bytes]
    arguments: Sequence[bytes]
    resources: Resources
    look_ups: LookUps
    rules: Rules | None
    proxies: Peers | None
    banner: bytes
    keep_ip_options: bool
    limit: int
    is_verbose: bool
    complain: Callable[[str], None]
