"""Who may do what: the scope that each route declares, and the gate that asks for it.

A route says what it needs in ``openapi_extra``: ``needs("trade")`` or ``OPEN``. The document at ``/openapi.json`` shows
what is said there, and ``GuardedRoute`` enforces the same; a route that says nothing cannot be made.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

import structlog
from fastapi import Request
from sqlalchemy.ext.asyncio import AsyncEngine

from app import errors, schemas
from app.api_keys import KeyRing, Scope
from app.config import Settings
from app.direct_route import DirectRoute
from app.rate_limits import RateLimits
from app.reach import EVERY_ACCOUNT, Reach

SCHEME: Final = "api_key"
SECURITY_SCHEMES: Final = {
    SCHEME: {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key of `plimsoll keys create`. It is asked for while `PLIMSOLL_AUTH=on`.",
    }
}
OPEN: Final[dict[str, Any]] = {"security": []}
"""What a route says that asks for no key."""

_ACCOUNT_KEYS: Final = "x-account-keys"
_CALLER: Final = "plimsoll.caller"
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    401: schemas.problem_answer("No API key, or no valid one"),
    403: schemas.problem_answer("The API key may not do this"),
    429: schemas.problem_answer("Too many requests with this API key; `Retry-After` says when"),
}

log = structlog.get_logger(__name__)


class KeylessError(Exception):
    """Nobody is asked for a key where strangers could come; the message says which settings decide."""


def needs(scope: Scope, *, account_keys: bool = False) -> dict[str, Any]:
    """What a route says that asks for a key with ``scope``.

    ``account_keys`` lets keys in that are bound to some accounts: the route then keeps to the caller's reach.
    """
    return {"security": [{SCHEME: [scope]}], _ACCOUNT_KEYS: account_keys}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the id of their key, None without keys, and the accounts they may see and touch."""

    key_id: str | None
    reach: Reach


KEYLESS: Final = Caller(None, EVERY_ACCOUNT)


@dataclass(frozen=True, slots=True)
class Access:
    """What one route asks for; ``route`` is its name among the rate limits."""

    scope: Scope
    account_keys: bool
    route: str
    reads: bool


class Gate(Protocol):
    """Lets a request in, or raises what its answer is."""

    async def admit(self, request: Request, access: Access) -> Caller:
        """Who it is that comes in."""


class GuardedRoute(DirectRoute):
    """A route that asks for the scope it declares, before it reads the body. None can be made without declaring."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401 - FastAPI's
        declared = options.get("openapi_extra") or {}
        if "security" not in declared:
            raise TypeError(f"{path} declares neither needs(...) nor OPEN in openapi_extra")
        self.access: Access | None = None
        if declared["security"]:
            ((scope,),) = (requirement[SCHEME] for requirement in declared["security"])
            methods = sorted(options.get("methods") or ["GET"])
            self.access = Access(
                scope=scope,
                account_keys=declared[_ACCOUNT_KEYS],
                route=f"{' '.join(methods)} {path}",
                reads=methods == ["GET"],
            )
            options["responses"] = {**_REFUSALS, **(options.get("responses") or {})}
        options["operation_id"] = options.get("operation_id") or endpoint.__name__
        super().__init__(path, endpoint, **options)

    async def admit(self, request: Request) -> None:
        """Ask the gate of the process, where the route is not open."""
        if self.access is None:
            return
        gate: Gate | None = request.scope["state"]["services"].gate
        if gate is not None:
            request.scope[_CALLER] = await gate.admit(request, self.access)


def caller_of(request: Request) -> Caller:
    """Who sent ``request``, as the gate found."""
    caller: Caller = request.scope.get(_CALLER, KEYLESS)
    return caller


class LoopbackGate:
    """Without keys: this machine and nobody else, wherever the server listens.

    ``plimsoll api`` does not start beyond loopback; ``uvicorn app.main:app`` is told its address by somebody else, so
    whom it serves is decided where the request comes in.
    """

    async def admit(self, request: Request, access: Access) -> Caller:  # noqa: ARG002 - as a Gate
        """Anybody. Raises ``LoopbackOnly`` for a peer that is not this machine."""
        peer = request.scope.get("client")  # None over a unix socket, which is this machine
        if peer is not None and not is_loopback_address(peer[0]):
            raise errors.LoopbackOnly(
                "no API keys are asked for (PLIMSOLL_AUTH=off), so only this machine is served; see PLIMSOLL_AUTH and "
                "PLIMSOLL_ALLOW_KEYLESS"
            )
        return KEYLESS


class KeyGate:
    """With keys: a valid one, with the scope, that reaches far enough, and not too often."""

    def __init__(self, ring: KeyRing, limits: RateLimits | None) -> None:
        self._ring = ring
        self._limits = limits

    async def admit(self, request: Request, access: Access) -> Caller:
        """Whoever has the key. Raises what the route's document lists: 401, 403, 429; and ``StoreUnavailable``."""
        sent = request.headers.getlist("authorization")
        if not sent:
            raise errors.KeyRequired(f"send a key with the scope {access.scope}: Authorization: Bearer plimsoll_...")
        scheme, _, text = sent[0].partition(" ")
        key = await self._ring.find(text.strip()) if len(sent) == 1 and scheme.lower() == "bearer" else None
        if key is None:
            raise errors.KeyInvalid("this is no API key that is known and not revoked")
        structlog.contextvars.bind_contextvars(api_key=key.id)
        if access.scope not in key.scopes:
            raise errors.ScopeMissing(f"the key lacks the scope {access.scope}", scope=access.scope)
        if not access.account_keys and not key.reach.is_whole:
            raise errors.KeyBound("this concerns every account, and the key is bound to some")
        if self._limits is not None:
            await self._limits.count(key.id, access.route, reads=access.reads)
        return Caller(key.id, key.reach)


@asynccontextmanager
async def open_gate(
    settings: Settings, engine: AsyncEngine, *, redis_url: str | None = None
) -> AsyncIterator[Gate | None]:
    """The gate of this process, by its settings; None where everybody may come in. ``redis_url`` limits the rates."""
    if settings.auth == "off":
        yield None if settings.allow_keyless else LoopbackGate()
        return
    limits = None
    if redis_url is not None:
        limits = RateLimits(
            redis_url,
            reads_per_second_max=settings.reads_per_second_max,
            writes_per_second_max=settings.writes_per_second_max,
        )
    ring = KeyRing(
        engine,
        refresh_seconds=settings.keys_refresh_seconds,
        stale_seconds_max=settings.keys_stale_seconds_max,
    )
    await ring.start()
    try:
        yield KeyGate(ring, limits)
    finally:
        await ring.stop()
        if limits is not None:
            await limits.close()


def require_keys_beyond_loopback(settings: Settings, *, host: str, variable: str) -> None:
    """Raise ``KeylessError`` for a server that would let strangers in: no keys, and an address that others reach."""
    if settings.auth == "on" or settings.allow_keyless or is_loopback_host(host):
        return
    raise KeylessError(
        f"{variable}={host} would serve everybody who reaches it without an API key: set PLIMSOLL_AUTH=on, or "
        "PLIMSOLL_ALLOW_KEYLESS=1 if something else keeps strangers out"
    )


def is_loopback_host(host: str) -> bool:
    """Whether everything that ``host`` resolves to is this machine's own loopback."""
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(is_loopback_address(str(address[0])) for *_, address in found)


@lru_cache(maxsize=1024)
def is_loopback_address(address: str) -> bool:
    """Whether ``address`` is a loopback one; what is no address at all is not."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
