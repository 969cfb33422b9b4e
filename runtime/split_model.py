"""The model as the edge sees it: its own ends, its own layers, and a cloud in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from privatelora.errors import ConnectionClosed, RemoteProtocolError, RequestError
from privatelora.partition.basis import lora_a_name
from privatelora.partition.layout import folded_norm_name
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import Plan
from privatelora.runtime.cloud_link import CloudLink, LinkSettings, open_link
from privatelora.runtime.decoder import Tensors, linear
from privatelora.runtime.engine import Engine
from privatelora.runtime.exchange import (
    ExchangeAnswers,
    PrivateMatrices,
    StepExchanges,
    reply_with,
    run_locally,
)
from privatelora.runtime.language_model import (
    Ends,
    Rows,
    Traffic,
    rows_of_chunk,
    select_rows,
)
from privatelora.runtime.link_session import LinkSession, LinkStep
from privatelora.runtime.sent_log import SentLog
from privatelora.runtime.shared_head import SharedHead
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.messages import Fingerprints, OutputRows, TensorPayload

_OUTPUT_ROWS: Mapping[Rows, OutputRows] = {
    "none": OutputRows.NONE,
    "last": OutputRows.LAST,
    "all": OutputRows.ALL,
}

MAX_STEPS_IN_FLIGHT = 32
"""Of one sequence. While one step's exchange is on the wire the cloud can compute this many others:
enough where a segment takes a 32nd of a round trip. More would only hold memory, of about as many
rows on either side, and make whoever cancels a prompt wait longer for what is left of it."""


MAX_SHARED_ROWS = 4
"""Of a step whose logits are computed together with others': more fill a product of their own."""


class EdgeParts:
    """What the edge computes whatever the adapter: embedding, own layers, folded point, head."""

    def __init__(
        self,
        config: DecoderConfig,
        plan: Plan,
        tensors: Tensors,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Build from the edge shard's ``tensors``, which are on ``device`` in ``dtype``."""
        self.config = config
        self.plan = plan
        self.device = device
        self.dtype = dtype
        self.ends = Ends(config, tensors)
        self.head = SharedHead(self.ends)
        self.first = Engine(config, plan, plan.edge_first_layers, tensors, device, dtype)
        self.last = Engine(config, plan, plan.edge_last_layers, tensors, device, dtype)
        self.answers = ExchangeAnswers(plan, device)
        norm_name = folded_norm_name(plan)
        if plan.folded_point is not None and norm_name is not None:
            self._folded_norm = tensors[norm_name]
            self._folded_a = tensors[lora_a_name(plan.folded_point)]

    @torch.inference_mode()
    def fold(
        self,
        hidden_states: torch.Tensor,
        matrices: PrivateMatrices | None,
        y: dict[int, torch.Tensor],
    ) -> None:
        """Add to ``y`` what the point at the cloud's first layer gives, if there is one."""
        point = self.plan.folded_point
        if point is None:
            return
        eps = self.config.rms_norm_eps
        normed = F.rms_norm(hidden_states, self._folded_norm.shape, self._folded_norm, eps)
        reply = reply_with(self.plan, matrices, point, linear(normed, self._folded_a))
        y.update(zip(point.layers, reply.chunk(len(point.layers), dim=1), strict=True))


class CloudAccess:
    """The one connection that all models of an edge share, opened again when it was lost."""

    def __init__(
        self,
        parts: EdgeParts,
        fingerprints: Fingerprints,
        settings: LinkSettings,
        max_positions: int,
        max_step_positions: int,
    ) -> None:
        """``max_positions``, ``max_step_positions``: of one sequence and one step."""
        self.sent = SentLog()
        self._own = self._offered = (max_positions, max_step_positions)
        self._parts = parts
        self._fingerprints = fingerprints
        self._settings = settings
        self._link: CloudLink | None = None
        self._connecting = asyncio.Lock()

    @property
    def max_positions(self) -> int:
        """Of one sequence; less while it is connected to a cloud that offers less."""
        return self._limits[0]

    @property
    def max_step_positions(self) -> int:
        """Of one step; less while it is connected to a cloud that takes smaller frames."""
        return self._limits[1]

    @property
    def _limits(self) -> tuple[int, int]:
        is_connected = self._link is not None and self._link.is_open
        return self._offered if is_connected else self._own

    async def link(self) -> CloudLink:
        """The live connection, opened now if there is none; raises as ``open_link`` does."""
        async with self._connecting:
            if self._link is not None and not self._link.is_open:
                await self._link.aclose()
                self._link = None
            if self._link is None:
                link = await open_link(
                    self._settings, self._fingerprints, self._parts.answers, self.sent
                )
                try:
                    offers = link.cloud.max_positions, self._largest_step(link)
                except RequestError:
                    await link.aclose()
                    raise
                positions, step_positions = map(min, self._own, offers)
                self._link, self._offered = link, (positions, step_positions)
            return self._link

    async def aclose(self) -> None:
        """Close the link. May be repeated."""
        if self._link is not None:
            await self._link.aclose()
            self._link = None

    def _largest_step(self, link: CloudLink) -> int:
        """Positions whose largest frame fits both ends' limits, counting 4 bytes a number."""
        plan = self._parts.plan
        widest = max(
            self._parts.config.hidden_size + len(plan.opening_layers) * plan.y_size,
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


class SplitModel:
    """The model with one adapter, or with none: opens sequences on the cloud."""

    def __init__(
        self, parts: EdgeParts, access: CloudAccess, matrices: PrivateMatrices | None
    ) -> None:
        self.config = parts.config
        self._parts = parts
        self._access = access
        self._matrices = matrices

    @property
    def max_positions(self) -> int:
        """See ``LanguageModel``."""
        return self._access.max_positions

    @property
    def max_step_positions(self) -> int:
        """See ``LanguageModel``."""
        return self._access.max_step_positions

    async def open_sequence(self, max_positions: int) -> SplitSequence:
        """Reserve a cache on the cloud. Raises CapacityError, RequestError, TransportError."""
        sequence = SplitSequence(self._parts, self._access, self._matrices, max_positions)
        await sequence.open()
        return sequence


@dataclass
class _Step:
    """A step that was sent to the cloud."""

    session: LinkSession
    on_link: LinkStep
    position: int
    rows: Rows
    cloud_rows: OutputRows


class SplitSequence:
    """One sequence: its cache lies with the cloud, and with the edge for the edge's layers."""

    def __init__(
        self,
        parts: EdgeParts,
        access: CloudAccess,
        matrices: PrivateMatrices | None,
        max_positions: int,
    ) -> None:
        """Made by ``SplitModel.open_sequence``, which opens it."""
        self._parts = parts
        self._access = access
        self._matrices = matrices
        self._max_positions = max_positions
        self._session: LinkSession | None = None
        self._earlier_traffic = Traffic()

    async def open(self) -> None:
        """Open the session on the cloud and the caches here."""
        await self._open_on(await self._access.link(), None)
        self._first_kv = self._parts.first.new_cache(self._max_positions)
        self._last_kv = self._parts.last.new_cache(self._max_positions)

    async def reopen(self) -> int:
        """See ``Sequence.reopen``."""
        lost = self._open_session()
        session = await self._open_on(await self._access.link(), lost.resume_token)
        self._earlier_traffic = self._earlier_traffic.plus(lost.traffic)
        await lost.aclose()
        return session.num_positions

    async def _open_on(self, link: CloudLink, resume: str | None) -> LinkSession:
        offered = self._access.max_positions  # which is only known now
        self._max_positions = min(self._max_positions, offered)
        self._session = session = await link.open_session(self._max_positions, resume)
        self._link, self._codecs = link, link.codecs
        return session

    @property
    def traffic(self) -> Traffic:
        """See ``Sequence.traffic``."""
        if self._session is None:
            return self._earlier_traffic
        return self._earlier_traffic.plus(self._session.traffic)

    async def forward(self, token_ids: Seq[int], position: int, rows: Rows) -> torch.Tensor:
        """See ``Sequence.forward``."""
        await self._settle()
        return await self._end(self._begin(token_ids, position, rows))

    async def forward_chunks(
        self, chunks: Seq[Seq[int]], position: int, *, all_rows: bool = False
    ) -> AsyncGenerator[torch.Tensor, None]:
        """See ``Sequence.forward_chunks``; up to MAX_STEPS_IN_FLIGHT steps at a time."""
        await self._settle()
        in_flight: deque[_Step] = deque()
        for index, chunk in enumerate(chunks):
            if len(in_flight) == MAX_STEPS_IN_FLIGHT:
                yield await self._end(in_flight.popleft())
            if in_flight:
                await asyncio.sleep(0)  # answers that are due go before the next chunk
            rows = rows_of_chunk(index, len(chunks), all_rows)
            in_flight.append(self._begin(chunk, position, rows))
            position += len(chunk)
        while in_flight:
            yield await self._end(in_flight.popleft())

    @property
    def is_open(self) -> bool:
        """See ``Sequence.is_open``."""
        return self._session is not None and self._link.is_open and self._session.is_open

    async def aclose(self) -> None:
        """See ``Sequence.aclose``."""
        if self._session is not None:
            self._earlier_traffic = self.traffic
            session, self._session = self._session, None
            await session.aclose()

    def _open_session(self) -> LinkSession:
        if self._session is None:
            raise ConnectionClosed("this sequence is closed")
        return self._session

    async def _settle(self) -> None:
        # A step may only begin where the one before it ended, if that is still in flight.
        await self._open_session().settle()

    def _begin(self, token_ids: Seq[int], position: int, rows: Rows) -> _Step:
        """Run the edge's first layers and send the step."""
        session = self._open_session()
        parts, plan = self._parts, self._parts.plan
        first = parts.first.begin(parts.ends.embed(token_ids), position, self._first_kv)
        run_locally(parts.first, first, self._matrices)
        y = first.y
        parts.fold(first.hidden_states, self._matrices, y)
        opening = None
        if plan.opening_layers:
            concatenated = torch.cat([y.pop(layer) for layer in plan.opening_layers], dim=1)
            opening = pack(concatenated, self._codecs.exchange_up)
        # The edge's last layers need every row, to cache its keys and values.
        cloud_rows = OutputRows.ALL if plan.edge_last else _OUTPUT_ROWS[rows]
        on_link = session.begin(
            position,
            cloud_rows,
            pack(first.hidden_states, self._codecs.hidden_states_up),
            opening,
            StepExchanges(self._matrices, len(token_ids), self._codecs.exchange_up, y),
        )
        return _Step(session, on_link, position, rows, cloud_rows)

    async def _end(self, step: _Step) -> torch.Tensor:
        """Wait for a step to come back and run the edge's last layers; logits."""
        parts = self._parts
        hidden_states = self._checked(await step.session.end(step.on_link), step)
        if parts.plan.edge_last:
            last = parts.last.begin(hidden_states, step.position, self._last_kv)
            late_y = step.on_link.exchanges.late_y
            last.y = {layer: y.to(parts.dtype) for layer, y in late_y.items()}
            run_locally(parts.last, last, self._matrices)
            hidden_states = select_rows(last.hidden_states, step.rows)
        if self._link.num_sessions > 1 and 0 < len(hidden_states) <= MAX_SHARED_ROWS:
            return await parts.head.logits(hidden_states)
        return parts.ends.logits(hidden_states)

    def _checked(self, returned: TensorPayload, step: _Step) -> torch.Tensor:
        num_rows = step.on_link.exchanges.num_rows
        counts = {OutputRows.NONE: 0, OutputRows.LAST: 1, OutputRows.ALL: num_rows}
        due = (counts[step.cloud_rows], self._parts.config.hidden_size)
        if returned.shape != due:
            raise RemoteProtocolError(
                f"hidden states of {returned.shape[0]} x {returned.shape[1]} came where "
                f"{due[0]} x {due[1]} were due"
            )
        return unpack(returned, self._parts.device, self._parts.dtype)
