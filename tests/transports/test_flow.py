"""The queue of received frames and the turns of senders, on their own."""

from __future__ import annotations

import asyncio

import pytest

from privatelora.errors import ConnectionClosed, LocalProtocolError
from privatelora.transports.flow import AdaptiveSpin, FrameQueue, Turns

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks")


def frame(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


async def test_full_and_room() -> None:
    calls: list[bool] = []
    queue = FrameQueue(2000, lambda: calls.append(queue.full))
    fullness = []
    for nbytes in (1000, 1000, 0):
        queue.put(frame(nbytes))
        fullness.append(queue.full)
    assert fullness == [False, True, True]
    queue.pop()
    queue.pop()
    assert calls == [False]


async def test_one_frame_always_fits() -> None:
    queue = FrameQueue(1, lambda: None)
    fullness = []
    for _ in range(3):
        fullness.append(queue.full)
        queue.put(frame(100_000))
        fullness.append(queue.full)
        assert len(await queue.get()) == 100_000
    assert fullness == [False, True] * 3


async def test_end_comes_after_the_frames() -> None:
    queue = FrameQueue(1000, lambda: None)
    queue.put(frame(3))
    queue.end(ConnectionClosed("first reason"))
    queue.end(ConnectionClosed("second reason"))
    assert len(await queue.get()) == 3
    errors = []
    for _ in range(2):
        with pytest.raises(ConnectionClosed, match="first reason") as caught:
            await queue.get()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


async def test_drop_forgets_the_frames() -> None:
    queue = FrameQueue(1, lambda: None)
    queue.put(frame(3))
    queue.drop(ConnectionClosed("gone"))
    assert not queue.full
    with pytest.raises(ConnectionClosed, match="gone"):
        await queue.get()


async def test_a_woken_receiver_cannot_be_overtaken() -> None:
    queue = FrameQueue(1000, lambda: None)
    receiver = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put(frame(1))
    with pytest.raises(LocalProtocolError):
        await queue.get()
    assert len(await receiver) == 1


class Looks:
    """Something to look for that is there at the ``found_at``-th look."""

    def __init__(self, found_at: float) -> None:
        self.num_looks = 0
        self.found_at = found_at

    def __call__(self) -> bool:
        self.num_looks += 1
        return self.num_looks >= self.found_at


def test_spinning_ends_when_something_is_found() -> None:
    spin, looks = AdaptiveSpin(60), Looks(found_at=1000)
    assert spin.until(looks)
    assert looks.num_looks == 1000


def test_spins_in_vain_become_rare_until_one_succeeds() -> None:
    spin, vain = AdaptiveSpin(0.001), Looks(found_at=float("inf"))

    def tries_until_next_spin() -> int:
        before, num_tries = vain.num_looks, 0
        while vain.num_looks == before:
            assert not spin.until(vain)
            num_tries += 1
        return num_tries

    assert [tries_until_next_spin() for _ in range(5)] == [1, 2, 3, 5, 9]
    while not spin.until(Looks(found_at=1)):
        pass
    assert [tries_until_next_spin() for _ in range(3)] == [1, 2, 3]


async def test_turns_are_taken_in_order_of_arrival() -> None:
    turns, log, gate = Turns(), [], asyncio.Event()

    async def take(number: int) -> None:
        async with turns:
            log.append(number)
            await gate.wait()

    tasks = []
    for number in range(5):
        tasks.append(asyncio.create_task(take(number)))
        await asyncio.sleep(0)
    assert (log, turns.num_tasks) == ([0], 5)
    tasks[2].cancel()
    gate.set()
    await asyncio.wait(tasks)
    assert (log, turns.num_tasks) == ([0, 1, 3, 4], 0)


@pytest.mark.parametrize("num_steps", range(4))
async def test_a_turn_given_to_a_cancelled_task_is_passed_on(num_steps: int) -> None:
    turns = Turns()

    async def take() -> None:
        async with turns:
            pass

    await turns.__aenter__()
    first, second = asyncio.create_task(take()), asyncio.create_task(take())
    await asyncio.sleep(0)
    await turns.__aexit__()
    for _ in range(num_steps):
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first, second})
    assert not second.cancelled()
    assert turns.num_tasks == 0
    await take()
