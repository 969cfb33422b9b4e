"""Blocks of the KV cache: what sequences hold, what they remember, what they cost."""

from __future__ import annotations

import mmap
import random
from typing import Any

import psutil
import pytest
import torch

from privatelora.errors import CapacityError, RequestError
from privatelora.runtime.kv_cache import KVCache, KVPool
from tests.unit.world import CPU, world

BLOCK = 4


def pool(num_blocks: int = 10, *, grows_in_place: bool = True) -> KVPool:
    """Of two layers. Where caches do not grow in place they move, as they do on a GPU."""
    blocks = KVPool(world().config, 2, num_blocks * BLOCK, CPU, torch.float32, BLOCK)
    blocks.grows_in_place = grows_in_place
    return blocks


def rows(cache: KVCache, layer: int, position: int, length: int) -> torch.Tensor:
    """Keys and values that tell every position, head and layer of a sequence apart."""
    shape = (cache.pool.num_heads, length, cache.pool.head_dim)
    positions = torch.arange(position, position + length).view(1, -1, 1)
    heads = torch.arange(cache.pool.num_heads).view(-1, 1, 1)
    return (1000.0 * layer + 10 * heads + positions / 100).expand(shape).contiguous()


def write(cache: KVCache, position: int, length: int, mark: float = 0) -> None:
    cache.reserve(position, length)
    for layer in range(cache.pool.num_layers):
        cache.store(layer, position, rows(cache, layer, position, length) + mark)


def test_positions_take_whole_blocks() -> None:
    blocks = pool()
    assert [blocks.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert KVPool(world().config, 2, 9, CPU, torch.float32, BLOCK).num_blocks == 3


def test_a_sequence_holds_nothing_until_it_is_used() -> None:
    blocks = pool()
    caches = [blocks.open(1000) for _ in range(100)]
    assert blocks.num_used_blocks == 0
    caches[0].reserve(0, 1)
    assert (blocks.num_used_blocks, blocks.num_free_blocks) == (1, 9)
    caches[0].reserve(0, BLOCK)
    assert blocks.num_used_blocks == 1
    assert caches[0].blocks_wanted(BLOCK, 1) == 1
    caches[0].reserve(BLOCK, 1)
    assert blocks.num_used_blocks == caches[0].num_blocks == 2


def test_moving_takes_a_quarter_more_but_never_beyond_the_capacity_or_the_pool() -> None:
    blocks = pool(num_blocks=100, grows_in_place=False)
    cache = blocks.open(50 * BLOCK - 1)
    cache.reserve(0, 40 * BLOCK)
    assert cache.num_blocks == 40  # what was asked for, and no more
    cache.reserve(40 * BLOCK, 1)
    assert cache.num_blocks == 50
    blocks = pool(num_blocks=9, grows_in_place=False)
    cache = blocks.open(100)
    cache.reserve(0, 8 * BLOCK)
    cache.reserve(8 * BLOCK, 1)
    assert blocks.num_free_blocks == 0


def test_an_exhausted_pool() -> None:
    blocks = pool()
    first, second = blocks.open(40), blocks.open(40)
    write(first, 0, 30)
    with pytest.raises(CapacityError, match="8 of 40 positions free and 12 more are needed"):
        second.reserve(0, 9)
    assert second.num_blocks == 0
    second.reserve(0, 8)
    with pytest.raises(CapacityError, match="0 of 40"):
        first.reserve(30, 3)
    first.release()
    assert blocks.num_free_blocks == 8
    second.reserve(8, 30)


def test_a_sequence_keeps_to_its_capacity() -> None:
    cache = pool().open(6)
    with pytest.raises(RequestError, match="positions 4 to 6 do not fit a sequence of 6"):
        cache.reserve(4, 3)
    write(cache, 0, 6)
    keys, values = cache.read(1, 0, 6)
    assert keys.shape == values.shape == (1, 2, 6, 16)


def test_truncating_keeps_as_much_as_is_used() -> None:
    blocks = pool()
    cache = blocks.open(40)
    write(cache, 0, 40)
    cache.truncate(5 * BLOCK)
    assert blocks.num_used_blocks == 10
    cache.truncate(5 * BLOCK - 3)
    assert blocks.num_used_blocks == 10
    cache.truncate(4 * BLOCK)
    assert blocks.num_used_blocks == 4
    keys, _ = cache.read(1, 0, 4 * BLOCK)
    assert torch.equal(keys[0], rows(cache, 1, 0, 4 * BLOCK)[: keys.shape[1]])
    cache.truncate(0)
    assert blocks.num_used_blocks == 0


def test_a_released_sequence_may_begin_again() -> None:
    blocks = pool()
    cache = blocks.open(40)
    write(cache, 0, 40)
    cache.release()
    cache.release()
    assert blocks.num_used_blocks == cache.num_blocks == 0
    write(cache, 0, 3, mark=0.5)
    assert torch.equal(cache.read(0, 0, 3)[0][0], rows(cache, 0, 0, 3)[:2] + 0.5)


@pytest.mark.parametrize("grows_in_place", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_random_sequences_remember_what_was_written(seed: int, grows_in_place: bool) -> None:
    choice = random.Random(seed)
    blocks = pool(num_blocks=20, grows_in_place=grows_in_place)
    caches = [blocks.open(choice.randint(20, 60)) for _ in range(4)]
    written: list[list[float]] = [[] for _ in caches]
    refused = 0
    for _ in range(200):
        index = choice.randrange(len(caches))
        cache, marks = caches[index], written[index]
        match choice.choice(["write", "write", "write", "back", "truncate", "release"]):
            case "truncate":
                del marks[choice.randint(0, len(marks)) :]
                cache.truncate(len(marks))
            case "release" if choice.random() < 0.3:
                marks.clear()
                cache.release()
            case kind:
                position = choice.randint(0, len(marks)) if kind == "back" else len(marks)
                length = choice.randint(1, 9)
                mark = choice.random()
                try:
                    write(cache, position, length, mark)
                except (CapacityError, RequestError):
                    refused += 1
                    continue
                marks[position:] = [mark] * length
        assert blocks.num_used_blocks == sum(cache.num_blocks for cache in caches) <= 20
        for layer in range(2):
            keys, values = cache.read(layer, 0, len(marks))
            if not grows_in_place:
                memory = keys.untyped_storage().nbytes() * blocks.num_layers
                assert memory <= cache.num_blocks * blocks.block_nbytes
            expected = rows(cache, layer, 0, len(marks)) + torch.tensor(marks).view(1, -1, 1)
            assert torch.equal(torch.cat((keys[0], values[0])), expected)
    assert refused


def test_memory_comes_with_use_and_goes_with_release() -> None:
    process = psutil.Process()
    blocks = KVPool(world().config, 1, 2**18, CPU, torch.float32)
    assert blocks.num_blocks * blocks.block_nbytes == 64 * 2**20
    before = process.memory_info().rss
    cache = blocks.open(2**18)
    assert process.memory_info().rss - before < 8 * 2**20
    for num_positions in (2**16, 2**18):
        cache.reserve(0, num_positions)
        cache.store(0, 0, torch.ones(()).expand(4, num_positions, 16))
        used = process.memory_info().rss - before
        assert abs(used - blocks.num_used_blocks * blocks.block_nbytes) < 8 * 2**20
    cache.truncate(2**12)
    assert process.memory_info().rss - before < 8 * 2**20
    cache.release()
    assert process.memory_info().rss - before < 8 * 2**20


@pytest.mark.parametrize("grows_in_place", [True, False])
@pytest.mark.parametrize("num_allocated", [0, 1])
def test_a_machine_without_memory(
    num_allocated: int, grows_in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = pool(grows_in_place=grows_in_place)
    cache = blocks.open(40)
    held = 0
    if not grows_in_place:  # else all addresses are had with the first block
        held = 8
        write(cache, 0, held)
    left = [None] * num_allocated

    def failing(allocate: Any, error: Exception) -> Any:
        def allocate_or_fail(*args: Any, **kwargs: Any) -> Any:
            if not left:
                raise error
            left.pop()
            return allocate(*args, **kwargs)

        return allocate_or_fail

    with monkeypatch.context() as patch:
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        patch.setattr(torch, "empty", failing(torch.empty, error))
        patch.setattr(mmap, "mmap", failing(mmap.mmap, OSError(12, "Cannot allocate memory")))
        for _ in range(2):
            with pytest.raises(CapacityError, match="no memory left"):
                cache.reserve(held, 9)
    assert blocks.num_used_blocks == cache.num_blocks <= blocks.num_blocks
    for layer in range(2):  # what was there is still there
        keys, _ = cache.read(layer, 0, held)
        assert torch.equal(keys[0], rows(cache, layer, 0, held)[:2])
    write(cache, held, 9)
    assert torch.equal(cache.read(1, 0, held + 9)[0][0], rows(cache, 1, 0, held + 9)[:2])
    cache.release()
    assert blocks.num_used_blocks == 0
