"""Failpoints: named places where a fault test makes a process die, stop or stall.

``PLIMSOLL_FAILPOINTS=outbox.after_postgres_commit=kill@7,sweep.slow=2.5`` kills at the seventh passage of the first and
sleeps 2.5 s at each of the second. Where the variable is not set, a place costs the look at an empty dictionary.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from typing import Final

VARIABLE: Final = "PLIMSOLL_FAILPOINTS"


@dataclass(slots=True)
class Failpoint:
    """What happens at a place: ``kill``, ``stop``, ``wedge`` or a number of seconds; at each passage or the nth."""

    action: str
    nth: int
    passages: int = 0

    def is_due(self) -> bool:
        """Count a passage; whether it is one at which something happens."""
        self.passages += 1
        return self.nth in {0, self.passages}


ACTIVE: Final[dict[str, Failpoint]] = {}


def configure(text: str) -> None:
    """Replace the active failpoints by those that ``text`` names. Raises ``ValueError`` for what cannot be meant."""
    ACTIVE.clear()
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, effect = item.partition("=")
        action, _, nth = (effect or "wedge").partition("@")
        if action not in {"kill", "stop", "wedge"}:
            float(action)
        ACTIVE[name] = Failpoint(action, int(nth or 0))


async def reach(name: str) -> None:
    """Pass the place ``name``; seconds are slept while the loop goes on."""
    if ACTIVE and (found := ACTIVE.get(name)) is not None and found.is_due():
        if found.action == "wedge":
            await asyncio.Event().wait()
        elif found.action in {"kill", "stop"}:
            _signal(found.action)
        else:
            await asyncio.sleep(float(found.action))


def block(name: str) -> None:
    """Pass the place ``name``; seconds are slept with the whole loop."""
    if ACTIVE and (found := ACTIVE.get(name)) is not None and found.is_due():
        time.sleep(float(found.action))


def _signal(action: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


configure(os.environ.get(VARIABLE, ""))
