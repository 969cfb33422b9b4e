"""What the comparison of training speeds compares, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from privatelora.errors import ConfigError
from privatelora.training.methods import FullMethod, LoraMethod, MethodConfig, PrivateLoraMethod
from privatelora.transports.emulated_link import Impairment


@dataclass(frozen=True)
class TrainingSpeedSettings:
    """One run of the benchmark. ``rows``: names of the contenders, none for all.

    ``rank``: of exchanges per layer; ``grouped_rank``: of those for ``every`` layers.
    ``num_threads`` is per process. Split contenders are measured without any distance, and at each
    of ``rtts_ms``.
    """

    model: str
    rows: tuple[str, ...]
    rtts_ms: tuple[float, ...]
    batch_size: int
    tokens: int
    steps: int
    rounds: int
    every: int
    rank: int
    grouped_rank: int
    num_threads: int
    directory: Path


@dataclass(frozen=True)
class Contender:
    """A method in one place, or split at a distance."""

    name: str
    label: str
    method: MethodConfig
    rtt_ms: float | None = None
    """None: in one place."""

    @property
    def title(self) -> str:
        """For people who wait."""
        where = "" if self.rtt_ms is None else f", split at {self.rtt_ms:g} ms"
        return self.label + where

    @property
    def mode(self) -> str:
        """Where it trains."""
        return "central" if self.rtt_ms is None else "split"


def chosen_contenders(settings: TrainingSpeedSettings) -> list[Contender]:
    """Those that were chosen; the first is what the others are compared with.

    Raises ConfigError for an unknown name and for what is no distance.
    """
    for rtt_ms in settings.rtts_ms:
        try:
            Impairment(delay_ms=rtt_ms / 2)
        except ConfigError as error:
            raise ConfigError(f"--rtt-ms {rtt_ms:g}: half of it each way: {error}") from error
    arrangements = {
        "per-layer": (f"per layer, rank {settings.rank}", _private(1, settings.rank)),
        "grouped": (
            f"every {settings.every}, rank {settings.grouped_rank}",
            _private(settings.every, settings.grouped_rank),
        ),
    }
    contenders = [
        Contender("full", "full fine-tuning", FullMethod(name="full")),
        Contender("lora-all", "LoRA, every linear layer", LoraMethod(name="lora")),
        Contender("lora-qkv", "LoRA, q k v", LoraMethod(name="lora", targets="qkv")),
        *(Contender(name, *of) for name, of in arrangements.items()),
        *(
            Contender(f"split-{name}", *of, rtt_ms)
            for rtt_ms in sorted({0.0, *settings.rtts_ms})
            for name, of in arrangements.items()
        ),
    ]
    known = list(dict.fromkeys(contender.name for contender in contenders))
    for name in settings.rows:
        if name not in known:
            raise ConfigError(f"--rows: there is no row {name!r}; choose from {', '.join(known)}")
    return [one for one in contenders if one.name in (settings.rows or known)]


def _private(every: int, rank: int) -> PrivateLoraMethod:
    return PrivateLoraMethod(every=every, rank_up=rank, rank_down=rank, basis="random")
