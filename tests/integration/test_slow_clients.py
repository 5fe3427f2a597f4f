"""Clients that keep a server waiting are shown the door, at both servers, while everybody else is served."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import httpx
import pytest

from tests.harness import Process, System

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOUND_SECONDS: Final = 10.0
ROOM_SECONDS: Final = 5.0
"""For a busy machine to notice what is over."""

PIECE_SECONDS: Final = 0.5
POST: Final = b"POST /mark-price HTTP/1.1\r\nHost: plimsoll\r\nContent-Type: application/json\r\n"
LIVE: Final = b"GET /health/live HTTP/1.1\r\nHost: plimsoll\r\n\r\n"
LAST: Final = b"GET /health/live HTTP/1.1\r\nHost: plimsoll\r\nConnection: close\r\n\r\n"
UNREAD: Final = b"POST /nothing HTTP/1.1\r\nHost: plimsoll\r\nContent-Length: 60000\r\n\r\n"

Pieces = Callable[[], AsyncIterator[bytes]]


def at_once(*pieces: bytes) -> Pieces:
    """Sends these, and nothing more."""

    async def send() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return send


def drop_by_drop(first: bytes, piece: bytes) -> Pieces:
    """Sends ``first``, and then ``piece`` after ``piece``, never long apart."""

    async def send() -> AsyncIterator[bytes]:
        yield first
        while True:
            await asyncio.sleep(PIECE_SECONDS)
            yield piece

    return send


# What a client sends, and the last status it is answered with before the connection is closed; None for no answer.
OF_ANY_SERVER: Final[dict[str, tuple[Pieces, int | None]]] = {
    "nothing": (at_once(), None),
    "empty lines": (drop_by_drop(b"", b"\r\n"), None),
    "half a method": (at_once(b"GE"), 408),
    "half a head": (at_once(b"GET /health/live HTTP/1.1\r\nHost: plims"), 408),
    "a head without an end": (drop_by_drop(b"GET /health/live HTTP/1.1\r\n", b"a: b\r\n"), 408),
    "a request, and then nothing": (at_once(LIVE), 200),
    "a request, and then empty lines": (drop_by_drop(LIVE, b"\r\n"), 200),
    "a request, and half of another": (drop_by_drop(LIVE + b"GET /", b"x"), 408),
    "a body that nobody wants": (drop_by_drop(UNREAD, b"x"), 404),
}
OF_THE_API: Final[dict[str, tuple[Pieces, int | None]]] = {
    "a body that does not come": (at_once(POST + b"Content-Length: 50\r\n\r\n"), 408),
    "a body in drops": (drop_by_drop(POST + b"Content-Length: 50000\r\n\r\n", b" "), 408),
    "chunks in drops": (drop_by_drop(POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), 408),
    "chunks without an end": (at_once(POST + b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\n{}\r\n"), 408),
}
BYTE: Final = b"x" * 65_536
NOT_HTTP: Final[dict[str, tuple[Pieces, int]]] = {
    "no HTTP": (at_once(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"), 400),
    "two lengths": (at_once(POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12"), 400),
    "a length that is no number": (at_once(POST + b"Content-Length: many\r\n\r\n12"), 400),
    "a length beyond all numbers": (at_once(POST + b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n12"), 400),
    "a chunk of no size": (at_once(POST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n"), 400),
    "a huge name of a path": (at_once(b"GET /", *(BYTE for _ in range(64))), 431),
    "a huge header": (at_once(b"GET / HTTP/1.1\r\na: ", *(BYTE for _ in range(64))), 431),
    "headers without end": (at_once(b"GET / HTTP/1.1\r\n", *(b"a: b\r\n" * 8_000 for _ in range(64))), 431),
}


async def closed_after(process: Process, pieces: Pieces) -> tuple[float, bytes]:
    """The seconds until the server closed the connection, and all that it said."""
    url = httpx.URL(process.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    started = time.monotonic()

    async def send() -> None:
        async for piece in pieces():
            writer.write(piece)
            await writer.drain()

    sending = asyncio.create_task(send())
    said = b""
    try:
        async with asyncio.timeout(BOUND_SECONDS + ROOM_SECONDS):
            while piece := await reader.read(65_536):
                said += piece
    except ConnectionError:  # closed while we were sending
        pass
    finally:
        taken_seconds = time.monotonic() - started
        sending.cancel()
        await asyncio.wait([sending])
        writer.close()
    return taken_seconds, said


def statuses(said: bytes) -> list[int]:
    """The status of each answer."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


def check_problem(said: bytes) -> None:
    """What a server says of its own accord is a problem document as well."""
    head, _, body = said.rpartition(b"\r\n\r\n")
    assert b"application/problem+json" in head.lower(), said
    assert json.loads(body)["status"] == statuses(said)[-1]


@asynccontextmanager
async def served_meanwhile(processes: list[Process]) -> AsyncIterator[None]:
    """Others are served all the time: each on a connection that is kept, and on a new one."""
    over = asyncio.Event()

    async def keep_asking(process: Process) -> int:
        async with httpx.AsyncClient(base_url=process.url, timeout=BOUND_SECONDS, trust_env=False) as client:
            for asked in itertools.count(1):
                assert (await client.get("/health/live")).status_code == 200
                async with httpx.AsyncClient(base_url=process.url, timeout=BOUND_SECONDS, trust_env=False) as another:
                    assert (await another.get("/health/live")).status_code == 200
                if over.is_set():
                    return asked
                await asyncio.sleep(0.05)
        raise AssertionError("unreachable")

    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(keep_asking(process)) for process in processes]
        yield
        over.set()
    assert all(task.result() > 10 for task in asking)


async def test_a_client_that_keeps_a_server_waiting_is_shown_the_door_and_others_are_served(
    shared_system: System,
) -> None:
    api, watchdog = shared_system.apis[0], shared_system.watchdogs[0]
    cases = [
        *((api, what, pieces, status) for what, (pieces, status) in {**OF_ANY_SERVER, **OF_THE_API}.items()),
        *((watchdog, what, pieces, status) for what, (pieces, status) in OF_ANY_SERVER.items()),
    ]
    async with served_meanwhile([api, watchdog]):
        results = await asyncio.gather(*(closed_after(process, pieces) for process, _, pieces, _ in cases))
    for (process, what, _, status), (taken_seconds, said) in zip(cases, results, strict=True):
        assert taken_seconds < BOUND_SECONDS + ROOM_SECONDS, (process.name, what)
        assert [*statuses(said), None][-1 if status is None else -2] == status, (process.name, what, said)
        if status == 408:
            check_problem(said)


@pytest.mark.parametrize("what", NOT_HTTP)
async def test_what_is_no_http_or_far_too_long_is_refused_at_once(shared_system: System, what: str) -> None:
    pieces, status = NOT_HTTP[what]
    for process in (shared_system.apis[0], shared_system.watchdogs[0]):
        taken_seconds, said = await closed_after(process, pieces)
        # Who does not stop sending may find the connection gone before the answer.
        assert statuses(said) == [status] or (status == 431 and not said), (process.name, said)
        if said:
            check_problem(said)
        assert taken_seconds < BOUND_SECONDS
        assert (await shared_system.client.get(f"{process.url}/health/live")).status_code == 200


async def test_a_body_of_300_megabytes_is_refused_while_it_is_sent(shared_system: System) -> None:
    api = shared_system.apis[0]
    for head in (b"Content-Length: 300000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n400000\r\n"):
        _, said = await closed_after(api, at_once(POST + head, *(BYTE for _ in range(64))))
        # Who does not stop sending may find the connection gone before the answer.
        assert statuses(said) == [413] or not said
        if said:
            check_problem(said)


async def test_two_requests_in_one_piece_are_both_answered(shared_system: System) -> None:
    for process in (shared_system.apis[0], shared_system.watchdogs[0]):
        _, said = await closed_after(process, at_once(LIVE + LAST))
        assert statuses(said) == [200, 200]


@pytest.mark.parametrize("path", ["/", "/nothing", "/metrics/", "/metrics?a=%ff%00", "/%ff%00", "/" + "a" * 60_000])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH", "PROPFIND"])
async def test_nothing_that_is_asked_of_the_watchdog_is_its_mistake(
    shared_system: System, method: str, path: str
) -> None:
    url = f"{shared_system.watchdogs[0].url}{path}"
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.request(method, url, headers={"X": "x" * 5_000}, content=b"\xff" * 5_000)
    assert answer.status_code < 500, answer.text
    assert len(answer.content) < 500 or answer.status_code == 200
    assert "a" * 128 not in answer.text + str(answer.headers)
