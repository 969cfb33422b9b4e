"""Two network namespaces with a shaped link between them, for checking what we emulate.

Bandwidth is limited by the kernel's token bucket (tbf), delay is its netem. The bucket counts whole
Ethernet frames, ``impaired`` the bytes of our frames alone: TCP leaves 1448 of 1514 bytes.
Needs root, iproute2, and a kernel that has what is asked for; what it has not is a ConfigError.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from privatelora.errors import ConfigError

FAR_ADDRESS = "10.203.0.2"
NEAR_ADDRESS = "10.203.0.1"
PAYLOAD_SHARE = 1448 / 1514
BURST_NBYTES = 16 * 1024
"""Of the token bucket: some frames of 1514 bytes, and little beside what a measurement sends."""


class KernelLink(NamedTuple):
    """Commands that are put in front of another, so that it runs at one end."""

    near: tuple[str, ...]
    far: tuple[str, ...]


@contextmanager
def kernel_link(*, mbps: float | None = None, delay_ms: float = 0.0) -> Iterator[KernelLink]:
    """A link whose near end sends no faster than ``mbps``, and each end ``delay_ms`` later."""
    token = uuid.uuid4().hex[:8]
    near, far = f"plora-{token}-n", f"plora-{token}-f"
    _run("ip", "netns", "add", near)
    try:
        _run("ip", "netns", "add", far)
        _run(*f"ip link add v0 netns {near} type veth peer name v0 netns {far}".split())
        for name, address in ((near, NEAR_ADDRESS), (far, FAR_ADDRESS)):
            _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", "v0")
            _run(*f"ip -n {name} link set v0 up".split())
            _run(*f"ip -n {name} link set lo up".split())
            if delay_ms:
                _shape(name, "netem", "delay", f"{delay_ms:g}ms")
        if mbps is not None:
            burst = max(BURST_NBYTES, int(mbps * 1e6 / 8 / 250))  # a tick of a slow clock
            _shape(near, "tbf", "rate", f"{mbps:g}mbit", "burst", str(burst), "latency", "400ms")
        yield KernelLink(("ip", "netns", "exec", near), ("ip", "netns", "exec", far))
    finally:
        for name in (near, far):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _shape(name: str, *qdisc: str) -> None:
    _run("tc", "-n", name, "qdisc", "add", "dev", "v0", "root", *qdisc)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}; install iproute2") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ConfigError(f"`{' '.join(command[:7])} ...` failed: {reason[0]}")
