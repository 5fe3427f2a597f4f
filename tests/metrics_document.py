"""The table of ``docs/metrics.md``, made from the metrics themselves: ``make metrics-table`` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.core import Metric

import app.metrics
import watchdog.metrics

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD: Final = "| metric | type | labels | from | meaning |\n| --- | --- | --- | --- | --- |\n"
HISTOGRAM_SUFFIXES: Final = ("_bucket", "_sum", "_count")


@dataclass(frozen=True, slots=True)
class Exported:
    """One metric, by the name it is queried by. ``source`` is ``both``, ``watchdog`` or ``system``."""

    name: str
    type: str
    labels: tuple[str, ...]
    source: str
    meaning: str

    @property
    def sample_names(self) -> set[str]:
        """The names a query may use."""
        return {self.name + suffix for suffix in HISTOGRAM_SUFFIXES} if self.type == "histogram" else {self.name}


def exported() -> dict[str, Exported]:
    """Every metric of both processes by name, the watchdog's first."""
    counters = watchdog.metrics.RedisCounters()
    counters.liquidations = counters.recoveries = 0
    found = [_described(metric, (), "watchdog") for metric in counters.collect()]
    for source, registry in (("watchdog", watchdog.metrics.REGISTRY), ("both", app.metrics.REGISTRY)):
        for collector in dict.fromkeys(registry._names_to_collectors.values()):
            if not isinstance(collector, watchdog.metrics.RedisCounters):
                labels = tuple(getattr(collector, "_labelnames", ()))
                found += [_described(metric, labels, source) for metric in collector.collect()]
    return {metric.name: metric for metric in sorted(found, key=lambda metric: metric.name)}


def _described(metric: Metric, labels: tuple[str, ...], source: str) -> Exported:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    source = "system" if name in watchdog.metrics.SYSTEM_WIDE else source
    return Exported(name, metric.type, labels, source, metric.documentation)


def table() -> str:
    """The whole table in Markdown."""
    rows = []
    for metric in exported().values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.source} | {metric.meaning} |\n")
    return HEAD + "".join(rows)


def replaced(document: str) -> str:
    """``document`` with the table in it made anew. Raises ``ValueError`` for one that holds no such table."""
    before, _, rest = document.partition(HEAD)
    if not rest:
        raise ValueError(f"{DOCUMENT} holds no table of metrics")
    lines = rest.splitlines(keepends=True)
    after = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before + table() + "".join(lines[after:])


if __name__ == "__main__":
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
