"""Walk a replay's log through the oracle and collect every difference between what was answered and what must be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.oracle.rules import Breach, Expected, Oracle, Rules

NO_OUTCOME = {0, 503}
"""What the log says of an attempt that was not answered, or not decided; the same request follows."""

DIFFERENCES_MAX = 20
"""A walk stops here: after a first difference the two states run apart, and the rest says little."""


class Walk:
    """An oracle that is led along one or more logs, in the order in which they were played."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.oracle = Oracle(rules)
        self.differences: list[str] = []
        self.codes: Counter[str] = Counter()
        self.requests = 0
        self._sent_before: set[str] = set()

    def read(self, log: Path) -> None:
        """Recompute every answer in ``log``; stops early once there are differences enough."""
        with log.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(self.differences) >= DIFFERENCES_MAX:
                    return
                self._step(f"{log.name}:{number}", json.loads(line))

    def _step(self, where: str, entry: dict[str, Any]) -> None:
        self.requests += 1
        request = json.dumps([entry["method"], entry["path"], entry["body"]])
        if entry["status"] in NO_OUTCOME:
            self._sent_before.add(request)
            return
        expected = self.expect(entry["method"], entry["path"], entry["body"] or {})
        answer = entry["answer"]
        if request in self._sent_before and (expected.status, entry["status"]) == (201, 200):
            expected.status = 200  # The attempt without an answer was booked, and this one repeats it.
        self.codes[answer.get("code", "")] += 1
        found = difference(
            {"status": expected.status, "code": expected.code, **expected.figures},
            {**answer, "status": entry["status"], "code": answer.get("code")},
        )
        if found:
            self.differences.append(f"{where} {entry['method']} {entry['path']} {entry['body']}: {found}")

    def expect(self, method: str, path: str, body: Mapping[str, Any]) -> Expected:
        """What the oracle says to a request."""
        match (method, *path.strip("/").split("/")):
            case ("POST", "mark-price"):
                return self.oracle.mark(
                    symbol=body["symbol"], price=Decimal(body["price"]), confirm=body.get("confirm", False)
                )
            case ("POST", "trade"):
                return self.oracle.trade(
                    account_id=body["account_id"],
                    symbol=body["symbol"],
                    side=body["side"],
                    quantity=Decimal(body["quantity"]),
                    price=Decimal(body["price"]),
                    client_trade_id=body["client_trade_id"],
                )
            case ("POST", "accounts", account_id, "deposit" | "withdraw" as verb):
                return self.oracle.transfer(
                    account_id=account_id,
                    kind="deposit" if verb == "deposit" else "withdrawal",
                    amount=Decimal(body["amount"]),
                    client_transfer_id=body["client_transfer_id"],
                )
            case ("GET", "positions", account_id):
                return self.oracle.positions(account_id)
        raise ValueError(f"the oracle has no route {method} {path}")


def difference(expected: object, actual: object, *, name: str = "") -> str | None:
    """The first place where ``actual`` is not what is expected; None if it is.

    A member that nobody expected is not looked at, and one that is not there is null. Decimals are compared as the text
    that the design asks for: plain, no exponent, no minus zero, no trailing zeros.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        found = (difference(item, actual.get(key), name=f"{name}.{key}") for key, item in expected.items())
        return next(filter(None, found), None)
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        found = (difference(*pair, name=f"{name}[{at}]") for at, pair in enumerate(zip(expected, actual, strict=True)))
        return next(filter(None, found), None)
    if isinstance(expected, Decimal):
        expected = plain(expected)
    return None if expected == actual else f"{name.lstrip('.')} is {actual!r} and must be {expected!r}"


def plain(number: Decimal) -> str:
    """``number`` as text: plain notation, no minus zero, no trailing zeros."""
    text = format(number + 0, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def compare_rows(expected: Iterable[Mapping[str, Any]], items: Iterable[Mapping[str, Any]]) -> list[str]:
    """What differs between the rows there must be and those a history route lists, matched by account and seq."""
    rows = {(row["account_id"], row["seq"]): row for row in expected}
    listed = {(item["account_id"], item["seq"]): item for item in items}
    differences = [f"{key} is listed and must not be" for key in sorted(listed.keys() - rows.keys())]
    differences += [f"{key} is missing" for key in sorted(rows.keys() - listed.keys())]
    for key in sorted(rows.keys() & listed.keys()):
        found = difference(rows[key], listed[key])
        if found:
            differences.append(f"{key}: {found}")
    return differences


def breach_rows(breaches: Iterable[Breach]) -> list[dict[str, Any]]:
    """Breaches, or recoveries, as the rows that must be listed."""
    return [
        {field.name: getattr(breach, field.name) for field in fields(Breach) if field.name != "recovered"}
        for breach in breaches
    ]
