"""The deploy hooks: what certbot and acme.sh have renewed is what clients get."""

from __future__ import annotations

import os
import pwd
import shutil
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from conformance.program import ROOT, Program
from conformance.stage import Stage
from cryptography import x509
from e2e.certificates import Certificate
from e2e.programs import need

PREFIX = "/usr/local/qmail-smtpd-py"
NAME = "mail.example.org"  # what the certificates of the tests are for
OTHER = "mail.example.net"

pytestmark = pytest.mark.tls


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """The hooks as they are installed somewhere."""
    need("openssl")
    directory = tmp_path / "prefix" / "hooks"
    shutil.copytree(ROOT / "hooks", directory)
    for path in directory.iterdir():
        path.write_text(path.read_text().replace(PREFIX, str(directory.parent)))
    return directory


@pytest.fixture
def home(stage: Stage) -> Path:
    stage.control({"me": f"{NAME.upper()}\n"})
    return stage.home


def lineage(directory: Path, made: Certificate, number: int = 1) -> Path:
    """A directory as certbot keeps one for a certificate: links to files with a number."""
    live, archive = directory / "live" / NAME, directory / "archive" / NAME
    for path in (live, archive):
        path.mkdir(parents=True, exist_ok=True)
    for name, text in (("privkey", made.key_pem), ("fullchain", made.chain)):
        file = archive / f"{name}{number}.pem"
        file.write_bytes(text)
        link = live / f"{name}.pem"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(file, live))
    return live


def run(*command: object, home: Path, **environ: object) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "QMAIL": str(home), "OWNER": "nobody", "GROUP": "sys"}
    return subprocess.run(
        [str(word) for word in command],
        env={**env, **{name: str(value) for name, value in environ.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def certbot(hooks: Path, home: Path, live: Path, **environ: object) -> str:
    """Run the hook as certbot does; what it says."""
    domains = {"RENEWED_LINEAGE": live, "RENEWED_DOMAINS": NAME}
    ended = run(hooks / "certbot", home=home, **domains, **environ)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def served(stage: Stage) -> int:
    """The serial number of the certificate that the next client gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with Program(stage) as program:
        client = program.client
        client.reply()
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.handshake(context) == "ok"
        assert client.command(b"QUIT") == f"221 {NAME.upper()}"
        return x509.load_der_x509_certificate(client.certificate).serial_number


def test_certbot(stage: Stage, hooks: Path, home: Path, tmp_path: Path) -> None:
    """A first certificate, and a renewal; the next client gets it, with its issuer's behind it."""
    issuer = Certificate("Intermediate", issuer=Certificate("Root", authority=True), authority=True)
    file = home / "control" / "servercert.pem"
    for number in (1, 2):
        made = Certificate(NAME, issuer=issuer)
        said = certbot(hooks, home, lineage(tmp_path, made, number))
        assert said == f"put-certificate: made {file}\n"
        assert file.read_bytes() == made.key_pem + made.chain
        assert served(stage) == made.x509.serial_number
    assert [path.name for path in file.parent.iterdir() if path.name != "me"] == [file.name]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_owner_and_rights(hooks: Path, home: Path, tmp_path: Path) -> None:
    """Of the file before, or else those that were named, with no rights for others."""
    live = lineage(tmp_path, Certificate(NAME))
    file = home / "control" / "servercert.pem"
    certbot(hooks, home, live)
    found = file.stat()
    nobody = pwd.getpwnam("nobody").pw_uid
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (nobody, 0o640)
    os.chown(file, 0, 12)
    file.chmod(0o440)
    certbot(hooks, home, live)
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 12, 0o440)


def test_a_certificate_of_other_names_is_left_alone(
    hooks: Path, home: Path, tmp_path: Path
) -> None:
    """certbot runs its hooks for those of web servers too; acme.sh was asked for this one."""
    (home / "control" / "me").write_text("mx.example.net\n")
    live = lineage(tmp_path, Certificate(NAME))
    said = certbot(hooks, home, live)
    assert f"nothing here is for {NAME}: the host is mx.example.net" in said
    assert acme(hooks, home, live).returncode == 3
    assert [path.name for path in (home / "control").iterdir()] == ["me"]
    assert "made" in certbot(hooks, home, live, HOST=NAME)


@pytest.mark.parametrize(
    ("hosts", "found"),
    [
        ([NAME], {NAME}),
        (["MAIL.example.org", OTHER], {NAME, OTHER}),
        (["*.example.org"], {NAME, "*.example.org"}),
    ],
)
def test_by_name(
    hooks: Path, home: Path, tmp_path: Path, hosts: list[str], found: set[str]
) -> None:
    """It goes into each directory whose name it is good for, by its wildcard too."""
    (home / "control" / "me").write_text("mx.example.com\n")
    place = home / "control" / "servercerts"
    for name in (NAME, OTHER, "*.example.org", "a.mail.example.org", "example.org", "mail?example"):
        (place / name).mkdir(parents=True)
    said = certbot(hooks, home, lineage(tmp_path, Certificate(NAME, hosts=hosts)))
    assert {path.parent.name for path in place.glob("*/servercert.pem")} == found
    assert said.count("made") == len(found)


def test_each_type_replaces_its_own(hooks: Path, home: Path, tmp_path: Path) -> None:
    control = home / "control"
    rsa, ecdsa = Certificate(NAME, "RSA-2048"), Certificate(NAME)
    (control / "servercert-ecdsa.pem").write_bytes(ecdsa.key_pem + ecdsa.chain)
    certbot(hooks, home, lineage(tmp_path, rsa))
    renewed = Certificate(NAME)
    certbot(hooks, home, lineage(tmp_path, renewed, 2))
    assert (control / "servercert.pem").read_bytes() == rsa.key_pem + rsa.chain
    assert (control / "servercert-ecdsa.pem").read_bytes() == renewed.key_pem + renewed.chain


def acme(hooks: Path, home: Path, live: Path) -> subprocess.CompletedProcess[str]:
    """Have a shell read the hook and call its function, as acme.sh does."""
    script = '. "$1" && qmail_smtpd_deploy mail.example.org "$2" "" "" "$3"'
    files = live / "privkey.pem", live / "fullchain.pem"
    return run("sh", "-c", script, "acme.sh", hooks / "qmail_smtpd.sh", *files, home=home)


def test_acme_sh(stage: Stage, hooks: Path, home: Path, tmp_path: Path) -> None:
    made = Certificate(NAME)
    ended = acme(hooks, home, lineage(tmp_path, made))
    assert ended.returncode == 0, ended.stderr
    assert served(stage) == made.x509.serial_number


@pytest.mark.parametrize("what", ["key", "chain", "pair", "names", "home"])
def test_what_is_wrong_changes_nothing(hooks: Path, home: Path, tmp_path: Path, what: str) -> None:
    old = Certificate(NAME)
    certbot(hooks, home, lineage(tmp_path, old))
    live = lineage(tmp_path, Certificate(NAME, authority=what == "names"), 2)
    expected = {
        "key": f"no private key without passphrase in {live}/privkey.pem",
        "chain": f"no certificate in {live}/fullchain.pem",
        "pair": f"{live}/fullchain.pem does not begin with the certificate of {live}/privkey.pem",
        "names": f"the certificate in {live}/fullchain.pem has no names of hosts (subjectAltName)",
        "home": f"there is no {tmp_path}/nowhere/control; QMAIL is the qmail home",
    }
    if what == "key":
        (live / "privkey.pem").write_text("garbage")
    elif what == "chain":
        (live / "fullchain.pem").write_text("garbage")
    elif what == "pair":
        (live / "privkey.pem").write_bytes(old.key_pem)
    where = tmp_path / "nowhere" if what == "home" else home
    ended = run(hooks / "certbot", home=where, RENEWED_LINEAGE=live)
    assert ended.returncode == 1
    assert ended.stderr == f"put-certificate: {expected[what]}\n"
    files = {path.name for path in (home / "control").iterdir()}
    assert files == {"me", "servercert.pem"}
    assert (home / "control" / "servercert.pem").read_bytes() == old.key_pem + old.chain
