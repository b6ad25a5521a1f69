"""What modules of the standard library do in each forked child, and a worker need not.

`threading` and `random`, which pyOpenSSL brings along, have the interpreter call them after each
fork.  That takes half a millisecond, most of it for copies of the pages that they write to.

    threading   makes its locks anew, as a thread that is not in the child may have had them; a
                listener has no other thread
    random      seeds its generator anew, as children would have its numbers in common; here the
                functions of the module get a generator without a state, which asks the kernel
"""

from __future__ import annotations

import os


def leave_out() -> None:
    """Import the two without their hooks; to be called before anything else imports them."""
    register = os.register_at_fork
    os.register_at_fork = lambda **hooks: None
    try:
        import random
        import threading  # noqa: F401
    finally:
        os.register_at_fork = register
    seeded = random._inst
    kernel = random.SystemRandom()
    for name, value in list(vars(random).items()):
        if getattr(value, "__self__", None) is seeded:
            setattr(random, name, getattr(kernel, name))
    random._inst = kernel
