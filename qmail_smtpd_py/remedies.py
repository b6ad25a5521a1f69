"""What to do about a line that qmail-smtpd writes to its log.

qmail-smtpd-check makes a session and reads what the program says of it, so its findings are those
of the code that serves.  docs/log.md has the same remedies, with more words.
"""

from __future__ import annotations

import os
import re

from .rights import group_name, obstacle, user_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .findings import Report

_SECRET = re.compile(r"(servercert.*\.pem|smtpusers)$")
"""Control files that not everybody is to read: keys, passwords."""

MEMORY = "a higher limit for softlimit in the run file: 64 MB (-m 64000000) are enough"

_REMEDIES = (
    (
        r"^(ModuleNotFound|FileNotFound|Permission)Error .*can it not read the program",
        "program-unreadable",
        "chmod -R a+rX for what make install made, or make install again",
    ),
    (
        r"written and executed",
        "execmem",
        "take MemoryDenyWriteExecute= out of the unit; under SELinux allow execmem",
    ),
    (r"memory limit|out of memory|MemoryError|failed to map|Cannot allocate", "memory", MEMORY),
    (r"cannot change to", "no-home", "QMAILHOME in the run file; chmod a+x for its directories"),
    (r"neither control/me", "no-me", "write the host's name into control/me; look at QMAILHOME"),
    (r"morercpthosts\.cdb", "morercpthosts-damaged", "run qmail-newmrh"),
    (r"cannot use .*: the file is", "rules-damaged", "compile them again by tcprules"),
    (
        r"no private key in it",
        "no-key",
        "append the key to the certificates: cat privkey.pem fullchain.pem > servercert.pem",
    ),
    (
        r"mismatch",
        "key-mismatch",
        "put the key of the server's certificate into it, and that certificate before its issuers'",
    ),
    (r"passphrase", "key-passphrase", "take it off: openssl pkey -in key.pem -out plain.pem"),
    (r"is not installed", "not-installed", "make install again"),
    (r"key too small|md too weak", "certificate-weak", "get a certificate with a key of 2048 bits"),
    (r"tlsminversion", "tls-minimum", "write 1.2 or 1.3"),
    (r"no such cipher|no ciphers", "ciphers", "correct it; `openssl ciphers -v ALL` shows names"),
    (
        r"clientcrl",
        "crl-unusable",
        "get the file anew: it has to be one PEM list for each authority",
    ),
    (
        r"too many authorities",
        "clientca-too-many",
        "leave in it those of the clients in tlsclients",
    ),
    (r"clientca", "clientca-unusable", "mend or remove it: one PEM certificate for each authority"),
    (r"dh2048", "dh-unusable", "openssl dhparam -out control/dh2048.pem 2048, or remove it"),
    (r"no help from", "no-helper", "start the listener's helper, as the same user"),
    (r"servercert", "certificate-unusable", "make cert, or put the file together anew"),
)
"""What an error line matches, the code of the problem, and what to do."""

_GOES_ON = re.compile("no such cipher|dh2048|no help from|too many authorities")
"""Where a session goes on as well as it would without what is wrong."""

_UNREADABLE = re.compile(r"cannot read (?:control/)?(\S+?)(?:: )")
_MISSING_RIGHT = re.compile(r"(control/\S+?): (Permission denied)")


def explain(why: str, report: Report) -> None:
    """Put the problem that an error line tells of into the report."""
    tell = report.warning if _GOES_ON.search(why) else report.error
    unreadable = _UNREADABLE.search(why) or _MISSING_RIGHT.search(why)
    if unreadable and "memory" not in why:
        name = unreadable[1]
        path = name if name.startswith(("/", "control/")) else f"control/{name}"
        tell("unreadable", why, remedy_for_reading(path), obstacle(path))
        return
    for pattern, code, remedy in _REMEDIES:
        if re.search(pattern, why):
            tell(code, why, remedy)
            return
    report.error("program", why, "docs/log.md has the causes of what the log says")


def remedy_for_reading(path: str) -> str:
    """How to let this process's user read a file, and nobody else if it is secret."""
    barrier = obstacle(path)
    if "may not be entered" in barrier:
        return f"chmod a+x {barrier.partition(' ')[0]}"
    whole = os.path.abspath(path)
    if not os.path.lexists(path):
        if path.endswith(".cdb"):
            return f"tcprules {path} {path}.tmp < {path.removesuffix('.cdb')}"
        return f"make {whole}, or take its name out"
    if not os.path.isfile(path):
        return f"{whole} is not a file: put one in its place"
    if _SECRET.search(path):
        return remedy_for_a_secret(whole)
    return f"chmod a+r {whole}"


def remedy_for_a_secret(path: str) -> str:
    """How to let this process's user alone read a file, and its group if that is qmail's.

    The user, not its group: that is nofiles, as a rule, whose members are to own no files.  But
    whose it is already, unless that is root, has a service of his own that reads it.
    """
    if os.stat(path).st_uid in (0, os.geteuid()):
        return f"chown {user_name(os.geteuid())} {path}; chmod 640 {path}"
    return f"chgrp {group_name(os.getegid())} {path}; chmod 640 {path}"
