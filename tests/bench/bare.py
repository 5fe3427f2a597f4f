"""The limit: the same bodies, validation and answers as the product's, and nothing behind them.

``python -m tests.bench.bare bare`` serves it as ``plimsoll api`` serves the product: the same command with another
application put in, so that server, loop, parser and options are the product's, whatever they are. The application is
the product's too, with its middleware and error table, but its routes: those check the same models and answer, through
the same response class, a real answer of the product with what was sent put into it. What the product computes is a
constant here, so nothing could answer faster and still say the same.

``plain`` in place of ``bare`` is an endpoint as FastAPI's tutorial writes one. A bare one that is slower than that
would be no limit: then the plain one is. ``direct`` is the bare one on the product's own way around FastAPI's
router and solver: beside it everything counts that the product does for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count
from types import SimpleNamespace
from typing import Any, Final, Literal

import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field

from app import main, schemas
from app.cli import app as plimsoll
from app.collector import spare_the_collector
from app.config import get_settings
from app.direct_route import DirectRoute, DirectWay
from app.json_body import ExactJSONRoute
from app.logging import configure_logging
from app.routes.context import AccountPath, json_response

ANSWERS_VARIABLE: Final = "BENCH_ANSWERS"
"""JSON: the product's answer to a trade and to GET /positions, to be given again."""


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """What the product's lifespan does for the process as a whole, and no clients of anything.

    Of the product's services there are the settings alone, which its middleware asks for.
    """
    settings = get_settings()
    configure_logging(settings.log_level, process="api")
    spare_the_collector()
    yield {"services": SimpleNamespace(settings=settings)}


def create_bare(route_class: type[ExactJSONRoute] = ExactJSONRoute) -> FastAPI:
    """The product's application without the product, on FastAPI's own way through a route."""
    answers = orjson.loads(os.environ[ANSWERS_VARIABLE])
    trade_answer, positions_answer = answers["trade"], answers["positions"]
    numbers = count(trade_answer["trade_id"])
    application = main.create_app()
    application.router.routes.clear()
    application.router.lifespan_context = _lifespan
    application.router.route_class = route_class

    @application.post("/trade", status_code=201)
    async def post_trade(trade: schemas.TradeRequest) -> Response:
        return json_response(
            {
                **trade_answer,
                "trade_id": next(numbers),
                "client_trade_id": trade.client_trade_id,
                "account_id": trade.account_id,
                "side": trade.side,
                "quantity": str(trade.quantity),
                "price": str(trade.price),
            },
            201,
        )

    @application.get("/positions/{account_id}")
    async def get_positions(account_id: AccountPath) -> Response:
        return json_response({**positions_answer, "account_id": account_id})

    @application.get("/health/ready")
    async def get_ready() -> Response:
        return json_response({"status": "ready"})

    return application


def create_direct() -> DirectWay:
    """The same on the product's way to a route and through it."""
    return DirectWay(create_bare(DirectRoute))


class PlainTrade(BaseModel):
    """A trade as a tutorial would declare it, as strict as FastAPI is by itself."""

    model_config = ConfigDict(extra="forbid")

    account_id: str = Field(pattern=schemas.IDENTIFIER_PATTERN)
    symbol: str = Field(pattern=schemas.IDENTIFIER_PATTERN)
    side: Literal["buy", "sell"]
    quantity: Decimal
    price: Decimal
    client_trade_id: str | None = Field(default=None, pattern=schemas.IDENTIFIER_PATTERN)


def create_plain() -> FastAPI:
    """The same two routes on nothing but FastAPI, in a process like the bare one's."""
    answers = orjson.loads(os.environ[ANSWERS_VARIABLE])
    trade_answer, positions_answer = answers["trade"], answers["positions"]
    numbers = count(trade_answer["trade_id"])
    application = FastAPI(lifespan=_lifespan)

    @application.post("/trade", status_code=201, response_model=None)
    async def post_trade(trade: PlainTrade) -> dict[str, Any]:
        return {
            **trade_answer,
            "trade_id": next(numbers),
            "client_trade_id": trade.client_trade_id,
            "account_id": trade.account_id,
            "side": trade.side,
            "quantity": str(trade.quantity),
            "price": str(trade.price),
        }

    @application.get("/positions/{account_id}", response_model=None)
    async def get_positions(account_id: str) -> dict[str, Any]:
        return {**positions_answer, "account_id": account_id}

    @application.get("/health/ready", response_model=None)
    async def get_ready() -> dict[str, str]:
        return {"status": "ready"}

    return application


def serve_in_place(factory: str) -> None:
    """Run ``plimsoll api`` with the application of ``factory`` in place of the product's."""
    serve = uvicorn.run

    def serve_another(_application: str, **options: Any) -> None:  # noqa: ANN401 - whatever the product gives its server
        serve(factory, factory=True, **options)

    uvicorn.run = serve_another  # type: ignore[assignment]
    plimsoll(["api"])


if __name__ == "__main__":
    serve_in_place(f"tests.bench.bare:create_{sys.argv[1]}")
