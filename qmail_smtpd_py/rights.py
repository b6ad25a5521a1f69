"""Whose a file is, and what stands in the way of somebody who wants to use one.

The questions are asked of the kernel with the rights that the process has: qmail-smtpd-check asks
them in a child that has become the user of the service.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def user_name(uid: int) -> str:
    """The name of a user id, or the number."""
    return _name(lambda: pwd.getpwuid(uid).pw_name, uid)


def group_name(gid: int) -> str:
    """The name of a group id, or the number."""
    return _name(lambda: grp.getgrgid(gid).gr_name, gid)


def _name(look_up: Callable[[], str], number: int) -> str:
    try:
        return look_up()
    except KeyError:
        return str(number)


def owner(found: os.stat_result) -> str:
    """Owner, group and mode, as an administrator writes them."""
    mode = stat.S_IMODE(found.st_mode)
    return f"{user_name(found.st_uid)}:{group_name(found.st_gid)} {mode:04o}"


def obstacle(path: str) -> str:
    """What keeps this process from a file: the first directory that it may not enter, or the file's
    own owner and mode; empty if nothing is known.
    """
    whole = os.path.abspath(path)
    parts = whole.split("/")
    for number in range(2, len(parts)):
        directory = "/".join(parts[:number])
        try:
            found = os.stat(directory)
        except OSError:
            break
        if not os.access(directory, os.X_OK):
            return f"{directory} ({owner(found)}) may not be entered"
    try:
        return f"{whole} is {owner(os.stat(whole))}"
    except OSError:
        return ""


def remedy_for_directory(path: str, who: object, own: tuple[str, ...] = ()) -> str:
    """How a user gets a directory that may not be there yet.

    `own` are beginnings of the names that its program makes there: a directory with anything else
    in it, such as /var/log, is others' too, and nobody is told to give it away.
    """
    try:
        is_shared = any(not name.startswith(own) for name in os.listdir(path))
    except FileNotFoundError:
        is_shared = False
    except OSError:
        is_shared = True
    if is_shared:
        return f"name a directory of its own: mkdir DIRECTORY; chown {who} DIRECTORY"
    return f"mkdir -p {path}; chown {who} {path}; chmod u+rwx {path}"


def program_trouble(path: str) -> tuple[str, str]:
    """Why a program can not be started by this process, and the remedy; both empty if it can."""
    if not os.path.exists(path):
        barrier = obstacle(path)
        if "may not be entered" in barrier:
            return f"{path} can not be reached: {barrier}", "let that user enter the directory"
        return f"{path} is not there", "correct the path, or install it"
    if not os.path.isfile(path):
        return f"{path} is not a file", "name the program itself"
    if not os.access(path, os.X_OK):
        return (
            f"{path} is not executable for uid {os.geteuid()}: {obstacle(path)}",
            f"chmod a+rx {path}",
        )
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError:
        return "", ""  # a program that can be run need not be readable
    return _interpreter_trouble(path, start)


def _interpreter_trouble(path: str, start: bytes) -> tuple[str, str]:
    """The same for what the file begins with (execve(2))."""
    if start.startswith(b"\x7fELF"):
        return "", ""
    if not start.startswith(b"#!"):
        return (
            f"{path} begins neither with #! nor as a program does: the kernel does not start it",
            "put #!/bin/sh, or what it is written in, into its first line",
        )
    words = start[2:].partition(b"\n")[0].replace(b"\t", b" ").strip(b" ").split(b" ")
    interpreter = os.fsdecode(words[0])
    if not os.access(interpreter, os.X_OK):
        remedy = "correct its first line; a carriage return at its end is a part of the name"
        return f"{path} names {interpreter!a} as interpreter, which can not be started", remedy
    return "", ""


def has_setuid(path: str) -> bool:
    """Whether a program runs as its owner: it is setuid, and its file system lets it be."""
    found = os.stat(path)
    return bool(found.st_mode & stat.S_ISUID) and not os.statvfs(path).f_flag & os.ST_NOSUID
