"""Whatever the stores do, a trade, a transfer or a mark is answered in its time, and nothing false is said of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any, Final

import pytest

from app import errors
from app import redis_client as keys
from app.booking import Booked, Booking
from app.config import Settings
from app.embedded import Stores
from app.redis_client import Script, StateStore
from app.request_time import VOUCH_SHARE
from app.services.trading import TransferOrder
from tests.integration.desk import BTC_PERP, booking_on, differences, eventually

REQUEST_SECONDS: Final = 1.0
COMMITTED_BY_SECONDS: Final = REQUEST_SECONDS - REQUEST_SECONDS / VOUCH_SHARE
BUSY_SECONDS: Final = 0.5
"""What a busy machine adds."""

Call = Callable[[], Awaitable[list[Any]]]


Meanwhile = Callable[[Script, Call], Awaitable[list[Any]]]
"""What happens when a script is called; it makes the call, or does not."""


def deposit(booking: Booking, amount: str = "1", *, client_id: str | None = None) -> Awaitable[Booked]:
    return booking.book_transfer(TransferOrder("alice", "deposit", Decimal(amount)), client_transfer_id=client_id)


@pytest.fixture
async def rival(stores: Stores, settings: Settings) -> AsyncIterator[Booking]:
    """Another process, which nothing holds up. Alice has 100."""
    async with booking_on(stores, settings) as booking:
        await deposit(booking, "100")
        yield booking


@pytest.fixture
async def booking(rival: Booking, stores: Stores, settings: Settings) -> AsyncIterator[Booking]:
    """A process that knows nothing of Alice yet, and gives a request a second."""
    short = {"redis_timeout_seconds": REQUEST_SECONDS, "record_timeout_seconds": REQUEST_SECONDS}
    async with booking_on(stores, settings.model_copy(update=short)) as booking:
        yield booking


def slow(booking: Booking, monkeypatch: pytest.MonkeyPatch, meanwhile: Meanwhile) -> list[str]:
    """Have ``meanwhile`` make the script calls of ``booking`` from now on; the names of those that were made."""
    made: list[str] = []
    run = booking.store.run

    async def held_up(script: Script, called_keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> list[Any]:
        made.append(script.name)
        return await meanwhile(script, lambda: run(script, called_keys, arguments))

    monkeypatch.setattr(booking.store, "run", held_up)
    return made


async def failed(asked: Awaitable[Booked]) -> tuple[errors.Unavailable, float]:
    """The fault that a request ends in, and the seconds it took."""
    started = time.monotonic()
    with pytest.raises(errors.Unavailable) as raised:
        await asked
    return raised.value, time.monotonic() - started


async def balance(store: StateStore) -> bytes | str | None:
    return await store.client.get(keys.balance_key("alice"))


async def test_an_attempt_that_would_not_end_in_time_is_not_begun(
    booking: Booking, rival: Booking, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call takes 0.2 s, each commit comes too late: after two attempts a third would end at 1.2 s."""

    async def meanwhile(script: Script, call: Call) -> list[Any]:
        await asyncio.sleep(0.2)
        if script is keys.COMMIT:
            await deposit(rival)
        return await call()

    made = slow(booking, monkeypatch, meanwhile)
    fault, seconds = await failed(deposit(booking, "1000", client_id="mine"))
    assert isinstance(fault, errors.Contended)
    assert fault.members["client_transfer_id"] == "mine"
    assert seconds < REQUEST_SECONDS + BUSY_SECONDS
    assert made == ["read_account", "commit"] * 2
    assert await balance(booking.store) == b"102"
    assert await differences(stores) == []


async def test_after_a_read_so_slow_that_a_commit_would_be_late_nothing_is_sent(
    booking: Booking, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def meanwhile(_: Script, call: Call) -> list[Any]:
        await asyncio.sleep(COMMITTED_BY_SECONDS / 2 + 0.01)
        return await call()

    made = slow(booking, monkeypatch, meanwhile)
    fault, _ = await failed(deposit(booking))
    assert isinstance(fault, errors.StoreUnavailable)
    assert made == ["read_account"]


async def test_a_read_without_an_answer_ends_in_time_and_books_nothing(
    booking: Booking, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def meanwhile(_: Script, call: Call) -> list[Any]:
        await asyncio.sleep(10)
        return await call()

    slow(booking, monkeypatch, meanwhile)
    fault, seconds = await failed(deposit(booking))
    assert isinstance(fault, errors.StoreUnavailable)
    assert COMMITTED_BY_SECONDS <= seconds < REQUEST_SECONDS + BUSY_SECONDS
    assert await balance(booking.store) == b"100"


async def test_a_commit_without_an_answer_is_unknown_in_time_and_its_id_tells(
    booking: Booking, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reached Redis: to call it refused would be false, and to book it again would be twice."""
    may_answer = asyncio.Event()

    async def meanwhile(script: Script, call: Call) -> list[Any]:
        answer = await call()
        if script is keys.COMMIT:
            await may_answer.wait()
        return answer

    slow(booking, monkeypatch, meanwhile)
    fault, seconds = await failed(deposit(booking, "5", client_id="mine"))
    assert isinstance(fault, errors.OutcomeUnknown)
    assert fault.members["client_transfer_id"] == "mine"
    assert COMMITTED_BY_SECONDS <= seconds < REQUEST_SECONDS + BUSY_SECONDS
    may_answer.set()
    again = await deposit(booking, "5", client_id="mine")
    assert again.outcome == "replayed"
    assert await balance(booking.store) == b"105"
    assert await differences(stores) == []


async def test_those_that_came_later_in_a_call_are_not_ended_with_the_first(
    booking: Booking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has used up 0.4 s when both are committed in one call, which takes 0.7 s more."""
    reads = iter((0.4, 0.0))

    async def meanwhile(script: Script, call: Call) -> list[Any]:
        if script is keys.READ_ACCOUNT:
            await asyncio.sleep(next(reads))
            return await call()
        answer = await call()
        await asyncio.sleep(0.7)
        return answer

    slow(booking, monkeypatch, meanwhile)
    early = asyncio.create_task(failed(deposit(booking)))
    await asyncio.sleep(0.4)
    late = asyncio.create_task(_outcome(deposit(booking)))
    fault, _ = await early
    assert isinstance(fault, errors.OutcomeUnknown)
    assert not isinstance(await late, errors.OutcomeUnknown)


async def _outcome(asked: Awaitable[Booked]) -> Booked | errors.Unavailable:
    try:
        return await asked
    except errors.Unavailable as error:
        return error


async def test_a_silent_postgres_leaves_redis_time_to_vouch(booking: Booking, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = booking.outbox

    async def hang(*_: object) -> None:
        await asyncio.sleep(10)

    async def no_answer() -> None:
        raise errors.StoreUnavailable("Postgres did not answer", reason="postgres")

    monkeypatch.setattr(outbox, "_write_batch", hang)
    monkeypatch.setattr(outbox, "ping_postgres", no_answer)
    started = time.monotonic()
    booked = await deposit(booking)
    assert COMMITTED_BY_SECONDS <= time.monotonic() - started < REQUEST_SECONDS + BUSY_SECONDS
    assert booked.answer["recorded"] is False

    # The breaker has a time of its own, of which this request used up the most.
    async def is_away() -> bool:
        return outbox.postgres_away

    await eventually(is_away, "the breaker to open", within_seconds=REQUEST_SECONDS)


async def test_a_repeat_does_not_wait_for_a_silent_postgres(booking: Booking, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await deposit(booking, client_id="mine")

    async def hang(*_: object) -> bool:
        await asyncio.sleep(10)
        return True

    monkeypatch.setattr(booking.outbox, "_has_row", hang)
    started = time.monotonic()
    again = await deposit(booking, client_id="mine")
    assert COMMITTED_BY_SECONDS <= time.monotonic() - started < REQUEST_SECONDS + BUSY_SECONDS
    assert again.outcome == "replayed"
    assert again.answer["transfer_id"] == first.answer["transfer_id"]
    assert again.answer["recorded"] is False


async def test_a_mark_without_an_answer_is_unknown_in_time(booking: Booking, monkeypatch: pytest.MonkeyPatch) -> None:
    async def meanwhile(_: Script, call: Call) -> list[Any]:
        await asyncio.sleep(10)
        return await call()

    slow(booking, monkeypatch, meanwhile)
    started = time.monotonic()
    with pytest.raises(errors.OutcomeUnknown):
        await booking.marks.set_mark(BTC_PERP, Decimal(50_000), confirm=True)
    assert time.monotonic() - started < REQUEST_SECONDS + BUSY_SECONDS


async def test_marks_that_meet_are_not_tried_beyond_their_time(
    booking: Booking, rival: Booking, monkeypatch: pytest.MonkeyPatch
) -> None:
    price = Decimal(50_000)

    async def meanwhile(_: Script, call: Call) -> list[Any]:
        nonlocal price
        price += 1
        await asyncio.sleep(0.25)
        await rival.marks.set_mark(BTC_PERP, price, confirm=True)
        return await call()

    slow(booking, monkeypatch, meanwhile)
    started = time.monotonic()
    with pytest.raises(errors.Unavailable) as raised:
        await booking.marks.set_mark(BTC_PERP, Decimal(49_000), confirm=True)
    assert not isinstance(raised.value, errors.OutcomeUnknown)
    assert time.monotonic() - started < REQUEST_SECONDS + BUSY_SECONDS
