"""What qmail-smtpd-check says of the start: the program that the run file names, and the files that
a listener makes.
"""

from __future__ import annotations

import os
import shutil
import stat

from .chain import LISTENER
from .rights import obstacle, program_trouble, remedy_for_directory
from .unknown import is_known, joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from .chain import Chain
    from .findings import Report


_OF_SVSCAN = "/command:/usr/local/bin:/usr/local/sbin:/bin:/sbin:/usr/bin:/usr/sbin"
"""Where programs are looked for that are started by svscanboot(8), if nobody says otherwise."""


def examine(chain: Chain, smtpd: str, made_directories: Collection[str], report: Report) -> None:
    """Tell what is wrong for the user that this process is; `smtpd` is the program that is checked,
    and `made_directories` are there when the listener starts, whether they are now or not.
    """
    for program in chain.programs:
        _examine_other(*program, report)
    if chain.program is not None and is_known(chain.program):
        _examine_program(chain, chain.program, smtpd, report)
    for option, path in chain.files.items():
        counts = option == "--helper" or "--daemon" in chain.server_flags
        if counts and is_known(path) and not _is_made(os.path.dirname(path), made_directories):
            _examine_file(option, path, report)


def _examine_other(name: str, directory: str, search: str | None, report: Report) -> None:
    """See that a program before ours is there; where nobody knows PATH, its name says nothing."""
    if "/" in name:
        path = joined(directory, name)
        if not is_known(path):
            return
        trouble, remedy = program_trouble(path)
    elif not is_known(name) or search is None or shutil.which(name, path=_with_svscan(search)):
        return
    else:
        trouble = f"there is none in {search}"
        remedy = "install it, or name it with its whole path"
    if trouble:
        report.error("run-file", f"the run file starts {name}, and {trouble}", remedy)


def _with_svscan(search: str) -> str:
    """PATH as it would be under svscanboot(8), where the run file leaves ours in it."""
    own = os.environ.get("PATH", os.defpath)
    return f"{search}:{_OF_SVSCAN}" if own in search else search


def _examine_program(chain: Chain, started: str, smtpd: str, report: Report) -> None:
    """See that what the run file starts is the program that is checked."""
    neighbour = os.path.join(os.path.dirname(smtpd), os.path.basename(started))
    if "/" in started:
        path = os.path.join(chain.directory, started)
        trouble, remedy = program_trouble(path)
    else:
        path = shutil.which(started, path=_with_svscan(chain.program_search)) or ""
        trouble = "" if path else f"there is none in {chain.program_search}"
        remedy = "name it with its whole path"
    there = os.path.realpath(path)
    if trouble:
        what = f"the run file starts {started}, and {trouble}"
        report.error("run-file", what, f"{remedy}; what was checked is {neighbour}")
    elif there != os.path.realpath(neighbour):
        what = f"the run file starts {started}, and what was checked is {neighbour}"
        remedy = f"put {neighbour} into the run file, or a link to it in the place of {started}"
        own_check = os.path.join(os.path.dirname(there), "qmail-smtpd-check")
        if os.path.exists(own_check):
            remedy = f"run {own_check}; or put {neighbour} into the run file"
        report.warning("other-program", what, remedy)


def _is_made(directory: str, made: Collection[str]) -> bool:
    """Whether the script makes a directory, itself or with one that is in it (`mkdir -p`)."""
    return any(f"{path}/".startswith(f"{directory}/") for path in made)


def _examine_file(option: str, path: str, report: Report) -> None:
    """See that a listener can make its socket, its pid file or its log: it does not start without.

    A socket that is there is replaced, so that it is the directory that has to be writable.
    """
    directory, is_socket = os.path.dirname(path), option == "--helper"
    target = path if os.path.exists(path) and not is_socket else directory
    if not os.path.isdir(directory):
        trouble = f"{directory} is not there"
        remedy = f"mkdir -p {directory} || exit 1 in the run file"
    elif os.path.isdir(path):
        trouble, remedy = "it is a directory", "name a file in it"
    elif is_socket and os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        trouble, remedy = "it is there, and is no socket", f"name another, or remove {path}"
    elif not os.access(target, os.W_OK):
        trouble = f"{target} is not writable for uid {os.geteuid()}"
        remedy = f"chown {os.geteuid()} {target}"
        if target == directory:
            remedy = remedy_for_directory(directory, os.geteuid(), (os.path.basename(path),))
    else:
        return
    what = f"{LISTENER} does not start: {option}={path}: {trouble}"
    report.error("run-file", what, remedy, obstacle(target))
