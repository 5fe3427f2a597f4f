"""Plimsoll's rules as plain Decimal arithmetic, one account at a time, to be read as a specification.

Nothing here comes from ``app``: were a formula wrong there, this would not repeat it. It is slow and keeps everything
in dictionaries. Money and prices are in USDT, quantities in coins (positive long, negative short); every intermediate
is exact, and the one rounding is the one the design names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Context, Decimal, DivisionByZero, Inexact, InvalidOperation, localcontext
from fractions import Fraction
from typing import Any

ZERO = Decimal(0)
EXACT = Context(prec=60, traps=[Inexact, InvalidOperation, DivisionByZero])


class Rules:
    """The rates of BTC-PERP and every comparison and rounding. A test overrides one to see the comparison go red."""

    tick_size = Decimal("0.01")
    lot_size = Decimal("0.000001")
    initial_rate = Decimal("0.20")
    maintenance_rate = Decimal("0.10")
    price_band = Decimal("0.10")
    position_limit = Decimal(1_000)
    amount_limit = Decimal(40_000_000_000)
    mark_jump_max = Decimal("0.5")

    def is_candidate(self, *, equity: Decimal, maintenance_margin: Decimal) -> bool:
        """Below maintenance, strictly; asked only of an account with an open position."""
        return equity < maintenance_margin

    def is_restored(self, *, equity: Decimal, used_margin: Decimal) -> bool:
        """A breach ends at the initial margin, not at maintenance."""
        return equity >= used_margin

    def carries(self, *, free_margin: Decimal) -> bool:
        """Whether a trade that opens leaves enough: nothing free is enough."""
        return free_margin >= 0

    def improves(self, *, free_margin_before: Decimal, free_margin_after: Decimal) -> bool:
        """Whether a trade that only reduces may pass although the account does not carry the rest."""
        return free_margin_after >= free_margin_before

    def is_in_band(self, *, price: Decimal, mark: Decimal) -> bool:
        """The edges of the band belong to it."""
        return abs(price - mark) <= self.price_band * mark

    def may_withdraw(self, *, amount: Decimal, balance: Decimal, free_margin: Decimal) -> bool:
        """Unrealised profit is not cash, and cash that carries a position is not free."""
        return amount <= min(balance, free_margin)

    def is_jump(self, *, price: Decimal, last: Decimal) -> bool:
        """A mark further than half the last mark away from it."""
        return abs(price - last) > self.mark_jump_max * last

    def counted_result(self, *, open_result: Decimal) -> Decimal:
        """Of the immediate result of what a trade opens, only a loss counts towards its margin."""
        return min(open_result, ZERO)

    def cost_of_part(self, *, cost: Decimal, closed: Decimal, size: Decimal) -> Decimal:
        """The cost that leaves with the closed part: rounded once, half-even, at 1e-8."""
        return round_half_even(Fraction(cost) * Fraction(closed) / Fraction(size))


def round_half_even(value: Fraction) -> Decimal:
    """``value`` at 8 decimals. ``round`` of a ``Fraction`` is exact, and half-even."""
    return Decimal(round(value * 10**8)).scaleb(-8)


@dataclass
class Position:
    """``cost`` is the sum of signed quantity x price of what is still open."""

    quantity: Decimal
    cost: Decimal


@dataclass
class Margin:
    """An account's margin at the current marks."""

    balance: Decimal
    equity: Decimal
    used_margin: Decimal
    maintenance_margin: Decimal
    is_flat: bool

    @property
    def free_margin(self) -> Decimal:
        """What is not needed for the positions."""
        return self.equity - self.used_margin


@dataclass
class Breach:
    """One breach, or the end of one: the evidence of the sweep or commit that found it."""

    account_id: str
    seq: int
    mark_version: int
    marks: dict[str, Decimal]
    positions: dict[str, dict[str, Decimal]]
    balance: Decimal
    equity: Decimal
    used_margin: Decimal
    maintenance_margin: Decimal
    recovered: bool = False


@dataclass
class Operation:
    """An operation that was booked: what was asked, and the answer it got."""

    content: tuple[Any, ...]
    answer: dict[str, Any]


@dataclass
class Account:
    """All that an account is."""

    account_id: str
    balance: Decimal = ZERO
    positions: dict[str, Position] = field(default_factory=dict)
    breach: Breach | None = None
    seq: int = 0
    operations: dict[tuple[str, str], Operation] = field(default_factory=dict)


@dataclass
class Expected:
    """The answer a request must get: status, code of a refusal, and every figure."""

    status: int
    figures: dict[str, Any] = field(default_factory=dict)
    code: str | None = None


@dataclass
class Fill:
    """A trade taken apart: what it closes and what it opens."""

    closed: Decimal
    opened: Decimal
    realised_pnl: Decimal
    open_result: Decimal
    position: Position


class Oracle:
    """A whole Plimsoll: accounts, marks, history. Every method answers as the route of its name must."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.accounts: dict[str, Account] = {}
        self.marks: dict[str, Decimal] = {}
        self.mark_version = 0
        self.trades: list[dict[str, Any]] = []
        self.transfers: list[dict[str, Any]] = []
        self.breaches: list[Breach] = []
        self.recoveries: list[Breach] = []
        self.kinds: Counter[str] = Counter()

    # Marks and the sweep that follows each.

    def mark(self, *, symbol: str, price: Decimal, confirm: bool = False) -> Expected:
        """POST /mark-price, and the sweep at the mark it makes."""
        with localcontext(EXACT):
            last = self.marks.get(symbol)
            is_open = any(symbol in account.positions for account in self.accounts.values())
            if last is not None and is_open and self.rules.is_jump(price=price, last=last) and not confirm:
                return Expected(409, code="mark_price_jump")
            self.marks[symbol] = price
            self.mark_version += 1
            self.sweep()
            return Expected(200, {"symbol": symbol, "price": price, "version": self.mark_version})

    def sweep(self) -> None:
        """Open a breach for each candidate that is in none, and end those of the accounts that are restored."""
        for account in self.accounts.values():
            if not account.positions:
                continue
            margin = self.margin(account)
            if account.breach is None and self.is_candidate(margin):
                account.breach = self.evidence(account, margin)
                self.breaches.append(account.breach)
            else:
                self.end_breach_if_restored(account, margin)

    def end_breach_if_restored(self, account: Account, margin: Margin) -> None:
        """What a sweep does, and the commit of a trade or a transfer by itself."""
        if account.breach is None:
            return
        if margin.is_flat or self.rules.is_restored(equity=margin.equity, used_margin=margin.used_margin):
            account.breach.recovered = True
            account.breach = None
            self.recoveries.append(self.evidence(account, margin))

    def evidence(self, account: Account, margin: Margin) -> Breach:
        """The row that lets anyone repeat the verdict; every row of an account counts its ``seq`` on by one."""
        account.seq += 1
        return Breach(
            account_id=account.account_id,
            seq=account.seq,
            mark_version=self.mark_version,
            marks={symbol: self.marks[symbol] for symbol in account.positions},
            positions={
                symbol: {"quantity": position.quantity, "cost": position.cost}
                for symbol, position in account.positions.items()
            },
            balance=margin.balance,
            equity=margin.equity,
            used_margin=margin.used_margin,
            maintenance_margin=margin.maintenance_margin,
        )

    # Margin.

    def margin(self, account: Account) -> Margin:
        """The account's margin at the current marks."""
        return self.margin_of(account.balance, account.positions)

    def margin_of(self, balance: Decimal, positions: dict[str, Position]) -> Margin:
        """``equity = balance + sum of (quantity x mark - cost)``; the margins are rates of ``|quantity| x mark``."""
        equity, notional = balance, ZERO
        for symbol, position in positions.items():
            equity += position.quantity * self.marks[symbol] - position.cost
            notional += abs(position.quantity) * self.marks[symbol]
        return Margin(
            balance=balance,
            equity=equity,
            used_margin=self.rules.initial_rate * notional,
            maintenance_margin=self.rules.maintenance_rate * notional,
            is_flat=not positions,
        )

    def is_candidate(self, margin: Margin) -> bool:
        """An open position, and equity below maintenance."""
        return not margin.is_flat and self.rules.is_candidate(
            equity=margin.equity, maintenance_margin=margin.maintenance_margin
        )

    # Trades.

    def trade(
        self, *, account_id: str, symbol: str, side: str, quantity: Decimal, price: Decimal, client_trade_id: str
    ) -> Expected:
        """POST /trade."""
        with localcontext(EXACT):
            account = self.accounts.get(account_id)
            if account is None:
                return Expected(404, code="unknown_account")
            content = (symbol, side, quantity, price)
            repeated = self.repeated(account, ("trade", client_trade_id), content)
            if repeated is not None:
                return repeated
            fill = self.fill(account, symbol=symbol, direction=1 if side == "buy" else -1, size=quantity, price=price)
            refusal = self.refusal(account, symbol, price, fill)
            if refusal is not None:
                return refusal
            kind = self.kind(account.positions.get(symbol), fill)
            seq = self.book(account, symbol, fill)
            margin = self.margin(account)
            figures = {
                "client_trade_id": client_trade_id,
                "account_id": account_id,
                "symbol": symbol,
                "side": side,
                "quantity": quantity,
                "price": price,
                "mark_price": self.marks[symbol],
                "realised_pnl": fill.realised_pnl,
                "position": {"quantity": fill.position.quantity, "avg_price": average_price(fill.position)},
                **figures_after(margin),
            }
            account.operations["trade", client_trade_id] = Operation(content, figures)
            self.trades.append(
                {
                    **{name: figures[name] for name in ("client_trade_id", "account_id", "symbol", "side", "quantity")},
                    **{name: figures[name] for name in ("price", "mark_price", "realised_pnl")},
                    "seq": seq,
                    "mark_version": self.mark_version,
                    "balance_after": margin.balance,
                    "quantity_after": fill.position.quantity,
                    "cost_after": fill.position.cost,
                }
            )
            self.kinds[kind] += 1
            return Expected(201, figures)

    def fill(self, account: Account, *, symbol: str, direction: int, size: Decimal, price: Decimal) -> Fill:
        """Close what lies against the trade, then open with the rest: a flip is a close and an open."""
        held = account.positions.get(symbol, Position(ZERO, ZERO))
        against = held.quantity * direction < 0
        closed = min(size, abs(held.quantity)) if against else ZERO
        opened = size - closed
        if closed == abs(held.quantity):
            removed_cost = held.cost if against else ZERO
        else:
            removed_cost = self.rules.cost_of_part(cost=held.cost, closed=closed, size=abs(held.quantity))
        return Fill(
            closed=closed,
            opened=opened,
            realised_pnl=-direction * closed * price - removed_cost,
            open_result=direction * opened * (self.marks.get(symbol, ZERO) - price),
            position=Position(held.quantity + direction * size, held.cost - removed_cost + direction * opened * price),
        )

    def refusal(self, account: Account, symbol: str, price: Decimal, fill: Fill) -> Expected | None:
        """The refusal with the first code that applies, or None if the trade is accepted."""
        mark = self.marks.get(symbol)
        if mark is None:
            return Expected(409, code="no_mark_price")
        if not self.rules.is_in_band(price=price, mark=mark):
            return Expected(409, code="price_out_of_band")
        if fill.opened and abs(fill.position.quantity) > self.rules.position_limit:
            return Expected(409, code="position_limit")
        if max(abs(account.balance + fill.realised_pnl), abs(fill.position.cost)) > self.rules.amount_limit:
            return Expected(409, code="amount_limit")
        before = self.margin(account)
        positions = {**account.positions, symbol: fill.position}
        if not fill.position.quantity:
            del positions[symbol]
        after = self.margin_of(account.balance + fill.realised_pnl, positions)
        available = after.equity - fill.open_result + self.rules.counted_result(open_result=fill.open_result)
        if self.rules.carries(free_margin=available - after.used_margin):
            return None
        if not fill.opened and self.rules.improves(
            free_margin_before=before.free_margin, free_margin_after=after.free_margin
        ):
            return None
        code = "below_maintenance_margin" if self.is_candidate(before) else "insufficient_initial_margin"
        return Expected(409, {"required": after.used_margin, "available": available}, code=code)

    def book(self, account: Account, symbol: str, fill: Fill) -> int:
        """Make the trade part of the account, and end its breach if that restores it; answers the trade's seq."""
        account.seq += 1
        seq = account.seq
        account.balance += fill.realised_pnl
        account.positions[symbol] = fill.position
        if not fill.position.quantity:
            del account.positions[symbol]
        self.end_breach_if_restored(account, self.margin(account))
        return seq

    @staticmethod
    def kind(held: Position | None, fill: Fill) -> str:
        """What the trade did, for the coverage: ``open long``, ``reduce short``, and ``flip long`` out of a long."""
        if held is None:
            return f"open {'long' if fill.position.quantity > 0 else 'short'}"
        if not fill.closed:
            verb = "increase"
        elif fill.opened:
            verb = "flip"
        else:
            verb = "reduce" if fill.position.quantity else "close"
        return f"{verb} {'long' if held.quantity > 0 else 'short'}"

    # Transfers.

    def transfer(self, *, account_id: str, kind: str, amount: Decimal, client_transfer_id: str) -> Expected:
        """POST /accounts/{account_id}/deposit (a ``deposit``) and /withdraw (a ``withdrawal``).

        The first deposit makes the account.
        """
        with localcontext(EXACT):
            account = self.accounts.get(account_id)
            if account is None:
                if kind == "withdrawal":
                    return Expected(404, code="unknown_account")
                account = Account(account_id)
            repeated = self.repeated(account, (kind, client_transfer_id), (amount,))
            if repeated is not None:
                return repeated
            before = self.margin(account)
            signed = amount if kind == "deposit" else -amount
            if abs(account.balance + signed) > self.rules.amount_limit:
                return Expected(409, code="amount_limit")
            if kind == "withdrawal" and not self.rules.may_withdraw(
                amount=amount, balance=account.balance, free_margin=before.free_margin
            ):
                available = max(ZERO, min(account.balance, before.free_margin))
                return Expected(409, {"required": amount, "available": available}, code="insufficient_free_margin")
            self.accounts[account_id] = account
            account.balance += signed
            account.seq += 1
            seq = account.seq
            margin = self.margin(account)
            self.end_breach_if_restored(account, margin)
            figures: dict[str, Any] = {
                "client_transfer_id": client_transfer_id,
                "account_id": account_id,
                "kind": kind,
                "amount": amount,
                **figures_after(margin),
            }
            account.operations[kind, client_transfer_id] = Operation((amount,), figures)
            self.transfers.append(
                {
                    **{name: figures[name] for name in ("client_transfer_id", "account_id", "kind", "amount")},
                    "seq": seq,
                    "mark_version": self.mark_version,
                    "balance_after": margin.balance,
                }
            )
            return Expected(201, figures)

    def repeated(self, account: Account, operation: tuple[str, str], content: tuple[Any, ...]) -> Expected | None:
        """The answer to an operation id that is known, before any rule is asked; None for a new one."""
        known = account.operations.get(operation)
        if known is None:
            return None
        if known.content == content:
            return Expected(200, known.answer)
        return Expected(409, code="idempotency_conflict")

    # Reports.

    def state(self, account: Account, margin: Margin) -> str:
        """The word for it."""
        if self.is_candidate(margin):
            return "candidate"
        if account.breach is not None:
            return "recovering"
        return "negative_equity" if margin.is_flat and margin.balance < 0 else "ok"

    def positions(self, account_id: str) -> Expected:
        """GET /positions/{account_id}."""
        with localcontext(EXACT):
            account = self.accounts.get(account_id)
            if account is None:
                return Expected(404, code="unknown_account")
            margin = self.margin(account)
            figures: dict[str, Any] = {
                "account_id": account_id,
                "state": self.state(account, margin),
                "candidate": self.is_candidate(margin),
                "open_breach": None if account.breach is None else {"restored_at_equity": margin.used_margin},
                **figures_after(margin),
                "maintenance_margin": margin.maintenance_margin,
                "margin_utilisation": ratio(margin.used_margin, margin),
                "margin_ratio": ratio(margin.maintenance_margin, margin),
                "positions": [
                    {
                        "symbol": symbol,
                        "quantity": position.quantity,
                        "avg_price": average_price(position),
                        "mark_price": self.marks[symbol],
                        "notional": abs(position.quantity) * self.marks[symbol],
                        "unrealised_pnl": position.quantity * self.marks[symbol] - position.cost,
                        "liquidation_price": self.liquidation_price(account, symbol),
                    }
                    for symbol, position in sorted(account.positions.items())
                ],
            }
            return Expected(200, figures)

    def liquidation_price(self, account: Account, symbol: str) -> Decimal | None:
        """The mark of ``symbol`` at which equity equals maintenance, the other marks held; None if not above 0."""
        balance, maintenance = account.balance, ZERO
        for other, position in account.positions.items():
            if other != symbol:
                balance += position.quantity * self.marks[other] - position.cost
                maintenance += self.rules.maintenance_rate * abs(position.quantity) * self.marks[other]
        held = account.positions[symbol]
        slope = Fraction(held.quantity) - Fraction(self.rules.maintenance_rate) * abs(Fraction(held.quantity))
        price = (Fraction(maintenance) - Fraction(balance) + Fraction(held.cost)) / slope
        return round_half_even(price) if price > 0 else None

    def totals(self, account_ids: Iterable[str] | None = None) -> dict[str, Any]:
        """The totals of GET /margin-report."""
        with localcontext(EXACT):
            chosen = [self.accounts[account_id] for account_id in account_ids or self.accounts]
            margins = [(account, self.margin(account)) for account in chosen]
            states = [self.state(account, margin) for account, margin in margins]
            sizes = [
                position.quantity * self.marks[symbol]
                for account in chosen
                for symbol, position in account.positions.items()
            ]
            return {
                "equity": sum((margin.equity for _, margin in margins), ZERO),
                "used_margin": sum((margin.used_margin for _, margin in margins), ZERO),
                "maintenance_margin": sum((margin.maintenance_margin for _, margin in margins), ZERO),
                "long_notional": sum((size for size in sizes if size > 0), ZERO),
                "short_notional": -sum((size for size in sizes if size < 0), ZERO),
                "shortfall": sum(
                    (margin.maintenance_margin - margin.equity for _, margin in margins if self.is_candidate(margin)),
                    ZERO,
                ),
                "accounts": {state: states.count(state) for state in set(states)},
            }


def figures_after(margin: Margin) -> dict[str, Any]:
    """What every answer says about the account."""
    return {
        "balance": margin.balance,
        "equity": margin.equity,
        "used_margin": margin.used_margin,
        "free_margin": margin.free_margin,
    }


def average_price(position: Position) -> Decimal | None:
    """``cost / quantity``, for display; a flat position has none."""
    if not position.quantity:
        return None
    return round_half_even(Fraction(position.cost) / Fraction(position.quantity))


def ratio(part: Decimal, margin: Margin) -> Decimal | None:
    """``part / equity``, for display: 0 when flat, None when equity is not above 0."""
    if margin.is_flat:
        return ZERO
    return round_half_even(Fraction(part) / Fraction(margin.equity)) if margin.equity > 0 else None
