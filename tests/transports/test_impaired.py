"""Impaired connections: times exactly, on a clock of the test's own, and every fault.

Cancellation, endings and memory are in test_impaired_endings.py.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

import pytest

from privatelora.errors import ConnectionClosed
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.impaired import impaired
from privatelora.transports.registry import connect, listen
from tests.transports.impaired_rig import LIMITS, MakeRig, receive_all, send_all
from tests.transports.support import cancel, echo, received

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

# Times


async def test_round_trip(make_rig: MakeRig) -> None:
    rig = make_rig(send=Impairment(delay_ms=30), receive=Impairment(delay_ms=7))
    echoing = asyncio.create_task(echo(rig.other))
    for number in range(1, 6):
        await rig.near.send(b"x" * 768)
        assert await received(rig.near) == b"x" * 768
        assert rig.elapsed_s() == pytest.approx(number * 0.037)
    await cancel(echoing)


@pytest.mark.parametrize("nbytes", [768, 30_000, 400_000])
@pytest.mark.parametrize("delay_ms", [0, 200])
async def test_bandwidth(make_rig: MakeRig, direction: str, nbytes: int, delay_ms: float) -> None:
    """Of frames well below the window and above it."""
    rig = make_rig(**{direction: Impairment(bandwidth_mbps=4, delay_ms=delay_ms)})
    source, sink = rig.ends(direction)
    count = max(4, 400_000 // nbytes)
    sending = asyncio.create_task(send_all(source, [bytes(nbytes)] * count))
    for number in range(1, count + 1):
        assert len(await sink.recv()) == nbytes
        assert rig.elapsed_s() == pytest.approx(number * nbytes / 500_000 + delay_ms / 1e3)
    await sending


async def test_a_sender_is_held_back_by_the_window(make_rig: MakeRig) -> None:
    """It goes on when all but a window has arrived, be that in the middle of a frame."""
    rig = make_rig(send=Impairment(bandwidth_mbps=0.8, delay_ms=100))
    window_nbytes, held_nbytes = 64 * 1024, 20_000 + 256
    receiving = asyncio.create_task(receive_all(rig.other))
    for number in range(1, 11):
        await rig.near.send(bytes(20_000))
        num_over = number - window_nbytes / held_nbytes
        assert rig.elapsed_s() == pytest.approx(0.1 + 0.2 * num_over if num_over > 0 else 0)
    await rig.near.send(bytes(200_000))
    assert rig.elapsed_s() == pytest.approx(4.1 - 2 * window_nbytes / (200_000 + 256))
    rig.near.abort()
    await receiving


async def test_directions_do_not_share_the_bandwidth(make_rig: MakeRig) -> None:
    rig = make_rig(send=Impairment(bandwidth_mbps=0.8), receive=Impairment(bandwidth_mbps=0.4))
    async with asyncio.TaskGroup() as group:
        group.create_task(rig.near.send(bytes(50_000)))
        group.create_task(rig.other.send(bytes(50_000)))
        group.create_task(rig.other.recv())
        group.create_task(rig.near.recv())
    assert rig.elapsed_s() == pytest.approx(1)


async def test_jitter_keeps_the_order(make_rig: MakeRig, direction: str) -> None:
    rig = make_rig(**{direction: Impairment(delay_ms=100, jitter_ms=100)})
    source, sink = rig.ends(direction)
    times = []
    for first in range(0, 100, 5):
        for number in range(first, first + 5):
            await source.send(bytes([number]))
        for number in range(first, first + 5):
            assert await received(sink) == bytes([number])
            times.append(rig.elapsed_s())
    assert len(set(times)) > 20
    assert times[-1] <= 20 * 0.2


async def test_frames_that_need_no_time_do_not_overtake(make_rig: MakeRig, direction: str) -> None:
    """While the receiver takes nothing, what has crossed the link waits behind it."""
    rig = make_rig(**{direction: Impairment(bandwidth_mbps=100)})
    source, sink = rig.ends(direction)
    frames = [bytes([number]) * 40_000 for number in range(6)]
    for frame in frames:
        await source.send(frame)
    await rig.pass_time(1)
    await source.send()
    assert [await received(sink) for _ in range(7)] == [*frames, b""]


async def test_stall(make_rig: MakeRig, direction: str) -> None:
    stalled = Impairment(delay_ms=10, stall_probability=1, stall_ms=300)
    rig = make_rig(**{direction: stalled})
    source, sink = rig.ends(direction)
    for _ in range(3):
        await source.send(b"x")
    for number in range(1, 4):
        await sink.recv()
        assert rig.elapsed_s() == pytest.approx(0.3 * number + 0.01)


async def test_a_real_clock_over_tcp() -> None:
    async with await listen("tcp://127.0.0.1:0", echo) as listener:
        inner = await connect(listener.address)
        delay = Impairment(delay_ms=2)
        async with impaired(inner, LIMITS, send=delay, receive=delay, seed=1) as connection:
            times = []
            for _ in range(20):
                start = monotonic()
                await connection.send(b"x" * 768)
                await connection.recv()
                times.append(monotonic() - start)
    # The best of them, because the machine may be busy with something else.
    assert 0.004 <= min(times) < 0.006


async def test_without_impairments_a_frame_has_left_when_send_returns(make_rig: MakeRig) -> None:
    rig = make_rig()
    for coroutine in (rig.near.send(b"now"), rig.other.recv()):
        with pytest.raises(StopIteration) as done:
            coroutine.send(None)
    assert bytes(done.value.value) == b"now"


# Faults

FRAMES = [bytes([number]) * 100 for number in range(60)]
DAMAGE = Impairment(truncate_probability=0.3, corrupt_probability=0.3)


async def damaged(make_rig: MakeRig, direction: str, seed: int, *, paced: bool) -> list[bytes]:
    rig = make_rig(**{direction: DAMAGE}, seed=seed)
    source, sink = rig.ends(direction)
    arrived = []
    for frame in FRAMES:
        await source.send(frame)
        if paced:
            arrived.append(await received(sink))
    while len(arrived) < len(FRAMES):
        arrived.append(await received(sink))
    return arrived


async def test_damage_follows_the_seed_and_not_the_pace(make_rig: MakeRig, direction: str) -> None:
    arrived = await damaged(make_rig, direction, 5, paced=True)
    assert arrived == await damaged(make_rig, direction, 5, paced=False)
    assert arrived != await damaged(make_rig, direction, 6, paced=False)
    pairs = list(zip(arrived, FRAMES, strict=True))
    assert sum(len(frame) < 100 for frame in arrived) > 5
    assert sum(len(frame) == 100 and frame != sent for frame, sent in pairs) > 5
    assert sum(frame == sent for frame, sent in pairs) > 5


async def test_directions_have_faults_of_their_own(make_rig: MakeRig) -> None:
    assert await damaged(make_rig, "send", 5, paced=True) != await damaged(
        make_rig, "receive", 5, paced=True
    )


async def test_damage_does_not_reach_the_senders_memory(make_rig: MakeRig, direction: str) -> None:
    rig = make_rig(**{direction: Impairment(corrupt_probability=1)})
    source, sink = rig.ends(direction)
    memory = bytearray(100)
    await source.send(memory)
    assert await received(sink) != bytes(100)
    assert memory == bytes(100)


async def test_faults_are_logged(
    make_rig: MakeRig, direction: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(**{direction: Impairment(truncate_probability=1)})
    source, sink = rig.ends(direction)
    with caplog.at_level(logging.INFO, "privatelora.transports"):
        await source.send(bytes(100))
        frame = await sink.recv()
    what = "sent to" if direction == "send" else "received from"
    assert f"frame 1 {what} rig: truncated from 100 to {len(frame)} bytes" in caplog.text


@pytest.mark.parametrize("delay_ms", [0, 50])
async def test_a_dropped_link_closes_both_ends(
    make_rig: MakeRig, direction: str, delay_ms: float
) -> None:
    counts = []
    for seed in (3, 3, 4):
        impairment = Impairment(drop_probability=0.1, delay_ms=delay_ms)
        rig = make_rig(**{direction: impairment}, seed=seed)
        source, sink = rig.ends(direction)
        idle = asyncio.create_task(source.recv())
        sending = asyncio.create_task(send_all(source, FRAMES))
        arrived = await receive_all(sink)
        assert arrived == FRAMES[: len(arrived)]
        assert rig.elapsed_s() == pytest.approx(delay_ms / 1e3)
        counts.append(len(arrived))
        with pytest.raises(ConnectionClosed):
            await idle
        await sending
        for end in (source, sink):
            with pytest.raises(ConnectionClosed):
                await end.send(b"more")
            with pytest.raises(ConnectionClosed):
                await end.recv()
            await end.aclose()
        with pytest.raises(ConnectionClosed, match=f"lost on purpose, at frame {counts[-1] + 1} "):
            await rig.near.recv()
    assert counts[0] == counts[1] != counts[2]
