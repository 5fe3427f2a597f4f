"""All of January 2022, 45,031 closes, through real processes and the oracle."""

from __future__ import annotations

import pytest

from tests.oracle.walk import Walk
from tests.replay_run import JANUARY_2022, Play, replayed


@pytest.mark.e2e
@pytest.mark.timeout(30 * 60)  # five to six minutes on two free cores; the rest is for a busy machine
def test_a_whole_month_gives_the_answers_and_rows_that_the_rules_say() -> None:
    play = Play(JANUARY_2022, ohlc=False)
    with replayed([play]) as run:
        print(run.summaries[0])  # noqa: T201 - for the reader of `pytest -s`
        assert run.played_marks(0) == [close for (close,) in play.marks()]
        walk = run.walk(Walk())
        assert run.differences(walk) == []
        assert run.verify_code == 0, run.verify
        assert len(walk.oracle.breaches) >= 50
        assert len(walk.oracle.recoveries) >= 20
