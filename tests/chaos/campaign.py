"""A chaos run over some transports, with one plan for each."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos import in_process
from tests.chaos.clients import Clients
from tests.chaos.daemon import Daemon, EndedEarlyError
from tests.chaos.faults import KILLS, plan
from tests.chaos.growth import Watch, too_much
from tests.chaos.outcome import Outcome, Record
from tests.chaos.questions import Conversation, make_conversations
from tests.chaos.setups import TRANSPORTS, Transport
from tests.chaos.world import MAX_POSITIONS, World
from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.forker import Forker

IN_PROCESS = "inproc"
NAMES = (*(transport.name for transport in TRANSPORTS), IN_PROCESS)


@dataclass(frozen=True)
class Extent:
    """How much is done to each transport: for ``seconds``, at least ``num_faults``."""

    seconds: float
    num_faults: int
    num_conversations: int
    with_kills: bool


class Campaign:
    """Everything that the transports of one run share."""

    def __init__(self, seed: int, extent: Extent, folder: Path, forker: Forker) -> None:
        self.running: dict[str, Record] = {}
        """Transports that are at it."""
        self._seed = seed
        self._extent = extent
        self._folder = folder
        self._forker = forker
        self._deployment: Deployment
        self._conversations: list[Conversation]

    async def prepare(self) -> None:
        """Split a model, and ask undisturbed daemons everything that will be asked."""
        options = {"max_position_embeddings": MAX_POSITIONS}
        self._deployment, _ = tiny_deployment(
            "llama", self._folder, model_options=options, rank_up=8, rank_down=8
        )
        record = Record("undisturbed", self._seed)
        world = self._world(TRANSPORTS[0], record)
        await world.start()
        try:
            self._conversations = await make_conversations(
                self._seed, self._extent.num_conversations, world.ask
            )
        finally:
            await world.aclose()
        if record.outcome.failures:
            raise RuntimeError(f"undisturbed daemons failed: {record.outcome.failures}")

    async def run(self, name: str) -> Outcome:
        """Do everything to one transport; ``name`` is one of NAMES."""
        record = self.running[name] = Record(name, self._seed)
        try:
            if name == IN_PROCESS:
                await self._run_in_process(record)
            else:
                transport = next(each for each in TRANSPORTS if each.name == name)
                await self._run_daemons(transport, record)
        finally:
            del self.running[name]
        outcome = record.outcome
        outcome.seconds = record.now_s
        for daemon, growth in outcome.growth.items():
            if too_much(growth):
                record.failure(f"the {daemon} grew: {asdict(growth)}", {})
        return outcome

    def _world(self, transport: Transport, record: Record) -> World:
        folder = self._folder / record.outcome.transport
        folder.mkdir()
        return World(transport.set_up(), self._deployment, self._forker, folder, record)

    async def _run_daemons(self, transport: Transport, record: Record) -> None:
        world = self._world(transport, record)
        await world.start()
        watch = Watch(lambda: world.daemons, world.metrics_url)
        watching = asyncio.create_task(watch.run())
        try:
            clients = Clients(record, self._conversations, world.ask, world.tails)
            async with asyncio.TaskGroup() as group:
                group.create_task(clients.run())
                group.create_task(self._disturb(transport, world, record, clients))
        except* (EndedEarlyError, TimeoutError) as errors:
            reasons = ", ".join(repr(error) for error in errors.exceptions)
            record.failure(f"a daemon could not be started again: {reasons}", world.tails())
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await world.aclose()
        record.outcome.growth = watch.growth()

    async def _disturb(
        self, transport: Transport, world: World, record: Record, clients: Clients
    ) -> None:
        extent = self._extent
        kinds = [kind for kind in transport.kinds if extent.with_kills or kind not in KILLS]
        for number, fault in enumerate(plan(self._seed, transport.name, kinds)):
            if number >= extent.num_faults and record.now_s >= extent.seconds:
                break
            await asyncio.sleep(fault.pause_s)
            record.fault(fault.kind, str(fault))
            await world.apply(fault)
        clients.end()

    async def _run_in_process(self, record: Record) -> None:
        folder = self._folder / IN_PROCESS
        folder.mkdir()
        job = folder / "job.json"
        extent = self._extent
        in_process.Job(
            self._seed,
            extent.seconds,
            extent.num_faults,
            str(self._deployment.directory),
            self._conversations,
        ).write(job)
        log = folder / "both-0001.log"
        process = Daemon(self._forker, log, in_process.__name__, job)
        await process.ended.wait()
        result = job.with_suffix(".result")
        if process.status != 0 or not result.exists():
            record.failure(
                f"the process with both ends ended with status {process.status}",
                {"both": process.log.read_text().splitlines()[-40:]},
            )
            return
        record.outcome = Outcome.from_json(json.loads(result.read_text()))
