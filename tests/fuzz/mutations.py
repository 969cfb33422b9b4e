"""Ways to spoil a frame that know what is in it.

Every function draws from the ``Random`` it gets and from nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import lz4.block
import msgpack

from privatelora.runtime.payload.codec import CODEC_NAMES, plain_nbytes
from privatelora.runtime.payload.names import LZ4_SUFFIX
from privatelora.runtime.wire.codec import seal
from privatelora.runtime.wire.messages import (
    BackwardEnd,
    ErrorReply,
    Hello,
    StepBegin,
    TrainBegin,
)
from privatelora.runtime.wire.prelude import MAX_SEQUENCES, PRELUDE, TYPES
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC
from tests.fuzz.end import HIDDEN, MAX_FRAME_NBYTES, MAX_POSITIONS

T = TypeVar("T")

CHECKSUM_NBYTES = 4

# These ship without annotations.
_MSGPACK: Any = msgpack
_LZ4: Any = lz4.block

_EDGES = (
    *(0, 1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 127, 128, 255, 256, MAX_POSITIONS, HIDDEN),
    *(2**15, 2**16 - 1, 2**16, MAX_FRAME_NBYTES - 1, MAX_FRAME_NBYTES, MAX_FRAME_NBYTES + 1),
    *(2**20, 2**20 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**63, 2**64 - 1),
)
"""Numbers at which something begins to be wrong."""
_ODD_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xC1, 0xFF)
_ODD_SCALES = (0x0000, 0x0001, 0x007F, 0x0080, 0x7B12, 0x7DFF, 0x7E00, 0x7F80, 0x7FC0, 0x8000)
_ODD_NAMES = (
    *(b"", b"int3", b"fp16 ", b"FP16", b"fp\x0016", b"\xfffp16", b"+lz4", b"lz4", b"fp16+lz4+lz4"),
    *(b"fp32+zstd", b"int4.g64+lz4", b"x" * 16, "ﬁ16".encode(), b".", b"\x00fp16", b"fp16\n"),
)
_ODD_VALUES: tuple[object, ...] = (
    *(None, True, False, -1, -(2**63), 1.0, 1e300, float("nan"), *_EDGES),
    *("", "edge", "cloud", "protocol", "fp16", "int3", "a" * 64, "A" * 64, "x" * 129, "x" * 4097),
    *("two\nlines", "\x9b2J", "\u2028", "é" * 17, b"", b"fp16", b"x" * 300),
    *([], [[]], ["fp16"], ["fp16"] * 33, ["k"] * 65, [None], [[[[[[[[]]]]]]]]),
    *({}, {"k": "v"}, {"k": 1}, {"K K": "v"}, {b"k": "v"}, {"k": {}}, {"k": "v" * 513}),
    *({f"k{i}": "v" for i in range(17)}, _MSGPACK.ExtType(1, b""), _MSGPACK.ExtType(127, b"x" * 9)),
    _MSGPACK.Timestamp(1, 1),
)
_ODD_HEADERS = (
    *(b"", b"\xc1", b"\x90", b"\x91", b"\xa2\xff\xff", b"\xd4\xff\x00", b"\xc7\x00\xff"),
    *(b"\xd6\xff" + bytes(4), b"\xc6\x00\x01\x00\x00", b"\xdb" + b"\xff" * 4),
    *(b"\xdd" + b"\xff" * 4, b"\xdf" + b"\xff" * 4, b"\x91" * 5000, b"\xdc\x00\x40" * 1000),
    b"\xdc\x00\x40" * 2 + b"\x80" * 4000,
)
"""Texts, arrays and maps that are not there or too deep, extensions, what MessagePack has not."""

_RECOGNISABLE = (TYPES[Hello], TYPES[ErrorReply])
_STEP_TYPES = range(16, 25)
_TWO_TENSORS = (TYPES[StepBegin], TYPES[TrainBegin], TYPES[BackwardEnd])
_TRAIN_BEGIN = TYPES[TrainBegin]
_DESCRIPTION = struct.Struct("<IIQ16s")
_TENSORS_OFFSET = 32
_SEQUENCE = struct.Struct("<II")
_SEQUENCES_OFFSET = 96
_PRELUDE_FIELDS = ((0, 1), (1, 1), (2, 2), (4, 4))
_STEP_FIELDS = (*_PRELUDE_FIELDS, (8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 8))
_BEGIN_FIELDS = (*_STEP_FIELDS, (64, 4), (68, 4), (72, 8))
_TRAIN_FIELDS = (*_BEGIN_FIELDS, (96, 4), (100, 4), (104, 4), (108, 4))
"""Offsets and sizes of the integers of a frame."""


def pick(rng: Random, choices: Sequence[T]) -> T:
    """One of ``choices``. Much faster than ``rng.choice``."""
    return choices[int(rng.random() * len(choices))]


def below(rng: Random, stop: int) -> int:
    """An integer from 0 to ``stop - 1``."""
    return int(rng.random() * stop)


# Anywhere in a frame


def _flip_bits(rng: Random, frame: bytearray, other: bytes) -> None:
    for _ in range(1 + below(rng, 4)):
        frame[below(rng, len(frame))] ^= 1 << below(rng, 8)


def _set_bytes(rng: Random, frame: bytearray, other: bytes) -> None:
    for _ in range(1 + below(rng, 4)):
        frame[below(rng, len(frame))] = pick(rng, _ODD_BYTES)


def _randomise_run(rng: Random, frame: bytearray, other: bytes) -> None:
    start, nbytes = below(rng, len(frame)), 1 + below(rng, 16)
    frame[start : start + nbytes] = rng.randbytes(min(nbytes, len(frame) - start))


def _set_field(rng: Random, frame: bytearray, other: bytes) -> None:
    fields: Sequence[tuple[int, int]] = _PRELUDE_FIELDS
    if frame[0] == _TRAIN_BEGIN:
        fields = _TRAIN_FIELDS
    elif frame[0] in _STEP_TYPES:
        fields = _BEGIN_FIELDS if frame[0] in _TWO_TENSORS else _STEP_FIELDS
    start, nbytes = pick(rng, fields)
    stop = start + nbytes
    if stop <= len(frame):
        old = int.from_bytes(frame[start:stop], "little")
        new = pick(rng, (*_EDGES, *range(old - 8, old + 9), len(frame) - below(rng, 129)))
        frame[start:stop] = (new % (1 << 8 * nbytes)).to_bytes(nbytes, "little")


def _cut_off(rng: Random, frame: bytearray, other: bytes) -> None:
    del frame[below(rng, len(frame)) :]


def _extend(rng: Random, frame: bytearray, other: bytes) -> None:
    nbytes = pick(rng, (1, 2, 4, 8, 15, 16, 17, 32, 64, 1000))
    frame += pick(rng, (bytes(nbytes), rng.randbytes(nbytes), other[:nbytes]))


def _delete_run(rng: Random, frame: bytearray, other: bytes) -> None:
    start = below(rng, len(frame))
    del frame[start : start + pick(rng, (1, 2, 4, 8, 16, 32))]


def _insert_run(rng: Random, frame: bytearray, other: bytes) -> None:
    start, source = below(rng, len(frame)), below(rng, len(other))
    frame[start:start] = other[source : source + pick(rng, (1, 2, 4, 8, 16, 32))]


def _splice(rng: Random, frame: bytearray, other: bytes) -> None:
    cut = below(rng, len(frame))
    frame[cut:] = other[pick(rng, (cut, below(rng, len(other)))) :]


_ANYWHERE: tuple[Callable[[Random, bytearray, bytes], None], ...] = (
    *(_flip_bits, _set_bytes, _randomise_run, _set_field, _set_field, _set_field),
    *(_cut_off, _extend, _delete_run, _insert_run, _splice),
)


# Tensors and sequences, in frames whose sizes are right


@dataclass
class _Tensor:
    rows: int
    features: int
    codec: bytes
    data: bytes

    def plain_nbytes(self) -> int | None:
        """Size of such a tensor before compression, None if there is no such codec."""
        name = self.codec.decode("latin-1")
        return plain_nbytes(name, (self.rows, self.features)) if name in CODEC_NAMES else None


def _change_data(rng: Random, tensor: _Tensor) -> None:
    data = bytearray(tensor.data) or bytearray(1)
    pick(rng, (_flip_bits, _set_bytes, _randomise_run))(rng, data, b"")
    tensor.data = bytes(data)


def _resize_data(rng: Random, tensor: _Tensor) -> None:
    nbytes = pick(rng, (1, 2, 3, 4, 16, len(tensor.data) // 2, len(tensor.data)))
    tensor.data = pick(rng, (tensor.data[:-nbytes], tensor.data + rng.randbytes(nbytes)))


def _change_scales(rng: Random, tensor: _Tensor) -> None:
    """Scales come first; behind them this changes codes."""
    data = bytearray(tensor.data)
    for _ in range(1 + below(rng, 3)):
        start = 2 * below(rng, pick(rng, (tensor.rows * 5, len(data) // 2)) or 1)
        data[start : start + 2] = pick(rng, _ODD_SCALES).to_bytes(2, "little")
    tensor.data = bytes(data)


def _change_block(rng: Random, tensor: _Tensor) -> None:
    """A good LZ4 block of data that are not."""
    plain = tensor.plain_nbytes() or 0
    data = tensor.data
    if tensor.codec.endswith(LZ4_SUFFIX.encode()):
        if len(data) < plain:
            data = _LZ4.decompress(data, uncompressed_size=plain)
    else:
        tensor.codec += LZ4_SUFFIX.encode()
    unpacked = _Tensor(tensor.rows, tensor.features, b"", data)
    pick(rng, (_change_data, _change_scales, _resize_data, _repeat_data))(rng, unpacked)
    tensor.data = _LZ4.compress(unpacked.data, store_size=False)


def _repeat_data(rng: Random, tensor: _Tensor) -> None:
    nbytes = pick(rng, (len(tensor.data), len(tensor.data) + 1, 5000))
    tensor.data = (tensor.data[:1] or b"\0") * nbytes


def _change_codec(rng: Random, tensor: _Tensor) -> None:
    names = tuple(name.encode() for name in CODEC_NAMES)
    tensor.codec = pick(rng, (pick(rng, names), pick(rng, names), pick(rng, _ODD_NAMES)))
    nbytes = tensor.plain_nbytes()
    if nbytes is not None and rng.random() < 0.7:
        tensor.data = _data(rng, nbytes)


def _change_shape(rng: Random, tensor: _Tensor) -> None:
    """Another shape, and usually as many data as it takes."""
    rows, features = tensor.rows, tensor.features
    tensor.rows, tensor.features = pick(
        rng,
        (
            (features, rows),
            (rows + 1, features),
            (rows - 1, features),
            (rows, features + 1),
            (rows, features - 1),
            (rows * features, 1),
            (0, features),
            (rows, 0),
            (pick(rng, _EDGES), features),
            (rows, pick(rng, _EDGES)),
        ),
    )
    tensor.rows = max(tensor.rows, 0) % 2**32
    tensor.features = max(tensor.features, 0) % 2**32
    nbytes = tensor.plain_nbytes()
    if nbytes is not None and nbytes < 2**20 and rng.random() < 0.8:
        is_compressed = tensor.codec.endswith(LZ4_SUFFIX.encode())
        if is_compressed and rng.random() < 0.7:
            tensor.data = _LZ4.compress(bytes(nbytes), store_size=False)
        elif nbytes < MAX_FRAME_NBYTES:
            tensor.data = _data(rng, nbytes)


def _data(rng: Random, nbytes: int) -> bytes:
    return rng.randbytes(nbytes) if rng.random() < 0.5 else bytes(nbytes)


_TENSOR: tuple[Callable[[Random, _Tensor], None], ...] = (
    *(_change_data, _resize_data, _change_scales, _change_block, _change_codec, _change_shape),
)


def _spoil_step(rng: Random, frame: bytes) -> bytearray:
    """Something in the tensors, or in the sequences of a batch."""
    stop = _TENSORS_OFFSET + _DESCRIPTION.size * (2 if frame[0] in _TWO_TENSORS else 1)
    sequences, start = b"", stop
    if frame[0] == _TRAIN_BEGIN:
        sequences = _sequences_of(frame)
        start += len(sequences) + -len(sequences) % 16
    descriptions, tensors = [], []
    for rows, features, nbytes, codec in _DESCRIPTION.iter_unpack(frame[_TENSORS_OFFSET:stop]):
        tensors.append(_Tensor(rows, features, codec.rstrip(b"\0"), frame[start : start + nbytes]))
        start += nbytes + -nbytes % 16
    head = frame[:_TENSORS_OFFSET]
    if sequences and rng.random() < 0.4:
        sequences = (_spoil_sequences if rng.random() < 0.6 else _grow)(rng, sequences, tensors)
        number = len(sequences) // _SEQUENCE.size
        head = head[:24] + number.to_bytes(4, "little") + head[28:]
    else:
        pick(rng, _TENSOR)(rng, pick(rng, tensors))
    data = sequences
    for tensor in tensors:
        descriptions.append(
            _DESCRIPTION.pack(tensor.rows, tensor.features, len(tensor.data), tensor.codec)
        )
        if tensor.data:
            data += bytes(-len(data) % 16) + tensor.data
    return bytearray(head + b"".join(descriptions) + data)


def _sequences_of(frame: bytes) -> bytes:
    number = int.from_bytes(frame[24:28], "little")
    return frame[_SEQUENCES_OFFSET : _SEQUENCES_OFFSET + number * _SEQUENCE.size]


def _spoil_sequences(rng: Random, table: bytes, tensors: Sequence[_Tensor]) -> bytes:
    """Other sequences; some of them are as good, others have rows that are not there."""
    sequences = [list(sequence) for sequence in _SEQUENCE.iter_unpack(table)]
    one = pick(rng, sequences)
    way = below(rng, 7)
    if way == 0:
        one[below(rng, 2)] = pick(rng, _EDGES) % 2**32
    elif way == 1:
        one[0] = max(0, one[0] + pick(rng, (-1, 1)))
    elif way == 2:
        one[1] = max(0, one[1] + pick(rng, (-1, 1)))
    elif way == 3:
        sequences.remove(one)
    elif way == 4:
        sequences.insert(below(rng, len(sequences) + 1), list(pick(rng, ([0, 0], [1, 0], one))))
    elif way == 5:
        # In two, all of whose rows are there.
        first = below(rng, one[0] + 1)
        sequences += [[one[0] - first, 0]]
        one[:] = first, 0
    else:
        sequences *= pick(rng, (2, 64, MAX_SEQUENCES))
    return b"".join(_SEQUENCE.pack(*sequence) for sequence in sequences[: MAX_SEQUENCES + 1])


def _grow(rng: Random, table: bytes, tensors: Sequence[_Tensor]) -> bytes:
    """Another sequence, whose rows are there; perhaps more of them than a session takes."""
    num_more = pick(rng, (1, MAX_POSITIONS - 5, MAX_POSITIONS, MAX_POSITIONS + 1))
    for tensor in tensors:
        if tensor.plain_nbytes() is not None:
            tensor.rows += num_more
            tensor.data = bytes(tensor.plain_nbytes() or 0)
    return table + _SEQUENCE.pack(num_more, below(rng, num_more + 1))


# Headers of MessagePack


def _spoil_control(rng: Random, frame: bytes) -> bytearray:
    start = PRELUDE.size + (8 if frame[0] in _RECOGNISABLE else 0)
    way = below(rng, 8)
    if way == 0:
        header = pick(rng, _ODD_HEADERS)
    else:
        fields: list[object] = _MSGPACK.unpackb(frame[start:])
        index = below(rng, len(fields))
        if way == 1:
            del fields[index]
        elif way == 2:
            fields.insert(index, pick(rng, _ODD_VALUES))
        else:
            fields[index] = pick(rng, _ODD_VALUES)
        header = _MSGPACK.packb(fields)
    size = PRELUDE.pack(0, 0, 0, start - PRELUDE.size + len(header))[4:]
    return bytearray(frame[:4] + size + frame[8:start] + header)


# All of it


def mutate(rng: Random, frame: bytes, other: bytes) -> bytes:
    """``frame``, which is a good one, with something wrong; perhaps a part of ``other`` in it.

    Its checksum is mostly right, or nothing behind that would ever be tried.
    """
    spoilt = _mutate(rng, frame[:-CHECKSUM_NBYTES], other)
    return b"".join(seal((spoilt,))) if rng.random() < 0.97 else spoilt


def _mutate(rng: Random, frame: bytes, other: bytes) -> bytes:
    way = rng.random()
    if way < 0.03:
        return rng.randbytes(below(rng, 200))
    if way < 0.55:
        spoil = _spoil_step if frame[0] in _STEP_TYPES else _spoil_control
        spoilt = spoil(rng, frame)
        num_more = 1 if way < 0.08 else 0
    else:
        spoilt = bytearray(frame)
        num_more = 1 + below(rng, 3)
    for _ in range(num_more):
        if spoilt:
            pick(rng, _ANYWHERE)(rng, spoilt, other)
    return bytes(spoilt)


def spoil_stream(rng: Random, stream: bytes, other: bytes) -> bytes:
    """``stream``, which begins with a header, with something wrong about how it is cut."""
    way = below(rng, 7)
    if way == 0:
        (_, nbytes) = HEADER.unpack_from(stream)
        wrong = pick(rng, (*_EDGES, *range(nbytes - 8, nbytes + 9))) % 2**32
        return HEADER.pack(MAGIC, wrong) + stream[HEADER_NBYTES:]
    if way == 1:
        spoilt = bytearray(stream)
        spoilt[below(rng, HEADER_NBYTES)] ^= 1 << below(rng, 8)
        return bytes(spoilt)
    framed = HEADER.pack(MAGIC, len(other)) + other
    return (
        stream + stream,
        framed + stream,
        stream + framed,
        stream[: below(rng, len(stream))],
        stream + rng.randbytes(1 + below(rng, 12)),
    )[way - 2]
