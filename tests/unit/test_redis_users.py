"""``deploy/redis/users.acl`` grants all that the scripts call: one refused in its middle would leave half a change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from app import redis_client as keys

ROOT: Final = Path(__file__).parents[2]
SCRIPTS: Final = sorted((ROOT / "app" / "scripts").glob("*.lua"))
USERS: Final = {
    line.split()[1]: line.split()[2:] for line in (ROOT / "deploy" / "redis" / "users.acl").read_text().splitlines()
}


def rights(user: str, sign: str) -> set[str]:
    return {word.removeprefix(sign) for word in USERS[user] if word.startswith(sign)}


def test_a_stranger_may_only_ping() -> None:
    assert set(USERS) == {"default", "health", "api", "watchdog", "operator"}
    assert rights("health", "+") == {"ping"}
    assert not rights("health", "~") | rights("health", "&")


def test_nobody_is_the_default_user_who_may_do_everything() -> None:
    """Redis 7 replays its append-only file as this user: what he may not do, it drops, and starts without it."""
    assert USERS["default"] == ["off", "resetpass", "sanitize-payload", "~*", "&*", "+@all"]


@pytest.mark.parametrize("user", ["api", "watchdog"])
def test_every_command_of_every_script_is_granted(user: str) -> None:
    called = {name for script in SCRIPTS for name in re.findall(r"(?:redis\.call|read)\('(\w+)'", script.read_text())}
    assert len(called) > 20
    assert {name.lower() for name in called} - rights(user, "+") == set()


@pytest.mark.parametrize("user", ["api", "watchdog"])
def test_nothing_is_granted_by_category(user: str) -> None:
    assert not [right for right in rights(user, "+") if right.startswith("@")]
    assert "-@all" in USERS[user]
    assert "*" not in rights(user, "~") | rights(user, "&")


@pytest.mark.parametrize("user", ["api", "watchdog"])
def test_every_key_is_granted(user: str) -> None:
    patterns = [re.compile(re.escape(item).replace(r"\*", ".*")) for item in rights(user, "~")]
    named = [value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)]
    named = [value for value in named if ":" in value and "*" not in value] + [keys.OUTBOX, keys.ACCOUNTS]
    made = [
        *(make("x") for make in (keys.balance_key, keys.equity_key, keys.used_margin_key, keys.positions_key)),
        *(make("x") for make in (keys.ledger_key, keys.mark_price_key, keys.mark_key, keys.quantity_column)),
        *(make("x") for make in (keys.cost_column, keys.open_positions_key)),
        keys.operation_key("trade", "x", "y"),
        f"{keys.RATE_LIMIT_PREFIX}:x",
    ]
    assert len(named) > 10
    assert [key for key in (*named, *made) if not any(pattern.fullmatch(key) for pattern in patterns)] == []
    assert rights(user, "&") == {keys.MARK_CHANNEL}
