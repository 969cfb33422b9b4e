"""One product with the LM head for all sequences whose steps ended together.

The head is by far the largest matrix of an edge, and reading it takes the time: for eight rows
hardly more than for one.
"""

from __future__ import annotations

import asyncio

import torch

from privatelora.runtime.language_model import Ends


class SharedHead:
    """Collects final hidden states until the event loop has seen to all that is due."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._waiting: list[tuple[torch.Tensor, asyncio.Future[torch.Tensor]]] = []

    async def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See ``Ends.logits``."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            # Whoever was woken together with this one comes before the callback.
            loop.call_soon(self._run)
        result: asyncio.Future[torch.Tensor] = loop.create_future()
        self._waiting.append((hidden_states, result))
        return await result

    def _run(self) -> None:
        waiting = [one for one in self._waiting if not one[1].done()]  # else it was cancelled
        self._waiting = []
        if not waiting:
            return
        try:
            together = self._ends.logits(torch.cat([hidden_states for hidden_states, _ in waiting]))
        except Exception as error:  # no memory left: each of them has to learn of it
            for _, result in waiting:
                result.set_exception(error)
            return
        sizes = [len(hidden_states) for hidden_states, _ in waiting]
        for (_, result), logits in zip(waiting, together.split_with_sizes(sizes), strict=True):
            result.set_result(logits)
