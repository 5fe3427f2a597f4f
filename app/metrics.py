"""The metrics of the API and of what both processes share. Names are DESIGN section 5's and do not change.

With several API workers ``PROMETHEUS_MULTIPROC_DIR`` is set before they start, and a scrape adds up all of them.
"""

from __future__ import annotations

import os
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
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
REFUSALS: Final = Counter("plimsoll_refusals", "Requests refused, by code.", ["code"], registry=REGISTRY)
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
DEAD_LETTERS: Final = Counter(
    "plimsoll_dead_letters", "Rows that Postgres cannot take, put aside in outbox:dead.", registry=REGISTRY
)
HISTORY_FENCED: Final = Counter(
    "plimsoll_history_fenced", "Writes of history refused because their epoch had passed.", registry=REGISTRY
)


def exposition() -> bytes:
    """Everything registered here, in Prometheus' text format; of all workers where there are several."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
