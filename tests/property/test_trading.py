"""Nothing is created or lost, whatever is traded in whatever order."""

from __future__ import annotations

import random
from collections import Counter
from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from app import errors
from app.services import trading
from app.services.trading import FLAT, Account, Mark, Market, Position, Side, TradeOrder, TransferKind, TransferOrder
from tests.property.repeatable import repeatable
from tests.property.worlds import CONTRACTS, World, positions, worlds
from tests.unit.cast import BTC, ETH, NOON_US

BTC_PERP = CONTRACTS[BTC]

btc_positions = st.one_of(st.just(FLAT), positions(BTC_PERP, Decimal(50_000)))
signed_quantities = st.builds(
    lambda sign, lots: sign * lots * BTC_PERP.lot_size,
    st.sampled_from([1, -1]),
    st.one_of(st.integers(1, 3), st.integers(1, 5_000_000)),
)
prices = st.one_of(st.integers(1, 10), st.integers(2_500_000, 7_500_000)).map(lambda ticks: ticks * BTC_PERP.tick_size)


@repeatable
@given(held=btc_positions, quantity=signed_quantities, price=prices)
def test_a_trade_splits_into_what_it_closes_and_what_it_opens(
    held: Position, quantity: Decimal, price: Decimal
) -> None:
    fill = trading.apply_trade(held, signed_quantity=quantity, price=price)
    assert fill.closed + fill.opened == quantity
    assert fill.position.quantity == held.quantity + quantity
    assert abs(fill.closed) <= abs(held.quantity)
    assert fill.closed * held.quantity <= 0
    # What opens goes the way the position then lies, and opens only once all is closed or nothing was to be closed.
    assert fill.opened * fill.position.quantity >= 0
    if fill.closed and fill.opened:
        assert fill.closed == -held.quantity


@repeatable
@given(held=btc_positions, quantity=signed_quantities, price=prices)
def test_cost_and_cash_change_by_exactly_what_was_traded(held: Position, quantity: Decimal, price: Decimal) -> None:
    """What the trade cost goes into the position's cost or, realised, out of cash; there is no third place."""
    fill = trading.apply_trade(held, signed_quantity=quantity, price=price)
    traded = Fraction(quantity) * Fraction(price)
    assert Fraction(fill.position.cost) - Fraction(held.cost) == traded + Fraction(fill.realised_pnl)
    if not fill.position.quantity:
        assert fill.position == FLAT


@repeatable
@given(held=positions(BTC_PERP, Decimal(50_000)), share=st.fractions(0, 1), price=prices)
def test_a_partial_close_removes_its_share_of_the_cost_rounded_once_half_even(
    held: Position, share: Fraction, price: Decimal
) -> None:
    lots = int(abs(held.quantity) / BTC_PERP.lot_size)
    closed = max(1, int(share * lots)) * BTC_PERP.lot_size
    fill = trading.apply_trade(held, signed_quantity=-closed if held.quantity > 0 else closed, price=price)
    true_share = Fraction(held.cost) * Fraction(closed) / abs(Fraction(held.quantity))
    assert Fraction(held.cost) - Fraction(fill.position.cost) == Fraction(round(true_share * 10**8), 10**8)


@repeatable
@given(held=positions(BTC_PERP, Decimal(50_000)), parts=st.lists(st.integers(1, 10**9), max_size=12), price=prices)
def test_closing_in_parts_realises_what_closing_at_once_does(held: Position, parts: list[int], price: Decimal) -> None:
    at_once = trading.apply_trade(held, signed_quantity=-held.quantity, price=price).realised_pnl
    realised, sign = Decimal(0), 1 if held.quantity > 0 else -1
    for lots in [*parts, 10**15]:
        part = min(lots * BTC_PERP.lot_size, abs(held.quantity))
        if not part:
            break
        fill = trading.apply_trade(held, signed_quantity=-sign * part, price=price)
        held, realised = fill.position, realised + fill.realised_pnl
        assert held == FLAT or held.cost * sign > 0
    assert held == FLAT
    assert realised == at_once


@repeatable
@given(
    trades=st.lists(st.tuples(st.sampled_from([BTC, ETH]), signed_quantities, prices), max_size=30),
    transfers=st.lists(st.integers(-(10**12), 10**12), max_size=30),
)
def test_the_books_balance_after_every_trade_and_transfer(
    trades: list[tuple[str, Decimal, Decimal]], transfers: list[int]
) -> None:
    """The balance less the deposits is the cost of what is open less all that was traded; when flat, cost is 0."""
    balance, held = Decimal(0), {BTC: FLAT, ETH: FLAT}
    deposits, traded = Fraction(0), Fraction(0)
    for number, (symbol, drawn, price) in enumerate(trades):
        if number < len(transfers):
            amount = Decimal(transfers[number]).scaleb(-8)
            balance, deposits = balance + amount, deposits + Fraction(amount)
        # ETH trades in lots of its own.
        lot = CONTRACTS[symbol].lot_size
        quantity = drawn.quantize(lot) or lot
        fill = trading.apply_trade(held[symbol], signed_quantity=quantity, price=price)
        held[symbol] = fill.position
        balance += fill.realised_pnl
        traded += Fraction(quantity) * Fraction(price)
        open_cost = sum((Fraction(position.cost) for position in held.values()), start=Fraction(0))
        assert Fraction(balance) - deposits == open_cost - traded
    for position in held.values():
        if position.quantity:
            fill = trading.apply_trade(position, signed_quantity=-position.quantity, price=Decimal("48000.01"))
            assert fill.position == FLAT
            balance += fill.realised_pnl
            traded -= Fraction(position.quantity) * Fraction("48000.01")
    assert Fraction(balance) == deposits - traded


@repeatable
@given(worlds(), st.sampled_from(["deposit", "withdrawal"]), st.integers(1, 10**15))
def test_a_transfer_changes_cash_by_its_amount_and_nothing_else(world: World, kind: TransferKind, amount: int) -> None:
    order = TransferOrder("somebody", kind, Decimal(amount).scaleb(-8))
    try:
        decision = trading.decide_transfer(world.account, order, world.market)
    except errors.Refusal:
        return
    assert decision.account.balance - world.account.balance == order.signed_amount
    assert decision.account.positions == world.account.positions


class Book:
    """An account on a random walk through ``decide_trade`` and ``decide_transfer``, with books of its own beside it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.account = Account(f"walker-{seed}", Decimal(0))
        self.marks = {BTC: Decimal(50_000), ETH: Decimal(2_500)}
        self.deposits = Fraction(0)
        self.traded = Fraction(0)
        self.seen: Counter[str] = Counter()

    @property
    def market(self) -> Market:
        marks = {symbol: Mark(price, NOON_US) for symbol, price in self.marks.items()}
        return Market(contracts=CONTRACTS, marks=marks, mark_version=1, now_us=NOON_US)

    def step(self) -> None:
        """Move the marks, then trade or transfer; whatever is refused changes nothing."""
        for symbol in self.marks:
            moved = self.marks[symbol] * Decimal(self.random.randint(9_000, 11_000)) / 10_000
            self.marks[symbol] = moved.quantize(Decimal("0.00000001"))
        before = self.account
        try:
            if self.random.random() < 0.2:
                self._transfer()
            else:
                self._trade()
        except errors.Refusal as refusal:
            self.seen[refusal.code] += 1
            assert self.account is before
        self._check()

    def _transfer(self) -> None:
        kind: TransferKind = "deposit" if self.random.random() < 0.6 else "withdrawal"
        order = TransferOrder("walker", kind, Decimal(self.random.randint(1, 10**12)).scaleb(-8))
        self.account = trading.decide_transfer(self.account, order, self.market).account
        self.deposits += Fraction(order.signed_amount)
        self.seen[kind] += 1

    def _trade(self) -> None:
        symbol = self.random.choice([BTC, ETH])
        contract, held = CONTRACTS[symbol], self.account.position(symbol).quantity
        side: Side = self.random.choice(["buy", "sell"])
        price = self.marks[symbol] * Decimal(self.random.randint(8_950, 11_050)) / 10_000
        price = price.quantize(contract.tick_size)
        scale = abs(held) if held and self.random.random() < 0.8 else Decimal(10_000) / self.marks[symbol]
        quantity = (scale * self.random.choice([Decimal("0.3"), Decimal("0.5"), Decimal(1), Decimal(2)])).quantize(
            contract.lot_size
        )
        order = TradeOrder("walker", symbol, side, max(quantity, contract.lot_size), price)
        trading.check_order(order, CONTRACTS)
        decision = trading.decide_trade(self.account, order, self.market)
        self.account = decision.account
        self.traded += Fraction(order.signed_quantity) * Fraction(price)
        self.seen[self._kind(held, decision.account.position(symbol).quantity)] += 1

    @staticmethod
    def _kind(before: Decimal, after: Decimal) -> str:
        way = "long" if (before or after) > 0 else "short"
        if not before:
            return f"open {way}"
        if not after:
            return f"close {way}"
        if before * after < 0:
            return f"flip {way}"
        return f"{'increase' if abs(after) > abs(before) else 'reduce'} {way}"

    def _check(self) -> None:
        open_cost = sum((Fraction(held.cost) for held in self.account.positions.values()), start=Fraction(0))
        assert Fraction(self.account.balance) - self.deposits == open_cost - self.traded
        if not self.account.positions:
            self.seen["flat"] += 1
            assert Fraction(self.account.balance) == self.deposits - self.traded
        for held in self.account.positions.values():
            assert held.quantity
            assert held.cost * held.quantity > 0


def test_random_walks_of_every_kind_of_trade_keep_the_books_to_the_last_digit() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        book = Book(seed)
        for _ in range(250):
            book.step()
        seen += book.seen
    for way in ("long", "short"):
        for kind in ("open", "increase", "reduce", "close", "flip"):
            assert seen[f"{kind} {way}"] >= 50, seen
    for code in (
        "insufficient_initial_margin", "below_maintenance_margin", "price_out_of_band", "insufficient_free_margin",
        "deposit", "withdrawal", "flat",
    ):  # fmt: skip
        assert seen[code] >= 50, seen
