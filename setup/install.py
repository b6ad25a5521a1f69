"""Install the programs below a prefix, or remove them; the Makefile runs this.

    python3 setup/install.py install PREFIX      with DESTDIR in the environment, for packages; with
                                                 SYSTEM, for the pyOpenSSL that the host has;
                                                 COMPILE=no for Python and nothing else
    python3 setup/install.py uninstall PREFIX

PREFIX is a directory of our own, such as /usr/local/qmail-smtpd-py:

    bin/          the programs: launchers, see qmail_smtpd_py/launcher.py
    man/man8/     their manual pages
    docs/         the documents, with README.md and CHANGES.md beside them
    run/          service directories for daemontools, to be copied
    systemd/      units for systemd, to be copied
    fail2ban/     a filter and a jail for fail2ban, to be copied
    hooks/        deploy hooks for certbot and acme.sh
    venv/1, 2 ..  a virtual environment for each installation, with the code that launchers run;
                  in compiled/, that of qmail-smtpd-listen, see compiling.py
    installed     the files of all these, with the SHA-256 of each; not those of venv

A new version comes as a virtual environment beside the old one, and is in force when its launchers
have been renamed over the old ones.  Until then nothing has changed, and whatever fails changes
nothing.  Sessions that run meanwhile go on with the code that they began with: the environment that
was in force stays until the next installation.

A file that is not in `installed` is somebody else's: it is neither replaced nor removed.  A file
that is in it, but was changed, is not removed either, and one that is to be copied not replaced.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from compiling import NotCompiled, compile_installed

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_PREFIX = "/usr/local/qmail-smtpd-py"
"""What the files that are to be copied have for PREFIX."""

_PLAIN = re.compile(r"[\w./+,:@=-]+")

SERVICES = ("run/", "systemd/", "fail2ban/", "hooks/")
"""Where the files are that administrators copy and change."""

PAGES = sorted(CHECKOUT.glob("man/*.8"))
PROGRAMS = [page.stem for page in PAGES]
"""A program is installed with its manual page, and not without."""


_NOT_READY = (
    "If it is cryptography that was to be built: there is none ready-made for this machine, and"
    " building it needs Rust and the headers of OpenSSL and Python. On Debian 13 or newer, SYSTEM=1"
    " takes Debian's."
)
_OLD = (
    "SYSTEM=1 takes what this host has: python3-openssl, 25.0.0 or newer as in Debian 13,"
    " python3-daemon and python3-setuptools."
)


class Failure(Exception):
    """What was asked for can not be done; the text says why."""


class Installed:
    """The files below a prefix that are ours, each with its digest: what PREFIX/installed says."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._list = prefix / "installed"
        self.digests: dict[str, str] = {}
        if self._list.exists():
            for line in self._list.read_text().splitlines():
                digest, name = line.split("  ", 1)
                self.digests[name] = digest

    def is_unchanged(self, name: str) -> bool:
        """Whether the file is there as it was installed."""
        path = self.prefix / name
        return path.is_file() and digest(path.read_bytes()) == self.digests.get(name)

    def put(self, name: str, content: bytes, mode: int) -> None:
        """Put a file in its place, by rename; a changed one of SERVICES stays, and we say so."""
        path = self.prefix / name
        if name.startswith(SERVICES) and path.exists() and not self.is_unchanged(name):
            print(f"kept {path}, which was changed")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(content)
        new.chmod(mode)
        self.digests[name] = digest(content)
        self._save()
        new.replace(path)

    def remove(self, names: set[str]) -> None:
        """Remove files, and the directories that are empty then; say which stay, and why."""
        for name in names:
            path = self.prefix / name
            if self.is_unchanged(name):
                path.unlink()
            elif path.exists():
                print(f"kept {path}, which was changed")
            del self.digests[name]
        self._save()
        parents = {parent for name in names for parent in Path(name).parents}
        for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
            _remove_if_empty(self.prefix / parent)

    def _save(self) -> None:
        if self.digests:
            lines = [f"{digest}  {name}\n" for name, digest in sorted(self.digests.items())]
            new = self._list.with_name("installed.new")
            new.write_text("".join(lines))
            new.replace(self._list)
        else:
            self._list.unlink()


def digest(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        pass  # Somebody else has files there, or it was never made.


def install(prefix: Path, destdir: str) -> None:
    """Install below the prefix; raises Failure."""
    os.umask(0o022)
    if not _PLAIN.fullmatch(str(prefix)):
        raise Failure(f"{prefix}: run files, units and hooks could not name it")
    target = Path(f"{destdir}{prefix}")
    installed = Installed(target)
    before = set(installed.digests)
    pages = {**_pages(), **_documents()}
    _check_free(installed, {f"bin/{name}" for name in PROGRAMS} | set(pages))
    in_force = _in_force(target)
    environment = _new_environment(target / "venv")
    launchers = _fill(environment)
    files = {**pages, **_services(prefix), **_programs(launchers, destdir)}
    for name, content in files.items():
        executable = name.startswith(("bin/", "hooks/")) or name.endswith("/run")
        installed.put(name, content, 0o755 if executable else 0o644)
    installed.remove(before - set(files))
    for old in _environments(target / "venv"):
        if old != environment and old.name not in in_force:
            shutil.rmtree(old)
    print(f"installed in {prefix}: bin/qmail-smtpd, man, docs, run, systemd, fail2ban, hooks")
    for path in _closed_to_others(target):
        print(f"note: other users can not run the programs, as {path} is closed to them")


def _pages() -> dict[str, bytes]:
    """The manual pages."""
    return {f"man/man8/{page.name}": page.read_bytes() for page in PAGES}


def _documents() -> dict[str, bytes]:
    """What the manual pages and the tools refer to, with links to where these pages are then."""
    paths = [CHECKOUT / "README.md", CHECKOUT / "CHANGES.md", *CHECKOUT.glob("docs/*.md")]
    return {
        str(path.relative_to(CHECKOUT)): path.read_bytes().replace(b"](man/", b"](man/man8/")
        for path in paths
    }


def _services(prefix: Path) -> dict[str, bytes]:
    """The files of the service directories, and the units, for this prefix."""
    found = [path for directory in SERVICES for path in CHECKOUT.glob(f"{directory}**/*")]
    files = [path for path in found if path.is_file()]
    old, new = os.fsencode(DEFAULT_PREFIX), os.fsencode(prefix)
    return {str(file.relative_to(CHECKOUT)): file.read_bytes().replace(old, new) for file in files}


def _programs(launchers: Path, destdir: str) -> dict[str, bytes]:
    """The launchers, as they have to be where DESTDIR is the root directory."""
    below = os.fsencode(f"{destdir}/")
    return {
        f"bin/{name}": (launchers / name).read_bytes().replace(below, b"/") for name in PROGRAMS
    }


def _check_free(installed: Installed, names: set[str]) -> None:
    """See that no file of somebody else's is where ours are to be."""
    for name in names:
        path = installed.prefix / name
        if name not in installed.digests and os.path.lexists(path):
            raise Failure(f"{path} is there, and not ours: choose another PREFIX, or move it away")


def _environments(directory: Path) -> list[Path]:
    """The virtual environments, the oldest first."""
    found = [path for path in directory.glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _in_force(target: Path) -> set[str]:
    """The names of the virtual environments that installed launchers run code of."""
    paths = [target / "bin" / name for name in PROGRAMS]
    texts = [path.read_bytes() for path in paths if path.exists()]
    return {number.decode() for text in texts for number in re.findall(rb"/venv/(\d+)/", text)}


def _new_environment(directory: Path) -> Path:
    number = max((int(path.name) for path in _environments(directory)), default=0) + 1
    return directory / str(number)


def _fill(environment: Path) -> Path:
    """Make the environment, with the package and what it needs; the directory of its launchers."""
    python = environment / "bin" / "python"
    launchers = environment / "launchers"
    print(f"making {environment} ...", flush=True)
    try:
        of_the_system = ["--system-site-packages"] if _takes_the_systems() else []
        _run(sys.executable, "-I", "-m", "venv", *of_the_system, environment)
        with tempfile.TemporaryDirectory() as directory:
            source = _source(Path(directory))
            _install(python, source)
        launchers.mkdir()
        compiled = _compile(python, environment)
        options = ["-I", "-X", "no_debug_ranges", "-m", "qmail_smtpd_py.launcher"]
        _run(python, *options, launchers, *compiled)
    except BaseException:
        shutil.rmtree(environment, ignore_errors=True)
        _remove_if_empty(environment.parent)
        _remove_if_empty(environment.parent.parent)
        raise
    return launchers


def _compile(python: Path, environment: Path) -> list[Path]:
    """Compile what the listener runs; where it is then, or nothing where it can not be."""
    if os.environ.get("COMPILE") == "no":
        return []
    directory = environment / "compiled"
    (package,) = environment.glob("lib/python*/site-packages/qmail_smtpd_py")
    print("compiling what qmail-smtpd-listen runs, in a minute and 0.5 GB ...", flush=True)
    try:
        compile_installed(python, package, directory, fetches=not _takes_the_systems())
    except NotCompiled as error:
        print(f"note: not compiled: {error}\nIt serves all the same, with more processor time.")
        return []
    return [directory]


def _takes_the_systems() -> bool:
    """Whether what the package needs is the system's, where the system updates it."""
    return bool(os.environ.get("SYSTEM"))


def _install(python: Path, source: Path) -> None:
    """Install the package with what it needs; raises Failure."""
    fetching_nothing = ["--no-index", "--no-build-isolation"] if _takes_the_systems() else []
    try:
        _run(python, "-I", "-m", "pip", "install", "--quiet", *fetching_nothing, source)
    except Failure as failure:
        raise Failure(f"{failure}\n{_OLD if fetching_nothing else _NOT_READY}") from None


def _source(directory: Path) -> Path:
    """A copy of what pip needs of the checkout: it would leave its own files there."""
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(CHECKOUT / name, directory)
    package = "qmail_smtpd_py"
    (directory / package).mkdir()
    for path in (CHECKOUT / package).iterdir():
        if path.suffix in (".py", ".cnf"):
            shutil.copy(path, directory / package)
    return directory


def _run(*command: object) -> None:
    try:
        subprocess.run([str(word) for word in command], check=True)
    except subprocess.CalledProcessError as error:
        words = " ".join(error.cmd)
        raise Failure(f"nothing was changed, as this failed: {words}") from None


def _closed_to_others(target: Path) -> list[Path]:
    """What keeps users like qmaild from running the programs."""
    interpreter = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    programs = [interpreter, *(target / "bin" / name for name in PROGRAMS)]
    paths = {path for program in programs for path in (program, *program.parents)}
    return sorted(path for path in paths if not path.stat().st_mode & 0o001)


def uninstall(prefix: Path, destdir: str) -> None:
    """Remove what was installed below the prefix, and nothing else; raises Failure."""
    target = Path(f"{destdir}{prefix}")
    installed = Installed(target)
    if not installed.digests:
        raise Failure(f"nothing is installed in {target}")
    for environment in _environments(target / "venv"):
        shutil.rmtree(environment)
    _remove_if_empty(target / "venv")
    installed.remove(set(installed.digests))
    if target.exists():
        print(f"kept {target}, which has files of others")


def main() -> int:
    """Do what the arguments say; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half made is removed
    try:
        action = {"install": install, "uninstall": uninstall}[sys.argv[1]]
        destdir = os.environ.get("DESTDIR")
        root = os.path.realpath(destdir).rstrip("/") if destdir else ""
        action(Path(os.path.abspath(sys.argv[2])), root)
    except (Failure, OSError) as failure:
        print(f"setup/install.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup/install.py: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
