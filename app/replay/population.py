"""The population of a replay: traders of four temperaments, who act seldom and each after one thing."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_DOWN, Decimal
from random import Random
from typing import Final

from app.numbers import SMALLEST_UNIT
from app.replay.trader import BAND, INITIAL_RATE, LOT, NEVER, TICK, Move, Moves, Seat, Trader, lots, on_tick, units

_ROUND_LOT: Final = LOT * 1000
_DEPOSITS: Final = tuple(Decimal(amount) for amount in (2_000, 5_000, 10_000, 20_000, 50_000))


class Leveraged(Trader):
    """Holds one direction at the limit of its initial margin and raises it whenever the market gives room."""

    def __init__(self, seat: Seat, *, direction: int) -> None:
        super().__init__(seat)
        self.side = direction
        self.stake = self.random.choice(_DEPOSITS)
        # It enters early: an adverse move of about a tenth of the price, from wherever it enters, is a breach.
        self.wakes_at = round(self.marks_between_acts * self.random.uniform(0, 0.4))

    def pursue(self) -> Moves:
        """Enter, stay at the limit, and press on where there is no room."""
        if self.balance < 0 and not self.quantity and self.random.random() < 0.4:
            self.wakes_at = NEVER  # Ruined, and leaves the debt.
        elif not self.quantity:
            yield from self._enter()
        elif self.direction != self.side:
            yield from self.trade(-self.direction, self._turn(), self.near_mark())
        elif self.free_margin > self.equity / 50:
            yield from self._use_the_room()
        else:
            yield from self._press_on()

    def _turn(self) -> Decimal:
        """The size of a flip: all of the position, and half of what the equity then carries the other way."""
        return abs(self.quantity) + self.affordable(-self.direction, self.mark, self.equity / 2)

    def _enter(self) -> Moves:
        if self.random.random() < 0.3:
            yield from self._enter_to_the_last_digit()
            return
        if self.balance < self.stake / 10:
            yield from self.deposit(self.stake - self.balance)
        price = self.near_mark()
        yield from self.trade(self.side, self.affordable(self.side, price, self.balance), price)

    def _enter_to_the_last_digit(self) -> Moves:
        """Hold exactly the margin that a round quantity takes: free margin is 0, and one unit cannot be withdrawn."""
        price = on_tick(self.mark) + TICK * self.random.randint(-100, 100)
        round_quantity = self.stake / self.margin_per_coin(self.side, price) // _ROUND_LOT * _ROUND_LOT
        surplus = self.balance - units(max(round_quantity, _ROUND_LOT) * self.margin_per_coin(self.side, price))
        if surplus > 0:
            yield from self.withdraw(surplus)
        elif surplus < 0:
            yield from self.deposit(-surplus)
        yield from self.trade(self.side, max(round_quantity, _ROUND_LOT), price)
        if self.told.get("free_margin") == 0:
            yield from self.withdraw(SMALLEST_UNIT)

    def _use_the_room(self) -> Moves:
        price = self.near_mark()
        quantity = self.affordable(self.side, price, self.free_margin)
        drawn = self.random.random()
        if drawn < 0.2 and self.balance > 0:
            yield from self.withdraw(units(min(self.balance, self.free_margin) / 2))
        elif drawn < 0.4:
            yield from self.trade(self.side, quantity + 2 * LOT, price)  # A lot too many is refused.
            yield from self.trade(self.side, max(LOT, quantity - LOT), price)
        elif quantity:
            yield from self.trade(self.side, quantity, price)

    def _press_on(self) -> Moves:
        """There is no room: most wait, some try anyway, few put money after it, very few trim."""
        drawn = self.random.random()
        if drawn < 0.15:
            yield from self.trade(self.side, self.part(Decimal("0.1")), self.near_mark())
        elif drawn < 0.2:
            refused = yield from self.trade(self.side, self.part(Decimal("0.05")), self.near_mark())
            if refused.code == "insufficient_initial_margin":
                yield from self.follow(refused)
        elif drawn < 0.25:
            yield from self.trade(-self.side, self.part(Decimal("0.03")), self.near_mark())


class Flipper(Trader):
    """Is always on one side of the market, and turns about in one trade; half as often as others act."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self.marks_between_acts *= 2
        self.wakes_at = round(self.marks_between_acts * self.random.random())

    def pursue(self) -> Moves:
        """Flip with a part of what the equity carries."""
        if self.equity < 500:
            yield from self.deposit(self.random.choice(_DEPOSITS) - self.equity.quantize(Decimal("0.01")))
        price = self.near_mark()
        direction = -self.direction or self.random.choice((1, -1))
        margin = self.equity * Decimal(self.random.randint(30, 80)) / 100
        yield from self.trade(direction, abs(self.quantity) + self.affordable(direction, price, margin), price)


class Scaler(Trader):
    """Builds a small position in steps, takes it off in odd parts, closes it, and does the same the other way."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self._side = self.random.choice((1, -1))
        self._steps: Iterator[Moves] = iter(())

    def pursue(self) -> Moves:
        """Take the next step of the cycle."""
        step = next(self._steps, None)
        if step is None:
            self._side = -self._side
            self._steps = self._cycle()
            step = next(self._steps)
        yield from step

    def _cycle(self) -> Iterator[Moves]:
        yield self._open()
        yield self._scale_in()
        yield self._scale_out()
        yield self._scale_out()
        yield self._close()

    def _open(self) -> Moves:
        if self.equity < 500:
            yield from self.deposit(self.random.choice(_DEPOSITS) - self.equity.quantize(Decimal("0.01")))
        if self.quantity:
            yield from self._close()
        yield from self._add(self._side)

    def _scale_in(self) -> Moves:
        yield from self._add(self.direction or self._side)

    def _add(self, direction: int) -> Move:
        price = self.near_mark()
        margin = max(self.free_margin, Decimal(0)) * Decimal(self.random.randint(3, 15)) / 100
        return self.trade(direction, max(LOT, self.affordable(direction, price, margin)), price)

    def _scale_out(self) -> Moves:
        if self.quantity:
            # An exact half of a cost with an odd last digit is a tie, which rounding has to send to the even side.
            share = Decimal(self.random.choice((50, self.random.randint(10, 70)))) / 100
            yield from self.trade(-self.direction, self.part(share), self.near_mark())

    def _close(self) -> Moves:
        if self.quantity:
            yield from self.trade(-self.direction, abs(self.quantity), self.near_mark())


class Reckless(Trader):
    """Tries what is not allowed: too much, too far from the mark, more than it has, the same thing twice."""

    def pursue(self) -> Moves:
        """Try one of them."""
        if self.equity < 500:
            yield from self.deposit(self.random.choice(_DEPOSITS) - self.equity.quantize(Decimal("0.01")))
        attempts = (
            self._too_much,
            self._outside_the_band,
            self._on_the_edge_of_the_band,
            self._withdraw_too_much,
            self._send_twice,
            self._small_change,
        )
        yield from self.random.choices(attempts, weights=(4, 6, 2, 2, 1, 4))[0]()

    def _too_much(self) -> Moves:
        """More than its margin carries; then, sometimes, deposit what the refusal asks for and send it again."""
        direction, price = self.random.choice((1, -1)), self.near_mark()
        quantity = abs(self.quantity) + lots(self.equity * Decimal("1.3") / (INITIAL_RATE * self.mark))
        refused = yield from self.trade(direction, quantity, price)
        if refused.code == "insufficient_initial_margin" and self.random.random() < 0.3:
            yield from self.follow(refused)
            yield from self.trade(direction, quantity, price)

    def _outside_the_band(self) -> Moves:
        """A price one tick outside the band, or well outside it."""
        direction = self.random.choice((1, -1))
        price = self.band_edge(direction, worst=self.random.random() < 0.5)
        outwards = TICK if price > self.mark else -TICK
        yield from self.trade(direction, self._small(), price + outwards * self.random.choice((1, 1, 100, 100_000)))

    def _on_the_edge_of_the_band(self) -> Moves:
        direction = self.random.choice((1, -1))
        price = self.band_edge(direction, worst=self.random.random() < 0.5)
        yield from self.trade(direction, self._small(), price)

    def _withdraw_too_much(self) -> Moves:
        """One unit more than there is, which is refused; then, sometimes, all there is to the last unit."""
        yield from self.look()
        if "free_margin" in self.told:
            available = max(Decimal(0), min(self.balance, self.told["free_margin"]))
            yield from self.withdraw(units(available) + SMALLEST_UNIT)
            if available > 0 and self.random.random() < 0.5:
                yield from self.withdraw(available.quantize(SMALLEST_UNIT, rounding=ROUND_DOWN))

    def _send_twice(self) -> Moves:
        """The same trade under the same id again, as after a lost answer; then another trade under that id."""
        operation_id, direction, price = self.next_operation_id(), self.random.choice((1, -1)), self.near_mark()
        quantity = self._small()
        for repeated in (quantity, quantity, quantity + LOT):
            yield from self.trade(direction, repeated, price, operation_id=operation_id)

    def _small_change(self) -> Moves:
        yield from self.trade(self.random.choice((1, -1)), self._small(), self.near_mark())

    def _small(self) -> Decimal:
        margin = max(self.equity, Decimal(100)) * Decimal(self.random.randint(1, 10)) / 100
        return max(LOT, lots(margin / (INITIAL_RATE * self.mark * (1 + BAND))))


def population(*, accounts: int, seed: int, run_id: str, marks_in_play: int) -> list[Trader]:
    """``accounts`` traders: of each ten, three hold long and two short, two flip, two scale and one is reckless.

    Each draws from a generator of its own, so none's luck depends on the order in which they are served. ``run_id``
    begins their operation ids.
    """
    return [
        _trader(
            number,
            Seat(
                account_id=f"replay-{number:03d}",
                run_id=run_id,
                random=Random(f"{seed} {number}"),
                marks_in_play=marks_in_play,
            ),
        )
        for number in range(accounts)
    ]


def _trader(number: int, seat: Seat) -> Trader:
    match number % 10:
        case 0 | 1 | 2:
            return Leveraged(seat, direction=1)
        case 3 | 4:
            return Leveraged(seat, direction=-1)
        case 5 | 6:
            return Flipper(seat)
        case 7 | 8:
            return Scaler(seat)
        case _:
            return Reckless(seat)
