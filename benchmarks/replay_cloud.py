"""The cloud's end of ``replay.py`` as a process: ``... replay_cloud SHARDS DTYPE THREADS DEVICE``.

<- ready tcp://127.0.0.1:41234
"""

from __future__ import annotations

import sys

from privatelora.cli._app import run as run_program


def main() -> None:
    """Serve until told to stop."""
    import torch

    from privatelora.benchmarks.replay import serve_replay
    from privatelora.runtime.loop import run, wait_for_stop
    from privatelora.runtime.unsplit import open_unsplit
    from privatelora.transports.base import Connection
    from privatelora.transports.registry import listen

    shards, dtype, num_threads, device = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    torch.set_grad_enabled(False)
    model = open_unsplit(shards, device=device, dtype=dtype).model  # type: ignore[arg-type]

    async def handle(connection: Connection) -> None:
        await serve_replay(connection, model)

    async def serve() -> None:
        async with await listen("tcp://127.0.0.1:0", handle) as listener:
            print(f"ready {listener.address}", flush=True)
            await wait_for_stop()

    run(serve())


if __name__ == "__main__":
    run_program(main)
