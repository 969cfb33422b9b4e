"""Many inputs to one target, batch by batch, and what must hold after each batch."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.daemons.inputs import Input, Outcome, Target, Violation
from tests.fuzz.daemons.vitals import Vitals, forget_peak, require_sound

BATCH_INPUTS = 100
WARM_UP_SEED = 0
"""Inputs of this seed are sent before those that were asked for, so that what happens only once is
behind the programs when their memory is looked at."""
WARM_UP_INPUTS = 400
GROWN_UP_INPUTS = 1000
"""Until then caches and buffers fill, and code is used for the first time."""
MAX_FILLING_NBYTES = 64 * 2**20
"""A process that grows by more within a batch is a finding: as much as an input can announce."""
MAX_GROWTH_NBYTES = 24 * 2**20
"""So is one that has grown by more since then."""
MAX_JUMP_NBYTES = 32 * 2**20
"""So is one that within a batch needs more memory for a moment than before and after it: no input
is larger than a mebibyte, and what one only announces must not be taken."""
INPUT_DEADLINE_S = 60.0
"""An input that has not ended by then hangs."""
SETTLE_DEADLINE_S = 20.0
"""Descriptors and threads have to return to where they were within this time."""
SPARE_FDS = 2
SPARE_THREADS = 2
"""More than at the beginning there may be, of those that are made when they are first needed."""
_LOOK_AGAIN_S = 0.02


@dataclass
class Finding:
    """Something that must not happen, and what is needed to make it happen again."""

    target: str
    seed: int
    start: int
    num_inputs: int
    kinds: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        last = self.start + self.num_inputs - 1
        inputs = f"input {self.start}" if self.num_inputs == 1 else f"inputs {self.start} to {last}"
        return (
            f"{self.target}: {self.what}\n"
            f"{inputs} of seed {self.seed}: {', '.join(self.kinds)}\n"
            f"again: {self.command}"
        )

    @property
    def command(self) -> str:
        return (
            f"python -m tests.fuzz.daemons --target {self.target} --seed {self.seed} "
            f"--start {self.start} --inputs {self.num_inputs}"
        )


@dataclass
class Report:
    """What became of the inputs of one target.

    ``outcomes``: by kind and outcome. ``growth_nbytes``: of resident memory since the warm-up;
    ``jump_nbytes``: most that a batch needed beyond what there was before and after it.
    """

    target: str
    seed: int
    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    seconds: float = 0.0
    growth_nbytes: int = 0
    jump_nbytes: int = 0
    resident_nbytes: int = 0
    num_fds: tuple[int, int] = (0, 0)
    num_threads: tuple[int, int] = (0, 0)
    """At the beginning and at the end."""
    finding: Finding | None = None

    @property
    def num_inputs(self) -> int:
        return self.outcomes.total()


class Campaign:
    """Sends inputs of one seed to one target, which it starts.

    ``report`` is up to date after every batch.
    """

    def __init__(self, target: Target, seed: int, num_warm_up: int = WARM_UP_INPUTS) -> None:
        self.report = Report(target.name, seed)
        self._num_warm_up = num_warm_up
        self._target = target
        self._first: Vitals | None = None
        self._warm: Vitals | None = None

    async def run(self, start: int, stop: int, progress: Callable[[Report], None]) -> None:
        """Send inputs ``start`` to ``stop - 1``, up to the first finding."""
        began = time.monotonic()
        await self._target.start()
        try:
            await self._warm_up()
            for first in range(start, stop, BATCH_INPUTS):
                indices = range(first, min(first + BATCH_INPUTS, stop))
                try:
                    await self._batch(indices)
                except Violation as violation:
                    finding = self._finding(self._with_log(violation), indices)
                    self.report.finding = await self._narrowed(finding, indices)
                    break
                finally:
                    self.report.seconds = time.monotonic() - began
                progress(self.report)
        except Violation as violation:  # not yet warm
            what = self._with_log(violation)
            self.report.finding = self._finding(what, _named(what) or range(self._num_warm_up))
        finally:
            await self._target.stop()

    async def _warm_up(self) -> None:
        seed, self.report.seed = self.report.seed, WARM_UP_SEED
        await self._target.newcomer()
        self._first = Vitals.of(self._target.watched)
        await self._send_all(range(self._num_warm_up))
        await self._check()
        await self._settled()
        self.report.outcomes.clear()
        self.report.seed = seed

    async def _batch(self, indices: range) -> None:
        watched = self._target.watched
        forget_peak(watched)
        before = Vitals.of(watched)
        bystander = asyncio.create_task(self._target.bystander())
        try:
            await self._send_all(indices)
            await bystander
        finally:
            bystander.cancel()
            await asyncio.gather(bystander, return_exceptions=True)
        await self._check()
        after = await self._settled()
        self._judge_memory(before, after)

    async def _send_all(self, indices: range) -> None:
        """Some at a time, so that the memory of many does not add up."""
        rest = iter(indices)

        async def worker() -> None:
            for index in rest:
                made = self._make(index)
                try:
                    async with asyncio.timeout(INPUT_DEADLINE_S):
                        outcome = await made.send()
                except TimeoutError as error:
                    raise Violation(f"input {index} has no end: {made.kind}") from error
                except Violation as violation:
                    raise Violation(f"input {index}, {made.kind}: {violation}") from violation
                self.report.outcomes[made.kind, outcome] += 1

        tasks = [asyncio.create_task(worker()) for _ in range(self._target.concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(self) -> None:
        await self._target.calm()
        self._require_sound()
        await self._target.newcomer()
        self._require_sound()

    def _require_sound(self) -> None:
        for process in (self._target.watched, *self._target.others):
            require_sound(process)

    async def _settled(self) -> Vitals:
        """Wait until descriptors and threads are back."""
        first = self._first
        assert first is not None
        deadline = time.monotonic() + SETTLE_DEADLINE_S
        while True:
            now = Vitals.of(self._target.watched)
            more_fds = now.num_fds - first.num_fds
            more_threads = now.num_threads - first.num_threads
            if more_fds <= SPARE_FDS and more_threads <= SPARE_THREADS:
                self.report.num_fds = (first.num_fds, now.num_fds)
                self.report.num_threads = (first.num_threads, now.num_threads)
                return now
            if time.monotonic() > deadline:
                raise Violation(
                    f"{SETTLE_DEADLINE_S:g} s after the last input it has {more_fds} more "
                    f"descriptors and {more_threads} more threads than at the beginning"
                )
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _judge_memory(self, before: Vitals, after: Vitals) -> None:
        report = self.report
        resident = report.resident_nbytes = after.resident_nbytes
        if self._warm is not None:
            report.growth_nbytes = resident - self._warm.resident_nbytes
            if report.growth_nbytes > MAX_GROWTH_NBYTES:
                raise Violation(
                    f"memory has grown by {report.growth_nbytes} bytes since the warm-up"
                )
        elif (filling := resident - before.resident_nbytes) > MAX_FILLING_NBYTES:
            raise Violation(f"it needed {filling} bytes more memory and keeps them")
        elif report.num_inputs >= GROWN_UP_INPUTS:
            self._warm = after
        jump = after.peak_nbytes - max(before.resident_nbytes, resident)
        report.jump_nbytes = max(report.jump_nbytes, jump)
        if jump > MAX_JUMP_NBYTES:
            raise Violation(f"it needed {jump} bytes more memory for a moment")

    def _make(self, index: int) -> Input:
        return self._target.make(Random(f"{self._target.name} {self.report.seed} {index}"))

    def _with_log(self, violation: Violation) -> str:
        """What happened, and what a program's log says of it."""
        try:
            self._require_sound()
        except Violation as other:
            if str(other) != str(violation):
                return f"{violation}; {other}"
        return str(violation)

    def _finding(self, what: str, indices: range) -> Finding:
        kinds = sorted({self._make(index).kind for index in indices})
        report = self.report
        return Finding(report.target, report.seed, indices.start, len(indices), tuple(kinds), what)

    async def _narrowed(self, finding: Finding, indices: range) -> Finding:
        """The first single input of a batch that does it as well.

        If there is none, the batch.
        """
        for index in [*_named(finding.what), *indices]:
            try:
                await self._start_anew()
                await self._batch(range(index, index + 1))
            except Violation as violation:
                return self._finding(self._with_log(violation), range(index, index + 1))
        return finding

    async def _start_anew(self) -> None:
        """Go on with programs that are sound: these, or new ones."""
        try:
            await self._check()
            await self._settled()
        except Violation:
            await self._target.stop()
            await self._target.start()
            await self._warm_up()


def _named(what: str) -> range:
    """The input that a finding's text begins with, if it does."""
    named = re.match(r"input (\d+)", what)
    index = int(named[1]) if named else 0
    return range(index, index + 1) if named else range(0)
