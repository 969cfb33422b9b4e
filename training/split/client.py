"""Steps of a batch through the cloud, forward and back, whatever becomes of the link meanwhile.

A step holds what it was begun with. When the link is lost, or the cloud has dropped what it kept,
the step is run again on another: what it gives depends on nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from privatelora.errors import (
    CapacityError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    RequestError,
)
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.plan import ExchangePoint, Plan
from privatelora.runtime.cloud_link import LinkSettings
from privatelora.runtime.codecs import for_gradients
from privatelora.runtime.recovery import LOST, recover
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    BatchSequence,
    DropStep,
    ExchangeReply,
    ExchangeRequest,
    Fingerprints,
    GradientReply,
    GradientRequest,
    StepEnd,
    TensorPayload,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import MAX_SEQUENCES, MAX_TRAINING_STEPS
from privatelora.training.split.exchange import gradients, reply
from privatelora.training.split.link import FromCloud, TrainingLink, open_training_link
from privatelora.training.split.loop_thread import LoopThread

T = TypeVar("T")
M = TypeVar("M", bound=FromCloud)


@dataclass(eq=False)
class SplitStep:
    """A batch that was begun: what it began with, and where it is."""

    sequences: Sequence[BatchSequence]
    hidden_states: torch.Tensor
    """(rows, hidden_size): what the cloud's first layer reads."""
    opening: torch.Tensor | None
    """Y of ``Plan.opening_layers`` side by side."""
    stacked: Mapping[int, torch.Tensor]
    """All M of each point that the cloud asks for, by its index, as they were."""
    backward: bool
    z: dict[int, torch.Tensor] = field(default_factory=dict)
    link: TrainingLink | None = None
    """The one on which the cloud keeps what its backward pass needs."""
    step_id: int = -1


@dataclass(frozen=True)
class StepGradients:
    """What a backward pass gives; shapes as those of what a ``SplitStep`` holds."""

    hidden_states: torch.Tensor | None
    opening: torch.Tensor | None
    stacked: dict[int, torch.Tensor]


class SplitClient:
    """Runs steps on the cloud, for code that waits in the ordinary way."""

    def __init__(
        self,
        config: DecoderConfig,
        plan: Plan,
        fingerprints: Fingerprints,
        settings: LinkSettings,
        patience_s: float,
        device: torch.device,
    ) -> None:
        """``patience_s``: how long it waits for a cloud that was lost. ``device``: of the edge."""
        self.thread = LoopThread("privatelora-split-training")
        self._config = config
        self._plan = plan
        self._fingerprints = fingerprints
        self._settings = settings
        self._patience_s = patience_s
        self._device = device
        self._link: TrainingLink | None = None
        self._was_open = False
        self._kept: dict[int, weakref.ref[SplitStep]] = {}
        """What the cloud keeps on the present link, oldest first, by the id of the step."""
        self._earlier_nbytes = (0, 0)
        self._num_cloud_layers = {
            point.index: len(plan.span_in(point, plan.cloud_layers)) for point in plan.wire_points
        }
        """How many of a span's layers the cloud has, of each point it asks for."""
        self._needs_input_gradient = plan.layers[0] < plan.cloud_layers.start

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes of messages of steps sent and received since the beginning."""
        sent, received = self._earlier_nbytes
        if self._link is not None:
            sent, received = sent + self._link.sent_nbytes, received + self._link.received_nbytes
        return sent, received

    def forward(self, step: SplitStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step.

        Returns the hidden states (wanted rows, hidden_size) and y (rows, layers * y_size) float32
        for layers that the edge runs after the cloud's and whose point the cloud has.

        Raises RequestError if the cloud does not take such a batch, and as ``recover``.
        """
        return self.thread.run(self._recovering(lambda: self._forward(step)))

    def backward(
        self, step: SplitStep, of_hidden_states: torch.Tensor, of_late_y: torch.Tensor
    ) -> StepGradients:
        """Go back from the gradients of what ``forward`` gave; raises as that does."""

        async def run() -> StepGradients:
            if step.link is None or step.link is not self._link or not step.link.is_open:
                await self._forward(step)
            if step.link is None:
                raise LocalProtocolError("a step that nothing was kept of cannot go back")
            return await self._backward(step, step.link, of_hidden_states, of_late_y)

        return self.thread.run(self._recovering(run))

    def close(self) -> None:
        """Close the link. May be repeated."""
        if self._link is not None:
            self.thread.run(self._drop_link())
        self.thread.close()

    async def _recovering(self, work: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            try:
                return await work()
            except BaseException:
                # Where it was is unknown now.
                await self._drop_link()
                raise

        try:
            return await attempt()
        except (ProtocolError, CapacityError, *LOST) as error:
            if not self._was_open:
                raise  # a mistake in the settings more often than a cloud that is lost
            return await recover(attempt, error, self._patience_s)

    async def _drop_link(self) -> None:
        link, self._link = self._link, None
        self._kept.clear()
        if link is not None:
            sent, received = self._earlier_nbytes
            self._earlier_nbytes = sent + link.sent_nbytes, received + link.received_nbytes
            await link.aclose()

    async def _link_for(self, step: SplitStep) -> TrainingLink:
        """An open link with a session for as many rows as the step has."""
        num_rows = step.hidden_states.shape[0]
        link = self._link
        if link is not None and (not link.is_open or link.max_rows < num_rows):
            await self._drop_link()
            link = None
        if link is None:
            link = self._link = await open_training_link(
                self._settings, self._fingerprints, num_rows
            )
            self._was_open = True
        self._require_frames(num_rows, len(step.sequences), link)
        return link

    def _require_frames(self, num_rows: int, num_sequences: int, link: TrainingLink) -> None:
        """Raise RequestError if a message of a step could be too large, at 4 bytes a number."""
        plan = self._plan
        widest = max(
            self._config.hidden_size + len(plan.opening_layers) * plan.y_size,
            max(self._num_cloud_layers.values(), default=0) * plan.y_size,
            plan.z_size,
        )
        most = (link.max_frame_nbytes - 4096 - 8 * MAX_SEQUENCES) // (4 * widest)
        if num_rows > most or num_sequences > MAX_SEQUENCES:
            raise RequestError(
                f"a batch of {num_rows} tokens in {num_sequences} sequences does not fit into a "
                f"message of {link.max_frame_nbytes} bytes, at most {most} tokens in "
                f"{MAX_SEQUENCES} do; train with smaller batches and accumulate their gradients, "
                "or raise max_frame_mib on both ends"
            )

    def _make_place(self, link: TrainingLink) -> None:
        """Drop what the cloud keeps of steps that nobody can go back through, or of the oldest."""
        for step_id, ref in list(self._kept.items()):
            if ref() is None:
                self._drop_step(link, step_id)
        while link.num_steps >= MAX_TRAINING_STEPS and self._kept:
            self._drop_step(link, next(iter(self._kept)))

    def _drop_step(self, link: TrainingLink, step_id: int) -> None:
        step = self._kept.pop(step_id)()
        link.send(DropStep(link.session_id, step_id))
        link.forget(step_id)
        if step is not None:
            step.link = None

    async def _forward(self, step: SplitStep) -> tuple[torch.Tensor, torch.Tensor]:
        link = await self._link_for(step)
        self._make_place(link)
        plan, codecs = self._plan, link.codecs
        num_rows = step.hidden_states.shape[0]
        hidden_states = pack(step.hidden_states, codecs.hidden_states_up)
        opening = None if step.opening is None else pack(step.opening, codecs.exchange_up)
        session_id, step_id = link.new_step()
        link.send(
            TrainBegin(
                session_id, step_id, tuple(step.sequences), step.backward, hidden_states, opening
            )
        )
        late_y = torch.zeros(num_rows, 0, device=self._device)
        for point in plan.wire_points:
            asked = _due(await link.hear(step_id), ExchangeRequest, point)
            z = self._read(asked.z, num_rows, plan.z_size, torch.float32)
            y = reply(plan, z, step.stacked[point.index])
            num_cloud = self._num_cloud_layers[point.index] * plan.y_size
            sent, late_y = y[:, :num_cloud], y[:, num_cloud:]
            if step.backward:
                step.z[point.index] = z
            link.send(
                ExchangeReply(session_id, step_id, point.index, pack(sent, codecs.exchange_up))
            )
        ended = _due(await link.hear(step_id), StepEnd, None)
        if step.backward:
            step.link, step.step_id = link, step_id
            self._kept[step_id] = weakref.ref(step)
        else:
            link.forget(step_id)
        num_wanted = sum([one.num_output_rows for one in step.sequences])
        hidden_size = self._config.hidden_size
        returned = self._read(
            ended.hidden_states, num_wanted, hidden_size, step.hidden_states.dtype
        )
        return returned, late_y

    async def _backward(
        self,
        step: SplitStep,
        link: TrainingLink,
        of_hidden_states: torch.Tensor,
        of_late_y: torch.Tensor,
    ) -> StepGradients:
        plan, codecs, step_id = self._plan, link.codecs, step.step_id
        session_id = link.session_id
        up = for_gradients(codecs.exchange_up)
        step.link = None
        del self._kept[step_id]
        gradient = pack(of_hidden_states, for_gradients(codecs.hidden_states_up))
        link.send(BackwardBegin(session_id, step_id, gradient))
        num_rows = step.hidden_states.shape[0]
        of_stacked = {}
        for point in reversed(plan.wire_points):
            asked = _due(await link.hear(step_id), GradientRequest, point)
            num_cloud = self._num_cloud_layers[point.index]
            of_y = self._read(asked.y, num_rows, num_cloud * plan.y_size, torch.float32)
            if num_cloud < len(point.layers):
                of_y = torch.cat([of_y, of_late_y], dim=1)
            of_z, of_stacked[point.index] = gradients(
                plan, step.z[point.index], step.stacked[point.index], of_y
            )
            link.send(GradientReply(session_id, step_id, point.index, pack(of_z, up)))
        ended = _due(await link.hear(step_id), BackwardEnd, None)
        link.forget(step_id)
        step.z.clear()
        return StepGradients(
            self._read_gradient(
                ended.hidden_states, step.hidden_states, self._needs_input_gradient
            ),
            self._read_gradient(ended.opening, step.opening, step.opening is not None),
            of_stacked,
        )

    def _read(
        self, payload: TensorPayload, num_rows: int, features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        if payload.shape != (num_rows, features):
            raise RemoteProtocolError(
                f"a tensor of {payload.shape[0]} x {payload.shape[1]} came where {num_rows} x "
                f"{features} was due"
            )
        return unpack(payload, self._device, dtype)

    def _read_gradient(
        self, payload: TensorPayload | None, of: torch.Tensor | None, is_due: bool
    ) -> torch.Tensor | None:
        if (payload is not None) != is_due:
            raise RemoteProtocolError("the cloud's BackwardEnd has not the gradients that are due")
        if payload is None or of is None:
            return None
        num_rows, features = of.shape
        return self._read(payload, num_rows, features, of.dtype)


def _due(message: FromCloud, kind: type[M], point: ExchangePoint | None) -> M:
    """``message``, which has to be a ``kind``, of ``point`` if one is due."""
    if isinstance(message, kind):
        found = getattr(message, "point", None)
        if found == (None if point is None else point.index):
            return message
    where = "" if point is None else f" of point {point.index}"
    raise RemoteProtocolError(
        f"the cloud said {type(message).__name__} where {kind.__name__}{where} was due"
    )
