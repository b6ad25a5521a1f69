"""What qmail-smtpd-check says of who may send what: rules, rcpthosts, and open relays."""

from __future__ import annotations

import os
import re

from .cdb import CdbError, find
from .check_auth import examine_variables
from .findings import counted
from .tcprules import instructions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .findings import Report
    from .subject import Subject

_DOMAIN = re.compile(rb"[\w.:\[\]-]+", re.ASCII)
_SENDER = re.compile(rb"[^\s*]*@[\w.:\[\]-]*", re.ASCII)

_HEADER = 2048  # octets before the first record (cdb(5))
_SHOWN = 6

_RELAY_BY_RULES = "set RELAYCLIENT in the rules, for your own addresses only"


def examine(subject: Subject, report: Report) -> None:
    """Say who may relay, and look for a relay that is open."""
    _tell_of_rules(subject, report)
    _examine_lists(subject, report)
    auth = subject.server.settings.auth
    must_authenticate = auth.required and bool(auth.mechanisms)
    relays = subject.environ.get(b"RELAYCLIENT")
    if relays is not None and subject.is_open and not must_authenticate:
        where = "the rule for everybody" if b"RELAYCLIENT" in (subject.default_rule or {}) else "it"
        what = f"{where} sets RELAYCLIENT: everybody may send to everywhere, an open relay"
        report.error("open-relay", what, _RELAY_BY_RULES)
    if "rcpthosts" not in subject.files.found and "rcpthosts" not in subject.files.unreadable:
        _tell_of_no_rcpthosts(subject, must_authenticate, report)


def _tell_of_no_rcpthosts(subject: Subject, must_authenticate: bool, report: Report) -> None:
    if must_authenticate or not subject.is_open:
        who = "who has authenticated" if must_authenticate else "who may connect"
        report.fact("rcpthosts", f"none: {who} sends to everywhere")
        return
    what = (
        "control/rcpthosts is not there: mail from everybody to everywhere is taken, an open relay"
    )
    path = subject.path("control/rcpthosts")
    report.error("no-rcpthosts", what, f"write the domains that you take mail for into {path}")


# The lists


def _examine_lists(subject: Subject, report: Report) -> None:
    files = subject.files
    domains = files.list("rcpthosts")
    if domains is not None:
        report.fact("rcpthosts", _some(domains), domains=len(domains))
        _examine_entries("rcpthosts", domains, _DOMAIN, "a domain a line, and nothing else", report)
    _examine_more(subject, report)
    senders = files.list("badmailfrom")
    if senders:
        report.fact("badmailfrom", _some(senders), senders=len(senders))
        wanted = "an address, or @ and a domain, a line"
        _examine_entries("badmailfrom", senders, _SENDER, wanted, report)


def _examine_entries(
    name: str, entries: list[bytes], pattern: re.Pattern[bytes], wanted: str, report: Report
) -> None:
    """Tell of entries that can not match any address, as they are not what an entry is."""
    odd = [entry for entry in entries if not pattern.fullmatch(entry)]
    if not odd:
        return
    more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
    what = f"control/{name}: {os.fsdecode(odd[0])!a}{more} can not match: {wanted}"
    remedy = f"mend control/{name}"
    if any(entry.endswith(b"\r") for entry in odd):
        remedy = f"take the carriage returns off: sed -i 's/\\r$//' control/{name}"
    report.warning("control-entry", what, remedy)


def _some(entries: list[bytes]) -> str:
    """How many there are, and the first of them."""
    first = " ".join(os.fsdecode(entry) for entry in entries[:_SHOWN])
    more = " ..." if len(entries) > _SHOWN else ""
    return f"{len(entries)}: {first}{more}" if entries else "empty: no domain"


def _examine_more(subject: Subject, report: Report) -> None:
    """morercpthosts.cdb: whether it is whole, and has what morercpthosts has."""
    run = "run qmail-newmrh"
    source = subject.files.list("morercpthosts")
    descriptor = subject.files.open("morercpthosts.cdb")
    if descriptor is None:
        if source and "morercpthosts.cdb" not in subject.files.unreadable:
            what = "control/morercpthosts is there, and morercpthosts.cdb, which counts, is not"
            report.warning("morercpthosts-stale", what, run)
        return
    try:
        compiled = {key for key, _ in records(descriptor)}
    except (CdbError, OSError) as error:
        report.error("morercpthosts-damaged", f"cannot use control/morercpthosts.cdb: {error}", run)
        return
    finally:
        os.close(descriptor)
    report.fact("more hosts", f"{len(compiled)} in morercpthosts.cdb", domains=len(compiled))
    if "rcpthosts" not in subject.files.found:
        what = "control/morercpthosts.cdb does not count, as there is no control/rcpthosts"
        report.warning("morercpthosts-alone", what, "write control/rcpthosts; it may be empty")
    if source is not None and {domain.lower() for domain in source} != compiled:
        what = "control/morercpthosts.cdb does not have what control/morercpthosts has"
        report.warning("morercpthosts-stale", what, run)


def records(descriptor: int) -> Iterator[tuple[bytes, bytes]]:
    """The records of a constant database, each found as a program finds it; raises CdbError."""
    size = os.fstat(descriptor).st_size
    octets = os.pread(descriptor, size, 0)
    if size < _HEADER:
        raise CdbError("the file is cut off")
    end = min(int.from_bytes(octets[at : at + 4], "little") for at in range(0, _HEADER, 8))
    at = _HEADER
    while at < end:
        key_end = at + 8 + int.from_bytes(octets[at : at + 4], "little")
        data_end = key_end + int.from_bytes(octets[at + 4 : at + 8], "little")
        key = octets[at + 8 : key_end]
        if data_end > end or find(descriptor, key) is None:
            raise CdbError("the file is damaged")
        yield key, octets[key_end:data_end]
        at = data_end


# The rules of tcpserver


def _tell_of_rules(subject: Subject, report: Report) -> None:
    path = subject.chain.rules
    if path is None:
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if subject.chain.is_rules_file_optional and not os.path.exists(path):
            report.fact("rules", f"none ({path} is not there, and -X is given)")
        return  # otherwise Rules has told
    try:
        found = [(os.fsdecode(key), instructions(data)) for key, data in records(descriptor)]
    except (CdbError, OSError) as error:
        if not report.has("rules-damaged"):
            report.error("rules-damaged", f"{path}: {error}", "compile them again by tcprules")
        return
    finally:
        os.close(descriptor)
    relays = [key for key, sets in found if sets is not None and b"RELAYCLIENT" in sets]
    denied = sum(sets is None for _, sets in found)
    default = "are turned away" if subject.default_rule is None else "may connect"
    deny = f"{denied} of which {'denies' if denied == 1 else 'deny'}"
    text = f"{path}: {counted(len(found), 'rule')}, {deny}; all others {default}"
    report.fact("rules", text, rules=len(found))
    _tell_of_relays(relays, subject, report)
    for key, sets in found:
        if sets and key:  # what is for everybody is looked at in the environment
            examine_variables(sets, f"{path}: {key}: ", report)
    _examine_age(path, report)


def _tell_of_relays(relays: list[str], subject: Subject, report: Report) -> None:
    """Who may relay by the rules; what is for everybody is looked at in the environment."""
    report.fact(
        "relaying", " ".join(key or ":" for key in relays) or "no address", addresses=relays
    )
    if "=" in relays and not subject.server.settings.auth.required:
        what = "the rule = sets RELAYCLIENT: whoever has a name in DNS may send to everywhere"
        report.error("open-relay", what, _RELAY_BY_RULES, "it counts unless the server has -H")


def _examine_age(path: str, report: Report) -> None:
    source = path.removesuffix(".cdb") if path.endswith(".cdb") else ""
    try:
        is_older = os.stat(path).st_mtime_ns < os.stat(source).st_mtime_ns
    except OSError:
        return
    if is_older:
        what = f"{path} is older than {source}: what was changed there does not count yet"
        report.warning("rules-stale", what, f"tcprules {path} {source}.tmp < {source}")
