"""More peers than are good for a listener: storms, crowds that do not leave, floods of the log."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic

import pytest

from privatelora.errors import ConnectionClosed
from privatelora.transports import brief_log, handlers, sockets
from privatelora.transports.base import Connection, Limits
from privatelora.transports.brief_log import BriefLog
from privatelora.transports.registry import connect, listen
from privatelora.transports.sockets import AcceptLoop
from privatelora.transports.zeromq_protocol import BEGIN, MAX_MESSAGE_NBYTES, PIECE, Incoming
from tests.transports.support import echo, echoes, settled

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

_LOGGER = logging.getLogger("privatelora.transports")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@contextmanager
def callers(port: int, number: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(number)
        ]


async def ended(sock: socket.socket) -> bool:
    """Wait until the other end has closed; False if it says something instead."""
    sock.setblocking(False)
    try:
        return not await asyncio.get_running_loop().sock_recv(sock, 1)
    except ConnectionResetError:
        return True


async def test_a_storm_of_peers_leaves_others_their_turns() -> None:
    turn, accepted = 0, []

    def on_accept(sock: socket.socket) -> None:
        accepted.append(turn)
        sock.close()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        listening.setblocking(False)
        with callers(listening.getsockname()[1], 40):
            accepting = AcceptLoop([listening], on_accept)
            while len(accepted) < 40:
                turn += 1
                await asyncio.sleep(0)
            accepting.close()
    most = max(accepted.count(number) for number in accepted)
    assert most <= 4


async def test_accepting_takes_a_bounded_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "_REST_SPARED_S", 0.0)
    monkeypatch.setattr(sockets, "_REST", 9)
    accepted: list[socket.socket] = []

    def take_a_while(sock: socket.socket) -> None:
        accepted.append(sock)
        sock.close()
        until = monotonic() + 0.001
        while monotonic() < until:
            pass

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        listening.setblocking(False)
        with callers(listening.getsockname()[1], 20):
            started = monotonic()
            accepting = AcceptLoop([listening], take_a_while)
            await settled(lambda: len(accepted) == 20)
            took_s = monotonic() - started
            accepting.close()
    # The rest after the last of them is not waited for.
    assert took_s > 16 * 0.001 * 9


async def test_who_has_left_without_a_word_is_not_served(
    own_errors: pytest.LogCaptureFixture,
) -> None:
    served: list[str] = []

    async def serve(connection: Connection) -> None:
        served.append(connection.peer)
        await echo(connection)

    async with await listen("tcp://127.0.0.1:0", serve) as listener:
        with callers(port_of(listener.address), 10):
            pass  # they are gone before this loop runs
        async with await connect(listener.address) as connection:
            await echoes(connection)
    assert len(served) == 1
    assert own_errors.text == ""


async def test_a_crowd_that_comes_once_in_a_while_does_not_wait() -> None:
    async with await listen("tcp://127.0.0.1:0", echo) as listener:
        started = monotonic()
        for _ in range(30):
            async with await connect(listener.address) as connection:
                await echoes(connection)
        one_by_one_s = monotonic() - started
        assert one_by_one_s < 1.0


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """So many more than are open now, all of them without gaps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held: list[int] = []
    try:
        while not held or held[-1] <= highest:  # fill the gaps
            held.append(os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1 + number, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


async def test_descriptors_are_left_for_what_else_is_opened(
    own_errors: pytest.LogCaptureFixture,
) -> None:
    async with await listen("tcp://127.0.0.1:0", echo) as listener:
        async with await connect(listener.address) as early:
            await echoes(early)
            # 100 for the callers in this process, and 18 for the first of them when accepted.
            number = 118 + sockets.NUM_SPARE_DESCRIPTORS
            with descriptors_left(number), callers(port_of(listener.address), 100) as crowd:
                for turned_away in crowd[20:]:
                    assert await ended(turned_away)
                await echoes(early)
                with ExitStack() as stack:
                    for _ in range(sockets.NUM_SPARE_DESCRIPTORS - 2):
                        stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        lines = [line for line in own_errors.text.splitlines() if "cannot accept" in line]
        assert len(lines) == 1
        assert "too many open files" in lines[0]
        async with await connect(listener.address) as late:
            await echoes(late)


async def test_those_that_do_not_close_do_not_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "MAX_CLOSING", 3)
    served = 0

    async def turn_away(connection: Connection) -> None:
        nonlocal served
        served += 1

    limits = Limits(close_timeout_s=60)
    async with await listen("tcp://127.0.0.1:0", turn_away, limits) as listener:
        with callers(port_of(listener.address), 8) as crowd:
            await settled(lambda: served == 8)
            # All see the end of what they are sent; only a reset ends what they may send.
            for sock in crowd:
                assert await ended(sock)

            def num_reset() -> int:
                number = 0
                for sock in crowd:
                    try:
                        sock.send(b"P")
                    except (BrokenPipeError, ConnectionResetError):
                        number += 1
                return number

            await settled(lambda: num_reset() == 5)


async def test_what_has_arrived_is_freed_with_the_connection() -> None:
    accepted: asyncio.Queue[Connection] = asyncio.Queue()

    async def keep(connection: Connection) -> None:
        accepted.put_nowait(connection)
        with pytest.raises(ConnectionClosed):
            await connection.recv()

    async with await listen("tcp://127.0.0.1:0", keep) as listener:
        tracemalloc.start()
        try:
            with callers(port_of(listener.address), 1) as [sock]:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                head = b"PLR1" + (64 * 2**20).to_bytes(4, "little")
                await loop.sock_sendall(sock, head + bytes(4 * 2**20))
                connection = await accepted.get()
                await settled(lambda: connection.counters.received_nbytes > 4 * 2**20)
                assert tracemalloc.get_traced_memory()[0] > 4 * 2**20
            await settled(lambda: tracemalloc.get_traced_memory()[0] < 2**20)
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("num_pieces", [1, 8])
def test_a_zeromq_frame_takes_memory_as_it_arrives(num_pieces: int) -> None:
    incoming = Incoming("peer", Limits())
    piece = bytes(MAX_MESSAGE_NBYTES - 64)
    begin = memoryview(bytes([BEGIN]) + (64 * 2**20).to_bytes(8, "little") + piece)
    more = memoryview(bytes([PIECE]) + piece)
    tracemalloc.start()
    try:
        assert incoming.add(begin) is None
        for _ in range(1, num_pieces):
            assert incoming.add(more) is None
        assert incoming.in_frame
        assert tracemalloc.get_traced_memory()[1] < 2 * num_pieces * len(piece) + 100_000
    finally:
        tracemalloc.stop()


def test_a_flood_is_logged_in_brief(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(brief_log, "monotonic", lambda: now)
    log = BriefLog(_LOGGER)
    for number in range(1000):
        log.warning("refused %d", number)
    assert len(caplog.records) == 50
    now += 10.0
    caplog.clear()
    for number in range(1000, 2000):
        log.warning("refused %d", number)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "refused 1000 (950 lines of this kind were left out before)",
        *(f"refused {number}" for number in range(1001, 1005)),
    ]
