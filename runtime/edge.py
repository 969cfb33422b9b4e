"""An edge from its settings: shard, adapter and the link to its cloud."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from privatelora.errors import ConfigError, PrivateLoRAError
from privatelora.partition.adapter import load_adapter
from privatelora.partition.shard import Shard, open_shard
from privatelora.partition.tokenizer import load_tokenizer
from privatelora.runtime.chat import TextModel
from privatelora.runtime.client_tokens import token_to_send
from privatelora.runtime.cloud_link import CloudLink, LinkSettings
from privatelora.runtime.config import EdgeConfig
from privatelora.runtime.device import compute_dtype
from privatelora.runtime.edge_service import CloudStatus, EdgeService
from privatelora.runtime.exchange import PrivateMatrices
from privatelora.runtime.language_model import LanguageModel
from privatelora.runtime.link_config import PayloadConfig
from privatelora.runtime.sent_log import SentLog
from privatelora.runtime.split_model import CloudAccess, EdgeParts, SplitModel
from privatelora.runtime.wire.messages import Fingerprints
from privatelora.transports.address import parse_address

NUM_PINGS = 3
"""The quickest counts: what the others took longer is not the network's."""


class Edge:
    """Everything one edge holds. Made from its settings; connects when first used."""

    def __init__(self, config: EdgeConfig) -> None:
        """Load and verify the shard and adapter. Raises ConfigError or PartitionError."""
        settings = link_settings(config, config.payload)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.shard = open_shard(config.shard, "edge")
        manifest = self.shard.manifest
        dtype = compute_dtype(config.dtype, manifest.dtype)
        device = torch.device("cpu")
        adapters = {
            name: _matrices(file, self.shard) for name, file in config.adapter_files().items()
        }
        tensors = self.shard.load(device, dtype)
        parts = EdgeParts(manifest.config, manifest.plan, tensors, device, dtype)
        model_limit = manifest.config.max_positions
        self.access = CloudAccess(
            parts,
            Fingerprints(*manifest.fingerprints),
            settings,
            max_positions=min(config.max_positions, model_limit),
            max_step_positions=config.prefill_chunk,
        )
        tokenizer = load_tokenizer(self.shard.tokenizer_dir)
        every = {**adapters, config.base_model: None}
        self.texts = {
            name: TextModel(SplitModel(parts, self.access, matrices), tokenizer)
            for name, matrices in every.items()
        }
        """Models by name, the default first."""
        self.text = next(iter(self.texts.values()))
        self.service = EdgeService(
            self.texts,
            self,
            defaults=config.sampling,
            system_prompt=config.system_prompt,
            max_conversations=config.max_conversations,
            max_waiting=config.max_waiting,
            patience_s=config.reconnect_timeout_s,
        )

    @property
    def model(self) -> LanguageModel:
        """The default one."""
        return self.text.model

    @property
    def sent(self) -> SentLog:
        """See ``CloudProbe``."""
        return self.access.sent

    @property
    def max_positions(self) -> int:
        """See ``CloudProbe``."""
        return self.access.max_positions

    async def connect(self) -> CloudLink:
        """The connection to the cloud, opened now if there is none; raises as ``open_link``."""
        return await self.access.link()

    async def probe(self) -> CloudStatus:
        """See ``CloudProbe``."""
        address = self.config.cloud
        try:
            link = await self.connect()
            return CloudStatus(
                address,
                software=link.cloud.software,
                rtt_s=min([await link.ping() for _ in range(NUM_PINGS)]),
            )
        except PrivateLoRAError as error:
            return CloudStatus(address, problem=str(error))

    async def aclose(self) -> None:
        """Free what conversations hold and close the link to the cloud."""
        await self.service.aclose()
        await self.access.aclose()


def link_settings(config: EdgeConfig, payload: PayloadConfig) -> LinkSettings:
    """How the settings reach their cloud; ConfigError if they cannot."""
    parse_address(config.cloud)
    token = None
    if config.token is not None:
        token = partial(
            token_to_send, config.token, config.cloud, with_curve=config.curve is not None
        )
        token()  # now, for a mistake in the settings is said at the start
    return LinkSettings(
        address=config.cloud,
        codecs=payload.preferences(),
        credentials=config.credentials(),
        impaired=config.impaired,
        connect_timeout_s=config.connect_timeout_s,
        step_timeout_s=config.step_timeout_s,
        keepalive_s=config.keepalive_s,
        max_frame_nbytes=config.max_frame_mib * 2**20,
        spin_s=config.spin_s,
        token=token,
    )


def _matrices(file: Path, shard: Shard) -> PrivateMatrices:
    manifest = shard.manifest
    fingerprints = manifest.fingerprints
    if not file.is_file():
        raise ConfigError(
            f"adapter {file} does not exist; make one with privatelora adapter init, or leave it "
            "out: the base model is always on offer"
        )
    adapter = load_adapter(file, manifest.plan, fingerprints.basis, fingerprints.model)
    return PrivateMatrices(manifest.plan, adapter.weights)
