"""Every route × every key × own and foreign accounts, as the OpenAPI document lists them: the right scope, no other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import iter_route_contexts

from app.api_keys import SCOPES
from app.embedded import Stores
from app.errors import InvalidField
from app.main import create_app
from app.security import OPEN, GuardedRoute, needs
from tests.integration.desk import Desk, api_in_this_process, bearer, expect, new_key, revoke

pytestmark = pytest.mark.asyncio(loop_scope="module")

OWN, FOREIGN, NOBODY = "own", "foreign", "nobody"
DOCUMENTATION: Final = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/static-offline-docs"}
OPEN_ROUTES: Final = {"/", "/health/live", "/health/ready"}
OPENAPI: Final[dict[str, Any]] = create_app().openapi()


@dataclass(frozen=True)
class Operation:
    """One method of one route, and how to send something to it that works."""

    method: str
    path: str
    scope: str
    account_keys: bool
    body: dict[str, Any] | None = None
    filters_by_account: bool = False

    def __str__(self) -> str:
        return f"{self.method.upper()} {self.path}"

    @property
    def names_an_account(self) -> bool:
        """Whether a request is about one account, rather than filtered by one or about all."""
        return "{account_id}" in self.path or "account_id" in (self.body or {})

    def request(self, account: str) -> dict[str, Any]:
        """What to send, about ``account``."""
        body = self.body and {**self.body, **({"account_id": account} if "account_id" in self.body else {})}
        return {
            "method": self.method.upper(),
            "url": self.path.format(account_id=account),
            "params": {"account_id": account} if self.filters_by_account else {},
            **({"json": body} if body else {}),
        }


def operations() -> list[Operation]:
    """All that ask for a key: those of the document, with its examples, and those that are left out of it."""
    found = []
    for path, methods in OPENAPI["paths"].items():
        for method, described in methods.items():
            if not described["security"]:
                continue
            body = None
            if "requestBody" in described:
                schema = described["requestBody"]["content"]["application/json"]["schema"]
                body = OPENAPI["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["example"]
            found.append(
                Operation(
                    method,
                    path,
                    scope=described["security"][0]["api_key"][0],
                    account_keys=described["x-account-keys"],
                    body=body,
                    filters_by_account="account_id"
                    in {item["name"] for item in described.get("parameters", []) if item["in"] == "query"},
                )
            )
    listed = {operation.path for operation in found}
    for route in guarded_routes():
        if route.path not in listed and route.access is not None:
            assert route.methods == {"GET"}
            found.append(Operation("get", route.path, route.access.scope, route.access.account_keys))
    return found


def guarded_routes() -> list[GuardedRoute]:
    """Every route of ours, those out of the document too."""
    originals = [context.original_route for context in iter_route_contexts(create_app().routes)]
    return [route for route in originals if isinstance(route, GuardedRoute)]


OPERATIONS: Final = operations()
NO_KEYS: Final = ("none", "basic", "not a key", "two keys", "unknown", "wrong secret", "revoked")
# A mark moves every account: a key for marks cannot be bound.
WITH_KEYS: Final = (*(f"{scope} whole" for scope in SCOPES), *(f"{scope} bound" for scope in SCOPES if scope != "mark"))
CASES: Final = [
    *((caller, OWN) for caller in NO_KEYS),
    *((caller, account) for caller in WITH_KEYS for account in (OWN, FOREIGN)),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shared_stores: Stores) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key, of an API that asks for one; two accounts exist, with a position each."""
    async with api_in_this_process(
        shared_stores,
        auth="on",
        keys_refresh_seconds="0.2",
        reads_per_second_max="100000",
        writes_per_second_max="100000",
    ) as client:
        client.headers.update(bearer(await new_key(shared_stores, *SCOPES)))
        desk = Desk(client)
        await desk.mark("60000")
        for account in (OWN, FOREIGN):
            await desk.deposit(account, "1000000")
            await desk.buy(account, "0.1", "60000")
        del client.headers["Authorization"]
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def callers(client: httpx.AsyncClient, shared_stores: Stores) -> dict[str, list[tuple[str, str]]]:
    """The headers of each caller."""
    key = await new_key(shared_stores, *SCOPES)
    other = await new_key(shared_stores, *SCOPES)
    revoked = await new_key(shared_stores, *SCOPES)
    assert (await client.get("/trades", headers=bearer(revoked))).status_code == 200
    await revoke(shared_stores, revoked)
    made: dict[str, list[tuple[str, str]]] = {
        "none": [],
        "basic": [("Authorization", f"Basic {key}")],
        "not a key": [("Authorization", "Bearer ey.not.ours")],
        "two keys": [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {other}")],
        "unknown": [("Authorization", f"Bearer plimsoll_{'0' * 12}_{key[-64:]}")],
        "wrong secret": [("Authorization", f"Bearer {key[:-64]}{other[-64:]}")],
        "revoked": [("Authorization", f"Bearer {revoked}")],
    }
    for caller in WITH_KEYS:
        scope, reach = caller.split()
        made[caller] = list(
            bearer(await new_key(shared_stores, scope, accounts=[OWN if reach == "bound" else "*"])).items()
        )
    async with api_in_this_process(shared_stores, auth="on") as fresh:
        assert (await fresh.get("/trades", headers=bearer(revoked))).status_code == 401
    return made


def expected(operation: Operation, caller: str, account: str) -> str:
    """``ok``, ``empty`` for a page without rows, or the code of the refusal."""
    if caller in NO_KEYS:
        return "key_required" if caller == "none" else "key_invalid"
    scope, reach = caller.split()
    if scope != operation.scope:
        return "scope_missing"
    if reach == "whole" or (operation.account_keys and account == OWN):
        return "ok"
    if not operation.account_keys:
        return "key_bound"
    return "unknown_account" if operation.names_an_account else "empty"


@pytest.mark.parametrize(("caller", "account"), CASES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
async def test_the_right_scope_gets_in_and_no_other(
    operation: Operation, caller: str, account: str, client: httpx.AsyncClient, callers: dict[str, Any]
) -> None:
    answer = await client.request(**operation.request(account), headers=callers[caller])
    try:
        wanted = expected(operation, caller, account)
        if wanted in {"ok", "empty"}:
            assert answer.is_success, answer.text
            assert wanted == "ok" or answer.json()["items"] == []
            return
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["code"] == wanted
        assert str(answer.status_code) in OPENAPI["paths"].get(operation.path, {}).get(operation.method, {}).get(
            "responses", [str(answer.status_code)]
        )
        assert ("WWW-Authenticate" in answer.headers) == (answer.status_code == 401)
    finally:
        if operation.path == "/halt":
            await client.post("/resume", json={"reason": "the test is over"}, headers=callers["operate whole"])


async def test_the_matrix_has_every_route() -> None:
    contexts = iter_route_contexts(create_app().routes)
    everything = {context.path or str(getattr(context.original_route, "path", "")) for context in contexts}
    assert everything - {operation.path for operation in OPERATIONS} == OPEN_ROUTES | DOCUMENTATION
    guarded = {route.path for route in guarded_routes()}
    assert everything - guarded == DOCUMENTATION
    assert {operation.scope for operation in OPERATIONS} == set(SCOPES)


async def test_a_route_that_declares_no_scope_cannot_be_made() -> None:
    async def endpoint() -> None: ...

    for declared in ({}, {"openapi_extra": {"x-account-keys": True}}):
        with pytest.raises(TypeError, match="/new declares neither"):
            GuardedRoute("/new", endpoint, **declared)
    assert GuardedRoute("/new", endpoint, openapi_extra=OPEN).access is None
    guarded = GuardedRoute("/new", endpoint, methods=["GET"], openapi_extra=needs("read"))
    assert guarded.access is not None
    assert guarded.access.scope == "read"


@pytest.mark.parametrize("path", sorted(OPEN_ROUTES | DOCUMENTATION - {"/static-offline-docs"}))
async def test_health_and_documentation_ask_for_no_key(path: str, client: httpx.AsyncClient) -> None:
    assert (await client.get(path)).status_code in {200, 307}


async def test_a_foreign_account_is_answered_as_one_that_does_not_exist(
    client: httpx.AsyncClient, callers: dict[str, Any]
) -> None:
    for operation in OPERATIONS:
        if not (operation.names_an_account and operation.account_keys):
            continue
        bound, whole = (callers[f"{operation.scope} {reach}"] for reach in ("bound", "whole"))
        foreign = await client.request(**operation.request(FOREIGN), headers=bound)
        nobody = await client.request(**operation.request(NOBODY), headers=bound)
        told = json.loads(foreign.text.replace(FOREIGN, NOBODY))
        assert (foreign.status_code, told) == (404, nobody.json()), str(operation)
        if not operation.path.endswith("/deposit"):  # which makes the account for whoever may
            missing = await client.request(**operation.request(NOBODY), headers=whole)
            assert (missing.status_code, missing.json()) == (404, told), str(operation)


async def test_who_has_no_key_is_refused_before_the_body_is_read(client: httpx.AsyncClient) -> None:
    for content, kind in ((b"{", "application/json"), (b"x" * 60_000, "text/plain")):
        answer = await client.post("/trade", content=content, headers={"Content-Type": kind})
        assert expect(answer, 401)["code"] == "key_required"


async def test_history_without_a_filter_is_that_of_the_keys_own_accounts(
    client: httpx.AsyncClient, shared_stores: Stores
) -> None:
    operate = bearer(await new_key(shared_stores, "operate"))
    for account in ("desk_1", "desk_2", "deskX1", "DESK_1", "desk"):
        body = {"amount": "5"}
        expect(await client.post(f"/accounts/{account}/deposit", json=body, headers=operate), 201)
    for accounts, seen in (
        (["desk_*"], {"desk_1", "desk_2"}),
        (["desk_1", "deskX*"], {"desk_1", "deskX1"}),
        (["nothing"], set()),
    ):
        desk = Desk(client)
        client.headers.update(bearer(await new_key(shared_stores, "read", accounts=accounts)))
        try:
            assert {row["account_id"] for row in await desk.rows("transfers")} == seen
            for account in ("desk_1", "deskX1", "desk"):
                own = await desk.rows("transfers", account_id=account)
                assert bool(own) == (account in seen), account
        finally:
            del client.headers["Authorization"]


@pytest.mark.parametrize(
    ("scopes", "accounts", "named"),
    [
        ([], ["*"], "scopes"),
        (["read", "admin"], ["*"], "scopes"),
        (["trade"], [], "whose trades"),
        (["mark"], ["alice"], "moves every account"),
        (["read"], ["a:b"], "account"),
        (["read"], ["a*b"], "account"),
        (["read"], [""], "account"),
    ],
)
async def test_a_key_that_cannot_be_meant_is_not_made(
    scopes: list[str], accounts: list[str], named: str, shared_stores: Stores
) -> None:
    with pytest.raises(InvalidField, match=named):
        await new_key(shared_stores, *scopes, accounts=accounts)
