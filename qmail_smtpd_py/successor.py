"""The successor: the listener that we become at USR2, with new code, on the same socket and under
the same process id.

It is started as we were: with the same words, environment and directory.  Before that it is seen
whether it would start at all, as there is no way back.
"""

from __future__ import annotations

import os
import sys
from errno import EACCES

from .options import NAME, Options
from .smtpd import home_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence

_TRIAL_SECONDS = 10  # for a program to show its usage


class Successor:
    """What would be started in our place; made at our own start, as later we may not see it.

    `directory` is where we were started, which names may be relative to; empty if that is not
    known.
    """

    def __init__(self, options: Options, environ: Mapping[bytes, bytes]) -> None:
        self._options = options
        self._environ = environ
        self.directory = _current_directory()

    @property
    def home(self) -> str:
        """The qmail home of those clients for whom rules set no other."""
        return os.fsdecode(home_of(self._environ))

    def command(self) -> list[bytes]:
        """Its command line, in the directory where it belongs, to which this goes; raises OSError
        where it would not start.
        """
        with open("/proc/self/cmdline", "rb") as file:  # with the interpreter's own options
            words = file.read().split(b"\0")[:-1]
        self._go_to_start()
        self._try(words[: len(words) - len(sys.argv) + 1])
        return words

    def _go_to_start(self) -> None:
        """Go to the directory of the start; raises OSError where a name depends on it.

        It may be one that -u may not enter, such as root's home, or that is there no more.
        """
        try:
            os.chdir(self.directory)
        except OSError:
            names = sys.argv[0], self.home
            if self._options.has_relative_names or not all(map(os.path.isabs, names)):
                raise

    def _try(self, command: Sequence[bytes]) -> None:
        """See that the program that is there now can be started, and the qmail home be entered;
        raises OSError.

        The interpreter would end us where it does not find it, or not all that it imports.
        """
        try:
            import subprocess
        except ImportError as error:  # the interpreter that we are may be gone
            raise OSError(0, str(error), sys.executable) from None
        os.stat(self.home)
        if not os.access(self.home, os.X_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), self.home)
        open(sys.argv[0]).close()
        try:
            done = subprocess.run(
                [*command, b"--help"],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TRIAL_SECONDS,
                check=True,
            )
        except subprocess.SubprocessError as error:
            raise OSError(0, f"it does not start: {_ending(error)}", sys.argv[0]) from None
        if not done.stdout.startswith(f"usage: {NAME} ".encode()):
            raise OSError(0, "it is another program", sys.argv[0])


def _ending(error: subprocess.SubprocessError) -> str:
    """How a program ended that was tried: the last line that it said, if any."""
    said = (getattr(error, "stderr", None) or b"").splitlines()
    if said:
        return os.fsdecode(said[-1])
    status = getattr(error, "returncode", None)
    return f"no usage in {_TRIAL_SECONDS} s" if status is None else f"exit status {status}"


def _current_directory() -> str:
    """Where we are; empty where that is there no more, or may not be known."""
    try:
        return os.getcwd()
    except OSError:
        return ""
