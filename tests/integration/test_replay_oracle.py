"""Two real days through real processes, and every answer and every row recomputed by an independent oracle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

import pytest

from tests.oracle.rules import Rules
from tests.oracle.walk import Walk
from tests.replay_run import CRASH_OF_OCTOBER_2025, JANUARY_2022, Play, Run, replayed

PLAYS = (
    Play(JANUARY_2022, ohlc=True, start="2022-01-21", end="2022-01-22"),
    Play(CRASH_OF_OCTOBER_2025, ohlc=True),
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """21 January 2022, and into the same accounts 10 October 2025."""
    with replayed(PLAYS) as run:
        for summary in run.summaries:
            print(summary)  # noqa: T201 - for the reader of `pytest -s`
        yield run


@pytest.fixture(scope="module")
def walk(run: Run) -> Walk:
    return run.walk(Walk())


@pytest.mark.parametrize("number", range(len(PLAYS)))
def test_the_marks_are_the_files_own_open_then_high_and_low_in_some_order_then_close(run: Run, number: int) -> None:
    bars = PLAYS[number].marks()
    marks = run.played_marks(number)
    assert len(marks) == 4 * len(bars)
    for at, (first, high, low, last) in enumerate(bars):
        played = marks[4 * at : 4 * at + 4]
        assert played in ([first, high, low, last], [first, low, high, last]), f"bar {at}"


def test_every_answer_is_what_the_rules_say(walk: Walk) -> None:
    assert walk.differences == []
    assert walk.requests > 10_000


def test_every_row_position_and_total_is_what_the_rules_say_each_on_its_mark(run: Run, walk: Walk) -> None:
    assert run.differences(walk) == []


def test_verify_agrees_to_the_last_digit(run: Run) -> None:
    assert run.verify_code == 0, run.verify


def test_the_plays_cover_breaches_kinds_of_trades_and_refusals(run: Run, walk: Walk) -> None:
    oracle = walk.oracle
    breaches = Counter(breach.account_id for breach in oracle.breaches)
    assert breaches.total() >= 50
    assert len(oracle.recoveries) >= 20
    assert sum(1 for times in breaches.values() if times > 1) >= 10
    for verb in ("open", "increase", "reduce", "close", "flip"):
        for direction in ("long", "short"):
            assert oracle.kinds[f"{verb} {direction}"] >= 100, oracle.kinds
    for code in ("insufficient_initial_margin", "below_maintenance_margin", "price_out_of_band"):
        assert walk.codes[code] >= 50, walk.codes
    for code in ("insufficient_free_margin", "idempotency_conflict", "unknown_account", "mark_price_jump"):
        assert walk.codes[code] >= 1, walk.codes


class CandidateAtTheLine(Rules):
    """``<=`` for ``<``."""

    def is_candidate(self, *, equity: Decimal, maintenance_margin: Decimal) -> bool:
        return equity <= maintenance_margin


class RestoredAboveTheLine(Rules):
    """``>`` for ``>=``."""

    def is_restored(self, *, equity: Decimal, used_margin: Decimal) -> bool:
        return equity > used_margin


class RestoredAtMaintenance(Rules):
    """The wrong line."""

    def is_restored(self, *, equity: Decimal, used_margin: Decimal) -> bool:
        return equity >= used_margin / 2


class SomethingMustStayFree(Rules):
    """``>`` for ``>=``."""

    def carries(self, *, free_margin: Decimal) -> bool:
        return free_margin > 0


class EdgesOutsideTheBand(Rules):
    """``<`` for ``<=``."""

    def is_in_band(self, *, price: Decimal, mark: Decimal) -> bool:
        return abs(price - mark) < self.price_band * mark


class SomethingMustStayIn(Rules):
    """``<`` for ``<=``."""

    def may_withdraw(self, *, amount: Decimal, balance: Decimal, free_margin: Decimal) -> bool:
        return amount < min(balance, free_margin)


class UnrealisedProfitIsCash(Rules):
    """Without ``min(balance, ...)``."""

    def may_withdraw(self, *, amount: Decimal, balance: Decimal, free_margin: Decimal) -> bool:
        return amount <= free_margin


class OpenProfitCounts(Rules):
    """Margin from nothing: buying below the mark pays for itself."""

    def counted_result(self, *, open_result: Decimal) -> Decimal:
        return open_result


class InitialRateABasisPointHigh(Rules):
    """20.01 %."""

    initial_rate = Decimal("0.2001")


class MaintenanceRateABasisPointHigh(Rules):
    """10.01 %."""

    maintenance_rate = Decimal("0.1001")


class CostRoundedDown(Rules):
    """Towards zero for half-even."""

    def cost_of_part(self, *, cost: Decimal, closed: Decimal, size: Decimal) -> Decimal:
        return Decimal(int(Fraction(cost) * Fraction(closed) / Fraction(size) * 10**8)).scaleb(-8)


class CostRoundedHalfUp(Rules):
    """Half-up for half-even: only ties tell the two apart."""

    def cost_of_part(self, *, cost: Decimal, closed: Decimal, size: Decimal) -> Decimal:
        exact = Fraction(cost) * Fraction(closed) / Fraction(size) * 10**8
        return Decimal(math.floor(exact + Fraction(1, 2))).scaleb(-8)


class NoJumpIsTooFar(Rules):
    """Three times the last mark for half of it."""

    mark_jump_max = Decimal(3)


@pytest.mark.parametrize(
    "wrong",
    [
        CandidateAtTheLine,
        RestoredAboveTheLine,
        RestoredAtMaintenance,
        SomethingMustStayFree,
        EdgesOutsideTheBand,
        SomethingMustStayIn,
        UnrealisedProfitIsCash,
        OpenProfitCounts,
        InitialRateABasisPointHigh,
        MaintenanceRateABasisPointHigh,
        CostRoundedDown,
        CostRoundedHalfUp,
        NoJumpIsTooFar,
    ],
)
def test_one_wrong_formula_turns_the_comparison_red(run: Run, wrong: type[Rules]) -> None:
    assert run.differences(run.walk(Walk(wrong()))) != []
