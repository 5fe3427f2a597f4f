"""The demo market of ``make run``: a few traders and a seeded walk of marks, whose first breach comes in half a minute.

It plays through the REST API like anybody else, and only for as long as it is alone: at the first mark from anyone
else it stops for good.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import structlog

from app.numbers import format_decimal
from app.replay.client import ApiClient, ReplayError
from app.replay.population import Flipper, Leveraged, Reckless, Scaler
from app.replay.trader import SYMBOL, Answer, Moves, Request, Seat, Trader

ACCOUNT_PREFIX: Final = "demo-"
SEED: Final = 1876
"""The year the load line became law."""

MARK_INTERVAL_SECONDS: Final = 0.5
MARKS_IN_PLAY: Final = 720
"""How long the traders take a play to be: each acts of its own accord about every twenty seconds."""

MARKS_TO_REACT_MAX: Final = 24
MARKS_AWAY_MAX: Final = 1200
BACKOFF_SECONDS: Final = (1.0, 2.0, 5.0, 10.0)

OPENING_PRICE: Final = 60_000.0
_CALM_MARKS, _FALL_MARKS, _REBOUND_MARKS = 14, 34, 44
_TIDE_MARKS: Final = 2400

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


def demo_marks(random: Random, *, last: float | None) -> Iterator[Decimal]:
    """Marks in USDT without end: from the opening or, where there is a ``last`` one, on from there.

    The opening stands still, falls by an eighth and comes half the way back: 5x long positions do not survive that.
    Then the price follows a slow tide between about 53,000 and 63,000, and now and then somebody is on the wrong side.
    """
    price = OPENING_PRICE if last is None else last
    if last is None:
        for target, marks in ((60_000.0, _CALM_MARKS), (52_500.0, _FALL_MARKS), (56_500.0, _REBOUND_MARKS)):
            start = price
            for step in range(1, marks + 1):
                price = (start + (target - start) * step / marks) * (1 + random.gauss(0, 0.0006))
                yield Decimal(str(round(price, 1)))
    phase = 0
    while True:
        phase += 1
        tide = 58_000 - 5_000 * math.cos(2 * math.pi * phase / _TIDE_MARKS)
        price += 0.01 * (tide - price) + price * random.gauss(0, 0.001)
        yield Decimal(str(round(price, 1)))


@dataclass(frozen=True, slots=True)
class LastMark:
    """The demo's own last mark: its version and price, and whether somebody else's came after it."""

    version: int
    price: Decimal
    stopped: bool = False


class Memory:
    """Where the last mark is kept, so that a restart knows whether the market is still the demo's alone."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def recall(self) -> LastMark | None:
        """The last mark that was noted; None if there is none, or if it cannot be read."""
        if self._file is None or not self._file.exists():
            return None
        try:
            noted = json.loads(self._file.read_text(encoding="utf-8"))
            return LastMark(int(noted["version"]), Decimal(noted["price"]), stopped=bool(noted["stopped"]))
        except (ValueError, KeyError, TypeError, ArithmeticError):
            return None

    def note(self, last: LastMark) -> None:
        """Replace the file as one step, so that it is never found half written."""
        if self._file is not None:
            noted = {"version": last.version, "price": format_decimal(last.price), "stopped": last.stopped}
            draft = self._file.with_suffix(".new")
            draft.write_text(json.dumps(noted) + "\n", encoding="utf-8")
            draft.replace(self._file)


async def run_demo(api_url: str, *, state_file: Path | None = None, api_key: str | None = None) -> None:
    """Run the demo market against the API at ``api_url`` until somebody else sets a mark, or until cancelled.

    It seeds an empty store, and goes on in a store that holds its own accounts only and its own mark, as noted in
    ``state_file``. In any other store it does nothing. While the API is away it waits.
    """
    client = ApiClient.connect(api_url, api_key=api_key)
    try:
        await DemoMarket(client, Memory(state_file)).run()
    finally:
        client.close()


class _SomebodyElse(Exception):
    """A mark that is not the demo's."""


class DemoMarket:
    """The market and its traders, over one client."""

    def __init__(self, client: ApiClient, memory: Memory) -> None:
        self._client = client
        self._memory = memory
        self._last = LastMark(0, Decimal(0))
        self._traders: list[Trader] = []

    async def run(self) -> None:
        """Open or resume the market, and post marks until somebody else does."""
        last = await self._through_outages(self._find_out)
        if last is None:
            return
        self._last = last
        is_new = last.version == 0
        random = Random(SEED + last.version)  # noqa: S311 - a market, not a secret
        self._traders = _traders(run_id=f"demo-{last.version}")
        log.info("the demo market opens" if is_new else "the demo market goes on", traders=len(self._traders))
        await self._through_outages(self._arrive)
        try:
            for index, price in enumerate(demo_marks(random, last=None if is_new else float(last.price))):
                await self._through_outages(partial(self._turn, index, price))
                await asyncio.sleep(MARK_INTERVAL_SECONDS)
        except _SomebodyElse as reason:
            self._memory.note(replace(self._last, stopped=True))
            log.info("the demo market stops for good: somebody else set a mark", reason=str(reason))

    async def _find_out(self) -> LastMark | None:
        """What to go on from: version 0 in an empty store, None where this is not the demo's market."""
        version, _ = await self._client.versions()
        report = (await self._send(Request("GET", "/margin-report?limit=50"))).body
        accounts = [str(account["account_id"]) for account in report["accounts"]]
        if not accounts and version == 0 and not any(report["marks"].values()):
            return LastMark(0, Decimal(0))
        noted = self._memory.recall()
        if noted is not None and noted.stopped:
            log.info("the demo market stays stopped: somebody else set a mark. `plimsoll reset` starts it anew")
            return None
        is_own = report["next_cursor"] is None and all(name.startswith(ACCOUNT_PREFIX) for name in accounts)
        if not accounts or not is_own:
            log.info("no demo market: the store holds accounts or marks that are not the demo's")
            return None
        price = Decimal(report["marks"][SYMBOL])
        if noted is not None and not _follows(noted, version=version, price=price):
            self._memory.note(LastMark(version, price, stopped=True))
            log.info("the demo market stops for good: somebody else set a mark while it was away")
            return None
        return LastMark(version, price)

    async def _arrive(self) -> None:
        for trader in self._traders:
            await self._carry_out(trader.arrive())

    async def _turn(self, index: int, price: Decimal) -> None:
        """Post one mark, if nobody else has, and let those act whom it wakes. Raises ``_SomebodyElse``."""
        await self._check_alone()
        # Noted before it is sent: should the answer be lost, this mark is still known as the demo's own.
        intended = LastMark(self._last.version + 1, price)
        self._memory.note(intended)
        attempts = await self._client.send(
            Request("POST", "/mark-price", {"symbol": SYMBOL, "price": format_decimal(price)})
        )
        answer = attempts[-1].answer
        if not answer.accepted:
            raise _SomebodyElse(f"its mark was refused ({answer.code})")
        version = int(answer.body["version"])
        # An attempt whose answer was lost may have been accepted as well.
        if not intended.version <= version < intended.version + len(attempts):
            raise _SomebodyElse(f"version {version} follows {self._last.version}")
        self._last = replace(intended, version=version)
        self._memory.note(self._last)
        for trader in self._traders:
            if trader.is_woken(index, price):
                await self._carry_out(trader.act(index, price))
                trader.wakes_at = min(trader.wakes_at, index + MARKS_AWAY_MAX)

    async def _check_alone(self) -> None:
        """A mark through the API moves the version on; one set by hand shows in the mark of a position."""
        version, _ = await self._client.versions()
        if version == 0 == self._last.version:
            return
        price = await self._current_price()
        noted = self._memory.recall() or self._last
        for own in (self._last, noted):
            if version == own.version and price in {None, own.price}:
                self._last = own
                return
        raise _SomebodyElse(
            f"the mark is {price} at version {version}, and its own was {self._last.price} at {self._last.version}"
        )

    async def _current_price(self) -> Decimal | None:
        """The mark, as an open position shows it; None if no trader holds one."""
        for trader in self._traders:
            if trader.quantity:
                answer = await self._send(Request("GET", f"/positions/{trader.account_id}"))
                for position in answer.body.get("positions", ()):
                    if position["symbol"] == SYMBOL:
                        return Decimal(position["mark_price"])
        return None

    async def _carry_out(self, moves: Moves) -> None:
        try:
            request = next(moves)
            while True:
                request = moves.send(await self._send(request))
        except StopIteration:
            return

    async def _send(self, request: Request) -> Answer:
        return (await self._client.send(request))[-1].answer

    async def _through_outages(self, step: Callable[[], Awaitable[Result]]) -> Result:
        """Do ``step``; while the API is away, wait and do it again."""
        failures = 0
        while True:
            try:
                return await step()
            except ReplayError as error:
                pause_seconds = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
                failures += 1
                log.warning("the demo market waits for the API", reason=str(error), seconds=pause_seconds)
                await asyncio.sleep(pause_seconds)


def _follows(noted: LastMark, *, version: int, price: Decimal) -> bool:
    """Whether the store's mark is the noted one, or the one before a noted one that was never accepted."""
    return (version == noted.version and price == noted.price) or version == noted.version - 1


def _traders(run_id: str) -> list[Trader]:
    """The cast, each named for what it does."""

    def seat(name: str) -> Seat:
        return Seat(
            account_id=f"{ACCOUNT_PREFIX}{name}",
            run_id=run_id,
            random=Random(f"{SEED} {run_id} {name}"),  # noqa: S311 - a market, not a secret
            marks_in_play=MARKS_IN_PLAY,
            marks_to_react_max=MARKS_TO_REACT_MAX,
        )

    return [
        *(Leveraged(seat(f"long-{number}"), direction=1) for number in (1, 2, 3)),
        *(Leveraged(seat(f"short-{number}"), direction=-1) for number in (1, 2)),
        *(Flipper(seat(f"flipper-{number}")) for number in (1, 2)),
        *(Scaler(seat(f"scaler-{number}")) for number in (1, 2)),
        Reckless(seat("reckless")),
    ]
