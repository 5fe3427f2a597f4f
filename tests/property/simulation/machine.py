"""The state machine: clients, marks, edits by hand, two watchdogs, restarts of Redis, and a crash anywhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, ClassVar, Final, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from app import errors, reconcile
from app import redis_client as keys
from app.numbers import format_decimal
from app.services.trading import TradeOrder, TransferOrder
from tests.oracle.rules import Position
from tests.property.simulation import checks
from tests.property.simulation.lost_tail import Image, lost_tail
from tests.property.simulation.model import BTC, Model, Operation
from tests.property.simulation.processes import Arena, Ended, SimulatedProcess
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
WATCHDOGS: Final = 2
PAUSED_MAX: Final = 4
PRICE_MIN, PRICE_MAX = Decimal(20_000), Decimal(150_000)

Found = TypeVar("Found")

accounts = st.sampled_from(ACCOUNTS)
amounts = st.integers(1, 900_000).map(lambda cents: Decimal(cents) / 100)


def stops(gaps: tuple[str, ...]) -> st.SearchStrategy[Stop | None]:
    """Half of the operations run through; the others crash, or pause for a while, in one of ``gaps``."""
    somewhere = st.builds(
        Stop, gap=st.sampled_from(gaps), how=st.sampled_from(["crash", "crash", "pause"]), passes=st.integers(0, 1)
    )
    return st.one_of(st.none(), somewhere.filter(lambda stop: stop.passes == 0 or "breach" in stop.gap))


class Simulation(RuleBasedStateMachine):
    """Four accounts, an API, two watchdogs. ``arena`` is set by the test that runs it."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.operations: list[Operation] = []
        self.paused: list[tuple[Ended, Operation | None]] = []
        self.edited: set[str] = set()
        self.image: Image | None = None
        self.stores: tuple[Any, ...] = ()
        self.at_rest = False
        self.run(self.arena.clean())
        self.api = self.run(self.arena.start())
        self.watchdogs = [self.run(self.arena.start()) for _ in range(WATCHDOGS)]

    def run(self, work: Awaitable[Found]) -> Found:
        """Do something on the arena's loop."""

        async def main() -> Found:
            return await work

        return self.arena.loop.run_until_complete(main())

    @initialize()
    def begin(self) -> None:
        """A mark, and cash for everyone."""
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

    @rule(cents=st.integers(-900, 900))
    def mark_by_hand(self, cents: int) -> None:
        """Somebody sets the mark with redis-cli; whoever meets it adopts it."""
        price = self.model.price + Decimal(cents) / 100
        self.run(self.arena.redis.set(keys.mark_price_key(BTC), format_decimal(price)))
        self.model.set_price(price)
        self._step("edit")

    @rule(which=st.integers(0, WATCHDOGS - 1), stop=stops(SWEEP_GAPS))
    def sweep(self, which: int, stop: Stop | None) -> None:
        """One of the watchdogs sweeps; a paused one holds its verdicts meanwhile."""
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

    async def _reconcile(self) -> None:
        await reconcile.reconcile(self.api.store, self.arena.engine, self.arena.settings)

    def _mark(self, price: Decimal, stop: Stop | None) -> None:
        ended = self._perform("mark", self.api, lambda: self.api.booking.marks.set_mark(BTC, price, confirm=True), stop)
        if ended.paused or ended.crashed:
            self.api = self.run(self.arena.start())

    def _audit(self, stop: Stop | None) -> None:
        ended = self._perform("audit", self.watchdogs[1], self.watchdogs[1].audit.step, stop)
        if ended.paused or ended.crashed:
            self.watchdogs[1] = self.run(self.arena.start())
        elif ended.error is None:
            self.edited.clear()

    def _book(self, operation: Operation, stop: Stop | None) -> None:
        if operation not in self.operations:
            self.operations.append(operation)
        order, booking = operation.order, self.api.booking
        ended = self._perform(
            "booking",
            self.api,
            lambda: (
                booking.book_trade(order, client_trade_id=operation.id)
                if isinstance(order, TradeOrder)
                else booking.book_transfer(order, client_transfer_id=operation.id)
            ),
            stop,
            operation,
        )
        if ended.paused or ended.crashed:
            self.api = self.run(self.arena.start())

    def _perform(
        self,
        doing: str,
        process: SimulatedProcess,
        work: Callable[[], Awaitable[Any]],
        stop: Stop | None,
        operation: Operation | None = None,
        *,
        settle: bool = True,
    ) -> Ended:
        """Let ``process`` do something, and hold what came of it against the model."""
        self.at_rest = False
        if stop is not None and stop.how == "pause" and len(self.paused) >= PAUSED_MAX:
            stop = Stop(stop.gap, "crash", stop.passes)
        ended = self.run(self.arena.perform(doing, process, work, stop))
        if ended.paused:
            self.paused.append((ended, operation))
        if settle:
            self._ended(ended, operation, expected_now=stop is None)
        return ended

    def _ended(self, ended: Ended, operation: Operation | None, *, expected_now: bool = False) -> None:
        """Bring the model up to date, and compare."""
        self.at_rest = False
        self.run(self._note_mark())
        if operation is not None:
            self.run(self._note_operation(ended, operation, expected_now=expected_now))
        elif not ended.paused and ended.error is not None and not ended.crashed:
            away = isinstance(ended.error, OSError) and self.arena.weather.postgres_away
            assert away or isinstance(ended.error, errors.Unavailable), repr(ended.error)
        self._step(ended.steps.doing)

    def _step(self, change: str) -> None:
        self.at_rest = False
        self.run(checks.check_records(self.arena, self.model))
        before, self.stores = self.stores, self.run(self.arena.fingerprint())
        unchanged = before == self.stores and change != "edit"
        counted = self.arena.unchanged if unchanged else self.arena.changes
        counted[change] += 1
        self.at_rest = True

    async def _note_mark(self) -> None:
        version = int(await self.arena.redis.get(keys.MARK_VERSION) or 0)
        accepted, current = (
            await self.arena.redis.hget(keys.mark_key(BTC), "price"),
            await self.arena.redis.get(keys.mark_price_key(BTC)),
        )
        if accepted is not None and current is not None:
            self.model.marked(version, Decimal(keys.as_text(accepted)))
            self.model.set_price(Decimal(keys.as_text(current)))

    async def _note_operation(self, ended: Ended, operation: Operation, *, expected_now: bool) -> None:
        """Apply what was committed; what was answered has to agree with it."""
        remembered: Any = await self.arena.redis.get(operation.key)
        known_before = operation.history_id is not None
        if remembered is not None:
            self.model.apply(operation, remembered)
        if ended.paused or ended.crashed:
            return
        error = ended.error
        if error is None:
            booked = ended.task.result()
            assert remembered is not None, f"{operation} was answered, and Redis does not know it"
            assert not (expected_now and known_before) or booked.outcome == "replayed", operation
            identity = booked.answer.get("trade_id", booked.answer.get("transfer_id"))
            assert int(identity) == operation.history_id, (booked.answer, operation)
            operation.acknowledged = True
        elif isinstance(error, errors.Refusal):
            assert remembered is None, f"{operation} was refused and booked: {error!r}"
            if expected_now:
                expected = self.model.expect(operation)
                assert expected.code == error.code, f"{operation}: {error!r}, the rules say {expected}"
        else:
            assert isinstance(error, errors.Unavailable), repr(error)

    def teardown(self) -> None:
        """Let everything come to rest, and look at all of it."""
        if not self.at_rest:
            return
        self.arena.weather.postgres_away = False
        while self.paused:
            ended, operation = self.paused.pop()
            self.run(self.arena.finish(ended, kill=False))
            self._ended(ended, operation)
        self.run(self._rest())

    async def _rest(self) -> None:
        watchdog = await self.arena.start()
        await watchdog.audit.step()
        await watchdog.outbox.drain()
        await watchdog.sweep()
        await watchdog.outbox.drain()
        await watchdog.store.batcher.close()
        await checks.check_breaches(self.arena, self.model)
        await checks.check_records(self.arena, self.model)
        await checks.check_at_rest(self.arena, self.model, self.operations)
