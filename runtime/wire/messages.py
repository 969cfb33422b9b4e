"""What the two ends say to each other.

The edge connects and speaks first (``Hello``); the cloud answers with its own ``Hello`` or an
``ErrorReply``. The edge then opens sessions, each a sequence with a KV cache on the cloud, and
runs steps in them:

    StepBegin -> (ExchangeRequest <- , ExchangeReply ->) for every wire point -> StepEnd <-

(arrows as seen by the edge). Ids are chosen by the edge and never reused on a connection:
session ids and nonces of pings ascend over the connection, step ids within their session, gaps
allowed.

Sessions for training run batches of whole sequences instead, forward and then backward:

    TrainBegin -> (ExchangeRequest <- , ExchangeReply ->) for every wire point -> StepEnd <-
    BackwardBegin -> (GradientRequest <- , GradientReply ->) for every wire point -> BackwardEnd <-

Every message is immutable; tensors are opaque bytes with their shape and codec name here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

PROTOCOL_VERSION = 1

Buffer = bytes | bytearray | memoryview
"""Bytes as they travel; a memoryview is contiguous, of single bytes, with one dimension."""


class Role(StrEnum):
    """Which end of the split a peer is."""

    CLOUD = "cloud"
    EDGE = "edge"


class ErrorCode(StrEnum):
    """Why an ErrorReply was sent; decides which exception the receiver raises."""

    VERSION = "version"
    """Protocol versions differ -> VersionMismatch."""
    MISMATCH = "mismatch"
    """Shards, plan or basis do not belong together -> PartitionError."""
    PROTOCOL = "protocol"
    """The receiver of this reply broke the protocol -> LocalProtocolError."""
    CAPACITY = "capacity"
    """A limit is reached -> CapacityError."""
    EVICTED = "evicted"
    """The session's cache was needed elsewhere; its text rebuilds it -> SessionEvicted."""
    DRAINING = "draining"
    """The cloud shuts down and lets nobody in any more -> CloudDraining."""
    REQUEST = "request"
    """This request cannot be served -> RequestError."""
    AUTH = "auth"
    """Identity refused -> AuthError."""
    INTERNAL = "internal"
    """The sender failed -> PrivateLoRAError."""


class OutputRows(IntEnum):
    """Which rows of a step's final hidden states the edge wants back."""

    NONE = 0
    LAST = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class TensorPayload:
    """A tensor as bytes: ``codec`` names how to read ``data``; ``shape`` is (rows, features)."""

    codec: str
    shape: tuple[int, int]
    data: Buffer


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What must be equal on both ends (hex SHA-256 each)."""

    model: str
    plan: str
    basis: str


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each end.

    ``codecs``: payload codecs this end can decode, best first.
    ``max_frame_nbytes``: largest frame this end accepts.
    ``max_positions``, ``max_sessions``: what the cloud offers, zeros from an edge.
    ``token``: with which an edge proves who it is, to a cloud that asks for one.
    """

    role: Role
    software: str
    fingerprints: Fingerprints
    codecs: tuple[str, ...]
    max_frame_nbytes: int
    max_positions: int = 0
    max_sessions: int = 0
    capabilities: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Edge: make a sequence with room for ``max_positions`` tokens.

    ``hidden_codec`` and ``exchange_codec``: how the cloud is to encode what it sends back.
    ``resume``: the token of a sequence to go on with, if the cloud still has its cache.
    ``training``: no sequence, but batches to train on, each of at most ``max_positions`` rows.
    """

    session_id: int
    max_positions: int
    hidden_codec: str
    exchange_codec: str
    resume: str | None = field(default=None, repr=False)
    training: bool = False


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """Cloud: the sequence exists.

    ``num_positions``: of the sequence to go on with, those whose steps have ended; 0 in a new one.
    ``resume``: with what this sequence can be gone on with on another connection, once.
    """

    session_id: int
    max_positions: int
    num_positions: int = 0
    resume: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class StepBegin:
    """Edge: run ``hidden_states.shape[0]`` positions, the first of them ``position``.

    A cache longer than ``position`` is truncated to it first. ``opening``: y of
    ``Plan.opening_layers``, concatenated in that order, or None if there are none.
    """

    session_id: int
    step_id: int
    position: int
    output_rows: OutputRows
    hidden_states: TensorPayload
    opening: TensorPayload | None


@dataclass(frozen=True, slots=True)
class ExchangeRequest:
    """Cloud: z of exchange point ``point``."""

    session_id: int
    step_id: int
    point: int
    z: TensorPayload


@dataclass(frozen=True, slots=True)
class ExchangeReply:
    """Edge: y of every cloud layer in the point's span."""

    session_id: int
    step_id: int
    point: int
    y: TensorPayload


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Cloud: the step is done; hidden states of the rows asked for (0 rows if NONE)."""

    session_id: int
    step_id: int
    hidden_states: TensorPayload


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """One sequence of a batch: how many rows it has, and how many of the last are wanted back."""

    num_rows: int
    num_output_rows: int


@dataclass(frozen=True, slots=True)
class TrainBegin:
    """Edge: run whole sequences from their first position on, each on its own.

    ``sequences``: in the order of their rows in ``hidden_states``. ``opening``: as in StepBegin.
    ``backward``: whether the cloud keeps what a BackwardBegin needs, until that or DropStep.
    """

    session_id: int
    step_id: int
    sequences: tuple[BatchSequence, ...]
    backward: bool
    hidden_states: TensorPayload
    opening: TensorPayload | None


@dataclass(frozen=True, slots=True)
class BackwardBegin:
    """Edge: the gradient of the loss with respect to the hidden states that StepEnd returned."""

    session_id: int
    step_id: int
    hidden_states: TensorPayload


@dataclass(frozen=True, slots=True)
class GradientRequest:
    """Cloud: the gradient with respect to y of every cloud layer in the point's span."""

    session_id: int
    step_id: int
    point: int
    y: TensorPayload


@dataclass(frozen=True, slots=True)
class GradientReply:
    """Edge: the gradient with respect to z of exchange point ``point``, by way of y."""

    session_id: int
    step_id: int
    point: int
    z: TensorPayload


@dataclass(frozen=True, slots=True)
class BackwardEnd:
    """Cloud: the backward pass is done, and what it needed is gone.

    ``opening``: the gradient with respect to the opening's y, None if there was none.
    ``hidden_states``: that with respect to the hidden states the step began with, None unless
    the plan adapts a layer in front of the cloud's.
    """

    session_id: int
    step_id: int
    opening: TensorPayload | None
    hidden_states: TensorPayload | None


@dataclass(frozen=True, slots=True)
class DropStep:
    """Edge: there will be no BackwardBegin for this step, whose StepEnd it has."""

    session_id: int
    step_id: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Edge: free the sequence; steps in flight are dropped without an answer."""

    session_id: int


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """Cloud: the sequence is gone and its id will not be heard of again."""

    session_id: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Edge: answer at once, whatever the sessions do. ``nonce``: an id as others are."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Cloud: the answer to the Ping of this ``nonce``. Pings are answered in their order."""

    nonce: int


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Either end: something failed.

    It ends the session, or with no ``session_id`` the whole connection. Encoding shortens
    ``message`` and the values of ``details`` and replaces control characters by spaces, so
    that reporting an error does not fail over its text.
    """

    code: ErrorCode
    message: str
    session_id: int | None = None
    details: dict[str, str] = field(default_factory=dict)


Message = (
    Hello
    | OpenSession
    | SessionOpened
    | StepBegin
    | ExchangeRequest
    | ExchangeReply
    | StepEnd
    | TrainBegin
    | BackwardBegin
    | GradientRequest
    | GradientReply
    | BackwardEnd
    | DropStep
    | CloseSession
    | SessionClosed
    | Ping
    | Pong
    | ErrorReply
)
