"""Bytes for the port of a cloud that speaks frames in a stream."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random

from privatelora.runtime.wire.messages import ErrorReply
from privatelora.runtime.wire.prelude import TYPES
from privatelora.transports.framing import HEADER, HEADER_NBYTES, MAGIC
from tests.fuzz.daemons.conversation import Conversation
from tests.fuzz.daemons.inputs import Input, Outcome, Violation
from tests.fuzz.daemons.pipes import Ending, Pipe, Plan, TlsPipe, play
from tests.fuzz.mutations import below, mutate, pick, spoil_stream
from tests.fuzz.recordings import streamed

OpenPipe = Callable[[], Awaitable[Pipe]]

HTTP_REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
_HUGE = (2**20, 2**24, 2**26 - 1, 2**26, 2**26 + 1, 2**31 - 1, 2**31, 2**32 - 1)
_ANSWER_DEADLINE_S = 20.0


def tls_hello() -> bytes:
    """The first bytes of a TLS client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a peer")


def any_ending(rng: Random) -> Ending:
    """Rarely one for which the fuzzer has to wait."""
    which = rng.random()
    return Ending.END if which < 0.8 else Ending.RESET if which < 0.97 else Ending.WAIT


def foreign(rng: Random) -> tuple[str, bytes]:
    """Of another protocol, or of none."""
    which = below(rng, 4)
    if which == 0:
        return "HTTP request", pick(rng, HTTP_REQUESTS)
    if which == 1:
        hello = tls_hello()
        return "TLS hello", hello[: below(rng, len(hello)) + 1] if rng.random() < 0.5 else hello
    if which == 2:
        return "nothing", b""
    return "random bytes", rng.randbytes(below(rng, 400))


class StreamInputs:
    """Makes inputs of bytes."""

    def __init__(self, open_pipe: OpenPipe, conversations: Sequence[Conversation]) -> None:
        self._open_pipe = open_pipe
        self._conversations = conversations
        self._frames = tuple(
            frame
            for conversation in conversations
            for turn in conversation
            for frame in turn.frames
        )

    def make(self, rng: Random) -> Input:
        if rng.random() < 0.15:
            kind, data = foreign(rng)
            return self._input(kind, Plan((data,), ending=any_ending(rng)))
        conversation = pick(rng, self._conversations)
        position = below(rng, len(conversation)) if rng.random() < 0.5 else below(rng, 2)
        before = conversation[:position]
        rest = [frame for turn in conversation[position:] for frame in turn.frames]
        other = pick(rng, self._frames)
        kind = pick(rng, _KINDS)
        pause_s = 0.0
        if kind == "garbage":
            pieces = [rng.randbytes(below(rng, 600))]
        elif kind == "frame spoilt":
            pieces = [streamed(mutate(rng, rest[0], other)), *map(streamed, rest[1:3])]
        elif kind == "stream spoilt":
            pieces = [spoil_stream(rng, streamed(rest[0]), other)]
        elif kind == "cut off":
            stream = b"".join(map(streamed, rest))
            pieces = [stream[: below(rng, len(stream))]]
        elif kind == "huge length":
            pieces = [HEADER.pack(MAGIC, pick(rng, _HUGE)), rng.randbytes(below(rng, 20000))]
        else:
            stream = streamed(rest[0])
            start = below(rng, len(stream))
            pieces = [stream[:start], *(stream[i : i + 1] for i in range(start, start + 24))]
            pause_s = 0.002
        plan = Plan(tuple(pieces), pause_s, any_ending(rng))
        return self._input(kind, plan, before)

    def _input(self, kind: str, plan: Plan, before: Conversation = ()) -> Input:
        prepare = partial(converse, before) if before else None
        return Input(f"stream: {kind}", partial(play, self._open_pipe, plan, classify, prepare))


_KINDS = (
    *("garbage", "frame spoilt", "frame spoilt", "stream spoilt", "cut off", "huge length"),
    "bytes one by one",
)


async def converse(before: Conversation, pipe: Pipe) -> None:
    """Say what a good edge says, and hear as many frames as are due. Raises OSError."""
    received = bytearray()
    for turn in before:
        await pipe.write(b"".join(map(streamed, turn.frames)))
        for _ in range(turn.num_answers):
            if await _take_frame(pipe, received) in (None, TYPES[ErrorReply]):
                raise ConnectionResetError("the cloud does not go on with this")
    if received:
        raise ConnectionResetError("the cloud says more than it was asked")


async def _take_frame(pipe: Pipe, received: bytearray) -> int | None:
    """The type of the message that comes next; None at the end. Raises OSError, Violation."""
    try:
        async with asyncio.timeout(_ANSWER_DEADLINE_S):
            while (found := _frame_nbytes(received)) is None:
                data = await pipe.read()
                if not data:
                    return None
                received += data
    except TimeoutError as error:
        raise Violation(f"no answer to good frames in {_ANSWER_DEADLINE_S:g} s") from error
    kind = received[HEADER_NBYTES] if found > HEADER_NBYTES else None
    del received[:found]
    return kind


def _frame_nbytes(stream: bytearray) -> int | None:
    """Size of the first frame of a stream with its header, None if it is not whole."""
    if len(stream) < HEADER_NBYTES:
        return None
    magic, nbytes = HEADER.unpack_from(stream)
    if magic != MAGIC:
        raise Violation(f"the cloud sent what is no frame: {bytes(stream[:40])!r}")
    return HEADER_NBYTES + nbytes if len(stream) >= HEADER_NBYTES + nbytes else None


def classify(received: bytes) -> Outcome:
    """What frames of a cloud, the first ones of a stream, say."""
    stream = bytearray(received)
    num_frames, was_refused = 0, False
    while (nbytes := _frame_nbytes(stream)) is not None:
        was_refused |= stream[HEADER_NBYTES] == TYPES[ErrorReply]
        del stream[:nbytes]
        num_frames += 1
    if was_refused:
        return Outcome.REFUSED
    return Outcome.ANSWERED if num_frames else Outcome.CLOSED


class TlsInputs:
    """Makes inputs for a TLS port: within TLS, in place of it, and spoilt records."""

    def __init__(
        self,
        open_bare: OpenPipe,
        context: ssl.SSLContext,
        conversations: Sequence[Conversation],
    ) -> None:
        self._open_bare = open_bare
        self._context = context
        self._within = StreamInputs(self._open_tls, conversations)
        self._frames = [frame for turn in conversations[0] for frame in turn.frames]

    def make(self, rng: Random) -> Input:
        which = rng.random()
        if which < 0.6:
            kind, send = self._within.make(rng)
            return Input(kind.replace("stream", "within TLS"), send)
        if which < 0.75:
            return self._spoilt_records(rng)
        if which < 0.85:
            data = b"".join(streamed(frame) for frame in self._frames[: 1 + below(rng, 3)])
            return self._bare("plain frames", Plan((data,), ending=any_ending(rng)))
        hello = bytearray(tls_hello())
        for _ in range(1 + below(rng, 6)):
            hello[below(rng, len(hello))] ^= 1 << below(rng, 8)
        kind, data = foreign(rng) if rng.random() < 0.5 else ("TLS hello spoilt", bytes(hello))
        return self._bare(kind, Plan((data,), ending=any_ending(rng)))

    def _bare(self, kind: str, plan: Plan) -> Input:
        return Input(f"stream: {kind}", partial(play, self._open_bare, plan, say_nothing))

    def _spoilt_records(self, rng: Random) -> Input:
        """A change in what is encrypted, garbage between records, the end of one cut off."""
        frame = streamed(pick(rng, self._frames))
        way, where, bit = below(rng, 3), rng.random(), below(rng, 8)
        garbage = rng.randbytes(1 + below(rng, 60))

        async def spoil(pipe: Pipe) -> None:
            assert isinstance(pipe, TlsPipe)
            records = bytearray(pipe.encrypted(frame))
            index = int(where * len(records))
            if way == 0:
                records[index] ^= 1 << bit
            elif way == 1:
                records[index:index] = garbage
            else:
                del records[index:]
            await pipe.write_bare(bytes(records))

        plan = Plan((), ending=any_ending(rng))
        send = partial(play, self._open_tls, plan, say_nothing, spoil)
        return Input("stream: TLS records spoilt", send)

    async def _open_tls(self) -> Pipe:
        pipe = TlsPipe(await self._open_bare(), self._context)
        try:
            await pipe.shake_hands()
            greeting = await pipe.read()
        except BaseException:
            pipe.abort(reset=False)
            raise
        if not greeting:
            pipe.abort(reset=False)
            raise ConnectionResetError("the cloud closed the stream")
        return pipe


def say_nothing(received: bytes) -> Outcome:
    """What comes cannot be read without the keys, or is none of ours."""
    return Outcome.REFUSED if received else Outcome.CLOSED
