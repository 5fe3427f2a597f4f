"""Every refusal and fault a caller can meet: a named error, a stable code, and the HTTP status of that code."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar, Final

from app.numbers import format_decimal

RETRY_AFTER_SECONDS: Final = 1


def deposit_step(account_id: str, amount: Decimal) -> dict[str, Any]:
    """What to send next when an account lacks ``amount`` USDT."""
    return {
        "method": "POST",
        "path": f"/accounts/{account_id}/deposit",
        "body": {"amount": format_decimal(amount)},
    }


def mark_step(symbol: str, price: Decimal, *, confirm: bool = False) -> dict[str, Any]:
    """What to send next when a symbol lacks a usable mark."""
    body: dict[str, Any] = {"symbol": symbol, "price": format_decimal(price)}
    if confirm:
        body["confirm"] = True
    return {"method": "POST", "path": "/mark-price", "body": body}


def trade_step(*, account_id: str, symbol: str, side: str, quantity: Decimal, price: Decimal) -> dict[str, Any]:
    """What to send next when a trade would have been accepted in another size or at another price."""
    return {
        "method": "POST",
        "path": "/trade",
        "body": {
            "account_id": account_id,
            "symbol": symbol,
            "side": side,
            "quantity": format_decimal(quantity),
            "price": format_decimal(price),
        },
    }


class PlimsollError(Exception):
    """A named error with a stable ``code``; ``members`` are the further members of its problem document."""

    code: ClassVar[str]
    headers: ClassVar[Mapping[str, str]] = {}
    """What its answer says in the head."""

    def __init__(self, detail: str, **members: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = {name: _plain(value) for name, value in members.items() if value is not None}


def _plain(value: object) -> object:
    if isinstance(value, Decimal):
        return format_decimal(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value


class Refusal(PlimsollError):
    """A request that the rules of DESIGN section 4 refuse; it books nothing and consumes no operation id."""


class TradingHalted(Refusal):
    """Only reductions pass while trading is halted."""

    code = "trading_halted"


class NoMarkPrice(Refusal):
    """A symbol that has to be valued has no mark."""

    code = "no_mark_price"


class StaleMarkPrice(Refusal):
    """The mark is older than the limit; only reductions pass."""

    code = "stale_mark_price"


class PriceOutOfBand(Refusal):
    """The trade's price lies outside the band around the mark."""

    code = "price_out_of_band"


class PositionLimit(Refusal):
    """The position would exceed its contract's limit."""

    code = "position_limit"


class AmountLimit(Refusal):
    """The balance or the cost would exceed what is kept exactly."""

    code = "amount_limit"


class BelowMaintenanceMargin(Refusal):
    """The account is a candidate and the trade is no reduction that helps it."""

    code = "below_maintenance_margin"


class InsufficientInitialMargin(Refusal):
    """The account lacks the initial margin for what the trade opens."""

    code = "insufficient_initial_margin"


class InsufficientFreeMargin(Refusal):
    """A withdrawal beyond ``min(balance, free margin)``."""

    code = "insufficient_free_margin"


class IdempotencyConflict(Refusal):
    """The operation id was used before with other content."""

    code = "idempotency_conflict"


class MarkPriceJump(Refusal):
    """A mark too far from the last one while the symbol has open positions."""

    code = "mark_price_jump"


class UnknownAccount(PlimsollError):
    """No balance key: the account does not exist."""

    code = "unknown_account"


def unknown_account(account_id: str) -> UnknownAccount:
    """The one answer for an account that does not exist, and for one that is none of the caller's business."""
    return UnknownAccount(
        "there is no such account; a deposit makes it",
        account_id=account_id,
        next=deposit_step(account_id, Decimal(1000)),
    )


class KeyRequired(PlimsollError):
    """The route asks for an API key, and the request has none."""

    code = "key_required"
    headers: ClassVar = {"WWW-Authenticate": 'Bearer realm="plimsoll"'}


class KeyInvalid(PlimsollError):
    """What was sent is no API key, or one that is unknown or revoked; which, is not said."""

    code = "key_invalid"
    headers: ClassVar = {"WWW-Authenticate": 'Bearer realm="plimsoll", error="invalid_token"'}


class ScopeMissing(PlimsollError):
    """The key may not do this; ``scope`` names what it lacks."""

    code = "scope_missing"


class KeyBound(PlimsollError):
    """The route concerns every account, and the key is bound to some."""

    code = "key_bound"


class LoopbackOnly(PlimsollError):
    """Keys are off, so only this machine is served."""

    code = "loopback_only"


class RateLimited(PlimsollError):
    """More requests than a key may send to a route."""

    code = "rate_limited"
    headers: ClassVar = {"Retry-After": str(RETRY_AFTER_SECONDS)}


class InvalidField(PlimsollError):
    """A field whose value cannot be meant; ``field`` names it."""

    code = "invalid_field"

    def __init__(self, detail: str, *, field: str, **members: object) -> None:
        super().__init__(detail, field=field, **members)


class Unavailable(PlimsollError):
    """The service cannot answer now; ``reason`` says why. Retry with the same operation id."""

    code = "unavailable"

    def another(self) -> Unavailable:
        """The same for somebody else: what is added to one is not said to the other."""
        return type(self)(self.detail, **self.members)


class StateMissing(Unavailable):
    """Redis holds no epoch: it came up empty, or was never migrated."""

    code = "state_missing"


class StateFrozen(Unavailable):
    """The state is being rebuilt."""

    code = "state_frozen"


class StateUnreconciled(Unavailable):
    """Redis restarted, and nobody has compared it with history yet."""

    code = "state_unreconciled"


class StateAheadOfHistory(Unavailable):
    """Redis holds changes that Postgres does not: restoring from history would lose them."""

    code = "state_ahead_of_history"


class UnsafeRedis(Unavailable):
    """Redis is configured so that it would forget or evict state."""

    code = "unsafe_redis"


class StateDamaged(Unavailable):
    """A key that all accounts share is not what it should be; ``rebuild`` makes it anew."""

    code = "state_damaged"


class ColumnsShort(StateDamaged):
    """A column does not reach to the last account: it was lost, or cut, and is made anew from the ledgers."""


class StateMismatch(Unavailable):
    """Redis was written by a release or a set of contracts other than this process's."""

    code = "state_mismatch"


class OutboxFull(Unavailable):
    """History waits in Redis beyond its bound."""

    code = "outbox_full"


class OutcomeUnknown(Unavailable):
    """Redis did not answer in time; the operation id tells later whether it was booked."""

    code = "outcome_unknown"


class StoreUnavailable(Unavailable):
    """Redis or Postgres cannot be reached."""

    code = "store_unavailable"


class AccountQuarantined(Unavailable):
    """A key of the account cannot be read as what it should be."""

    code = "account_quarantined"


class Contended(Unavailable):
    """The account changed under every attempt to commit."""

    code = "contended"


HTTP_STATUS: Final[dict[str, tuple[int, str]]] = {
    TradingHalted.code: (409, "Trading is halted"),
    NoMarkPrice.code: (409, "No mark price"),
    StaleMarkPrice.code: (409, "The mark price is stale"),
    PriceOutOfBand.code: (409, "Price outside the band around the mark"),
    PositionLimit.code: (409, "Position limit exceeded"),
    AmountLimit.code: (409, "Amount limit exceeded"),
    BelowMaintenanceMargin.code: (409, "Below maintenance margin"),
    InsufficientInitialMargin.code: (409, "Insufficient initial margin"),
    InsufficientFreeMargin.code: (409, "Insufficient free margin"),
    IdempotencyConflict.code: (409, "Operation id used with other content"),
    MarkPriceJump.code: (409, "Mark price jump"),
    KeyRequired.code: (401, "An API key is required"),
    KeyInvalid.code: (401, "No valid API key"),
    ScopeMissing.code: (403, "The API key lacks the scope"),
    KeyBound.code: (403, "The API key is bound to accounts"),
    LoopbackOnly.code: (403, "Only this machine is served"),
    UnknownAccount.code: (404, "Unknown account"),
    RateLimited.code: (429, "Too many requests"),
    InvalidField.code: (422, "Invalid field"),
    Unavailable.code: (503, "Unavailable"),
    StateMissing.code: (503, "State missing"),
    StateFrozen.code: (503, "State frozen"),
    StateUnreconciled.code: (503, "State not reconciled"),
    StateAheadOfHistory.code: (503, "State ahead of history"),
    StateDamaged.code: (503, "State damaged"),
    UnsafeRedis.code: (503, "Redis is not safe"),
    StateMismatch.code: (503, "State of another release or contract set"),
    OutboxFull.code: (503, "Outbox full"),
    OutcomeUnknown.code: (503, "Outcome unknown"),
    StoreUnavailable.code: (503, "Store unavailable"),
    AccountQuarantined.code: (503, "Account quarantined"),
    Contended.code: (503, "Account contended"),
}
"""The one table from a code to its HTTP status and title."""


def problem(error: PlimsollError) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the RFC 9457 document of ``error``."""
    status, title = HTTP_STATUS[error.code]
    document: dict[str, Any] = {
        "type": f"urn:plimsoll:problem:{error.code}",
        "title": title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        **error.members,
    }
    return status, document
