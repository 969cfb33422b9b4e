"""A cloud from its settings: shard, engine, service and listener."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from privatelora.partition.shard import open_shard
from privatelora.runtime.client_tokens import TokensFile
from privatelora.runtime.cloud_service import CloudLimits, CloudService
from privatelora.runtime.config import CloudConfig
from privatelora.runtime.device import compute_device, compute_dtype
from privatelora.runtime.engine import Engine
from privatelora.runtime.host_port import parse_host_port
from privatelora.runtime.scheduler import Scheduler
from privatelora.runtime.telemetry_server import serving_metrics
from privatelora.runtime.trace import Trace
from privatelora.runtime.training_session import TrainingLimits
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.transports.address import parse_address
from privatelora.transports.base import Limits, Listener
from privatelora.transports.registry import listen

logger = logging.getLogger(__name__)


MAX_BATCH_ROWS = {"cpu": 64, "cuda": 512}
"""Unless the settings say so, by type of device."""


class Cloud:
    """Everything one cloud holds. Made from its settings; serves after ``listen``."""

    def __init__(
        self, config: CloudConfig, make_scheduler: Callable[..., Scheduler] = Scheduler
    ) -> None:
        """Load and verify the shard. Raises ConfigError, PartitionError or CapacityError.

        ``make_scheduler``: for comparisons; see ``CloudService``.
        """
        parse_address(config.listen)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self._is_listening = False
        self._trace = None if config.trace is None else Trace(config.trace)
        tokens = None if config.tokens is None else TokensFile(config.tokens)
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
                max_positions=min(
                    config.max_positions,
                    manifest.config.max_positions,
                    config.max_cached_positions_per_client or config.max_positions,
                ),
                max_cached_positions=config.max_cached_positions,
                max_frame_nbytes=config.max_frame_mib * 2**20,
                max_connections=config.max_connections,
                max_connections_per_client=config.max_connections_per_client,
                max_silence_s=config.max_silence_s,
                max_sessions_per_client=config.max_sessions_per_client,
                max_cached_positions_per_client=config.max_cached_positions_per_client,
                max_steps_per_s_per_client=config.max_steps_per_s_per_client,
                max_batch_rows=config.max_batch_rows or MAX_BATCH_ROWS[device.type],
                max_waiting=config.max_waiting,
                max_wait_s=config.max_wait_s,
                min_idle_s=config.min_idle_s,
                resume_timeout_s=config.resume_timeout_s,
                training=None
                if config.training is None
                else TrainingLimits(config.training.max_rows, config.training.max_sessions),
            ),
            self._trace,
            make_scheduler,
            tokens,
        )

    async def listen(self) -> Listener:
        """Start serving; ConnectError if the address is taken or not this machine's."""
        config = self.config
        limits = Limits(max_frame_nbytes=config.max_frame_mib * 2**20, spin_s=config.spin_s)
        listener = await listen(config.listen, self.service.handle, limits, config.credentials())
        self._is_listening = True
        return listener

    async def drain(self) -> None:
        """Let nobody in any more, and give those who are here time to come to an end."""
        await self.service.drain(self.config.drain_timeout_s)

    def why_not_ready(self) -> str | None:
        """Why no edge should come here now, if so."""
        if self.service.is_draining:
            return "this cloud is shutting down"
        return None if self._is_listening else "this cloud is starting"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Serve metrics and health while the context lasts, and write the trace when it is left.

        As far as the settings ask for them. Raises ConnectError if the address of the metrics
        is taken or not this machine's, and ConfigError if the trace cannot be written any more.
        """
        with ExitStack() as stack:
            if self._trace is not None:
                stack.callback(self._trace.write)
            if self.config.metrics is not None:
                host, port = parse_host_port(self.config.metrics)
                registry = self.service.metrics.registry
                server = serving_metrics(registry, self.why_not_ready, host, port)
                port = stack.enter_context(server)
                logger.info("metrics at http://%s:%d/metrics", host, port)
            yield
