"""API keys: made and revoked as inserted rows in Postgres, and the copy of them that a process opens its routes by.

A key is ``plimsoll_<id>_<secret>``. The id is no secret: logs, lists and rows name a key by it. Of the secret, 256
random bits, only the SHA-256 is kept: they cannot be guessed, so a slow hash would only slow every request down.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeVar, get_args

import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import background, errors
from app.database import create_engine
from app.models import ApiKey, ApiKeyRevocation
from app.outbox import POSTGRES_ERRORS
from app.reach import WILDCARD, Reach

Done = TypeVar("Done")
Scope = Literal["read", "trade", "mark", "operate"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

KEYS_MAX: Final = 10_000
"""Not revoked, at the same time: every process holds all of them."""

LOOK_AGAIN_SECONDS: Final = 0.1
"""A key nobody knows is looked for at most this often, however many requests send one."""

ID_BYTES: Final = 6
SECRET_BYTES: Final = 32
_KEY: Final = re.compile(rf"plimsoll_([0-9a-f]{{{2 * ID_BYTES}}})_([0-9a-f]{{{2 * SECRET_BYTES}}})")
_ACCOUNTS: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}|[A-Za-z0-9_.\-]{0,63}\*")
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
_NO_SECRET: Final = bytes(32)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is not revoked: what it may do, to which accounts, and the hash of its secret."""

    id: str
    scopes: frozenset[str]
    reach: Reach
    secret_sha256: bytes


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key as ``plimsoll keys list`` shows it; ``revoked`` is None while it opens anything."""

    id: str
    name: str
    scopes: tuple[str, ...]
    accounts: tuple[str, ...]
    created: datetime
    revoked: datetime | None


async def create_key(
    engine: AsyncEngine, *, name: str, scopes: Sequence[str], accounts: Sequence[str], now: datetime
) -> tuple[str, str]:
    """Insert a key; its id, and the key itself, which nothing can show again. No accounts means every account.

    Raises ``InvalidField`` for a key that cannot be meant.
    """
    _check(name, scopes, accounts)
    key_id, secret = secrets.token_hex(ID_BYTES), secrets.token_hex(SECRET_BYTES)
    async with engine.begin() as connection:
        count = await connection.scalar(
            select(func.count()).select_from(ApiKey).where(~ApiKey.id.in_(select(ApiKeyRevocation.key_id)))
        )
        if (count or 0) >= KEYS_MAX:
            raise errors.InvalidField(f"there are {count} keys already; revoke some first", field="name")
        await connection.execute(
            insert(ApiKey).values(
                id=key_id,
                name=name,
                secret_sha256=_sha256(secret),
                scopes=list(dict.fromkeys(scopes)),
                accounts=list(dict.fromkeys(accounts)) or [WILDCARD],
                timestamp=now,
            )
        )
    return key_id, f"plimsoll_{key_id}_{secret}"


def _check(name: str, scopes: Sequence[str], accounts: Sequence[str]) -> None:
    if not _NAME.fullmatch(name):
        raise errors.InvalidField("a key needs a name of 1 to 64 characters", field="name")
    if not scopes or not set(scopes) <= set(SCOPES):
        raise errors.InvalidField(f"a key needs scopes out of {', '.join(SCOPES)}", field="scope")
    for item in accounts:
        if not _ACCOUNTS.fullmatch(item):
            raise errors.InvalidField("an account is its id, or a prefix that ends in *", field="account")
    if "trade" in scopes and not accounts:
        raise errors.InvalidField("say whose trades: --account ID, a prefix 'desk-*', or '*' for all", field="account")
    if "mark" in scopes and accounts and not Reach.of(accounts).is_whole:
        raise errors.InvalidField("a mark moves every account: `mark` goes with no account, or '*'", field="account")


async def revoke_key(engine: AsyncEngine, key_id: str, *, now: datetime) -> bool:
    """Revoke a key for good; False where there is no such key. Twice is once."""
    async with engine.begin() as connection:
        if await connection.scalar(select(ApiKey.id).where(ApiKey.id == key_id)) is None:
            return False
        await _revoke(connection, [key_id], now)
        return True


async def replace_key(
    engine: AsyncEngine, *, name: str, scopes: Sequence[str], accounts: Sequence[str], now: datetime
) -> str:
    """A new key under a name whose older keys are revoked: for a process that keeps its key in memory alone."""
    async with engine.begin() as connection:
        query = select(ApiKey.id).where(ApiKey.name == name, ~ApiKey.id.in_(select(ApiKeyRevocation.key_id)))
        await _revoke(connection, list(await connection.scalars(query)), now)
    return (await create_key(engine, name=name, scopes=scopes, accounts=accounts, now=now))[1]


async def _revoke(connection: AsyncConnection, key_ids: Sequence[str], now: datetime) -> None:
    for key_id in key_ids:
        row = insert(ApiKeyRevocation).values(key_id=key_id, timestamp=now)
        await connection.execute(row.on_conflict_do_nothing())


async def list_keys(engine: AsyncEngine) -> list[ListedKey]:
    """Every key there ever was, oldest first, without its secret."""
    query = (
        select(ApiKey.id, ApiKey.name, ApiKey.scopes, ApiKey.accounts, ApiKey.timestamp, ApiKeyRevocation.timestamp)
        .outerjoin(ApiKeyRevocation, ApiKeyRevocation.key_id == ApiKey.id)
        .order_by(ApiKey.timestamp, ApiKey.id)
    )
    async with engine.connect() as connection:
        return [
            ListedKey(key_id, name, tuple(scopes), tuple(accounts), created, revoked)
            for key_id, name, scopes, accounts, created, revoked in (await connection.execute(query)).all()
        ]


async def with_engine(database_url: str, act: Callable[[AsyncEngine], Awaitable[Done]]) -> Done:
    """``act`` on an engine of its own, for one command."""
    engine = create_engine(database_url)
    try:
        return await act(engine)
    finally:
        await engine.dispose()


class KeyRing:
    """The keys that are not revoked, as one process last read them.

    It is read again every ``refresh_seconds``, which bounds how long a revoked key still opens anything. While Postgres
    is away nobody can revoke a key there, and the copy goes on serving, for ``stale_seconds_max``: a process that is
    merely cut off from Postgres must not take a revoked key for ever.
    """

    def __init__(self, engine: AsyncEngine, *, refresh_seconds: float, stale_seconds_max: float) -> None:
        self._engine = engine
        self._refresh_seconds = refresh_seconds
        self._stale_seconds_max = stale_seconds_max
        self._keys: dict[str, Key] = {}
        self._read_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._complaint = ""

    async def start(self) -> None:
        """Read the keys, if Postgres is there, and go on reading them."""
        await self._read()
        self._refreshing = asyncio.create_task(self._refresh_forever(), name="api keys")

    async def stop(self) -> None:
        """End the reading."""
        await background.end([task for task in (self._refreshing, self._looking) if task is not None])

    async def find(self, text: str) -> Key | None:
        """The key that ``text`` is; None for anything else, a revoked key among it.

        Raises ``StoreUnavailable`` when Postgres has been away for too long to tell.
        """
        parts = _KEY.fullmatch(text)
        if parts is None:
            return None
        if asyncio.get_running_loop().time() - self._read_at > self._stale_seconds_max:
            raise errors.StoreUnavailable("the API keys cannot be read from Postgres", reason="postgres")
        key_id, secret = parts.groups()
        if key_id not in self._keys:
            await self._look_again()
        key = self._keys.get(key_id)
        # Compared in constant time, and for an id that nobody has as well.
        if hmac.compare_digest(_sha256(secret), _NO_SECRET if key is None else key.secret_sha256):
            return key
        return None

    async def _look_again(self) -> None:
        """Read the keys once for all who ask: a key works as soon as it was made."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._read_soon(), name="look for an api key")
        # Who hangs up must not take the answer from the others.
        await asyncio.shield(self._looking)

    async def _read_soon(self) -> None:
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
        await self._read()

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            try:
                await self._read()
            except Exception:
                log.exception("the API keys could not be read; it is tried again")

    async def _read(self) -> None:
        """Read all keys; while Postgres is away they stay as they were."""
        began_at = asyncio.get_running_loop().time()
        query = (
            select(ApiKey.id, ApiKey.scopes, ApiKey.accounts, ApiKey.secret_sha256)
            .where(~ApiKey.id.in_(select(ApiKeyRevocation.key_id)))
            .order_by(ApiKey.timestamp)
            .limit(KEYS_MAX)
        )
        try:
            async with self._engine.connect() as connection:
                found = (await connection.execute(query)).all()
        except POSTGRES_ERRORS as error:
            if self._complaint != type(error).__name__:
                self._complaint = type(error).__name__
                log.warning("the API keys cannot be read; those known go on", error=repr(error), known=len(self._keys))
            return
        # A reading that began earlier must not undo a later one: a revoked key would come back.
        if began_at < self._read_at:
            return
        self._read_at, self._complaint = began_at, ""
        self._keys = {
            key_id: Key(key_id, frozenset(scopes), Reach.of(accounts), secret_sha256)
            for key_id, scopes, accounts, secret_sha256 in found
        }


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
