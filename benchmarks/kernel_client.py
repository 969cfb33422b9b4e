"""One end of a link that the kernel shapes: ``... kernel_client ADDRESS MBPS``.

<- {"event": "measured", "mbps": 9.5}     with MBPS above 0
<- {"event": "measured", "rtt_ms": 20.3}  with 0
"""

from __future__ import annotations

import json
import sys

from privatelora.benchmarks.emulator import bandwidth, round_trips
from privatelora.runtime.loop import run
from privatelora.transports.base import Limits
from privatelora.transports.registry import connect


async def measure(address: str, mbps: float) -> dict[str, float]:
    """Over a connection with nothing emulated."""
    connection = await connect(address, Limits(spin_s=0))
    if mbps:
        return {"mbps": await bandwidth(connection, mbps)}
    times = await round_trips(connection)
    return {"rtt_ms": times[len(times) // 2]}


def main() -> None:
    """Measure once."""
    address, mbps = sys.argv[1:]
    print(json.dumps({"event": "measured", **run(measure(address, float(mbps)))}), flush=True)


if __name__ == "__main__":
    main()
