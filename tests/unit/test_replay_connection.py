"""The replay's own HTTP connections, against a server that misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from app.replay.connection import HttpConnections

Answer = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[HttpConnections, list[bytes]]]:
    """A server that gives each request's head to ``answer`` with its number; and the heads it has seen."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                heads.append(head + await reader.readexactly(length))
                await answer(writer, len(heads))
        except asyncio.IncompleteReadError:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    connections = HttpConnections(f"http://127.0.0.1:{port}/base/")
    try:
        yield connections, heads
    finally:
        connections.close()
        listening.close()


async def whole(writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: %d\r\n\r\nok" % number)


async def test_a_request_carries_method_path_and_json_and_the_response_its_status_headers_and_body() -> None:
    async with server(whole) as (connections, heads):
        response = await connections.request("POST", "/trade?limit=1", {"price": "60000.1"})
    assert (response.status, response.headers["retry-after"], response.content) == (200, "1", b"ok")
    assert heads[0].startswith(b"POST /base/trade?limit=1 HTTP/1.1\r\n")
    assert heads[0].endswith(b'\r\n\r\n{"price":"60000.1"}')


async def test_a_response_in_chunks_and_pieces_is_put_together() -> None:
    async def in_chunks(writer: asyncio.StreamWriter, number: int) -> None:
        for piece in (
            b"HTTP/1.1 201 Created\r\nTransfer-",
            b"Encoding: chunked\r\n\r\n3\r\nabc\r",
            b"\n2\r\nde\r\n0\r\n\r\n",
        ):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)

    async with server(in_chunks) as (connections, _):
        response = await connections.request("GET", "/")
        again = await connections.request("GET", "/")
    assert (response.status, response.content, again.content) == (201, b"abcde", b"abcde")


async def test_a_connection_that_the_server_closed_while_idle_is_replaced() -> None:
    async def then_close(writer: asyncio.StreamWriter, number: int) -> None:
        await whole(writer, number)
        writer.close()

    async with server(then_close) as (connections, heads):
        for _ in range(3):
            assert (await connections.request("GET", "/")).content == b"ok"
            await asyncio.sleep(0.01)
    assert len(heads) == 3


async def test_no_answer_and_no_http_are_errors_of_the_connection() -> None:
    async def misbehave(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            writer.write(b"220 smtp.example.com\r\n\r\n")
        elif number == 2:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
            writer.close()
        else:
            await whole(writer, number)

    async with server(misbehave) as (connections, _):
        for _ in range(2):
            with pytest.raises(OSError, match=r"not HTTP|closed the connection"):
                await connections.request("GET", "/")
        assert (await connections.request("GET", "/")).content == b"ok"


async def test_a_late_answer_is_a_timeout_and_is_never_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.replay.connection.REQUEST_TIMEOUT_SECONDS", 0.05)

    async def first_late(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            await asyncio.sleep(0.1)
        await whole(writer, number)

    async with server(first_late) as (connections, _):
        with pytest.raises(TimeoutError):
            await connections.request("GET", "/")
        assert (await connections.request("GET", "/")).headers["retry-after"] == "2"


async def test_more_requests_than_connections_wait_their_turn() -> None:
    async with server(whole) as (connections, heads):
        responses = await asyncio.gather(*(connections.request("GET", "/") for _ in range(50)))
    assert {response.status for response in responses} == {200}
    assert len(heads) == 50


async def test_what_is_no_url_says_so() -> None:
    with pytest.raises(ValueError, match="not the URL of an API: localhost:8000"):
        HttpConnections("localhost:8000")
