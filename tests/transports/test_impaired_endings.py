"""Impaired connections: cancellation, endings, and how much they hold."""

from __future__ import annotations

import asyncio

import pytest

from privatelora.errors import ConnectionClosed, LocalProtocolError, RemoteProtocolError
from privatelora.transports.base import Connection, Limits
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.impaired import impaired
from privatelora.transports.inproc import InprocConnection
from tests.transports.impaired_rig import (
    HOUR,
    LIMITS,
    NOTHING,
    NUM_TURNS_TO_BE_IDLE,
    SLOW,
    MakeRig,
    receive_all,
    send_all,
)
from tests.transports.support import MIB, blocked, cancel, received

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

FRAMES = [bytes([number]) * 100 for number in range(60)]

# Cancellation


async def test_a_send_that_waits_for_room_can_be_withdrawn(make_rig: MakeRig) -> None:
    rig = make_rig(send=Impairment(bandwidth_mbps=0.001, delay_ms=5))
    await rig.near.send(b"1" * 40_000)
    sends = [asyncio.create_task(rig.near.send(letter * 40_000)) for letter in (b"2", b"3")]
    await asyncio.sleep(0)
    await cancel(sends[0])
    assert (await received(rig.other))[:1] == b"1"
    assert (await received(rig.other))[:1] == b"3"
    assert rig.elapsed_s() == pytest.approx(640.005)
    await sends[1]


async def test_a_send_cut_off_in_mid_frame_aborts(make_rig: MakeRig) -> None:
    rig = make_rig(send=Impairment(bandwidth_mbps=0.001))
    sending = asyncio.create_task(rig.near.send(bytes(MIB)))
    await asyncio.sleep(0)
    await cancel(sending)
    for action in (rig.near.send(b"x"), rig.near.recv(), rig.other.recv(), rig.other.send(b"x")):
        with pytest.raises(ConnectionClosed, match="aborted"):
            await action


@pytest.mark.parametrize("num_steps", range(8))
async def test_a_cancelled_recv_loses_nothing(make_rig: MakeRig, num_steps: int) -> None:
    rig = make_rig(receive=Impairment(delay_ms=1))
    numbers = []
    for number in range(10):
        receiving = asyncio.create_task(rig.near.recv())
        await asyncio.sleep(0)
        await rig.other.send(bytes([number]))
        for _ in range(NUM_TURNS_TO_BE_IDLE + num_steps):
            await asyncio.sleep(0)
        receiving.cancel()
        [outcome] = await asyncio.gather(receiving, return_exceptions=True)
        if isinstance(outcome, memoryview):
            numbers.append(outcome[0])
    while len(numbers) < 10:
        numbers.append((await rig.near.recv())[0])
    assert numbers == list(range(10))


async def test_mistakes_are_told_at_once_while_the_link_is_full(make_rig: MakeRig) -> None:
    rig = make_rig(send=HOUR, limits=Limits(max_frame_nbytes=20 * MIB))
    sending = asyncio.create_task(rig.near.send(bytes(20 * MIB)))
    await asyncio.sleep(0)
    with pytest.raises(LocalProtocolError, match="over this end's limit"):
        rig.near.send(bytes(20 * MIB + 1)).send(None)
    with pytest.raises(LocalProtocolError, match="strided"):
        rig.near.send(memoryview(b"abcd")[::2]).send(None)
    await cancel(sending)


async def test_one_receiver_only(make_rig: MakeRig) -> None:
    rig = make_rig(receive=HOUR)
    first = asyncio.create_task(rig.near.recv())
    await asyncio.sleep(0)
    with pytest.raises(LocalProtocolError, match="two tasks"):
        await rig.near.recv()
    await cancel(first)


# Ending


async def test_close_delivers_what_was_sent_in_emulated_time(make_rig: MakeRig) -> None:
    rig = make_rig(send=Impairment(bandwidth_mbps=0.8, delay_ms=50))
    for frame in FRAMES:
        await rig.near.send(frame)
    closing = asyncio.create_task(rig.near.aclose())
    assert await receive_all(rig.other) == FRAMES
    assert rig.elapsed_s() == pytest.approx(0.06 + 0.05)
    assert not closing.done()
    await rig.other.aclose()
    await closing


async def test_the_end_takes_as_long_as_a_frame(make_rig: MakeRig, direction: str) -> None:
    rig = make_rig(**{direction: Impairment(delay_ms=50)})
    source, sink = rig.ends(direction)
    closing = asyncio.create_task(source.aclose())
    assert await receive_all(sink) == []
    assert rig.elapsed_s() == pytest.approx(0.05)
    await sink.aclose()
    await closing


async def test_close_gives_up_on_a_link_that_is_too_slow(make_rig: MakeRig) -> None:
    limits = Limits(close_timeout_s=0.05)
    inner, other = InprocConnection.pair("slow", limits, limits)
    near = impaired(inner, limits, send=HOUR, receive=NOTHING, seed=1)
    await near.send(b"never arrives")
    async with asyncio.timeout(5):
        await near.aclose()
    assert await receive_all(other) == []


async def test_after_the_peers_end_sending_goes_on(make_rig: MakeRig) -> None:
    slow = Impairment(bandwidth_mbps=1, delay_ms=20)
    rig = make_rig(send=slow, receive=slow)
    await rig.other.send(b"last words")
    closing = asyncio.create_task(rig.other.aclose())
    assert await receive_all(rig.near) == [b"last words"]
    for _ in range(5):
        await rig.near.send(bytes(MIB))
    assert not closing.done()
    await rig.near.aclose()
    await closing


async def test_what_comes_in_while_closing_is_dropped(make_rig: MakeRig) -> None:
    rig = make_rig(send=Impairment(delay_ms=1000), receive=SLOW)
    for _ in range(2):
        await rig.other.send(bytes(60_000))  # more than the window
    await rig.pass_time(0)
    closing = asyncio.create_task(rig.near.aclose())
    await asyncio.sleep(0)
    await send_all(rig.other, [bytes(MIB)] * 20)
    assert rig.elapsed_s() == 0
    with pytest.raises(ConnectionClosed):
        await rig.other.recv()
    assert rig.elapsed_s() == pytest.approx(1)
    await rig.other.aclose()
    await closing


async def test_abort_drops_what_is_on_the_link(make_rig: MakeRig, direction: str) -> None:
    rig = make_rig(**{direction: HOUR})
    source, sink = rig.ends(direction)
    receiving = asyncio.create_task(receive_all(sink))
    await source.send(b"gone")
    for _ in range(10):
        await asyncio.sleep(0)
    rig.near.abort()
    assert await receiving == []
    for end in (source, sink):
        with pytest.raises(ConnectionClosed):
            await end.send(b"x")


async def test_a_broken_rule_shows_behind_the_frames_before_it(make_rig: MakeRig) -> None:
    limits = Limits(max_frame_nbytes=100)
    rig = make_rig(send=HOUR, receive=Impairment(delay_ms=20), limits=limits)
    await rig.other.send(b"fine")
    await rig.other.send(bytes(101))
    assert await received(rig.near) == b"fine"
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="101 bytes"):
            await rig.near.recv()
    with pytest.raises(ConnectionClosed):
        await rig.near.send(b"x")
    await rig.near.aclose()


async def test_peer_death_shows_in_both_directions(make_rig: MakeRig) -> None:
    slow = Impairment(delay_ms=20)
    rig = make_rig(send=slow, receive=slow)
    await rig.other.send(b"last words")
    rig.other.abort()
    assert await received(rig.near) == b"last words"
    with pytest.raises(ConnectionClosed):
        await rig.near.recv()
    await send_all(rig.near, [bytes(MIB)] * 100)
    with pytest.raises(ConnectionClosed):
        await rig.near.send(b"x")
    await rig.near.aclose()


async def test_a_defect_in_the_wrapped_connection_aborts(
    own_errors: pytest.LogCaptureFixture,
) -> None:
    class Defective(InprocConnection):
        async def recv(self) -> memoryview:
            raise ZeroDivisionError("oops")

    inner, other = Defective.pair("defective", LIMITS, LIMITS)
    near = impaired(inner, LIMITS, send=NOTHING, receive=NOTHING, seed=1)
    with pytest.raises(ConnectionClosed):
        await near.recv()
    with pytest.raises(ConnectionClosed):
        await near.send(b"x")
    assert "ZeroDivisionError: oops" in own_errors.text
    other.abort()


# Memory


class Flood:
    """Sends frames of one size and counts those that went out."""

    def __init__(self, connection: Connection, nbytes: int) -> None:
        self.num_sent = 0
        self._connection = connection
        self._frame = bytes(nbytes)

    async def run(self) -> None:
        while True:
            await self._connection.send(self._frame)
            self.num_sent += 1


@pytest.mark.parametrize("nbytes", [0, 1000, 300_000])
@pytest.mark.parametrize(("send", "window_nbytes"), [(SLOW, 64 * 1024), (HOUR, 16 * MIB)])
async def test_what_is_sent_is_bounded(nbytes: int, send: Impairment, window_nbytes: int) -> None:
    inner, _ = InprocConnection.pair("flooded", LIMITS, LIMITS)
    near = impaired(inner, LIMITS, send=send, receive=NOTHING, seed=1)
    flood = Flood(near, nbytes)
    flooding = await blocked(flood.run())
    held_nbytes = flood.num_sent * (nbytes + 256)
    assert held_nbytes <= window_nbytes < held_nbytes + nbytes + 256
    await cancel(flooding)
    near.abort()


@pytest.mark.parametrize("nbytes", [0, 1000, 300_000])
@pytest.mark.parametrize(("receive", "window_nbytes"), [(SLOW, 64 * 1024), (NOTHING, 16 * MIB)])
async def test_what_is_received_is_bounded_by_the_link_or_the_receiver(
    nbytes: int, receive: Impairment, window_nbytes: int
) -> None:
    inner, other = InprocConnection.pair("flooded", LIMITS, LIMITS)
    near = impaired(inner, LIMITS, send=NOTHING, receive=receive, seed=1)
    flood = Flood(other, nbytes)
    flooding = await blocked(flood.run())
    held_nbytes = flood.num_sent * (nbytes + 256)
    # The window, the queue of the wrapped connection and the receiver's, and a frame over each.
    assert held_nbytes <= window_nbytes + 2 * LIMITS.max_queued_nbytes + 3 * (nbytes + 256)
    await cancel(flooding)
    near.abort()
