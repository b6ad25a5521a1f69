"""The board: what parent and workers know of each other, in memory that all of them share."""

from __future__ import annotations

import mmap
import os

EMPTY = b"\0"
IDLE = b"\1"
BUSY = b"\2"
LEAVING = b"\3"
"""The states of a worker: there is none, it waits, it serves, it is about to end."""

# Where it stands on the board.
_STOPPING = 0
_EPOCH = 1
_LOOKING = 2
_FIRST = 3


class Board:
    """The state of each worker, one octet a place, in memory shared by parent and workers.

    The first octets are the parent's: whether it is stopping, its epoch, which changes when workers
    are to end or to be replaced, and whether it is going to look how many are idle.  Behind the
    states stand the turns, an octet a place, which changes with each connection.
    """

    def __init__(self, places: int) -> None:
        self._memory = mmap.mmap(-1, _FIRST + 2 * places)
        self._end = _FIRST + places

    def count(self, state: bytes) -> int:
        """How many workers are in a state."""
        return self._memory[_FIRST : self._end].count(state)

    def is_busy(self, place: int) -> bool:
        """Whether the worker at a place serves a connection, or died of one."""
        return self._memory[_FIRST + place] == BUSY[0]

    def mark(self, place: int, state: bytes) -> None:
        """Note the state of the worker at a place."""
        self._memory[_FIRST + place] = state[0]

    def take_turn(self, place: int) -> None:
        """Note that the worker at a place has a new connection."""
        self.mark(place, BUSY)
        turn = self._end + place
        self._memory[turn] = (self._memory[turn] + 1) % 256

    @property
    def states_and_turns(self) -> tuple[bytes, bytes]:
        """The states and the turns, a place an octet."""
        return self._memory[_FIRST : self._end], self._memory[self._end :]

    @property
    def is_looking(self) -> bool:
        """Whether the parent is going to look how many are idle, without being told."""
        return bool(self._memory[_LOOKING])

    def look(self, soon: bool) -> None:
        """Note whether the parent is going to."""
        self._memory[_LOOKING] = soon

    def free_place(self) -> int:
        """A place without a worker; negative if there is none."""
        return self._memory.find(EMPTY, _FIRST, self._end) - _FIRST

    @property
    def busy(self) -> int:
        """How many connections are being served."""
        return self.count(BUSY)

    @property
    def idle(self) -> int:
        """How many workers wait for a connection."""
        return self.count(IDLE)

    @property
    def stopping(self) -> bool:
        """Whether workers are to end after the connection that they serve."""
        return bool(self._memory[_STOPPING])

    def stop(self) -> None:
        """Tell all workers to end."""
        self._memory[_STOPPING] = 1
        self.next_epoch()

    def epoch(self) -> int:
        """Changes when workers are to end."""
        return self._memory[_EPOCH]

    def next_epoch(self) -> None:
        """Tell all workers that there are now to end."""
        self._memory[_EPOCH] = (self.epoch() + 1) % 256


class Place:
    """A worker's own place on the board, and the parent's ear.

    `lifeline` is the end of a pipe that hangs up when the worker is not wanted any more.  What is
    asked for each connection is a method: a property takes the interpreter twice the time.
    """

    def __init__(
        self,
        board: Board,
        number: int,
        *,
        parent: int,
        notify: int,
        lifeline: int,
        least_idle: int,
        most_idle: int,
    ) -> None:
        self.board = board
        self.lifeline = lifeline
        self._number = number
        self._notify = notify
        self._most_idle = most_idle
        self._least_idle = least_idle
        self._epoch = board.epoch()
        self._parent = parent

    def begin(self) -> None:
        """A connection was accepted; the parent is told if too few others wait for the next, and
        there is a place for one more: one that becomes free does so by a death, and of that SIGCHLD
        tells.
        """
        self.board.take_turn(self._number)
        board = self.board
        if board.idle < self._least_idle and not board.is_looking and board.free_place() >= 0:
            try:
                os.write(self._notify, b".")
            except OSError:
                pass  # full, or ours was restarted: it looks anyway, or need not

    def end(self) -> None:
        """The connection is over."""
        self.board.mark(self._number, IDLE)

    def is_wanted(self) -> bool:
        """Whether the worker is to go on: nothing told it to end, and its parent lives."""
        return self.board.epoch() == self._epoch and not self.is_orphan()

    def leave_if_spare(self) -> bool:
        """Whether more workers are idle than are of use; if so, this one counts no more."""
        if self.board.idle <= self._most_idle:
            return False
        self.board.mark(self._number, LEAVING)
        return True

    def is_orphan(self) -> bool:
        """Whether the parent is gone."""
        return os.getppid() != self._parent
