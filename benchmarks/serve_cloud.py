"""The cloud daemon with another scheduler, for ``privatelora-bench serve --compare``.

``python -m privatelora.benchmarks.serve_cloud CONFIG.yaml SCHEDULING``; as ``privatelora-serve``
otherwise.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from privatelora.cli._app import run as run_program


def main() -> None:
    """Serve until told to stop."""
    from privatelora.benchmarks.whole_steps import LOCKSTEP, WHOLE_STEPS, WholeSteps
    from privatelora.runtime.cloud import Cloud
    from privatelora.runtime.config import load_cloud_config
    from privatelora.runtime.loop import run, wait_for_stop

    max_steps = {LOCKSTEP: 1, WHOLE_STEPS: None}[sys.argv[2]]
    make_scheduler = partial(WholeSteps, max_steps=max_steps)
    cloud = Cloud(load_cloud_config(Path(sys.argv[1])), make_scheduler)

    async def serve() -> None:
        async with await cloud.listen() as listener:
            print(f"ready {listener.address}", flush=True)
            await wait_for_stop()

    run(serve())


if __name__ == "__main__":
    run_program(main)
