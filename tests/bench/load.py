"""wrk with ``load.lua``: one thread, many connections, and a count of what was really answered."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, Literal

CONNECTIONS: Final = 64
WARM_SECONDS: Final = 0.5
TAIL_SECONDS: Final = 1.0
"""wrk counts in whole seconds; in the last one only pages that do not exist are asked for."""

MARK: Final = 50_000
SCRIPT: Final = Path(__file__).with_name("load.lua")

Kind = Literal["trade", "positions"]
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk sent, how much of it was answered as it should, and how fast: a second's good answers.

    ``late`` are trades that were booked and answered before Postgres had them, ``unanswered`` what still waited for an
    answer when wrk ended: none, unless the server stood still for the last second.
    """

    sent: int
    good: int
    late: int
    unanswered: int
    rate: float
    bytes_per_answer: float
    other: str

    @property
    def share_good(self) -> float:
        """The good answers' share of all requests of the kind."""
        return self.good / self.sent if self.sent else 0.0


async def load(
    url: str, kind: Kind, *, accounts: int, seconds: int, connections: int = CONNECTIONS, run: str = "run"
) -> Load:
    """Send ``kind`` for ``seconds`` and wait for every answer. Client ids begin with ``run``, so that none is repeated.

    Raises ``RuntimeError`` when wrk fails.
    """
    number = next(_numbers)
    send_seconds = float(seconds)
    command = [
        wrk(),
        *("--threads", "1", "--connections", str(connections)),
        *("--duration", f"{seconds + int(TAIL_SECONDS)}s", "--timeout", "10s"),
        *("--script", str(SCRIPT), url, "--", kind, f"{run}{number}", str(accounts), str(MARK * 100)),
        *(str(int(send_seconds * 1000)), str(int(WARM_SECONDS * 1000)), str(number)),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or len(lines) != 1:
        raise RuntimeError(f"wrk failed:\n{output}")
    said = json.loads(lines[0])
    return Load(
        sent=said["sent"],
        good=said["good"],
        late=said["late"],
        unanswered=said["sent"] - said["good"] - said["late"] - said["bad"],
        rate=said["timed"] / (send_seconds - WARM_SECONDS),
        bytes_per_answer=said["bytes"] / max(1, said["good"]),
        other=said["other"],
    )


def wrk() -> str:
    """The program. Raises ``RuntimeError`` without it."""
    found = shutil.which("wrk")
    if found is None:
        raise RuntimeError("wrk is missing: apt-get install wrk")
    return found
