"""How much is tried, where there is no end to what could be.

HYPOTHESIS_PROFILE=again is for a run after another one, with another interpreter: what is different
there shows early.
"""

from __future__ import annotations

import os

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "repeat")

IS_AGAIN = PROFILE == "again"
"""Whether the same was tried with another interpreter."""


def examples(number: int) -> settings:
    """Settings for a test that has so many examples; again, a fifth of them are tried."""
    return settings(max_examples=number // 5 if IS_AGAIN else number)
