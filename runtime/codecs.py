"""Which payload codec each kind of tensor travels in, agreed when a connection opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from privatelora.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Codecs:
    """A payload codec for each kind of tensor and direction (up is from edge to cloud).

    ``exchange_up`` is y, also that of a step's opening; ``exchange_down`` is z.
    """

    hidden_states_up: str
    exchange_up: str
    hidden_states_down: str
    exchange_down: str


@dataclass(frozen=True, slots=True)
class CodecPreferences:
    """For each field of Codecs the codecs an edge would use, best first."""

    hidden_states_up: tuple[str, ...]
    exchange_up: tuple[str, ...]
    hidden_states_down: tuple[str, ...]
    exchange_down: tuple[str, ...]


def for_gradients(codec: str) -> str:
    """What gradients travel in where the values that they are of travel in ``codec``.

    Gradients of a mean over many tokens are too small for fp16, whose numbers end at 6e-8.
    """
    return codec.replace("fp16", "bf16")


def choose_codecs(preferences: CodecPreferences, offered: Sequence[str]) -> Codecs:
    """The first codec of each preference that the cloud offers; ConfigError if there is none."""
    chosen = []
    for field in fields(preferences):
        names: tuple[str, ...] = getattr(preferences, field.name)
        common = [name for name in names if name in offered]
        if not common:
            kind, _, direction = field.name.rpartition("_")
            raise ConfigError(
                f"payload.{direction}.{kind}: the cloud does not know {' or '.join(names)}; it "
                f"offers {', '.join(offered)}"
            )
        chosen.append(common[0])
    return Codecs(*chosen)
