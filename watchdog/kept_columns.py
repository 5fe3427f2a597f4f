"""The columns as this watchdog read them last, and how a sweep comes by the rows of now.

Whatever writes a row notes its slot (``app/scripts/guard.lua`` ``note_changes``). A sweep of a large store
reads the rows that were noted since its last one, all of one moment and with the marks of that moment
(``app/scripts/changed_rows.lua``), and has the others still. It reads every row where that cannot be told: the first
time, further behind than the notes reach, in a new epoch, and after a column was lost.

Each sweep of the timer also reads some rows in full, in turn, and compares: a row that changed without a note was
written by somebody else. It is logged and counted, and every row is read again. So a column that was edited by hand is
seen after at most ``accounts / 16,384`` sweeps of the timer; a store of one chunk is always read in full.

With the rows their headroom is kept (:mod:`app.headroom`), so a sweep does not look at all of a row that stands still.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from app import background, errors
from app import redis_client as keys
from app.booking import Booking
from app.columns import (
    INT64,
    SCREEN_BLOCK_ROWS,
    Chunk,
    Marks,
    chunk_of,
    column_names,
    marks_from,
    read_chunk,
    read_marks,
)
from app.headroom import Headroom
from watchdog import metrics

ADOPTIONS_MAX: Final = 5
CHANGES_PER_CALL: Final = 1_024
"""A script holds up everybody else at Redis for as long as it runs."""

AUDITED_AT_ONCE: Final = 16_384
"""Rows: a mark that comes meanwhile waits a millisecond for them, and ten for a whole chunk."""

NO_SLOTS: Final = np.empty(0, dtype=np.int64)
NO_MARKS: Final = Marks(prices={}, timestamps_us={}, version=0, by_hand=())

log = structlog.get_logger(__name__)


async def adopted_marks(booking: Booking) -> Marks:
    """The marks, each with a version: one set by hand is given its own first. Raises ``Contended``."""
    for _ in range(ADOPTIONS_MAX):
        marks = await read_marks(booking.store.client, booking.contracts)
        if not marks.by_hand:
            return marks
        for symbol in marks.by_hand:
            await booking.marks.adopt(symbol)
    raise errors.Contended("a mark is set by hand faster than it can be adopted", reason="contended")


class KeptColumns:
    """Answers every row of the columns for the sweeps of one watchdog.

    Rows that were kept come in one chunk, with their headroom. They are not copied: they stand still until the next
    sweep begins.
    """

    def __init__(self, booking: Booking) -> None:
        self._booking = booking
        self._client = booking.store.client
        self._contracts = booking.contracts
        self._names = column_names(booking.contracts)
        self._size = booking.settings.sweep_chunk_accounts
        self._columns: list[NDArray[np.int64]] = []
        """As in ``column_names``, with room for accounts to come; empty when nothing is kept."""
        self._headroom = Headroom(self._contracts, 0)
        self._accounts = 0
        self._epoch = ""
        self._change = b""
        """The number of the last change that is in the rows kept."""
        self._audit_slot = 0

    async def chunks(self, *, audit: bool = False) -> AsyncGenerator[tuple[Chunk, Headroom | None]]:
        """Every account, chunk by chunk, none with a mark that has no version; an empty system has an empty chunk.

        A chunk with a headroom is the only one.

        Raises ``Contended``, ``ColumnsShort`` and the store's errors.
        """
        marks = await self._catch_up(audit=audit) if self._columns else None
        if marks is None:
            async with aclosing(self._read_every_row()) as chunks:
                async for chunk in chunks:
                    yield chunk, None
        else:
            yield chunk_of(self._rows(0, self._accounts), 0, self._contracts, marks), self._headroom

    def _rows(self, first: int, count: int) -> list[NDArray[np.int64]]:
        """Some of the rows kept, fewer at the end."""
        return [column[first : min(first + count, self._accounts)] for column in self._columns]

    def _forget(self) -> None:
        self._columns, self._accounts, self._headroom = [], 0, Headroom(self._contracts, 0)

    async def _read_every_row(self) -> AsyncGenerator[Chunk]:
        """Every account from Redis, each chunk with its own marks; the next is read while one is looked at."""
        self._forget()
        # What changes while the rows are read is read again by the next sweep.
        change = await self._newest_change()
        first, chunks = 0, []
        reading = asyncio.create_task(self._read_chunk(first))
        try:
            while True:
                chunk = await reading
                chunks.append(chunk)
                if len(chunk) < self._size:
                    yield chunk
                    break
                first += self._size
                reading = asyncio.create_task(self._read_chunk(first))
                yield chunk
        finally:
            await background.end([reading])
        epochs = {chunk.marks.epoch for chunk in chunks}
        if len(chunks) > 1 and len(epochs) == 1:
            await asyncio.to_thread(self._keep, chunks)
            self._epoch, self._change = epochs.pop(), change

    async def _newest_change(self) -> bytes:
        """The number of the newest change; nothing when none is noted."""
        for _ in range(ADOPTIONS_MAX):
            try:
                _, newest = await self._changed_rows(b"")
            except errors.ColumnsShort:
                # No account may be missed meanwhile, so the sweep waits.
                await self._booking.column_repair.rebuild()
                continue
            return bytes(newest)
        raise errors.ColumnsShort("columns are lost faster than they can be made anew", reason="columns")

    def _keep(self, chunks: list[Chunk]) -> None:
        accounts = sum(map(len, chunks))
        room = self._with_room(accounts)
        columns, headroom = [np.zeros(room, dtype=np.int64) for _ in self._names], Headroom(self._contracts, room)
        for block in (block for chunk in chunks for block in chunk.pieces(SCREEN_BLOCK_ROWS)):
            slots = slice(block.first_slot, block.first_slot + len(block))
            headroom.put(slots, block)
            for column, read in zip(columns, _columns_of(block), strict=True):
                column[slots] = read
        self._columns, self._accounts, self._headroom = columns, accounts, headroom

    def _with_room(self, accounts: int) -> int:
        return accounts + accounts // 8 + self._size

    async def _read_chunk(self, first: int) -> Chunk:
        """A chunk none of whose marks is without a version."""
        for _ in range(ADOPTIONS_MAX):
            try:
                chunk = await read_chunk(self._client, first, self._size, self._contracts)
            except errors.ColumnsShort:
                # No account may be missed meanwhile, so the sweep waits.
                await self._booking.column_repair.rebuild()
                continue
            if not chunk.marks.by_hand:
                return chunk
            await adopted_marks(self._booking)
        raise errors.Contended("a mark is set by hand faster than it can be adopted", reason="contended")

    async def _catch_up(self, *, audit: bool) -> Marks | None:
        """Bring the rows kept up to date, and answer the marks of that moment; None if every row has to be read."""
        try:
            # Read before the changes are, so whatever it may differ in is among them.
            different = await self._different_slots() if audit else NO_SLOTS
            accounts, changed = self._accounts, NO_SLOTS
            for _ in range(ADOPTIONS_MAX):
                marks, slots = await self._apply_changes()
                changed = np.concatenate([changed, slots])
                if marks is None or not marks.by_hand:
                    break
                await adopted_marks(self._booking)
            else:
                raise errors.Contended("a mark is set by hand faster than it can be adopted", reason="contended")
        except errors.ColumnsShort:
            return None
        if marks is None:
            return None
        new = np.arange(accounts, self._accounts)
        unnoted = np.setdiff1d(np.concatenate([different, new]), changed)
        if len(unnoted):
            metrics.UNNOTED_CHANGES.inc(len(unnoted))
            log.error(
                "rows of the columns changed without a note; every row is read again",
                rows=len(unnoted),
                slots=unnoted[:10].tolist(),
            )
            return None
        return marks

    async def _different_slots(self) -> NDArray[np.int64]:
        """The slots of the rows in turn that are not those kept, or of which only one of the two has any."""
        first, count = self._audit_slot if self._audit_slot < self._accounts else 0, min(self._size, AUDITED_AT_ONCE)
        self._audit_slot = first + count
        chunk = await read_chunk(self._client, first, count, self._contracts)
        kept, read = self._rows(first, count), _columns_of(chunk)
        both = min(len(kept[0]), len(read[0]))
        different = np.zeros(max(len(kept[0]), len(read[0])), dtype=np.bool_)
        different[both:] = True
        for mine, theirs in zip(kept, read, strict=True):
            different[:both] |= mine[:both] != theirs[:both]
        return np.flatnonzero(different) + first

    async def _apply_changes(self) -> tuple[Marks | None, NDArray[np.int64]]:
        """Read what changed since the last change kept, until nothing is left; the marks then, and the slots read.

        A row that changes again between two calls is noted again, so all rows are of the moment of the last call.
        """
        changed: list[NDArray[np.int64]] = []
        while True:
            answer = await self._changed_rows(self._change)
            if answer[0] != "ok":
                return None, NO_SLOTS
            _, accounts, newest, last, epoch, time, version, marks, slots, *columns = answer
            if keys.as_text(epoch) != self._epoch or accounts < self._accounts:
                return None, NO_SLOTS
            slots = np.frombuffer(slots, dtype=INT64)
            self._write(int(accounts), slots, columns)
            changed.append(slots)
            self._change = b"%d" % last
            if last == newest:
                prices = [(int(part) for part in time), epoch, [*(price for price, _, _ in marks), version]]
                accepted = [mark[1:] for mark in marks]
                return marks_from([*prices, *accepted], self._contracts), np.concatenate(changed)

    async def _changed_rows(self, after: bytes) -> list[Any]:
        store, symbols = self._booking.store, list(self._contracts)
        return await store.run(
            keys.CHANGED_ROWS,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                keys.CHANGED,
                keys.ACCOUNTS,
                keys.MARK_VERSION,
                *(key for symbol in symbols for key in (keys.mark_price_key(symbol), keys.mark_key(symbol))),
                *self._names,
            ],
            [store.signature, after, CHANGES_PER_CALL, len(symbols)],
        )

    def _write(self, accounts: int, slots: NDArray[np.int64], columns: list[Any]) -> None:
        if accounts > len(self._headroom):
            room = self._with_room(accounts)
            self._columns = [np.pad(column, (0, room - len(column))) for column in self._columns]
            self._headroom.grow(room)
        self._accounts = accounts
        after = [np.frombuffer(packed, dtype=INT64) for packed in columns]
        self._headroom.put(slots, self._chunk(after), before=self._chunk([column[slots] for column in self._columns]))
        for column, values in zip(self._columns, after, strict=True):
            column[slots] = values

    def _chunk(self, columns: list[NDArray[np.int64]]) -> Chunk:
        return chunk_of(columns, -1, self._contracts, NO_MARKS)


def _columns_of(chunk: Chunk) -> list[NDArray[np.int64]]:
    """As in ``column_names``."""
    columns = [chunk.balance, chunk.breach]
    for symbol, quantity in chunk.quantity.items():
        columns += [quantity, chunk.cost[symbol]]
    return columns
