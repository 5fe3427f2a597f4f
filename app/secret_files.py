"""Settings out of files: ``PLIMSOLL_REDIS_URL_FILE=/run/secrets/redis-url`` in the place of ``PLIMSOLL_REDIS_URL``.

It is how Docker, Kubernetes and systemd hand a secret over without putting it into the environment, which every process
started from here inherits and many tools print.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic_settings import EnvSettingsSource, SettingsError

SUFFIX: Final = "_FILE"


class SecretFileSource(EnvSettingsSource):
    """Reads the file that ``{prefix}{NAME}_FILE`` names for any setting, without the line's end.

    Raises ``SettingsError``, which names the variable and never what a file holds.
    """

    def _load_env_vars(self) -> Mapping[str, str | None]:
        """As if the variables held what the files do."""
        environment = {name.upper(): value for name, value in os.environ.items()}
        values: dict[str, str | None] = {}
        for field in self.settings_cls.model_fields:
            variable = f"{self.env_prefix}{field}".upper()
            path = environment.get(variable + SUFFIX)
            if path is None:
                continue
            if variable in environment:
                raise SettingsError(f"{variable} and {variable}{SUFFIX} are both set: unset one of them")
            try:
                values[variable.lower()] = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
            except OSError as error:
                raise SettingsError(f"{variable}{SUFFIX}: {path}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise SettingsError(f"{variable}{SUFFIX}: {path} is no UTF-8 text") from None
        return values
