"""The state machine: clients, marks, edits by hand, two watchdogs, restarts of Redis, and a crash anywhere."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from app import redis_client as keys
from app.numbers import format_decimal
from app.services.trading import TradeOrder, TransferOrder
from tests.oracle.rules import Position
from tests.property.simulation import checks
from tests.property.simulation.driver import PAUSED_MAX, WATCHDOGS, Driver
from tests.property.simulation.lost_tail import Image, lost_tail
from tests.property.simulation.model import BTC, Operation
from tests.property.simulation.steps import (
    ADOPTION_GAPS,
    BOOKING_GAPS,
    DRAIN_GAPS,
    MARK_GAPS,
    RECONCILE_GAPS,
    SWEEP_GAPS,
    Stop,
)

ACCOUNTS: Final = ("alice", "bob", "carol", "dave")
PRICE_MIN, PRICE_MAX = Decimal(20_000), Decimal(150_000)

accounts = st.sampled_from(ACCOUNTS)
amounts = st.integers(1, 900_000).map(lambda cents: Decimal(cents) / 100)


def stops(gaps: tuple[str, ...]) -> st.SearchStrategy[Stop | None]:
    """Half of the operations run through; the others crash, or pause for a while, in one of ``gaps``."""
    somewhere = st.builds(
        Stop, gap=st.sampled_from(gaps), how=st.sampled_from(["crash", "crash", "pause"]), passes=st.integers(0, 1)
    )
    return st.one_of(st.none(), somewhere.filter(lambda stop: stop.passes == 0 or "breach" in stop.gap))


def crashes(gaps: tuple[str, ...]) -> st.SearchStrategy[Stop]:
    """A crash in one of ``gaps``."""
    return st.builds(Stop, gap=st.sampled_from(gaps), how=st.just("crash"))


class Simulation(Driver):
    """Four accounts and whatever may happen to them."""

    @initialize()
    def begin(self) -> None:
        """A mark, and cash for everyone."""
        while not self.model.prices:  # a store that is slow may leave it unanswered
            self._mark(Decimal(60_000), None)
        for account in ACCOUNTS:
            self._book(Operation(TransferOrder(account, "deposit", Decimal(10_000)), f"first-{account}"), None)
        self.at_rest = True

    @rule(
        account=accounts,
        side=st.sampled_from(["buy", "sell"]),
        lots=st.integers(1, 90),
        offset=st.integers(-110, 110),
        stop=stops(BOOKING_GAPS),
    )
    def trade(self, account: str, side: Any, lots: int, offset: int, stop: Stop | None) -> None:  # noqa: ANN401
        """A trade near the mark, or just outside of its band."""
        price = (self.model.price * (1000 + offset) / 1000).quantize(Decimal("0.01"))
        order = TradeOrder(account, BTC, side, Decimal(lots) / 100, price)
        self._book(Operation(order, f"t{len(self.operations)}"), stop)

    @rule(account=accounts, kind=st.sampled_from(["deposit", "withdrawal"]), amount=amounts, stop=stops(BOOKING_GAPS))
    def transfer(self, account: str, kind: Any, amount: Decimal, stop: Stop | None) -> None:  # noqa: ANN401
        """Cash in or out."""
        self._book(Operation(TransferOrder(account, kind, amount), f"c{len(self.operations)}"), stop)

    @rule(which=st.integers(0, 1_000), stop=stops(BOOKING_GAPS))
    def retry(self, which: int, stop: Stop | None) -> None:
        """A client sends an operation again under its id, whatever became of it."""
        self._book(self.operations[which % len(self.operations)], stop)

    @rule(percent=st.integers(-25, 25), stop=stops(MARK_GAPS))
    def mark(self, percent: int, stop: Stop | None) -> None:
        """A mark; half of the crashes of accounts come from it."""
        price = min(PRICE_MAX, max(PRICE_MIN, self.model.price * (100 + percent) / 100)).quantize(Decimal("0.01"))
        self._mark(price, stop)

    @rule(account=accounts, amount=amounts, lots=st.one_of(st.none(), st.integers(-40, 40)), stop=stops(ADOPTION_GAPS))
    def edit_by_hand(self, account: str, amount: Decimal, lots: int | None, stop: Stop | None) -> None:
        """Somebody sets a balance, or a position, with redis-cli; then an audit passes, or not."""
        record = self.model.oracle.accounts[account]
        if lots is None:
            self.run(self.arena.redis.set(keys.balance_key(account), format_decimal(amount)))
            record.balance = amount
        elif lots == 0:
            self.run(self.arena.redis.hdel(keys.positions_key(account), BTC))
            record.positions.pop(BTC, None)
        else:
            quantity, price = Decimal(lots) / 100, self.model.price
            text = f'{{"quantity": "{quantity}", "avg_price": "{price}"}}'
            self.run(self.arena.redis.hset(keys.positions_key(account), BTC, text))
            record.positions[BTC] = Position(quantity, quantity * price)
        self.edited.add(account)
        self._step("edit")
        if amount > 200:
            self._audit(stop)

    @precondition(lambda self: len(self.paused) < PAUSED_MAX)
    @rule(account=accounts, amount=amounts)
    def edit_between_read_and_commit(self, account: str, amount: Decimal) -> None:
        """Somebody edits the balance that a deposit has read already, and is about to commit on."""
        operation = Operation(TransferOrder(account, "deposit", Decimal(13)), f"c{len(self.operations)}")
        ended = self._book(operation, Stop("read | commit", "pause"))
        if not ended.paused:
            return
        self.paused.pop()
        self._set_balance(account, amount)
        self.run(self.arena.finish(ended, kill=False))
        self._ended(ended, operation)

    def _set_balance(self, account: str, amount: Decimal) -> None:
        self.run(self.arena.redis.set(keys.balance_key(account), format_decimal(amount)))
        self.model.oracle.accounts[account].balance = amount
        self.edited.add(account)
        self._step("edit")

    @rule(cents=st.integers(-900, 900))
    def mark_by_hand(self, cents: int) -> None:
        """Somebody sets the mark with redis-cli; whoever meets it adopts it."""
        price = self.model.price + Decimal(cents) / 100
        self.run(self.arena.redis.set(keys.mark_price_key(BTC), format_decimal(price)))
        self.model.set_price(price)
        self._step("edit")

    @rule(account=accounts, stop=crashes(SWEEP_GAPS))
    def sweep_of_a_new_breach(self, account: str, stop: Stop) -> None:
        """An account takes all the risk it may, the mark falls, and the sweep that finds it crashes."""
        self._book(Operation(TransferOrder(account, "deposit", Decimal(5_000)), f"c{len(self.operations)}"), None)
        held = self.model.oracle.accounts[account]
        free = self.model.oracle.margin(held).free_margin
        quantity = (free * 4 / self.model.price).quantize(Decimal("0.01"))
        if quantity > 0 and self.model.price > 2 * PRICE_MIN:
            price = self.model.price.quantize(Decimal("0.01"))
            order = TradeOrder(account, BTC, "buy", quantity, price)
            self._book(Operation(order, f"t{len(self.operations)}"), None)
            self._mark((price * 3 / 4).quantize(Decimal("0.01")), None)
            self._sweep(0, stop)
        else:
            self._mark(PRICE_MAX, None)

    @rule(account=accounts, left_at=st.sampled_from(BOOKING_GAPS[1:4]), stop=crashes(DRAIN_GAPS))
    def drain_of_what_a_crash_left(self, account: str, left_at: str, stop: Stop) -> None:
        """A process dies with its row in the stream, and who drains that dies too."""
        operation = Operation(TransferOrder(account, "deposit", Decimal(7)), f"c{len(self.operations)}")
        self._book(operation, Stop(left_at, "crash"))
        self._drain(stop)

    @rule(account=accounts, stop=crashes(RECONCILE_GAPS))
    def roll_forward_that_crashes(self, account: str, stop: Stop) -> None:
        """Redis loses a deposit that history has, and who reconciles dies half-way."""
        if self.edited or self.arena.weather.postgres_away:
            return
        self._drain(None)
        self.image = self.run(Image.taken(self.arena))
        self._book(Operation(TransferOrder(account, "deposit", Decimal(9)), f"c{len(self.operations)}"), None)
        self._restart(stop, tail_lost=True)

    @precondition(lambda self: len(self.paused) < PAUSED_MAX and not self.edited)
    @rule(account=accounts, left_at=st.sampled_from(BOOKING_GAPS[1:3]), other=st.booleans())
    def old_writer_after_a_lost_tail(self, account: str, left_at: str, other: bool) -> None:
        """Redis loses a deposit that a process still holds to write it, and may have given its id to another since."""
        if self.arena.weather.postgres_away:
            return
        self._drain(None)
        image = self.run(Image.taken(self.arena))
        lost = Operation(TransferOrder(account, "deposit", Decimal(11)), f"c{len(self.operations)}")
        ended = self._book(lost, Stop(left_at, "pause"), settle=False)
        if not ended.paused:
            self._ended(ended, lost)
            return
        self.paused.pop()
        self.run(image.put_back(self.arena))
        self._restart(None, tail_lost=False)
        if other:
            self._book(Operation(TransferOrder(account, "deposit", Decimal(12)), f"c{len(self.operations)}"), None)
        self.run(self.arena.finish(ended, kill=False))
        self._ended(ended, lost)

    @rule(account=accounts, amount=amounts, stop=crashes(ADOPTION_GAPS))
    def audit_that_crashes(self, account: str, amount: Decimal, stop: Stop) -> None:
        """The audit dies while it adopts an edit."""
        self._set_balance(account, amount)
        self._audit(stop)

    @rule(which=st.integers(0, WATCHDOGS - 1), stop=stops(SWEEP_GAPS))
    def sweep(self, which: int, stop: Stop | None) -> None:
        """One of the watchdogs sweeps; a paused one holds its verdicts meanwhile."""
        self._sweep(which, stop)

    def _sweep(self, which: int, stop: Stop | None) -> None:
        ended = self._perform("sweep", self.watchdogs[which], self.watchdogs[which].sweep, stop)
        if ended.paused or ended.crashed:
            self.watchdogs[which] = self.run(self.arena.start())
        elif ended.error is None and not self.edited:
            self.at_rest = False
            self.run(checks.check_breaches(self.arena, self.model))
            self.at_rest = True

    @rule(stop=stops(DRAIN_GAPS))
    def drain(self, stop: Stop | None) -> None:
        """What is left over is drained by whoever is alive."""
        self._drain(stop)

    def _drain(self, stop: Stop | None) -> None:
        ended = self._perform("drain", self.watchdogs[0], self.watchdogs[0].outbox.drain, stop)
        if ended.paused or ended.crashed:
            self.watchdogs[0] = self.run(self.arena.start())

    @precondition(lambda self: self.paused)
    @rule(which=st.integers(0, PAUSED_MAX), kill=st.sampled_from([False, False, True]))
    def wake(self, which: int, kill: bool) -> None:
        """Somebody who was paused goes on, or dies where he stood."""
        ended, operation = self.paused.pop(which % len(self.paused))
        self.run(self.arena.finish(ended, kill=kill))
        self._ended(ended, operation)

    @rule(data=st.randoms(use_true_random=False))
    def deliver_again(self, data: Any) -> None:  # noqa: ANN401 - a random.Random
        """Rows that Postgres has taken, and rows that wait, arrive once more and in any order."""
        rows = [*self.run(self.arena.waiting()), *self.arena.weather.written[-30:]]
        some = data.sample(rows, min(len(rows), 12))

        async def deliver() -> None:
            epoch = await self.arena.redis.hget(keys.STATE_EPOCH, "epoch")
            await self.api.outbox._write(some, epoch=int(epoch or 0))

        if some and not self.arena.weather.postgres_away:
            ended = self._perform("delivery", self.api, deliver, None)
            assert ended.error is None, ended.error

    @rule()
    def postgres_comes_or_goes(self) -> None:
        """Postgres is away for some steps."""
        self.arena.weather.postgres_away = not self.arena.weather.postgres_away

    @rule(stop=stops(RECONCILE_GAPS), tail_lost=st.booleans())
    def redis_restarts(self, stop: Stop | None, tail_lost: bool) -> None:
        """Redis comes back, perhaps without its last writes, all of which history has; somebody reconciles."""
        self._restart(stop, tail_lost=tail_lost)

    def _restart(self, stop: Stop | None, *, tail_lost: bool) -> None:
        self.at_rest = False
        if tail_lost and self.image is not None and not self.edited:
            self.run(lost_tail(self.arena, self.image))
        self.run(self.arena.redis.set(keys.STATE_RUN_ID, "0" * 40))
        ended = self._perform("reconcile", self.api, self._reconcile, stop, settle=False)
        if ended.paused:
            self.paused.pop()
            self.run(self.arena.finish(ended, kill=True))
        if ended.crashed:
            self.api = self.run(self.arena.start())
            ended = self._perform("reconcile", self.api, self._reconcile, None, settle=False)
        assert ended.error is None, ended.error
        self.image = None
        self.run(self._note_mark())
        self._step("reconcile")

    @rule()
    def remember(self) -> None:
        """The last moment that Redis' disk has; only where a loss of what follows could be made good."""
        if not self.edited and not self.arena.weather.postgres_away:
            self.image = self.run(Image.taken(self.arena))
