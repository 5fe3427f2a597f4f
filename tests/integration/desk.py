"""What a client does through REST all day, a line each, and how a test waits for what has to come."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import httpx
import pytest
import redis.asyncio

from app import database
from app.api_keys import create_key, revoke_key, with_engine
from app.booking import Booking
from app.config import Settings, get_settings
from app.direct_route import DirectWay
from app.embedded import Stores
from app.main import create_app
from app.outbox import Outbox
from app.redis_client import StateStore
from app.verify import verify

BTC_PERP: Final = "BTC-PERP"
POLL_SECONDS: Final = 0.01
PAGE_ITEMS: Final = 500
PATIENCE_SECONDS: Final = 10.0
STOP_SECONDS: Final = 5.0

Found = TypeVar("Found")

_numbers = itertools.count(1)


class Desk:
    """One client of one API. What a method is named for has to happen, or the test fails with the answer."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    def new_account(self) -> str:
        """A name that no account has yet."""
        return f"account-{next(_numbers)}"

    async def mark(self, price: str, *, confirm: bool = True) -> int:
        """Set the mark; its version."""
        body = {"symbol": BTC_PERP, "price": price, "confirm": confirm}
        answer = expect(await self.client.post("/mark-price", json=body), 200)
        return int(answer["version"])

    async def deposit(self, account_id: str, amount: str, **more: str) -> dict[str, Any]:
        """Book a deposit."""
        return expect(await self.transfer("deposit", account_id, amount, **more), 201)

    async def transfer(self, verb: str, account_id: str, amount: object, **more: str) -> httpx.Response:
        """Ask for a ``deposit`` or to ``withdraw``."""
        return await self.client.post(f"/accounts/{account_id}/{verb}", json={"amount": amount, **more})

    async def trade(
        self, account_id: str, side: str, quantity: str, price: str, *, symbol: str = BTC_PERP, **more: str
    ) -> httpx.Response:
        """Ask for a trade."""
        body = {"account_id": account_id, "symbol": symbol, "side": side, "quantity": quantity, "price": price}
        return await self.client.post("/trade", json={**body, **more})

    async def buy(self, account_id: str, quantity: str, price: str) -> dict[str, Any]:
        """Book a purchase."""
        return expect(await self.trade(account_id, "buy", quantity, price), 201)

    async def sell(self, account_id: str, quantity: str, price: str) -> dict[str, Any]:
        """Book a sale."""
        return expect(await self.trade(account_id, "sell", quantity, price), 201)

    async def account(self, account_id: str) -> dict[str, Any]:
        """``GET /positions``."""
        return expect(await self.client.get(f"/positions/{account_id}"), 200)

    async def report(self, **parameters: str) -> dict[str, Any]:
        """``GET /margin-report``."""
        return expect(await self.client.get("/margin-report", params=parameters), 200)

    async def rows(self, route: str, **filters: str) -> list[dict[str, Any]]:
        """Every row of a history route, over all pages, newest first."""
        rows: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            parameters = {"limit": str(PAGE_ITEMS), **filters, **cursor}
            page = expect(await self.client.get(f"/{route}", params=parameters), 200)
            rows += page["items"]
            if page["next_cursor"] is None:
                return rows
            cursor = {"cursor": page["next_cursor"]}

    async def breaches(self, account_id: str) -> list[dict[str, Any]]:
        """The account's liquidation rows, newest first."""
        return await self.rows("liquidations", account_id=account_id)

    async def sweep(self, price: str) -> int:
        """Set the mark, and wait until a watchdog has swept it; its version."""
        version = await self.mark(price)
        await self.swept(version)
        return version

    async def swept(self, version: int) -> None:
        """Wait until the mark of this version has been swept: what was found is in Postgres then."""

        async def is_swept() -> bool:
            ready = (await self.client.get("/health/ready")).json()
            return ready["swept_version"] is not None and ready["swept_version"] >= version

        await eventually(is_swept, f"version {version} to be swept")


def expect(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The document in an answer of this status; any other fails with what came."""
    assert answer.status_code == status, f"{answer.status_code} for {status}: {answer.text}"
    document: dict[str, Any] = answer.json()
    return document


def outcome(answer: httpx.Response) -> str:
    """``booked``, ``replayed`` or ``accepted``, else the code of the problem, or ``invalid`` and the field."""
    if answer.status_code == 201:
        return "booked"
    if answer.status_code == 200:
        return "replayed" if "Idempotency-Replayed" in answer.headers else "accepted"
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code, answer.text
    return f"invalid {problem['field']}" if answer.status_code == 422 else str(problem["code"])


async def command(client: redis.asyncio.Redis, *words: str | bytes | int) -> Any:  # noqa: ANN401 - what Redis answers
    """Have Redis run a command as a user would type it."""
    return await client.execute_command(*words)  # type: ignore[no-untyped-call]


async def eventually(
    check: Callable[[], Awaitable[Found]], what: str, *, within_seconds: float = PATIENCE_SECONDS
) -> Found:
    """Ask until the answer is true, and answer it."""
    deadline = time.monotonic() + within_seconds
    while True:
        found = await check()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {within_seconds} s for {what}"
        await asyncio.sleep(POLL_SECONDS)


@asynccontextmanager
async def booking_on(stores: Stores, settings: Settings) -> AsyncIterator[Booking]:
    """One process's way to book on these stores, with the outbox running, without an API around it."""
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    await outbox.start()
    yield Booking(store, outbox, settings)
    await outbox.stop()
    await store.close()
    await engine.dispose()


async def differences(stores: Stores) -> list[str]:
    """What ``plimsoll verify`` has to say of these stores."""
    settings = Settings(redis_url=stores.redis_url, database_url=stores.database_url)
    return (await asyncio.to_thread(verify, settings, stores)).differences


async def new_key(stores: Stores, *scopes: str, accounts: Sequence[str] = ("*",), name: str = "a test's") -> str:
    """An API key with these scopes, bound to these accounts."""
    _, key = await with_engine(
        stores.database_url,
        lambda engine: create_key(engine, name=name, scopes=scopes, accounts=accounts, now=datetime.now(UTC)),
    )
    return key


async def revoke(stores: Stores, key: str) -> None:
    """Revoke an API key."""
    key_id = key.split("_")[1]
    assert await with_engine(stores.database_url, lambda engine: revoke_key(engine, key_id, now=datetime.now(UTC))), (
        f"no key {key_id}"
    )


def bearer(key: str) -> dict[str, str]:
    """The header that sends a key."""
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def api_in_this_process(
    stores: Stores, *, peer: str = "127.0.0.1", raise_app_exceptions: bool = True, **overrides: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client, at the address ``peer``, of the application itself, on these stores, without a socket in between."""
    variables = {"redis_url": stores.redis_url, "database_url": stores.database_url, **overrides}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"PLIMSOLL_{name.upper()}", value)
        get_settings.cache_clear()
        application = create_app()
        way = DirectWay(application)
        lifespan = application.router.lifespan_context(application)
        state = await lifespan.__aenter__()
    get_settings.cache_clear()

    async def with_state(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI
        await way({**scope, "state": dict(state or {})}, receive, send)

    try:
        transport = httpx.ASGITransport(with_state, raise_app_exceptions=raise_app_exceptions, client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://plimsoll") as client:
            yield client
    finally:
        async with asyncio.timeout(STOP_SECONDS):
            await lifespan.__aexit__(None, None, None)
