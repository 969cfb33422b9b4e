"""Rows of two kinds in every batch: what is to be learnt, and what is to be kept."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from privatelora.errors import ConfigError


class MixedSampler(Sampler[int]):
    """Indices into task examples followed by general ones, for batches of ``batch_size`` in order.

    Each batch takes ``round(share * batch_size)`` general rows, but at least one, and the rest from
    the task. An epoch shows every task example once (its last batch is filled up from the start of
    the same shuffle); general examples are gone through from epoch to epoch, each as often as the
    others. The order is a function of seed and epoch alone, so a resumed run, which skips the
    batches of its epoch that were trained on, goes on with those that were not.
    """

    def __init__(
        self, num_task: int, num_general: int, *, batch_size: int, share: float, seed: int
    ) -> None:
        """Raise ConfigError if a batch cannot hold both kinds, or there is none of one."""
        super().__init__()
        if batch_size < 2:
            raise ConfigError(
                "a batch of 1 cannot hold a task example and a general one; use a batch size of at "
                "least 2, or a replay_share of 0"
            )
        if num_task < 1 or num_general < 1:
            raise ConfigError(
                f"there are {num_task} task examples and {num_general} general ones; a mixture "
                "needs both"
            )
        self._num_task = num_task
        self._num_general = num_general
        self._general_rows = min(max(1, round(share * batch_size)), batch_size - 1)
        self._task_rows = batch_size - self._general_rows
        self._seed = seed
        self._epoch = 0

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        return -(-self._num_task // self._task_rows)

    def set_epoch(self, epoch: int) -> None:
        """Go on with the order of this epoch; the Trainer says it before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * (self._task_rows + self._general_rows)

    def __iter__(self) -> Iterator[int]:
        task = self._shuffle("task", self._epoch, self._num_task)
        general: list[int] = []
        first = self._epoch * self.num_batches * self._general_rows
        for batch in range(self.num_batches):
            for row in range(batch * self._task_rows, (batch + 1) * self._task_rows):
                yield task[row % self._num_task]
            for row in range(self._general_rows):
                turn, place = divmod(first + batch * self._general_rows + row, self._num_general)
                if not general or place == 0:
                    general = self._shuffle("general", turn, self._num_general)
                yield self._num_task + general[place]

    def _shuffle(self, kind: str, turn: int, count: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self._seed} {kind} {turn}").shuffle(order)
        return order
