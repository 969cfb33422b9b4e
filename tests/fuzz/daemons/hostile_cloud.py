"""Stands between an edge and its cloud, and now and then changes what the cloud says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import NamedTuple

from privatelora.errors import PrivateLoRAError
from privatelora.runtime.wire.codec import decode
from privatelora.runtime.wire.messages import ErrorCode, ErrorReply, Message, TensorPayload
from privatelora.runtime.wire.prelude import WireLimits
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC
from tests.fuzz.daemons.conversation import to_frame
from tests.fuzz.daemons.frames import spoilt_message, with_fields
from tests.fuzz.mutations import below, mutate, pick, spoil_stream
from tests.fuzz.recordings import streamed

_HUGE = (2**20, 2**26 - 1, 2**26, 2**26 + 1, 2**32 - 1)
_CODES = tuple(ErrorCode)


class Change(NamedTuple):
    """What becomes of one frame: the bytes in its place, and what comes after them.

    ``closes``: the connection ends; ``falls_silent``: nothing more is said on it.
    """

    data: bytes
    closes: bool = False
    falls_silent: bool = False


class Trick(NamedTuple):
    """A change to the frame ``position`` that the cloud says from now on."""

    kind: str
    position: int
    change: Callable[[bytes, list[bytes]], Change]
    """From the frame and those that were there before."""


def make_trick(rng: Random, position: int) -> Trick:
    """One of many."""
    kind = pick(rng, _KINDS)
    seed = rng.getrandbits(64)

    def change(frame: bytes, earlier: list[bytes]) -> Change:
        return _change(Random(seed), kind, frame, earlier)

    return Trick(kind, position, change)


_KINDS = (
    *("frame spoilt", "frame spoilt", "frame spoilt", "message spoilt", "message spoilt"),
    *("numbers spoilt", "numbers spoilt", "stream spoilt", "frame repeated", "earlier frame"),
    *("garbage", "cut off", "huge length", "refusal", "refusal", "reset"),
)
_RARE_KINDS = ("silence", "frame left out")
"""For these an edge has to wait."""


def make_rare_trick(rng: Random, position: int) -> Trick:
    """One after which the edge hears nothing."""
    kind = pick(rng, _RARE_KINDS)
    silent = kind == "silence"
    return Trick(kind, position, lambda frame, earlier: Change(b"", falls_silent=silent))


def _change(rng: Random, kind: str, frame: bytes, earlier: list[bytes]) -> Change:
    other = pick(rng, earlier) if earlier else frame
    if kind == "frame spoilt":
        return Change(streamed(mutate(rng, frame, other)))
    if kind in ("message spoilt", "numbers spoilt"):
        try:
            message = decode(memoryview(frame), WireLimits())
        except PrivateLoRAError as error:
            raise AssertionError("the cloud itself does not say what it should") from error
        spoil = spoilt_message if kind == "message spoilt" else _with_other_numbers
        return Change(streamed(spoil(rng, message)))
    if kind == "stream spoilt":
        return Change(spoil_stream(rng, streamed(frame), other), closes=rng.random() < 0.5)
    if kind == "frame repeated":
        return Change(streamed(frame) * 2)
    if kind == "earlier frame":
        return Change(streamed(other) + streamed(frame))
    if kind == "garbage":
        return Change(rng.randbytes(1 + below(rng, 500)), closes=rng.random() < 0.5)
    if kind == "cut off":
        stream = streamed(frame)
        return Change(stream[: below(rng, len(stream))], closes=True)
    if kind == "huge length":
        header = HEADER.pack(MAGIC, pick(rng, _HUGE))
        return Change(header + rng.randbytes(below(rng, 5000)), closes=True)
    if kind == "refusal":
        text = pick(rng, ("", "no", "x" * 4096, "é\n\x1b[2J", "{}", "%s"))
        session = pick(rng, (None, None, 0, 1, 2**53 - 1))
        details = pick(rng, ({}, {"retry_after_s": "0.01"}, {"retry_after_s": "9" * 300}))
        reply = ErrorReply(pick(rng, _CODES), text, session, details)
        return Change(streamed(to_frame(reply)) + (streamed(frame) if rng.random() < 0.5 else b""))
    return Change(b"", closes=True)


def _with_other_numbers(rng: Random, message: Message) -> bytes:
    """A tensor of the right shape and codec whose numbers are anything, NaN among them."""
    for field in dataclasses.fields(message):
        tensor = getattr(message, field.name)
        if isinstance(tensor, TensorPayload):
            nbytes = len(tensor.data)
            data = pick(
                rng, (b"\xff" * nbytes, bytes(nbytes), b"\x7f" * nbytes, rng.randbytes(nbytes))
            )
            changed = dataclasses.replace(tensor, data=data)
            return to_frame(with_fields(message, {field.name: changed}))
    return to_frame(message)


class HostileCloud:
    """Listens on a port of this machine and passes on to a cloud's, both bare TCP."""

    def __init__(self, cloud_port: int) -> None:
        self._cloud_port = cloud_port
        self._trick: Trick | None = None
        self._num_frames = 0
        self._earlier: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        """Listen, on ``port``."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        await self.drop()

    def play(self, trick: Trick | None) -> None:
        """Count frames from now on; behave well without a trick."""
        self._trick = trick
        self._num_frames = 0

    @property
    def was_played(self) -> bool:
        return self._trick is None

    async def drop(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            from_cloud, to_cloud = await asyncio.open_connection("127.0.0.1", self._cloud_port)
            ends.append(to_cloud)
            up = asyncio.create_task(_pass_on(reader, to_cloud))
            down = asyncio.create_task(self._pass_down(from_cloud, writer))
            try:
                await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except asyncio.CancelledError:
            pass  # dropped
        except OSError:
            pass
        finally:
            self._tasks.discard(task)
            for end in ends:
                end.transport.abort() if end is not writer else end.close()

    async def _pass_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Returns when the connection is to be closed."""
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(HEADER_NBYTES)
                frame = await reader.readexactly(HEADER.unpack(header)[1])
                change = self._changed(frame)
                if change is None:
                    writer.write(header + frame)
                    continue
                writer.write(change.data)
                if change.falls_silent:
                    await asyncio.Event().wait()
                if change.closes:
                    return

    def _changed(self, frame: bytes) -> Change | None:
        position, self._num_frames = self._num_frames, self._num_frames + 1
        self._earlier = [*self._earlier[-7:], frame]
        trick = self._trick
        if trick is None or position != trick.position:
            return None
        self._trick = None
        return trick.change(frame, self._earlier[:-1])


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
