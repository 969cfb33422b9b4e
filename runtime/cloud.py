"""A cloud from its settings: shard, engine, service and listener."""

from __future__ import annotations

import torch

from privatelora.partition.shard import open_shard
from privatelora.runtime.cloud_service import CloudLimits, CloudService
from privatelora.runtime.config import CloudConfig
from privatelora.runtime.device import compute_device, compute_dtype
from privatelora.runtime.engine import Engine
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.transports.address import parse_address
from privatelora.transports.base import Limits, Listener
from privatelora.transports.registry import listen


class Cloud:
    """Everything one cloud holds. Made from its settings; serves after ``listen``."""

    def __init__(self, config: CloudConfig) -> None:
        """Load and verify the shard. Raises ConfigError, PartitionError or CapacityError."""
        parse_address(config.listen)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.shard = open_shard(config.shard, "cloud")
        manifest = self.shard.manifest
        device = compute_device(config.device)
        dtype = compute_dtype(config.dtype, manifest.dtype)
        tensors = self.shard.load(device, dtype)
        engine = Engine(
            manifest.config, manifest.plan, manifest.plan.cloud_layers, tensors, device, dtype
        )
        self.service = CloudService(
            engine,
            manifest.plan,
            Fingerprints(*manifest.fingerprints),
            CloudLimits(
                max_sessions=config.max_sessions,
                max_positions=min(config.max_positions, manifest.config.max_positions),
                max_cached_positions=config.max_cached_positions,
                max_frame_nbytes=config.max_frame_mib * 2**20,
            ),
        )

    async def listen(self) -> Listener:
        """Start serving; ConnectError if the address is taken or not this machine's."""
        config = self.config
        limits = Limits(max_frame_nbytes=config.max_frame_mib * 2**20, spin_s=config.spin_s)
        return await listen(config.listen, self.service.handle, limits, config.credentials())
