"""What holds after every step of the simulation, and what holds once all of it has come to rest."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

from app import redis_client as keys
from app import verify
from app.records import UNIT, parse_account, unpack
from tests.property.simulation.model import BTC, Model, Operation
from tests.property.simulation.processes import Arena

_CONSERVED: Final = """
    SELECT (SELECT coalesce(sum(CASE kind WHEN 'deposit' THEN amount ELSE -amount END), 0) FROM transfers),
           (SELECT coalesce(sum(realised_pnl), 0) FROM trades),
           (SELECT coalesce(sum(balance_after - balance_before), 0) FROM adjustments)
"""
_UNENDED: Final = """
    SELECT account_id, liquidations.id FROM liquidations
    WHERE NOT EXISTS (SELECT FROM recoveries WHERE liquidation_id = liquidations.id)
"""
_IDS: Final = """
    SELECT id FROM trades UNION ALL SELECT id FROM transfers UNION ALL SELECT id FROM liquidations
    UNION ALL SELECT id FROM recoveries UNION ALL SELECT id FROM adjustments
"""


async def check_records(arena: Arena, model: Model) -> None:
    """Every account in Redis is what the oracle says, and its breach stands in the ledger and the column alike."""
    names = list(model.oracle.accounts)
    async with arena.redis.pipeline(transaction=True) as pipeline:
        for name in names:
            pipeline.get(keys.balance_key(name))
            pipeline.hgetall(keys.positions_key(name))
            pipeline.hmget(keys.ledger_key(name), "slot", "breach")
        pipeline.get(keys.COLUMN_BREACH)
        *answers, breaches = await pipeline.execute()
    contracts = {contract.symbol: contract for contract in arena.settings.contracts}
    expected = model.records()
    for name, balance, fields, (slot, breach) in zip(names, answers[::3], answers[1::3], answers[2::3], strict=True):
        flat = [text for pair in fields.items() for text in pair]
        account = parse_account(name, balance, flat, contracts)
        held = account.position(BTC)
        found = (account.balance, held.quantity, held.cost)
        assert found == expected[name], f"{name} is {found} in Redis, {expected[name]} by the rules"
        if slot is not None:
            packed = (breaches or b"")[int(slot) * UNIT.size : (int(slot) + 1) * UNIT.size]
            assert unpack(packed) == int(breach or 0), (
                f"{name}: the column has breach {packed!r}, the ledger {breach!r}"
            )


async def check_breaches(arena: Arena, model: Model) -> None:
    """After a sweep that nothing disturbed: every candidate is in a breach, and no restored account is."""
    for name, account in model.oracle.accounts.items():
        margin = model.oracle.margin(account)
        breach = await arena.redis.hget(keys.ledger_key(name), "breach")
        if model.oracle.is_candidate(margin):
            assert breach, f"{name} is a candidate without a breach"
        elif margin.is_flat or model.oracle.rules.is_restored(equity=margin.equity, used_margin=margin.used_margin):
            assert not breach, f"{name} is restored, and breach {breach!r} is open"


async def check_at_rest(arena: Arena, model: Model, operations: Sequence[Operation]) -> None:
    """History holds every booked operation once and nothing else, and both stores tell the same of everything."""
    assert not await arena.waiting(), "rows wait in the outbox"
    assert not await arena.redis.xlen(keys.OUTBOX_DEAD), "rows were put aside as dead letters"
    await _check_operations(arena, operations)
    (deposited, realised, adjusted), *_ = await arena.rows(_CONSERVED)
    balances = sum((account.balance for account in model.oracle.accounts.values()), Decimal(0))
    assert balances == deposited + realised + adjusted, (
        f"the balances are {balances}; transfers {deposited}, realised pnl {realised}, adjustments {adjusted}"
    )
    open_in_redis = {
        (name, int(breach))
        for name in model.oracle.accounts
        if (breach := await arena.redis.hget(keys.ledger_key(name), "breach"))
    }
    assert open_in_redis == set(await arena.rows(_UNENDED)), "open breaches in Redis are not the rows without recovery"
    for counter, table in ((keys.LIQUIDATIONS, "liquidations"), (keys.RECOVERIES, "recoveries")):
        ((rows,),) = await arena.rows(f"SELECT count(*) FROM {table}")
        assert int(await arena.redis.get(counter) or 0) == rows, f"the counter of {table} is not its {rows} rows"
    ids = [row[0] for row in await arena.rows(_IDS)]
    assert len(set(ids)) == len(ids), "an id was given twice"
    await _check_folds(arena)


async def _check_folds(arena: Arena) -> None:
    """As ``plimsoll verify``, over the connections that are there."""
    booking = (await arena.start()).booking
    async for fold in verify._folds(arena.engine):
        found = await booking.read(fold.account.account_id)
        assert not (faults := verify.compare(fold, found, booking.contracts)), f"{fold.account.account_id}: {faults}"
    await booking.store.close()


async def _check_operations(arena: Arena, operations: Sequence[Operation]) -> None:
    """Each operation has one row under its id if it was booked, else none; nobody else has any."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    for kind, account, client_id, history_id in [
        *await arena.rows("SELECT 'trade', account_id, client_trade_id, id FROM trades"),
        *await arena.rows("SELECT kind, account_id, client_transfer_id, id FROM transfers"),
    ]:
        found.setdefault((kind, account, client_id), []).append(history_id)
    for operation in operations:
        rows = found.pop((operation.kind, operation.order.account_id, operation.id), [])
        booked = [] if operation.history_id is None else [operation.history_id]
        assert rows == booked, f"{operation} has the rows {rows} in history"
        assert booked or not operation.acknowledged, f"{operation} was acknowledged and is nowhere"
    assert not found, f"rows that nobody asked for: {found}"
