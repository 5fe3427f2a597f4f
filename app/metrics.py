"""The metrics of the API and of what both processes share. Names are DESIGN section 5's and do not change.

With several API workers ``PROMETHEUS_MULTIPROC_DIR`` is set before they start: each writes its values to files
there, and a scrape, whichever worker answers it, adds up all of them. The counts of a worker that died stay, so that no
counter ever goes back; its gauges, which told of the present, go with it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

LATENCY_BUCKETS_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY: Final = CollectorRegistry()

TRADES: Final = Counter(
    "plimsoll_trades",
    "Trades by side and outcome: booked, replayed, refused, unavailable.",
    ["side", "outcome"],
    registry=REGISTRY,
)
REFUSALS: Final = Counter(
    "plimsoll_refusals", "Requests refused with 409, by code (docs/api.md).", ["code"], registry=REGISTRY
)
MARKS_REFUSED: Final = Counter(
    "plimsoll_marks_refused",
    "Marks refused: too far from the last one, or a price or symbol that cannot be.",
    registry=REGISTRY,
)
HTTP_DURATION: Final = Histogram(
    "plimsoll_http_request_duration_seconds",
    "Time from the request's head to the end of its answer.",
    ["route", "method", "status"],
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
CONFLICTS: Final = Counter(
    "plimsoll_commit_conflicts", "Commits refused because the account had changed; decided again.", registry=REGISTRY
)
ADJUSTMENTS: Final = Counter("plimsoll_adjustments", "Edits by hand in Redis that were adopted.", registry=REGISTRY)
COLUMN_REPAIRS: Final = Counter(
    "plimsoll_column_repairs",
    "Columns that were lost and made anew, and rows of them that were damaged and written again.",
    registry=REGISTRY,
)
DEAD_LETTERS: Final = Counter(
    "plimsoll_dead_letters", "Rows that Postgres cannot take, put aside in outbox:dead.", registry=REGISTRY
)
HISTORY_FENCED: Final = Counter(
    "plimsoll_history_fenced", "Writes of history refused because their epoch had passed.", registry=REGISTRY
)
POSTGRES_BREAKER_OPEN: Final = Gauge(
    "plimsoll_postgres_breaker_open",
    "1 while this process takes Postgres to be away and leaves its rows to the outbox, else 0; of several workers the "
    "largest.",
    registry=REGISTRY,
    multiprocess_mode="livemax",
)


def exposition() -> bytes:
    """Everything registered here, in Prometheus' text format; of all workers where there are several."""
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory is None:
        return generate_latest(REGISTRY)
    _forget_gauges_of_the_dead(Path(directory))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _forget_gauges_of_the_dead(directory: Path) -> None:
    """Remove the live gauges of workers that are gone; nobody else hears of a worker that was killed.

    A sibling is a worker: an id that the kernel has given to some other process since does not keep a gauge alive.
    """
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            alive = pid == os.getpid() or psutil.Process(pid).ppid() == os.getppid()
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            with suppress(FileNotFoundError):  # another worker was asked at the same time
                file.unlink()
