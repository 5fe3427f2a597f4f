"""What a bench says: a ratio of two things measured in one run, taken several times, and what it has to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

ROUNDS_MIN = 5
"""A ratio is the median of at least so many, the two sides taken in turn."""

Better = Literal["high", "low"]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, and the smallest and largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values``. Raises ``ValueError`` for none."""
        if not values:
            raise ValueError("nothing was measured")
        return cls(median(values), min(values), max(values))

    def show(self, form: str = "{:,.0f}") -> str:
        """``median [low..high]``, each number by ``form``."""
        return f"{form.format(self.median)} [{form.format(self.low)}..{form.format(self.high)}]"


@dataclass(frozen=True, slots=True)
class Bound:
    """A ratio that is good from here on, upwards or downwards. ``text`` is how the task writes it."""

    value: float
    better: Better
    text: str

    def reached_by(self, ratio: float) -> bool:
        """Whether ``ratio`` is at the bound or on its better side."""
        return ratio >= self.value if self.better == "high" else ratio <= self.value


@dataclass(slots=True)
class Row:
    """One row of the table: ``measured`` and ``beside`` hold a value a round in ``unit``, ``ratios`` their quotients.

    ``overall`` is the ratio over all rounds at once where the median of them would say something else: a percentile of
    200 marks is not the median of the percentiles of 40. A row without bounds is reported only.

    ``faults`` say why its numbers must not be believed: a result that was not the one brute force gives, or answers
    that do not equal the rows in Postgres. ``unmet`` are further conditions that do not hold, ``notes`` what else was
    counted. ``samples`` and ``parts`` are what its picture shows.
    """

    name: str
    measured_what: str
    beside_what: str
    unit: str
    must: Bound | None = None
    aim: Bound | None = None
    measured: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_measured: str = ""
    overall: float | None = None
    samples: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    measured_on: str = ""
    value_form: str = "{:,.0f}"

    def add(self, *, measured: float, beside: float, ratio: float | None = None) -> None:
        """One round. The ratio is ``measured / beside`` unless the row is of how many times faster it is."""
        self.measured.append(measured)
        self.beside.append(beside)
        self.ratios.append(measured / beside if ratio is None else ratio)

    @property
    def ratio(self) -> Spread:
        """The rounds' ratios: their median, or the ``overall`` one, and their spread."""
        spread = Spread.of(self.ratios)
        return spread if self.overall is None else replace(spread, median=self.overall)

    @property
    def verdict(self) -> str:
        """What the last column says."""
        if self.not_measured:
            return "not measured"
        if self.faults:
            return "WRONG"
        if self.must is None:
            return "reported"
        if self.unmet or not self.must.reached_by(self.ratio.median):
            return "NO"
        return "aim" if self.aim is not None and self.aim.reached_by(self.ratio.median) else "yes"
