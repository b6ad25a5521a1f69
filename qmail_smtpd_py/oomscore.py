"""Who goes first where memory runs out for all: a worker, and not the listener (proc(5)).

A worker that is killed takes its connection with it, and another takes its place; with the parent
the service would end.
"""

from __future__ import annotations

import os

_MORE, _MOST = 200, 1000  # what workers have more than we have, and what there can be
_FILE = "/proc/self/oom_score_adj"


class OomScore:
    """Our own oom_score_adj, which children inherit: it is raised as long as they are forked.

    To be made before -u counts, as behind it the file is root's, for us and for our children.
    `descriptors` are the one that it holds, or none where there is no such file.
    """

    def __init__(self) -> None:
        self.descriptors: tuple[int, ...] = ()
        self._own = 0
        try:
            descriptor = os.open(_FILE, os.O_RDWR)
            self._own = int(os.read(descriptor, 16))
        except (OSError, ValueError):
            return
        self.descriptors = (descriptor,)

    def raise_for_children(self) -> None:
        """Have those that are forked now be killed before us."""
        self._set(min(self._own + _MORE, _MOST))

    def restore(self) -> None:
        """Have our own again."""
        self._set(self._own)

    def _set(self, score: int) -> None:
        for descriptor in self.descriptors:
            try:
                os.pwrite(descriptor, b"%d" % score, 0)
            except OSError:
                pass  # no reason to serve nobody
