"""The oracle where a client has its connections: a Plimsoll without processes, for tests of what talks to one."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import orjson

from app.replay.client import ApiClient
from app.replay.connection import HttpResponse
from tests.oracle.rules import Breach, Oracle
from tests.oracle.walk import Walk, breach_rows, plain


class ModelApi:
    """Answers as the REST API does. Every mark is swept before it is answered.

    ``requests`` are those received, ``outages`` how many of the next ones get no answer, and ``before`` is called
    with each one, to interfere.
    """

    def __init__(self) -> None:
        self._walk = Walk()
        self.requests: list[tuple[str, str, Any]] = []
        self.outages = 0
        self.before: Callable[[str, str], None] = lambda _method, _path: None

    @property
    def oracle(self) -> Oracle:
        return self._walk.oracle

    def client(self) -> ApiClient:
        return ApiClient(self)

    def close(self) -> None:
        pass

    def posted(self, path: str) -> list[Any]:
        return [body for method, sent_to, body in self.requests if (method, sent_to) == ("POST", path)]

    async def request(self, method: str, target: str, body: object = None) -> HttpResponse:
        if self.outages:
            self.outages -= 1
            raise ConnectionRefusedError
        path = target.partition("?")[0]
        self.requests.append((method, path, body))
        self.before(method, path)
        status, answer = self._answer(method, path, body if isinstance(body, dict) else {})
        return HttpResponse(status, {}, orjson.dumps(answer))

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        version = self.oracle.mark_version
        match path:
            case "/health/ready":
                return 200, {"mark_version": version, "swept_version": version}
            case "/liquidations":
                return 200, _page(self.oracle.breaches)
            case "/recoveries":
                return 200, _page(self.oracle.recoveries)
            case "/margin-report":
                accounts = [{"account_id": account_id} for account_id in self.oracle.accounts]
                marks = _shown(self.oracle.marks)
                return 200, {"marks": marks, "accounts": accounts, "next_cursor": None}
        expected = self._walk.expect(method, path, body)
        answer = {**_shown(expected.figures), **({"code": expected.code} if expected.code else {})}
        if expected.code == "mark_price_jump":
            answer["next"] = {"method": "POST", "path": path, "body": {**body, "confirm": True}}
        elif expected.code in {"insufficient_initial_margin", "below_maintenance_margin"}:
            missing = expected.figures["required"] - expected.figures["available"]
            amount = plain(missing.quantize(Decimal("0.00000001"), rounding="ROUND_CEILING"))
            to = f"/accounts/{body['account_id']}/deposit"
            answer["next"] = {"method": "POST", "path": to, "body": {"amount": amount}}
        return expected.status, answer


def _page(breaches: list[Breach]) -> dict[str, Any]:
    return {"items": _shown(breach_rows(reversed(breaches))), "next_cursor": None}


def _shown(value: object) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, dict):
        return {name: _shown(item) for name, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list) else value
