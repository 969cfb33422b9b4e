"""The other end of ``privatelora-bench transport``: echoes over everything that is compared.

    python -m privatelora.benchmarks.echo CONFIG.yaml
    <- {"event": "ready", "addresses": {"tcp": "tcp://127.0.0.1:40123", ...}}

One process serves all of them, of which one at a time is busy.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from privatelora.benchmarks.bare import serve_pyzmq, serve_uvloop
from privatelora.errors import ConnectionClosed, PrivateLoRAError
from privatelora.runtime.link_config import CurveConfig, TlsConfig, credentials
from privatelora.runtime.loop import run, wait_for_stop
from privatelora.transports.base import Connection, Limits
from privatelora.transports.registry import listen
from privatelora.yaml_file import read_yaml

BARE = {"bare uvloop": serve_uvloop, "bare pyzmq": serve_pyzmq}


class ListenConfig(BaseModel):
    """One of our transports: where it listens, and its keys."""

    model_config = ConfigDict(extra="forbid")

    address: str
    tls: TlsConfig | None = None
    curve: CurveConfig | None = None


class EchoConfig(BaseModel):
    """What to serve; written by the benchmark. ``processor``: the only one to run on."""

    model_config = ConfigDict(extra="forbid")

    listeners: dict[str, ListenConfig]
    bare: tuple[str, ...]
    spin_s: float | None
    processor: int | None


async def echo(connection: Connection) -> None:
    """Send back every frame until the client leaves."""
    try:
        while True:
            await connection.send(await connection.recv())
    except ConnectionClosed:
        return


async def serve(config: EchoConfig) -> None:
    """Listen on everything, say where, and echo until stopped."""
    addresses: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for name, settings in config.listeners.items():
            try:
                listener = await listen(
                    settings.address,
                    echo,
                    Limits(spin_s=config.spin_s),
                    credentials(settings.tls, settings.curve),
                )
            except PrivateLoRAError as error:
                unavailable[name] = str(error)
                continue
            addresses[name] = (await stack.enter_async_context(listener)).address
        for name in config.bare:
            addresses[name] = await stack.enter_async_context(BARE[name]())
        ready = {"event": "ready", "addresses": addresses, "unavailable": unavailable}
        print(json.dumps(ready), flush=True)
        await wait_for_stop()


def main() -> None:
    """Serve what the YAML file named on the command line lists."""
    config = read_yaml(Path(sys.argv[1]), EchoConfig)
    if config.processor is not None:
        os.sched_setaffinity(0, {config.processor})
    run(serve(config))


if __name__ == "__main__":
    main()
