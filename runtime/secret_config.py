"""Secrets in the YAML files: named there, kept elsewhere."""

from __future__ import annotations

import logging
import os

from pydantic import SecretStr, model_validator

from privatelora.errors import ConfigError
from privatelora.plain_file import open_plain
from privatelora.runtime.link_config import ConfigPath, Settings

logger = logging.getLogger(__name__)

MAX_SECRET_NBYTES = 4096


class SecretConfig(Settings):
    """Where a secret is: in a file of its own (``file``) or in an environment variable (``env``).

    It never stands in the settings themselves, which people copy, show and commit.
    """

    file: ConfigPath | None = None
    env: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> SecretConfig:
        if (self.file is None) == (self.env is None):
            raise ValueError("give either file (its path) or env (the name of a variable)")
        return self

    def read(self) -> SecretStr:
        """The secret, without white space around it. Raises ConfigError if there is none."""
        if self.file is not None:
            where = str(self.file)
            try:
                with open_plain(self.file) as file:
                    secret = file.read(MAX_SECRET_NBYTES + 1).decode().strip()
            except OSError as error:
                raise ConfigError(f"cannot read the secret in {where}: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise ConfigError(f"the secret in {where} is not UTF-8 text") from error
        else:
            where = f"the environment variable {self.env}"
            secret = os.environ.get(self.env or "", "").strip()
        if not secret:
            raise ConfigError(f"there is no secret in {where}")
        if len(secret) > MAX_SECRET_NBYTES:
            raise ConfigError(f"the secret in {where} is longer than {MAX_SECRET_NBYTES} bytes")
        return SecretStr(secret)


class CurrentSecret:
    """A secret as it is now, so that another can take its place without a restart.

    While it cannot be read, what was read last holds.
    """

    def __init__(self, config: SecretConfig) -> None:
        """Read it; raises ConfigError."""
        self._config = config
        self._value = config.read()
        self._problem = ""

    def get(self) -> SecretStr:
        """The secret."""
        try:
            self._value = self._config.read()
            self._problem = ""
        except ConfigError as error:
            if str(error) != self._problem:  # once, however often it is asked for
                self._problem = str(error)
                logger.error("%s; the one before holds", error)
        return self._value
