"""The document at ``/openapi.json``, as exact as the rules: which symbols there are, which numbers they take."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final

from app import schemas
from app.contracts import AMOUNT_LIMIT, Contract
from app.numbers import SMALLEST_UNIT
from app.security import SECURITY_SCHEMES

RETRY_AFTER: Final = {"Retry-After": {"description": "Seconds", "required": True, "schema": {"type": "integer"}}}
WWW_AUTHENTICATE: Final = {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}}
HEADERS: Final = {"401": WWW_AUTHENTICATE, "429": RETRY_AFTER}


def complete(document: dict[str, Any], contracts: Iterable[Contract]) -> dict[str, Any]:
    """``document`` as FastAPI made it, with what only the settings and the error table know."""
    contracts = list(contracts)
    components = document["components"]
    components["securitySchemes"] = SECURITY_SCHEMES
    components["schemas"]["Problem"] = schemas.Problem.model_json_schema()
    price_max = max(contract.price_max for contract in contracts)
    quantity_max = 2 * max(contract.position_limit for contract in contracts)
    numbers = {
        ("TradeRequest", "price"): (min(contract.tick_size for contract in contracts), price_max),
        ("TradeRequest", "quantity"): (min(contract.lot_size for contract in contracts), quantity_max),
        ("MarkRequest", "price"): (SMALLEST_UNIT, price_max),
        ("TransferRequest", "amount"): (SMALLEST_UNIT, AMOUNT_LIMIT),
    }
    for (model, member), (step, maximum) in numbers.items():
        components["schemas"][model]["properties"][member].update(number_schema(step=step, maximum=maximum))
    for model in ("TradeRequest", "MarkRequest"):
        components["schemas"][model]["properties"]["symbol"]["enum"] = [contract.symbol for contract in contracts]
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status in HEADERS:
                    response["headers"] = HEADERS[status]
    return document


def number_schema(*, step: Decimal, maximum: Decimal) -> dict[str, Any]:
    """A number above 0, on the grid of ``step``, as a string or as a JSON number; in as many digits as ``maximum``."""
    decimals, digits = -int(step.normalize().as_tuple().exponent), len(f"{maximum:.0f}") - 1
    one_or_more = rf"[1-9][0-9]{{0,{digits - 1}}}(\.[0-9]{{1,{decimals}}})?"
    less_than_one = rf"0\.[0-9]{{0,{decimals - 1}}}[1-9]"
    return {
        "anyOf": [
            {"type": "string", "pattern": f"^({one_or_more}|{less_than_one})$"},
            {"type": "number", "minimum": float(step), "maximum": float(maximum), "multipleOf": float(step)},
        ]
    }
