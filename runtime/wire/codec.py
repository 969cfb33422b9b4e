"""Messages to frames and back.

A frame is one message and a checksum. Integers are little-endian. It starts with a prelude of 8
bytes:

    offset 0  u8   message type
           1  u8   flags, 0
           2  u16  protocol version
           4  u32  header_nbytes: size of the header that follows

    1 Hello           6 SessionClosed    17 ExchangeRequest    21 BackwardBegin
    2 ErrorReply      7 Ping             18 ExchangeReply      22 GradientRequest
    3 OpenSession     8 Pong             19 StepEnd            23 GradientReply
    4 SessionOpened   9 DropStep         20 TrainBegin         24 BackwardEnd
    5 CloseSession   16 StepBegin

Types 1 to 9 carry no tensors: the frame ends with the header, a MessagePack array
(``control.py``). In Hello and ErrorReply the array comes after the 8 bytes ``PrivLoRA``.
Those and the prelude keep their places in every version, so any end can read from the first
frame it gets that the peer speaks another version.

Types 16 to 24 have fixed headers, for 16 to 19 are sent for every exchange of every token. They are
followed by tensor data: each tensor begins at a multiple of 16 bytes from the start of the frame,
zeros in between.

    offset 8   u64    session_id
           16  u64    step_id
           24  u32    point; StepBegin: position; TrainBegin: number of sequences;
                      StepEnd, BackwardBegin, BackwardEnd: 0
           28  u32    StepBegin: output_rows; TrainBegin: backward; others: 0
           32         tensor: hidden_states, z or y; BackwardEnd: opening
           64         tensor: StepBegin, TrainBegin: opening; BackwardEnd: hidden_states.
                      StepBegin, TrainBegin and BackwardEnd only

A tensor that may be missing is then described by zeros. In TrainBegin what follows the header
begins with 8 bytes for each sequence, u32 num_rows and u32 num_output_rows.

    a tensor is described by 32 bytes:
           0   u32    rows
           4   u32    features
           8   u64    nbytes of its data
           16  16 B   name of its codec in ASCII, filled up with zeros

A frame ends with the CRC-32 (u32, that of zlib) of all before it. Bits that flip on the way are
rare and must not pass for numbers: TCP's own checksum misses some, and memory has none.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

from privatelora.errors import LocalProtocolError, RemoteProtocolError
from privatelora.runtime.wire import steps, training
from privatelora.runtime.wire.control import (
    PARSERS,
    decode_control,
    encode_control,
    require_version,
)
from privatelora.runtime.wire.messages import PROTOCOL_VERSION, Buffer, Message
from privatelora.runtime.wire.prelude import PRELUDE, TYPES, WireLimits

_ENCODERS: dict[type[Message], Callable[[Any], tuple[Buffer, ...]]] = {
    **dict.fromkeys(PARSERS, encode_control),
    **steps.ENCODERS,
    **training.ENCODERS,
}
_DECODERS: dict[int, Callable[[memoryview, WireLimits], Message]] = {
    **{TYPES[kind]: decode_control for kind in PARSERS},
    **{TYPES[kind]: decoder for kind, decoder in steps.DECODERS.items()},
    **{TYPES[kind]: decoder for kind, decoder in training.DECODERS.items()},
}


_CHECKSUM = struct.Struct("<I")


def encode(message: Message) -> tuple[Buffer, ...]:
    """Return the parts that make one frame; tensor data is passed on, not copied.

    Raises LocalProtocolError for a message that no peer would accept.
    """
    encoder = _ENCODERS.get(type(message))
    if encoder is None:
        raise LocalProtocolError(f"{type(message).__name__} is not a message")
    return seal(encoder(message))


def decode(frame: memoryview, limits: WireLimits) -> Message:
    """Return the message in ``frame``; tensor data are slices of it, not copies.

    Raises VersionMismatch if the peer speaks another version, RemoteProtocolError for
    anything else that is not a valid message.
    """
    if len(frame) < PRELUDE.size + _CHECKSUM.size:
        raise RemoteProtocolError(
            f"a frame of {len(frame)} bytes is too short to be a message; is the peer a "
            "PrivateLoRA program?"
        )
    content = frame[: -_CHECKSUM.size]
    if zlib.crc32(content) != _CHECKSUM.unpack_from(frame, len(content))[0]:
        require_version(frame)  # of whose frames this end does not know how they end
        raise RemoteProtocolError(
            f"a frame of {len(frame)} bytes does not end with its checksum: it was damaged on the "
            "way; or is the peer a PrivateLoRA program at all?"
        )
    decoder = _DECODERS.get(frame[0])
    if decoder is None:
        raise RemoteProtocolError(
            f"message type {frame[0]} does not exist in protocol version {PROTOCOL_VERSION}; "
            "is the peer a PrivateLoRA program?"
        )
    return decoder(content, limits)


def seal(parts: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
    """Add the checksum to the parts of a frame."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return (*parts, _CHECKSUM.pack(crc))
