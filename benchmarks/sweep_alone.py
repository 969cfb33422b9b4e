"""Whole models in one place, for ``privatelora-bench sweep``: what no network slows down."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from privatelora.benchmarks.serve import NUM_SKIPPED, write_settings
from privatelora.benchmarks.sweep_config import SweepConfig
from privatelora.benchmarks.worker import MeasureRequest
from privatelora.cli._daemons import Daemon
from privatelora.errors import ConfigError


def measure_alone(config: SweepConfig, shards: Path, baseline: str) -> float:
    """Tokens/s of transformers or llama.cpp, in a process of its own.

    Raises PrivateLoRAError for what is not installed, or does not take this model.
    """
    if baseline == "llama.cpp":
        return _llama_cpp(config)
    file = write_settings(
        shards / "transformers.yaml",
        {
            "engine": "transformers",
            "model": config.model,
            "shards": str(shards),
            "adapter": str(shards / "adapter.safetensors"),
            "dtype": config.dtype,
            "num_threads": config.num_threads,
            "device": config.device if baseline == "transformers-cloud" else "cpu",
        },
    )
    request = MeasureRequest(
        prompt_tokens=config.prompt_tokens, warmup_tokens=NUM_SKIPPED, tokens=config.tokens
    )
    with Daemon("privatelora.benchmarks.worker", file) as worker:
        worker.read_event("ready")
        worker.write_line(json.dumps(request.model_dump()))
        return float(worker.read_event("measured")["tokens_per_s"])


def _llama_cpp(config: SweepConfig) -> float:
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError("llama.cpp is not installed: pip install llama-cpp-python")
    from privatelora.partition.checkpoint import open_checkpoint

    with open_checkpoint(config.model) as checkpoint:
        source = checkpoint.tokenizer_source
        if source.gguf_file is None:
            raise ConfigError(f"llama.cpp takes GGUF files, which {config.model} is not")
        gguf = Path(source.directory) / source.gguf_file
    with Daemon(
        "privatelora.benchmarks.llama_cpp_worker",
        gguf,
        str(config.num_threads),
        str(config.prompt_tokens),
        str(NUM_SKIPPED + config.tokens),
    ) as worker:
        times = [float(moment) for moment in worker.read_event("decoded")["times"]]
    counted = times[NUM_SKIPPED:]
    return (len(counted) - 1) / (counted[-1] - counted[0])
