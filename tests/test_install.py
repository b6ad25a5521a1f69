"""make install and make uninstall, and the way to it and back from a qmail that is there.

Installing needs the network, or what pip has kept of it, and some ten seconds, so that the tests of
one installation are few and share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import cache_from_source, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from conformance.program import ROOT, Program
from conformance.stage import Stage
from e2e.programs import as_mail_user, need


def _module_of_setup(name: str) -> ModuleType:
    """A module of the directory that is no package."""
    spec = spec_from_file_location(name, ROOT / "setup" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiling = _module_of_setup("compiling")

INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
PROGRAMS = {path.stem for path in ROOT.glob("man/*.8")}
SERVICES = {
    str(path.relative_to(ROOT))
    for directory in ("run", "systemd", "fail2ban", "hooks")
    for path in ROOT.glob(f"{directory}/**/*")
    if path.is_file()
}


def make(target: str, prefix: Path, **variables: object) -> str:
    """Run make, and return what it says."""
    done = run_make(target, prefix, **variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_make(target: str, prefix: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """Nothing is compiled unless COMPILE says so: it takes longer than all else."""
    need("make")
    variables.setdefault("COMPILE", "no")
    words = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(
        ["make", "--silent", target, f"PREFIX={prefix}", f"PYTHON={INTERPRETER}", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation, which no test changes: that of `make test`, or one of our own that the
    workers of pytest-xdist share.
    """
    if "QMAIL_SMTPD" in os.environ:
        there = Path(os.environ["QMAIL_SMTPD"]).parent.parent
        if (there / "installed").exists():
            return there
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    installed = directory / "usr" / "qmail-smtpd+py"
    with open(directory / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (installed / "installed").exists():
            make("install", installed, COMPILE="")
    return installed


@pytest.fixture
def own_prefix(prefix: Path, tmp_path: Path) -> Path:
    """An installation that a test can change: a copy, whose programs are those of the first."""
    return Path(shutil.copytree(prefix, tmp_path / "own", symlinks=True))


def files(prefix: Path) -> set[str]:
    """The files of an installation, without those of its virtual environments."""
    found = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    return {name for name in found if not name.startswith("venv/")}


def session(stage: Stage, program: Path, dialogue: bytes = b"QUIT\r\n") -> bytes:
    """What a program says to this, if it ends as it should."""
    with Program(stage, command=[str(program)]) as running:
        running.client.send(dialogue)
        said = running.client.read_to_end()
        assert running.wait() == 0
    return said


def has_auth_and_tls(stage: Stage, program: Path) -> None:
    stage.control({"me": "mx.example.org\n", "servercert.pem": "@server-rsa.pem"})
    stage.arguments("@checkpassword", "@true")
    stage.environment({"SMTPAUTH": "", "FORCETLS": "0"})
    said = session(stage, program, b"AUTH PLAIN AHUAcA==\r\nQUIT\r\n")
    assert said == GREETING + b"235 ok, go ahead (#2.0.0)\r\n" + GOODBYE
    with Program(stage, command=[str(program)]) as running:
        assert running.client.reply() == "220 mx.example.org ESMTP"
        assert running.client.command(b"STARTTLS") == "220 ready for tls"
        assert running.client.start_tls() == "ok"
        assert running.client.command(b"QUIT") == "221 mx.example.org"


@pytest.fixture(autouse=True)
def me(stage: Stage) -> None:
    stage.control({"me": "mx.example.org\n"})


GREETING = b"220 mx.example.org ESMTP\r\n"
GOODBYE = b"221 mx.example.org\r\n"


# What is installed


def test_what_is_installed(prefix: Path) -> None:
    programs = {f"bin/{name}" for name in PROGRAMS}
    pages = {f"man/man8/{name}.8" for name in PROGRAMS}
    documents = {"README.md", "CHANGES.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*"))}
    assert files(prefix) == programs | pages | documents | SERVICES | {"installed"}
    assert {"bin/qmail-smtpd", "man/man8/qmail-smtpd.8", "run/smtp/log/run"} <= files(prefix)
    assert {"systemd/qmail-smtpd@.service", "fail2ban/filter.d/qmail-smtpd.conf"} <= files(prefix)
    hook = prefix / "hooks/certbot"
    assert os.access(hook, os.X_OK)
    assert f"put={prefix}/hooks/put-certificate\n" in hook.read_text()


def test_the_checkout_has_no_traces_of_it(prefix: Path) -> None:
    assert not (ROOT / "build").exists()


def test_a_session(stage: Stage, prefix: Path) -> None:
    assert session(stage, prefix / "bin/qmail-smtpd") == GREETING + GOODBYE


def test_all_code_is_compiled(prefix: Path) -> None:
    (package,) = prefix.glob("venv/1/lib/*/site-packages/qmail_smtpd_py")
    sources = list(package.glob("*.py"))
    assert {path.name for path in sources} == {
        path.name for path in (ROOT / "qmail_smtpd_py").glob("*.py")
    }
    for source in sources:
        assert Path(cache_from_source(str(source))).stat().st_mtime >= source.stat().st_mtime


COMPILED = compiling.modules()


def modules_of_the_listener(prefix: Path) -> list[str]:
    """The files that an installed listener imports those modules from that can be compiled."""
    text = (prefix / "bin/qmail-smtpd-listen").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("import sys", "sys.path"))]
    names = [f"qmail_smtpd_py.{name}" for name in COMPILED]
    lines += ["import qmail_smtpd_py.listener", f"for name in {names}:"]
    lines += ["    print(sys.modules[name].__file__)"]
    command = [INTERPRETER, "-IS", "-c", "\n".join(lines)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return told.splitlines()


IS_COMPILED = sys.version_info >= compiling.OLDEST


def test_the_listener_is_compiled(prefix: Path) -> None:
    found = modules_of_the_listener(prefix)
    assert len(found) == len(COMPILED)
    for path in found:
        assert path.endswith(".so") == IS_COMPILED
        assert path.startswith(f"{prefix}/venv/1/compiled/qmail_smtpd_py/") == IS_COMPILED
    assert {path.name for path in prefix.glob("venv/1/compiled/*")} <= {
        "qmail_smtpd_py",
        *(path.name for path in prefix.glob("venv/1/compiled/*.so")),
    }


def test_constants_are_constant_where_they_are_compiled() -> None:
    source = '''"""A module: ü
ONE = 1
"""

from __future__ import annotations

TYPE_CHECKING = False
ONE = 1  # ü
_TWO = (
    2,
)
THREE: dict[int, str] = {3: "ü"}; _FOUR = 4
five = 5
SIX, SEVEN = 6, 7
for EIGHT in ():
    NINE = 9


class Ten:
    TEN = 10
'''
    changes = {
        "import annotations\n": "import annotations; from typing import Final\n",
        "\nONE = 1  #": "\nONE: Final = 1  #",
        "_TWO =": "_TWO: Final =",
        "dict[int, str]": "Final[dict[int, str]]",
        "_FOUR =": "_FOUR: Final =",
    }
    expected = source
    for before, after in changes.items():
        expected = expected.replace(before, after)
    assert compiling.with_finals(source.encode()).decode() == expected


def test_every_module_that_is_compiled_is_there() -> None:
    assert {path.stem for path in (ROOT / "qmail_smtpd_py").glob("*.py")} >= set(COMPILED)


def test_without_a_compiler(stage: Stage, tmp_path: Path) -> None:
    """It is installed all the same, as are those that run for each connection."""
    nothing, prefix = tmp_path / "nothing", tmp_path / "prefix"
    nothing.mkdir()
    done = subprocess.run(
        [INTERPRETER, ROOT / "setup/install.py", "install", prefix],
        env={**os.environ, "PATH": str(nothing)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"note: not compiled: there is no C compiler .*\(Debian's gcc\)", done.stdout)
    assert not (prefix / "venv/1/compiled").exists()
    assert {Path(path).suffix for path in modules_of_the_listener(prefix)} == {".py"}
    assert session(stage, prefix / "bin/qmail-smtpd") == GREETING + GOODBYE


def test_what_can_not_be_compiled_leaves_nothing(prefix: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(ROOT / "qmail_smtpd_py", tmp_path / "qmail_smtpd_py")
    with (wrong / "reply.py").open("a") as module:
        module.write("\n\nWRONG: int = b'octets'\n")
    python = prefix / "venv/1/bin/python"
    with pytest.raises(compiling.NotCompiled, match="Incompatible types" if IS_COMPILED else "3.9"):
        compiling.compile_installed(python, wrong, tmp_path / "compiled", fetches=True)
    assert not (tmp_path / "compiled").exists()


def test_others_can_read_all_and_write_nothing(prefix: Path) -> None:
    for path in (prefix, *prefix.rglob("*")):
        status = path.lstat()
        assert status.st_uid == os.getuid()
        if not path.is_symlink():
            mode = stat.S_IMODE(status.st_mode)
            assert mode & 0o022 == 0, path
            assert mode & 0o044 == 0o044, path
            if path.is_dir():
                assert mode & 0o011 == 0o011, path


@pytest.mark.skipif("QMAIL_SMTPD" not in os.environ, reason="it is make test that installs for all")
def test_the_mail_user_can_run_it_and_write_nothing() -> None:
    program = Path(os.environ["QMAIL_SMTPD"])
    assert as_mail_user([program], env={"QMAILHOME": "/nonexistent"}).stdout.startswith(b"421 ")
    find = ["find", program.parent.parent, "-writable", "-not", "-type", "l"]
    if os.getuid() == 0:
        assert as_mail_user(find).stdout == b""


def test_a_prefix_that_run_files_could_not_name(tmp_path: Path) -> None:
    place = tmp_path / "of mine"
    done = run_make("install", place)
    assert done.returncode != 0
    assert f"{place}: run files, units and hooks could not name it" in done.stdout
    assert not place.exists()


def test_run_files_have_the_prefix(prefix: Path) -> None:
    for path in (prefix / "run").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "/usr/local/qmail-smtpd-py" not in text
            assert os.access(path, os.X_OK) == (path.name == "run")
    assert f"{prefix}/bin/checkpassword-users /bin/true" in (prefix / "run/smtps/run").read_text()


def test_manual_pages_are_found(prefix: Path) -> None:
    for name in PROGRAMS:
        assert (prefix / f"man/man8/{name}.8").read_bytes() == (ROOT / f"man/{name}.8").read_bytes()


# A new version


class Sessions(threading.Thread):
    """Clients who come one after the other until `end`, without a pause from when it counts: as
    soon as `moment` is there; `failed` is what one of them saw.
    """

    def __init__(self, stage: Stage, program: Path, moment: Path) -> None:
        super().__init__()
        self._moment = moment
        self._stage, self._program = stage, program
        self._ending = threading.Event()
        self.count = 0
        self.failed: object = None

    def run(self) -> None:
        while not self._ending.is_set() and self.failed is None:
            done = subprocess.run(
                [self._program],
                input=b"QUIT\r\n",
                capture_output=True,
                env=self._stage.env,
                check=False,
            )
            self.count += 1
            self._ending.wait(0.0 if self._moment.exists() else 0.25)
            if done.stdout != GREETING + GOODBYE or done.returncode:
                self.failed = done

    def __enter__(self) -> Sessions:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.join()


def list_file(prefix: Path, name: str, content: bytes) -> Path:
    """Write a file as if it had been installed."""
    path = prefix / name
    path.write_bytes(content)
    with (prefix / "installed").open("a") as listed:
        listed.write(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    return path


def test_new_versions_while_sessions_run(stage: Stage, own_prefix: Path) -> None:
    program = own_prefix / "bin/qmail-smtpd"
    gone = list_file(own_prefix, "man/man8/gone.8", b"a page that the new version has not\n")
    changed = own_prefix / "run/smtp/run"
    changed.write_text("#!/bin/sh\nexec tcpserver ...\n")
    said = make("install", own_prefix)
    assert f"kept {changed}, which was changed" in said
    assert changed.read_text() == "#!/bin/sh\nexec tcpserver ...\n"
    assert f"{own_prefix}/venv/2/" in program.read_text()
    assert not gone.exists()
    launchers = own_prefix / "venv/3/launchers"  # the next are to take the place of these
    others = Sessions(stage, program, launchers)
    with Program(stage, command=[str(program)]) as old, others:
        assert old.client.reply() == GREETING.decode().strip()
        make("install", own_prefix)
        # A module that the old session has not loaded yet, and finds as it was.
        assert old.client.command(b"MAIL FROM:<u@[127.0.0.1]>") == "250 ok"
        old.client.send(b"QUIT\r\n")
        assert old.wait() == 0
    assert others.failed is None
    assert others.count > 10
    assert f"{own_prefix}/venv/3/" in program.read_text()
    assert {path.name for path in (own_prefix / "venv").iterdir()} == {"2", "3"}


def test_an_installation_that_fails_changes_nothing(
    stage: Stage, own_prefix: Path, tmp_path: Path
) -> None:
    before = {name: (own_prefix / name).read_bytes() for name in files(own_prefix)}
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    environ = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(nothing)}
    done = subprocess.run(
        ["make", "--silent", "install", "SYSTEM=", f"PREFIX={own_prefix}", f"PYTHON={INTERPRETER}"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "nothing was changed" in done.stderr
    assert {name: (own_prefix / name).read_bytes() for name in files(own_prefix)} == before
    assert [path.name for path in (own_prefix / "venv").iterdir()] == ["1"]


PACKAGES = "import OpenSSL, daemon, setuptools; print(OpenSSL.__version__)"


def test_with_the_packages_of_this_host(stage: Stage, tmp_path: Path) -> None:
    """Nothing is fetched; and where they are too old, or are not there, nothing is installed."""
    prefix = tmp_path / "there"
    there = subprocess.run(
        [INTERPRETER, "-I", "-c", PACKAGES], capture_output=True, text=True, check=False
    )
    done = subprocess.run(
        [INTERPRETER, ROOT / "setup/install.py", "install", prefix],
        env={**os.environ, "SYSTEM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if there.returncode or int(there.stdout.split(".")[0]) < 25:
        assert done.returncode == 1
        assert "python3-openssl, 25.0.0 or newer" in done.stderr
        assert not prefix.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert not [*prefix.glob("venv/1/lib/*/site-packages/OpenSSL")]
        has_auth_and_tls(stage, prefix / "bin/qmail-smtpd")


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    theirs = tmp_path / "bin/qmail-smtpd"
    theirs.parent.mkdir()
    theirs.write_text("netqmail's\n")
    done = run_make("install", tmp_path)
    assert done.returncode != 0
    assert f"{theirs} is there, and not ours: choose another PREFIX" in done.stdout
    assert [path.name for path in theirs.parent.iterdir()] == ["qmail-smtpd"]
    assert not (tmp_path / "venv").exists()


def test_a_package_finds_all_of_itself_where_it_is_unpacked(stage: Stage, tmp_path: Path) -> None:
    """What the start-up image does not have, too, such as TLS and AUTH."""
    root, prefix = tmp_path / "root", tmp_path / "prefix"
    root.mkdir()
    link = tmp_path / "link"
    link.symlink_to(root)
    make("install", prefix, DESTDIR=f"{link}/", COMPILE="")
    below = Path(f"{root}{prefix}")
    for name in PROGRAMS:
        text = (below / "bin" / name).read_text()
        assert str(root) not in text
        assert f"'{prefix}/venv/1/" in text
    shutil.copytree(below, prefix, symlinks=True)
    make("uninstall", prefix, DESTDIR=root)
    assert not below.exists()
    has_auth_and_tls(stage, prefix / "bin/qmail-smtpd")
    assert {Path(path).suffix for path in modules_of_the_listener(prefix)} == {
        ".so" if IS_COMPILED else ".py"
    }


# Removing it


def test_uninstall_leaves_nothing(own_prefix: Path) -> None:
    assert make("uninstall", own_prefix) == ""
    assert not own_prefix.exists()
    again = run_make("uninstall", own_prefix)
    assert again.returncode != 0
    assert "nothing is installed" in again.stdout


def test_uninstall_leaves_files_of_others(own_prefix: Path) -> None:
    changed = own_prefix / "run/smtp/run"
    changed.write_text("#!/bin/sh\nexec tcpserver ...\n")
    theirs = own_prefix / "bin/theirs"
    theirs.write_text("theirs\n")
    said = make("uninstall", own_prefix)
    assert f"kept {changed}, which was changed" in said
    assert files(own_prefix) == {"run/smtp/run", "bin/theirs"}
    assert not (own_prefix / "venv").exists()
    assert not (own_prefix / "man").exists()


# Instead of the program of a qmail


@pytest.fixture
def qmail(tmp_path: Path) -> Path:
    """Where a qmail could be, with a program that greets as qmail-smtpd does."""
    directory = tmp_path / "qmail"
    (directory / "bin").mkdir(parents=True)
    program = directory / "bin/qmail-smtpd"
    program.write_text("#!/bin/sh\necho 220 netqmail\n")
    program.chmod(0o755)
    return directory


def commands(qmail: Path, prefix: Path) -> Iterator[str]:
    """The commands in the README that put a link in the place of a qmail's program, and back."""
    for line in (ROOT / "README.md").read_text().splitlines():
        if re.match(r"    (\[ -L \S+ \] \|\| )?(cp|ln|mv) .*/var/qmail/bin/qmail-smtpd\b", line):
            line = line.replace("/usr/local/qmail-smtpd-py", f"'{prefix}'")
            yield line.strip().replace("/var/qmail", str(qmail))


def test_the_way_to_it_and_back(stage: Stage, qmail: Path, prefix: Path) -> None:
    program = qmail / "bin/qmail-smtpd"
    theirs = program.read_bytes()
    save, link, restore = commands(qmail, prefix)
    assert session(stage, program) == b"220 netqmail\n"
    for command in (save, link, save):  # as somebody who does it once more
        subprocess.run(command, shell=True, check=True)
    assert session(stage, program) == GREETING + GOODBYE
    subprocess.run(restore, shell=True, check=True)
    assert session(stage, program) == b"220 netqmail\n"
    assert program.read_bytes() == theirs
    assert [path.name for path in (qmail / "bin").iterdir()] == ["qmail-smtpd"]


def test_the_list_of_what_is_ours_is_whole_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = _module_of_setup("install")
    install.Installed(tmp_path).put("man/a.8", b"a", 0o644)
    write = Path.write_text

    def write_half(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        install.Installed(tmp_path).put("man/b.8", b"b", 0o644)
    monkeypatch.undo()
    assert install.Installed(tmp_path).is_unchanged("man/a.8")
