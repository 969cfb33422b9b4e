"""What a prediction is told of computers and of the network between them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from privatelora.errors import ConfigError

_NUMBER = r"(\d+(?:\.\d+)?)"
_RTT = re.compile(_NUMBER + r"\s*(us|ms|s)", re.IGNORECASE)
_BANDWIDTH = re.compile(_NUMBER + r"(?:/" + _NUMBER + r")?\s*(kbps|mbps|gbps)", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BITS_PER_S = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9}


LONG_WAIT_S = 5e-3
"""A wait after which a core has gone to sleep and its caches hold other things."""


@dataclass(frozen=True)
class Link:
    """A network between edge and cloud: round trip time in seconds, bandwidths in bits/s.

    Up is from edge to cloud. Raises ConfigError for what no network is.
    """

    rtt_s: float = 0.0
    up_bits_per_s: float = math.inf
    down_bits_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.rtt_s < math.inf:
            raise ConfigError(f"a round trip of {self.rtt_s:g} s cannot be")
        if not (self.up_bits_per_s > 0 and self.down_bits_per_s > 0):
            raise ConfigError("a link needs a bandwidth above 0 in both directions")

    def up_s(self, nbytes: float) -> float:
        """Seconds in which so many bytes are put on the way to the cloud."""
        return nbytes * 8 / self.up_bits_per_s

    def down_s(self, nbytes: float) -> float:
        """Seconds in which so many bytes are put on the way to the edge."""
        return nbytes * 8 / self.down_bits_per_s

    def __str__(self) -> str:
        up, down = self.up_bits_per_s / 1e6, self.down_bits_per_s / 1e6
        rtt = f"{self.rtt_s * 1e3:.3g} ms"
        if math.isinf(up) and math.isinf(down):
            return rtt
        return f"{rtt}, {_mbps(up)}/{_mbps(down)} Mbps"

    def as_json(self) -> dict[str, Any]:
        """Milliseconds and Mbps; None stands for a bandwidth without a bound."""
        return {
            "rtt_ms": self.rtt_s * 1e3,
            "up_mbps": _finite(self.up_bits_per_s / 1e6),
            "down_mbps": _finite(self.down_bits_per_s / 1e6),
        }


def _mbps(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.4g}"


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def parse_link(text: str) -> Link:
    """Read ``20ms``, ``20ms,100mbps`` or ``20ms,60/100mbps`` (up/down). Raises ConfigError."""
    rtt_text, _, bandwidth_text = (part.strip() for part in text.partition(","))
    rtt = _RTT.fullmatch(rtt_text)
    bandwidth = _BANDWIDTH.fullmatch(bandwidth_text)
    if rtt is None or (bandwidth_text and bandwidth is None):
        raise ConfigError(
            f"link {text!r}: write a round trip time and, if you like, the bandwidth, such as "
            "20ms, 20ms,100mbps or 20ms,60/100mbps (up/down)"
        )
    rtt_s = float(rtt[1]) * _SECONDS[rtt[2].lower()]
    if bandwidth is None:
        return Link(rtt_s)
    unit = _BITS_PER_S[bandwidth[3].lower()]
    up = float(bandwidth[1]) * unit
    return Link(rtt_s, up, up if bandwidth[2] is None else float(bandwidth[2]) * unit)


@dataclass(frozen=True)
class CodecCost:
    """Seconds for writing, or for reading, a tensor: fixed, and for each number in it."""

    tensor_s: float = 0.0
    number_s: float = 0.0

    def seconds(self, numbers: int) -> float:
        """For one tensor of so many numbers."""
        return self.tensor_s + numbers * self.number_s


_FREE = CodecCost()


@dataclass(frozen=True)
class Hardware:
    """One end as the roofline sees it (Williams, Waterman, Patterson, CACM 2009).

    ``memory_bytes_per_s`` and ``flops_per_s``: of the memory that holds the weights, and at peak.
    ``layer_s``: fixed for each decoder layer and batch, such as for launching kernels.
    ``step_s`` and ``exchange_s``: for seeing to a step, and to one exchange point of it, at this
    end, numbers and network left out. ``step_wake_s`` and ``exchange_wake_s``: how much longer
    these take over round trips of LONG_WAIT_S or more. ``codecs``: by name; those that are not
    there cost nothing.
    """

    name: str
    memory_bytes_per_s: float
    flops_per_s: float
    layer_s: float = 0.0
    step_s: float = 0.0
    exchange_s: float = 0.0
    step_wake_s: float = 0.0
    exchange_wake_s: float = 0.0
    codecs: Mapping[str, CodecCost] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not (self.memory_bytes_per_s > 0 and self.flops_per_s > 0):
            raise ConfigError(f"{self.name}: memory bandwidth and FLOP/s must be above 0")
        waking = (self.step_wake_s, self.exchange_wake_s)
        if min(self.layer_s, self.step_s, self.exchange_s, *waking) < 0:
            raise ConfigError(f"{self.name}: a fixed time cannot be below 0")

    def roofline_s(self, nbytes: float, flops: float) -> float:
        """Seconds for work that reads so many bytes: the slower of memory and arithmetic."""
        return max(nbytes / self.memory_bytes_per_s, flops / self.flops_per_s)

    def codec_s(self, codec: str, numbers: int) -> float:
        """Seconds for writing or reading one tensor."""
        return self.codecs.get(codec, _FREE).seconds(numbers)

    def as_json(self) -> dict[str, Any]:
        """GB/s, TFLOP/s and microseconds."""
        return {
            "name": self.name,
            "memory_gb_per_s": _finite(self.memory_bytes_per_s / 1e9),
            "tflops": _finite(self.flops_per_s / 1e12),
            "layer_us": self.layer_s * 1e6,
            "step_us": self.step_s * 1e6,
            "exchange_us": self.exchange_s * 1e6,
            "step_wake_us": self.step_wake_s * 1e6,
            "exchange_wake_us": self.exchange_wake_s * 1e6,
            "codecs": {
                name: {"tensor_us": cost.tensor_s * 1e6, "number_ns": cost.number_s * 1e9}
                for name, cost in self.codecs.items()
            },
        }


A100_80G = Hardware("a100-80g", 1935e9, 312e12)
"""Data sheet of the PCIe card, 16-bit tensor cores; the figures that the paper's authors use."""
H100_80G = Hardware("h100-80g", 3350e9, 989e12)
"""Data sheet of the SXM card, dense bfloat16."""
IPHONE_13_PRO_MAX = Hardware("iphone-13-pro-max", 42.7e9, 1.5e12)
"""Memory as the paper's authors have it. Of the GPU's float32 FLOP/s published estimates say 1.5
TFLOP/s; decoding one token is bound by memory from a hundredth of that on."""

PRESETS: Mapping[str, Hardware] = MappingProxyType(
    {hardware.name: hardware for hardware in (A100_80G, H100_80G, IPHONE_13_PRO_MAX)}
)
"""By name. They have no fixed times: what they predict is a bound."""


def preset(option: str, name: str) -> Hardware:
    """The hardware of that name; ConfigError names ``option``."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(
            f"{option} {name!r}: choose from here (measured now), {', '.join(PRESETS)}"
        ) from None
