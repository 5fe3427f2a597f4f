"""One trader: what REST has told it about its account, and the moves it can make.

A move is a generator of requests that is sent the answers. It does no I/O and reads no clock, so the same trader plays
over HTTP, against a model in a test, or by hand. All it decides follows from its seed and from the answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_DOWN, ROUND_FLOOR, Decimal
from random import Random
from typing import Any, Final, TypeAlias

from app.contracts import BTC_PERP
from app.numbers import SMALLEST_UNIT, format_decimal

SYMBOL: Final = BTC_PERP.symbol
TICK: Final = BTC_PERP.tick_size
LOT: Final = BTC_PERP.lot_size
INITIAL_RATE: Final = BTC_PERP.initial_rate
MAINTENANCE_RATE: Final = BTC_PERP.maintenance_rate
BAND: Final = BTC_PERP.price_band

NEVER: Final = 1 << 62
ACTS_PER_PLAY: Final = 15
"""About how often one trader acts of its own accord in a play, however many marks the play has."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the REST API; decimals in ``body`` are strings."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status and the JSON object."""

    status: int
    body: Mapping[str, Any]

    @property
    def accepted(self) -> bool:
        """Whether it was done, now or by an earlier request with the same operation id."""
        return self.status in {200, 201}

    @property
    def code(self) -> str | None:
        """The stable code of a refusal."""
        code = self.body.get("code")
        return None if code is None else str(code)


Moves: TypeAlias = Generator[Request, Answer, None]
Move: TypeAlias = Generator[Request, Answer, Answer]


@dataclass(frozen=True, slots=True)
class Seat:
    """What a trader is given: its account, its luck, how long the play is, and how slow it may be in trouble."""

    account_id: str
    run_id: str
    random: Random
    marks_in_play: int
    marks_to_react_max: int = 0


class Trader:
    """An account's owner. Subclasses say in ``pursue`` what they are after; trouble finds all of them.

    ``balance``, ``quantity`` and ``average_price`` are those of the last answer. ``equity``, ``used_margin`` and
    ``maintenance_margin`` here are the trader's own estimate at the mark it sees; ``told`` holds the exact figures of
    the last answer. Quantities are in coins, the rest in USDT.
    """

    def __init__(self, seat: Seat) -> None:
        self.account_id = seat.account_id
        self.random = seat.random
        self.mark = Decimal(0)
        self.balance = Decimal(0)
        self.quantity = Decimal(0)
        self.average_price = Decimal(0)
        self.told: defaultdict[str, Decimal] = defaultdict(Decimal)
        self.breached = False
        self.alarm_below = Decimal(0)
        self.alarm_above = Decimal("Infinity")
        self.wakes_at = 0
        self.marks_between_acts = max(1.0, seat.marks_in_play / ACTS_PER_PLAY)
        self._marks_to_react_max = seat.marks_to_react_max
        self._run_id = seat.run_id
        self._operations = 0

    def pursue(self) -> Moves:
        """What it does of its own accord, now and then."""
        raise NotImplementedError

    # What the player asks.

    def is_woken(self, index: int, mark: Decimal) -> bool:
        """Whether it acts on mark number ``index``: because it is time, or because it seems to be a candidate."""
        if index >= self.wakes_at:
            return True
        return not self.breached and not self.alarm_below <= mark <= self.alarm_above

    def arrive(self) -> Moves:
        """Look at the account before the first mark of a play; it may hold what an earlier play left."""
        yield from self.look()
        self._set_alarm()

    def act(self, index: int, mark: Decimal) -> Moves:
        """React to mark number ``index``, then rest."""
        self.mark = mark
        self.wakes_at = index + 1 + round(self.marks_between_acts * self.random.uniform(0.5, 1.5))
        if self.breached or (self.quantity and self.equity < self.maintenance_margin):
            yield from self._face_trouble(index)
        else:
            yield from self.pursue()
        self._set_alarm()

    # What it reckons.

    @property
    def direction(self) -> int:
        """1 when long, -1 when short, 0 when flat."""
        return (self.quantity > 0) - (self.quantity < 0)

    @property
    def equity(self) -> Decimal:
        """The estimated equity at the mark it sees."""
        return self.balance + self.quantity * (self.mark - self.average_price)

    @property
    def used_margin(self) -> Decimal:
        """The initial margin of its position at the mark it sees."""
        return INITIAL_RATE * abs(self.quantity) * self.mark

    @property
    def maintenance_margin(self) -> Decimal:
        """The margin below which it is a candidate, at the mark it sees."""
        return MAINTENANCE_RATE * abs(self.quantity) * self.mark

    @property
    def free_margin(self) -> Decimal:
        """What it could open against."""
        return self.equity - self.used_margin

    def margin_per_coin(self, direction: int, price: Decimal) -> Decimal:
        """What opening one coin at ``price`` takes: the initial margin, and the loss against the mark if it is one."""
        return INITIAL_RATE * self.mark + max(Decimal(0), direction * (price - self.mark))

    def affordable(self, direction: int, price: Decimal, margin: Decimal) -> Decimal:
        """The most that ``margin`` opens at ``price``: a whole number of lots, to the last one."""
        return lots(max(Decimal(0), margin) / self.margin_per_coin(direction, price))

    def near_mark(self) -> Decimal:
        """A price a few ticks off the mark, on tick."""
        return on_tick(self.mark) + TICK * self.random.randint(-250, 250)

    def part(self, share: Decimal) -> Decimal:
        """That share of its position, in whole lots, at least one."""
        return max(LOT, lots(abs(self.quantity) * share))

    # What it can do.

    def look(self) -> Move:
        """GET /positions/{account_id}."""
        answer = yield Request("GET", f"/positions/{self.account_id}")
        if answer.accepted and answer.body["balance"] is not None:  # null in quarantine
            held = next((item for item in answer.body["positions"] if item["symbol"] == SYMBOL), None)
            self._hear(answer.body, held or {"quantity": "0", "avg_price": "0"})
            self.breached = answer.body.get("open_breach") is not None
        return answer

    def trade(self, direction: int, quantity: Decimal, price: Decimal, *, operation_id: str | None = None) -> Move:
        """POST /trade: buy when ``direction`` is 1, sell when it is -1."""
        answer = yield Request(
            "POST",
            "/trade",
            {
                "account_id": self.account_id,
                "symbol": SYMBOL,
                "side": "buy" if direction > 0 else "sell",
                "quantity": format_decimal(quantity),
                "price": format_decimal(price),
                "client_trade_id": operation_id or self.next_operation_id(),
            },
        )
        if answer.status == 201:
            self._hear(answer.body, answer.body["position"])
        return answer

    def deposit(self, amount: Decimal) -> Move:
        """POST /accounts/{account_id}/deposit."""
        return self._transfer("deposit", amount)

    def withdraw(self, amount: Decimal) -> Move:
        """POST /accounts/{account_id}/withdraw."""
        return self._transfer("withdraw", amount)

    def follow(self, refusal: Answer) -> Move:
        """Send what the refusal says to send instead: a deposit of what was missing."""
        instead = refusal.body["next"]
        body = {"client_transfer_id": self.next_operation_id(), **(instead["body"] or {})}
        answer = yield Request(instead["method"], instead["path"], body)
        if answer.status == 201:
            self._hear(answer.body, None)
        return answer

    def next_operation_id(self) -> str:
        """An operation id that no other request of this account bears, in this play or another."""
        self._operations += 1
        return f"{self._run_id}-{self._operations}"

    def _transfer(self, kind: str, amount: Decimal) -> Move:
        answer = yield Request(
            "POST",
            f"/accounts/{self.account_id}/{kind}",
            {"amount": format_decimal(amount), "client_transfer_id": self.next_operation_id()},
        )
        if answer.status == 201:
            self._hear(answer.body, None)
        return answer

    def _hear(self, body: Mapping[str, Any], position: Mapping[str, Any] | None) -> None:
        self.balance = Decimal(body["balance"])
        if position is not None:
            self.quantity = Decimal(position["quantity"])
            self.average_price = Decimal(position["avg_price"] or 0)
        margins = ("equity", "used_margin", "maintenance_margin", "free_margin")
        self.told.clear()
        self.told.update((name, Decimal(body[name])) for name in margins if body.get(name) is not None)
        if not self.quantity or self.told.get("free_margin", Decimal(-1)) >= 0:
            self.breached = False

    def _set_alarm(self) -> None:
        """Reckon the mark at which equity falls below maintenance."""
        size = abs(self.quantity)
        self.alarm_below, self.alarm_above = Decimal(0), Decimal("Infinity")
        if self.quantity > 0:
            self.alarm_below = (size * self.average_price - self.balance) / (size * (1 - MAINTENANCE_RATE))
        elif self.quantity < 0:
            self.alarm_above = (size * self.average_price + self.balance) / (size * (1 + MAINTENANCE_RATE))

    # Trouble: in breach, or about to be.

    def _face_trouble(self, index: int) -> Moves:
        noticed_before = self.breached
        yield from self.look()
        if not self.breached:
            if self.told["equity"] < self.told["maintenance_margin"]:
                self.wakes_at = index + 1  # A candidate that no sweep has found yet; it waits for the call.
            return
        if not noticed_before and self._marks_to_react_max:
            self.wakes_at = index + self.random.randint(1, self._marks_to_react_max)
            return
        if self.told["equity"] < self.told["maintenance_margin"]:
            for _ in range(self.random.choice((1, 1, 2))):
                # A candidate that throws good money after bad; it is refused however small the trade.
                yield from self.trade(self.direction, self.part(Decimal("0.1")), self.near_mark())
        remedies = (
            self._deposit_to_the_initial_line,
            self._deposit_to_the_maintenance_line,
            self._reduce_to_the_initial_line,
            self._reduce_too_little,
            self._reduce_at_the_edge_of_the_band,
            self._close,
            self._flip,
            self._hope,
            self._leave,
        )
        yield from self.random.choices(remedies, weights=(6, 4, 8, 6, 2, 4, 4, 6, 1))[0]()
        self._come_back_soon(index)

    def _come_back_soon(self, index: int) -> None:
        """Unless it is restored, or has left."""
        if self.breached and self.wakes_at < NEVER:
            self.wakes_at = index + self.random.randint(2, 40)

    def _deposit_to_the_initial_line(self) -> Moves:
        """What is missing and nothing more: equity is used margin, to the last digit."""
        yield from self.deposit(units(self.told["used_margin"] - self.told["equity"]))

    def _deposit_to_the_maintenance_line(self) -> Moves:
        """Equity is maintenance, to the last digit: no candidate, and not restored either."""
        missing = units(self.told["maintenance_margin"] - self.told["equity"])
        if missing > 0:
            yield from self.deposit(missing)
        yield from self.trade(self.direction, self.part(Decimal("0.05")), self.near_mark())

    def _reduce_to_the_initial_line(self) -> Moves:
        """Reduce by the fewest lots that restore the account."""
        price = self.near_mark()
        loss_per_coin = self.direction * (self.mark - price)
        size = abs(self.quantity)
        left = (self.told["equity"] - size * loss_per_coin) / (INITIAL_RATE * self.mark - loss_per_coin)
        yield from self.trade(-self.direction, size - lots(min(size - LOT, max(Decimal(0), left))), price)

    def _reduce_too_little(self) -> Moves:
        share = Decimal(self.random.randint(5, 30)) / 100
        yield from self.trade(-self.direction, self.part(share), self.near_mark())
        if self.quantity:
            yield from self.trade(self.direction, LOT, self.near_mark())

    def _reduce_at_the_edge_of_the_band(self) -> Moves:
        """Reduce at the worst price there is: it passes, because it still frees more margin than it loses."""
        price = self.band_edge(-self.direction, worst=True)
        yield from self.trade(-self.direction, self.part(Decimal("0.25")), price)

    def _close(self) -> Moves:
        yield from self.trade(-self.direction, abs(self.quantity), self.near_mark())

    def _flip(self) -> Moves:
        """Turn about with what is left, if anything is."""
        price, direction = self.near_mark(), -self.direction
        margin = self.told["equity"] * Decimal(self.random.randint(60, 99)) / 100
        size = abs(self.quantity)
        yield from self.trade(direction, size + self.affordable(direction, price, margin), price)

    def _hope(self) -> Moves:
        """Wait for a better mark."""
        yield from ()

    def _leave(self) -> Moves:
        """Give up and not come back in this play; the breach stays open, unless the market ends it."""
        self.wakes_at = NEVER
        yield from ()

    def band_edge(self, direction: int, *, worst: bool) -> Decimal:
        """The last price inside the band for one who buys (1) or sells (-1): the ``worst`` for him, or the best."""
        if (direction > 0) == worst:
            return (self.mark * (1 + BAND)).quantize(TICK, rounding=ROUND_FLOOR)
        return (self.mark * (1 - BAND)).quantize(TICK, rounding=ROUND_CEILING)


def on_tick(price: Decimal) -> Decimal:
    """``price``, down to the tick."""
    return price.quantize(TICK, rounding=ROUND_FLOOR)


def lots(quantity: Decimal) -> Decimal:
    """``quantity``, towards zero to a whole number of lots."""
    return quantity.quantize(LOT, rounding=ROUND_DOWN)


def units(amount: Decimal) -> Decimal:
    """``amount``, up to the smallest unit of money."""
    return amount.quantize(SMALLEST_UNIT, rounding=ROUND_CEILING)
