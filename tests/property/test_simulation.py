"""The simulation in its short form; ``tests/faults/test_simulation_at_length.py`` is the long one.

To repeat a failure: ``SIMULATION_SEED=... make test`` with the seed it printed; the steps stand above it. With
``SIMULATION_SHRINK=1`` the shortest steps that fail are looked for first.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import closing
from typing import Final

import psycopg2
import pytest
import redis
import uvloop
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy.engine import make_url

from app import outbox, reconcile
from app.embedded import Stores
from tests.property.simulation.machine import Simulation
from tests.property.simulation.processes import Arena
from tests.property.simulation.steps import wrapped_calls

STEPS_PER_EXAMPLE: Final = 60
SEED: Final = int(os.environ.get("SIMULATION_SEED", random.randrange(2**32)))
SHRINK: Final = "SIMULATION_SHRINK" in os.environ
"""To find the shortest example takes minutes: it is for whoever looks into a failure."""


@pytest.fixture
def arena(stores: Stores) -> Iterator[Arena]:
    """The stores of the simulation. Neither has to survive the machine: their processes are what crashes."""
    with closing(psycopg2.connect(stores.owner_url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {make_url(stores.database_url).database} SET synchronous_commit = off")
    with closing(redis.Redis.from_url(stores.redis_url)) as client:
        client.config_set("appendfsync", "no")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconcile, "HELD_ROWS_SECONDS", 0.2)
        patch.setattr(outbox, "FENCED_PAUSE_SECONDS", 0.001)
        # Between two examples it empties history, which the owner alone may do.
        opened = runner.run(Arena.open(Stores(stores.redis_url, stores.owner_url)))
        with wrapped_calls(opened.weather):
            yield opened
        runner.run(opened.close())
    with closing(redis.Redis.from_url(stores.redis_url)) as client:
        client.config_set("appendfsync", "always")


def simulate(arena: Arena, *, examples: int, number: int = 0) -> None:
    """Run ``examples`` of the state machine; a failing one is shown with its steps and its seed."""
    machine = type("Simulation", (Simulation,), {"arena": arena})
    shown = SEED + number
    print(f"repeat with SIMULATION_SEED={shown}")  # noqa: T201 - pytest shows it with a failure
    run_state_machine_as_test(
        seed(shown)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink) if SHRINK else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_nothing_is_lost_or_doubled_wherever_a_process_crashes(arena: Arena) -> None:
    simulate(arena, examples=10)
    assert sum(arena.changes.values()) > 200, arena.changes
    assert sum(arena.crashes.values()) > 25, arena.crashes
