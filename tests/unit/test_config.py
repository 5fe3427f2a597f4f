"""Settings: every ``PLIMSOLL_...`` variable is read, and one that cannot be meant stops the start."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from app.config import Settings, get_settings
from app.contracts import BTC_PERP, Contract
from tests.unit.cast import ETH_PERP, amounts

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"

VARIABLES: dict[str, tuple[str, object]] = {
    "PLIMSOLL_REDIS_URL": ("redis://redis:6379/1", "redis://redis:6379/1"),
    "PLIMSOLL_DATABASE_URL": ("postgresql://u:p@postgres/plimsoll", "postgresql://u:p@postgres/plimsoll"),
    "PLIMSOLL_MIGRATIONS_URL": ("postgresql://owner:p@postgres/plimsoll", "postgresql://owner:p@postgres/plimsoll"),
    "PLIMSOLL_DATA_DIR": ("/var/lib/plimsoll", Path("/var/lib/plimsoll")),
    "PLIMSOLL_REDIS_SERVER": ("/usr/bin/redis-server", Path("/usr/bin/redis-server")),
    "PLIMSOLL_API_HOST": ("0.0.0.0", "0.0.0.0"),
    "PLIMSOLL_API_PORT": ("9000", 9000),
    "PLIMSOLL_API_WORKERS": ("4", 4),
    "PLIMSOLL_DRAIN_SECONDS": ("0", 0.0),
    "PLIMSOLL_WATCHDOG_HOST": ("0.0.0.0", "0.0.0.0"),
    "PLIMSOLL_WATCHDOG_PORT": ("0", 0),
    "PLIMSOLL_AUTH": ("on", "on"),
    "PLIMSOLL_ALLOW_KEYLESS": ("1", True),
    "PLIMSOLL_API_KEY": ("plimsoll_0_0", SecretStr("plimsoll_0_0")),
    "PLIMSOLL_KEYS_REFRESH_SECONDS": ("0.5", 0.5),
    "PLIMSOLL_KEYS_STALE_SECONDS_MAX": ("60", 60.0),
    "PLIMSOLL_READS_PER_SECOND_MAX": ("5", 5),
    "PLIMSOLL_WRITES_PER_SECOND_MAX": ("6", 6),
    "PLIMSOLL_DEMO": ("off", "off"),
    "PLIMSOLL_LOG_LEVEL": ("debug", "debug"),
    "PLIMSOLL_ACCESS_LOG": ("all", "all"),
    "PLIMSOLL_CONTRACTS": ('[{"symbol": "ETH-PERP"}]', (Contract(symbol="ETH-PERP"),)),
    "PLIMSOLL_RESTORE_AT": ("maintenance", "maintenance"),
    "PLIMSOLL_MARK_MAX_AGE_SECONDS": ("2.5", 2.5),
    "PLIMSOLL_MARK_JUMP_MAX": ("0.25", Decimal("0.25")),
    "PLIMSOLL_SWEEP_INTERVAL_SECONDS": ("0.5", 0.5),
    "PLIMSOLL_SWEEP_CHUNK_ACCOUNTS": ("1000", 1000),
    "PLIMSOLL_AUDIT_ACCOUNTS_PER_SWEEP": ("100", 100),
    "PLIMSOLL_REFRESH_ACCOUNTS_PER_SWEEP": ("100", 100),
    "PLIMSOLL_REDIS_TIMEOUT_SECONDS": ("1.5", 1.5),
    "PLIMSOLL_REDIS_WAIT_REPLICAS": ("2", 2),
    "PLIMSOLL_RECORD_TIMEOUT_SECONDS": ("1.5", 1.5),
    "PLIMSOLL_OUTBOX_SOFT_LIMIT": ("10", 10),
    "PLIMSOLL_OUTBOX_HARD_LIMIT": ("20", 20),
    "PLIMSOLL_OUTBOX_BATCH_ROWS": ("5", 5),
    "PLIMSOLL_OPERATION_TTL_SECONDS": ("60", 60),
    "PLIMSOLL_ALLOW_UNSAFE_REDIS": ("true", True),
}


def name_of(variable: str) -> str:
    return variable.removeprefix("PLIMSOLL_").lower()


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_variable_is_read(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VARIABLES[variable]
    assert getattr(Settings(), name_of(variable)) != value
    monkeypatch.setenv(variable, text)
    assert getattr(Settings(), name_of(variable)) == value


def test_the_table_of_variables_above_is_whole() -> None:
    assert {name_of(variable) for variable in VARIABLES} == set(Settings.model_fields)


def test_the_defaults_are_those_of_the_design() -> None:
    settings = Settings()
    assert (settings.api_host, settings.api_port, settings.api_workers) == ("127.0.0.1", 8000, 1)
    assert settings.watchdog_port == 8001
    assert settings.sweep_interval_seconds == 1
    assert settings.data_dir == Path(".plimsoll")
    assert settings.contracts == (BTC_PERP,)
    assert settings.restore_at == "initial"
    assert settings.mark_max_age_seconds is None
    assert settings.operation_ttl_seconds == 24 * 60 * 60


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PLIMSOLL_API_PORT", "65536"),
        ("PLIMSOLL_API_PORT", "-1"),
        ("PLIMSOLL_API_PORT", "http"),
        ("PLIMSOLL_API_WORKERS", "0"),
        ("PLIMSOLL_SWEEP_INTERVAL_SECONDS", "0"),
        ("PLIMSOLL_SWEEP_INTERVAL_SECONDS", "-1"),
        ("PLIMSOLL_MARK_MAX_AGE_SECONDS", "0"),
        ("PLIMSOLL_MARK_JUMP_MAX", "0"),
        ("PLIMSOLL_DEMO", "perhaps"),
        ("PLIMSOLL_AUTH", "perhaps"),
        ("PLIMSOLL_READS_PER_SECOND_MAX", "0"),
        ("PLIMSOLL_RESTORE_AT", "never"),
        ("PLIMSOLL_LOG_LEVEL", "loud"),
        ("PLIMSOLL_CONTRACTS", "[]"),
        ("PLIMSOLL_CONTRACTS", '[{"symbol": "BTC-PERP"}, {"symbol": "BTC-PERP"}]'),
        ("PLIMSOLL_CONTRACTS", '[{"symbol": "BTC-PERP", "price_band": "0.2"}]'),
    ],
)
def test_a_value_that_cannot_be_meant_stops_the_start_and_is_named(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValidationError, match=name_of(variable)):
        Settings()


@pytest.mark.parametrize(
    "contract",
    [
        {"symbol": "BTC-PERP", "tick_size": "abc"},
        {"symbol": "BTC-PERP", "initial_rate": None},
        {"symbol": "BTC-PERP", "initial_rte": "0.2"},
        {"tick_size": "0.01"},
        "BTC-PERP",
    ],
    ids=json.dumps,
)
def test_a_contract_that_cannot_be_read_stops_the_start_like_any_other_setting(
    contract: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLIMSOLL_CONTRACTS", json.dumps([contract]))
    with pytest.raises(ValidationError, match="contracts"):
        Settings()


def test_contracts_are_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    described = [
        {"symbol": "BTC-PERP"},
        {
            "symbol": "ETH-PERP", "tick_size": "0.01", "lot_size": "0.0001", "initial_rate": "0.25",
            "maintenance_rate": "0.125", "price_band": "0.10", "price_max": "100000", "position_limit": "10000",
        },
    ]  # fmt: skip
    monkeypatch.setenv("PLIMSOLL_CONTRACTS", json.dumps(described))
    assert Settings().contracts == (BTC_PERP, ETH_PERP)


def test_numbers_of_a_contract_may_be_json_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_CONTRACTS", '[{"symbol": "BTC-PERP", "lot_size": 0.000001, "position_limit": 500}]')
    (contract,) = Settings().contracts
    assert (contract.lot_size, contract.position_limit) == amounts("0.000001", 500)


def test_settings_do_not_change_while_a_process_runs() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.api_port = 1  # type: ignore[misc]


def test_a_process_reads_its_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    get_settings.cache_clear()
    monkeypatch.setenv("PLIMSOLL_API_PORT", "9000")
    assert get_settings().api_port == 9000
    monkeypatch.setenv("PLIMSOLL_API_PORT", "9001")
    assert get_settings().api_port == 9000
    get_settings.cache_clear()


def test_every_variable_is_documented_and_no_other() -> None:
    if not DOCUMENT.exists():
        pytest.skip("not a whole checkout")
    documented = re.findall(r"^\| `(PLIMSOLL_\w+)`", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(VARIABLES)


def test_the_contracts_of_the_documentation_start(monkeypatch: pytest.MonkeyPatch) -> None:
    if not DOCUMENT.exists():
        pytest.skip("not a whole checkout")
    (example,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setenv("PLIMSOLL_CONTRACTS", example)
    assert [contract.symbol for contract in Settings().contracts] == ["BTC-PERP", "ETH-PERP"]
