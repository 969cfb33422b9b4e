"""Sessions for training on a cloud: what their messages ask for, and what they may ask for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from privatelora.errors import (
    CapacityError,
    ConfigError,
    PrivateLoRAError,
    RemoteProtocolError,
    RequestError,
    SessionEvicted,
)
from privatelora.partition.plan import Plan
from privatelora.runtime.batch_runner import BatchRunner
from privatelora.runtime.cloud_peer import CloudPeer, require_shape
from privatelora.runtime.codecs import for_gradients
from privatelora.runtime.engine import Engine
from privatelora.runtime.tensors import pack, unpack
from privatelora.runtime.training_engine import Exchange, Gradients, TrainingEngine, TrainingStep
from privatelora.runtime.training_runner import TrainingPass, TrainingRunner
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    DropStep,
    ExchangeReply,
    ExchangeRequest,
    GradientReply,
    GradientRequest,
    Message,
    OpenSession,
    StepEnd,
    TensorPayload,
    TrainBegin,
)

FromTrainer = TrainBegin | ExchangeReply | BackwardBegin | GradientReply | DropStep
"""What an edge says in a session for training."""


@dataclass(frozen=True)
class TrainingLimits:
    """What a cloud gives away for training at most.

    ``max_rows``: of one batch, tokens of all its sequences. ``max_sessions``: trainers at once.
    """

    max_rows: int
    max_sessions: int


@dataclass
class _Step:
    """One that began and is not over."""

    step: TrainingStep
    backward: bool
    wanted: torch.Tensor
    """Indices of the rows that go back to the edge."""
    running: TrainingPass | None = None


class TrainingSession:
    """One trainer's steps. Made by ``TrainingService.open``."""

    def __init__(
        self,
        service: TrainingService,
        message: OpenSession,
        peer: CloudPeer,
    ) -> None:
        self._service = service
        self._session_id = message.session_id
        self._max_rows = message.max_positions
        self._hidden_codec, self._exchange_codec = message.hidden_codec, message.exchange_codec
        self._peer = peer
        self._steps: dict[int, _Step] = {}
        self.last_used = time.monotonic()

    def is_idle(self, since: float) -> bool:
        """Whether nothing has happened since then (``time.monotonic``): its edge said nothing."""
        is_computing = any(
            one.running is not None and not one.running.is_waiting for one in self._steps.values()
        )
        return self.last_used < since and not is_computing

    def take(self, message: FromTrainer) -> None:
        """Act on a message, which is legal now. Raises RequestError and RemoteProtocolError."""
        self.last_used = time.monotonic()
        match message:
            case TrainBegin():
                self._begin(message)
            case ExchangeReply(step_id=step_id, point=point, y=y):
                plan = self._service.plan
                layers = plan.span_in(plan.points[point], plan.cloud_layers)
                self._go_on(step_id, y, len(layers) * plan.y_size, "y")
            case GradientReply(step_id=step_id, z=z):
                self._go_on(step_id, z, self._service.plan.z_size, "the gradient of z")
            case BackwardBegin():
                self._begin_backward(message)
            case DropStep(step_id=step_id):
                del self._steps[step_id]

    def fail(self, error: PrivateLoRAError) -> None:
        """End the session with a reason."""
        self._peer.fail(self._session_id, error)

    def close(self) -> None:
        """Drop all steps."""
        self._service.forget(self)
        for one in self._steps.values():
            if one.running is not None:
                one.running.close()
        self._steps.clear()

    def _begin(self, message: TrainBegin) -> None:
        service, plan, engine = self._service, self._service.plan, self._service.engine
        num_rows = message.hidden_states.shape[0]
        lengths = [one.num_rows for one in message.sequences]
        require_shape(
            message.hidden_states.shape, num_rows, engine.config.hidden_size, "hidden states"
        )
        # Before the numbers are unpacked: compressed, they may stand for far more memory.
        if num_rows > self._max_rows:
            raise RequestError(
                f"a batch of {num_rows} tokens came in a session for batches of {self._max_rows}"
            )
        if max(lengths) > engine.config.max_positions:
            raise RequestError(
                f"a sequence of {max(lengths)} tokens is longer than the model's context of "
                f"{engine.config.max_positions}"
            )
        num_opening = len(plan.opening_layers)
        if (message.opening is None) != (num_opening == 0):
            raise RemoteProtocolError(f"a step must bring y of {num_opening} layers")
        opening = None
        if message.opening is not None:
            require_shape(message.opening.shape, num_rows, num_opening * plan.y_size, "opening y")
            opening = unpack(message.opening, engine.device, engine.dtype)
        hidden_states = unpack(message.hidden_states, engine.device, engine.dtype)
        step = service.steps.begin(hidden_states, lengths, opening, keep=message.backward)
        wanted, end = [], 0
        for one in message.sequences:
            end += one.num_rows
            wanted.append(torch.arange(end - one.num_output_rows, end))
        begun = _Step(step, message.backward, torch.cat(wanted).to(engine.device))
        self._steps[message.step_id] = begun
        begun.running = TrainingPass(
            step.forward(),
            partial(self._forward_done, message.step_id),
            partial(self._ask, message.step_id, ExchangeRequest, self._exchange_codec),
            self.fail,
        )
        service.runner.run(begun.running)

    def _begin_backward(self, message: BackwardBegin) -> None:
        begun, engine = self._steps[message.step_id], self._service.engine
        num_wanted, hidden_size = len(begun.wanted), engine.config.hidden_size
        require_shape(message.hidden_states.shape, num_wanted, hidden_size, "a gradient")
        of_wanted = unpack(message.hidden_states, engine.device, engine.dtype)
        gradient = of_wanted.new_zeros(begun.step.num_rows, hidden_size)
        gradient[begun.wanted] = of_wanted
        begun.running = TrainingPass(
            begun.step.backward(gradient),
            partial(self._backward_done, message.step_id),
            partial(
                self._ask, message.step_id, GradientRequest, for_gradients(self._exchange_codec)
            ),
            self.fail,
        )
        self._service.runner.run(begun.running)

    def _go_on(self, step_id: int, payload: TensorPayload, features: int, what: str) -> None:
        begun, engine = self._steps[step_id], self._service.engine
        require_shape(payload.shape, begun.step.num_rows, features, what)
        if begun.running is None:
            raise RuntimeError("an answer to a step that does not run")
        answer = unpack(payload, engine.device, engine.dtype)
        self._service.runner.run(begun.running, answer)

    def _ask(
        self,
        step_id: int,
        kind: type[ExchangeRequest] | type[GradientRequest],
        codec: str,
        exchange: Exchange,
    ) -> None:
        self._say(
            lambda: kind(
                self._session_id, step_id, exchange.point.index, pack(exchange.tensor, codec)
            )
        )

    def _forward_done(self, step_id: int, hidden_states: torch.Tensor) -> None:
        begun = self._steps[step_id]
        begun.running = None
        if not begun.backward:
            del self._steps[step_id]
        returned = hidden_states[begun.wanted]
        self._say(lambda: StepEnd(self._session_id, step_id, pack(returned, self._hidden_codec)))

    def _backward_done(self, step_id: int, found: Gradients) -> None:
        del self._steps[step_id]
        exchange, hidden = map(for_gradients, (self._exchange_codec, self._hidden_codec))
        self._say(
            lambda: BackwardEnd(
                self._session_id,
                step_id,
                None if found.opening is None else pack(found.opening, exchange),
                None if found.hidden_states is None else pack(found.hidden_states, hidden),
            )
        )

    def _say(self, message: Callable[[], Message]) -> None:
        self.last_used = time.monotonic()
        try:
            self._peer.post(message())
        except ConfigError as error:  # the codec cannot carry a value
            self.fail(error)


class TrainingService:
    """What a cloud has for trainers: its engine in turns, and room for some of them."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        limits: TrainingLimits | None,
        conversations: BatchRunner,
        max_batch_rows: int,
        min_idle_s: float,
    ) -> None:
        """``limits``: None, and nobody trains here. ``max_batch_rows``: computed at once.

        ``min_idle_s``: how long a trainer must have been idle before another gets its place.
        """
        self.engine = engine
        self.plan = plan
        self.steps = TrainingEngine(engine, plan, max_batch_rows)
        self.runner = TrainingRunner(conversations, engine.device)
        self._limits = limits
        self._min_idle_s = min_idle_s
        self._sessions: dict[TrainingSession, None] = {}

    def require(self, message: OpenSession) -> None:
        """Raise RequestError for a session that this cloud cannot have."""
        if self._limits is None:
            raise RequestError("this cloud does not train: set training: in its file to let it")
        if message.max_positions > self._limits.max_rows:
            raise RequestError(
                f"batches of {message.max_positions} tokens are more than this cloud takes "
                f"({self._limits.max_rows}); train with smaller batches and accumulate their "
                "gradients, or set training.max_rows in the cloud's file"
            )

    def open(self, message: OpenSession, peer: CloudPeer) -> TrainingSession:
        """Make a session. Raises CapacityError if there is no place and no idle trainer."""
        # More than once: a place that is freed may be taken at once by somebody who waited for it.
        while self._limits is not None and len(self._sessions) >= self._limits.max_sessions:
            since = time.monotonic() - self._min_idle_s
            idle = next((one for one in self._sessions if one.is_idle(since)), None)
            if idle is None:
                raise CapacityError(
                    f"this cloud trains {self._limits.max_sessions} sessions at once, and all are "
                    "at work; try again later",
                    self._min_idle_s,
                )
            idle.fail(SessionEvicted("this trainer was idle and another needs its place"))
        session = TrainingSession(self, message, peer)
        self._sessions[session] = None
        return session

    def forget(self, session: TrainingSession) -> None:
        """A session is over."""
        self._sessions.pop(session, None)

    def end_all(self, reason: PrivateLoRAError) -> None:
        """End every session: its edge runs the step under way again elsewhere, or later."""
        for session in list(self._sessions):
            session.fail(reason)
