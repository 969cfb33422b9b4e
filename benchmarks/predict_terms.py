"""What the two ends take for a token, whatever the network: rooflines and fixed times.

Roofline (Williams, Waterman, Patterson: "Roofline", CACM 52(4), 2009): work takes the longer of
bytes over memory bandwidth and operations over peak. Decoding one token uses every weight once,
with two operations for each, so it is bound by memory: tokens/s = bandwidth / bytes of the weights
(Pope et al., "Efficiently Scaling Transformer Inference", arXiv 2211.05102). A batch reads weights
once for all its rows, and the keys and values of each session for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.benchmarks.predict_hardware import Hardware, Link
from privatelora.benchmarks.predict_shapes import ModelShape
from privatelora.errors import ConfigError
from privatelora.partition.plan import Plan
from privatelora.runtime.codecs import Codecs

KV_NBYTES = 2
"""Of a cached number: caches are in 16 bits wherever models are served."""
M_NBYTES = 4
"""Of a number of M, which the edge keeps in float32."""


@dataclass(frozen=True)
class Scenario:
    """What is predicted. ``context``: positions in each session's cache while it decodes.

    ``prompt_tokens`` and ``chunk``: of the prompt whose first token is predicted, and of the steps
    that it is run in. Raises ConfigError or PartitionError for what does not go together.
    """

    shape: ModelShape
    plan: Plan
    codecs: Codecs
    link: Link
    cloud: Hardware
    edge: Hardware
    sessions: int = 1
    context: int = 0
    prompt_tokens: int = 256
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.sessions < 1 or self.prompt_tokens < 1 or self.chunk < 1 or self.context < 0:
            raise ConfigError("sessions, prompt tokens and chunks begin at 1, the context at 0")
        self.plan.check_model(self.shape.config)


@dataclass(frozen=True)
class Terms:
    """What a step takes at the ends, in seconds.

    ``meanwhile_s``: of ``cloud_s``, what can be computed at each exchange point while the reply is
    on its way. ``answer_s``: how long the edge takes for one reply, all of it in ``exchange_s``.
    ``wake_s``: what both ends take more where round trips are long.
    """

    cloud_s: float
    exchange_s: float
    lm_head_s: float
    edge_layers_s: float = 0.0
    codec_s: float = 0.0
    meanwhile_s: float = 0.0
    answer_s: float = 0.0
    wake_s: float = 0.0


def step_terms(scenario: Scenario, rows: int = 1) -> Terms:
    """Of one decoded token, or of a chunk of ``rows`` of a prompt."""
    shape, plan, cloud, edge = scenario.shape, scenario.plan, scenario.cloud, scenario.edge
    context = scenario.context if rows == 1 else scenario.prompt_tokens // 2
    num_points = len(plan.wire_points)
    m_s = edge.roofline_s(plan.num_parameters * M_NBYTES, 2 * plan.num_parameters * rows)
    folded = plan.z_size * shape.config.hidden_size if plan.folded_point is not None else 0
    handling_s = edge.step_s + cloud.step_s + num_points * (edge.exchange_s + cloud.exchange_s)
    edge_layers = plan.edge_first + plan.edge_last
    return Terms(
        cloud_s=cloud_batch_s(scenario, rows, sessions=1, context=context),
        exchange_s=m_s + _product_s(edge, shape, folded, rows) + handling_s,
        lm_head_s=_product_s(edge, shape, shape.head_weights, 1),
        edge_layers_s=_layers_s(edge, shape, edge_layers, 0, rows, 1, context),
        codec_s=_codec_s(edge, scenario, rows) + _codec_s(cloud, scenario, rows),
        meanwhile_s=_product_s(cloud, shape, shape.qkv_weights, rows) if num_points else 0.0,
        answer_s=edge.exchange_s + m_s / len(plan.points),
        wake_s=sum(end.step_wake_s + num_points * end.exchange_wake_s for end in (cloud, edge)),
    )


def cloud_batch_s(scenario: Scenario, rows: int, *, sessions: int, context: int) -> float:
    """Seconds for the cloud's layers, A and B, on a batch of ``rows`` of so many sessions."""
    plan = scenario.plan
    layers, added = len(plan.cloud_layers), cloud_adapter_weights(scenario.shape, plan)
    return _layers_s(scenario.cloud, scenario.shape, layers, added, rows, sessions, context)


def cloud_busy_s(scenario: Scenario) -> float:
    """How long the cloud works on one token of each session, with all of them in one batch."""
    cloud, sessions = scenario.cloud, scenario.sessions
    messages_s = cloud.step_s + len(scenario.plan.wire_points) * cloud.exchange_s
    batch_s = cloud_batch_s(scenario, sessions, sessions=sessions, context=scenario.context)
    return batch_s + sessions * (messages_s + _codec_s(cloud, scenario, 1))


def ends_busy_s(scenario: Scenario, rows: int) -> tuple[float, float]:
    """How long cloud and edge work on a chunk of ``rows``, all of one session."""
    terms = step_terms(scenario, rows)
    cloud, num_points = scenario.cloud, len(scenario.plan.wire_points)
    cloud_messages_s = cloud.step_s + num_points * cloud.exchange_s
    cloud_codec_s = _codec_s(cloud, scenario, rows)
    cloud_s = terms.cloud_s + cloud_messages_s + cloud_codec_s
    edge_s = terms.exchange_s - cloud_messages_s + terms.codec_s - cloud_codec_s
    return cloud_s, edge_s + terms.edge_layers_s


def cloud_adapter_weights(shape: ModelShape, plan: Plan) -> int:
    """Weights of A and B that the cloud computes with: A of its own points, B of its layers."""
    adapted = [layer for layer in plan.layers if layer in plan.cloud_layers]
    outputs = sum(shape.config.projection_size(target) for target in plan.targets)
    a_weights = len(plan.wire_points) * plan.z_size * shape.config.hidden_size
    return a_weights + len(adapted) * outputs * plan.rank_down


def _layers_s(
    hardware: Hardware,
    shape: ModelShape,
    layers: int,
    added: int,
    rows: int,
    sessions: int,
    context: int,
) -> float:
    """Layers with ``added`` weights: those once for all rows, keys and values once a session.

    Two operations for a weight and row, and four for each position and number of q that attention
    looks at.
    """
    weights = layers * shape.layer_weights + added
    cached = sessions * context * layers * shape.kv_size
    attended = rows * context * layers * shape.config.projection_size("q")
    return layers * hardware.layer_s + hardware.roofline_s(
        weights * shape.weight_nbytes + cached * KV_NBYTES, 2 * weights * rows + 4 * attended
    )


def _product_s(hardware: Hardware, shape: ModelShape, weights: int, rows: int) -> float:
    return hardware.roofline_s(weights * shape.weight_nbytes, 2 * weights * rows)


def _codec_s(end: Hardware, scenario: Scenario, rows: int) -> float:
    """What one end takes to write or read every tensor of a step."""
    plan, codecs, hidden = scenario.plan, scenario.codecs, scenario.shape.config.hidden_size
    seconds = end.codec_s(codecs.hidden_states_up, rows * hidden)
    seconds += end.codec_s(codecs.hidden_states_down, hidden)
    if plan.opening_layers:
        seconds += end.codec_s(codecs.exchange_up, rows * len(plan.opening_layers) * plan.y_size)
    for point in plan.wire_points:
        answered = len(plan.span_in(point, plan.cloud_layers)) * plan.y_size
        seconds += end.codec_s(codecs.exchange_up, rows * answered)
        seconds += end.codec_s(codecs.exchange_down, rows * plan.z_size)
    return seconds
