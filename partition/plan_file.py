"""Making a plan from what a person writes: options on the command line, or a YAML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from privatelora.errors import PartitionError
from privatelora.partition.files import write_atomic
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import MAX_LAYERS
from privatelora.partition.plan import TARGETS, Plan
from privatelora.yaml_file import explain, read_yaml

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?")


class ArrangementOptions(BaseModel):
    """What of a plan decides what an adapter means: as people write it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_layers: Annotated[StrictInt, Field(gt=0, le=MAX_LAYERS)] | None = None
    """If given, the model must have exactly this many."""
    layers: StrictInt | str | tuple[StrictInt, ...] = "all"
    """``all``, a list, or ranges like ``0-5,8,10-29:2`` (both ends included)."""
    targets: str | tuple[str, ...] = TARGETS
    """Projections to adapt: q, k, v, or some of them."""
    rank_up: StrictInt = 128
    """Numbers per token towards the edge, for each exchange."""
    rank_down: StrictInt = 128
    """Numbers per token that come back for each layer and projection."""
    every: StrictInt | Literal["all"] = 1
    """Adapted layers per exchange point, or ``all`` for a single point."""
    scaling: float = Field(default=1.0, allow_inf_nan=False)
    """Factor on what the adapter adds."""

    def plan_for(self, config: DecoderConfig) -> Plan:
        """Return the plan these options describe for one model; see :func:`make_plan`."""
        if self.num_layers is not None and self.num_layers != config.num_layers:
            raise PartitionError(
                f"the plan is for a model with {self.num_layers} layers, this one has "
                f"{config.num_layers}"
            )
        names = PlanOptions.model_fields.keys() & type(self).model_fields.keys() - {"num_layers"}
        return make_plan(config, **{name: getattr(self, name) for name in names})


class PlanOptions(ArrangementOptions):
    """The keys of a plan file, which are also the options of ``privatelora partition``."""

    edge_first: StrictInt = 0
    """First layers that stay on the edge."""
    edge_last: StrictInt = 0
    """Last layers that stay on the edge."""

    def check(self) -> None:
        """Raise PartitionError for what no model allows; a given model may allow less."""
        _arrange(self.num_layers or MAX_LAYERS, **self.model_dump(exclude={"num_layers"}))


def make_plan(
    config: DecoderConfig,
    *,
    layers: str | int | Sequence[int] = "all",
    every: int | Literal["all"] = 1,
    rank_up: int = 128,
    rank_down: int = 128,
    targets: str | Sequence[str] = TARGETS,
    scaling: float = 1.0,
    edge_first: int = 0,
    edge_last: int = 0,
) -> Plan:
    """Return a plan that fits the model.

    Raises PartitionError, in one line, for anything the model does not have or allow.
    """
    plan = _arrange(
        config.num_layers,
        layers=layers,
        every=every,
        rank_up=rank_up,
        rank_down=rank_down,
        targets=targets,
        scaling=scaling,
        edge_first=edge_first,
        edge_last=edge_last,
    )
    plan.check_model(config)
    return plan


def _arrange(
    num_layers: int,
    *,
    layers: str | int | Sequence[int],
    every: int | Literal["all"],
    targets: str | Sequence[str],
    **numbers: float,
) -> Plan:
    chosen = parse_layers(layers, num_layers)
    try:
        return Plan.model_validate(
            {
                "num_layers": num_layers,
                "layers": chosen,
                "targets": parse_targets(targets),
                "every": len(chosen) if every == "all" else every,
                **numbers,
            }
        )
    except ValidationError as error:
        raise PartitionError(f"the plan does not fit: {explain(error)}") from error


def parse_layers(layers: str | int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the layers meant by ``all``, ``0-5,8,10-29:2``, a number, or a list of numbers.

    Ranges include both ends. The result is ascending and without repeats.
    """
    if isinstance(layers, str):
        chosen = _parse_ranges(layers, num_layers)
    else:
        chosen = {layers} if isinstance(layers, int) else set(layers)
    for layer in sorted(chosen):
        if not 0 <= layer < num_layers:
            raise _no_such_layer(layer, num_layers)
    return tuple(sorted(chosen))


def _parse_ranges(text: str, num_layers: int) -> set[int]:
    if text.strip() == "all":
        return set(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise PartitionError(
                f"layers: cannot read {part.strip()!r}; write all, or numbers and ranges such as "
                "0-5,8,10-29:2"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        step = 1 if match[3] is None else int(match[3])
        if last < first or step == 0:
            raise PartitionError(
                f"layers: {part.strip()!r} is empty; a range goes upward, with a step of 1 or more"
            )
        if last >= num_layers:
            raise _no_such_layer(last, num_layers)
        chosen.update(range(first, last + 1, step))
    return chosen


def _no_such_layer(layer: int, num_layers: int) -> PartitionError:
    return PartitionError(
        f"layers: layer {layer} does not exist; the model has layers 0 to {num_layers - 1}"
    )


def parse_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Return targets in the order q, k, v from ``q,v`` or a list, in any order."""
    given = [
        target.strip() for target in (targets.split(",") if isinstance(targets, str) else targets)
    ]
    unknown = [target for target in given if target not in TARGETS]
    if unknown or not given:
        raise PartitionError(
            f"targets: {unknown[0] if unknown else ''!r} is not a projection that can be adapted; "
            f"choose from {', '.join(TARGETS)}"
        )
    return tuple(target for target in TARGETS if target in given)


def read_plan_file(path: Path) -> PlanOptions:
    """Return the options in a YAML plan file; ConfigError naming the file and the key."""
    return read_yaml(path, PlanOptions)


def write_plan_file(path: Path, plan: Plan) -> None:
    """Write the plan's arrangement as YAML that :func:`read_plan_file` reads."""
    text = yaml.safe_dump(plan.arrangement(), sort_keys=False, default_flow_style=None)
    write_atomic(path, text.encode())
