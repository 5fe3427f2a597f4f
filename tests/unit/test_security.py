"""What an address, a reach and a declaration mean."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from app.config import Settings
from app.errors import UnknownAccount
from app.reach import EVERY_ACCOUNT, Reach
from app.security import KeylessError, is_loopback_address, is_loopback_host, require_keys_beyond_loopback


@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"])
def test_a_loopback_address_is_this_machine(address: str) -> None:
    assert is_loopback_address(address)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "10.0.0.1", "126.255.255.255", "128.0.0.0", "::", "::2", "::ffff:10.0.0.1", "localhost", ""]
)
def test_any_other_address_or_none_is_not(address: str) -> None:
    assert not is_loopback_address(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_host_that_is_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback_host(host)
    require_keys_beyond_loopback(Settings(), host=host, variable="PLIMSOLL_API_HOST")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_others_reach_needs_keys_or_an_operator_who_knows(host: str) -> None:
    assert not is_loopback_host(host)
    with pytest.raises(KeylessError, match=f"PLIMSOLL_API_HOST={host} would serve"):
        require_keys_beyond_loopback(Settings(), host=host, variable="PLIMSOLL_API_HOST")
    for settings in (Settings(auth="on"), Settings(allow_keyless=True)):
        require_keys_beyond_loopback(settings, host=host, variable="PLIMSOLL_API_HOST")


def test_a_reach_has_names_and_prefixes_and_nothing_that_is_merely_like_them() -> None:
    reach = Reach.of(["alice", "desk_*"])
    assert [name for name in ("alice", "desk_", "desk_1") if not reach.includes(name)] == []
    assert [name for name in ("Alice", "alice2", "alic", "desk", "deskX1", "") if reach.includes(name)] == []
    assert not reach.is_whole
    with pytest.raises(UnknownAccount, match="a deposit makes it"):
        reach.require("bob")


def test_every_account_is_one_star_among_others_or_alone() -> None:
    assert EVERY_ACCOUNT.is_whole
    assert Reach.of(["alice", "*"]).is_whole
    assert EVERY_ACCOUNT.includes("anybody")
    assert not Reach.of([]).includes("anybody")


def test_a_key_in_the_settings_shows_in_no_text_of_them() -> None:
    settings = Settings(api_key=SecretStr("plimsoll_a_secret"))
    assert "secret" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
