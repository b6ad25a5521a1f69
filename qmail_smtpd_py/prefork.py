"""The pool: workers forked ahead, each serving one connection at a time.

The parent accepts nothing and reads nothing from clients.  It forks workers, replaces those that
end, and tells them to stop; all of them wait by epoll(7) on one socket, and for each connection the
kernel wakes one.  What the parent must know of them stands in memory that all share, the Board, so
that a connection costs the parent nothing:

    a worker    marks its place busy or idle; where too few are idle and another could be forked,
                it writes an octet to the parent's pipe, unless the parent is going to look anyway;
                it ends after so many connections, when told to, and when too many are idle; that
                it is told shows on the board, and by the end of a pipe that the parent holds open,
                which also ends with the parent
    the parent  sleeps until that pipe, a signal or a dead worker wakes it, and forks until enough
                are idle, but never more than the limit of connections; where workers are soon
                ready for their next connection, it forks one at a time: then the processors are
                the limit, and more workers would not help

A worker that crashes is replaced; where they crash as soon as they are there, later and later.
"""

from __future__ import annotations

import gc
import os
import select
import time
from _signal import (  # type: ignore[import-not-found]  # signal, without its enums
    SIG_BLOCK,
    SIG_DFL,
    SIG_UNBLOCK,
    SIGALRM,
    SIGCHLD,
    SIGTERM,
    SIGUSR2,
    pthread_sigmask,
    set_wakeup_fd,
)
from _signal import signal as set_handler
from os import _exit, close, fork  # who looks for them in a module writes to five pages more

from .board import BUSY, EMPTY, IDLE, Board, Place
from .log import OUT_OF_MEMORY, where

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

    from .oomscore import OomScore

_DEFAULT_IN_WORKERS = (SIGTERM, SIGALRM, SIGCHLD, SIGUSR2)

_CRASH_DELAY, _LONGEST_CRASH_DELAY = 0.25, 30.0  # seconds; doubled with each crash in a row
_MANY_CRASHES = 4  # in a row; as few may be chance
_TICK = 0.05  # seconds; a worker that took no new connection in them is waiting for its client
_YOUNG = 1.0  # seconds; who dies at that age, and not of a connection, can not work at all


class Employer:
    """What the pool asks of the listener, in the parent; but `tell`, and what `employ` makes, are
    for workers, too.

    `own_descriptors` are those that workers are not to have.
    """

    own_descriptors: tuple[int, ...] = ()

    def employ(self, place: Place) -> Callable[[], None]:
        """What a worker does in its place until its end."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Workers are going to be forked."""
        raise NotImplementedError

    def tell(self, line: str) -> None:
        """Words for the log."""
        raise NotImplementedError

    def tell_end(self, pid: int, status: int, busy: int) -> None:
        """A worker did not live to the end of its connection; `status` is its wait status, and
        `busy` how many connections are left.
        """
        raise NotImplementedError


class Pool:
    """The workers, from the parent's side.

    `limit` is the number of connections served at a time; `idle` is how many workers wait for the
    next at least, and up to twice as many do.  `signals` is a descriptor that signals wake.
    """

    def __init__(
        self, limit: int, idle: int, employer: Employer, score: OomScore, signals: int
    ) -> None:
        self.board = Board(limit)
        self._least_idle = min(idle, limit)
        self._most_idle = 2 * idle
        self._employer = employer
        self._score = score
        self._places: dict[int, int] = {}  # by process id
        self._births: dict[int, float] = {}  # likewise
        self._turns = b""  # as they were when we looked
        self._looked_at = 0.0
        self._lifeline, self._held = os.pipe()
        self._hear, self._notify = os.pipe()
        os.set_blocking(self._hear, False)
        os.set_blocking(self._notify, False)
        self._poll = select.poll()
        self._poll.register(self._hear, select.POLLIN)
        self._poll.register(signals, select.POLLIN)
        self._pid = os.getpid()
        self._crashes = 0  # in a row, of workers that could not work at all
        self._owes_one = False
        self._fork_at = 0.0  # not before

    @property
    def workers(self) -> list[int]:
        """The process ids of all workers."""
        return list(self._places)

    def adopt(self, workers: Iterable[int]) -> None:
        """Count the workers of a listener before us, each as one that serves: they end after that
        by themselves.
        """
        for pid in workers:
            place = self.board.free_place()
            if place < 0:
                return
            self.board.mark(place, BUSY)
            self._places[pid] = place
            self._births[pid] = 0.0

    def maintain(self) -> None:
        """Reap the dead, and fork until enough workers are idle."""
        self._reap()
        was_short = self.board.is_looking
        self.board.look(soon=False)  # before we do: who becomes busy behind our back tells us
        if self.board.stopping or time.monotonic() < self._fork_at:
            return
        wanted = min(self._number_to_fork(was_short), self.board.count(EMPTY))
        if wanted:
            self._employer.prepare()
            gc.freeze()  # the children leave what is there alone, and its pages stay shared
            self._fork(wanted)

    def _number_to_fork(self, was_short: bool) -> int:
        """How many workers to fork: not one by one, as each time costs the parent the pages that it
        writes to afterwards; `was_short` says that too few were idle when it looked last.

        Where they are turning it is one by one: if clients hold them up, and not the processors,
        it takes more of them to serve what comes.
        """
        idle = self.board.idle
        if idle >= self._least_idle:
            return int(self._owes_one)
        if not self._places:
            return self._least_idle
        few = self._most_idle - len(self._places)
        is_time = time.monotonic() > self._looked_at + _TICK
        if is_time and not self._are_turning():
            return self._most_idle - idle + self.board.busy
        self.board.look(soon=True)
        return max(few, int(self._owes_one), int(is_time and was_short))

    def _are_turning(self) -> bool:
        """Whether most of those that are busy have taken a connection since we looked, a moment
        ago: what waits is taken soon.
        """
        before, self._looked_at = self._turns, time.monotonic()
        states, self._turns = self.board.states_and_turns
        turns = zip(states, before, self._turns)
        stuck = sum(state == BUSY[0] and old == new for state, old, new in turns)
        return 2 * stuck < states.count(BUSY)

    def wait(self, longest: float | None) -> None:
        """Sleep until there is something to do, but for no more than so many seconds."""
        now = time.monotonic()
        waits = [longest] if longest is not None else []
        if self._fork_at > now and not self.board.stopping:
            waits.append(self._fork_at - now)
        if self.board.is_looking:
            waits.append(max(0.0, self._looked_at + _TICK - now))
        for descriptor, _ in self._poll.poll(min(waits) * 1000 + 1 if waits else None):
            try:
                os.read(descriptor, 4096)
            except BlockingIOError:
                pass

    def replace_all(self) -> None:
        """Let each worker end after the connection that it serves, and others take its place."""
        if self.board.stopping:
            return
        try:
            lifeline, held = os.pipe()
        except OSError as error:
            self._employer.tell(f"warning: cannot replace workers: {error.strerror}")
            return
        self.board.next_epoch()
        os.close(self._held)
        os.close(self._lifeline)
        self._lifeline, self._held = lifeline, held

    def stop(self) -> None:
        """Let each worker end after the connection that it serves."""
        if not self.board.stopping:
            self.board.stop()
            os.close(self._held)

    def signal_all(self, number: int) -> None:
        """Send all workers a signal."""
        for pid in self.workers:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def _reap(self) -> None:
        """Take note of the dead.

        Who crashed may have been woken for a connection that it did not accept, and the kernel
        wakes none of those that wait in its place: a new one sees it, so that one is owed.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            place = self._places.pop(pid, None)
            if place is None:
                continue  # an orphan, where we are process 1
            self._owes_one = self._owes_one or status != 0
            age = time.monotonic() - self._births.pop(pid)
            was_busy = self.board.is_busy(place)
            has_worked = not status or age > _YOUNG or was_busy
            self._crashes = 0 if has_worked else self._crashes + 1
            self.board.mark(place, EMPTY)
            if status and was_busy:
                self._employer.tell_end(pid, status, self.board.busy)
            if status and not self.board.stopping:
                self._note_crash(pid, status)

    def _note_crash(self, pid: int, status: int) -> None:
        """Tell of a crash, and let the next worker wait if this looks like a loop of them."""
        if os.WIFSIGNALED(status):
            how = f"was killed by signal {os.WTERMSIG(status)}"
        else:
            how = f"ended with status {os.WEXITSTATUS(status)}"
        if self._crashes > _MANY_CRASHES:
            exponent = min(self._crashes - _MANY_CRASHES - 1, 10)
            delay = min(_CRASH_DELAY * 2**exponent, _LONGEST_CRASH_DELAY)
            self._fork_at = time.monotonic() + delay
            how += f"; no new ones for {delay:g} s"
        self._employer.tell(f"warning: worker {pid} {how}")

    def _fork(self, number: int) -> None:
        """Start so many workers; there have to be places for them.

        What they need is made before the first is there: after a fork each page of the parent is
        shared, and what it writes to until the next is copied.
        """
        places, works = [], []
        for _ in range(number):
            place = self.board.free_place()
            self.board.mark(place, IDLE)
            places.append(place)
            # Here, as the epoch that counts is that of the lifeline: later there may be another.
            works.append(self._employer.employ(self._place(place)))
        pids = self._fork_for(works)
        now = time.monotonic()
        for pid, place in zip(pids, places):
            self._places[pid] = place
            self._births[pid] = now
            self._owes_one = False
        for place in places[len(pids) :]:
            self.board.mark(place, EMPTY)

    def _place(self, number: int) -> Place:
        return Place(
            self.board,
            number,
            parent=self._pid,
            notify=self._notify,
            lifeline=self._lifeline,
            least_idle=self._least_idle,
            most_idle=self._most_idle,
        )

    def _fork_for(self, works: Iterable[Callable[[], None]]) -> list[int]:
        """The process ids of workers for as many of these as can be forked for, the first ones."""
        tell = self._employer.tell
        parents_own = (self._hear, self._held, *self._employer.own_descriptors)
        pids = []
        # Or a signal could come to a child that has the parent's handlers yet, and be lost.
        pthread_sigmask(SIG_BLOCK, _DEFAULT_IN_WORKERS)
        try:
            for work in works:
                pid = fork()
                if not pid:
                    _become_worker(work, tell, parents_own, self._score)
                pids.append(pid)
        except OSError as error:
            self._employer.tell(f"warning: cannot fork: {error.strerror}")
            self._fork_at = time.monotonic() + 1
        finally:
            pthread_sigmask(SIG_UNBLOCK, _DEFAULT_IN_WORKERS)
        return pids


def _become_worker(
    work: Callable[[], None],
    tell: Callable[[str], None],
    parents_own: tuple[int, ...],
    score: OomScore,
) -> NoReturn:
    """What the child does; it never comes back.  The descriptors that are the parent's own are not
    for it.

    The other signals of the parent, which a terminal sends to the whole process group, keep their
    handler, and nobody looks at what it notes: what is ignored would stay ignored in children.
    """
    status = 1
    try:
        for number in _DEFAULT_IN_WORKERS:
            set_handler(number, SIG_DFL)
        pthread_sigmask(SIG_UNBLOCK, _DEFAULT_IN_WORKERS)
        set_wakeup_fd(-1)
        for descriptor in parents_own:
            close(descriptor)
        score.raise_own()
        work()
        status = 0
    except MemoryError:
        tell(f"fatal: {OUT_OF_MEMORY}")
    except Exception as error:  # a defect: what it was, without a traceback
        tell(f"fatal: {where(error)}")
    finally:
        _exit(status)
