"""The load: clients that trade, deposit and withdraw on a few accounts while a market maker sets marks.

What they do follows from the seed alone; what comes of it depends on the timing of the fault.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from random import Random
from typing import Any, Final

import httpx

from tests.faults.cell import Cell
from tests.faults.journal import Kind, Operation, Outcome

SYMBOL: Final = "BTC-PERP"
MARK: Final = 50_000
FUNDS: Final = "100000"
MARK_SECONDS: Final = 0.1
PAUSE_SECONDS: Final = 0.02
RETRY_SHARE: Final = 0.5
"""So many of the unknown outcomes are tried again at once, by whoever is alive; the checker resolves the others."""


class Load:
    """``clients`` at once on ``accounts`` accounts, each operation in the journal."""

    def __init__(self, cell: Cell, *, seed: int, clients: int = 12, accounts: int = 6, name: str = "load") -> None:
        self.cell = cell
        self.name = name
        self.accounts = [f"{name}-{number}" for number in range(accounts)]
        self.journal: list[Operation] = []
        self.in_flight_at_faults = 0
        self.cut_off = 0
        self.complaints: list[str] = []
        self.on_answer: Callable[[Operation], None] | None = None
        self._seed = seed
        self._clients = clients
        self._random = Random(f"{seed} {name}")
        self._tasks: list[asyncio.Task[None]] = []
        self._running = True
        self._numbers = 0
        self._mark = MARK

    async def start(self) -> None:
        """Fund the accounts, set the mark, and let the clients go."""
        await self.set_mark(MARK)
        for account in self.accounts:
            await self.send(self.new("deposit", account, {"amount": FUNDS}))
        assert all(operation.outcome == "ok" for operation in self.journal), [
            (operation.status, operation.code) for operation in self.journal
        ]
        self.begin()

    def begin(self) -> None:
        """Let the clients go."""
        self._running = True
        self._tasks = [
            asyncio.create_task(self._client(Random(f"{self._seed} {self.name} {number}")))
            for number in range(self._clients)
        ]
        self._tasks.append(asyncio.create_task(self._market_maker(Random(f"{self._seed} {self.name} marks"))))

    async def stop(self) -> None:
        """Let every request in flight end."""
        self._running = False
        await asyncio.gather(*self._tasks)

    @property
    def in_flight(self) -> int:
        """How many operations are without an answer now."""
        return sum(operation.outcome == "pending" for operation in self.journal[-10 * self._clients :])

    def fault(self) -> float:
        """Count what is in flight at a fault; the time of it."""
        self.in_flight_at_faults += self.in_flight
        return time.monotonic()

    async def acknowledged(self, count: int) -> None:
        """Wait until so many more operations were acknowledged."""
        wanted = sum(operation.outcome == "ok" for operation in self.journal) + count
        deadline = time.monotonic() + 30
        while sum(operation.outcome == "ok" for operation in self.journal) < wanted:
            assert time.monotonic() < deadline, f"nothing is acknowledged any more\n{self.cell.logs()}"
            await asyncio.sleep(0.005)

    async def first_after(self, moment: float) -> float:
        """The seconds from ``moment`` to the first acknowledgement of an operation that was sent after it."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            answered = [
                operation.answered_at
                for operation in self.journal[-20 * self._clients :]
                if operation.outcome == "ok" and operation.sent_at > moment
            ]
            if answered:
                return min(answered) - moment
            await asyncio.sleep(0.005)
        raise AssertionError(f"nothing is acknowledged after the fault\n{self.cell.logs()}")

    def new(self, kind: Kind, account_id: str, body: dict[str, Any]) -> Operation:
        """An operation with a client id of its own, in the journal."""
        self._numbers += 1
        operation = Operation(f"{self.name}-{self._numbers}", kind, account_id, body)
        self.journal.append(operation)
        return operation

    async def set_mark(self, price: int) -> bool:
        """Set the mark; whether it was accepted."""
        body = {"symbol": SYMBOL, "price": str(price), "confirm": True}
        try:
            response = await self.cell.http.post(f"{self._random.choice(self.cell.apis).url}/mark-price", json=body)
        except (httpx.TransportError, IndexError):
            return False
        if response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
            self.complaints.append(f"a mark was answered 500: {response.text}")
        return response.is_success

    async def send(self, operation: Operation) -> None:
        """Post it to one of the live APIs, and note what came of it."""
        started = time.monotonic()
        operation.sent_at = operation.sent_at or started
        before = operation.outcome
        try:
            url = self._random.choice(self.cell.apis).url
            response = await self.cell.http.post(
                url + operation.path, json={**operation.body, operation.id_field: operation.client_id}
            )
        except (httpx.TransportError, IndexError) as error:
            operation.status, operation.code = 0, type(error).__name__
            self.cut_off += not isinstance(error, httpx.ConnectError | IndexError)
        else:
            operation.status = response.status_code
            answer = response.json()
            operation.code = str(answer.get("code", ""))
            if response.is_success:
                operation.recorded = bool(answer["recorded"])
                operation.history_ids.add(int(answer["trade_id" if operation.kind == "trade" else "transfer_id"]))
            if operation.code == "outcome_unknown" and answer.get(operation.id_field) != operation.client_id:
                self.complaints.append(f"outcome_unknown without its client id: {answer}")
            if operation.status not in {200, 201, 404, 409, 503}:
                self.complaints.append(f"answered {operation.status}: {answer}")
        operation.answered_at = time.monotonic()
        operation.slowest_seconds = max(operation.slowest_seconds, operation.answered_at - started)
        operation.outcome = _outcome(operation, tried_before=before == "unknown")
        if self.on_answer is not None:
            self.on_answer(operation)

    async def _client(self, random: Random) -> None:
        while self._running:
            account = random.choice(self.accounts)
            operation = self._next(random, account)
            await self.send(operation)
            while operation.outcome == "unknown" and random.random() < RETRY_SHARE:
                await asyncio.sleep(PAUSE_SECONDS)
                await self.send(operation)
            if operation.outcome != "ok":
                await asyncio.sleep(PAUSE_SECONDS)

    def _next(self, random: Random, account: str) -> Operation:
        luck = random.random()
        if luck < 0.08:
            return self.new("deposit", account, {"amount": f"{random.randint(1, 10**9) / 10**6:.6f}"})
        if luck < 0.14:
            return self.new("withdrawal", account, {"amount": f"{random.randint(1, 10**9) / 10**6:.6f}"})
        # One in twenty is far out of the band, one in twenty beyond any margin: both are refused.
        price = self._mark * (2 if luck < 0.19 else random.uniform(0.99, 1.01))
        quantity = 900 if luck > 0.95 else random.randint(1, 40_000) / 10**6
        body = {
            "account_id": account,
            "symbol": SYMBOL,
            "side": random.choice(("buy", "sell")),
            "quantity": f"{quantity:.6f}",
            "price": f"{price:.2f}",
        }
        return self.new("trade", account, body)

    async def _market_maker(self, random: Random) -> None:
        while self._running:
            await asyncio.sleep(MARK_SECONDS)
            self._mark = max(40_000, min(60_000, self._mark + random.randint(-200, 200)))
            await self.set_mark(self._mark)


def _outcome(operation: Operation, *, tried_before: bool) -> Outcome:
    """What a client may conclude from an answer; nothing but a success says anything about an earlier try."""
    if operation.status in {200, 201}:
        return "ok"
    if tried_before or operation.status == 0 or operation.code == "outcome_unknown":
        return "unknown"
    return "refused"
