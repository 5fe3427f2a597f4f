"""What a replay counts, and the table it ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from app.replay.client import Exchange


@dataclass
class Tally:
    """Counts and latencies of one play; times in seconds."""

    bars: int = 0
    marks: int = 0
    trades: int = 0
    transfers: int = 0
    repeated: int = 0
    breaches: int = 0
    recoveries: int = 0
    elapsed_seconds: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)
    mark_seconds: list[float] = field(default_factory=list)
    trade_seconds: list[float] = field(default_factory=list)
    sweep_seconds: list[float] = field(default_factory=list)

    def count(self, exchange: Exchange) -> None:
        """Take one request and its answer into account."""
        path, status = exchange.request.path, exchange.answer.status
        if path == "/mark-price":
            self.mark_seconds.append(exchange.seconds)
        elif path == "/trade":
            self.trade_seconds.append(exchange.seconds)
        if status == 201:
            self.trades += path == "/trade"
            self.transfers += path != "/trade"
        elif status == 200:
            self.repeated += path != "/mark-price" and exchange.request.method == "POST"
        elif exchange.request.method == "POST":
            self.refusals[exchange.answer.code or f"status {status}"] += 1


def summary(tally: Tally) -> Table:
    """The table: what was played, what was booked and refused, what was breached, and how long it took."""
    table = Table(title="Replay", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    rows = {
        "bars": f"{tally.bars:,}",
        "marks": f"{tally.marks:,}",
        "trades": f"{tally.trades:,}",
        "deposits and withdrawals": f"{tally.transfers:,}",
        "answered from the first result": f"{tally.repeated:,}",
        "refusals": f"{tally.refusals.total():,}",
        **{f"  {code}": f"{count:,}" for code, count in sorted(tally.refusals.items())},
        "breaches": f"{tally.breaches:,}",
        "recoveries": f"{tally.recoveries:,}",
        "elapsed": f"{tally.elapsed_seconds:.1f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_section()
    for name, seconds in (
        ("mark, answered", tally.mark_seconds),
        ("mark, answered to swept", tally.sweep_seconds),
        ("trade, answered", tally.trade_seconds),
    ):
        if seconds:
            table.add_row(f"{name} (p50 / p90 / p99 / max)", _percentiles(seconds))
    return table


def _percentiles(seconds: Sequence[float]) -> str:
    """The 50th, 90th and 99th percentile by nearest rank, and the maximum, in milliseconds."""
    ordered = sorted(seconds)
    ranks = [-(-len(ordered) * percent // 100) - 1 for percent in (50, 90, 99, 100)]
    return " / ".join(f"{ordered[rank] * 1000:.1f}" for rank in ranks) + " ms"
