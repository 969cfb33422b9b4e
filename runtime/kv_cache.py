"""Keys and values of many sequences, drawn in blocks from one bounded pool.

The keys and values of one sequence lie together, layer by layer, because attention wants them
so: gathering them from scattered blocks for every layer and token took attention up to 40 %
longer (9 heads, 1 to 32 sequences of 64 to 2048 positions, one CPU core). Blocks are the unit of
account: a sequence uses no memory for positions whose blocks it does not hold.

On a CPU a sequence has addresses for all its positions at once, and the system gives them memory
page by page as they are written; growing moves nothing. Elsewhere a sequence that outgrows its
memory moves to a larger one, by a quarter at least, which copies a position some four times.
"""

from __future__ import annotations

import math
import mmap

import torch

from privatelora.errors import CapacityError, RequestError
from privatelora.partition.models.config import DecoderConfig

BLOCK_SIZE = 16
"""Positions of one block: a head of 64 float32 fills a page of 4 KiB with them."""


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Precision of q, k, v, their additions through B, and attention.

    On a CPU float32 whatever the compute dtype: attention in half precision is many times
    slower there (9 heads over 512 positions: 26 us in float32, 376 us in float16).
    """
    return torch.float32 if device.type == "cpu" else dtype


class KVPool:
    """Blocks of positions that sequences take as they grow and give back when they end.

    Memory is used when a sequence takes blocks, and freed when it gives them back.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_layers: int,
        max_positions: int,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """Give out blocks for up to ``max_positions`` of all sequences together.

        A last part that is no full block counts as one. ``dtype``: of the engine.
        """
        self.num_layers = num_layers
        self.num_heads = 2 * config.num_kv_heads
        self.head_dim = config.head_dim
        self.device = device
        self.dtype = attention_dtype(device, dtype)
        self.block_size = block_size
        self.grows_in_place = device.type == "cpu"
        self.num_blocks = self.blocks_for(max_positions)
        self.num_used_blocks = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self.num_blocks - self.num_used_blocks

    @property
    def block_nbytes(self) -> int:
        """Memory of one block in all layers."""
        per_position = self.num_layers * self.num_heads * self.head_dim * self.dtype.itemsize
        return self.block_size * per_position

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that ``num_positions`` of one sequence take."""
        return -(-num_positions // self.block_size)

    def open(self, max_positions: int) -> KVCache:
        """A sequence of up to ``max_positions``, without memory yet."""
        return KVCache(self, max_positions)


class KVCache:
    """Keys and values of one sequence, written at explicit positions.

    A step that starts at position ``p`` overwrites what was there, and attention reads only up
    to its own last position: nothing behind it is ever seen.
    """

    def __init__(self, pool: KVPool, capacity: int) -> None:
        """Draw from ``pool`` for at most ``capacity`` positions. See ``KVPool.open``."""
        self.pool = pool
        self.capacity = capacity
        self.num_blocks = 0
        """Blocks held now."""
        self._num_positions = 0  # that every layer has memory for
        self._layers = [_Layer(pool, 0) for _ in range(pool.num_layers)]

    def check_room(self, position: int, num_positions: int) -> None:
        """Raise RequestError if positions up to ``position + num_positions`` can never fit."""
        if position + num_positions > self.capacity:
            raise RequestError(
                f"positions {position} to {position + num_positions - 1} do not fit a sequence "
                f"of {self.capacity}; ask for a longer sequence or send a shorter prompt"
            )

    def blocks_wanted(self, position: int, num_positions: int) -> int:
        """Blocks that ``reserve`` would have to take at least."""
        return max(0, self.pool.blocks_for(position + num_positions) - self.num_blocks)

    def reserve(self, position: int, num_positions: int, max_spare: int | None = None) -> None:
        """Take the blocks for a step that will write here; what is stored stays.

        Where growing means moving, it takes more than the step needs while there are enough: a
        quarter of what is held, unless that is above ``max_spare`` blocks. Raises RequestError
        beyond the capacity and CapacityError when the pool has too few blocks left, or the machine
        no memory.
        """
        self.check_room(position, num_positions)
        if position + num_positions <= self._num_positions:
            return
        wanted = self.blocks_wanted(position, num_positions)
        pool = self.pool
        if wanted > pool.num_free_blocks:
            raise CapacityError(
                f"the KV cache has {pool.num_free_blocks * pool.block_size} of "
                f"{pool.num_blocks * pool.block_size} positions free and "
                f"{wanted * pool.block_size} more are needed; try again later"
            )
        most = min(pool.num_free_blocks, pool.blocks_for(self.capacity) - self.num_blocks)
        spare = 0 if pool.grows_in_place else self.num_blocks // 4
        if max_spare is not None:
            spare = min(spare, max_spare)
        self._resize(self.num_blocks + min(max(wanted, spare), most))

    def truncate(self, position: int) -> None:
        """Forget everything from ``position`` on.

        Blocks behind it stay with the sequence for its next turn, up to as many as it still
        uses; beyond that they all go back to the pool.
        """
        needed = self.pool.blocks_for(position)
        if self.num_blocks > 2 * needed:
            self._resize(needed)

    def release(self) -> None:
        """Give all blocks and their memory back. The cache may be used again from position 0."""
        self._resize(0)

    def store(self, index: int, position: int, keys_values: torch.Tensor) -> None:
        """Write (2 * num_kv_heads, n, head_dim), keys first, at ``position``, which is reserved.

        ``index`` counts the layers of this cache from 0.
        """
        layer = self._layers[index]
        layer.keys_values.narrow(1, position, keys_values.shape[1]).copy_(keys_values)

    def read(self, index: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions ``start`` to ``end``.

        Each is a view of shape (1, num_kv_heads, end - start, head_dim).
        """
        layer = self._layers[index]
        length = end - start
        return layer.keys.narrow(2, start, length), layer.values.narrow(2, start, length)

    def _resize(self, num_blocks: int) -> None:
        """Change how many blocks are held, and the memory of one layer after the other."""
        pool, before = self.pool, self.num_blocks
        grown = num_blocks > before
        if grown:  # taken first: should memory run out halfway, they are in use
            pool.num_used_blocks += num_blocks - before
            self.num_blocks = num_blocks
        num_positions = num_blocks * pool.block_size
        room = pool.blocks_for(self.capacity) * pool.block_size
        self._num_positions = min(self._num_positions, num_positions)
        try:
            for index, layer in enumerate(self._layers):
                if not pool.grows_in_place:
                    self._layers[index] = layer.resized(pool, num_positions, num_positions)
                elif not grown or layer.num_positions == 0:
                    self._layers[index] = layer.resized(
                        pool, room if num_blocks else 0, num_positions
                    )
        except (RuntimeError, MemoryError, OSError) as error:  # torch reports it as any
            raise CapacityError(
                "there is no memory left for a KV cache; try again later"
            ) from error
        self._num_positions = num_positions
        if not grown:
            pool.num_used_blocks -= before - num_blocks
            self.num_blocks = num_blocks


class _Layer:
    """Memory of one layer, with the views that are read made once: slicing costs time."""

    __slots__ = ("keys", "keys_values", "num_positions", "values")

    def __init__(self, pool: KVPool, num_positions: int) -> None:
        self.num_positions = num_positions
        shape = (pool.num_heads, num_positions, pool.head_dim)
        if pool.grows_in_place and num_positions:
            self.keys_values = _map_pages(shape, pool.dtype)
        else:
            self.keys_values = torch.empty(shape, device=pool.device, dtype=pool.dtype)
        self.keys, self.values = self.keys_values.unsqueeze(0).chunk(2, dim=1)

    def resized(self, pool: KVPool, num_positions: int, num_kept: int) -> _Layer:
        """Other memory with a copy of the first ``num_kept`` positions, or as many as there are."""
        layer = _Layer(pool, num_positions)
        num_kept = min(num_kept, self.num_positions)
        layer.keys_values[:, :num_kept] = self.keys_values[:, :num_kept]
        return layer


def _map_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in pages of their own, used as they are written and all freed with the tensor.

    The C library keeps freed memory of such sizes for itself, and scatters it: a pool of 360 MB
    took 540 MB.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page is memory for hundreds of blocks
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
