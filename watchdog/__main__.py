"""``python -m watchdog``: the composition root of the watchdog process."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import structlog
import uvicorn
import uvloop
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import background, database, errors
from app.booking import Booking
from app.collector import spare_the_collector
from app.config import Settings, get_settings
from app.embedded import locate_stores
from app.http_protocol import BoundedHttpProtocol
from app.logging import configure_logging
from app.outbox import Outbox
from app.reconcile import keep_reconciled
from app.redis_client import StateStore
from app.security import open_gate, require_keys_beyond_loopback
from app.sentinel import connection_pool
from app.start_refusal import say_refusal
from watchdog.audit import Audit
from watchdog.invariants import Invariants
from watchdog.refresh import Refresher
from watchdog.schedule import AfterSweep, guard, start_timer
from watchdog.server import create_server
from watchdog.subscription import listen
from watchdog.sweep import Sweeper

SUBSCRIPTION_HEALTH_SECONDS = 5

log = structlog.get_logger(__name__)


class PageServer(uvicorn.Server):
    """Serves the watchdog's page; signals stay the watchdog's, which has to put its sweep and its outbox in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers alone."""
        yield


async def watch(settings: Settings) -> None:
    """Sweep until SIGINT or SIGTERM."""
    stores = locate_stores(settings)
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    subscriber = Redis(
        connection_pool=connection_pool(
            stores.redis_url,
            max_connections=1,
            timeout_seconds=settings.redis_timeout_seconds,
            socket_connect_timeout=settings.redis_timeout_seconds,
            health_check_interval=SUBSCRIPTION_HEALTH_SECONDS,
        )
    )
    writer = database.create_engine(stores.database_url, pool_size=database.WRITER_POOL_SIZE)
    outbox = Outbox(store, writer, settings)
    booking = Booking(store, outbox, settings)
    sweeper, audit = Sweeper(booking, Refresher(booking)), Audit(booking)
    invariants = Invariants(booking, engine)

    async def audit_unless_unavailable() -> None:
        try:
            await audit.step(give_way=sweeper.idle, rest_seconds=settings.sweep_interval_seconds / 2)
        except (errors.Unavailable, RedisError, OSError) as error:
            log.warning("no audit", reason=str(error))

    with suppress(RedisError, OSError):
        # One that is down is looked at when it has come up, which is a restart.
        await store.check_durability(allow_unsafe=settings.allow_unsafe_redis)
    await outbox.start()
    spare_the_collector()
    after_sweep = AfterSweep(audit_unless_unavailable)
    scheduler = start_timer(after_sweep, sweeper, interval_seconds=settings.sweep_interval_seconds)
    tasks = [
        asyncio.create_task(sweeper.run(), name="sweeper"),
        asyncio.create_task(after_sweep.run(), name="audit"),
        asyncio.create_task(listen(subscriber, sweeper), name="subscription"),
        asyncio.create_task(
            guard(sweeper, interval_seconds=settings.sweep_interval_seconds, scheduler=scheduler), name="guard"
        ),
        asyncio.create_task(keep_reconciled(store, engine, settings), name="reconcile"),
        asyncio.create_task(invariants.run(), name="invariants"),
    ]

    def stop_if_failed(task: asyncio.Task[None]) -> None:
        # None of these ever ends by itself: a watchdog that lacks one must not look alive.
        if not task.cancelled():
            log.critical("a task ended; the watchdog stops", task=task.get_name(), error=repr(task.exception()))
            server.should_exit = True

    opened = AsyncExitStack()
    gate = await opened.enter_async_context(open_gate(settings, writer))
    server = PageServer(
        uvicorn.Config(
            create_server(booking, sweeper, gate),
            host=settings.watchdog_host,
            port=settings.watchdog_port,
            http=BoundedHttpProtocol,
            log_config=None,
            log_level="warning",
            access_log=False,
        )
    )

    for task in tasks:
        task.add_done_callback(stop_if_failed)

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, invariants.ask)
    log.info("the watchdog starts", page=f"http://{settings.watchdog_host}:{settings.watchdog_port}")
    try:
        await server.serve()
    finally:
        await opened.aclose()
        scheduler.shutdown(wait=False)
        await background.end(tasks)
        await outbox.stop()
        await subscriber.aclose()
        await store.close()
        await writer.dispose()
        await engine.dispose()


def main() -> None:
    """Run the watchdog of this process's settings."""
    configure_logging("info", process="watchdog")
    try:
        settings = get_settings()
        configure_logging(settings.log_level, process="watchdog")
        require_keys_beyond_loopback(settings, host=settings.watchdog_host, variable="PLIMSOLL_WATCHDOG_HOST")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(watch(settings))
    except Exception as error:
        if not say_refusal(error):
            raise
        sys.exit(1)


if __name__ == "__main__":
    main()
