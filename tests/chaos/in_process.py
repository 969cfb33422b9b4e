"""Both ends in one process, over ``inproc://``: its tasks can be counted.

A program: started with a job, it writes what came of it beside it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import psutil

from privatelora.errors import PrivateLoRAError
from privatelora.runtime import cloud_link
from privatelora.runtime.cloud import Cloud
from privatelora.runtime.config import CloudConfig, EdgeConfig
from privatelora.runtime.edge import Edge
from privatelora.runtime.generation import GenerationStats
from privatelora.runtime.link_config import PayloadConfig
from privatelora.runtime.loop import run
from privatelora.transports import registry
from privatelora.transports.base import Connection, Credentials, Limits, Listener
from privatelora.transports.emulated_link import Impairment
from privatelora.transports.impaired import impaired
from tests.chaos.clients import Clients, LostError
from tests.chaos.faults import IN_PROCESS, Fault, plan
from tests.chaos.growth import SAMPLE_S, Sample, measured, sample_process
from tests.chaos.outcome import Record
from tests.chaos.questions import Conversation, Question
from tests.chaos.world import CLOUD_SETTINGS, DEFECT, EDGE_SETTINGS, known

ADDRESS = "inproc://chaos"
MAX_TAIL_LINES = 12
DAMAGE = {
    "stalled": Impairment(stall_probability=0.02, stall_ms=100),
    "truncated": Impairment(truncate_probability=0.004),
    "flipped": Impairment(corrupt_probability=0.004),
    "lost": Impairment(drop_probability=0.004),
    "delayed": Impairment(delay_ms=5, jitter_ms=2),
}
"""What a worse link does, by a word of what it logs of a frame; per frame."""
_FRAME_FAULT = re.compile(r"frame \d+ .*(stalled|truncated|flipped)")


@dataclass
class Job:
    """What to do; ``folder``: of the deployment."""

    seed: int
    seconds: float
    num_faults: int
    folder: str
    conversations: list[Conversation]

    def write(self, path: Path) -> None:
        """Write it for the program."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        """What ``write`` wrote."""
        value = json.loads(path.read_text())
        value["conversations"] = [
            Conversation(tuple(Question(**q) for q in each["questions"]), tuple(each["answers"]))
            for each in value["conversations"]
        ]
        return cls(**value)


class Log(logging.Handler):
    """The last lines of the log, and the faults of frames that it tells of."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.num_defects = 0
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        """Take one."""
        line = self.format(record)
        if DEFECT.search(line):
            self.num_defects += 1
            self._record.failure("a defect was logged", {"both": line.splitlines()})
        self.lines = [*self.lines, line][-MAX_TAIL_LINES:]
        if found := _FRAME_FAULT.search(line):
            self._record.fault(f"frame {found[1]}", line)

    def tails(self) -> dict[str, list[str]]:
        """The last lines."""
        return {"both": self.lines}


class Ends:
    """A cloud and an edge, and the connections between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener: Listener
        self._connections: list[Connection] = []
        self._damage = Impairment()
        self._chance = random.Random(0)
        self._edge = Edge(
            EdgeConfig(
                cloud=ADDRESS,
                shard=folder / "edge",
                adapter=folder / "adapter.safetensors",
                payload=PayloadConfig.model_validate("fp32"),
                num_threads=1,
                **known(EDGE_SETTINGS, EdgeConfig),
            )
        )

    async def listen(self) -> None:
        """Make a cloud."""
        config = CloudConfig(
            listen=ADDRESS,
            shard=self._folder / "cloud",
            num_threads=1,
            **known(CLOUD_SETTINGS, CloudConfig),
        )
        self._listener = await Cloud(config).listen()

    async def aclose(self) -> None:
        """End both."""
        await self._edge.aclose()
        await self._listener.aclose()

    async def connect(self, address: str, limits: Limits, credentials: Credentials) -> Connection:
        """In place of ``registry.connect``."""
        connection = await registry.connect(address, replace(limits, spin_s=0.0), credentials)
        seed = self._chance.getrandbits(32)
        worse = impaired(connection, limits, send=self._damage, receive=self._damage, seed=seed)
        self._connections = [worse]
        return worse

    async def ask(self, question: Question) -> AsyncGenerator[str, None]:
        """As a client would. Raises LostError."""
        service = self._edge.service
        prompt_ids = service.text().encode_prompt(question.prompt)
        params = service.params(question.sampling())
        try:
            async with aclosing(
                service.stream(None, prompt_ids, params, GenerationStats())
            ) as pieces:
                async for piece in pieces:
                    yield piece
        except PrivateLoRAError as error:
            raise LostError(f"{type(error).__name__}: {error}") from error

    async def apply(self, fault: Fault) -> None:
        """Do it."""
        if fault.kind == "replace cloud":
            await self._listener.aclose()
            await asyncio.sleep(fault.duration_s / 3)
            await self.listen()
            return
        if fault.kind == "worse link":
            self._chance.seed(fault.seed)
            self._damage = self._chance.choice(list(DAMAGE.values()))
        for connection in self._connections:
            connection.abort()
        self._connections = []


async def disturb(job: Job, ends: Ends, record: Record, clients: Clients) -> None:
    """Do what the plan says, as long as the job says."""
    for number, fault in enumerate(plan(job.seed, record.outcome.transport, IN_PROCESS)):
        if number >= job.num_faults and record.now_s >= job.seconds:
            break
        await asyncio.sleep(fault.pause_s)
        record.fault(fault.kind, str(fault))
        await ends.apply(fault)
    clients.end()


async def watch(samples: list[Sample]) -> None:
    """Sample this process until cancelled."""
    process = psutil.Process()
    while True:
        samples.append({**sample_process(process), "tasks": float(len(asyncio.all_tasks()))})
        await asyncio.sleep(SAMPLE_S)


async def main_async(job: Job) -> Record:
    """Do all of it."""
    record = Record("inproc", job.seed)
    log = Log(record)
    log.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log, logging.StreamHandler()])
    ends = Ends(Path(job.folder))
    samples: list[Sample] = []
    with patch.object(cloud_link, "connect", ends.connect):
        await ends.listen()
        clients = Clients(record, job.conversations, ends.ask, log.tails)
        watching = asyncio.create_task(watch(samples))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(clients.run())
                group.create_task(disturb(job, ends, record, clients))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await ends.aclose()
    await asyncio.sleep(0)
    if left := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
        record.failure(f"tasks are left: {[task.get_name() for task in left]}", log.tails())
    if (growth := measured(samples)) is not None:
        record.outcome.growth = {"both": growth}
    return record


def main() -> None:
    """Run the job in the file that is named on the command line."""
    path = Path(sys.argv[1])
    record = run(main_async(Job.read(path)))
    path.with_suffix(".result").write_text(json.dumps(record.outcome.as_json()))
    sys.exit(0)


if __name__ == "__main__":
    main()
