"""The model as the edge sees it: its own ends, its own layers, and a cloud in between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch.nn import functional as F

from privatelora.errors import ConnectionClosed, RemoteProtocolError, RequestError
from privatelora.partition.basis import lora_a_name
from privatelora.partition.layout import folded_norm_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import Plan
from privatelora.runtime.cloud_link import CloudLink, LinkSession, LinkSettings, open_link
from privatelora.runtime.decoder import Tensors, linear
from privatelora.runtime.engine import Engine
from privatelora.runtime.exchange import PrivateMatrices, run_locally
from privatelora.runtime.language_model import Ends, Rows, Traffic, select_rows
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.messages import Fingerprints, OutputRows, TensorPayload

_OUTPUT_ROWS: Mapping[Rows, OutputRows] = {
    "none": OutputRows.NONE,
    "last": OutputRows.LAST,
    "all": OutputRows.ALL,
}


class EdgeParts:
    """Everything the edge computes: embedding, own layers, M, folded point, norm and head."""

    def __init__(
        self,
        config: DecoderConfig,
        plan: Plan,
        tensors: Tensors,
        matrices: PrivateMatrices,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Build from the edge shard's ``tensors``, which are on ``device`` in ``dtype``."""
        self.config = config
        self.plan = plan
        self.matrices = matrices
        self.device = device
        self.dtype = dtype
        self.ends = Ends(config, tensors)
        self.first = Engine(config, plan, plan.edge_first_layers, tensors, device, dtype)
        self.last = Engine(config, plan, plan.edge_last_layers, tensors, device, dtype)
        self.num_cloud_layers = {
            point.index: len(plan.span_in(point, plan.cloud_layers)) for point in plan.wire_points
        }
        """How many of a span's layers the cloud has, by the index of each point it may ask for."""
        norm_name = folded_norm_name(plan)
        if plan.folded_point is not None and norm_name is not None:
            self._folded_norm = tensors[norm_name]
            self._folded_a = tensors[lora_a_name(plan.folded_point)]

    @torch.inference_mode()
    def fold(self, hidden_states: torch.Tensor, y: dict[int, torch.Tensor]) -> None:
        """Add to ``y`` what the point at the cloud's first layer gives, if there is one."""
        point = self.plan.folded_point
        if point is None:
            return
        eps = self.config.rms_norm_eps
        normed = F.rms_norm(hidden_states, self._folded_norm.shape, self._folded_norm, eps)
        reply = self.matrices.reply(point, linear(normed, self._folded_a))
        y.update(zip(point.layers, reply.chunk(len(point.layers), dim=1), strict=True))


class SplitModel:
    """Opens sequences on the cloud, connecting (again) when there is no live link."""

    def __init__(
        self,
        parts: EdgeParts,
        fingerprints: Fingerprints,
        settings: LinkSettings,
        max_positions: int,
        max_step_positions: int,
    ) -> None:
        self.config = parts.config
        self.max_positions = max_positions
        self.max_step_positions = max_step_positions
        self._parts = parts
        self._fingerprints = fingerprints
        self._settings = settings
        self._link: CloudLink | None = None
        self._connecting = asyncio.Lock()

    async def link(self) -> CloudLink:
        """The live connection, opened now if there is none; raises as ``open_link`` does."""
        async with self._connecting:
            if self._link is not None and not self._link.is_open:
                await self._link.aclose()
                self._link = None
            if self._link is None:
                link = await open_link(self._settings, self._fingerprints)
                self._link = link
                self.max_positions = min(self.max_positions, link.cloud.max_positions)
                self.max_step_positions = min(self.max_step_positions, self._largest_step(link))
            return self._link

    async def open_sequence(self, max_positions: int) -> SplitSequence:
        """Reserve a cache on the cloud. Raises CapacityError, RequestError, TransportError."""
        link = await self.link()
        sequence = SplitSequence(self._parts, link)
        await sequence.open(min(max_positions, self.max_positions))
        return sequence

    async def aclose(self) -> None:
        """Close the link. May be repeated."""
        if self._link is not None:
            await self._link.aclose()
            self._link = None

    def _largest_step(self, link: CloudLink) -> int:
        """Positions whose largest frame fits both ends' limits, counting 4 bytes a number."""
        plan = self._parts.plan
        widest = max(
            self.config.hidden_size + len(plan.opening_layers) * plan.y_size,
            plan.every * plan.y_size,
            plan.z_size,
        )
        smaller = min(link.cloud.max_frame_nbytes, self._settings.max_frame_nbytes)
        positions = (smaller - 4096) // (4 * widest)
        if positions < 1:
            raise RequestError(
                f"the cloud takes frames of {smaller} bytes at most, too few for one position of "
                "this model; raise max_frame_mib"
            )
        return positions


class SplitSequence:
    """One sequence: its cache lies with the cloud, and with the edge for the edge's layers."""

    def __init__(self, parts: EdgeParts, link: CloudLink) -> None:
        self._parts = parts
        self._link = link
        self._codecs = link.codecs
        self._session: LinkSession | None = None
        # y for layers the edge runs after the cloud, from points of the step in flight.
        self._late_y: dict[int, torch.Tensor] = {}
        self._num_rows = 0
        self.traffic = Traffic()

    async def open(self, max_positions: int) -> None:
        """Open the session on the cloud and the caches here."""
        self._session = await self._link.open_session(max_positions, self._answer)
        self.traffic = self._session.traffic
        self._first_kv = self._parts.first.new_cache(max_positions)
        self._last_kv = self._parts.last.new_cache(max_positions)

    async def forward(self, token_ids: Seq[int], position: int, rows: Rows) -> torch.Tensor:
        """See ``Sequence.forward``."""
        if self._session is None:
            raise ConnectionClosed("this sequence is closed")
        await self._session.settle()  # an earlier step's answers need what it left here
        parts, plan = self._parts, self._parts.plan
        first = parts.first.begin(parts.ends.embed(token_ids), position, self._first_kv)
        run_locally(parts.first, first, parts.matrices)
        y = first.y
        parts.fold(first.hidden_states, y)
        opening = None
        if plan.opening_layers:
            concatenated = torch.cat([y.pop(layer) for layer in plan.opening_layers], dim=1)
            opening = pack(concatenated, self._codecs.exchange_up)
        self._late_y = y
        self._num_rows = len(token_ids)
        # The edge's last layers need every row, to cache its keys and values.
        cloud_rows = OutputRows.ALL if plan.edge_last else _OUTPUT_ROWS[rows]
        returned = await self._session.step(
            position,
            cloud_rows,
            pack(first.hidden_states, self._codecs.hidden_states_up),
            opening,
        )
        hidden_states = self._checked(returned, cloud_rows)
        if plan.edge_last:
            last = parts.last.begin(hidden_states, position, self._last_kv)
            last.y = {layer: value.to(parts.dtype) for layer, value in self._late_y.items()}
            run_locally(parts.last, last, parts.matrices)
            hidden_states = select_rows(last.hidden_states, rows)
        return parts.ends.logits(hidden_states)

    async def aclose(self) -> None:
        """See ``Sequence.aclose``."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.aclose()

    def _answer(self, index: int, z: TensorPayload) -> TensorPayload:
        """Y of an exchange point for the cloud's layers; the rest is kept for the edge's own."""
        parts, plan = self._parts, self._parts.plan
        num_cloud = parts.num_cloud_layers.get(index)
        if num_cloud is None:
            raise RemoteProtocolError(f"the cloud asked for point {index}, which is not its own")
        point = plan.points[index]
        if z.shape != (self._num_rows, plan.z_size):
            raise RemoteProtocolError(
                f"z of {z.shape[0]} x {z.shape[1]} came where {self._num_rows} x {plan.z_size} "
                "was due"
            )
        y = parts.matrices.reply(point, unpack(z, parts.device, torch.float32))
        if num_cloud < len(point.layers):
            late_layers = point.layers[num_cloud:]
            late = y[:, num_cloud * plan.y_size :].chunk(len(late_layers), dim=1)
            self._late_y.update(zip(late_layers, late, strict=True))
            y = y[:, : num_cloud * plan.y_size]
        return pack(y, self._codecs.exchange_up)

    def _checked(self, returned: TensorPayload, rows: OutputRows) -> torch.Tensor:
        due = {OutputRows.NONE: 0, OutputRows.LAST: 1, OutputRows.ALL: self._num_rows}[rows]
        if returned.shape != (due, self._parts.config.hidden_size):
            raise RemoteProtocolError(
                f"hidden states of {returned.shape[0]} x {returned.shape[1]} came where "
                f"{due} x {self._parts.config.hidden_size} were due"
            )
        return unpack(returned, self._parts.device, self._parts.dtype)
