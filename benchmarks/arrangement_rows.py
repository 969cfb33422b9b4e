"""What the table of arrangements compares, and what each row of it costs on the wire."""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.benchmarks.cost import token_cost
from privatelora.errors import ConfigError
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan_file import parse_layers
from privatelora.runtime.codecs import Codecs
from privatelora.training.methods import FullMethod, LoraMethod, MethodConfig, PrivateLoraMethod

NUMBER_NBYTES = 2
"""Activations travel as float16 in every row, so that rows differ by what they send alone."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``method``: None for the model as it is."""

    name: str
    label: str
    method: MethodConfig | None
    learning_rates: tuple[float, ...] = ()
    """Those tried, ascending; none: the rate that was found for ``tuned_as``."""
    tuned_as: str = ""
    """The name of a row of the same kind."""


@dataclass(frozen=True)
class WireCost:
    """Of one decoded token, when what was trained stays on the edge."""

    round_trips: int
    nbytes: int


M_RATES = (1e-3, 3e-3, 1e-2)
LORA_RATES = (1e-4, 3e-4, 1e-3)
FULL_RATES = (5e-6, 1.5e-5, 5e-5)


def table_rows(num_layers: int) -> tuple[Row, ...]:
    """The rows for a model of ``num_layers``.

    Grouped ones come twice beside per layer at rank 32: at equal rank, where z is as wide as the
    three blocks of an exchange per layer are together, and at equal trainable parameters; and once
    as wide as the paper's. A learning rate is chosen once for each kind.
    """
    two_layers = f"{num_layers // 2 - 1},{num_layers - 1}"  # the paper's 15 and 31 of 32
    rows = [
        Row("base", "base", None),
        Row("full", "full fine-tuning", FullMethod(name="full"), FULL_RATES),
        Row("lora-all", "LoRA, every linear layer", LoraMethod(name="lora"), LORA_RATES),
        Row("lora-qkv", "LoRA, q k v", LoraMethod(name="lora", targets="qkv"), LORA_RATES),
        Row(
            "lora-two-layers",
            f"LoRA, q k v of layers {two_layers.replace(',', ' and ')}",
            LoraMethod(name="lora", targets="qkv", layers=two_layers),
            tuple(3 * rate for rate in LORA_RATES),
        ),
        Row(
            "per-layer-random-128",
            "per layer, random, rank 128",
            _private(1, 128, 128, "random"),
            tuple(3 * rate for rate in M_RATES),
        ),
        Row("per-layer-128", "per layer, svd, rank 128", _private(1, 128, 128), M_RATES),
        Row("per-layer-32", "per layer, svd, rank 32", _private(1, 32, 32), M_RATES),
    ]
    groups = [every for every in (6, 2, 15, num_layers) if every <= num_layers]
    for every in groups:
        for kind, rank_up, label in (
            ("equal-rank", 96, "rank 96 up, 32 down"),
            ("equal-parameters", 32, "rank 32"),
        ):
            method = _private(every, rank_up, 32)
            name, label = f"every-{every}-{kind}", f"every {every}, svd, {label}"
            if every == groups[0]:
                rows.append(Row(name, label, method, M_RATES))
            else:
                rows.append(Row(name, label, method, tuned_as=f"every-{groups[0]}-{kind}"))
    # As many parameters as the paper has, which decide how many facts there is room for.
    wide = f"every {groups[0]}, svd, rank 128"
    method = _private(groups[0], 128, 128)
    rows.append(Row(f"every-{groups[0]}-128", wide, method, tuned_as="per-layer-128"))
    return tuple(rows)


def _private(every: int, rank_up: int, rank_down: int, basis: str = "svd") -> PrivateLoraMethod:
    return PrivateLoraMethod(every=every, rank_up=rank_up, rank_down=rank_down, basis=basis)


def wire_cost(method: MethodConfig | None, config: DecoderConfig) -> WireCost:
    """Round trips and bytes per decoded token, payload in both directions as float16.

    What was trained is private, so the edge computes with it. LoRA has no low rank in between that
    is public: the edge gets the input of each adapted layer and sends back what is to be added to
    its output (layers that read the same input share one exchange). A whole model that was trained
    runs on the edge alone and sends nothing.
    """
    hidden = config.hidden_size
    ends = 2 * hidden * NUMBER_NBYTES
    match method:
        case None:
            return WireCost(1, ends)
        case FullMethod():
            return WireCost(0, 0)
        case PrivateLoraMethod():
            cost = token_cost(
                method.plan_for(config), hidden, Codecs("fp16", "fp16", "fp16", "fp16")
            )
            return WireCost(cost.round_trips, cost.payload)
        case LoraMethod():
            layers = parse_layers(method.layers, config.num_layers)
            queries, keys = (config.projection_size(target) for target in "qk")
            exchanges = [(hidden, queries + 2 * keys)]
            if method.targets == "all":
                feed_forward = config.intermediate_size
                exchanges += [(queries, hidden), (hidden, 2 * feed_forward), (feed_forward, hidden)]
            numbers = len(layers) * sum(down + up for down, up in exchanges)
            # The edge has the first layer's input already.
            folded = layers[0] == 0
            numbers -= hidden if folded else 0
            return WireCost(
                1 + len(layers) * len(exchanges) - folded, ends + numbers * NUMBER_NBYTES
            )
    raise ConfigError(f"unknown method {method!r}")


def predicted_tokens_per_s(cost: WireCost, compute_s: float, rtt_ms: float, mbps: float) -> float:
    """Rate of one conversation: computing, round trips and bytes one after the other."""
    wire_s = cost.round_trips * rtt_ms / 1e3 + cost.nbytes * 8 / (mbps * 1e6)
    return 1 / (compute_s + wire_s)
