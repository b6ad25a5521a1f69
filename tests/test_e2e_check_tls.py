"""qmail-smtpd-check on certificates: those that are wrong, and those that only look unusual."""

from __future__ import annotations

import os
import subprocess

import pytest
from e2e.certificates import KEYS, Certificate
from e2e.checking import FAILED
from e2e.programs import need
from e2e.service import NAME

pytest_plugins = ["e2e.fixtures"]
pytestmark = pytest.mark.usefixtures("tls")

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def intermediate(long_authority):
    return Certificate("Check Intermediate", issuer=long_authority, authority=True, days=500)


@pytest.fixture
def certified(checked):
    """The check, on what is put into servercert.pem."""

    def find(*parts, **service):
        checked.home.certificate(b"".join(parts))
        return checked.find(**service)

    return find


@pytest.fixture
def users_port(checked, users_file):
    """A port for users: AUTH that needs TLS."""
    checked.home.control("smtpusers", users_file, 0o640)
    check = (checked.home.programs / "checkpassword-users", need("true")[0])
    return {"port": 587, "exports": {"SMTPAUTH": "!"}, "check": check}


@pytest.mark.parametrize("key_type", KEYS)
def test_key_types_and_chain(certified, intermediate, key_type):
    """Each kind of key; the chain is what a client is sent."""
    made = Certificate(NAME, key_type, issuer=intermediate, days=90)
    found = certified(made.key_pem, made.chain)
    assert found.codes == [], found
    fact = found.fact("certificate")
    assert fact["key"] == {"RSA-2048": "RSA 2048", "ECDSA-P256": "ECDSA secp256r1"}.get(
        key_type, key_type
    )
    assert (fact["sent"], fact["names"]) == (2, [NAME])
    assert "TLSv1.3 (TLS_" in found.fact("TLS")["text"]
    assert "TLSv1.2 (ECDHE-" in found.fact("TLS")["text"]
    assert found.fact("verified")["text"].endswith("unable to get local issuer certificate")


@pytest.mark.parametrize(
    ("days", "code", "level"),
    [(-1, "certificate-expired", "error"), (0.01, "certificate-expires", "warning"),
     (13.5, "certificate-expires", "warning")],
)  # fmt: skip
def test_days(certified, long_authority, days, code, level):
    made = Certificate(NAME, issuer=long_authority, days=days)
    problem = certified(made.key_pem, made.chain).only(code, level)
    assert "certbot renew" in problem["remedy"]
    assert problem["what"].startswith("control/servercert.pem ")


def test_days_that_are_enough(certified, long_authority):
    made = Certificate(NAME, issuer=long_authority, days=14.5)
    assert certified(made.key_pem, made.chain).codes == []


def test_issuer_that_has_expired(certified, long_authority):
    issuer = Certificate("Old", issuer=long_authority, authority=True, days=-2)
    made = Certificate(NAME, issuer=issuer, days=90)
    problem = certified(made.key_pem, made.chain).only("certificate-expired", "error")
    assert "the issuer's certificate Old" in problem["what"]


def test_key_of_another_certificate(certified, long_certificate):
    other = Certificate("other")
    found = certified(other.key_pem, long_certificate.chain)
    problem = found.only("key-mismatch", "error")
    assert "mismatch" in problem["what"]
    assert "before its issuers'" in problem["remedy"]


def test_no_key(certified, long_certificate):
    assert "privkey.pem" in certified(long_certificate.chain).only("no-key", "error")["remedy"]


def test_key_with_a_passphrase(certified, checked, long_certificate):
    (openssl,) = need("openssl")
    command = [openssl, "pkey", "-aes128", "-passout", "pass:word"]
    key = subprocess.run(
        command, input=long_certificate.key_pem, capture_output=True, check=True, timeout=30
    ).stdout
    problem = certified(key, long_certificate.chain).only("key-passphrase", "error")
    assert "openssl pkey" in problem["remedy"]


@as_root
def test_file_that_the_user_can_not_read(checked):
    path = checked.home.path / "control/servercert.pem"
    os.chown(path, 0, 0)
    path.chmod(0o600)
    problem = checked.find().only("unreadable", "error")
    assert problem["cause"] == f"{path} is root:root 0600"
    assert problem["remedy"].startswith("chown ")
    assert problem["remedy"].endswith(f"{path}; chmod 640 {path}")


@pytest.mark.parametrize("name", ["servercert.pem", "clientca.pem", "clientcrl.pem"])
def test_named_pipe(checked, clients, name):
    """Nobody waits for who would write to it."""
    path = checked.home.path / "control" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    found = checked.find()
    assert any(name in problem["what"] for problem in found.report["problems"]), found


def test_key_that_everybody_can_read(checked):
    path = checked.home.path / "control/servercert.pem"
    path.chmod(0o644)
    problem = checked.find().only("key-readable", "warning")
    assert problem["remedy"].endswith(f"chmod 640 {path}")


def test_issuer_that_does_not_belong_there(certified, intermediate):
    made = Certificate(NAME, issuer=intermediate, days=90)
    stranger = Certificate("Stranger", authority=True, days=90)
    found = certified(made.key_pem, made.pem, stranger.pem, intermediate.pem)
    assert found.only("chain-order", "warning")["what"].endswith(
        f"wrong order: Stranger did not issue {NAME}, behind which it stands"
    )
    found = certified(made.key_pem, made.pem, stranger.pem)
    problem = found.only("chain-broken", "warning")
    assert problem["remedy"].startswith("put the certificate of Check Intermediate there")


def test_missing_intermediate(certified, intermediate):
    """A public authority's says where its issuer is to be had; a private one's need not be sent."""
    made = Certificate(NAME, issuer=intermediate, days=90, url="http://ca.example/issuer.der")
    problem = certified(made.key_pem, made.pem).only("chain-incomplete", "warning")
    assert "Check Intermediate" in problem["what"]
    assert "privkey.pem fullchain.pem" in problem["remedy"]
    private = Certificate(NAME, issuer=intermediate, days=90)
    assert certified(private.key_pem, private.pem).codes == []


def test_self_signed(certified, users_port):
    """It is of use to other hosts, and not to users."""
    made = Certificate(NAME, days=90)
    found = certified(made.key_pem, made.pem)
    assert found.codes == []
    assert found.fact("verified")["text"].endswith("self-signed certificate")
    certified(made.key_pem, made.pem, **users_port).only("self-signed", "warning")


@pytest.mark.parametrize("host", [NAME, "*.example.org", NAME.upper()])
def test_names_that_fit(certified, long_authority, host):
    made = Certificate("x", issuer=long_authority, days=90, hosts=(host,))
    assert certified(made.key_pem, made.chain).codes == []


@pytest.mark.parametrize("host", ["www.example.org", "*.mail.example.org", "example.org"])
def test_names_that_do_not_fit(certified, long_authority, host):
    made = Certificate("x", issuer=long_authority, days=90, hosts=(host,))
    problem = certified(made.key_pem, made.chain).only("certificate-name", "warning")
    assert problem["what"].endswith(f"is for {host}, and not for {NAME}")


def test_no_certificate(checked, users_port):
    (checked.home.path / "control/servercert.pem").unlink()
    found = checked.find()
    assert found.codes == []
    assert found.fact("TLS")["text"] == "none: control/servercert.pem is not there"
    problem = checked.find(**users_port).only("auth-without-tls", "error")
    assert "make cert" in problem["remedy"]
    exports = {"SMTPAUTH": "!", "SMTPS": "1"}
    found = checked.find(**{**users_port, "port": 465, "exports": exports})
    assert found.status == FAILED
    assert "no-certificate" in found.codes


def test_ciphers_that_are_not_there(checked):
    checked.home.control("tlsserverciphers", "ECDHE-RSA-NOSUCH:ECDHE+AESGCM")
    problem = checked.find().only("ciphers", "warning")
    assert problem["what"] == "tlsserverciphers: no such cipher: ECDHE-RSA-NOSUCH; left out"
    assert "openssl ciphers" in problem["remedy"]
    checked.home.control("tlsserverciphers", "ECDHE-RSA-NOSUCH")
    found = checked.find()
    assert found.status == FAILED
    assert [problem["level"] for problem in found.report["problems"]] == ["error", "warning"]


def test_minimum_version_that_is_none(checked):
    checked.home.control("tlsminversion", "TLSv1.3")
    assert checked.find().only("tls-minimum", "error")["remedy"] == "write 1.2 or 1.3"
    checked.home.control("tlsminversion", "1.3")
    found = checked.find()
    assert found.codes == []
    assert found.fact("TLS")["text"].endswith("no TLSv1.2")


# Client certificates


@pytest.fixture
def clients(checked):
    """An authority of client certificates, in clientca.pem, and one client that is listed."""
    authority = Certificate("Clients' Root", authority=True, days=300)
    checked.home.control("tlsclients", "gateway@branch.example")
    checked.home.control("clientca.pem", authority.pem)
    return authority


def test_clients(checked, clients):
    checked.home.control("clientcrl.pem", clients.revoke(days=30))
    found = checked.find()
    assert found.codes == [], found
    fact = found.fact("tlsclients")
    assert (fact["clients"], fact["authorities"]) == (1, 1)


def test_clients_without_authorities(checked, clients):
    (checked.home.path / "control/clientca.pem").unlink()
    checked.find().only("tlsclients-alone", "warning")


def test_authorities_that_are_none(checked, clients):
    checked.home.control("clientca.pem", "no certificate")
    assert "clientca-unusable" in checked.find().codes


def test_authority_that_has_expired(checked, clients):
    old = Certificate("Old Root", authority=True, days=-3)
    checked.home.control("clientca.pem", clients.pem + old.pem)
    problem = checked.find().only("certificate-expired", "error")
    assert problem["what"].startswith("control/clientca.pem: Old Root has expired")


def test_revocations_that_have_expired(checked, clients):
    checked.home.control("clientcrl.pem", clients.revoke(days=-1))
    problem = checked.find().only("crl-expired", "error")
    assert "no certificate of that authority counts" in problem["cause"]


def test_revocations_of_another_authority(checked, clients):
    other = Certificate("Other Root", authority=True)
    checked.home.control("clientcrl.pem", other.revoke(days=30))
    assert "Clients' Root" in checked.find().only("crl-missing", "error")["what"]


def test_revocations_that_are_none(checked, clients):
    checked.home.control("clientcrl.pem", "nothing")
    assert "get the file anew" in checked.find().only("crl-unusable", "error")["remedy"]


# More than one certificate


@pytest.fixture
def by_name(checked):
    """Put a certificate into control/servercerts/NAME."""

    def put(name, certificate, mode=0o640):
        directory = checked.home.path / "control/servercerts" / name
        directory.mkdir(parents=True)
        text = certificate.key_pem + certificate.chain
        return checked.home.control(f"servercerts/{name}/servercert.pem", text, mode)

    return put


def certificate_facts(found):
    return {fact["file"]: fact for fact in found.report["facts"] if fact["name"] == "certificate"}


def test_certificate_by_name(checked, by_name, long_authority):
    """Each name is asked for, and a wildcard by a name that it stands for."""
    for name in ("mx.example.net", "*.example.com"):
        by_name(name, Certificate("x", issuer=long_authority, days=60, hosts=(name,)))
    found = checked.find()
    assert found.codes == [], found
    facts = certificate_facts(found)
    assert facts["control/servercerts/mx.example.net/servercert.pem"]["names"] == ["mx.example.net"]
    assert facts["control/servercerts/*.example.com/servercert.pem"]["days_left"] in (59, 60)


def test_name_of_this_host_has_a_certificate_of_its_own(checked, by_name, long_authority):
    default = Certificate("x", issuer=long_authority, days=60, hosts=("www.example.net",))
    checked.home.certificate(default.key_pem + default.chain)
    by_name(NAME, Certificate("x", issuer=long_authority, days=60, hosts=(NAME,)))
    assert checked.find().codes == []


def test_certificate_by_name_that_has_expired(checked, by_name, long_authority):
    made = Certificate("x", issuer=long_authority, days=-1, hosts=("mx.example.net",))
    by_name("mx.example.net", made)
    problem = checked.find().only("certificate-expired", "error")
    assert problem["what"].startswith("control/servercerts/mx.example.net/servercert.pem has")


def test_certificate_by_name_that_is_for_another(checked, by_name, long_authority):
    made = Certificate("x", issuer=long_authority, days=60, hosts=("www.example.net",))
    by_name("mx.example.net", made)
    problem = checked.find().only("certificate-sni", "warning")
    assert "gets the certificate of www.example.net" in problem["what"]


def test_directory_that_no_name_leads_to(checked, by_name, long_authority):
    made = Certificate("x", issuer=long_authority, days=60, hosts=("mx.example.net",))
    by_name("MX.example.net", made)
    assert "MX.example.net" in checked.find().only("certificate-sni", "warning")["what"]
    (checked.home.path / "control/servercerts/empty.example.net").mkdir()
    assert checked.find().codes == ["certificate-sni", "certificate-sni"]


@as_root
def test_certificate_by_name_that_the_user_can_not_read(checked, by_name, long_certificate):
    path = by_name("mx.example.net", long_certificate, 0o600)
    os.chown(path, 0, 0)
    found = checked.find()
    assert found.problem("unreadable")["remedy"].endswith(f"chmod 640 {path}")


def test_key_by_name_that_everybody_can_read(checked, by_name, long_authority):
    made = Certificate("x", issuer=long_authority, days=60, hosts=("mx.example.net",))
    path = by_name("mx.example.net", made, 0o644)
    assert str(path) in checked.find().only("key-readable", "warning")["what"]


@as_root
def test_second_key_that_the_user_can_not_read(checked, long_authority):
    """Nobody is told to open a key to everybody."""
    made = Certificate(NAME, "RSA-2048", issuer=long_authority, days=80)
    path = checked.home.control("servercert-ecdsa.pem", made.key_pem + made.chain, 0o600)
    os.chown(path, 0, 0)
    problem = checked.find().only("unreadable", "error")
    assert problem["what"].endswith("left out")
    assert problem["remedy"].endswith(f"{path}; chmod 640 {path}")


def test_two_key_types(checked, long_authority):
    """Both are seen, as each client gets the one that it can use."""
    rsa, ecdsa = (
        Certificate(NAME, key_type, issuer=long_authority, days=days)
        for key_type, days in (("RSA-2048", 80), ("ECDSA-P256", 3))
    )
    checked.home.certificate(rsa.key_pem + rsa.chain)
    checked.home.control("servercert-ecdsa.pem", ecdsa.key_pem + ecdsa.chain, 0o640)
    found = checked.find()
    keys = {fact["key"] for fact in found.report["facts"] if fact["name"] == "certificate"}
    assert keys == {"RSA 2048", "ECDSA secp256r1"}
    found.only("certificate-expires", "warning")


# Policy


def test_disabletls(checked, users_port):
    found = checked.find(exports={"DISABLETLS": "1"})
    assert found.codes == []
    assert found.fact("TLS")["text"] == "none (DISABLETLS)"
    exports = {"DISABLETLS": "1", **users_port["exports"]}
    problem = checked.find(**{**users_port, "exports": exports}).only("auth-without-tls", "error")
    assert problem["remedy"] == "unset DISABLETLS"


def test_requiretls(checked):
    found = checked.find(exports={"REQUIRETLS": "1"})
    assert found.codes == []
    assert "required (REQUIRETLS)" in found.fact("TLS")["text"]
    (checked.home.path / "control/servercert.pem").unlink()
    checked.find(exports={"REQUIRETLS": "1"}).only("require-tls", "error")


def test_fixcrio_breaks_tls(checked):
    run = checked.run_file()
    smtpd = str(checked.home.programs / "qmail-smtpd")
    run.write_text(run.read_text().replace(smtpd, f"fixcrio {smtpd}"))
    checked.find("--env-from", run).only("fixcrio", "error")


# TLS of another program


def in_front(checked, options, **service):
    """A run file with sslserver in the place of tcpserver, and no certificate of ours."""
    (checked.home.path / "control/servercert.pem").unlink()
    run = checked.run_file(**service, memory=20_000_000)
    sslserver = checked.home.program("sslserver", "exit 1")
    run.write_text(run.read_text().replace("tcpserver", f"{sslserver} {options}"))
    return checked.find("--env-from", run)


def test_sslserver(checked, users_port):
    found = in_front(checked, "-es", **{**users_port, "port": 465})
    assert found.codes == [], found
    assert found.fact("TLS")["text"].startswith("by sslserver")
    assert "AUTH LOGIN PLAIN" in found.fact("client sees")["offers"]


def test_sslserver_that_tells_nothing(checked, users_port):
    found = in_front(checked, "-e", **{**users_port, "port": 465})
    assert found.only("sslserver", "warning")["remedy"] == "add -s, or -n for STARTTLS"


def test_sslserver_with_starttls(checked, users_port):
    found = in_front(checked, "-en", **users_port)
    assert found.codes == [], found
