"""What every transport must do, on every event loop: closing, dying, listening, connecting."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from privatelora.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    ConnectionClosed,
    RemoteProtocolError,
)
from privatelora.transports import registry
from privatelora.transports.base import (
    Connection,
    Credentials,
    CurveCredentials,
    Limits,
    TlsCredentials,
)
from tests.transports.cases import Case
from tests.transports.conftest import OpenPair
from tests.transports.support import (
    HUGE,
    SMALL_QUEUE,
    blocked,
    cancel,
    echo,
    received,
    send_for_ever,
)

pytestmark = pytest.mark.usefixtures("ends_in_time", "nothing_leaks", "own_errors")

# Closing


async def close_both(client: Connection, server: Connection) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(client.aclose())
        group.create_task(server.aclose())


async def test_close_delivers_what_was_sent(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    frames = [bytes([number]) * 5_000 for number in range(50)]
    for frame in frames:
        sender = asyncio.create_task(client.send(frame))
        if frame is frames[0]:
            await sender
    closing = asyncio.create_task(client.aclose())
    await asyncio.sleep(0)
    assert await received(server) == frames[0]
    assert [await received(server) for _ in frames[1:]] == frames[1:]
    with pytest.raises(ConnectionClosed):
        await server.recv()
    await server.aclose()
    await closing
    await sender


async def test_close_waits_for_sends_under_way_and_refuses_new_ones(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(bytes(HUGE))
    senders = [await blocked(client.send(bytes(HUGE))), await blocked(client.send(b"waits"))]
    closing = await blocked(client.aclose())
    with pytest.raises(ConnectionClosed, match="closed by this end"):
        await client.send(b"too late")
    assert len(await server.recv()) == HUGE
    assert len(await server.recv()) == HUGE
    assert await received(server) == b"waits"
    with pytest.raises(ConnectionClosed, match="closed"):
        await server.recv()
    await server.aclose()
    await closing
    await asyncio.gather(*senders)


async def test_half_close(open_pair: OpenPair) -> None:
    """After the peer's end, sending still works; the peer takes it in until we close too."""
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(b"last words")
    closing = asyncio.create_task(client.aclose())
    assert await received(server) == b"last words"
    for _ in range(3):
        with pytest.raises(ConnectionClosed):
            await server.recv()
    for _ in range(3):
        await server.send(bytes(HUGE))
    assert not closing.done()
    await server.aclose()
    await closing


async def test_peers_close_releases_blocked_senders(open_pair: OpenPair) -> None:
    """What they send is dropped, as the peer does not want it any more."""
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(bytes(HUGE))
    senders = [await blocked(client.send(bytes(HUGE))), await blocked(client.send(b"next"))]
    closing = asyncio.create_task(server.aclose())
    await asyncio.gather(*senders)
    await client.aclose()
    await closing


async def test_close_interrupts_recv(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    receiving = asyncio.create_task(client.recv())
    await asyncio.sleep(0)
    await close_both(client, server)
    with pytest.raises(ConnectionClosed, match="closed by this end"):
        await receiving


async def test_close_may_be_repeated(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    async with asyncio.TaskGroup() as group:
        for connection in (client, server, client, server):
            group.create_task(connection.aclose())
    for connection in (client, server):
        await connection.aclose()
        connection.abort()
        connection.abort()
        await connection.aclose()
        for _ in range(2):
            with pytest.raises(ConnectionClosed):
                await connection.send(b"x")
            with pytest.raises(ConnectionClosed):
                await connection.recv()


async def test_close_does_not_wait_for_ever(open_pair: OpenPair) -> None:
    client, server = await open_pair(Limits(close_timeout_s=0.05), Limits())
    async with asyncio.timeout(5):
        await client.aclose()
    with pytest.raises(ConnectionClosed):
        await server.recv()


async def test_close_with_a_stuck_send_does_not_wait_for_ever(open_pair: OpenPair) -> None:
    limits = Limits(close_timeout_s=0.05, max_queued_nbytes=1000)
    client, server = await open_pair(limits)
    await client.send(bytes(HUGE))
    sender = await blocked(client.send(bytes(HUGE)))
    async with asyncio.timeout(5):
        await client.aclose()
    with pytest.raises(ConnectionClosed):
        await sender
    server.abort()


async def test_cancelled_close_aborts(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    await cancel(await blocked(client.aclose()))
    with pytest.raises(ConnectionClosed):
        await server.recv()
    await server.aclose()


async def test_leaving_the_context_closes(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    closing = asyncio.create_task(server.aclose())
    async with client:
        pass
    await closing
    with pytest.raises(ConnectionClosed):
        await client.send(b"x")


async def test_leaving_the_context_with_an_error_aborts(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    with pytest.raises(ZeroDivisionError):
        async with client:
            raise ZeroDivisionError
    with pytest.raises(ConnectionClosed):
        await client.send(b"x")
    with pytest.raises(ConnectionClosed):
        await server.recv()


# Death


async def receive_until_closed(connection: Connection) -> list[bytes]:
    frames = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            frames.append(await received(connection))
    return frames


async def test_peer_death(open_pair: OpenPair) -> None:
    client, server = await open_pair()
    receiving = asyncio.create_task(server.recv())
    await asyncio.sleep(0)
    client.abort()
    with pytest.raises(ConnectionClosed):
        await receiving
    with pytest.raises(ConnectionClosed):
        await server.recv()
    with pytest.raises(ConnectionClosed):
        await send_for_ever(server)
    await server.aclose()


async def test_peer_death_wakes_blocked_senders(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    await client.send(bytes(HUGE))
    senders = [await blocked(client.send(bytes(HUGE))), await blocked(client.send(b"next"))]
    server.abort()
    for sender in senders:
        with pytest.raises(ConnectionClosed):
            await sender


async def test_own_abort_wakes_everything(open_pair: OpenPair) -> None:
    client, server = await open_pair(SMALL_QUEUE)
    receiving = asyncio.create_task(client.recv())
    await client.send(bytes(HUGE))
    senders = [await blocked(client.send(bytes(HUGE))), await blocked(client.send(b"next"))]
    closing = await blocked(client.aclose())
    client.abort()
    for sender in senders:
        with pytest.raises(ConnectionClosed):
            await sender
    with pytest.raises(ConnectionClosed):
        await receiving
    await closing
    server.abort()


@pytest.mark.parametrize("num_frames", [0, 1, 10])
async def test_death_after_a_burst_is_noticed(open_pair: OpenPair, num_frames: int) -> None:
    """Whole frames may or may not arrive before the end, but the end does."""
    client, server = await open_pair()
    receiving = asyncio.create_task(receive_until_closed(server))
    await asyncio.sleep(0)
    for _ in range(num_frames):
        await client.send(b"x" * 100_000)
    sender = asyncio.create_task(client.send(b"y" * HUGE))
    await asyncio.sleep(0)
    client.abort()
    await asyncio.gather(sender, return_exceptions=True)
    frames = await receiving
    assert frames[:num_frames] == [b"x" * 100_000] * len(frames[:num_frames])
    assert frames[num_frames:] in ([], [b"y" * HUGE])


# Listening and connecting


async def test_reconnecting(case: Case) -> None:
    async with await case.listen(echo) as listener:
        for number in range(5):
            connection = await case.connect(listener.address)
            await connection.send(bytes([number]))
            assert await received(connection) == bytes([number])
            if number % 2:
                await connection.aclose()
            else:
                connection.abort()


async def test_many_connections_at_once(case: Case) -> None:
    async def talk(number: int) -> None:
        async with await case.connect(listener.address) as connection:
            for size in (1, 100_000, 0):
                frame = bytes([number]) * size
                await connection.send(frame)
                assert await received(connection) == frame

    async with await case.listen(echo) as listener, asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(talk(number))


async def test_address_in_use(case: Case) -> None:
    async with await case.listen(echo) as listener:
        with pytest.raises(ConnectError, match=r"in use") as caught:
            await case.listen(echo, address=listener.address)
        assert listener.address in str(caught.value)
        connection = await case.connect(listener.address)
        await connection.send(b"still mine")
        assert await received(connection) == b"still mine"
        await connection.aclose()
    async with await case.listen(echo, address=listener.address) as again:
        assert again.address == listener.address


async def test_connecting_to_nobody(case: Case) -> None:
    address = case.dead_address()
    with pytest.raises(ConnectError) as caught:
        await case.connect(address)
    assert address in str(caught.value)


async def test_connecting_after_the_listener_closed(case: Case) -> None:
    listener = await case.listen(echo)
    await listener.aclose()
    await listener.aclose()
    with pytest.raises(ConnectError):
        await case.connect(listener.address)


async def test_connection_is_closed_when_the_handler_returns(case: Case) -> None:
    async def greet(connection: Connection) -> None:
        await connection.send(b"bye")

    async with await case.listen(greet) as listener:
        connection = await case.connect(listener.address)
        assert await received(connection) == b"bye"
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        await connection.aclose()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
        (RemoteProtocolError("bad hello"), "bad hello"),
    ],
)
async def test_listener_survives_a_failing_handler(
    case: Case, own_errors: pytest.LogCaptureFixture, error: Exception, shown: str
) -> None:
    async def handler(connection: Connection) -> None:
        if await received(connection) == b"fail":
            raise error
        await connection.send(b"fine")

    async with await case.listen(handler) as listener:
        for question in (b"fail", b"work", b"fail", b"work"):
            connection = await case.connect(listener.address)
            await connection.send(question)
            if question == b"fail":
                with pytest.raises(ConnectionClosed):
                    await connection.recv()
            else:
                assert await received(connection) == b"fine"
            await connection.aclose()
    assert own_errors.text.count(shown) == 2
    assert {record.name for record in own_errors.records} == {"privatelora.transports"}
    assert listener.address in own_errors.text


async def test_closing_the_listener_cancels_handlers_and_waits(case: Case) -> None:
    started, ended = asyncio.Semaphore(0), []

    async def handler(connection: Connection) -> None:
        started.release()
        try:
            await connection.recv()
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            ended.append(connection.peer)
            raise

    listener = await case.listen(handler)
    connections = [await case.connect(listener.address) for _ in range(3)]
    for _ in connections:
        await started.acquire()
    await listener.aclose()
    assert len(ended) == 3
    for connection in connections:
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        connection.abort()


async def test_closing_the_listener_before_a_handler_began(case: Case) -> None:
    listener = await case.listen(echo)
    connection = await case.connect(listener.address)
    await listener.aclose()
    with pytest.raises(ConnectionClosed):
        await connection.recv()
    connection.abort()


async def test_a_handler_may_close_its_listener(case: Case) -> None:
    async def handler(connection: Connection) -> None:
        await listener.aclose()
        await connection.send(b"closed")

    listener = await case.listen(handler)
    connection = await case.connect(listener.address)
    assert await received(connection) == b"closed"
    await connection.aclose()
    with pytest.raises(ConnectError):
        await case.connect(listener.address)
    await listener.aclose()


# Belonging


async def test_strangers_are_refused_and_logged(
    case: Case, own_errors: pytest.LogCaptureFixture
) -> None:
    async with await case.listen(echo) as listener:
        for stranger in case.keyring().strangers:
            own_errors.clear()
            with pytest.raises(AuthError) as caught:
                await registry.connect(listener.address, Limits(), stranger)
            assert listener.address in str(caught.value)
            async with asyncio.timeout(5):
                while not own_errors.records:  # noqa: ASYNC110  # the log has no event
                    await asyncio.sleep(0)
            assert {record.name for record in own_errors.records} == {"privatelora.transports"}
            assert listener.address in own_errors.text
            connection = await case.connect(listener.address)
            await connection.send(b"still served")
            assert await received(connection) == b"still served"
            await connection.aclose()


async def test_keys_that_would_not_be_used_are_refused(case: Case) -> None:
    """Otherwise someone would believe that the connection is protected by them."""
    path = Path("somewhere")
    others = {
        "tls": Credentials(tls=TlsCredentials(path, path)),
        "curve": Credentials(curve=CurveCredentials(path, path)),
    }
    for used in case.mechanisms:
        del others[used]
    for name, credentials in others.items():
        with pytest.raises(ConfigError, match=f"does not use the {name} keys"):
            await registry.connect(case.dead_address(), Limits(), credentials)
        with pytest.raises(ConfigError, match=f"does not use the {name} keys"):
            await registry.listen(case.listen_address(), echo, Limits(), credentials)
