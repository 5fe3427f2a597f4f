"""Requests, read strictly: a number keeps its own digits, and what is ambiguous or not understood is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute

from app import errors
from app.problems import echoed

JSON_TYPE: Final = "application/json"


class NumberText(str):
    """A JSON number as the text it was sent as; no binary float has seen it. Python's reader takes ``NaN`` for one."""

    __slots__ = ()


class ExactJSONRequest(Request):
    """A request whose JSON numbers arrive as ``NumberText``."""

    async def json(self) -> Any:  # noqa: ANN401  # what the client sent
        """The body, parsed. Raises ``HTTPException``: 400 for text that is not JSON, 422 for an unclear one."""
        if not hasattr(self, "_json"):
            try:
                text = (await self.body()).decode("utf-8")
                self._json = json.loads(
                    text,
                    parse_float=NumberText,
                    parse_int=NumberText,
                    parse_constant=NumberText,
                    object_pairs_hook=_object_without_duplicates,
                )
            except RecursionError as error:
                raise HTTPException(400, "the body is nested too deeply") from error
            except DoubledMemberError as error:
                raise HTTPException(422, str(error)) from error
            except ValueError as error:
                raise HTTPException(400, f"the body is not JSON in UTF-8: {error}"[:160]) from error
        return self._json


class ExactJSONRoute(APIRoute):
    """A route that reads its body with ``ExactJSONRequest``, takes JSON only, and no query that it does not know."""

    async def admit(self, request: Request) -> None:
        """Let a request in before anything of it is looked at, or raise what its answer is: here everybody may."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the checks of the caller, of the query and of the content type."""
        handle, check = super().get_route_handler(), self.request_check()

        async def handle_exactly(request: Request) -> Response:
            await self.admit(request)
            check(request)
            return await handle(ExactJSONRequest(request.scope, request.receive))

        return handle_exactly

    def request_check(self) -> Callable[[Request], None]:
        """What raises ``InvalidField`` for a query, and ``HTTPException`` 415 for a content type, not taken here."""
        fields = get_flat_params(self.dependant)
        parameters = sorted(field.alias for field in fields if isinstance(field.field_info, Query))

        def check(request: Request) -> None:
            if request.scope["query_string"]:
                _check_query(request.query_params.multi_items(), parameters)
            if request.scope["method"] == "POST":
                content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if content_type != JSON_TYPE:
                    raise HTTPException(415, f"send the body as {JSON_TYPE}")

        return check


class DoubledMemberError(ValueError):
    """An object that says two things of one member."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise DoubledMemberError(f"an object names a member twice: {echoed(_doubled(name for name, _ in pairs))}")
    return members


def _doubled(names: Iterable[str]) -> str:
    """The name that more than one of ``names`` is."""
    return Counter(names).most_common(1)[0][0]


def _check_query(pairs: list[tuple[str, str]], parameters: list[str]) -> None:
    """Raise ``InvalidField`` for a filter that would be passed over in silence: an unknown one, or one given twice."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name not in parameters:
            raise errors.InvalidField("there is no such parameter", field=echoed(name), allowed=parameters)
        if name in seen:
            raise errors.InvalidField(f"{name} is given twice", field=name)
        seen.add(name)
