"""The way to a peer, as its entry in the settings says: the networks of its addresses, TLS, and an egress proxy."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from bridge.runtime.settings import in_settings_folder, unreadable
from bridge.security.egress import Network

_File = Annotated[Path, AfterValidator(in_settings_folder)]


class Tls(BaseModel):
    """TLS to one peer. The files are PEM, and are read again when they change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca_file: _File | None = None
    """The authorities that may have issued the peer's certificate. By default those of the system."""
    certificate_file: _File | None = None
    """Our certificate, and the certificates between it and its authority, for a peer that asks for one."""
    key_file: _File | None = None
    """The key of our certificate, without a password. By default it is in `certificate_file`."""

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        if self.key_file is not None and self.certificate_file is None:
            message = "key_file: certificate_file is missing"
            raise ValueError(message)
        self.context()
        return self

    @property
    def files(self) -> list[Path]:
        """The files that are named."""
        return [each for each in (self.ca_file, self.certificate_file, self.key_file) if each is not None]

    def context(self) -> ssl.SSLContext:
        """Read the files.

        Raises:
            ValueError: A file cannot be used. The text names the field, the file and the remedy.
        """
        for path in self.files:
            try:
                path.open("rb").close()
            except OSError as error:
                message = f"{path}: {unreadable(path, error)}"
                raise ValueError(message) from None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except ssl.SSLError:
            message = f"ca_file: {self.ca_file}: has no certificate in PEM form"
            raise ValueError(message) from None
        try:
            if self.certificate_file is not None:
                # Without a password OpenSSL would ask the terminal for one.
                context.load_cert_chain(self.certificate_file, self.key_file, password="")
        except ssl.SSLError as error:
            remedy = "both must be PEM and belong together, and the key must have no password"
            message = (
                f"certificate_file: {self.certificate_file}: cannot be used with its key ({error.reason}): {remedy}"
            )
            raise ValueError(message) from None
        return context


@dataclass(frozen=True, kw_only=True)
class Route:
    """The way to one destination. Destinations with different routes share no connection."""

    networks: tuple[Network, ...] = ()
    """Non-public networks to which connections may go. With `proxy`: those of the proxy."""
    tls: Tls | None = None
    """None: the system's authorities, and no certificate of ours."""
    proxy: str | None = None
    """URL of the HTTP proxy to which all connections go."""
