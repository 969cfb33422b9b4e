"""One engine in a process of its own, measured on request over lines of JSON.

    -> {"prompt_tokens": 64, "warmup_tokens": 8, "tokens": 64}
    <- {"event": "measured", "tokens_per_s": 43.2}

Each engine has its process, so that none profits or suffers from another's threads and memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from privatelora.cli._app import run as run_program
from privatelora.yaml_file import read_yaml

EngineName = Literal["split", "unsplit", "transformers"]


class WorkerConfig(BaseModel):
    """What to run; written by the benchmark that starts the worker."""

    model_config = ConfigDict(extra="forbid")

    engine: EngineName
    model: str
    shards: Path
    adapter: Path
    dtype: Literal["float32", "float16", "bfloat16"]
    num_threads: int
    edge_config: Path | None = None
    device: str = "cpu"
    """Of the transformers engine."""


class MeasureRequest(BaseModel):
    """How much to decode. The prompt's ids are arbitrary; end-of-sequence is never chosen."""

    model_config = ConfigDict(extra="forbid")

    prompt_tokens: int
    warmup_tokens: int
    tokens: int

    @property
    def prompt_ids(self) -> list[int]:
        """A prompt of exactly the length asked for."""
        return [100 + 7 * i % 1000 for i in range(self.prompt_tokens)]

    def rate(self, times: list[float]) -> float:
        """Tokens per second from the moments tokens came, the first ones left out."""
        counted = times[self.warmup_tokens :]
        return (len(counted) - 1) / (counted[-1] - counted[0])


class OurEngine:
    """The split or the unsplit engine, through the product's own generation loop."""

    def __init__(self, config: WorkerConfig) -> None:
        from privatelora.runtime.config import load_edge_config
        from privatelora.runtime.edge import Edge
        from privatelora.runtime.unsplit import open_unsplit

        if config.edge_config is not None:
            self.text = Edge(load_edge_config(config.edge_config)).text
        else:
            self.text = open_unsplit(str(config.shards), adapter=config.adapter, dtype=config.dtype)

    async def measure(self, request: MeasureRequest) -> float:
        """Decode greedily and return tokens per second."""
        from privatelora.runtime.generation import Context, GenerationStats, generate_tokens
        from privatelora.runtime.sampling_params import SamplingParams

        num_tokens = request.warmup_tokens + request.tokens + 1
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        context = await Context.open(self.text.model, request.prompt_tokens + num_tokens)
        times: list[float] = []
        try:
            async for _ in generate_tokens(
                context, request.prompt_ids, params, self.text.eos_ids, GenerationStats()
            ):
                times.append(time.perf_counter())  # noqa: PERF401 - the moment matters
        finally:
            await context.aclose()
        return request.rate(times)


class TransformersEngine:
    """transformers' ``generate`` on the same model with the same adapter inside."""

    def __init__(self, config: WorkerConfig) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from privatelora.benchmarks.baseline import attach_adapter
        from privatelora.partition.adapter import read_adapter
        from privatelora.partition.checkpoint import open_checkpoint
        from privatelora.partition.shard import open_shard
        from privatelora.runtime.device import compute_device

        # Dense weights in the dtype asked for, whatever the checkpoint is: packed ones are slower.
        with open_checkpoint(config.model) as checkpoint:
            source = checkpoint.tokenizer_source
            options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
            settings = AutoConfig.from_pretrained(
                source.directory, local_files_only=True, **options
            )
            settings.quantization_config = None
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, dtype=getattr(torch, config.dtype)
            )
            weights = {name: checkpoint.read(name) for name in checkpoint.names()}
            model.load_state_dict(weights, strict=False)  # a tied head is not listed
            model.tie_weights()
            model.eval()
        adapter = read_adapter(config.adapter)
        basis = {
            **open_shard(config.shards / "cloud", "cloud").load(),
            **open_shard(config.shards / "edge", "edge").load(),
        }
        model.to(compute_device(config.device))
        self._model = attach_adapter(model, adapter.plan, basis, adapter.weights)

    async def measure(self, request: MeasureRequest) -> float:
        """Decode greedily and return tokens per second."""
        import torch
        from transformers.generation.streamers import BaseStreamer

        class Clock(BaseStreamer):
            def __init__(self) -> None:
                self.times: list[float] = []

            def put(self, value: Any) -> None:
                self.times.append(time.perf_counter())

            def end(self) -> None:
                pass

        clock = Clock()
        num_tokens = request.warmup_tokens + request.tokens + 1
        ids = torch.tensor([request.prompt_ids], device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
        )
        return request.rate(clock.times[1:])  # the first call hands over the prompt


def main() -> None:
    """Load the engine of the YAML file named on the command line and serve requests."""
    config = read_yaml(Path(sys.argv[1]), WorkerConfig)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from privatelora.cli._input import read_lines
    from privatelora.runtime.loop import run

    torch.set_num_threads(config.num_threads)
    torch.set_grad_enabled(False)
    engine = TransformersEngine(config) if config.engine == "transformers" else OurEngine(config)

    async def serve(lines: AsyncIterator[str]) -> None:
        print(json.dumps({"event": "ready"}), flush=True)
        async for line in lines:
            rate = await engine.measure(MeasureRequest.model_validate_json(line))
            print(json.dumps({"event": "measured", "tokens_per_s": rate}), flush=True)

    run(serve(read_lines()))


if __name__ == "__main__":
    run_program(main)
