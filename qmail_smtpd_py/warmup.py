"""Warming up: what workers are to find in memory is loaded, tried and arranged before the fork.

Control files and TLS contexts as they are now; code that some sessions have run already, see
`rehearsal`; a heap that workers write to in few places, see `heap`.
"""

from __future__ import annotations

import gc
import time

from . import heap, hugepages, log, tls
from .effects import ControlError
from .encryption import why_not_loaded
from .rehearsal import rehearse
from .smtpd import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .service import Service

_LOOK_SECONDS = 1.0  # between two looks for what forks are to share


class WarmUp:
    """What is done before a fork; TLS contexts are made anew after `max_age` seconds."""

    def __init__(self, service: Service, max_age: float) -> None:
        self._service = service
        self._max_age = max_age
        self._look_at = 0.0
        self._renew_at = 0.0
        self._filling = heap.Filling()
        self._old_code: list[object] = []

    def renew(self) -> None:
        """Have all of it anew before the next fork."""
        self._look_at = self._renew_at = 0.0

    def prepare(self) -> None:
        """Have ready what the next fork is to share: files, and TLS contexts.

        Not before each, where forks follow each other: what is looked at costs the parent copies of
        pages.  With the contexts go the keys of session tickets, which are not to be good for ever.
        """
        now, service = time.monotonic(), self._service
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        if now <= self._renew_at:
            _preload(service)
            return
        service.resources.contexts = tls.CachedContexts()
        service.resources.forget_home()
        gc.unfreeze()  # what is of no use any more, circles among it, would be there for good
        gc.collect()
        _preload(service)
        if self._old_code:
            _rehearse(service)
        else:
            self._arrange()
        self._renew_at = time.monotonic() + self._max_age

    def _arrange(self) -> None:
        """Arrange memory for what sessions do with it; once, as it stays like that."""
        with heap.watching() as ran:
            can_rehearse = _rehearse(self._service)
        gc.collect()
        try:
            self._filling.fill()
            if can_rehearse:
                self._old_code = heap.move(ran)
                _rehearse(self._service)  # the copies, too, are to be specialised
                self._filling.fill_mallocs()  # there it has left holes
            hugepages.gather()
        except MemoryError:
            self._filling.empty()


def _preload(service: Service) -> None:
    """Have control files and TLS contexts as they are now in memory, for the next fork to share."""
    service.resources.files.refresh()
    try:
        service.resources.go_home(service.environ)
        server = Server(service.environ, service.arguments, service.resources)
        try:
            server.preload()
        finally:
            server.close()
    except ControlError as error:
        service.complain(f"warning: cannot load ahead: {error}")
    except Exception as error:  # each connection may have it, the parent must not
        service.complain(f"warning: cannot load ahead: {_cause(error)}")


def _rehearse(service: Service) -> bool:
    """Have the first sessions behind us, for the next fork to share what they set up; whether that
    could be.
    """
    try:
        rehearse(service)
    except Exception as error:  # as above
        service.complain(f"warning: cannot rehearse: {_cause(error)}")
        return False
    return True


def _cause(error: Exception) -> str:
    """What may be told of an exception: what it is a sign of, or else where the defect is."""
    if isinstance(error, (ImportError, MemoryError, SystemError)):
        return why_not_loaded(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return log.where(error)
