"""An event loop in a thread of its own, as seen by those who wait for it."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from privatelora.training.split.loop_thread import LoopThread


def interrupt_main() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_it_gives_back_what_work_comes_to() -> None:
    async def work(number: int) -> int:
        await asyncio.sleep(0)
        return 10 // number

    thread = LoopThread("test")
    assert thread.run(work(5)) == 2
    with pytest.raises(ZeroDivisionError):
        thread.run(work(0))
    assert thread.run(work(2)) == 5
    thread.close()
    thread.close()
    assert "test" not in {one.name for one in threading.enumerate()}


def test_what_was_interrupted_comes_to_its_end_before_the_thread_does() -> None:
    ended = []

    async def work() -> None:
        try:
            interrupt_main()
            await asyncio.Event().wait()
        finally:
            for _ in range(100):  # as closing a connection takes some turns
                await asyncio.sleep(0)
            ended.append(True)

    thread = LoopThread("test")
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    thread.close()
    assert ended
