"""All targets, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.e2e.deployment import Deployment
from tests.fuzz.daemons.clouds import CloudTarget
from tests.fuzz.daemons.edge_cloud import EdgeCloudTarget
from tests.fuzz.daemons.edges import EdgeHttpTarget, MetricsTarget
from tests.fuzz.daemons.inputs import Target

_CLOUDS = {
    "cloud-tcp": "tcp",
    "cloud-tls": "tls",
    "cloud-zmq": "zmq+tcp",
    "cloud-zmq-curve": "zmq+tcp with CURVE",
    "cloud-shm": "shm",
    "cloud-ipc": "zmq+ipc",
}
"""Names, and those of the transport's case in the tests of the transports."""

TARGETS: dict[str, Callable[[Deployment], Target]] = {
    **{
        name: partial(CloudTarget, name=name, case_name=case_name)
        for name, case_name in _CLOUDS.items()
    },
    EdgeHttpTarget.name: EdgeHttpTarget,
    EdgeCloudTarget.name: EdgeCloudTarget,
    MetricsTarget.name: MetricsTarget,
}
