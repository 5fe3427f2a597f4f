"""What every route is given and answers with: the services of the process, JSON, and the problems it may meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, cast

import orjson
from fastapi import Depends, Path, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from app import schemas
from app.booking import Booking
from app.config import Settings
from app.draining import Drain
from app.redis_client import StateStore
from app.security import Gate

PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: schemas.problem_answer(description)
    for status, description in {
        400: "The body is not JSON",
        404: "Unknown account",
        408: "The body did not arrive in time",
        409: "Refused by the rules; `code` says which",
        413: "The body is too large",
        415: "Not JSON by its content type",
        422: "A field cannot be meant; `field` names it",
        503: "Cannot answer now; retry with the same operation id",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes call, made once per process. Without a ``gate`` everybody may come in."""

    settings: Settings
    store: StateStore
    booking: Booking
    sessions: async_sessionmaker[AsyncSession]
    gate: Gate | None
    drain: Drain


def services(request: Request) -> Services:
    """The services of this process, from the lifespan."""
    return cast(Services, request.scope["state"]["services"])


async def _services(request: Request) -> Services:
    return services(request)


ServicesDependency = Annotated[Services, Depends(_services)]
"""``services`` for a route that may take its time: a dependency costs FastAPI as much as reading a small body."""
AccountPath = Annotated[str, Path(pattern=schemas.IDENTIFIER_PATTERN, examples=["alice"])]


def json_response(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``content`` as JSON; its decimals are strings already."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")
