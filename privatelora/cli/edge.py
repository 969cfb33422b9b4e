"""``privatelora-edge``: the edge daemon."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from privatelora.cli._app import LogFormat, LogFormatOption, run, set_up_logging

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = (
    """Example: echo '{"prompt": "The sea is"}' | privatelora-edge configs/edge-loopback.yaml"""
)


@app.command(epilog=EXAMPLE)
def edge(
    config: Annotated[Path, typer.Argument(help="YAML file of the edge; see configs/.")],
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve this device's model to local programs, over lines of JSON on standard input.

    Prints {"event": "ready", ...} when the cloud has accepted this edge, then answers a
    request per line until standard input ends:
    {"messages": [{"role": "user", "content": "Hi"}], "sampling": {"max_tokens": 64}}
    """
    set_up_logging(verbose, log_format)
    from privatelora.cli._input import read_lines
    from privatelora.runtime.config import load_edge_config
    from privatelora.runtime.edge import Edge
    from privatelora.runtime.line_service import LineService
    from privatelora.runtime.loop import run as run_loop
    from privatelora.runtime.loop import until_stopped

    settings = load_edge_config(config)
    edge = Edge(settings)
    service = LineService(edge.text, settings.sampling, settings.system_prompt)

    async def main() -> None:
        try:
            link = await edge.model.link()
            _emit({"event": "ready", "cloud": settings.cloud, "software": link.cloud.software})
            await until_stopped(service.run(read_lines(), _emit))
        finally:
            await edge.aclose()

    run_loop(main())


def _emit(event: dict[str, Any]) -> None:
    print(json.dumps(event), file=sys.stdout, flush=True)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
