"""Routes that are served without FastAPI's general machinery, where they ask for nothing that needs it."""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import Any, Final

from fastapi import HTTPException, Response, params
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.json_body import ExactJSONRequest, ExactJSONRoute

_NO_BODY: Final = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}


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
        """Whether the endpoint asks for its path, one body in JSON and the request at most, and answers a response."""
        asked, body = self.dependant, self.body_field
        others = (
            *(asked.dependencies, asked.query_params, asked.header_params, asked.cookie_params),
            *(asked.response_param_name, asked.background_tasks_param_name, asked.security_scopes_param_name),
            *(asked.http_connection_param_name, asked.websocket_param_name, self.response_field),
        )
        whole_body = body is None or (
            len(asked.body_params) == 1
            and not self._embed_body_fields
            and body.field_info.is_required()
            and not isinstance(body.field_info, params.Form)
        )
        return iscoroutinefunction(asked.call) and whole_body and not any(others)

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
                try:
                    sent = await request.body()
                except ClientDisconnect as error:
                    raise HTTPException(400, "the client left before its body was here") from error
                if sent:
                    values[body_field.name], found = body_field.validate(await request.json(), values, loc=("body",))
                    faults += found
                else:
                    faults.append(_NO_BODY)
            if faults:
                raise RequestValidationError(faults)
            if request_name is not None:
                values[request_name] = request
            response: Response = await call(**values)
            await response(scope, receive, send)

        return answer
