"""Request and response models: the shapes of DESIGN section 5, with examples that work."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from app.json_body import NumberText
from app.numbers import parse_decimal

IDENTIFIER_PATTERN = r"^[A-Za-z0-9_.\-]{1,64}$"
REASON_PATTERN = r"^[^\x00-\x1f\x7f]{1,200}$"


def _exact_decimal(value: object) -> Decimal:
    if not isinstance(value, str):
        raise ValueError("send a number, or a string of digits")  # noqa: TRY004  # pydantic reports a ValueError
    return parse_decimal(value)


def _identifier(value: object) -> object:
    """An integer becomes its digits; any other JSON number is no identifier."""
    if isinstance(value, NumberText):
        if not value.isdigit():
            raise ValueError("an identifier that is a number must be a whole one, not below 0")
        return str(value)
    return value


def _text(value: object) -> object:
    if isinstance(value, NumberText):
        raise ValueError("send a string")  # noqa: TRY004  # pydantic reports a ValueError
    return value


def _side(value: object) -> object:
    value = _text(value)
    return value.lower() if isinstance(value, str) else value


ExactDecimal = Annotated[
    Decimal,
    BeforeValidator(_exact_decimal),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$", "maxLength": 40},
                {"type": "number", "exclusiveMinimum": 0},
            ]
        }
    ),
]
AccountId = Annotated[
    str,
    BeforeValidator(_identifier),
    StringConstraints(pattern=IDENTIFIER_PATTERN),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": IDENTIFIER_PATTERN},
                {"type": "integer", "minimum": 0, "maximum": 9_007_199_254_740_991},
            ]
        }
    ),
]
OperationId = Annotated[
    str,
    BeforeValidator(_text),
    StringConstraints(pattern=IDENTIFIER_PATTERN),
    WithJsonSchema({"type": "string", "pattern": IDENTIFIER_PATTERN}),
]
Symbol = OperationId
Side = Annotated[
    Literal["buy", "sell"],
    BeforeValidator(_side),
    WithJsonSchema({"type": "string", "enum": ["buy", "sell", "BUY", "SELL"]}),
]
DecimalText = Annotated[str, Field(examples=["60000.1"])]


class RequestModel(BaseModel):
    """What a client sends: nothing unknown, nothing converted in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TradeRequest(RequestModel):
    """A trade to book."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "account_id": "alice",
                "symbol": "BTC-PERP",
                "side": "buy",
                "quantity": "0.5",
                "price": "60000",
                "client_trade_id": "first-trade",
            }
        }
    )

    account_id: AccountId
    symbol: Symbol
    side: Side
    quantity: ExactDecimal
    price: ExactDecimal
    client_trade_id: OperationId | None = None


class MarkRequest(RequestModel):
    """A mark price to accept; ``confirm`` lets one pass that is far from the last."""

    model_config = ConfigDict(json_schema_extra={"example": {"symbol": "BTC-PERP", "price": "60000", "confirm": True}})

    symbol: Symbol
    price: ExactDecimal
    confirm: bool = False


class TransferRequest(RequestModel):
    """An amount of USDT to deposit or withdraw."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"amount": "10000", "client_transfer_id": "first-transfer"}}
    )

    amount: ExactDecimal
    client_transfer_id: OperationId | None = None


class HaltRequest(RequestModel):
    """Why trading is halted or resumed, for the record."""

    model_config = ConfigDict(json_schema_extra={"example": {"reason": "the feed of marks is being checked"}})

    reason: Annotated[
        str,
        BeforeValidator(_text),
        StringConstraints(pattern=REASON_PATTERN),
        WithJsonSchema({"type": "string", "pattern": REASON_PATTERN}),
    ]


class PositionShown(BaseModel):
    """The position that a trade left; ``avg_price`` is null when flat."""

    quantity: DecimalText
    avg_price: DecimalText | None


class TradeAnswer(BaseModel):
    """A booked trade. ``recorded`` says whether its row is in Postgres already; it is in Redis and will be."""

    trade_id: int
    client_trade_id: str
    account_id: str
    timestamp: str
    symbol: str
    side: Literal["buy", "sell"]
    quantity: DecimalText
    price: DecimalText
    mark_price: DecimalText
    realised_pnl: DecimalText
    position: PositionShown
    balance: DecimalText
    equity: DecimalText
    used_margin: DecimalText
    free_margin: DecimalText
    recorded: bool


class TransferAnswer(BaseModel):
    """A booked transfer; equity and margins are null while an open position has no mark."""

    transfer_id: int
    client_transfer_id: str
    account_id: str
    timestamp: str
    kind: Literal["deposit", "withdrawal"]
    amount: DecimalText
    balance: DecimalText
    equity: DecimalText | None
    used_margin: DecimalText | None
    free_margin: DecimalText | None
    recorded: bool


class MarkAnswer(BaseModel):
    """An accepted mark; ``version`` counts every accepted mark of every symbol."""

    symbol: str
    price: DecimalText
    timestamp: str
    version: int


class HaltAnswer(BaseModel):
    """Whether trading is halted, since when and why; ``recorded`` says whether Postgres has what is said here.

    All but ``halted`` is null where nothing is known of it, as of a halt that was set by hand.
    """

    halted: bool
    id: str | None
    since: str | None
    reason: str | None
    recorded: bool


class OpenBreachShown(BaseModel):
    """The breach an account is in; it ends when equity reaches ``restored_at_equity``."""

    id: int
    since: str
    restored_at_equity: DecimalText | None


class PositionReport(BaseModel):
    """One open position, valued at the mark."""

    symbol: str
    quantity: DecimalText
    avg_price: DecimalText
    mark_price: DecimalText | None
    notional: DecimalText | None
    unrealised_pnl: DecimalText | None
    liquidation_price: DecimalText | None


AccountState = Literal["ok", "candidate", "recovering", "negative_equity", "quarantined"]


class AccountSummary(BaseModel):
    """An account's margin. A ratio is null when equity is not above 0 and something is open."""

    account_id: str
    state: AccountState
    candidate: bool
    balance: DecimalText | None
    equity: DecimalText | None
    used_margin: DecimalText | None
    maintenance_margin: DecimalText | None
    free_margin: DecimalText | None
    margin_utilisation: DecimalText | None
    margin_ratio: DecimalText | None


class AccountReport(AccountSummary):
    """An account with its positions."""

    open_breach: OpenBreachShown | None = None
    positions: list[PositionReport]


class ReportAccount(AccountSummary):
    """An account in the margin report."""

    open_breach_id: int | None


class ReportTotals(BaseModel):
    """Sums over every account, exact."""

    equity: DecimalText
    used_margin: DecimalText
    maintenance_margin: DecimalText
    long_notional: DecimalText
    short_notional: DecimalText
    shortfall: DecimalText
    accounts: dict[str, int]


class MarginReport(BaseModel):
    """The margin of every account at the marks named: candidates first and whole, then all accounts."""

    marks: dict[str, DecimalText]
    mark_version: int
    mark_age_seconds: dict[str, float]
    swept_version: int
    swept_age_seconds: float | None
    warning: str | None
    halted: bool
    totals: ReportTotals
    liquidation_candidates: list[ReportAccount]
    accounts: list[ReportAccount]
    next_cursor: str | None


class HistoryPage(BaseModel):
    """Rows of history, newest first; ``next_cursor`` leads to older ones and is null at the end."""

    items: list[dict[str, Any]]
    next_cursor: str | None


class Readiness(BaseModel):
    """Whether the process can do its work, the mark version, the version swept, and what is missing."""

    status: Literal["ready", "not ready"]
    mark_version: int | None
    swept_version: int | None
    missing: list[str]


class Problem(BaseModel):
    """RFC 9457 problem details, with a stable ``code`` and, where something can be done, ``next``: what to send."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    next: dict[str, Any] | None = None


def problem_answer(description: str) -> dict[str, Any]:
    """A problem document among the answers of a route; ``app.main`` puts the schema it refers to into the document."""
    return {
        "description": description,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
