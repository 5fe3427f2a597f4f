"""Routes that are served without FastAPI's general machinery, where they ask for nothing that needs it.

``DirectRoute`` leaves out what FastAPI does within a route, ``DirectWay`` what it does on the way to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import iscoroutinefunction
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Response, params
from fastapi.exceptions import RequestValidationError
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
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
        self.is_direct = self._asks_for_nothing_else()
        if self.is_direct:
            self.app = self._direct_app()

    def _asks_for_nothing_else(self) -> bool:
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


class DirectWay:
    """``application``, with a short way to its direct routes.

    A request for one of them passes the application's own middleware and its table of errors, as any request does, and
    is in its route then. FastAPI's telemetry, its stack of things to close, its router and its dispatcher are left out:
    they would find nothing to do, and stay alive for as long as the request waits (ADR 031).
    """

    def __init__(self, application: FastAPI) -> None:
        self.application = application
        direct = [route for route in application.routes if isinstance(route, DirectRoute) and route.is_direct]
        self._exact = {
            (method, route.path): {"route": route, "endpoint": route.endpoint}
            for route in direct
            if not route.param_convertors
            for method in route.methods or ()
        }
        self._with_parameters = [route for route in direct if route.param_convertors]
        handlers = dict(application.exception_handlers)
        unexpected = handlers.pop(Exception, None)
        self._stack: ASGIApp = ExceptionMiddleware(_answer, handlers=handlers)
        for middleware, arguments, options in reversed(application.user_middleware):
            self._stack = middleware(self._stack, *arguments, **options)
        self._stack = ServerErrorMiddleware(self._stack, handler=unexpected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the application's lifespan."""
        found = self._find(scope) if scope["type"] == "http" and not scope.get("root_path") else None
        if found is None:
            await self.application(scope, receive, send)
            return
        scope.update(found, app=self.application)
        await self._stack(scope, receive, send)

    def _find(self, scope: Scope) -> Mapping[str, Any] | None:
        """What FastAPI's router would put into ``scope`` for a direct route; None for any other."""
        exact = self._exact.get((scope["method"], scope["path"]))
        if exact is not None:
            return {**exact, "path_params": {}}
        for route in self._with_parameters:
            match, found = route.matches(scope)
            if match is Match.FULL:
                return found
        return None


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    await scope["route"].app(scope, receive, send)
