"""``privatelora-edge``: the edge daemon."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privatelora.cli._app import LogFormat, LogFormatOption, print_line, run, set_up_logging

if TYPE_CHECKING:
    from privatelora.runtime.edge import Edge

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: privatelora-edge configs/edge-loopback.yaml"


@app.command(epilog=EXAMPLE)
def edge(
    config: Annotated[Path, typer.Argument(help="YAML file of the edge; see configs/.")],
    lines: Annotated[
        bool, typer.Option("--lines", help="Lines of JSON on standard input instead of HTTP.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve this device's model to programs and people, over HTTP as OpenAI's API has it.

    Prints one line, `ready http://HOST:PORT`, when the cloud has accepted this edge and requests
    are answered; that address in a browser is a chat page. On SIGTERM or Ctrl-C answers under way
    are finished, at the latest after `http.drain_timeout_s`; a second one ends it at once.

    With --lines it prints {"event": "ready", ...} and answers a request per line until standard
    input ends:
    {"messages": [{"role": "user", "content": "Hi"}], "sampling": {"max_tokens": 64}}
    """
    set_up_logging(verbose, log_format)
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge
    from privatelora.runtime.loop import run as run_loop

    edge = Edge(load_edge_config(config))
    run_loop(_serve_lines(edge) if lines else _serve_http(edge))


async def _serve_http(edge: Edge) -> None:
    from privatelora.runtime.http.server import HttpServer
    from privatelora.runtime.loop import StopSignals
    from privatelora.runtime.service_manager import READY, STOPPING, notify

    try:
        server = HttpServer(edge.service, edge.config.http)
        await edge.connect()
        with StopSignals() as stop:
            async with server.listening():
                print_line(f"ready {server.url}")
                notify(READY)
                await stop.wait()
                notify(STOPPING)
                logging.getLogger(__name__).info("stopping")
                await stop.bound(server.drain())
    finally:
        await edge.aclose()


async def _serve_lines(edge: Edge) -> None:
    from privatelora.cli._input import read_lines
    from privatelora.runtime.line_service import LineService
    from privatelora.runtime.loop import until_stopped

    settings = edge.config
    service = LineService(edge.service)
    try:
        link = await edge.connect()
        _emit({"event": "ready", "cloud": settings.cloud, "software": link.cloud.software})
        await until_stopped(service.run(read_lines(), _emit))
    finally:
        await edge.aclose()


def _emit(event: dict[str, Any]) -> None:
    print_line(json.dumps(event))


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
