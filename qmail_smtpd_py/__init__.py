"""qmail-smtpd in Python; `smtpd` composes the program, docs/design.md shows the parts."""

__version__ = "1.1.0"
