"""How fast decoding is, computed: for any model shape, arrangement, codec, network and computers.

A decoded token takes, in seconds, with P exchange points on the wire (EXCHANGE, "Cost per decoded
token"):

    cloud            the roofline of its layers with A and B, once for a batch of all sessions
    edge layers      the same for the layers that the edge owns
    exchanges        M, A of a folded point, and seeing to messages at both ends
    LM head          its roofline on the edge
    codec            writing and reading each tensor
    bytes up, down   bits over bandwidth; bytes are those of ``token_cost``, headers included
    round trips      (1 + P) * RTT
    waking           what cores take more after waits; from LONG_WAIT_S on all of it
    meanwhile        less: q, k and v that the cloud computes while a reply is on its way

``predict_terms.py`` has the rooflines. The paper's formula, 1 / (1/decoder + 1/M + 1/LM head +
transfer), is this without round trips and without whatever takes fixed times at the ends;
``predict_paper.py`` has it with the paper's inputs. A transport's own framing is not counted, nor
is what TCP does: congestion, loss, slow start.

Nothing here measures, reads or sends anything.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from privatelora.benchmarks.predict_hardware import LONG_WAIT_S, Link
from privatelora.benchmarks.predict_terms import (
    Scenario,
    Terms,
    cloud_busy_s,
    ends_busy_s,
    step_terms,
)
from privatelora.runtime.wire.tensor_frames import (
    ONE_TENSOR_HEADER_NBYTES,
    TWO_TENSORS_HEADER_NBYTES,
)

MAX_STEPS_IN_FLIGHT = 32
"""Chunks of one prompt that are on their way at once, as in ``runtime/split_model.py``."""


@dataclass(frozen=True)
class WireBytes:
    """Bytes of one step on the wire, headers included, and how often it goes there and back."""

    up: int
    down: int
    round_trips: int


@dataclass(frozen=True)
class TokenTime:
    """Where the time of one decoded token goes, in seconds; ``meanwhile_s`` counts against it."""

    cloud_s: float
    edge_layers_s: float
    exchange_s: float
    lm_head_s: float
    codec_s: float
    up_s: float
    down_s: float
    round_trips_s: float
    waking_s: float
    meanwhile_s: float

    @property
    def total_s(self) -> float:
        """From one token to the next."""
        parts = sum(getattr(self, part.name) for part in fields(self))
        return float(parts - 2 * self.meanwhile_s)


@dataclass(frozen=True)
class Prediction:
    """Rates are tokens/s. ``tokens_per_s``: of one session that has cloud and link for itself."""

    token: TokenTime
    nbytes: WireBytes
    payload_nbytes: int
    tokens_per_s: float
    aggregate_tokens_per_s: float
    first_token_s: float

    def as_json(self) -> dict[str, Any]:
        """Figures by name; times of a token in milliseconds."""
        token = {name.removesuffix("_s") + "_ms": s * 1e3 for name, s in asdict(self.token).items()}
        return {
            "tokens_per_s": self.tokens_per_s,
            "aggregate_tokens_per_s": self.aggregate_tokens_per_s,
            "first_token_s": self.first_token_s,
            "round_trips_per_token": self.nbytes.round_trips,
            "up_nbytes": self.nbytes.up,
            "down_nbytes": self.nbytes.down,
            "payload_nbytes": self.payload_nbytes,
            "token_ms": self.token.total_s * 1e3,
            "parts": token,
        }


def predict(scenario: Scenario) -> Prediction:
    """Everything that is predicted of one scenario.

    All sessions together get at most what the smaller of two bounds says: N times what one gets
    alone, and what the cloud computes when every batch has all N. Each session has an edge and a
    link of its own.
    """
    from privatelora.benchmarks.cost import token_cost  # its codecs load torch

    nbytes = step_nbytes(scenario)
    alone = token_time(step_terms(scenario), nbytes, scenario.link)
    rate, sessions = 1 / alone.total_s, scenario.sessions
    busy_s = cloud_busy_s(scenario)
    hidden_size = scenario.shape.config.hidden_size
    return Prediction(
        token=alone,
        nbytes=nbytes,
        payload_nbytes=token_cost(scenario.plan, hidden_size, scenario.codecs).payload,
        tokens_per_s=rate,
        aggregate_tokens_per_s=min(sessions * rate, sessions / busy_s if busy_s else math.inf),
        first_token_s=first_token_s(scenario),
    )


def token_time(terms: Terms, nbytes: WireBytes, link: Link) -> TokenTime:
    """The terms with a network between the ends.

    At each exchange point the cloud goes on with q, k and v for as long as a reply takes at least:
    the round trip, and what the edge does for it.
    """
    num_points = nbytes.round_trips - 1
    return TokenTime(
        cloud_s=terms.cloud_s,
        edge_layers_s=terms.edge_layers_s,
        exchange_s=terms.exchange_s,
        lm_head_s=terms.lm_head_s,
        codec_s=terms.codec_s,
        up_s=link.up_s(nbytes.up),
        down_s=link.down_s(nbytes.down),
        round_trips_s=nbytes.round_trips * link.rtt_s,
        waking_s=terms.wake_s * min(1.0, link.rtt_s / LONG_WAIT_S),
        meanwhile_s=num_points * min(terms.meanwhile_s, link.rtt_s + terms.answer_s),
    )


def step_nbytes(scenario: Scenario, rows: int = 1, returned_rows: int = 1) -> WireBytes:
    """Bytes of a step of ``rows`` that gives ``returned_rows`` hidden states back.

    Of one token they are those of ``token_cost``, by direction. No codec lets a row depend on
    another, so a step of more takes as many times the payload, and headers once.
    """
    from privatelora.benchmarks.cost import token_cost
    from privatelora.runtime.payload.codec import plain_nbytes

    hidden_size, codecs = scenario.shape.config.hidden_size, scenario.codecs
    cost = token_cost(scenario.plan, hidden_size, codecs)
    num_points = cost.round_trips - 1
    returned = plain_nbytes(codecs.hidden_states_down, (1, hidden_size))
    exchanged = num_points * ONE_TENSOR_HEADER_NBYTES
    return WireBytes(
        up=rows * cost.payload_up + TWO_TENSORS_HEADER_NBYTES + exchanged,
        down=rows * (cost.payload_down - returned)
        + returned_rows * returned
        + ONE_TENSOR_HEADER_NBYTES
        + exchanged,
        round_trips=cost.round_trips,
    )


def first_token_s(scenario: Scenario) -> float:
    """Seconds from a prompt to its first token, with the chunks of the prompt in a pipeline.

    A chunk alone takes its work, its bytes and 1 + P round trips. Chunks follow each other as fast
    as what is busiest allows, the cloud, the edge, or one direction of the link, or as fast as
    MAX_STEPS_IN_FLIGHT at once allow; the prompt takes one chunk and as many of these intervals as
    there are others. Then comes the LM head.
    """
    rows = min(scenario.chunk, scenario.prompt_tokens)
    num_chunks = -(-scenario.prompt_tokens // rows)
    link, nbytes = scenario.link, step_nbytes(scenario, rows)
    terms = step_terms(scenario, rows)
    alone_s = token_time(terms, nbytes, link).total_s
    interval_s = max(
        *ends_busy_s(scenario, rows),
        link.up_s(nbytes.up),
        link.down_s(nbytes.down),
        alone_s / MAX_STEPS_IN_FLIGHT,
    )
    return alone_s + (num_chunks - 1) * interval_s
