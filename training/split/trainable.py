"""Split training as one more method: what trains is M, and what it leaves is an adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from privatelora.partition.adapter import Adapter, load_adapter, save_adapter
from privatelora.partition.files import os_errors
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import write_plan_file
from privatelora.partition.published import ADAPTER_NAME, PLAN_NAME
from privatelora.training.methods import State, Trainable, TrainableM
from privatelora.training.split.model import SplitCausalLM


class TrainableSplit(Trainable):
    """M of an edge's shard, the frozen layers being on its cloud."""

    learning_rate = TrainableM.learning_rate
    plan: Plan
    packs = True

    def __init__(self, model: SplitCausalLM) -> None:
        self.model = model
        self._split = model
        self.plan = model.plan

    def save(self, directory: Path, state: State | None = None) -> dict[str, Path]:
        """Write the adapter and its plan."""
        with os_errors(f"write {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        fingerprints = self._split.fingerprints
        written = {"adapter": directory / ADAPTER_NAME, "plan": directory / PLAN_NAME}
        write_plan_file(written["plan"], self.plan)
        save_adapter(
            written["adapter"],
            Adapter(self._split.weights(), self.plan, fingerprints.basis, fingerprints.model),
        )
        return written

    def load(self, directory: Path) -> None:
        """Take an adapter for this shard."""
        fingerprints = self._split.fingerprints
        adapter = load_adapter(
            directory / ADAPTER_NAME, self.plan, fingerprints.basis, fingerprints.model
        )
        with torch.no_grad():
            for (layer, target), weight in adapter.weights.items():
                self._split.lora_M[f"{layer}_{target}"].copy_(weight)
