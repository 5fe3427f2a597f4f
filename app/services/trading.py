"""Apply a trade or a transfer to an account, or refuse it. Pure: an account and marks in, a decision or an error out.

The rules are DESIGN section 4; the first check that fails names the refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal, NamedTuple

from app import errors
from app.contracts import AMOUNT_LIMIT, Contract
from app.numbers import SMALLEST_UNIT, exact, format_decimal, is_multiple
from app.services import margin
from app.services.margin import AccountMargin, Exposure

ZERO = Decimal(0)
Side = Literal["buy", "sell"]
TransferKind = Literal["deposit", "withdrawal"]
RestoreAt = Literal["initial", "maintenance"]


# A named tuple, as ``Fill`` and the decisions below: a frozen dataclass takes up to twice as long to make, and
# four times as long to compare.
class Position(NamedTuple):
    """What is open in one symbol: signed ``quantity`` in coins, ``cost`` in USDT with the same sign."""

    quantity: Decimal = ZERO
    cost: Decimal = ZERO


FLAT = Position()


@dataclass(frozen=True, slots=True)
class Account:
    """The record of an account: its cash in USDT and its open positions by symbol."""

    account_id: str
    balance: Decimal
    positions: Mapping[str, Position] = field(default_factory=dict)

    def position(self, symbol: str) -> Position:
        """The position in ``symbol``, flat if there is none."""
        return self.positions.get(symbol, FLAT)


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark price in USDT and when it was accepted, in microseconds of Redis TIME."""

    price: Decimal
    timestamp_us: int


@dataclass(frozen=True, slots=True)
class Market:
    """What a decision is made against: contracts, marks, the mark version, and the time it is made.

    ``prices`` are those of ``marks``.
    """

    contracts: Mapping[str, Contract]
    marks: Mapping[str, Mark]
    mark_version: int
    now_us: int
    mark_max_age_seconds: float | None = None
    halted: bool = False
    prices: Mapping[str, Decimal] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prices", {symbol: mark.price for symbol, mark in self.marks.items()})


@dataclass(frozen=True, slots=True)
class TradeOrder:
    """A trade to book: ``quantity`` in coins and above zero, ``price`` in USDT."""

    account_id: str
    symbol: str
    side: Side
    quantity: Decimal
    price: Decimal

    @property
    def signed_quantity(self) -> Decimal:
        """Positive for a buy, negative for a sell."""
        return self.quantity if self.side == "buy" else -self.quantity


@dataclass(frozen=True, slots=True)
class TransferOrder:
    """A deposit or a withdrawal of ``amount`` USDT, above zero."""

    account_id: str
    kind: TransferKind
    amount: Decimal

    @property
    def signed_amount(self) -> Decimal:
        """Positive for a deposit, negative for a withdrawal."""
        return self.amount if self.kind == "deposit" else -self.amount


class Fill(NamedTuple):
    """What a trade does to one position; ``closed`` and ``opened`` are its signed parts, in coins."""

    position: Position
    realised_pnl: Decimal
    closed: Decimal
    opened: Decimal


class TradeDecision(NamedTuple):
    """An accepted trade: the account after it, and the margin it then has at the marks decided on."""

    account: Account
    fill: Fill
    mark_price: Decimal
    margin: AccountMargin[Decimal]


class TransferDecision(NamedTuple):
    """An accepted transfer; ``margin`` is None when a mark that an open position needs is missing."""

    account: Account
    margin: AccountMargin[Decimal] | None


@exact
def apply_trade(position: Position, *, signed_quantity: Decimal, price: Decimal) -> Fill:
    """Close what the trade closes, open the rest.

    Closing part of a position removes ``cost x closed / quantity``, rounded once, half-even, to 1e-8; the remainder
    stays, so cost is neither made nor lost. A flip is a close and an open.
    """
    held = position.quantity
    closed = ZERO
    if held * signed_quantity < 0:
        closed = signed_quantity if abs(signed_quantity) <= abs(held) else -held
    opened = signed_quantity - closed
    if closed == -held:
        cost_removed = position.cost
    else:
        cost_removed = margin.divide_half_even(position.cost * abs(closed), abs(held)) if closed else ZERO
    return Fill(
        position=Position(quantity=held + signed_quantity, cost=position.cost - cost_removed + opened * price),
        realised_pnl=-closed * price - cost_removed,
        closed=closed,
        opened=opened,
    )


@exact
def exposure_of(
    positions: Mapping[str, Position], *, contracts: Mapping[str, Contract], prices: Mapping[str, Decimal]
) -> Exposure[Decimal]:
    """What ``positions`` amount to at ``prices``, exact. Raises ``KeyError`` if an open symbol has no price."""
    return margin.total_exposure(
        [
            margin.position_exposure(
                quantity=position.quantity,
                cost=position.cost,
                mark_price=prices[symbol],
                initial_rate=contracts[symbol].initial_rate,
                maintenance_rate=contracts[symbol].maintenance_rate,
            )
            for symbol, position in positions.items()
        ]
    )


@exact
def account_margin(
    account: Account, *, contracts: Mapping[str, Contract], prices: Mapping[str, Decimal]
) -> AccountMargin[Decimal]:
    """The margin of ``account`` at ``prices``, exact. Raises ``KeyError`` if an open symbol has no price."""
    exposure = exposure_of(account.positions, contracts=contracts, prices=prices)
    return AccountMargin(balance=account.balance, exposure=exposure)


def is_candidate(valued: AccountMargin[Decimal]) -> bool:
    """Whether the account, valued at the marks that matter, is a liquidation candidate."""
    return margin.is_candidate(
        notional=valued.exposure.notional, equity=valued.equity, maintenance_margin=valued.maintenance_margin
    )


def is_restored(valued: AccountMargin[Decimal], *, restore_at: RestoreAt) -> bool:
    """Whether an open breach of the account ends."""
    return margin.is_restored(
        notional=valued.exposure.notional,
        equity=valued.equity,
        restore_margin=valued.used_margin if restore_at == "initial" else valued.maintenance_margin,
    )


def check_order(order: TradeOrder, contracts: Mapping[str, Contract]) -> None:
    """Refuse an order that no state of the account could make valid; raises ``InvalidField``."""
    contract = contract_of(order.symbol, contracts)
    limits = (
        ("quantity", order.quantity, contract.lot_size, "lot_size", 2 * contract.position_limit),
        ("price", order.price, contract.tick_size, "tick_size", contract.price_max),
    )
    for name, value, step, step_name, maximum in limits:
        if value <= 0:
            raise errors.InvalidField(f"{name} must be above 0", field=name)
        if value > maximum:
            raise errors.InvalidField(f"{name} must be at most {maximum:f}", field=name, maximum=maximum)
        if not is_multiple(value, step):
            raise errors.InvalidField(f"{name} must be a multiple of {step_name} {step:f}", field=name, step=step)


def check_amount(amount: Decimal, *, name: str = "amount", maximum: Decimal = AMOUNT_LIMIT) -> None:
    """Refuse an amount or mark that is not above 0, not a multiple of 1e-8 or above ``maximum``."""
    if amount <= 0:
        raise errors.InvalidField(f"{name} must be above 0", field=name)
    if amount > maximum:
        raise errors.InvalidField(f"{name} must be at most {maximum:f}", field=name, maximum=maximum)
    if not is_multiple(amount, SMALLEST_UNIT):
        raise errors.InvalidField(f"{name} may have at most 8 decimals", field=name, step=SMALLEST_UNIT)


def contract_of(symbol: str, contracts: Mapping[str, Contract]) -> Contract:
    """The contract of ``symbol``; raises ``InvalidField`` that lists the symbols there are."""
    contract = contracts.get(symbol)
    if contract is None:
        raise errors.InvalidField(
            f"symbol must be one of {', '.join(contracts)}", field="symbol", allowed=list(contracts)
        )
    return contract


@exact
def decide_trade(account: Account, order: TradeOrder, market: Market) -> TradeDecision:
    """Accept ``order`` or raise the first refusal that applies, in the order of DESIGN section 4."""
    contract = market.contracts[order.symbol]
    fill = apply_trade(account.position(order.symbol), signed_quantity=order.signed_quantity, price=order.price)
    reduces_only = not fill.opened
    if market.halted and not reduces_only:
        raise errors.TradingHalted("trading is halted; only trades that reduce a position pass")
    _require_marks(account, order.symbol, market, suggested_price=order.price)
    if not reduces_only:
        _require_fresh_marks(account, order.symbol, market)
    mark_price = market.prices[order.symbol]
    _check_band(order, contract, mark_price)
    after = _account_after(account, order.symbol, fill)
    _check_limits(account, order, after, contract, reduces_only=reduces_only)

    margin_after = account_margin(after, contracts=market.contracts, prices=market.prices)
    opening_gain = max(ZERO, fill.opened * (mark_price - order.price))
    if margin_after.equity - opening_gain < margin_after.used_margin:
        margin_before = account_margin(account, contracts=market.contracts, prices=market.prices)
        if not (reduces_only and margin_after.free_margin >= margin_before.free_margin):
            raise _insufficient(order, margin_before, margin_after, opening_gain=opening_gain)
    return TradeDecision(account=after, fill=fill, mark_price=mark_price, margin=margin_after)


@exact
def decide_transfer(account: Account, order: TransferOrder, market: Market) -> TransferDecision:
    """Accept a deposit or withdrawal, or raise; a withdrawal leaves neither balance nor free margin below 0."""
    after = replace(account, balance=account.balance + order.signed_amount)
    if order.kind == "withdrawal":
        if market.halted:
            raise errors.TradingHalted("trading is halted; withdrawals wait")
        _require_marks(account, None, market, suggested_price=None)
        _require_fresh_marks(account, None, market)
    if after.balance > AMOUNT_LIMIT:
        raise errors.AmountLimit(
            f"the balance would be {format_decimal(after.balance)}, above {AMOUNT_LIMIT:f}",
            required=after.balance,
            available=AMOUNT_LIMIT,
            next=errors.deposit_step(order.account_id, room) if (room := AMOUNT_LIMIT - account.balance) > 0 else None,
        )
    if any(symbol not in market.marks for symbol in account.positions):
        return TransferDecision(account=after, margin=None)
    valued = account_margin(after, contracts=market.contracts, prices=market.prices)
    if order.kind == "withdrawal":
        available = min(account.balance, valued.free_margin + order.amount)
        if order.amount > available:
            raise errors.InsufficientFreeMargin(
                f"at most {format_decimal(max(available, ZERO))} can be withdrawn",
                required=order.amount,
                available=max(available, ZERO),
                balance=account.balance,
                free_margin=valued.free_margin + order.amount,
                next=_deposit_or_less(order, available),
            )
    return TransferDecision(account=after, margin=valued)


def _deposit_or_less(order: TransferOrder, available: Decimal) -> dict[str, object]:
    """The withdrawal that would pass, or the deposit that would let this one pass."""
    withdrawable = _to_step(available, SMALLEST_UNIT, up=False) if available > 0 else ZERO
    if not withdrawable:
        return errors.deposit_step(order.account_id, _round_up(order.amount - available))
    return {
        "method": "POST",
        "path": f"/accounts/{order.account_id}/withdraw",
        "body": {"amount": format_decimal(withdrawable)},
    }


def _account_after(account: Account, symbol: str, fill: Fill) -> Account:
    positions = {**account.positions, symbol: fill.position}
    if not fill.position.quantity:
        del positions[symbol]
    return Account(account.account_id, account.balance + fill.realised_pnl, positions)


def _symbols_valued(account: Account, traded: str | None) -> list[str]:
    return [*account.positions, *([traded] if traded and traded not in account.positions else [])]


def _require_marks(account: Account, traded: str | None, market: Market, *, suggested_price: Decimal | None) -> None:
    if account.positions.keys() <= market.marks.keys() and (traded is None or traded in market.marks):
        return
    for symbol in _symbols_valued(account, traded):
        if symbol not in market.marks:
            price = suggested_price if symbol == traded else None
            held = account.position(symbol)
            if price is None:
                price = margin.average_price(quantity=held.quantity, cost=held.cost)
            raise errors.NoMarkPrice(
                f"{symbol} has no mark price yet", symbol=symbol, next=errors.mark_step(symbol, price)
            )


def _require_fresh_marks(account: Account, traded: str | None, market: Market) -> None:
    if market.mark_max_age_seconds is None:
        return
    for symbol in _symbols_valued(account, traded):
        mark = market.marks[symbol]
        age_us = market.now_us - mark.timestamp_us
        if age_us > market.mark_max_age_seconds * 1_000_000:
            raise errors.StaleMarkPrice(
                f"the mark of {symbol} is {age_us / 1_000_000:.3f} s old, "
                f"more than {market.mark_max_age_seconds} s; only reductions pass",
                symbol=symbol,
                required=f"at most {market.mark_max_age_seconds} s",
                available=f"{age_us / 1_000_000:.3f} s",
                next=errors.mark_step(symbol, mark.price),
            )


def _check_band(order: TradeOrder, contract: Contract, mark_price: Decimal) -> None:
    distance = abs(order.price - mark_price)
    allowed = contract.price_band * mark_price
    if distance <= allowed:
        return
    lowest, highest = mark_price - allowed, mark_price + allowed
    nearest = (
        _to_step(highest, contract.tick_size, up=False)
        if order.price > mark_price
        else _to_step(lowest, contract.tick_size, up=True)
    )
    raise errors.PriceOutOfBand(
        f"price {format_decimal(order.price)} is outside {format_decimal(lowest)} to {format_decimal(highest)}, "
        f"the band around the mark {format_decimal(mark_price)}",
        required=nearest,
        available=order.price,
        mark_price=mark_price,
        lowest=lowest,
        highest=highest,
        next=_same_trade(order, price=nearest) if nearest and abs(nearest - mark_price) <= allowed else None,
    )


def _check_limits(
    account: Account, order: TradeOrder, after: Account, contract: Contract, *, reduces_only: bool
) -> None:
    position = after.position(order.symbol)
    if abs(position.quantity) > contract.position_limit and not reduces_only:
        held = account.position(order.symbol).quantity
        room = contract.position_limit - (held if order.side == "buy" else -held)
        raise errors.PositionLimit(
            f"the position would be {format_decimal(position.quantity)}, beyond the limit of "
            f"{format_decimal(contract.position_limit)}",
            required=abs(position.quantity),
            available=contract.position_limit,
            next=_same_trade(order, quantity=_to_step(room, contract.lot_size, up=False))
            if room >= contract.lot_size
            else None,
        )
    for name, value in (("balance", after.balance), ("cost", position.cost)):
        if abs(value) > AMOUNT_LIMIT:
            raise errors.AmountLimit(
                f"the {name} would be {format_decimal(value)}, beyond {AMOUNT_LIMIT:f}",
                required=abs(value),
                available=AMOUNT_LIMIT,
            )


def _insufficient(
    order: TradeOrder,
    before: AccountMargin[Decimal],
    after: AccountMargin[Decimal],
    *,
    opening_gain: Decimal,
) -> errors.Refusal:
    required, available = after.used_margin, after.equity - opening_gain
    parts = {
        "equity_after": after.equity,
        "opening_gain_not_counted": opening_gain,
        "used_margin_before": before.used_margin,
        "free_margin_before": before.free_margin,
    }
    step = errors.deposit_step(order.account_id, _round_up(required - available))
    if is_candidate(before):
        return errors.BelowMaintenanceMargin(
            f"equity {format_decimal(before.equity)} is below the maintenance margin "
            f"{format_decimal(before.maintenance_margin)}; only reductions and deposits pass",
            required=required,
            available=available,
            parts={**parts, "equity_before": before.equity, "maintenance_margin_before": before.maintenance_margin},
            next=step,
        )
    return errors.InsufficientInitialMargin(
        f"the positions after this trade require {format_decimal(required)} of initial margin; "
        f"{format_decimal(available)} is available",
        required=required,
        available=available,
        parts=parts,
        next=step,
    )


def _same_trade(
    order: TradeOrder, *, quantity: Decimal | None = None, price: Decimal | None = None
) -> dict[str, object]:
    return errors.trade_step(
        account_id=order.account_id,
        symbol=order.symbol,
        side=order.side,
        quantity=order.quantity if quantity is None else quantity,
        price=order.price if price is None else price,
    )


def _round_up(amount: Decimal) -> Decimal:
    return _to_step(amount, SMALLEST_UNIT, up=True)


def _to_step(value: Decimal, step: Decimal, *, up: bool) -> Decimal:
    """The multiple of ``step`` next to ``value``, which is above 0; integer division keeps it exact for any step."""
    steps, rest = divmod(value, step)
    return (steps + 1 if up and rest else steps) * step
