"""What a hostile peer sends to a ZeroMQ port: bytes of ZMTP, and messages of a connection."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random

import zmq
import zmq.asyncio

from privatelora.transports.base import Credentials
from privatelora.transports.zeromq_curve import ClientKeys
from privatelora.transports.zeromq_protocol import (
    ABORT_MESSAGE,
    BEGIN,
    CONFIRM,
    CREDIT,
    DATA,
    END_MESSAGE,
    ENDED_MESSAGE,
    OPEN_MESSAGE,
    PIECE,
    TOKEN_NBYTES,
    greeting,
)
from tests.fuzz.daemons.conversation import Conversation
from tests.fuzz.daemons.inputs import Input, Outcome
from tests.fuzz.daemons.pipes import WAIT_S, Pipe, Plan, play
from tests.fuzz.daemons.streams import any_ending, foreign, say_nothing
from tests.fuzz.mutations import below, mutate, pick

_NUMBERS = (0, 1, 2, 255, 2**16, 2**17, 2**20, 2**26, 2**26 + 1, 2**31, 2**63 - 1, 2**64 - 1)
_WINDOW_NBYTES = 2**20
_MAX_ANSWERS = 64


def _zmtp_greeting(mechanism: bytes) -> bytes:
    """ZMTP 3.1 section 3.1."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def _zmtp_frame(flags: int, body: bytes) -> bytes:
    """Section 3.2; flags: 1 more, 2 long, 4 command."""
    if len(body) > 255:
        return struct.pack(">BQ", flags | 2, len(body)) + body
    return bytes([flags, len(body)]) + body


def _command(name: bytes, data: bytes) -> bytes:
    return _zmtp_frame(4, bytes([len(name)]) + name + data)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


_READY = _command(b"READY", _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b""))


class ZmtpInputs:
    """Makes inputs for a port with ZeroMQ behind it."""

    def __init__(
        self,
        open_pipe: Callable[[], Awaitable[Pipe]],
        address: str,
        client: Credentials,
        conversations: Sequence[Conversation],
    ) -> None:
        self._open_pipe = open_pipe
        self._endpoint = address.removeprefix("zmq+")
        if self._endpoint.startswith("ipc://"):
            self._endpoint = "ipc://@privatelora-zmq/" + self._endpoint.removeprefix("ipc://")
        self._keys = None if client.curve is None else ClientKeys.read(client.curve)
        self._mechanism = b"NULL" if client.curve is None else b"CURVE"
        self._frames = tuple(
            frame
            for conversation in conversations
            for turn in conversation
            for frame in turn.frames
        )

    def make(self, rng: Random) -> Input:
        return self._bytes(rng) if rng.random() < 0.5 else self._messages(rng)

    def _bytes(self, rng: Random) -> Input:
        kind = pick(rng, _KINDS)
        start = _zmtp_greeting(self._mechanism)
        if kind == "foreign":
            kind, data = foreign(rng)
        elif kind == "greeting spoilt":
            data = _spoilt(rng, start + _READY)
        elif kind == "command spoilt":
            data = start + _spoilt(rng, self._hello(rng) + _READY)
        elif kind == "another mechanism":
            name = pick(rng, (b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b"null", b"X" * 20))
            data = _zmtp_greeting(name) + self._hello(rng) + _READY
        elif kind == "command":
            name = pick(rng, (b"PING", b"PONG", b"ERROR", b"SUBSCRIBE", b"CANCEL", b"", b"X" * 200))
            ready = b"" if rng.random() < 0.3 else _READY
            data = start + ready + _command(name, rng.randbytes(below(rng, 40)))
        elif kind == "frame":
            flags = pick(rng, (0, 1, 2, 3, 4, 8, 0x80, 0xFF))
            announced = struct.pack(">BQ", flags | 2, pick(rng, _NUMBERS))
            data = start + _READY + announced + rng.randbytes(below(rng, 400))
        else:
            parts = [_zmtp_frame(1, b"x" * below(rng, 9)) for _ in range(below(rng, 200))]
            data = start + _READY + b"".join(parts) + _zmtp_frame(0, OPEN_MESSAGE)
        plan = Plan((data,), ending=any_ending(rng))
        return Input(f"ZMTP: {kind}", partial(play, self._open_pipe, plan, say_nothing))

    def _hello(self, rng: Random) -> bytes:
        if self._mechanism == b"NULL":
            return b""
        return _command(b"HELLO", b"\x01\0" + bytes(72) + rng.randbytes(32 + 8 + 80))

    def _messages(self, rng: Random) -> Input:
        frames = self._frames
        good = [bytes([DATA]) + frames[0], bytes([DATA]) + frames[1]][: below(rng, 3)]
        kind = pick(rng, _MESSAGE_KINDS)
        opens = confirms = True
        odd: list[list[bytes]] = []
        if kind == "before the opening":
            opens = False
            odd = [[_odd_message(rng, frames)] for _ in range(1 + below(rng, 3))]
        elif kind == "not confirmed":
            confirms = False
            odd = [[_odd_message(rng, frames)] for _ in range(1 + below(rng, 3))]
        elif kind == "several parts":
            odd = [[_odd_message(rng, frames) for _ in range(2 + below(rng, 4))]]
        elif kind == "frame spoilt":
            odd = [[bytes([DATA]) + mutate(rng, pick(rng, frames), pick(rng, frames))]]
        else:
            odd = [[_odd_message(rng, frames)] for _ in range(1 + below(rng, 3))]
        window = pick(rng, (0, 1, 2**64 - 1)) if rng.random() < 0.1 else _WINDOW_NBYTES
        messages = [*([message] for message in good if opens and confirms), *odd]
        send = partial(self._talk, messages, window, opens=opens, confirms=confirms)
        return Input(f"ZeroMQ: {kind}", send)

    async def _talk(
        self, messages: list[list[bytes]], window: int, *, opens: bool, confirms: bool
    ) -> Outcome:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            if (keys := self._keys) is not None:
                dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
                dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
                dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.listener)
            dealer.connect(self._endpoint)
            try:
                async with asyncio.timeout(WAIT_S * 10):
                    if opens:
                        await dealer.send(OPEN_MESSAGE)
                        accept = await dealer.recv()
                        token = accept[1 : 1 + TOKEN_NBYTES]
                        if confirms:
                            await dealer.send(greeting(CONFIRM, token, window))
                    for parts in messages:
                        await dealer.send_multipart(parts)
                    await dealer.send(END_MESSAGE)
                async with asyncio.timeout(WAIT_S):
                    for _ in range(_MAX_ANSWERS):
                        answer = await dealer.recv()
                        if answer == ABORT_MESSAGE:
                            return Outcome.REFUSED
                        if answer == ENDED_MESSAGE:
                            break
                    return Outcome.ANSWERED
            except TimeoutError:
                return Outcome.TIMED_OUT


_KINDS = (
    *("foreign", "greeting spoilt", "greeting spoilt", "command spoilt", "command spoilt"),
    *("another mechanism", "command", "frame", "many parts"),
)
_MESSAGE_KINDS = (
    *("before the opening", "not confirmed", "several parts", "frame spoilt", "odd", "odd"),
)


def _odd_message(rng: Random, frames: Sequence[bytes]) -> bytes:
    way = below(rng, 8)
    if way == 0:
        return rng.randbytes(below(rng, 40))
    if way == 1:
        return struct.pack("<BQ", BEGIN, pick(rng, _NUMBERS)) + rng.randbytes(below(rng, 300))
    if way == 2:
        return bytes([PIECE]) + rng.randbytes(below(rng, 300))
    if way == 3:
        return struct.pack("<BQQ", CREDIT, pick(rng, _NUMBERS), pick(rng, _NUMBERS))
    if way == 4:
        return pick(rng, (OPEN_MESSAGE, END_MESSAGE, ENDED_MESSAGE, ABORT_MESSAGE, b""))
    if way == 5:
        token = rng.randbytes(TOKEN_NBYTES)
        return greeting(CONFIRM, token, pick(rng, _NUMBERS))
    if way == 6:
        return bytes([pick(rng, (0, *range(1, 13), 255))]) + rng.randbytes(below(rng, 20))
    return bytes([DATA]) + pick(rng, frames)


def _spoilt(rng: Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    for _ in range(1 + below(rng, 3)):
        way = below(rng, 4)
        where = below(rng, len(spoilt)) if spoilt else 0
        if way == 0 and spoilt:
            spoilt[where] ^= 1 << below(rng, 8)
        elif way == 1 and spoilt:
            spoilt[where] = pick(rng, (0, 1, 0x7F, 0x80, 0xFF))
        elif way == 2:
            del spoilt[where:]
        else:
            spoilt[where:where] = rng.randbytes(1 + below(rng, 16))
    return bytes(spoilt)
