"""Replay: reading bars, and playing them through an API that is a model of ours."""

from __future__ import annotations

import gzip
import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from io import StringIO
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from app.replay import ReplayOptions, replay
from app.replay.bars import BarFileError, marks_of, read_bars
from app.replay.client import ReplayError
from app.replay.player import Player
from app.replay.summary import Tally, summary
from tests.model_api import ModelApi
from tests.oracle.walk import Walk

ISO_BARS = """timestamp,open,high,low,close,volume
2022-01-21 00:00:00.000000,40689.0,40754.0,40663.0,40683.25,1.5
2022-01-21 00:01:00.000000,40683.0,40690.0,40600.0,40650.0,2.5
2022-01-21 00:02:00.000000,40650.0,40660.0,40610.0,40620.0,3.5
"""
KLINES = """\
open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,ignore
1760128200000,117014.00,117037.00,116863.90,116870.80,126.903,1760128259999,1,1,1,1,0
"""


@pytest.fixture
def iso_file(tmp_path: Path) -> Path:
    file = tmp_path / "bars.csv"
    file.write_text(ISO_BARS)
    return file


def options(file: Path, **changed: object) -> ReplayOptions:
    defaults = {
        "file": file,
        "api_url": "http://model",
        "lockstep": True,
        "ohlc": True,
        "speed": None,
        "accounts": 20,
        "seed": 1,
        "start": None,
        "end": None,
        "log": None,
    }
    return ReplayOptions(**{**defaults, **changed})  # type: ignore[arg-type]


def a_long_fall(tmp_path: Path) -> Path:
    """40 bars from 60,000 down by 400 a bar and half the way back: -20 %, which no 5x long position survives."""
    closes = [60_000 - 400 * bar for bar in range(30)] + [48_400 + 600 * bar for bar in range(10)]
    rows = [
        f"2022-01-21 {bar // 60:02}:{bar % 60:02}:00,{close}.0,{close + 10}.0,{close - 10}.0,{close}.0,1\n"
        for bar, close in enumerate(closes)
    ]
    file = tmp_path / "fall.csv"
    file.write_text("timestamp,open,high,low,close,volume\n" + "".join(rows))
    return file


def test_iso_bars_are_read_in_utc_and_with_every_digit(iso_file: Path) -> None:
    first, *_, last = read_bars(iso_file)
    assert first.opened_at == datetime(2022, 1, 21, tzinfo=UTC)
    assert (first.open, first.high, first.low, first.close) == tuple(
        map(Decimal, ("40689.0", "40754.0", "40663.0", "40683.25"))
    )
    assert last.opened_at == datetime(2022, 1, 21, 0, 2, tzinfo=UTC)


def test_klines_are_known_by_their_header_and_their_time_is_milliseconds(tmp_path: Path) -> None:
    file = tmp_path / "klines.csv"
    file.write_text(KLINES)
    (bar,) = read_bars(file)
    assert bar.opened_at == datetime(2025, 10, 10, 20, 30, tzinfo=UTC)
    assert bar.close == Decimal("116870.80")


def test_gzip_is_known_by_its_content_whatever_the_name(tmp_path: Path, iso_file: Path) -> None:
    file = tmp_path / "bars"
    file.write_bytes(gzip.compress(ISO_BARS.encode()))
    assert read_bars(file) == read_bars(iso_file)


def test_start_is_the_first_bar_and_end_the_first_one_left_out(iso_file: Path) -> None:
    at = datetime(2022, 1, 21, 0, 1, tzinfo=UTC)
    assert [bar.opened_at.minute for bar in read_bars(iso_file, start=at)] == [1, 2]
    assert [bar.opened_at.minute for bar in read_bars(iso_file, end=at)] == [0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("time,price\n1,2\n", "the header is neither"),
        ("timestamp,open,high,low,close\n", "no bars"),
        ("timestamp,open,high,low,close\n2022-01-21 00:00:00,1,1,1,NaN\n", "line 2"),
        ("timestamp,open,high,low,close\n2022-01-21 00:00:00,1,1,1,0\n", "above 0"),
        ("timestamp,open,high,low,close\nyesterday,1,1,1,1\n", "line 2"),
        ("timestamp,open,high,low,close\n2022-01-21 00:00:00,1,1\n", "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(content)
    with pytest.raises(BarFileError, match=complaint):
        read_bars(file)


def test_a_bar_is_its_close_or_open_the_extremes_as_drawn_and_close(iso_file: Path) -> None:
    bar = read_bars(iso_file)[0]
    random = Random(7)
    assert marks_of(bar, ohlc=False, random=random) == (bar.close,)
    drawn = {marks_of(bar, ohlc=True, random=random) for _ in range(20)}
    assert drawn == {(bar.open, bar.high, bar.low, bar.close), (bar.open, bar.low, bar.high, bar.close)}


async def play(file: Path, model: ModelApi, log: Path, **changed: object) -> Tally:
    chosen = options(file, **changed)
    with log.open("wb") as lines:
        player = Player(chosen, model.client(), lines)
        return await player.play(read_bars(file), Console(file=StringIO()))


async def test_a_play_is_repeated_by_file_options_and_answers(tmp_path: Path) -> None:
    file = a_long_fall(tmp_path)
    logs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "other.jsonl"]
    for log, seed in zip(logs, (1, 1, 2), strict=True):
        await play(file, ModelApi(), log, seed=seed)
    one, two, other = (log.read_text() for log in logs)
    assert one == two
    assert one != other


async def test_the_log_alone_lets_an_oracle_recompute_the_play_and_the_summary_counts_it(tmp_path: Path) -> None:
    model, log = ModelApi(), tmp_path / "log.jsonl"
    tally = await play(a_long_fall(tmp_path), model, log)
    walk = Walk()
    walk.read(log)
    assert walk.differences == []
    assert len(walk.oracle.trades) == tally.trades == len(model.oracle.trades)
    assert len(walk.oracle.breaches) == tally.breaches >= 4
    assert len(walk.oracle.recoveries) == tally.recoveries >= 2
    assert (tally.bars, tally.marks) == (40, 160)
    assert tally.refusals["price_out_of_band"] == walk.codes["price_out_of_band"]
    shown = StringIO()
    Console(file=shown, width=100).print(summary(tally))
    assert f"{tally.breaches}" in shown.getvalue()


async def test_a_second_play_into_the_same_store_clashes_with_no_operation_id_and_insists_on_its_first_mark(
    tmp_path: Path, iso_file: Path
) -> None:
    model = ModelApi()
    high = tmp_path / "high.csv"
    high.write_text(ISO_BARS.replace(",40", ",99"))
    await play(a_long_fall(tmp_path), model, tmp_path / "one.jsonl")
    tally = await play(high, model, tmp_path / "two.jsonl")
    assert tally.refusals["mark_price_jump"] == 1
    assert tally.marks == 12
    logs = [(tmp_path / name).read_text() for name in ("one.jsonl", "two.jsonl")]
    ids = [
        {
            json.loads(line)["body"]["client_trade_id"]
            for line in log.splitlines()
            if json.loads(line)["path"] == "/trade"
        }
        for log in logs
    ]
    assert ids[0]
    assert not ids[0] & ids[1]


async def test_a_request_without_an_answer_is_sent_again_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.replay.client.RETRY_PAUSE_SECONDS", 0.001)
    model = ModelApi()

    def fail_twice_at_the_hundredth_trade(method: str, path: str) -> None:
        if path == "/trade" and len(model.posted("/trade")) == 100:
            model.outages = 2

    model.before = fail_twice_at_the_hundredth_trade
    log = tmp_path / "log.jsonl"
    await play(a_long_fall(tmp_path), model, log)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    lost = [entry for entry in entries if entry["status"] == 0]
    assert len(lost) == 2
    assert [entry["body"] for entry in entries].count(lost[0]["body"]) >= 2
    walk = Walk()
    walk.read(log)
    assert walk.differences == []


async def test_lockstep_without_a_watchdog_says_what_is_missing(
    iso_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.replay.client.SWEEP_DEADLINE_SECONDS", 0.05)
    model = ModelApi()

    async def versions() -> tuple[int, int]:
        return model.oracle.mark_version, 0

    client = model.client()
    monkeypatch.setattr(client, "versions", versions)
    with pytest.raises(ReplayError, match="plimsoll watchdog"):
        await Player(options(iso_file), client, None).play(read_bars(iso_file), Console(file=StringIO()))


def test_the_exit_code_of_a_bad_file_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.csv"
    file.write_text("nothing" + os.linesep)
    assert replay(options(file)) == 1
    assert "the header is neither" in capsys.readouterr().err
