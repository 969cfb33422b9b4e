"""A cloud's port, over every transport."""

from __future__ import annotations

import itertools
import ssl
from functools import partial
from random import Random
from typing import Any, Protocol

from privatelora.transports.base import Connection, Credentials, Limits
from privatelora.transports.registry import connect
from tests.e2e.deployment import Deployment
from tests.e2e.processes import Process
from tests.fuzz.daemons.conversation import Conversation, Speaker
from tests.fuzz.daemons.frames import FrameInputs
from tests.fuzz.daemons.inputs import Input, Target
from tests.fuzz.daemons.pipes import Pipe
from tests.fuzz.daemons.resumptions import Resumptions
from tests.fuzz.daemons.shm_offers import ShmInputs
from tests.fuzz.daemons.streams import StreamInputs, TlsInputs
from tests.fuzz.daemons.world import GoodClient, end, require_same, start_cloud
from tests.fuzz.daemons.zeromq_inputs import ZmtpInputs
from tests.transports.cases import CASES, Case, Keyring

_LIMITS = Limits(max_queued_nbytes=2**16)
"""Of the fuzzer's end: what it does not take is to wait at the cloud."""
_numbers = itertools.count()


def _settings(credentials: Credentials) -> dict[str, Any]:
    """Settings of a daemon that make it use ``credentials``."""
    settings: dict[str, Any] = {}
    if (tls := credentials.tls) is not None:
        files = {"certificate": tls.certificate, "key": tls.private_key, "trust": tls.trust}
        settings["tls"] = {name: str(file) for name, file in files.items() if file is not None}
    if (curve := credentials.curve) is not None:
        settings["curve"] = {"key": str(curve.secret_key), "trust": str(curve.trust)}
    return settings


class Inputs(Protocol):
    """Makes inputs for what lies below frames."""

    def make(self, rng: Random) -> Input: ...


class CloudTarget(Target):
    """The port of a cloud: half of the inputs for the transport, half for what lies above."""

    def __init__(self, deployment: Deployment, name: str, case_name: str) -> None:
        self.name = name
        self._deployment = deployment
        self._case = next(case for case in CASES if case.name == case_name)
        self._keyring: Keyring = self._case.keyring()
        speaker = Speaker(deployment.cloud_shard)
        conversations = tuple(speaker.conversations())
        self._conversations: tuple[Conversation, ...] = (
            *conversations,
            *speaker.training_conversations(),
        )
        self._frames = FrameInputs(self._connect, self._conversations)
        self._resumptions = Resumptions(self._connect, conversations)
        self._running: Process | None = None

    async def start(self) -> None:
        self.watched, self._address = await start_cloud(
            self._deployment,
            f"{self.name}-{next(_numbers)}",
            listen=self._case.listen_address(),
            **_settings(self._keyring.listener),
        )
        self._running = self.watched
        self._below: Inputs = _inputs_below(
            self._case, self._address, self._keyring.client, self._conversations
        )
        self._edge_file = self._deployment.edge_yaml(
            self._address, f"{self.name}-edge.yaml", **_settings(self._keyring.client)
        )
        self._bystander = GoodClient(self._edge_file)
        self._expected = await self._bystander.ask()

    async def stop(self) -> None:
        if self._running is not None:
            await self._bystander.aclose()
            end(self._running)
            self._running = None

    def make(self, rng: Random) -> Input:
        which = rng.random()
        if which < 0.05:
            return self._resumptions.make(rng)
        return (self._frames if which < 0.5 else self._below).make(rng)

    async def bystander(self) -> None:
        require_same(await self._bystander.ask(), self._expected)

    async def newcomer(self) -> None:
        client = GoodClient(self._edge_file)
        try:
            require_same(await client.ask(), self._expected)
        finally:
            await client.aclose()

    async def _connect(self) -> Connection:
        return await connect(self._address, _LIMITS, self._keyring.client)


def _inputs_below(
    case: Case, address: str, client: Credentials, conversations: tuple[Conversation, ...]
) -> Inputs:
    if case.scheme == "shm":
        return ShmInputs(address, conversations)
    if case.scheme == "zmq+ipc":
        path = "\0privatelora-zmq/" + address.partition("//")[2]
        return ZmtpInputs(partial(Pipe.over_unix, path), address, client, conversations)
    open_pipe = partial(Pipe.over_tcp, int(address.rpartition(":")[2]))
    if case.scheme == "zmq+tcp":
        return ZmtpInputs(open_pipe, address, client, conversations)
    if client.tls is not None:
        context = ssl.create_default_context(cafile=client.tls.trust)
        return TlsInputs(open_pipe, context, conversations)
    return StreamInputs(open_pipe, conversations)
