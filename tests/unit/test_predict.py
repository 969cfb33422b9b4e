"""The cost model: bytes are those on the wire, nothing gets faster by a worse link, and so on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privatelora.benchmarks.cost import token_cost
from privatelora.benchmarks.predict import (
    MAX_STEPS_IN_FLIGHT,
    first_token_s,
    predict,
    step_nbytes,
    token_time,
)
from privatelora.benchmarks.predict_calibrate import FAR_S, FP32, TCP_S, calibration
from privatelora.benchmarks.predict_choose import (
    NEAR_ENOUGH,
    arrangements,
    label,
    recommend,
    regrouped,
)
from privatelora.benchmarks.predict_hardware import (
    A100_80G,
    IPHONE_13_PRO_MAX,
    PRESETS,
    CodecCost,
    Hardware,
    Link,
    parse_link,
)
from privatelora.benchmarks.predict_live import cloud_seconds
from privatelora.benchmarks.predict_paper import (
    PAPER_LINK,
    RTTS_MS,
    paper_table,
    paper_time,
    published,
    sent_time,
)
from privatelora.benchmarks.predict_shapes import SHAPE_NAMES, ModelShape, named_shape
from privatelora.benchmarks.predict_terms import Scenario, step_terms
from privatelora.benchmarks.predict_timing import CHUNK, default_codecs
from privatelora.errors import ConfigError, PartitionError
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.models.config import DecoderConfig, RopeConfig
from privatelora.partition.plan import Plan
from privatelora.partition.plan_file import make_plan
from privatelora.runtime import split_model
from privatelora.runtime.codecs import Codecs
from privatelora.runtime.payload.codec import plain_nbytes
from privatelora.runtime.payload.names import CODEC_NAMES
from privatelora.runtime.wire.tensor_frames import (
    ONE_TENSOR_HEADER_NBYTES,
    TWO_TENSORS_HEADER_NBYTES,
)
from tests.partition.tiny import save_tiny

FP16 = Codecs("fp16", "fp16", "fp16", "fp16")
SMALL = ModelShape(
    "small",
    DecoderConfig(
        family="llama",
        hidden_size=96,
        intermediate_size=200,
        num_layers=12,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=500,
        max_positions=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
    ),
)
COSTS = {name: CodecCost(2e-5, 1e-8) for name in CODEC_NAMES}
CLOUD = Hardware("cloud", 1e10, 1e11, 1e-5, 2e-5, 5e-5, codecs=COSTS)
EDGE = Hardware("edge", 5e9, 2e10, 0.0, 3e-5, 4e-5, codecs=COSTS)

quick = settings(max_examples=30, deadline=None)

codec_names = st.sampled_from(CODEC_NAMES)
all_codecs = st.builds(Codecs, codec_names, codec_names, codec_names, codec_names)
rtts_s = st.floats(0, 1)
bandwidths = st.floats(1e4, 1e11)
links = st.builds(Link, rtts_s, bandwidths, bandwidths)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = draw(st.sets(st.integers(0, 11), min_size=1))
    edge_first = draw(st.integers(0, 5))
    return make_plan(
        SMALL.config,
        layers=sorted(layers),
        every=draw(st.integers(1, 13)),
        rank_up=draw(st.integers(1, 96)),
        rank_down=draw(st.integers(1, 32)),
        targets=draw(st.sampled_from(["q", "q,v", "q,k,v"])),
        edge_first=edge_first,
        edge_last=draw(st.integers(0, 5)),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    return Scenario(
        SMALL,
        draw(plans()),
        draw(all_codecs),
        draw(links),
        CLOUD,
        EDGE,
        sessions=draw(st.integers(1, 64)),
        context=draw(st.integers(0, 500)),
        prompt_tokens=draw(st.integers(1, 500)),
        chunk=draw(st.integers(1, 128)),
    )


@quick
@given(scenarios())
def test_bytes_of_a_token_are_those_on_the_wire(scenario: Scenario) -> None:
    cost = token_cost(scenario.plan, SMALL.config.hidden_size, scenario.codecs)
    nbytes = step_nbytes(scenario)
    assert nbytes.up + nbytes.down == cost.total
    assert nbytes.round_trips == cost.round_trips
    assert nbytes.up >= cost.payload_up
    assert nbytes.down >= cost.payload_down
    assert predict(scenario).payload_nbytes == cost.payload


@quick
@given(scenarios(), st.integers(1, 70), st.sampled_from([0, 1]))
def test_bytes_of_a_chunk_are_those_of_its_messages(
    scenario: Scenario, rows: int, returned: int
) -> None:
    plan, codecs, hidden = scenario.plan, scenario.codecs, SMALL.config.hidden_size
    up = TWO_TENSORS_HEADER_NBYTES + plain_nbytes(codecs.hidden_states_up, (rows, hidden))
    if plan.opening_layers:
        opening = len(plan.opening_layers) * plan.y_size
        up += plain_nbytes(codecs.exchange_up, (rows, opening))
    down = ONE_TENSOR_HEADER_NBYTES + plain_nbytes(codecs.hidden_states_down, (returned, hidden))
    for point in plan.wire_points:
        answered = len(plan.span_in(point, plan.cloud_layers)) * plan.y_size
        up += ONE_TENSOR_HEADER_NBYTES + plain_nbytes(codecs.exchange_up, (rows, answered))
        down += ONE_TENSOR_HEADER_NBYTES + plain_nbytes(codecs.exchange_down, (rows, plan.z_size))
    nbytes = step_nbytes(scenario, rows, returned)
    assert (nbytes.up, nbytes.down) == (up, down)


@quick
@given(scenarios(), links)
def test_a_worse_link_is_never_faster(scenario: Scenario, other: Link) -> None:
    better = Link(
        min(scenario.link.rtt_s, other.rtt_s),
        max(scenario.link.up_bits_per_s, other.up_bits_per_s),
        max(scenario.link.down_bits_per_s, other.down_bits_per_s),
    )
    found, best = predict(scenario), predict(replace(scenario, link=better))
    tolerance = 1 + 1e-9
    assert found.tokens_per_s <= best.tokens_per_s * tolerance
    assert found.aggregate_tokens_per_s <= best.aggregate_tokens_per_s * tolerance
    assert found.first_token_s * tolerance >= best.first_token_s


@quick
@given(scenarios(), plans())
def test_more_bytes_and_round_trips_are_never_faster(scenario: Scenario, plan: Plan) -> None:
    terms, fewer = step_terms(scenario), step_nbytes(scenario)
    other = step_nbytes(replace(scenario, plan=plan))
    # The same work at the ends, so that the wire alone decides.
    more = replace(
        fewer,
        up=max(fewer.up, other.up),
        down=max(fewer.down, other.down),
        round_trips=max(fewer.round_trips, other.round_trips),
    )
    terms = replace(terms, meanwhile_s=0.0)
    nearer, farther = (token_time(terms, nbytes, scenario.link) for nbytes in (fewer, more))
    assert nearer.total_s <= farther.total_s * (1 + 1e-9)


@quick
@given(scenarios())
def test_without_a_network_only_the_ends_are_left(scenario: Scenario) -> None:
    terms, nbytes = step_terms(scenario), step_nbytes(scenario)
    without = token_time(terms, nbytes, Link())
    assert without.up_s == without.down_s == without.round_trips_s == 0
    ends = sum(
        (terms.cloud_s, terms.exchange_s, terms.lm_head_s, terms.edge_layers_s, terms.codec_s)
    )
    assert math.isclose(without.total_s, ends - without.meanwhile_s)
    nearly = token_time(terms, nbytes, Link(1e-12, 1e18, 1e18))
    assert math.isclose(nearly.total_s, without.total_s, rel_tol=1e-6)


@quick
@given(scenarios())
def test_round_trips_bound_the_rate(scenario: Scenario) -> None:
    found = predict(scenario)
    token = found.token
    assert token.total_s >= token.round_trips_s + token.up_s + token.down_s
    assert token.meanwhile_s <= token.cloud_s * (1 + 1e-9)
    if scenario.link.rtt_s:
        bound = 1 / (found.nbytes.round_trips * scenario.link.rtt_s)
        assert found.tokens_per_s <= bound * (1 + 1e-9)


@quick
@given(scenarios())
def test_sessions_together_get_more_and_each_less(scenario: Scenario) -> None:
    found = predict(scenario)
    more = predict(replace(scenario, sessions=scenario.sessions + 1))
    assert more.aggregate_tokens_per_s >= found.aggregate_tokens_per_s * (1 - 1e-9)
    each = found.aggregate_tokens_per_s / scenario.sessions
    assert each <= found.tokens_per_s * (1 + 1e-9)
    assert more.aggregate_tokens_per_s / (scenario.sessions + 1) <= each * (1 + 1e-9)


@quick
@given(scenarios())
def test_a_longer_prompt_takes_longer(scenario: Scenario) -> None:
    longer = replace(scenario, prompt_tokens=scenario.prompt_tokens + scenario.chunk)
    assert first_token_s(longer) >= first_token_s(scenario) * (1 - 1e-9)


def test_chunks_of_a_prompt_hide_the_network() -> None:
    scenario = Scenario(
        SMALL, SMALL.plan(), FP16, Link(0.02), CLOUD, EDGE, prompt_tokens=640, chunk=64
    )
    one = first_token_s(replace(scenario, prompt_tokens=64))
    assert first_token_s(scenario) < 10 * one / 2
    assert MAX_STEPS_IN_FLIGHT == split_model.MAX_STEPS_IN_FLIGHT


def test_the_roofline() -> None:
    memory_bound = A100_80G.roofline_s(1935e9, 1)
    assert memory_bound == 1
    assert A100_80G.roofline_s(1, 312e12) == 1
    # Weights are read once a batch: until arithmetic is the slower, more rows take no longer.
    scenario = Scenario(SMALL, SMALL.plan("all"), FP16, Link(), A100_80G, IPHONE_13_PRO_MAX)
    busy = [
        replace(scenario, sessions=number).sessions
        / predict(replace(scenario, sessions=number)).aggregate_tokens_per_s
        for number in (1, 2)
    ]
    assert busy[0] >= busy[1] / 2


def test_shapes() -> None:
    sizes = {"llama-2-7b": 6.61e9, "llama-2-13b": 12.85e9, "llama-30b": 32.3e9}
    assert set(SHAPE_NAMES) == set(sizes)
    for name, weights in sizes.items():
        shape = named_shape(name)
        assert shape is not None
        assert shape.token_nbytes / 2 == pytest.approx(weights, rel=0.01)
        assert named_shape(name.rpartition("-")[2].upper()) == shape
    assert named_shape("8b") is None
    assert SMALL.layer_weights == 96 * (96 + 32 + 32) + 96 * 96 + 3 * 96 * 200
    assert SMALL.plan().rank_up == 96
    assert SMALL.plan().rank_down == 32
    with pytest.raises(PartitionError, match="rank_up 97 is larger than the hidden size"):
        SMALL.plan(rank_up=97)


def test_a_shape_of_a_checkpoint(tmp_path: Path) -> None:
    with open_checkpoint(str(save_tiny("qwen3", tmp_path / "model"))) as checkpoint:
        shape = ModelShape("tiny", checkpoint.config)
    assert shape.head_weights == 199 * 64
    assert shape.qkv_weights == 64 * (4 + 2 + 2) * 32


def test_the_paper_comes_out_of_its_own_inputs() -> None:
    table = paper_table()
    rows = {(row["model"], row["way"]): row for row in table["rows"]}
    for size, by_rank in (
        ("7B", {128: 27.1, 64: 27.8}),
        ("13B", {128: 20.5, 64: 21.1}),
        ("30B", {128: 12.9, 64: 13.2}),
    ):
        for rank, said in by_rank.items():
            row = rows[size, f"paper's count, rank {rank}"]
            assert row["published_tokens_per_s"] == said
            assert 0 < row["deviation"] < 0.017
            assert row["by_rtt_ms"]["0"] == pytest.approx(said, rel=0.017)
            assert row["by_rtt_ms"]["0"] == pytest.approx(1e3 / sum(row["parts_ms"].values()))
    assert rows["7B", "base"]["published_tokens_per_s"] == 37.2
    # One block a layer and direction is what the paper counts; q, k and v take three.
    seven = published()[0]
    hidden = 2 * 4096 * 2
    assert rows["7B", "paper's count, rank 128"]["nbytes_per_token"] == hidden + 2 * 32 * 128 * 2
    sent = token_cost(seven.shape.plan(1, 128, 128), 4096, FP16)
    assert rows["7B", "q k v, per layer"]["nbytes_per_token"] == sent.total


def test_a_round_trip_time_added_to_the_paper() -> None:
    rows = [row for row in paper_table()["rows"] if "by_rtt_ms" in row]
    for row in rows:
        nearest_s = 1 / row["by_rtt_ms"]["0"]
        for rtt_ms in RTTS_MS:
            expected = nearest_s + row["round_trips_per_token"] * rtt_ms / 1e3
            assert 1 / row["by_rtt_ms"][f"{rtt_ms:g}"] == pytest.approx(expected)
    for model in published():
        layers = model.shape.config.num_layers
        far = replace(PAPER_LINK, rtt_s=0.02)
        assert 1 / paper_time(model, 128, far).total_s < 1 / (layers * 0.02)
        trips = {
            every: round(
                sent_time(model, model.shape.plan(every, 128, 128), far).round_trips_s / 0.02
            )
            for every in (1, 8, 16)
        }
        assert trips == {1: layers, 8: math.ceil(layers / 8), 16: math.ceil(layers / 16)}


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("20ms", Link(0.02)),
        ("500us,1gbps", Link(5e-4, 1e9, 1e9)),
        ("20ms,60/100mbps", Link(0.02, 60e6, 100e6)),
        (" 1.5 ms , 60/100 Mbps ", Link(1.5e-3, 60e6, 100e6)),
        ("0ms", Link()),
    ],
)
def test_links_as_people_write_them(text: str, link: Link) -> None:
    found = parse_link(text)
    assert found.rtt_s == pytest.approx(link.rtt_s)
    assert (found.up_bits_per_s, found.down_bits_per_s) == (
        link.up_bits_per_s,
        link.down_bits_per_s,
    )


@pytest.mark.parametrize(
    "text", ["", "20", "fast", "-1ms", "20ms,60", "20ms,60/mbps", "20ms;1mbps"]
)
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(ConfigError, match="write a round trip time"):
        parse_link(text)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="bandwidth above 0"):
        parse_link("20ms,0mbps")
    with pytest.raises(ConfigError, match="cannot be"):
        Link(-1.0)
    with pytest.raises(ConfigError, match="must be above 0"):
        Hardware("none", 0.0, 1.0)
    with pytest.raises(ConfigError, match="below 0"):
        Hardware("early", 1.0, 1.0, layer_s=-1.0)
    with pytest.raises(ConfigError, match="begin at 1"):
        Scenario(SMALL, SMALL.plan(), FP16, Link(), CLOUD, EDGE, sessions=0)


def test_arrangements_are_those_the_model_has_layers_for() -> None:
    found = arrangements(SMALL.plan)
    assert [label(plan) for plan in found] == ["every 1", "every 2", "every 6", "every all"]
    now = make_plan(SMALL.config, layers="0-9", every=3, rank_up=8, rank_down=4, edge_last=1)
    again = arrangements(lambda every: regrouped(now, every), (1, 3, "all", 3))
    assert again[1] == now
    assert [len(plan.wire_points) for plan in again] == [9, 3, 0]


def codecs_to_choose() -> dict[str, Codecs]:
    return {"fp16": FP16, "default": default_codecs()}


def test_near_by_every_layer_may_exchange_and_far_away_none() -> None:
    scenario = Scenario(SMALL, SMALL.plan(), FP16, Link(), CLOUD, EDGE)
    seven = named_shape("7b")
    assert seven is not None
    near = recommend(
        Scenario(seven, seven.plan(), FP16, Link(), A100_80G, IPHONE_13_PRO_MAX),
        arrangements(seven.plan),
        codecs_to_choose(),
    )
    assert (near.best.label, near.best.codec) == ("every 1", "fp16")
    assert near.best.transport.scheme == "shm://"
    far = recommend(
        replace(scenario, link=parse_link("80ms,60/100mbps")),
        arrangements(SMALL.plan),
        codecs_to_choose(),
    )
    assert far.best.label == "every all"
    assert far.best.transport.is_encrypted
    assert "shm://" not in [option.transport.scheme for option in far.transports]
    assert "1 round trip a token" in far.reasons[0]


@quick
@given(links)
def test_what_is_recommended_is_near_the_fastest(link: Link) -> None:
    found = recommend(
        Scenario(SMALL, SMALL.plan(), FP16, link, CLOUD, EDGE),
        arrangements(SMALL.plan),
        codecs_to_choose(),
    )
    assert len(found.options) == 8
    assert found.best in found.options
    fastest = max(option.tokens_per_s for option in found.options)
    assert found.best.tokens_per_s >= 0.98 * NEAR_ENOUGH * fastest
    fewer = [one for one in found.options if one.plan.every < found.best.plan.every]
    assert all(one.tokens_per_s < NEAR_ENOUGH * fastest for one in fewer)


@quick
@given(st.floats(1e-5, 1), st.floats(0, 0.05), st.integers(0, 60), st.floats(0, 1))
def test_what_a_cloud_computes_is_found_from_what_is_seen(
    cloud_s: float, share: float, num_points: int, wait_s: float
) -> None:
    share = min(share, 0.9 / max(num_points, 1))
    seen_s = cloud_s - num_points * min(share * cloud_s, wait_s)
    assert cloud_seconds(seen_s, num_points, share, wait_s) == pytest.approx(cloud_s)


def test_what_was_measured_is_predicted() -> None:
    """And what made it so is found again, where there is one answer."""
    plans = SMALL.plan(), SMALL.plan("all")
    ends = [
        replace(end, step_wake_s=9e-4, exchange_wake_s=3e-4, codecs={}) for end in (CLOUD, EDGE)
    ]
    cloud, edge = replace(ends[0], layer_s=0.0), ends[1]

    def token_s(plan: Plan, rtt_s: float = 0.0) -> float:
        link = Link(rtt_s + TCP_S)
        return predict(Scenario(SMALL, plan, FP32, link, cloud, edge)).token.total_s

    weights = SMALL.config.num_layers * SMALL.layer_weights
    head_s = edge.roofline_s(SMALL.head_weights * SMALL.weight_nbytes, 0.0)
    cloud_head_s = head_s / 7  # as on a GPU
    emulation_s = 2e-4
    trips = 1 + len(plans[0].wire_points)
    measured = {
        "lm_head": head_s,
        "lm_head_chunk": 2 * SMALL.head_weights * CHUNK / edge.flops_per_s,
        "cloud_lm_head": cloud_head_s,
        "unsplit_token": cloud.roofline_s(weights * SMALL.weight_nbytes, 0.0) + cloud_head_s,
        "unsplit_chunk": 2 * weights * CHUNK / cloud.flops_per_s + cloud_head_s,
        "split_token": token_s(plans[0]),
        "grouped_token": token_s(plans[1]),
        "emulated_token": token_s(plans[0]) + trips * emulation_s,
        "far_token": token_s(plans[0], FAR_S + emulation_s),
        "far_grouped_token": token_s(plans[1], FAR_S + emulation_s),
    }
    found = calibration(SMALL, plans, measured, {})
    assert found.emulation_s == pytest.approx(emulation_s)
    for name in ("step_s", "exchange_s", "step_wake_s", "exchange_wake_s"):
        both = getattr(found.cloud, name) + getattr(found.edge, name)
        known = getattr(cloud, name) + getattr(edge, name)
        assert both == pytest.approx(known, rel=0.02), name
    for plan, rtt_s in itertools.product((*plans, SMALL.plan(4)), (0.0, 1e-3, 0.1)):
        link = Link(rtt_s + TCP_S)
        again = predict(Scenario(SMALL, plan, FP32, link, found.cloud, found.edge))
        assert again.token.total_s == pytest.approx(token_s(plan, rtt_s), rel=0.02)


def test_presets_say_where_they_are() -> None:
    for name, hardware in PRESETS.items():
        assert hardware.name == name
        assert hardware.as_json()["memory_gb_per_s"] > 0
