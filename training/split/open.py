"""A split model from an edge's settings."""

from __future__ import annotations

import torch

from privatelora.partition.shard import open_shard
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.device import compute_device, compute_dtype
from privatelora.runtime.edge import link_settings
from privatelora.runtime.link_config import DownConfig, PayloadConfig, UpConfig
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.training.split.client import SplitClient
from privatelora.training.split.model import SplitCausalLM

_EXACT = PayloadConfig(
    up=UpConfig(hidden_states=("fp32",), exchange=("fp32",)),
    down=DownConfig(hidden_states=("fp32",), exchange=("fp32",)),
)


def open_split_model(config: EdgeConfig, device: str = "cpu") -> SplitCausalLM:
    """The model behind ``config.cloud``, with M zero; it connects when it is first called.

    What an edge's settings say of conversations, adapters and HTTP is left aside. ``payload`` is
    fp32 unless the settings say otherwise: an edge's usual codecs are chosen for answers, and their
    rounding would go into every gradient. Gradients travel in the codecs of their values, in bf16
    where that is fp16. ``reconnect_timeout_s``: how long a step waits for a cloud that was lost.
    ``device``: of what the edge computes.

    Raises ConfigError or PartitionError.
    """
    payload = config.payload if "payload" in config.model_fields_set else _EXACT
    settings = link_settings(config, payload)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    shard = open_shard(config.shard, "edge")
    manifest = shard.manifest
    on, dtype = compute_device(device), compute_dtype(config.dtype, manifest.dtype)
    client = SplitClient(
        manifest.config,
        manifest.plan,
        Fingerprints(*manifest.fingerprints),
        settings,
        config.reconnect_timeout_s,
        on,
    )
    try:
        return SplitCausalLM(shard, client, on, dtype)
    except BaseException:
        client.close()
        raise
