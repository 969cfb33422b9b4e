"""``privatelora-serve``: the cloud daemon."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from privatelora.cli._app import LogFormat, LogFormatOption, print_line, run, set_up_logging

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: privatelora-serve configs/cloud-loopback.yaml"


@app.command(epilog=EXAMPLE)
def serve(
    config: Annotated[Path, typer.Argument(help="YAML file of the cloud; see configs/.")],
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every connection.")] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Run the decoder layers of one model for every edge that connects.

    Prints one line, `ready ADDRESS`, on standard output when it can be connected to, and logs
    to standard error. On SIGTERM or Ctrl-C it lets nobody in any more and ends when nobody is
    left, at the latest after `drain_timeout_s`; a second one ends it at once.
    """
    set_up_logging(verbose, log_format)
    from privatelora.runtime.cloud import Cloud
    from privatelora.runtime.config import load_cloud_config
    from privatelora.runtime.loop import StopSignals
    from privatelora.runtime.loop import run as run_loop
    from privatelora.runtime.service_manager import READY, STOPPING, notify

    cloud = Cloud(load_cloud_config(config))

    async def main() -> None:
        with StopSignals() as stop:
            async with await cloud.listen() as listener:
                print_line(f"ready {listener.address}")
                notify(READY)
                await stop.wait()
                notify(STOPPING)
                logging.getLogger(__name__).info("stopping")
                await stop.bound(cloud.drain())

    with cloud.watched():
        run_loop(main())


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
