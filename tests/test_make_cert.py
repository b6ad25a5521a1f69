"""make cert and make cert-req, and what STARTTLS makes of the files."""

from __future__ import annotations

import os
import pwd
import re
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from conformance.program import ROOT, Program
from conformance.stage import Stage
from e2e.programs import need

NAME = "mail.example.org"
KEYS = {"rsa:2048": "rsaEncryption", "ec": "id-ecPublicKey", "ed25519": "ED25519"}


@pytest.fixture
def control(stage: Stage) -> Path:
    """The control directory of a qmail home."""
    need("make", "openssl")
    stage.control({"me": f"{NAME}\n"})
    return stage.home / "control"


def make(target: str, control: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make with these variables, and an owner who is there on every host."""
    owner = {"OWNER": "nobody", "GROUP": "sys"}
    words = [f"{name}={value}" for name, value in {**owner, **variables}.items()]
    return subprocess.run(
        ["make", "--silent", target, f"QMAIL={control.parent}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def openssl(*words: object, text: str | None = None) -> str:
    """What openssl prints."""
    command = ["openssl", *map(str, words)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def handshake(stage: Stage, authority: Path, name: str = NAME) -> str:
    """Make a TLS handshake with the program as a client that trusts these certificates alone."""
    context = ssl.create_default_context(cafile=str(authority))
    with Program(stage) as program:
        assert program.client.reply() == f"220 {NAME} ESMTP"
        assert "250-STARTTLS" in str(program.client.command(b"EHLO client.example.com"))
        assert program.client.command(b"STARTTLS") == "220 ready for tls"
        outcome = program.client.handshake(context, name)
        if outcome == "ok":
            assert program.client.command(b"QUIT") == f"221 {NAME}"
    return outcome


def certificate_of(control: Path) -> str:
    return openssl("x509", "-in", control / "servercert.pem", "-noout", "-text")


# make cert


@pytest.mark.tls
@pytest.mark.parametrize("key", KEYS)
def test_a_certificate_that_signs_itself(key: str, stage: Stage, control: Path) -> None:
    assert make("cert", control, KEY=key).stderr == ""
    text = certificate_of(control)
    assert f"Public Key Algorithm: {KEYS[key]}\n" in text
    assert re.search(rf"Subject Alternative Name: *\n *DNS:{NAME}\n", text)
    assert handshake(stage, control / "servercert.pem") == "ok"


def test_names_and_addresses(control: Path) -> None:
    assert make("cert", control, HOST="mx.example.org,192.0.2.1,2001:db8::1").returncode == 0
    names = "DNS:mx.example.org, IP Address:192.0.2.1, IP Address:2001:DB8:0:0:0:0:0:1"
    assert names in certificate_of(control)
    assert "CN = mx.example.org\n" in certificate_of(control).replace("CN=", "CN = ")


@pytest.mark.tls
def test_a_name_that_is_too_long_for_a_common_name(stage: Stage, control: Path) -> None:
    name = f"{'a' * 60}.{'b' * 60}.example.org"
    assert make("cert", control, HOST=name).returncode == 0
    assert handshake(stage, control / "servercert.pem", name) == "ok"


def test_days(control: Path) -> None:
    make("cert", control, DAYS="10")
    for seconds, status in ((9 * 86400, 0), (11 * 86400, 1)):
        checkend = ["openssl", "x509", "-in", control / "servercert.pem", "-noout", "-checkend"]
        assert subprocess.run([*checkend, str(seconds)], check=False).returncode == status


def test_the_key_is_for_the_mail_user_and_a_group_alone(control: Path) -> None:
    make("cert", control)
    status = (control / "servercert.pem").stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    if os.getuid() == 0:
        assert pwd.getpwuid(status.st_uid).pw_name == "nobody"
    assert {path.name for path in control.iterdir()} == {"me", "servercert.pem"}


def test_one_that_is_there_is_replaced_only_by_force(control: Path) -> None:
    make("cert", control)
    path = control / "servercert.pem"
    old = path.read_bytes()
    refused = make("cert", control)
    assert refused.returncode != 0
    assert f"cert: {path} is there; FORCE=1 replaces it\n" in refused.stderr
    assert path.read_bytes() == old
    with path.open("rb") as opened:
        assert make("cert", control, FORCE="1").returncode == 0
        assert opened.read() == old  # a session that reads it now reads all of the old one
    assert path.read_bytes() != old
    assert {path.name for path in control.iterdir()} == {"me", "servercert.pem"}


@pytest.mark.parametrize("mode", [0o600, 0o440, 0o644])
def test_one_that_is_replaced_can_be_read_by_whom_it_could_be(control: Path, mode: int) -> None:
    make("cert", control)
    path = control / "servercert.pem"
    path.chmod(mode)
    if os.getuid() == 0:
        os.chown(path, 7, 8)
    before = path.stat()
    assert make("cert", control, FORCE="1", OWNER="", GROUP="").returncode == 0
    after = path.stat()
    assert before.st_ino != after.st_ino
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert stat.S_IMODE(after.st_mode) == mode


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"KEY": "dsa"}, "KEY is rsa:BITS, ec or ed25519, not 'dsa'"),
        ({"KEY": "rsa:many"}, "2048 bits or more"),
        ({"KEY": "rsa:1024"}, "2048 bits or more"),
        ({"QMAIL": "/nonexistent"}, "there is no /nonexistent/control"),
        ({"FROM": "/nonexistent.pem"}, "cannot read /nonexistent.pem"),
        ({"FROM": "/dev/null"}, "no certificate in /dev/null"),
    ],
)
def test_what_can_not_be_made(variables: dict[str, str], words: str, control: Path) -> None:
    done = make("cert", control, **variables)
    assert done.returncode != 0
    assert words in done.stderr
    assert [path.name for path in control.iterdir()] == ["me"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_an_owner_who_is_not_there(control: Path) -> None:
    done = make("cert", control, OWNER="no-such-user")
    assert "no user 'no-such-user': OWNER= is the user of tcpserver -u" in done.stderr
    assert [path.name for path in control.iterdir()] == ["me"]


# An authority's certificate


class Authority:
    """A certificate authority with an intermediate one, as openssl makes them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = self._new("root", "-x509", "-days", "30")
        self._new("intermediate")
        self.intermediate = self.sign(directory / "intermediate", "intermediate", "root", "CA:true")

    def _new(self, name: str, *options: str) -> Path:
        path = self.directory / name
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj"]
        extension = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"] if options else []
        key = ["-keyout", f"{path}.key", "-out", path]
        openssl("req", "-new", *options, *new, f"/CN={name}", *extension, *key)
        return path

    def sign(self, request: Path, name: str, by: str, kind: str) -> Path:
        """The certificate for a request."""
        extensions = self.directory / f"{name}.extensions"
        usage = "keyCertSign" if kind == "CA:true" else "digitalSignature"
        constraints = f"basicConstraints=critical,{kind}\nkeyUsage=critical,{usage}\n"
        identifiers = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        extensions.write_text(f"subjectAltName=DNS:{NAME}\n{constraints}{identifiers}")
        path = self.directory / f"{name}.pem"
        issuer = ["-CA", self.directory / by, "-CAkey", self.directory / f"{by}.key"]
        if by == "intermediate":
            issuer[1] = self.intermediate
        more = ["-CAcreateserial", "-days", "20", "-extfile", extensions, "-out", path]
        openssl("x509", "-req", "-in", request, *issuer, *more)
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    need("openssl")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.tls
@pytest.mark.parametrize("key", KEYS)
def test_a_request_and_what_the_authority_answers(
    key: str, stage: Stage, control: Path, authority: Authority
) -> None:
    asked = make("cert-req", control, KEY=key)
    assert asked.returncode == 0
    assert stat.S_IMODE((control / "reqkey.pem").stat().st_mode) == 0o600
    request = openssl("req", "-in", control / "req.pem", "-noout", "-text", "-verify")
    assert f"DNS:{NAME}" in request
    signed = authority.sign(control / "req.pem", "signed", "intermediate", "CA:false")
    command = asked.stdout.splitlines()[-1].strip()
    home = f"QMAIL='{control.parent}'"
    assert command == f"make cert {home} FROM='{control}/reqkey.pem signed.pem chain.pem'"
    files = f"{control}/reqkey.pem {signed} {authority.intermediate}"
    assert make("cert", control, FROM=files).stderr == ""
    assert handshake(stage, authority.root) == "ok"


def test_a_key_that_is_there_is_kept(control: Path) -> None:
    make("cert-req", control, KEY="ec")
    old = (control / "reqkey.pem").read_bytes()
    assert "FORCE=1" in make("cert-req", control, KEY="ec").stderr
    assert (control / "reqkey.pem").read_bytes() == old


@pytest.fixture(scope="module", params=KEYS)
def lineage(
    request: pytest.FixtureRequest, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """privkey.pem and fullchain.pem, as an ACME client leaves them."""
    directory = tmp_path_factory.mktemp("live")
    kinds = {
        "rsa:2048": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        "ec": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
        "ed25519": ["-algorithm", "ED25519"],
    }
    key, asked = directory / "privkey.pem", directory / "request.pem"
    openssl("genpkey", *kinds[request.param], "-out", key)
    openssl("req", "-new", "-key", key, "-subj", f"/CN={NAME}", "-out", asked)
    signed = authority.sign(asked, f"live-{request.param}", "intermediate", "CA:false")
    chain = signed.read_text() + authority.intermediate.read_text()
    (directory / "fullchain.pem").write_text(chain)
    return directory


@pytest.mark.tls
@pytest.mark.parametrize("order", [("privkey", "fullchain"), ("fullchain", "privkey")])
@pytest.mark.parametrize("how", ["make", "cat"])
def test_the_files_of_an_acme_client(
    how: str,
    order: tuple[str, str],
    stage: Stage,
    control: Path,
    lineage: Path,
    authority: Authority,
) -> None:
    files = [lineage / f"{name}.pem" for name in order]
    if how == "make":
        assert make("cert", control, FROM=" ".join(map(str, files))).returncode == 0
    else:
        (control / "servercert.pem").write_bytes(b"".join(file.read_bytes() for file in files))
    assert handshake(stage, authority.root) == "ok"


def test_files_without_a_line_end(control: Path, lineage: Path, tmp_path: Path) -> None:
    cut = []
    for name in ("privkey.pem", "fullchain.pem"):
        (tmp_path / name).write_text((lineage / name).read_text().rstrip("\n"))
        cut.append(str(tmp_path / name))
    assert make("cert", control, FROM=" ".join(cut)).stderr == ""
    assert "----------" not in (control / "servercert.pem").read_text()


def test_files_that_do_not_belong_together(
    control: Path, lineage: Path, authority: Authority, tmp_path: Path
) -> None:
    encrypted = tmp_path / "encrypted.pem"
    words = ["-aes256", "-passout", "pass:x", "-out", encrypted]
    openssl("pkey", "-in", lineage / "privkey.pem", *words)
    key, chain = lineage / "privkey.pem", lineage / "fullchain.pem"
    for files, why in (
        (f"{authority.directory / 'root.key'} {chain}", "is not that of the private key"),
        (f"{key} {authority.intermediate} {chain}", "is not that of the private key"),
        (f"{encrypted} {chain}", "no private key without passphrase"),
        (f"{chain}", "no private key without passphrase"),
        (f"{key}", "no certificate"),
    ):
        done = make("cert", control, FROM=files)
        assert done.returncode != 0
        assert why in done.stderr
    assert [path.name for path in control.iterdir()] == ["me"]
