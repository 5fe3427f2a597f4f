"""Recorded market data: one-minute bars in the two formats that are read, and the marks a bar is played as."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Final

from app.numbers import parse_decimal

_GZIP_MAGIC: Final = b"\x1f\x8b"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_PRICES: Final = ("open", "high", "low", "close")


class BarFileError(ValueError):
    """A file that is neither of the two formats, or a row of it that cannot be read."""


@dataclass(frozen=True, slots=True)
class Bar:
    """The prices of one minute, in USDT per coin; ``opened_at`` is its first instant, in UTC."""

    opened_at: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal


def read_bars(file: Path, *, start: datetime | None = None, end: datetime | None = None) -> list[Bar]:
    """The bars of ``file`` that opened at or after ``start`` and before ``end``, in the order of the file.

    The header says which format it is: ``timestamp,open,high,low,close,...`` with ISO times in UTC, or the exchange's
    klines, ``open_time,open,high,low,close,...`` with milliseconds since 1970. Either may be compressed with gzip. A
    ``start`` or ``end`` without a zone is UTC. Raises ``BarFileError`` naming the line, and ``OSError``.
    """
    first, last = _in_utc(start), _in_utc(end)
    bars = [
        bar
        for bar in _every_bar(file)
        if (first is None or bar.opened_at >= first) and (last is None or bar.opened_at < last)
    ]
    if not bars:
        raise BarFileError(f"{file}: no bar between --start and --end" if start or end else f"{file}: no bars")
    return bars


def marks_of(bar: Bar, *, ohlc: bool, random: Random) -> tuple[Decimal, ...]:
    """The marks ``bar`` is played as: its close; with ``ohlc`` its open, then high and low as drawn, then its close.

    A bar does not tell which of its extremes came first; ``random`` decides.
    """
    if not ohlc:
        return (bar.close,)
    extremes = (bar.high, bar.low) if random.random() < 0.5 else (bar.low, bar.high)
    return (bar.open, *extremes, bar.close)


def _every_bar(file: Path) -> Iterator[Bar]:
    content = file.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        content = gzip.decompress(content)
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    columns = rows.fieldnames or ()
    time_column = next((name for name in ("timestamp", "open_time") if name in columns), None)
    if time_column is None or not set(_PRICES) <= set(columns):
        raise BarFileError(
            f"{file}: the header is neither timestamp,open,high,low,close,... nor open_time,open,high,low,close,..."
        )
    for row in rows:
        try:
            yield Bar(_opened_at(row[time_column]), *(_price(row[name]) for name in _PRICES))
        except (ValueError, TypeError, OverflowError) as error:
            raise BarFileError(f"{file}, line {rows.line_num}: {error}") from error


def _price(text: str) -> Decimal:
    price = parse_decimal(text)
    if price <= 0:
        raise ValueError(f"a price must be above 0, not {text}")
    return price


def _opened_at(text: str) -> datetime:
    if text.isdecimal():
        return _EPOCH + timedelta(milliseconds=int(text))
    return _as_utc(datetime.fromisoformat(text))


def _in_utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else _as_utc(moment)


def _as_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
