"""Python's garbage collector, kept from walking what will stay anyway."""

from __future__ import annotations

import gc
from typing import Final

GARBAGE_THRESHOLD: Final = 10_000
"""New objects between two collections. Neither a request nor a verdict leaves cycles behind, so any finds little."""


def spare_the_collector() -> None:
    """Keep what was imported and made at the start out of every garbage collection to come.

    It is a hundred thousand objects that all stay; walking them took a fifth of the time of a trade, and a seventh of
    that of a breach.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
