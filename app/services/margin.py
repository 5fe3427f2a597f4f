"""Every margin formula, pure, each written once.

The sums use only ``+ - *`` and ``abs``, so one definition serves a single account in ``Decimal``, where verdicts are
made, and a numpy column of every account in float64, where a sweep screens. Ratios, average and liquidation price
divide; they are for display and exist for ``Decimal`` alone.

Units: money and prices in USDT, quantities in coins (positive long, negative short), rates as fractions of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import ROUND_05UP, ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, InvalidOperation
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Column: TypeAlias = "NDArray[np.float64]"
Flags: TypeAlias = "NDArray[np.bool_]"
Amount = TypeVar("Amount", Decimal, "NDArray[np.float64]")

_DIVISION: Final = Context(prec=80, rounding=ROUND_05UP, traps=[InvalidOperation, DivisionByZero])
_ONE: Final = Decimal(1)


def notional(*, quantity: Amount, mark_price: Amount) -> Amount:
    """What the position is worth at the mark, without its sign."""
    return abs(quantity) * mark_price


def unrealised_pnl(*, quantity: Amount, cost: Amount, mark_price: Amount) -> Amount:
    """What closing at the mark would earn; ``cost`` carries the sign of ``quantity``."""
    return quantity * mark_price - cost


def margin_requirement(*, notional: Amount, rate: Amount) -> Amount:
    """The margin that ``rate`` asks of a position: used margin at the initial rate, else maintenance margin."""
    return notional * rate


@dataclass(frozen=True, slots=True)
class Exposure(Generic[Amount]):
    """What open positions amount to at some marks. Exposures add: an account's is the sum of its positions'."""

    notional: Amount
    unrealised_pnl: Amount
    used_margin: Amount
    maintenance_margin: Amount

    def __add__(self, other: Exposure[Amount]) -> Exposure[Amount]:
        return Exposure(
            notional=self.notional + other.notional,
            unrealised_pnl=self.unrealised_pnl + other.unrealised_pnl,
            used_margin=self.used_margin + other.used_margin,
            maintenance_margin=self.maintenance_margin + other.maintenance_margin,
        )


def position_exposure(
    *, quantity: Amount, cost: Amount, mark_price: Amount, initial_rate: Amount, maintenance_rate: Amount
) -> Exposure[Amount]:
    """The exposure of one position, or of one symbol's column of positions."""
    value = notional(quantity=quantity, mark_price=mark_price)
    return Exposure(
        notional=value,
        unrealised_pnl=unrealised_pnl(quantity=quantity, cost=cost, mark_price=mark_price),
        used_margin=margin_requirement(notional=value, rate=initial_rate),
        maintenance_margin=margin_requirement(notional=value, rate=maintenance_rate),
    )


NO_EXPOSURE: Exposure[Decimal] = Exposure(
    notional=Decimal(0), unrealised_pnl=Decimal(0), used_margin=Decimal(0), maintenance_margin=Decimal(0)
)


def total_exposure(exposures: Iterable[Exposure[Decimal]]) -> Exposure[Decimal]:
    """The sum of an account's exposures; none is ``NO_EXPOSURE``."""
    remaining = iter(exposures)
    return sum(remaining, start=next(remaining, NO_EXPOSURE))


@dataclass(frozen=True, slots=True)
class AccountMargin(Generic[Amount]):
    """An account's margin: its cash and its exposure, and what follows from the two.

    ``equity`` is ``balance + sum of unrealised pnl``, summed at once: whoever makes a margin of decimals does so in the
    exact context, and whoever asks need not.
    """

    balance: Amount
    exposure: Exposure[Amount]
    equity: Amount = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "equity", self.balance + self.exposure.unrealised_pnl)

    @property
    def used_margin(self) -> Amount:
        """The initial margin that the open positions require."""
        return self.exposure.used_margin

    @property
    def maintenance_margin(self) -> Amount:
        """The margin below which the account is a candidate."""
        return self.exposure.maintenance_margin

    @property
    def free_margin(self) -> Amount:
        """``equity - used margin``: what may be withdrawn or opened against."""
        return self.equity - self.exposure.used_margin


@overload
def is_candidate(*, notional: Decimal, equity: Decimal, maintenance_margin: Decimal) -> bool: ...
@overload
def is_candidate(*, notional: Column, equity: Column, maintenance_margin: Column) -> Flags: ...
def is_candidate(*, notional: Any, equity: Any, maintenance_margin: Any) -> Any:
    """The one predicate of a liquidation candidate: an open position, and equity strictly below maintenance.

    Marks are above zero, so notional is zero only for a flat account.
    """
    return (notional > 0) & (equity < maintenance_margin)


@overload
def is_restored(*, notional: Decimal, equity: Decimal, restore_margin: Decimal) -> bool: ...
@overload
def is_restored(*, notional: Column, equity: Column, restore_margin: Column) -> Flags: ...
def is_restored(*, notional: Any, equity: Any, restore_margin: Any) -> Any:
    """Whether a breach ends: flat, or equity at or above ``restore_margin`` (the used margin, unless configured)."""
    return (notional == 0) | (equity >= restore_margin)


def divide_half_even(dividend: Decimal, divisor: Decimal, *, places: int = 8) -> Decimal:
    """``dividend / divisor``, rounded once, half-even, to ``places`` decimals.

    The quotient that is rounded ends in a digit that says whether more would follow (``ROUND_05UP`` is made for that),
    so the rounding sees on which side of a half the true value lies. Raises ``ZeroDivisionError``.
    """
    if not divisor:
        raise ZeroDivisionError(f"{dividend} / {divisor}")
    quotient = _DIVISION.divide(dividend, divisor)
    return quotient.quantize(_ONE.scaleb(-places), ROUND_HALF_EVEN, _DIVISION)


def average_price(*, quantity: Decimal, cost: Decimal) -> Decimal:
    """The price at which what is open was bought or sold, rounded half-even at 1e-8; ``cost`` is the record."""
    return divide_half_even(cost, quantity)


def margin_ratio(*, equity: Decimal, notional: Decimal, margin: Decimal) -> Decimal | None:
    """``margin / equity``, rounded half-even at 1e-8; None when equity is not above 0, and 0 when flat.

    With the maintenance margin it is the margin ratio, above 1 for a candidate; with the used margin it is the
    margin utilisation.
    """
    if not notional:
        return Decimal(0)
    return divide_half_even(margin, equity) if equity > 0 else None


def liquidation_price(
    *, quantity: Decimal, cost: Decimal, maintenance_rate: Decimal, balance: Decimal, other: Exposure[Decimal]
) -> Decimal | None:
    """The mark of one symbol at which equity equals maintenance, all other marks held, rounded half-even at 1e-8.

    It solves ``balance + other pnl + quantity x m - cost = other maintenance + rate x |quantity| x m`` for ``m``;
    ``other`` is the exposure of the account's other positions. None when no mark above zero does.
    """
    dividend = cost + other.maintenance_margin - balance - other.unrealised_pnl
    divisor = quantity - maintenance_rate * abs(quantity)
    return divide_half_even(dividend, divisor) if dividend * divisor > 0 else None
