"""Routes that are served without FastAPI's general machinery, where they ask for nothing that needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from app.json_body import ExactJSONRequest, ExactJSONRoute

_NO_BODY: Final = [{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}]


class DirectRoute(ExactJSONRoute):
    """Calls an endpoint that asks for its path, one body and the request at once, validated by the same fields.

    FastAPI compiles and documents every route as ever. Its solver of dependencies, parameters, cookies and forms and
    the stacks that close them are left out where there is none of these: half of what FastAPI takes for a trade, kept
    alive for as long as the trade waits for the stores (ADR 024). An endpoint that is called so answers a response.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401 - FastAPI's
        super().__init__(path, endpoint, **options)
        if self._is_direct():
            self.app = self._direct_app()

    def _is_direct(self) -> bool:
        """Whether the endpoint asks for nothing but its path, one body that is an object, and the request."""
        asked = self.dependant
        others = (
            *(asked.dependencies, asked.query_params, asked.header_params, asked.cookie_params),
            *(asked.response_param_name, asked.background_tasks_param_name, asked.security_scopes_param_name),
        )
        return not any(others) and not self._embed_body_fields and len(asked.body_params) <= 1

    def _direct_app(self) -> ASGIApp:
        """The application that sends what the endpoint answers; what is raised is for the middleware.

        It is one function, because each that waits for the stores is kept alive meanwhile.
        """
        call, check, body_field = self.dependant.call, self.request_check(), self.body_field
        path_fields = [(field.name, field.alias, field) for field in self.dependant.path_params]
        request_name = self.dependant.request_param_name
        assert call is not None

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = ExactJSONRequest(scope, receive, send)
            await self.admit(request)
            check(request)
            values: dict[str, Any] = {}
            faults: list[dict[str, Any]] = []
            for name, alias, field in path_fields:
                values[name], found = field.validate(scope["path_params"][alias], values, loc=("path", alias))
                faults += found
            if body_field is not None:
                if not await request.body():
                    raise RequestValidationError(_NO_BODY)
                values[body_field.name], found = body_field.validate(await request.json(), values, loc=("body",))
                faults += found
            if faults:
                raise RequestValidationError(faults)
            if request_name is not None:
                values[request_name] = request
            response: Response = await call(**values)
            await response(scope, receive, send)

        return answer
