"""Settings: every ``PLIMSOLL_...`` environment variable, its unit in its name, its default here."""

from __future__ import annotations

from dataclasses import fields
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.contracts import BTC_PERP, Contract
from app.numbers import parse_decimal
from app.secret_files import SecretFileSource


def _contract_from_json(value: object) -> object:
    """A contract as a JSON object with decimal strings; names that are left out take the default."""
    if not isinstance(value, dict):
        return value
    names = [item.name for item in fields(Contract)]
    if unknown := [name for name in value if name not in names]:
        raise ValueError(f"a contract has no {', '.join(unknown)}; it has {', '.join(names)}")
    if not isinstance(value.get("symbol"), str):
        raise ValueError("a contract needs a symbol")  # noqa: TRY004  # pydantic reports a ValueError
    numbers = {name: parse_decimal(str(item)) for name, item in value.items() if name != "symbol"}
    return Contract(symbol=value["symbol"], **numbers)


class Settings(BaseSettings):
    """What may be configured. ``PLIMSOLL_API_PORT=9000`` sets ``api_port``, ``PLIMSOLL_API_PORT_FILE`` names its file.

    What may hold a secret is left out of its text, and a value that is refused out of the error.
    """

    model_config = SettingsConfigDict(
        env_prefix="PLIMSOLL_", frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    redis_url: Annotated[str | None, Field(repr=False)] = None
    database_url: Annotated[str | None, Field(repr=False)] = None
    migrations_url: Annotated[str | None, Field(repr=False)] = None
    data_dir: Path = Path(".plimsoll")
    redis_server: Path | None = None

    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_workers: PositiveInt = 1
    drain_seconds: NonNegativeFloat = 1.0
    watchdog_host: str = "127.0.0.1"
    watchdog_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    auth: Literal["on", "off"] = "off"
    allow_keyless: bool = False
    api_key: SecretStr | None = None
    keys_refresh_seconds: PositiveFloat = 2.0
    keys_stale_seconds_max: PositiveFloat = 900.0
    reads_per_second_max: PositiveInt = 200
    writes_per_second_max: PositiveInt = 1_000
    demo: Literal["on", "off"] = "on"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: Literal["errors", "all", "off"] = "errors"

    contracts: tuple[Annotated[Contract, BeforeValidator(_contract_from_json)], ...] = (BTC_PERP,)
    restore_at: Literal["initial", "maintenance"] = "initial"
    mark_max_age_seconds: PositiveFloat | None = None
    mark_jump_max: Annotated[Decimal, Field(gt=0)] = Decimal("0.5")

    sweep_interval_seconds: PositiveFloat = 1.0
    sweep_chunk_accounts: PositiveInt = 131_072
    audit_accounts_per_sweep: PositiveInt = 500
    refresh_accounts_per_sweep: PositiveInt = 1_000

    redis_timeout_seconds: PositiveFloat = 2.0
    redis_wait_replicas: NonNegativeInt | None = None
    record_timeout_seconds: PositiveFloat = 2.0
    outbox_soft_limit: PositiveInt = 200_000
    outbox_hard_limit: PositiveInt = 400_000
    outbox_batch_rows: PositiveInt = 1_000
    operation_ttl_seconds: PositiveInt = 86_400
    allow_unsafe_redis: bool = False

    @property
    def request_seconds(self) -> float:
        """How long a trade, a transfer or a mark may take, whatever both stores do: as long as the slower one may."""
        return max(self.redis_timeout_seconds, self.record_timeout_seconds)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - there are no dot-env files
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - nor a directory of secrets
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the files that it names."""
        return init_settings, env_settings, SecretFileSource(settings_cls)

    @field_validator("contracts")
    @classmethod
    def _symbols_are_unique(cls, contracts: tuple[Contract, ...]) -> tuple[Contract, ...]:
        symbols = [contract.symbol for contract in contracts]
        if not symbols or len(set(symbols)) != len(symbols):
            raise ValueError("contracts must name at least one symbol, each once")
        return contracts


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read from its environment once."""
    return Settings()
