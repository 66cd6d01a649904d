"""The bridge's own settings: environment variables `BRIDGE_…` over one TOML file, checked before anything starts.

Connections to Temporal are not here: they are configured the ecosystem's way (`temporalio.envconfig`).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from pydantic_settings import SettingsError as SourceError

from bridge.security.egress import check_base_url
from bridge.security.keys import KEY_ID, KeyRing

CONFIG_VARIABLE = "BRIDGE_CONFIG"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
"""Of a caller, a handler or an endpoint: fit for a path segment."""


def _http_url(text: str) -> str:
    return check_base_url(text).rstrip("/")


HttpUrl = Annotated[str, AfterValidator(_http_url)]


def require_https(text: str, *, allow_insecure: bool) -> None:
    """Refuse plain http, unless the entry says that this is meant.

    Raises:
        ValueError: It is http and was not meant.
    """
    if not allow_insecure and not text.startswith("https://"):
        message = "needs https; for development on one machine set allow_insecure = true beside it"
        raise ValueError(message)


def require_distinct_keys(rings: Mapping[str, KeyRing]) -> None:
    """Refuse one key in two rings: a message for one purpose or peer would pass as another's.

    Raises:
        ValueError: Names the two rings.
    """
    seen: dict[bytes, str] = {}
    for where, ring in rings.items():
        for key in ring.raw().values():
            if seen.setdefault(key, where) != where:
                message = f"{seen[key]} and {where} share a key; every ring needs keys of its own"
                raise ValueError(message)


class SettingsError(Exception):
    """The settings cannot be used. The text names every bad field and quotes no value."""


class BridgeSettings(BaseSettings):
    """Base of both sides' settings."""

    model_config = SettingsConfigDict(
        env_prefix="BRIDGE_",
        env_nested_delimiter="__",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the file that BRIDGE_CONFIG names."""
        del dotenv_settings, file_secret_settings
        path = os.environ.get(CONFIG_VARIABLE)
        file = (TomlConfigSettingsSource(settings_cls, toml_file=Path(path)),) if path else ()
        return (init_settings, env_settings, *file)


_SettingsT = TypeVar("_SettingsT", bound=BridgeSettings)


def load(model: type[_SettingsT], **overrides: Any) -> _SettingsT:
    """Read the settings of one side.

    Raises:
        SettingsError: Something is missing or bad.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if path and not Path(path).is_file():
        message = f"{CONFIG_VARIABLE}={path}: no such file"
        raise SettingsError(message)
    try:
        return model(**overrides)
    except ValidationError as error:
        problems = [
            f"  {_field(each['loc']) or 'settings'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors(include_input=False, include_context=False, include_url=False)
        ]
        where = path or f"the environment ({CONFIG_VARIABLE} names no file)"
        raise SettingsError("\n".join([f"bad settings in {where}:", *problems])) from None
    except SourceError as error:  # a variable that is not JSON; it names the field
        message = f"bad settings in the environment: {error}"
        raise SettingsError(message) from None
    except (ValueError, OSError) as error:  # a broken TOML file; its position, not its text
        message = f"{path}: not readable as TOML ({type(error).__name__})"
        raise SettingsError(message) from None


def _field(location: tuple[int | str, ...]) -> str:
    # Below `keys` stand key ids. Whoever swapped an id and its key must not find the key in the log.
    parts = [
        "…" if before == "keys" and not re.fullmatch(KEY_ID, str(part)) else str(part)
        for before, part in zip((None, *location), location, strict=False)
    ]
    return ".".join(parts)
