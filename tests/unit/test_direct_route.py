"""Which endpoints are called without FastAPI's solver, and that whoever calls them cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Path, Request, Response
from starlette.types import Message

from app import main
from app.direct_route import DirectRoute
from app.json_body import ExactJSONRoute
from app.schemas import TransferRequest

Name = Annotated[str, Path(pattern="^[a-z]+$")]


async def with_all_three(name: Name, transfer: TransferRequest, request: Request) -> Response:
    return Response(f"{name} {transfer.amount} {request.method}")


async def with_nothing() -> Response:
    return Response("nothing")


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


async def answer(application: FastAPI, path: str, *received: Message) -> tuple[int, bytes]:
    """The status and body that the application sends to a POST that arrives as ``received``."""
    messages, sent = iter(received), []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await application(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def body(text: bytes) -> Message:
    return {"type": "http.request", "body": text, "more_body": False}


@pytest.mark.parametrize("endpoint", [with_all_three, with_nothing])
def test_an_endpoint_that_asks_for_path_body_and_request_is_direct(endpoint: Callable[..., Any]) -> None:
    assert DirectRoute("/{name}", endpoint, methods=["POST"])._is_direct()


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
    assert not DirectRoute("/x", endpoint, methods=["POST"])._is_direct()


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
