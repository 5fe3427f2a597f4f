"""The simulation at length: ten thousand steps that change something, fifty crashes between each pair of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from tests.faults.journal import Row
from tests.property.simulation.processes import Arena
from tests.property.simulation.steps import GAPS
from tests.property.test_simulation import arena, simulate

__all__ = ["arena"]

EXAMPLES_AT_ONCE: Final = 50
RUNS_MAX: Final = 40


@pytest.mark.timeout(900)
def test_ten_thousand_steps_and_fifty_crashes_between_each_pair_of_them(
    arena: Arena,
    row: Callable[[str, str], Row],
    rounds: Callable[[int, int], int],
) -> None:
    result = row("Simulation", "a crash between any two steps, on real stores")
    changes_min, crashes_min = rounds(10_000, 500), rounds(50, 0)
    gaps = [(doing, gap) for doing, some in GAPS.items() for gap in some]
    fewest = 0
    while sum(arena.changes.values()) < changes_min or fewest < crashes_min:
        assert result.rounds < RUNS_MAX * EXAMPLES_AT_ONCE, f"too few crashes: {arena.crashes} after {arena.changes}"
        simulate(arena, examples=rounds(EXAMPLES_AT_ONCE, 15), number=result.rounds)
        fewest = min(arena.crashes[gap] for gap in gaps)
        result.rounds = arena.examples
        result.operations = sum(arena.changes.values())
        result.acknowledged = arena.changes["booking"]
        result.in_flight = sum(arena.crashes.values())
    result.what += f": {result.operations:,} that changed something, at least {fewest} crashes between each pair"
    result.require_green()
