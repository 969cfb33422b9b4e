"""Telling the service manager that started a daemon how it is (systemd's sd_notify protocol)."""

from __future__ import annotations

import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str) -> None:
    """Send ``state`` to the socket in NOTIFY_SOCKET; nothing if there is none or nobody there."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(address)
            sock.send(state.encode())
        except OSError:
            # Serving goes on; whoever waits for the message has a limit of their own.
            return
