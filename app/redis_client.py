"""Redis: its connections, every key's name, and the scripts that write.

Every key is made here and nowhere else. ``account:{id}:balance``, ``account:{id}:equity``,
``account:{id}:used_margin``, ``positions:{id}`` and ``mark_price:{symbol}`` are the user's; the rest is Plimsoll's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app import errors
from app.batcher import Batcher, NotReplicatedError, NotSentError
from app.config import Settings
from app.contracts import contracts_digest
from app.sentinel import connection_pool, is_sentinel_url

log = structlog.get_logger(__name__)

LAYOUT_VERSION: Final = 4
"""Moves on when keys or scripts change so that an older release must not write beside a newer."""

MARK_CHANNEL: Final = "mark_price"
STATE_EPOCH: Final = "state:epoch"
STATE_RUN_ID: Final = "state:run_id"
STATE_RECONCILER: Final = "state:reconciler"
"""Who began to reconcile or rebuild last: only that one may let writes go."""

STATE_HALTED: Final = "state:halted"
STATE_SWEPT: Final = "state:swept"
QUARANTINED: Final = "state:quarantined"
"""A hash from the accounts whose keys cannot be read to the reason."""

MARK_VERSION: Final = "mark:version"
HISTORY_LAST_ID: Final = "history:last_id"
OUTBOX: Final = "outbox"
OUTBOX_DEAD: Final = "outbox:dead"
OUTBOX_ANEW: Final = "outbox:anew"
ACCOUNTS: Final = "accounts"
COLUMN_BALANCE: Final = "columns:balance"
COLUMN_BREACH: Final = "columns:breach"
CHANGED: Final = "columns:changed"
"""The slots of the rows that changed last, packed, which says what a sweep has to read again; without it, every row.

They come after the number of changes before them (``app/scripts/guard.lua`` ``note_changes``).
"""

LIQUIDATIONS: Final = "counters:liquidations"
RECOVERIES: Final = "counters:recoveries"
RATE_LIMIT_PREFIX: Final = "limits"
"""Before the counters of API keys' requests, which are no state: they may be lost at any time."""

BALANCE_PATTERN: Final = "account:*:balance"
ACCOUNT_PREFIXES: Final = ("account:", "positions:")
"""How the keys of a single account begin: what is wrong with one of them concerns that account alone."""

ACCOUNTS_REMEMBERED: Final = 16_384
"""Accounts whose keys are not made again; about half a kilobyte each."""

REFUSED_BEFORE_WRITING: Final = ("OOM", "MISCONF", "LOADING", "READONLY", "NOREPLICAS", "NOAUTH", "NOPERM", "BUSY")


def as_text(answer: bytes | str) -> str:
    """An answer of Redis as text, whichever of the two redis-py's types allow it is."""
    return answer if isinstance(answer, str) else answer.decode(errors="replace")


def balance_key(account_id: str) -> str:
    """A number: the account's cash in USDT. The account exists iff this key does."""
    return f"account:{account_id}:balance"


def equity_key(account_id: str) -> str:
    """A number for the user to read; no decision does."""
    return f"account:{account_id}:equity"


def used_margin_key(account_id: str) -> str:
    """A number for the user to read; no decision does."""
    return f"account:{account_id}:used_margin"


def positions_key(account_id: str) -> str:
    """A hash from symbol to JSON ``{"quantity", "avg_price", "cost"}``; a flat position has no field."""
    return f"positions:{account_id}"


def ledger_key(account_id: str) -> str:
    """A hash of what history knows of the account: ``slot``, ``seq``, ``breach``, ``breach_at``, ``breach_version``.

    And what its last change left, packed: ``balance``, and ``position:{symbol}`` (quantity, then cost).
    """
    return f"account:{account_id}:ledger"


def ledger_position(symbol: str) -> str:
    """The field of the ledger that holds the position in ``symbol``; missing where there never was one."""
    return f"position:{symbol}"


def operation_key(kind: str, account_id: str, operation_id: str) -> str:
    """The first result of an operation id, kept for 24 hours."""
    return f"operation:{kind}:{account_id}:{operation_id}"


def mark_price_key(symbol: str) -> str:
    """A number: the mark price in USDT. It may be set by hand."""
    return f"mark_price:{symbol}"


def mark_key(symbol: str) -> str:
    """A hash: the ``price`` accepted last, its ``version`` and its ``timestamp`` in microseconds."""
    return f"mark:{symbol}"


def quantity_column(symbol: str) -> str:
    """The packed quantities of every account in ``symbol``."""
    return f"columns:{symbol}:quantity"


def cost_column(symbol: str) -> str:
    """The packed costs of every account in ``symbol``."""
    return f"columns:{symbol}:cost"


def open_positions_key(symbol: str) -> str:
    """How many accounts have an open position in ``symbol``."""
    return f"columns:{symbol}:open"


@lru_cache(maxsize=ACCOUNTS_REMEMBERED)
def account_keys(account_id: str) -> tuple[str, str, str, str, str]:
    """Balance, positions, ledger, equity and used margin of one account; made once for one that is met again."""
    return (
        balance_key(account_id),
        positions_key(account_id),
        ledger_key(account_id),
        equity_key(account_id),
        used_margin_key(account_id),
    )


def keys_of_symbols(symbols: Iterable[str]) -> list[str]:
    """The keys that ``read_account`` looks up for ``symbols``, in its order."""
    return [
        key
        for symbol in symbols
        for key in (mark_price_key(symbol), mark_key(symbol), quantity_column(symbol), cost_column(symbol))
    ]


@dataclass(frozen=True)
class Script:
    """A Lua script of ``app/scripts``, with the guard that every one starts with, and what it ``uses`` besides."""

    name: str
    writes: bool = True
    uses: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        """The whole source as Redis gets it."""
        folder = resources.files("app") / "scripts"
        return "".join((folder / f"{name}.lua").read_text() for name in ("guard", *self.uses, self.name))

    @cached_property
    def sha(self) -> str:
        """The name that Redis knows the source by."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


CHECK: Final = Script("check", writes=False)
READ_ACCOUNT: Final = Script("read_account", writes=False, uses=("snapshot",))
COMMIT: Final = Script("commit", uses=("snapshot",))
BREACH: Final = Script("breach")
MARK: Final = Script("mark")
PUT_ASIDE: Final = Script("put_aside")
SWEPT: Final = Script("swept")
REFRESH: Final = Script("refresh")
REPACK: Final = Script("repack")
LEDGER_ROWS: Final = Script("ledger_rows", writes=False)
COLUMNS: Final = Script("columns")
CHANGED_ROWS: Final = Script("changed_rows", writes=False)


class StateStore:
    """The connections of one process to Redis, and the calls of its scripts.

    ``client`` serves reads, streams and subscriptions; ``batcher`` carries the script calls, with retries off: a
    write that timed out may have been applied, and only its operation id can tell.
    """

    def __init__(self, redis_url: str, settings: Settings) -> None:
        self.url = redis_url
        self._replicas = settings.redis_wait_replicas
        if self._replicas is None:
            self._replicas = 1 if is_sentinel_url(redis_url) else 0
        self.signature = f"{LAYOUT_VERSION}:{contracts_digest(settings.contracts)}:{settings.restore_at}"
        options: dict[str, Any] = {
            "socket_timeout": settings.redis_timeout_seconds,
            "socket_connect_timeout": settings.redis_timeout_seconds,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
        }
        self.client = Redis(
            connection_pool=connection_pool(
                redis_url, max_connections=16, timeout_seconds=settings.redis_timeout_seconds, **options
            )
        )
        self.request_seconds = settings.request_seconds
        # A request makes two calls, a read and a commit. A new connection to a Redis that stands still waits as well:
        # for the answer to its greeting.
        self.call_seconds = settings.redis_timeout_seconds / 2
        self._pool = connection_pool(
            redis_url,
            max_connections=4,
            timeout_seconds=self.call_seconds,
            # The batcher bounds a pipeline as a whole.
            **{**options, "socket_timeout": None, "socket_connect_timeout": self.call_seconds},
        )
        self.batcher = Batcher(self._pool, timeout_seconds=self.call_seconds, replicas=self._replicas)

    async def close(self) -> None:
        """Wait for the calls under way, and close every connection."""
        await self.batcher.close()
        await self._pool.disconnect()
        await self.client.aclose()

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> list[Any]:
        """Call ``script`` and answer its list, the first item of which says what happened, as text.

        Raises the ``Unavailable`` that a refusal of the guard means, ``AccountQuarantined`` for a key of the wrong
        type, ``StoreUnavailable`` when nothing was sent, and ``OutcomeUnknown`` when it was sent and no answer came.
        """
        try:
            answer = await self.batcher.evaluate(script.sha, script.text, keys, arguments, replicated=script.writes)
        except NotSentError as error:
            raise errors.StoreUnavailable("Redis cannot be reached", reason="redis") from error
        except NotReplicatedError as error:
            raise errors.OutcomeUnknown(
                "no replica of Redis has it yet; ask for the operation id before sending anything new", reason="redis"
            ) from error
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            if not script.writes:
                raise errors.StoreUnavailable("Redis did not answer in time", reason="redis") from error
            raise errors.OutcomeUnknown(
                "Redis did not answer in time; ask for the operation id before sending anything new", reason="redis"
            ) from error
        except ResponseError as error:
            # Memory and disk are refused at a script's first write; any other error may have come after one.
            if script.writes and not any(name in str(error) for name in REFUSED_BEFORE_WRITING):
                raise errors.OutcomeUnknown(f"Redis failed: {error}"[:200], reason="redis") from error
            raise errors.StoreUnavailable(f"Redis refuses: {error}"[:200], reason="redis") from error
        return checked(answer)

    async def check_durability(self, *, allow_unsafe: bool) -> None:
        """Raise ``UnsafeRedis`` for a Redis that would forget or evict; say so when it syncs less than every write.

        A Redis whose ACL keeps its configuration to itself is taken at its operator's word.
        """
        try:
            found = {
                name: (await self.client.config_get(name)).get(name)
                for name in (
                    *("appendonly", "appendfsync", "maxmemory-policy", "maxmemory"),
                    *("min-replicas-to-write", "min-replicas-max-lag"),
                )
            }
        except ResponseError:
            log.info("the persistence of Redis could not be checked")
            return
        faults = []
        if found["appendonly"] != "yes":
            faults.append("appendonly is not yes: a restart forgets everything")
        if found["maxmemory"] != "0" and found["maxmemory-policy"] != "noeviction":
            faults.append(f"maxmemory-policy is {found['maxmemory-policy']}: keys would be evicted")
        if is_sentinel_url(self.url) and (
            not self._replicas or found["min-replicas-to-write"] == "0" or found["min-replicas-max-lag"] == "0"
        ):
            faults.append(
                "behind Sentinel, without min-replicas-to-write, min-replicas-max-lag and PLIMSOLL_REDIS_WAIT_REPLICAS "
                "of at least 1, an old master takes writes that nobody will ever see"
            )
        if faults and not allow_unsafe:
            raise errors.UnsafeRedis(
                f"Redis would lose state: {'; '.join(faults)}. Mend it, or set PLIMSOLL_ALLOW_UNSAFE_REDIS=1",
                reason="unsafe_redis",
            )
        if faults:
            log.warning("Redis would lose state", faults=faults)
        elif found["appendfsync"] != "always":
            log.warning("Redis does not sync every write; a power cut may cost the last second", **found)

    async def swept(self) -> tuple[int, tuple[int, int] | None]:
        """Redis TIME in microseconds, and the version swept with the time of the newest sweep, if there was one."""
        async with self.client.pipeline(transaction=True) as pipeline:
            pipeline.time()
            pipeline.hmget(STATE_SWEPT, "version", "at")
            (seconds, microseconds), (version, at) = await pipeline.execute()
        known = version is not None and version.isdigit() and at is not None and at.isdigit()
        return seconds * 1_000_000 + microseconds, (int(version), int(at)) if known else None

    async def require_state(self) -> tuple[int, int]:
        """The mark version and the version swept. Raises the ``Unavailable`` that keeps this process from writing."""
        keys = [STATE_EPOCH, STATE_RUN_ID, MARK_VERSION, STATE_SWEPT]
        _, mark_version, swept_version = await self.run(CHECK, keys, [self.signature])
        return int(mark_version), int(swept_version)


def checked(answer: list[Any]) -> list[Any]:
    """What a script answered, to all it was asked or to a part: what happened, its first item, becomes text.

    Raises the error that a refusal means.
    """
    answer[0] = answer[0].decode()
    if answer[0] != "ok":
        _raise_refusal(answer)
    return answer


def _raise_refusal(answer: Sequence[Any]) -> None:
    """Turn the refusals that any script may answer into the error each one means."""
    match answer[0]:
        case "state_missing":
            raise errors.StateMissing(
                "Redis holds no state: run `plimsoll migrate` for a new system, `plimsoll rebuild` to restore it from "
                "history, or `plimsoll reset` to start over",
                reason="state_missing",
            )
        case "state_frozen":
            raise errors.StateFrozen("the state is frozen while it is being restored", reason="state_frozen")
        case "state_mismatch":
            raise errors.StateMismatch(
                "Redis was written under other contracts or by another release", reason="state_mismatch"
            )
        case "state_unreconciled":
            raise errors.StateUnreconciled(
                "Redis restarted and is being compared with history", reason="state_unreconciled"
            )
        case "out_of_memory":
            raise errors.StoreUnavailable("Redis has reached its maxmemory and takes no writes", reason="redis_memory")
        case "outbox_full":
            raise errors.OutboxFull("history waits for Postgres; try again later", reason="outbox_full")
        case "columns_short":
            raise errors.ColumnsShort(f"{as_text(answer[1])} was lost; it is made anew", reason="columns")
        case "wrong_type":
            key = as_text(answer[1])
            if key.startswith(ACCOUNT_PREFIXES):
                raise errors.AccountQuarantined(f"the key {key} is not what it should be", reason="wrong_type")
            raise errors.StateDamaged(f"the key {key} is not what it should be", reason="state_damaged")
        case _:
            return
