"""``plimsoll doctor``: what an operator would look at one by one, each with how to mend it.

It reads with the addresses of the service, so that it sees what the service may do. It changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app import database, errors
from app import redis_client as keys
from app.config import Settings
from app.embedded import Stores
from app.models import Base
from app.outbox import POSTGRES_ERRORS, Outbox
from app.redis_client import StateStore
from app.routes.margin_report import SWEEP_OVERDUE_INTERVALS
from app.sentinel import is_sentinel_url, parse_sentinel_url

Level = Literal["ok", "warn", "fail"]

REDIS_OLDEST: Final = (6, 2)
POSTGRES_OLDEST: Final = 14
CLOCK_SECONDS_WARN: Final = 1.0
CLOCK_SECONDS_FAIL: Final = 30.0
"""Operation ids and ages are reckoned with this machine's clock against times that Redis gave."""

OUTBOX_AGE_SECONDS_WARN: Final = 10.0
MEMORY_FRACTION_WARN: Final = 0.8

FORBIDDEN_IN_REDIS: Final = (
    ("KEYS", "*"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "SET", "appendonly", "no"),
    ("SHUTDOWN",),
    ("DEBUG", "SLEEP", "1"),
    ("ACL", "SETUSER", "somebody"),
)
"""What neither the API nor the watchdog needs. Redis is asked whether it would run them; none is sent."""

RIGHTS_TO_CHANGE: Final = ("UPDATE", "DELETE", "TRUNCATE", "TRIGGER", "REFERENCES")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do about it ('' where nothing is to be done)."""

    check: str
    level: Level
    says: str
    mend: str = ""


def examine(settings: Settings, stores: Stores) -> list[Finding]:
    """Look at everything; a store that does not answer is one failed line, and what needs it is left out."""
    return asyncio.run(_examine(settings, stores))


async def _examine(settings: Settings, stores: Stores) -> list[Finding]:
    store = StateStore(stores.redis_url, settings)
    engine = database.create_engine(stores.database_url)
    findings: list[Finding] = []
    try:
        try:
            findings += await _redis(store)
            findings += await _state(store, settings)
            findings += await _waiting(Outbox(store, engine, settings), store, settings)
        except (RedisError, OSError) as error:
            findings.append(_fail("redis", f"does not answer: {error}", "start Redis, or mend PLIMSOLL_REDIS_URL"))
        try:
            async with engine.connect() as connection:
                findings += await _postgres(connection)
        except POSTGRES_ERRORS as error:
            said = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
            findings.append(
                _fail("postgres", f"does not answer: {said}", "start Postgres, or mend PLIMSOLL_DATABASE_URL")
            )
    finally:
        await store.close()
        await engine.dispose()
    return findings


async def _redis(store: StateStore) -> list[Finding]:
    server: dict[str, Any] = await store.client.info()
    version = str(server["redis_version"])
    supported = tuple(int(part) for part in version.split(".")[:2]) >= REDIS_OLDEST
    findings = [
        _ok("redis version", version)
        if supported
        else _fail("redis version", f"{version} is too old", "run Redis 6.2 or later")
    ]
    configured: dict[str, str | None] | None = None
    try:
        configured = {
            name: (await store.client.config_get(name)).get(name)
            for name in ("appendonly", "appendfsync", "maxmemory-policy", "maxmemory")
        }
    except ResponseError:
        findings.append(
            _warn("redis persistence", "its configuration is hidden from this user", "grant +config|get to the user")
        )
    if configured is not None:
        findings += [_persistence(configured, server), _eviction(configured, server)]
    findings.append(await _access(store))
    before = time.time()
    seconds, microseconds = await store.client.time()
    findings.append(_clock("Redis", seconds + microseconds / 1e6, before, time.time()))
    return findings


def _persistence(configured: dict[str, str | None], server: dict[str, Any]) -> Finding:
    check = "redis persistence"
    if configured["appendonly"] != "yes":
        return _fail(check, "appendonly is no: a restart forgets everything", "set appendonly yes in redis.conf")
    if server.get("aof_last_write_status") != "ok":
        return _fail(check, "the append-only file cannot be written", "look at its disk: full, or read-only")
    if configured["appendfsync"] != "always":
        said = f"appendfsync is {configured['appendfsync']}: a power cut costs up to the last second"
        return _warn(check, said, "set appendfsync always in redis.conf, unless replicas hold what is answered")
    return _ok(check, "every write is on disk before it is answered")


def _eviction(configured: dict[str, str | None], server: dict[str, Any]) -> Finding:
    check, policy, maximum = "redis eviction", configured["maxmemory-policy"], int(configured["maxmemory"] or 0)
    mend = "set maxmemory-policy noeviction in redis.conf"
    if policy != "noeviction":
        if maximum:
            return _fail(check, f"maxmemory-policy is {policy}: accounts will be dropped to make room", mend)
        return _warn(check, f"maxmemory-policy is {policy}, and no maxmemory is set yet", mend)
    used = int(server["used_memory"])
    if maximum and used > MEMORY_FRACTION_WARN * maximum:
        return _warn(check, f"{used / maximum:.0%} of maxmemory is used; beyond, nothing is written", "raise maxmemory")
    return _ok(check, "nothing is dropped to make room")


async def _access(store: StateStore) -> Finding:
    """What this user of Redis may do that the service has no use for."""
    check = "redis access"
    mend = "use the users of deploy/redis/users.acl"
    try:
        user = keys.as_text(await store.client.execute_command("ACL", "WHOAMI"))  # type: ignore[no-untyped-call]
    except ResponseError:
        return _warn(check, "the rights of this user cannot be told", "grant +acl|whoami and +acl|dryrun to the user")
    if user == "default" and store.url.startswith("unix://"):
        return _ok(check, "the default user, over a socket that only its owner may open")
    try:
        allowed = [" ".join(words[:2]) for words in FORBIDDEN_IN_REDIS if await _may(store, user, words)]
    except ResponseError:
        level = _warn if user == "default" else _ok
        return level(check, f"the user {user}; what it may do, only Redis 7 tells", mend if user == "default" else "")
    if allowed:
        return _warn(check, f"the user {user} may {', '.join(allowed)}", mend)
    password = _password(store.url)
    if password == user:
        return _warn(check, f"the password of {user} is its name", "set another in users.acl and in PLIMSOLL_REDIS_URL")
    return _ok(check, f"the user {user} may do what the service needs")


async def _may(store: StateStore, user: str, words: Sequence[str]) -> bool:
    """Whether Redis would run a command of ``user``; an answer that is not OK is its refusal."""
    answer = await store.client.execute_command("ACL", "DRYRUN", user, *words)  # type: ignore[no-untyped-call]
    return keys.as_text(answer) == "OK"


def _password(redis_url: str) -> str | None:
    options = parse_sentinel_url(redis_url).redis_options if is_sentinel_url(redis_url) else parse_url(redis_url)
    password = options.get("password")
    return None if password is None else str(password)


async def _state(store: StateStore, settings: Settings) -> list[Finding]:
    try:
        await store.require_state()
        findings = [_ok("state", "ready")]
    except errors.Unavailable as error:
        findings = [_fail("state", str(error), f"see {error.code} in docs/operations.md")]
    findings.append(await _sweep(store, settings))
    client = store.client
    quarantined, halted = await client.hlen(keys.QUARANTINED), await client.exists(keys.STATE_HALTED)
    findings.append(
        _fail("quarantine", f"{quarantined} accounts are not judged", "redis-cli HGETALL state:quarantined names them")
        if quarantined
        else _ok("quarantine", "every account is judged")
    )
    findings.append(
        _warn("trading", "halted", "`plimsoll resume`, once the reason is gone")
        if halted
        else _ok("trading", "not halted")
    )
    return findings


async def _sweep(store: StateStore, settings: Settings) -> Finding:
    now_us, newest = await store.swept()
    mend = "start a watchdog: `plimsoll watchdog`; its log says what keeps it from sweeping"
    if newest is None:
        return _fail("sweep", "nothing has ever swept: no breach is recorded", mend)
    age_seconds = (now_us - newest[1]) / 1e6
    if age_seconds > SWEEP_OVERDUE_INTERVALS * settings.sweep_interval_seconds + settings.redis_timeout_seconds:
        return _fail("sweep", f"nothing has swept for {age_seconds:.0f} s: no breach is recorded", mend)
    return _ok("sweep", f"{age_seconds:.1f} s ago")


async def _waiting(outbox: Outbox, store: StateStore, settings: Settings) -> list[Finding]:
    waiting = await outbox.state()
    says = f"{waiting.entries} rows wait for Postgres, the oldest for {waiting.oldest_age_seconds:.0f} s"
    mend = "see 'Postgres is away' in docs/operations.md"
    if waiting.entries >= settings.outbox_soft_limit:
        first = _fail("outbox", f"{says}; what adds risk is refused", mend)
    elif waiting.oldest_age_seconds > OUTBOX_AGE_SECONDS_WARN:
        first = _warn("outbox", says, mend)
    else:
        first = _ok("outbox", says if waiting.entries else "no history waits for Postgres")
    dead = await store.client.xlen(keys.OUTBOX_DEAD)
    second = (
        _fail("dead letters", f"{dead} rows that Postgres refused", "see 'Rows in outbox:dead' in docs/operations.md")
        if dead
        else _ok("dead letters", "none")
    )
    return [first, second]


async def _postgres(connection: AsyncConnection) -> list[Finding]:
    version = str(await connection.scalar(text("SHOW server_version")))
    number = int(await connection.scalar(text("SHOW server_version_num")) or 0)
    findings = [
        _ok("postgres version", version)
        if number // 10_000 >= POSTGRES_OLDEST
        else _fail("postgres version", f"{version} is too old", f"run Postgres {POSTGRES_OLDEST} or later")
    ]
    if await connection.scalar(text("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool")):
        findings.append(_fail("postgres writes", "it takes no writes", "PLIMSOLL_DATABASE_URL must name the primary"))
    before = time.time()
    epoch = await connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())::float8"))
    findings.append(_clock("Postgres", float(epoch or 0), before, time.time()))
    migrations = await _migrations(connection)
    findings.append(migrations)
    if migrations.level == "ok":
        findings += [finding async for finding in _rights(connection)]
    return findings


async def _migrations(connection: AsyncConnection) -> Finding:
    """Whether the schema is the one this release was written for."""
    from alembic.config import Config  # noqa: PLC0415 - as in app/database.py
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    check, mend = "migrations", "run `plimsoll migrate` with PLIMSOLL_MIGRATIONS_URL"
    config = Config()
    config.set_main_option("script_location", str(resources.files("app") / "migrations"))
    head = ScriptDirectory.from_config(config).get_current_head()
    if await connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return _fail(check, "there are no tables", mend)
    if not await connection.scalar(text("SELECT has_table_privilege('alembic_version', 'SELECT')")):
        return _fail(check, "this role may not read the tables", mend)
    found = await connection.scalar(text("SELECT version_num FROM alembic_version"))
    if found != head:
        return _fail(check, f"the schema is at {found}, this release is at {head}", mend)
    return _ok(check, f"at {head}")


async def _rights(connection: AsyncConnection) -> AsyncIterator[Finding]:
    """What the service's role may do to the tables, and whether they still refuse changes by themselves."""
    tables = [table.name for table in Base.metadata.sorted_tables]
    user, is_superuser = (
        await connection.execute(text("SELECT current_user, rolsuper FROM pg_roles WHERE rolname = current_user"))
    ).one()
    owned = await connection.scalar(
        text(
            "SELECT bool_or(pg_has_role(relowner, 'MEMBER')) FROM pg_class "
            "WHERE oid = ANY(CAST(:tables AS text[])::regclass[])"
        ),
        {"tables": tables},
    )
    check, mend = "postgres role", "give PLIMSOLL_DATABASE_URL a role of its own, then `plimsoll migrate`"
    missing = await _tables_with(connection, tables, ("SELECT", "INSERT"), granted=False)
    excess = await _tables_with(connection, tables, RIGHTS_TO_CHANGE, granted=True)
    if is_superuser or owned:
        why = "is a superuser" if is_superuser else "owns the tables"
        yield _fail(check, f"{user} {why}: the service could rewrite history", mend)
    elif missing:
        yield _fail(check, f"{user} lacks {', '.join(missing)}", "run `plimsoll migrate` with PLIMSOLL_MIGRATIONS_URL")
    elif excess:
        yield _fail(check, f"{user} has {', '.join(excess)}", "run `plimsoll migrate`, which takes it back")
    else:
        yield _ok(check, f"{user} may read and add rows, and nothing else")
    guarded = set(
        await connection.scalars(
            text(
                "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname = 'immutable' AND tgenabled IN ('O', 'A')"
            )
        )
    )
    if unguarded := sorted(set(tables) - guarded):
        line = f"ALTER TABLE {unguarded[0]} ENABLE TRIGGER immutable"
        yield _fail("immutable history", f"{', '.join(unguarded)} may be changed", f"as the owner: {line}")
    else:
        yield _ok("immutable history", "every table refuses changes, to its owner as well")


async def _tables_with(
    connection: AsyncConnection, tables: Sequence[str], rights: Sequence[str], *, granted: bool
) -> list[str]:
    """Each of ``rights`` to each table that this role has, or has not: ``UPDATE on trades``."""
    query = text(
        "SELECT wanted || ' on ' || name FROM unnest(CAST(:tables AS text[])) AS name, "
        "unnest(CAST(:rights AS text[])) AS wanted WHERE has_table_privilege(name, wanted) = :granted"
    )
    return list(await connection.scalars(query, {"tables": list(tables), "rights": list(rights), "granted": granted}))


def _clock(store: str, theirs: float, before: float, after: float) -> Finding:
    """How far the clock of a store is from this machine's, which was read before and after; in seconds."""
    check = f"clock of {store}"
    apart = max(before - theirs, theirs - after, 0.0)
    if apart <= CLOCK_SECONDS_WARN:
        return _ok(check, f"{apart:.3f} s apart")
    level = _fail if apart > CLOCK_SECONDS_FAIL else _warn
    return level(check, f"{apart:.1f} s apart from this machine's", "let every machine follow one time server (NTP)")


def _ok(check: str, says: str, mend: str = "") -> Finding:
    return Finding(check, "ok", says, mend)


def _warn(check: str, says: str, mend: str) -> Finding:
    return Finding(check, "warn", says, mend)


def _fail(check: str, says: str, mend: str) -> Finding:
    return Finding(check, "fail", says, mend)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The findings to be read, one each, and below it what to do."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        yield f"{finding.level:<4}  {finding.check:<{width}}  {finding.says}"
        if finding.mend:
            yield f"{'':<4}  {'':<{width}}  -> {finding.mend}"
