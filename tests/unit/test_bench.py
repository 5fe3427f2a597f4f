"""The bench's own arithmetic: ratios and what they reach, the table, and the population at the edge."""

from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from tests.bench import document
from tests.bench.breaches import percentile_99
from tests.bench.population import MARK, STEP, STEP_ACCOUNTS, Population, account_name, populate
from tests.bench.ratios import Bound, Row, Spread
from tests.bench.requests import compare
from tests.bench.table import markdown_table, text_table

AT_LEAST_060 = Bound(0.60, "high", "≥ 0.60")
AT_MOST_2 = Bound(2, "low", "≤ 2 ×")


def row(*ratios: float, must: Bound | None = AT_LEAST_060, aim: Bound | None = None) -> Row:
    made = Row("B1", "ours", "theirs", "requests/s", must=must, aim=aim)
    for ratio in ratios:
        made.add(measured=1_000 * ratio, beside=1_000)
    return made


def test_a_spread_is_the_median_and_the_ends() -> None:
    assert Spread.of([3, 1, 2, 10]) == Spread(median=2.5, low=1, high=10)


def test_nothing_has_no_spread() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])


@pytest.mark.parametrize(
    ("bound", "ratio", "reached"),
    [
        (AT_LEAST_060, 0.59, False),
        (AT_LEAST_060, 0.60, True),
        (AT_LEAST_060, 0.61, True),
        (AT_MOST_2, 1.99, True),
        (AT_MOST_2, 2.0, True),
        (AT_MOST_2, 2.01, False),
    ],
)
def test_a_bound_is_reached_at_the_bound_and_on_its_better_side(bound: Bound, ratio: float, reached: bool) -> None:
    assert bound.reached_by(ratio) is reached


def test_the_median_of_the_rounds_decides() -> None:
    assert row(0.5, 0.61, 0.9).verdict == "yes"
    assert row(0.5, 0.59, 0.9).verdict == "NO"


def test_an_aim_that_is_reached_is_said() -> None:
    assert row(0.8, aim=Bound(0.8, "high", "0.80")).verdict == "aim"


def test_a_wrong_result_is_wrong_however_fast() -> None:
    wrong = row(9.0)
    wrong.faults.append("one candidate is missing")
    assert wrong.verdict == "WRONG"


def test_a_further_condition_that_does_not_hold_is_not_reached() -> None:
    large = row(9.0)
    large.unmet.append("memory grew by 151 MB")
    assert large.verdict == "NO"


def test_a_percentile_of_all_rounds_takes_the_place_of_the_rounds_median() -> None:
    made = row(1.0, 1.1, 1.2, must=AT_MOST_2)
    made.overall = 2.5
    assert made.ratio == Spread(median=2.5, low=1.0, high=1.2)
    assert made.verdict == "NO"


def test_a_row_without_bounds_is_reported_and_one_that_failed_says_why() -> None:
    assert row(0.1, must=None).verdict == "reported"
    failed = Row("B7", "ten million", "one million", "ms", not_measured="no memory")
    assert failed.verdict == "not measured"
    assert "B7: not measured: no memory" in text_table([failed])


def test_the_table_shows_both_sides_the_ratio_and_the_verdict() -> None:
    shown = markdown_table([row(0.5, 0.7, 0.75)])
    assert "| B1 | ours: 700 [500..750] requests/s | theirs: 1,000 [1,000..1,000] requests/s |" in shown
    assert "| **0.70 [0.50..0.75]** | ≥ 0.60 |  | yes |" in shown


def test_the_99th_percentile_of_200_is_the_third_largest() -> None:
    assert percentile_99([float(value) for value in range(1, 201)]) == 198


def test_the_page_keeps_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    other = Row("B4", "a sweep", "reading", "ms", must=AT_MOST_2, measured=[3.0], beside=[2.0], ratios=[1.5])
    document.write(page, [row(0.5), other])
    document.write(page, [row(0.7)])
    text = page.read_text()
    assert "**0.70 [0.70..0.70]**" in text
    assert "**1.50 [1.50..1.50]**" in text
    assert "**0.50" not in text
    assert "@" not in text.replace("@latest", "")
    for picture in ("reached", "requests", "sweeps"):
        assert f"benchmarks/{picture}.svg" in text
        assert ET.parse(tmp_path / "benchmarks" / f"{picture}.svg").getroot().tag.endswith("svg")  # noqa: S314


@pytest.fixture(scope="module")
def population() -> Population:
    return populate(20_000)


def margins(population: Population) -> tuple[np.ndarray, np.ndarray]:
    """Equity and maintenance margin at the mark, in units of 1e-8."""
    notional = np.abs(population.quantity) * int(MARK)
    return population.balance + population.quantity * int(MARK) - population.cost, notional // 10


def test_one_in_a_hundred_lies_within_a_thousandth_of_the_line_and_a_tenth_of_those_below(
    population: Population,
) -> None:
    equity, maintenance = margins(population)
    near = np.abs(equity - maintenance) * 1_000 <= maintenance
    assert int(near.sum()) == 200
    assert int((equity < maintenance).sum()) == 20
    assert int((equity == maintenance).sum()) == 2


def test_the_candidates_by_brute_force_are_those_below_and_none_on_the_line(population: Population) -> None:
    equity, maintenance = margins(population)
    assert population.candidates(MARK) == set(np.flatnonzero(equity < maintenance).tolist())


def test_each_step_of_the_mark_takes_ten_more_below(population: Population) -> None:
    counts = [len(population.candidates(MARK - step * STEP)) for step in range(population.steps + 1)]
    assert counts == [20 + step * STEP_ACCOUNTS for step in range(population.steps + 1)]


def test_a_mark_is_found_that_takes_so_many_more_longs_below(population: Population) -> None:
    before = MARK - population.steps * STEP
    mark = population.mark_that_breaches(2_000, below=before)
    new = population.candidates(mark) - population.candidates(before)
    assert 2_000 <= len(new) <= 2_010
    assert all(population.quantity[slot] > 0 for slot in new)


def test_an_account_is_the_one_in_its_slot(population: Population) -> None:
    account = population.account(7)
    assert account.account_id == account_name(7) == "account-0000007"
    assert account.balance == Decimal(int(population.balance[7])).scaleb(-8)


@pytest.mark.parametrize(("plain", "ratio"), [(900, 0.5), (1_000, 0.5), (1_250, 0.4)])
def test_a_rate_is_compared_with_the_faster_of_the_two_endpoints(plain: float, ratio: float) -> None:
    made = Row("B1", "ours", "bare", "requests/s")
    compare(made, [(500, 1_000, plain)])
    assert made.ratios == [ratio]
