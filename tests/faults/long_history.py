"""A long history written straight into Postgres: a few accounts folded exactly, each copied to many names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Final

import orjson
import psycopg2

from app.contracts import BTC_PERP
from app.evidence import liquidation_body, recovery_body
from app.models import HISTORY
from app.numbers import format_decimal
from app.services import trading
from app.services.trading import Account

TRADES_PER_ACCOUNT: Final = 100
FOLDED: Final = 100
"""So many different lives; the other accounts have one of these under names and ids of their own."""
CONTRACTS: Final = {BTC_PERP.symbol: BTC_PERP}
DEPOSIT: Final = Decimal(200_000)
HOURS: Final = 12


class LongHistory:
    """``accounts`` accounts with a deposit and a hundred trades each: longs, shorts, flips; every fifth in breach."""

    def __init__(self, random: Random, *, accounts: int) -> None:
        self.accounts = accounts
        self.copies = max(1, accounts // FOLDED)
        self._random = random
        self._rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in HISTORY}
        self._ids = 0
        self._start = datetime.now(UTC) - timedelta(hours=HOURS)
        for number in range(accounts // self.copies):
            self._live(number)

    @property
    def trades(self) -> int:
        """How many trades there are."""
        return len(self._rows["trade"]) * self.copies

    @property
    def rows(self) -> int:
        """How many rows of all kinds."""
        return sum(len(rows) for rows in self._rows.values()) * self.copies

    def write(self, database_url: str) -> None:
        """COPY the folded lives, then multiply them: copy n has its own ids, names and client ids."""
        with closing(psycopg2.connect(database_url)) as connection, connection, connection.cursor() as cursor:
            for kind, rows in self._rows.items():
                table = HISTORY[kind].__tablename__
                names = [column.name for column in HISTORY[kind].__table__.columns]
                cursor.execute(f"CREATE TEMP TABLE lives (LIKE {table}) ON COMMIT DROP")
                cursor.copy_expert(f"COPY lives ({', '.join(names)}) FROM STDIN WITH (FORMAT csv)", _csv(names, rows))
                copied = {
                    "id": f"id + copy * {self._ids}",
                    "liquidation_id": f"liquidation_id + copy * {self._ids}",
                    "account_id": "account_id || '-' || copy",
                }
                cursor.execute(
                    f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(copied.get(n, n) for n in names)} "
                    f"FROM lives, generate_series(0, {self.copies - 1}) AS copy"
                )
                cursor.execute("DROP TABLE lives")
        with closing(psycopg2.connect(database_url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("ANALYZE")

    def _live(self, number: int) -> None:
        random = self._random
        account = Account(f"life{number:04d}", balance=DEPOSIT)
        seq = 1
        amount = {"kind": "deposit", "amount": DEPOSIT, "client_transfer_id": f"deposit-{number}"}
        after = {"balance_after": DEPOSIT, "equity_after": DEPOSIT, "used_margin_after": Decimal(0)}
        self._add("transfer", account.account_id, seq, {**amount, **after})
        breach: int | None = None
        for trade in range(TRADES_PER_ACCOUNT):
            seq += 1
            mark = Decimal(50_000 + random.randint(-50_000, 50_000)) / 10
            # In the middle of every tenth life a breach opens and ends; every fifth ends in one.
            opens = (number % 10 == 3 and trade == 50) or (number % 5 == 4 and trade == TRADES_PER_ACCOUNT - 1)
            account = self._trade(account, number, trade, seq, Decimal(45_000) + mark, short=opens)
            if opens or breach is not None:
                seq += 1
                breach = self._transition(account, seq, breach)

    def _trade(self, account: Account, number: int, trade: int, seq: int, price: Decimal, *, short: bool) -> Account:
        side = "sell" if short else self._random.choice(("buy", "sell"))
        quantity = Decimal(self._random.randint(1, 400_000)) / 1_000_000
        if short:
            # A long whose cost the balance covers cannot be ruined by any price; a short always can.
            quantity += abs(account.position(BTC_PERP.symbol).quantity)
        fill = trading.apply_trade(
            account.position(BTC_PERP.symbol), signed_quantity=quantity if side == "buy" else -quantity, price=price
        )
        positions = {BTC_PERP.symbol: fill.position} if fill.position.quantity else {}
        after = replace(account, balance=account.balance + fill.realised_pnl, positions=positions)
        margin = trading.account_margin(after, contracts=CONTRACTS, prices={BTC_PERP.symbol: price})
        self._add(
            "trade",
            account.account_id,
            seq,
            {
                "symbol": BTC_PERP.symbol,
                "side": side,
                "quantity": quantity,
                "price": price,
                "client_trade_id": f"trade-{number}-{trade}",
                "mark_price": price,
                "realised_pnl": fill.realised_pnl,
                "balance_after": after.balance,
                "quantity_after": fill.position.quantity,
                "cost_after": fill.position.cost,
                "equity_after": margin.equity,
                "used_margin_after": margin.used_margin,
            },
        )
        return after

    def _transition(self, account: Account, seq: int, breach: int | None) -> int | None:
        """Open a breach at a mark that takes all its equity, or end it at one that gives it back."""
        held = account.position(BTC_PERP.symbol)
        ruin = ((held.cost - account.balance) / held.quantity).quantize(Decimal("0.01"))
        prices = {BTC_PERP.symbol: ruin if breach is None else Decimal(50_000)}
        valued = trading.account_margin(account, contracts=CONTRACTS, prices=prices)
        if breach is None:
            body = liquidation_body(account, valued, prices=prices, mark_version=1)
            return self._add("liquidation", account.account_id, seq, orjson.loads(body))
        body = recovery_body(account, valued, prices=prices, mark_version=1, liquidation_id=breach, cause="the mark")
        self._add("recovery", account.account_id, seq, orjson.loads(body))
        return None

    def _add(self, kind: str, account_id: str, seq: int, row: dict[str, Any]) -> int:
        self._ids += 1
        moment = self._start + timedelta(milliseconds=self._ids)
        head = {"id": self._ids, "account_id": account_id, "seq": seq, "epoch": 1, "timestamp": moment.isoformat()}
        self._rows[kind].append({**head, "mark_version": 1, **row})
        return self._ids


def _csv(names: Iterable[str], rows: Iterable[dict[str, Any]]) -> io.StringIO:
    text = io.StringIO()
    writer = csv.writer(text)
    for row in rows:
        writer.writerow([_shown(row[name]) for name in names])
    text.seek(0)
    return text


def _shown(value: object) -> object:
    if isinstance(value, Decimal):
        return format_decimal(value)
    return orjson.dumps(value).decode() if isinstance(value, dict) else value
