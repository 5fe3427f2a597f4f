"""Mark prices: accepted by compare-and-set, guarded against a mistyped one, and adopted when set by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

import structlog

from app import errors, metrics
from app import redis_client as keys
from app.contracts import Contract
from app.history import timestamp_text
from app.numbers import format_decimal
from app.records import parse_mark
from app.redis_client import StateStore
from app.request_time import CALLS_PER_ATTEMPT, RequestTime
from app.services import trading

ATTEMPTS_MAX: Final = 50

log = structlog.get_logger(__name__)


class _StoredMark(NamedTuple):
    """A mark as its keys hold it: what the user's key says, what was accepted last, and who holds the symbol."""

    text: bytes
    accepted: bytes
    version: bytes
    timestamp: bytes
    accounts_open: int


class MarkBook:
    """Accepts marks for one process."""

    def __init__(self, store: StateStore, contracts: Mapping[str, Contract], *, jump_max: Decimal) -> None:
        self._store = store
        self._contracts = contracts
        self._jump_max = jump_max

    async def set_mark(self, symbol: str, price: Decimal, *, confirm: bool) -> dict[str, Any]:
        """Accept ``price`` in USDT; the newest wins. Raises ``InvalidField``, or ``MarkPriceJump`` for one too far."""
        try:
            return await self._set_mark(symbol, price, confirm=confirm)
        except (errors.Refusal, errors.InvalidField):
            metrics.MARKS_REFUSED.inc()
            raise

    async def _set_mark(self, symbol: str, price: Decimal, *, confirm: bool) -> dict[str, Any]:
        contract = trading.contract_of(symbol, self._contracts)
        trading.check_amount(price, name="price", maximum=contract.price_max)
        allotted = RequestTime(self._store.request_seconds)
        for tries in range(ATTEMPTS_MAX):
            if tries and not allotted.allows(CALLS_PER_ATTEMPT):
                break
            asked = time.monotonic()
            async with allotted.bound():
                stored = await self._read(symbol)
            allotted.called(since=asked)
            last = parse_mark(stored.text, contract)
            if last is not None and stored.accounts_open and not confirm:
                self._check_jump(symbol, last=last, price=price)
            accepted = await self._commit_in_time(allotted, symbol, stored, price)
            if accepted is not None:
                version, time_us = accepted
                return {
                    "symbol": symbol,
                    "price": format_decimal(price),
                    "timestamp": timestamp_text(time_us),
                    "version": version,
                }
        raise errors.Contended(
            f"the mark of {symbol} changed under every attempt that its time allowed", reason="contended"
        )

    async def adopt(self, symbol: str) -> None:
        """Give a mark that was set by hand its version and its time; a no-op where there is nothing to adopt."""
        stored = await self._read(symbol)
        price = parse_mark(stored.text, self._contracts[symbol])
        if price is None or (stored.text == stored.accepted and stored.timestamp.isdigit()):
            return
        if await self._commit(symbol, stored, price):
            log.info("adopted a mark set by hand", symbol=symbol, price=format_decimal(price))

    async def _read(self, symbol: str) -> _StoredMark:
        try:
            # The commit that follows takes as long at most: together they keep to a request's time.
            async with (
                asyncio.timeout(self._store.call_seconds),
                self._store.client.pipeline(transaction=True) as pipeline,
            ):
                # MGET answers nothing for a key of another type, and a mark of another type is no mark.
                pipeline.mget([keys.mark_price_key(symbol)])
                pipeline.hmget(keys.mark_key(symbol), "price", "version", "timestamp")
                pipeline.get(keys.open_positions_key(symbol))
                (text,), (accepted, version, timestamp), accounts_open = await pipeline.execute()
        except TimeoutError as error:
            raise errors.StoreUnavailable("Redis did not answer in time", reason="redis") from error
        # A count that cannot be read guards as if somebody held the symbol.
        known = accounts_open is None or accounts_open.isdigit()
        return _StoredMark(
            text or b"", accepted or b"", version or b"", timestamp or b"", int(accounts_open or 0) if known else 1
        )

    async def _commit_in_time(
        self, allotted: RequestTime, symbol: str, stored: _StoredMark, price: Decimal
    ) -> tuple[int, int] | None:
        """As ``_commit``, in what is left of a request's time. Raises ``StoreUnavailable``, ``OutcomeUnknown``."""
        if not allotted.allows(1):
            raise errors.StoreUnavailable("Redis is too slow for a mark in a request's time", reason="redis")
        asked = time.monotonic()
        try:
            async with asyncio.timeout_at(allotted.ends):
                accepted = await self._commit(symbol, stored, price)
        except TimeoutError as error:
            raise errors.OutcomeUnknown(
                "Redis did not answer in time; the mark may have been taken", reason="redis"
            ) from error
        allotted.called(since=asked)
        return accepted

    async def _commit(self, symbol: str, stored: _StoredMark, price: Decimal) -> tuple[int, int] | None:
        """The new version and its time in microseconds, or None if the mark moved."""
        answer = await self._store.run(
            keys.MARK,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                keys.MARK_VERSION,
                keys.mark_price_key(symbol),
                keys.mark_key(symbol),
            ],
            [
                self._store.signature,
                symbol,
                stored.text,
                stored.accepted,
                stored.version,
                format_decimal(price),
                keys.MARK_CHANNEL,
            ],
        )
        return (int(answer[1]), int(answer[2])) if answer[0] == "ok" else None

    def _check_jump(self, symbol: str, *, last: Decimal, price: Decimal) -> None:
        if abs(price - last) > self._jump_max * last:
            raise errors.MarkPriceJump(
                f"{format_decimal(price)} is more than {self._jump_max:.0%} away from the last mark "
                f"{format_decimal(last)}, and {symbol} has open positions",
                required=last,
                available=price,
                next=errors.mark_step(symbol, price, confirm=True),
            )
