"""What qmail-smtpd-check says of a session as a client has it, and of TLS in it.

Each error line that the program writes to its log in such a session is a problem.
"""

from __future__ import annotations

import os
import re

from . import check_certificates as certificates
from .certificates import BY_NAME, SERVER_CERTIFICATE, named, second
from .remedies import MEMORY, explain, remedy_for_a_secret
from .tls import CLIENT_AUTHORITIES, REVOCATIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography import x509

    from .findings import Report
    from .subject import Subject
    from .trial import Trial

_KEYS = (b"aECDSA", b"aRSA")
"""Ciphers of TLS 1.2 by the key that they need: where there are two certificates, each is seen."""

_WHY = re.compile(r': error (?:.* )?why="?(.*?)"?$')


def examine(subject: Subject, report: Report) -> Trial:
    """Have a session, tell of it, and look at the certificates that came; the session."""
    trial = subject.try_session()
    if os.access(SERVER_CERTIFICATE, os.R_OK):
        subject.files.found.add("servercert.pem")
    for why in _errors(trial.log):
        explain(why, report)
    if trial.greeting:
        offers = trial.tls_offers if subject.server.is_smtps else trial.offers
        report.fact("client sees", f"220 {trial.greeting}; {' '.join(offers[1:])}", offers=offers)
    if trial.failure:
        _tell_of_failure(trial, report)
    if subject.has_tls_in_front:
        _tell_of_sslserver(subject, report)
    elif trial.version:
        _tell_of_tls(subject, trial, report)
    else:
        _tell_of_no_tls(subject, trial, report)
    _examine_clients(subject, report)
    return trial


def _tell_of_sslserver(subject: Subject, report: Report) -> None:
    """TLS that another program does."""
    text = "by sslserver, whose certificate and ciphers were not looked at"
    report.fact("TLS", text, version="", cipher="")
    if not subject.chain.server_flags & {"-n", "-s"}:
        what = "sslserver without -s: qmail-smtpd does not know of TLS, and offers no AUTH"
        report.warning("sslserver", what, "add -s, or -n for STARTTLS")


def _errors(log: Iterable[str]) -> list[str]:
    """What the error lines of a log say."""
    found = [_WHY.search(line) for line in log]
    return [_unescape(match[1]) for match in found if match]


def _unescape(text: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text)


def _tell_of_failure(trial: Trial, report: Report) -> None:
    """A session that did not get to its end."""
    last = [line for line in trial.log if " connect " not in line and " disconnect " not in line]
    cause = " / ".join(_unescape(line.partition("]: ")[2] or line) for line in last[-3:])
    memory = re.search("Memory|memory|failed to map|Cannot allocate|shared librar", cause)
    if _errors(trial.log):  # which are told already, and why
        report.fact("client sees", trial.failure)
        return
    remedy = MEMORY if memory or not trial.log else "docs/log.md has what the log's lines mean"
    status = trial.status or 0
    end = f"exit status {status}" if status >= 0 else f"signal {-status}"
    cause = cause or f"the program wrote nothing to its log, and ended by {end}"
    report.error("session", f"a session fails: {trial.failure}", remedy, cause)


# TLS


def _tell_of_tls(subject: Subject, trial: Trial, report: Report) -> None:
    has_second = os.path.lexists(second(SERVER_CERTIFICATE))
    keys = _KEYS if has_second else (b"",)
    older = [subject.try_session(version="TLSv1.2", ciphers=ciphers) for ciphers in keys]
    seen = {other.chain[0]: other for other in [trial, *older] if other.chain}
    ciphers = {other.version: other.cipher for other in [*older, trial] if other.version}
    versions = [
        f"{version} ({ciphers[version]})" if version in ciphers else f"no {version}"
        for version in ("TLSv1.3", "TLSv1.2")
    ]
    how = "at once (SMTPS)" if subject.server.is_smtps else "by STARTTLS"
    how += ", required (REQUIRETLS)" if subject.server.settings.require_tls else ""
    report.fact("TLS", f"{how}: {', '.join(versions)}", version=trial.version, cipher=trial.cipher)
    if not subject.server.is_smtps:
        offers = " ".join(trial.tls_offers[1:])
        report.fact("under TLS", offers, offers=trial.tls_offers)
    for other in seen.values():
        _tell_of_chain(subject, other, SERVER_CERTIFICATE, report)
    _examine_names(subject, [other.chain[0] for other in seen.values()], report)
    _examine_rights(subject, report)
    if "fixcrio" in subject.chain.wrappers:
        what = "fixcrio stands before qmail-smtpd, and changes what is encrypted: TLS breaks"
        report.error("fixcrio", what, "take it out of the run file, or set DISABLETLS=1")
    for name in _names_by_sni(subject):
        _examine_sni(subject, name, report)


def _tell_of_chain(subject: Subject, trial: Trial, where: str, report: Report) -> None:
    """One certificate, and those that came with it."""
    server = trial.chain[0]
    report.fact(
        "certificate",
        certificates.describe(server),
        file=where,
        names=certificates.host_names(server),
        key=certificates.key_type(server),
        days_left=certificates.days_left(server),
        sent=len(trial.chain),
    )
    certificates.examine_chain(trial.chain, where, report)
    remedy = "a certificate of a public authority, such as Let's Encrypt: README, Certificates"
    if not trial.verify_error:
        report.fact("verified", "yes, with the authorities of this system")
        return
    report.fact("verified", f"no, with the authorities of this system: {trial.verify_error}")
    missing = certificates.missing_issuer(trial.chain)
    if missing and trial.verify_error.startswith("unable to"):
        what = f"{where}: the certificate of its issuer, {missing}, is not in it"
        cause = "clients that do not have it can not verify the server's"
        remedy = "use the file with the whole chain: cat privkey.pem fullchain.pem"
        report.warning("chain-incomplete", what, remedy, cause)
    elif certificates.is_self_signed(server) and subject.server.settings.auth.mechanisms:
        what = f"{where}: it vouches for itself; users' mail programs refuse it, or ask"
        report.warning("self-signed", what, remedy)


def _examine_names(subject: Subject, found: list[x509.Certificate], report: Report) -> None:
    """Whether the certificate is for a name that this host is known by, and has no other for."""
    local = subject.session_environ().get(b"TCPLOCALHOST", b"")
    greeting = subject.server.settings.greeting.partition(b" ")[0]
    candidates = [subject.files.line("me") or b"", local, greeting]
    hosts = [
        os.fsdecode(name)
        for name in dict.fromkeys(candidates)
        if _is_host_name(name) and not any(map(os.path.exists, named(name)))
    ]
    for certificate in found:
        if hosts and not any(certificates.covers(certificate, host) for host in hosts):
            names = ", ".join(certificates.host_names(certificate)) or "no host name"
            what = f"{SERVER_CERTIFICATE} is for {names}, and not for {' or '.join(hosts)}"
            cause = "clients that verify compare it with the name that they connect to"
            remedy = "get one for the name that clients use; control/me should be that name"
            report.warning("certificate-name", what, remedy, cause)


def _is_host_name(name: bytes) -> bool:
    return b"." in name.strip(b".") and not name.replace(b".", b"").isdigit() and b":" not in name


def _examine_rights(subject: Subject, report: Report) -> None:
    """Whether others can read a key."""
    by_name = [f"{BY_NAME}/{name}/servercert.pem" for name in _names_by_sni(subject)]
    for file in (SERVER_CERTIFICATE, *by_name):
        for path in map(subject.path, (file, second(file))):
            if os.path.exists(path) and os.stat(path).st_mode & 0o004:
                what = f"{path} has a private key, and every user of this host can read it"
                remedy = remedy_for_a_secret(path)
                report.warning("key-readable", what, remedy)


def _names_by_sni(subject: Subject) -> list[str]:
    """The names that have a certificate of their own."""
    try:
        return sorted(os.listdir(subject.path(BY_NAME)))
    except OSError:
        return []


def _examine_sni(subject: Subject, name: str, report: Report) -> None:
    """What a client is sent that asks for this name."""
    path = f"{BY_NAME}/{name}/servercert.pem"
    host = name.replace("*", "any", 1)
    trial = subject.try_session(server_name=host)
    for why in _errors(trial.log):
        explain(why, report)
    if not os.path.exists(subject.path(path)):
        what = f"{path} can not be found: clients that ask for {host} get another certificate"
        report.warning("certificate-sni", what, "put it there, or remove the directory")
    elif not trial.chain:
        what = f"{path}: a client that asks for {host} gets no TLS: {trial.failure}"
        report.error("certificate-sni", what, "mend the file, or remove the directory")
    elif not certificates.covers(trial.chain[0], host):
        names = ", ".join(certificates.host_names(trial.chain[0]))
        what = f"{path}: a client that asks for {host} gets the certificate of {names}"
        report.warning("certificate-sni", what, "put a certificate for that name there")
    else:
        _tell_of_chain(subject, trial, path, report)


def _tell_of_no_tls(subject: Subject, trial: Trial, report: Report) -> None:
    """Where there is no TLS: what that means, and what can be seen in the file."""
    path = subject.path(SERVER_CERTIFICATE)
    exists = os.path.lexists(path)
    settings = subject.server.settings
    text = "none" if exists else f"none: {SERVER_CERTIFICATE} is not there"
    text = "none (DISABLETLS)" if settings.disable_tls and not subject.server.is_smtps else text
    report.fact("TLS", text, version="", cipher="")
    _examine_file(path, report)
    if settings.require_tls and trial.greeting:
        what = "REQUIRETLS is set, and TLS is not to be had: every client is turned away"
        report.error("require-tls", what, "mend TLS, or unset REQUIRETLS")
    if subject.server.is_smtps and not exists:
        report.error(
            "no-certificate", f"SMTPS is set, and there is no {SERVER_CERTIFICATE}", "make cert"
        )
    elif settings.auth.mechanisms and settings.force_tls and trial.greeting:
        what = "AUTH needs TLS, and TLS is not to be had: nobody can authenticate"
        remedy = "make cert makes a certificate; or FORCETLS=0, which has passwords sent in clear"
        remedy = "mend TLS, see above" if exists else remedy
        remedy = "unset DISABLETLS" if settings.disable_tls else remedy
        report.error("auth-without-tls", what, remedy)
    elif subject.is_for_users and not exists:
        what = f"port {subject.port} is for users, and there is no TLS: no {SERVER_CERTIFICATE}"
        report.warning("no-certificate", what, "make cert")


def _examine_file(path: str, report: Report) -> None:
    """Look into a certificate that no client got, for the cause."""
    try:
        chain = certificates.load(path)
    except (OSError, ValueError):
        return  # the program has told
    certificates.examine_chain(chain, SERVER_CERTIFICATE, report)


# Client certificates


def _examine_clients(subject: Subject, report: Report) -> None:
    clients = subject.files.list("tlsclients")
    has_authorities = subject.files.exists("clientca.pem")
    if clients is None:
        return
    if not has_authorities:
        what = "control/tlsclients counts for nothing, as control/clientca.pem is not there"
        remedy = "put the certificates of the clients' authorities into control/clientca.pem"
        report.warning("tlsclients-alone", what, remedy)
        return
    number = certificates.examine_authorities(CLIENT_AUTHORITIES, REVOCATIONS, report)
    text = f"{len(clients)} may relay; authorities: {number}"
    report.fact("tlsclients", text, clients=len(clients), authorities=number)
