"""What a cloud tells of its work: metrics, the trace, the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import sys
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from privatelora.cli._app import JsonFormatter
from privatelora.errors import CapacityError, ConfigError, ConnectError
from privatelora.runtime.cloud_service import CloudService
from privatelora.runtime.generation import Context
from privatelora.runtime.telemetry import PREFIX, CloudMetrics, Occupancy
from privatelora.runtime.telemetry_server import MAX_CONNECTIONS, serving_metrics
from privatelora.runtime.trace import MAX_BATCHES, MAX_WAITS, Trace
from tests.unit.world import ROOMY, World, serving, world

pytestmark = pytest.mark.usefixtures("nothing_leaks")

PROMPT = [1, *range(20, 40)]
NUM_SESSIONS = 3
NUM_DECODED = 4


def read(service: CloudService) -> dict[str, float]:
    """Every sample that has no bucket, without the prefix all share."""
    samples = [
        sample
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if not sample.labels
    ]
    assert all(sample.name.startswith("privatelora_cloud_") for sample in samples)
    return {sample.name.removeprefix("privatelora_cloud_"): sample.value for sample in samples}


async def work(split: World, service: CloudService) -> dict[str, float]:
    """Sessions that prefill and decode side by side; what the cloud tells before they leave."""
    async with serving(service.handle) as address:
        model = split.split(address)

        async def run() -> None:
            sequence = await model.open_sequence(64)
            await sequence.forward(PROMPT, 0, "last")
            for position in range(len(PROMPT), len(PROMPT) + NUM_DECODED):
                await sequence.forward([5], position, "last")

        await asyncio.gather(*(run() for _ in range(NUM_SESSIONS)))
        seen = read(service)
        await model.aclose()
    return seen


async def test_the_numbers_add_up() -> None:
    split = world()
    service = split.service()
    seen = await work(split, service)
    num_points = len(split.plan.wire_points)
    num_steps = NUM_SESSIONS * (1 + NUM_DECODED)
    num_rows = NUM_SESSIONS * (len(PROMPT) + NUM_DECODED)
    assert seen["rows_total"] == seen["batch_rows_sum"] == num_rows * (num_points + 1)
    assert seen["batch_steps_sum"] == seen["queue_seconds_count"] == num_steps * (num_points + 1)
    assert seen["reply_seconds_count"] == num_steps * num_points
    batches = seen["batches_total"]
    assert 0 < batches < num_steps * (num_points + 1)  # some held steps of several sessions
    for name in ("batch_rows", "batch_steps", "batch_compute_seconds"):
        assert seen[f"{name}_count"] == batches
    for name in ("batch_compute", "queue", "reply"):
        assert seen[f"{name}_seconds_sum"] > 0
    for name, whole in (
        ("segment_batches_total", "batches_total"),
        ("segment_rows_total", "rows_total"),
        ("segment_compute_seconds_total", "batch_compute_seconds_sum"),
        ("segment_queue_seconds_total", "queue_seconds_sum"),
        ("point_replies_total", "reply_seconds_count"),
        ("point_reply_seconds_total", "reply_seconds_sum"),
    ):
        label = name.partition("_")[0]
        of = service.metrics.registry
        places = range(num_points + 1) if label == "segment" else split.plan.wire_points
        numbers = [place if isinstance(place, int) else place.index for place in places]
        parts = [of.get_sample_value(PREFIX + name, {label: str(number)}) for number in numbers]
        assert None not in parts
        assert sum(filter(None, parts)) == pytest.approx(seen[whole])
    assert (seen["sessions"], seen["waiting_sessions"]) == (NUM_SESSIONS, 0)
    blocks_each = -(-(len(PROMPT) + NUM_DECODED) // 16)
    assert seen["kv_blocks_used"] == NUM_SESSIONS * blocks_each
    assert seen["kv_blocks"] == ROOMY.max_cached_positions // 16
    hidden_nbytes = num_rows * split.config.hidden_size * 4
    assert seen["received_bytes_total"] > hidden_nbytes  # all that came; only the last left
    assert seen["sent_bytes_total"] > 0

    after = read(service)
    assert (after["sessions"], after["kv_blocks_used"]) == (0, 0)
    assert after["sessions_opened_total"] == NUM_SESSIONS
    for name in ("sent_bytes_total", "received_bytes_total"):
        assert after[name] >= seen[name]  # also of connections that are over
    assert after["batches_total"] == batches


async def test_sessions_that_wait_are_refused_or_lose_their_place() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=1, max_wait_s=0.05)
    service = split.service(limits)
    async with serving(service.handle) as address:
        model = split.split(address)
        held = await model.open_sequence(64)
        waiting = asyncio.create_task(model.open_sequence(64))
        with pytest.raises(CapacityError):
            # In a task, so behind the one that waits: it finds the queue full.
            await asyncio.create_task(model.open_sequence(64))
        assert (read(service)["waiting_sessions"], read(service)["sessions"]) == (1, 1)
        with pytest.raises(CapacityError):
            await waiting
        seen = read(service)
        assert (seen["waiting_sessions"], seen["sessions_refused_total"]) == (0, 2)
        assert (seen["sessions_opened_total"], seen["sessions_evicted_total"]) == (1, 0)
        await held.aclose()
        await model.aclose()


async def test_an_eviction_is_counted() -> None:
    split = world()
    limits = replace(ROOMY, max_sessions=1, max_waiting=1, min_idle_s=1e-6)
    service = split.service(limits)
    async with serving(service.handle) as address:
        model = split.split(address)
        first = await Context.open(model, 64)
        await first.advance(PROMPT)
        await (await Context.open(model, 64)).advance(PROMPT)
        seen = read(service)
        await model.aclose()
    assert seen["sessions_evicted_total"] == 1
    assert seen["sessions_opened_total"] == 2
    assert seen["sessions_refused_total"] == 0


async def test_clouds_of_one_process_count_for_themselves() -> None:
    split = world()
    busy, idle = split.service(), split.service()
    await work(split, busy)
    assert read(busy)["batches_total"] > 0
    assert not any(value for name, value in read(idle).items() if name != "kv_blocks")


def test_a_bound_belongs_to_the_bucket_it_ends() -> None:
    metrics = CloudMetrics(lambda: Occupancy(0, 0, 0, 0))
    for waited_s in (0.0, 1.0, 1.1, 100.0):
        metrics.note_wait((0, 0), 0, 0.0, waited_s)
    value = metrics.registry.get_sample_value
    name = "privatelora_cloud_reply_seconds_bucket"
    bounds = ("0.0001", "0.5", "1.0", "2.5", "10.0", "+Inf")
    assert [value(name, {"le": bound}) for bound in bounds] == [1, 1, 2, 3, 3, 4]


def get(url: str) -> tuple[int, str]:
    """Status and text of an answer."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_server_ends_with_its_context() -> None:
    service = world().service()
    registry = service.metrics.registry
    with serving_metrics(registry, lambda: None, "127.0.0.1", 0) as port:
        status, text = get(f"http://127.0.0.1:{port}/metrics")
        assert status == 200
        assert "privatelora_cloud_kv_blocks 64.0" in text
        with (
            pytest.raises(ConnectError, match=f"metrics on 127.0.0.1 port {port}: Address already"),
            serving_metrics(registry, lambda: None, "127.0.0.1", port),
        ):
            pass
    with serving_metrics(registry, lambda: None, "127.0.0.1", port) as again:  # it is free again
        assert again == port


def test_health_follows_what_the_cloud_says() -> None:
    reasons = [None, "this cloud is shutting down"]
    registry = world().service().metrics.registry
    with serving_metrics(registry, lambda: reasons[0], "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}"
        assert get(f"{url}/health/live") == (200, "live\n")
        assert get(f"{url}/health/ready") == (200, "ready\n")
        reasons.reverse()
        assert get(f"{url}/health/live") == (200, "live\n")
        assert get(f"{url}/health/ready") == (503, "this cloud is shutting down\n")
        assert get(f"{url}/elsewhere")[0] == 404


def test_who_asks_and_leaves_hinders_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    registry = world().service().metrics.registry
    with serving_metrics(registry, lambda: None, "127.0.0.1", 0) as port:
        with socket.create_connection(("127.0.0.1", port)) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            rude.sendall(b"GET /met")
        assert get(f"http://127.0.0.1:{port}/health/live")[0] == 200
    assert capfd.readouterr().err == ""


def test_who_stays_and_asks_nothing_hinders_nobody() -> None:
    registry = world().service().metrics.registry
    with (
        serving_metrics(registry, lambda: None, "127.0.0.1", 0) as port,
        contextlib.ExitStack() as stack,
    ):
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            for _ in range(MAX_CONNECTIONS + 8)
        ]
        for peer in idle:
            peer.sendall(b"GET /met")
        for _ in range(3):
            assert get(f"http://127.0.0.1:{port}/health/live")[0] == 200
        for peer in idle[:8]:
            assert peer.recv(1) == b""
        idle[-1].sendall(b"rics HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(12) == b"HTTP/1.0 200"


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The complete events of a trace."""
    document = json.loads(path.read_text())
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


async def test_the_trace_has_every_batch_and_wait(tmp_path: Path) -> None:
    split = world()
    path = tmp_path / "trace.json"
    trace = Trace(path)
    seen = await work(split, split.service(trace=trace))
    trace.write()
    events = read_trace(path)
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert events[0]["ts"] == 0
    assert all(event["dur"] >= 0 for event in events)

    batches = [event for event in events if event["pid"] == 0]
    assert len(batches) == seen["batches_total"]
    assert sum(event["args"]["rows"] for event in batches) == seen["rows_total"]
    assert sum(event["dur"] for event in batches) / 1e6 == pytest.approx(
        seen["batch_compute_seconds_sum"], rel=1e-3
    )

    steps: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for event in events:
        if event["pid"]:
            steps[event["pid"], event["args"]["step"]][event["name"]] += 1
    points = [point.index for point in split.plan.wire_points]
    assert len(steps) == NUM_SESSIONS * (1 + NUM_DECODED)
    for parts in steps.values():
        assert parts == {
            "queued": len(points) + 1,
            **{f"segment {segment}": 1 for segment in range(len(points) + 1)},
            **{f"reply at point {point}": 1 for point in points},
        }
    waits = [event for event in events if event["name"].startswith("reply")]
    assert sum(event["dur"] for event in waits) / 1e6 == pytest.approx(
        seen["reply_seconds_sum"], rel=1e-3
    )


async def test_events_of_one_row_of_the_trace_do_not_overlap(tmp_path: Path) -> None:
    split = world()
    trace = Trace(tmp_path / "trace.json")
    async with serving(split.service(trace=trace).handle) as address:
        model = split.split(address, max_step_positions=4)  # a prompt is several steps, in flight
        await (await Context.open(model, 64)).advance(PROMPT)
        await model.aclose()
    trace.write()
    rows = defaultdict(list)
    for event in read_trace(tmp_path / "trace.json"):
        rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(rows) > 2
    for spans in rows.values():
        for (_, end), (start, _) in pairwise(sorted(spans)):
            assert start >= end - 1e-2  # microseconds


async def test_a_trace_is_bounded(tmp_path: Path) -> None:
    split = world()
    path = tmp_path / "trace.json"
    trace = Trace(path)
    async with serving(split.service(trace=trace).handle) as address:
        model = split.split(address)
        sequence = await model.open_sequence(64)
        num_steps = max(MAX_BATCHES, MAX_WAITS) // len(split.plan.wire_points) + 2
        for _ in range(num_steps):
            await sequence.forward([5], 0, "last")
        await model.aclose()
    trace.write()
    events = read_trace(path)
    assert sum(event["pid"] == 0 for event in events) == MAX_BATCHES
    assert sum(event["name"].startswith("reply") for event in events) == MAX_WAITS


def test_a_trace_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the trace .*trace\.json: No such file"):
        Trace(tmp_path / "nowhere" / "trace.json")


def test_a_trace_of_nothing_is_valid(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.write()
    assert read_trace(tmp_path / "trace.json") == []


def test_a_log_line_is_one_json_object() -> None:
    try:
        raise ValueError("one\ntwo")
    except ValueError:
        record = logging.LogRecord(
            "some.logger", logging.WARNING, __file__, 1, "a %s\nb", ("x",), sys.exc_info()
        )
    record.created = 0.25
    line = JsonFormatter().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert "ValueError: one\ntwo" in fields.pop("exception")
    assert fields == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "WARNING",
        "logger": "some.logger",
        "message": "a x\nb",
    }
