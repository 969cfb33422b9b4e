"""The section ``http`` of an edge's YAML file."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from privatelora.runtime.host_port import HostPort, is_loopback, parse_host_port
from privatelora.runtime.link_config import Settings
from privatelora.runtime.secret_config import SecretConfig

ANY_ORIGIN = "*"


def _check_origin(text: str) -> str:
    if text != ANY_ORIGIN and not re.fullmatch(r"https?://[^/\s?#@]+", text):
        raise ValueError(f"an origin is scheme://host[:port] with nothing behind it, not {text!r}")
    return text.lower()


class HttpConfig(Settings):
    """Where and how an edge answers programs and people on its device."""

    listen: HostPort = "127.0.0.1:18231"
    """``host:port``; port 0 is any free one. Beyond this device only with ``api_key``."""
    api_key: SecretConfig | None = None
    """What requests have to show as ``Authorization: Bearer KEY``; without it everybody on this
    device may ask."""
    cors_origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    """Origins of web pages elsewhere that may use the API; ``*``: all, only with ``api_key``."""
    max_body_mib: float = Field(default=4.0, gt=0, le=1024, allow_inf_nan=False)
    """Largest body of a request."""
    max_header_kib: int = Field(default=32, gt=0, le=1024)
    """Largest header of a request."""
    request_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """How long a client may take to send a request, and to take a part of its answer."""
    max_concurrent: int = Field(default=64, gt=0)
    """Requests answered or waiting at once; beyond that they are refused."""
    drain_timeout_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long answers under way may take to their end when the edge is asked to stop."""

    @model_validator(mode="after")
    def _guarded(self) -> HttpConfig:
        host, _ = parse_host_port(self.listen)
        if self.api_key is None and not is_loopback(host):
            raise ValueError(
                f"listen: {host} can be reached from other machines; set api_key, or listen on "
                "127.0.0.1"
            )
        if self.api_key is None and ANY_ORIGIN in self.cors_origins:
            raise ValueError("cors_origins: '*' lets every web page use this edge; set api_key too")
        return self

    @property
    def max_body_nbytes(self) -> int:
        """``max_body_mib`` in bytes."""
        return int(self.max_body_mib * 2**20)

    @property
    def max_header_nbytes(self) -> int:
        """``max_header_kib`` in bytes."""
        return self.max_header_kib * 2**10
