"""qmail-smtpd-users(8): keeps the users file, see `users_file`.

Passwords are typed, or read from standard input, and never an argument.
"""

from __future__ import annotations

import os
import sys

from .users_file import PasswordHash, Trouble, User, change, checked_name, configured_path, load

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

DEFAULT_HOME = "/var/qmail"

DONE = 0
REFUSED = 1
TROUBLE = 111


class Refusal(Exception):
    """What the administrator asks for can not be; the text says why."""


def main() -> int:
    """Run qmail-smtpd-users(8); returns the exit status."""
    arguments = _argument_parser().parse_args()
    try:
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
        print(end="", flush=True)
    except OSError as error:
        print(f"qmail-smtpd-users: cannot write: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in the buffer
        return TROUBLE
    except Trouble as trouble:
        print(f"qmail-smtpd-users: {trouble}", file=sys.stderr)
        return TROUBLE
    except (Refusal, KeyboardInterrupt) as refusal:
        print(f"qmail-smtpd-users: {str(refusal) or 'given up'}", file=sys.stderr)
        return REFUSED
    return DONE


def _argument_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="qmail-smtpd-users", description="Keep the users file of checkpassword-users."
    )
    parser.add_argument(
        "--file", default=_path(), help="instead of $SMTPUSERS or control/smtpusers (%(default)s)"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command, name, summary in (
        (_set, "set", "add a user, or give it another password"),
        (_remove, "remove", "remove a user"),
        (_list, "list", "show the users, how each password is hashed, and who can use CRAM-MD5"),
        (_check, "check", "see whether a password is the user's"),
    ):
        subparser = commands.add_parser(name, help=summary, description=summary)
        subparser.set_defaults(command=command)
        if command is not _list:
            subparser.add_argument("user", metavar="USER", type=os.fsencode)
        if command in (_set, _check):
            subparser.add_argument("--stdin", action="store_true", help="read a line, do not ask")
        if command is _set:
            subparser.add_argument(
                "--cram", action="store_true", help="keep the password itself, for CRAM-MD5"
            )
    return parser


def _path() -> str:
    """Where qmail-smtpd, which changes to the qmail home directory, has the users file."""
    return os.path.join(os.environ.get("QMAILHOME") or DEFAULT_HOME, configured_path())


def _set(arguments: argparse.Namespace) -> None:
    try:
        name = checked_name(arguments.user)
    except ValueError as error:
        raise Refusal(f"no name for a user: {error}") from None
    password = _ask("Password: ", "Once more: ", from_stdin=arguments.stdin)
    is_new = not os.path.exists(arguments.file)
    user = User(name, PasswordHash.of(password), password if arguments.cram else None)
    change(arguments.file, lambda users: users.put(user))
    if is_new:
        file = f"{arguments.file!a}"
        remedy = f"chgrp GROUP {file}; chmod 640 {file}"
        why = "let the group that qmail-smtpd runs with read it"
        print(f"made {file}, which only uid {os.geteuid()} can read; {why}: {remedy}")


def _remove(arguments: argparse.Namespace) -> None:
    try:
        change(arguments.file, lambda users: users.remove(arguments.user))
    except KeyError:
        raise Refusal(f"there is no such user in {arguments.file!a}") from None


def _list(arguments: argparse.Namespace) -> None:
    if not sys.stdout:
        raise Refusal("standard output is closed")
    for name, user in load(arguments.file).users.items():
        costs = user.password_hash
        facts = f"scrypt ln={costs.ln},r={costs.r},p={costs.p}"
        if user.cram_secret is not None:
            facts += " CRAM-MD5"
        sys.stdout.buffer.write(name + b": " + facts.encode() + b"\n")


def _check(arguments: argparse.Namespace) -> None:
    users = load(arguments.file)
    password = _ask("Password: ", from_stdin=arguments.stdin)
    if not users.accepts_password(arguments.user, password):
        raise Refusal("refused: the user is not known, or the password is another")
    print("accepted")


def _ask(*prompts: str, from_stdin: bool) -> bytes:
    """The password: a line of standard input, or what the terminal gives for every prompt."""
    if from_stdin:
        if not sys.stdin:  # it is closed
            raise Refusal("no password could be read from standard input")
        try:
            line = sys.stdin.buffer.readline()
        except OSError as error:
            why = f"no password could be read from standard input: {error.strerror}"
            raise Refusal(why) from None
        password = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
    else:
        first, *others = (_ask_terminal(prompt) for prompt in prompts)
        if any(other != first for other in others):
            raise Refusal("the two are not the same")
        password = first
    if not password or b"\0" in password:
        raise Refusal("a password is not empty, and has no NUL")
    return password


def _ask_terminal(prompt: str) -> bytes:
    import getpass
    import warnings

    try:
        with warnings.catch_warnings():
            # That the password would be seen on the screen is only a warning to getpass.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass(prompt).encode()
    except (getpass.GetPassWarning, EOFError, UnicodeError):
        raise Refusal("no password could be read from the terminal (see --stdin)") from None
