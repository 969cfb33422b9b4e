"""An edge from its settings: shard, adapter and the link to its cloud."""

from __future__ import annotations

import torch

from privatelora.errors import ConfigError
from privatelora.partition.adapter import init_adapter, load_adapter
from privatelora.partition.shard import Shard, open_shard
from privatelora.partition.tokenizer import load_tokenizer
from privatelora.runtime.chat import TextModel
from privatelora.runtime.cloud_link import LinkSettings
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.device import compute_dtype
from privatelora.runtime.exchange import PrivateMatrices
from privatelora.runtime.split_model import EdgeParts, SplitModel
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.transports.address import parse_address


class Edge:
    """Everything one edge holds. Made from its settings; connects when first used."""

    def __init__(self, config: EdgeConfig) -> None:
        """Load and verify the shard and adapter. Raises ConfigError or PartitionError."""
        parse_address(config.cloud)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.shard = open_shard(config.shard, "edge")
        manifest = self.shard.manifest
        dtype = compute_dtype(config.dtype, manifest.dtype)
        device = torch.device("cpu")
        matrices = _matrices(config, self.shard)
        tensors = self.shard.load(device, dtype)
        parts = EdgeParts(manifest.config, manifest.plan, tensors, matrices, device, dtype)
        model_limit = manifest.config.max_positions
        self.model = SplitModel(
            parts,
            Fingerprints(*manifest.fingerprints),
            LinkSettings(
                address=config.cloud,
                codecs=config.payload.preferences(),
                credentials=config.credentials(),
                impaired=config.impaired,
                connect_timeout_s=config.connect_timeout_s,
                step_timeout_s=config.step_timeout_s,
                max_frame_nbytes=config.max_frame_mib * 2**20,
                spin_s=config.spin_s,
            ),
            max_positions=min(config.max_positions, model_limit),
            max_step_positions=config.prefill_chunk,
        )
        self.text = TextModel(self.model, load_tokenizer(self.shard.tokenizer_dir))

    async def aclose(self) -> None:
        """Close the link to the cloud."""
        await self.model.aclose()


def _matrices(config: EdgeConfig, shard: Shard) -> PrivateMatrices:
    manifest = shard.manifest
    fingerprints = manifest.fingerprints
    if config.adapter is None:
        adapter = init_adapter(manifest.plan, fingerprints.basis, fingerprints.model)
    elif not config.adapter.is_file():
        raise ConfigError(
            f"adapter {config.adapter} does not exist; make one with privatelora adapter init, or "
            "leave the key out to run the base model"
        )
    else:
        adapter = load_adapter(
            config.adapter, manifest.plan, fingerprints.basis, fingerprints.model
        )
    return PrivateMatrices(manifest.plan, adapter.weights)
