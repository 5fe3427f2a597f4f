"""Which endpoints are called without FastAPI's solver, and that whoever calls them cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Path, Request, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Scope

from app import errors, main
from app.direct_route import DirectRoute, DirectWay
from app.json_body import ExactJSONRoute
from app.schemas import TransferRequest

Name = Annotated[str, Path(pattern="^[a-z]+$")]


async def with_all_three(name: Name, transfer: TransferRequest, request: Request) -> Response:
    return Response(f"{name} {transfer.amount} {request.method}")


async def with_nothing() -> Response:
    return Response("nothing")


async def with_a_refusal() -> Response:
    raise errors.OutboxFull("not now", reason="outbox_full")


async def with_a_mistake() -> Response:
    raise ZeroDivisionError


async def with_a_dependency(name: Annotated[str, Depends(lambda: "x")]) -> Response:
    return Response(name)


async def with_a_query(limit: int) -> Response:
    return Response(str(limit))


async def with_a_header(agent: Annotated[str, Header()]) -> Response:
    return Response(agent)


async def with_background_tasks(tasks: BackgroundTasks) -> Response:
    return Response(str(tasks))


async def with_a_body_that_may_be_missing(transfer: TransferRequest | None = None) -> Response:
    return Response(str(transfer))


async def with_an_answer_to_encode() -> dict[str, str]:
    return {"answer": "encode me"}


def with_a_thread() -> Response:
    return Response("thread")


def served(endpoint: Callable[..., Any], path: str = "/x", route_class: type[ExactJSONRoute] = DirectRoute) -> FastAPI:
    """The product's table of errors around one endpoint."""
    application = main.create_app()
    application.router.routes.clear()
    router = APIRouter(route_class=route_class)
    router.add_api_route(path, endpoint, methods=["POST"])
    application.router.routes += router.routes
    return application


def post(path: str, root_path: str = "") -> Scope:
    """The scope of a POST that brings JSON and an id of its own."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": root_path,
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"mine")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }


async def sent_by(application: ASGIApp, scope: Scope, *received: Message) -> list[Message]:
    """All that the application sends to a request that arrives as ``received``; what it raises, it may."""
    messages, sent = iter(received), []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    with suppress(ZeroDivisionError):
        await application(scope, receive, send)
    return sent


async def answer(application: ASGIApp, path: str, *received: Message) -> tuple[int, bytes]:
    """The status and body that the application sends to a POST that arrives as ``received``."""
    start, *rest = await sent_by(application, post(path), *received)
    return start["status"], b"".join(message.get("body", b"") for message in rest)


def body(text: bytes) -> Message:
    return {"type": "http.request", "body": text, "more_body": False}


@pytest.mark.parametrize("endpoint", [with_all_three, with_nothing])
def test_an_endpoint_that_asks_for_path_body_and_request_is_direct(endpoint: Callable[..., Any]) -> None:
    assert DirectRoute("/{name}", endpoint, methods=["POST"]).is_direct


@pytest.mark.parametrize(
    "endpoint",
    [
        with_a_dependency,
        with_a_query,
        with_a_header,
        with_background_tasks,
        with_a_body_that_may_be_missing,
        with_an_answer_to_encode,
        with_a_thread,
    ],
)
def test_an_endpoint_that_asks_for_more_is_not_direct(endpoint: Callable[..., Any]) -> None:
    assert not DirectRoute("/x", endpoint, methods=["POST"]).is_direct


async def test_an_endpoint_gets_what_it_asks_for() -> None:
    application = served(with_all_three, "/{name}")
    assert await answer(application, "/alice", body(b'{"amount": "1.5"}')) == (200, b"alice 1.5 POST")


@pytest.mark.parametrize(
    ("path", "received"),
    [
        ("/alice", body(b"")),
        ("/ALICE", body(b"")),
        ("/ALICE", body(b'{"amount": "x", "more": 1}')),
        ("/alice", body(b"[]")),
        ("/alice", body(b"null")),
        ("/alice", body(b"{")),
        ("/alice", body(b'{"amount": "1", "amount": "2"}')),
        ("/alice", {"type": "http.disconnect"}),
    ],
)
async def test_a_refusal_is_what_fastapi_would_have_made_of_it(path: str, received: Message) -> None:
    direct = await answer(served(with_all_three, "/{name}"), path, received)
    by_fastapi = await answer(served(with_all_three, "/{name}", ExactJSONRoute), path, received)
    assert direct[0] == by_fastapi[0] in {400, 422}
    if received["type"] == "http.request":
        assert direct == by_fastapi


def test_the_direct_way_leads_to_what_the_router_would_have_found() -> None:
    application = main.create_app()
    way, direct = DirectWay(application), []
    paths = [getattr(route, "path", "").replace("{account_id}", "alice") for route in application.routes]
    for path in [*paths, "/", "/nowhere", "/trade/", "/positions/", "/positions/a/b"]:
        for method in ("GET", "POST", "HEAD", "DELETE"):
            scope = {**post(path), "method": method}
            routes = [(route, *route.matches(scope)) for route in application.routes]
            route, found = next(((route, found) for route, match, found in routes if match is Match.FULL), (None, {}))
            is_direct = isinstance(route, DirectRoute) and route.is_direct
            assert way._find(scope) == (found if is_direct else None)
            direct += [path] if is_direct else []
    assert {"/trade", "/mark-price", "/positions/alice", "/accounts/alice/deposit"} <= set(direct)


@pytest.mark.parametrize(
    ("endpoint", "path", "received", "status"),
    [
        (with_nothing, "/x", body(b""), 200),
        (with_all_three, "/alice", body(b'{"amount": "1.5"}'), 200),
        (with_all_three, "/alice", body(b'{"amount": "x"}'), 422),
        (with_all_three, "/alice", body(b"{" * 70_000), 413),
        (with_a_refusal, "/x", body(b""), 503),
        (with_a_mistake, "/x", body(b""), 500),
    ],
)
async def test_whoever_goes_the_direct_way_cannot_tell(
    endpoint: Callable[..., Any], path: str, received: Message, status: int
) -> None:
    application = served(endpoint, "/{name}" if endpoint is with_all_three else "/x")
    way = DirectWay(application)
    assert way._find(post(path)) is not None
    direct, general = await sent_by(way, post(path), received), await sent_by(application, post(path), received)
    assert direct == general
    assert direct[0]["status"] == status
    assert (b"x-request-id", b"mine") in direct[0]["headers"]


async def test_a_mistake_is_the_servers_to_log_as_well() -> None:
    async def receive() -> Message:
        return body(b"")

    async def send(message: Message) -> None:
        pass

    with pytest.raises(ZeroDivisionError):
        await DirectWay(served(with_a_mistake))(post("/x"), receive, send)


async def test_behind_a_prefix_requests_go_the_general_way() -> None:
    way = DirectWay(served(with_nothing))
    start, content = await sent_by(way, post("/prefix/x", root_path="/prefix"), body(b""))
    assert (start["status"], content["body"]) == (200, b"nothing")
