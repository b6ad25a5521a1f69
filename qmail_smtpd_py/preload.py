"""What sessions run, loaded before all else of the listener; it is what `make install` compiles.

Compiled modules load each other out of one file.  One that another kind of module asks for first
has the interpreter map a file of its own: five more areas of memory for each fork to copy.
"""

from __future__ import annotations

# isort: off
from . import (  # noqa: F401
    # the core
    conduct, connection, effects, lines, maildata, path, reply, sasl, session, trace, transaction,
    watched,
    # its edges
    authfailures, badmailfrom, cdb, channel, checkpassword, control, controlcache, localip, log,
    qmail_queue, rcpthosts, settings, transcript, wire,
    # what brings them together, and what workers do beside it
    board, encryption, proxyprotocol, smtpd, tcpenviron, tcprules, worker, workerwire,
)  # fmt: skip
