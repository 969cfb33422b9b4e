"""Runs lm-evaluation-harness on one model and prints what it found, as JSON.

A program of its own: the harness and what it imports warn of much, and tests take no warnings.

    python -m tests.e2e.lm_eval_run edge URL TOKENIZER          the edge's API
    python -m tests.e2e.lm_eval_run transformers MODEL SHARDS   the same weights in this process
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

TASK = "common_things"
FOLDER = Path(__file__).parent / "lm_eval_task"
ITEMS = FOLDER / f"{TASK}.jsonl"


def edge_model(url: str, tokenizer: str) -> Any:
    """The harness' own class for servers like OpenAI's."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="adapter",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        num_concurrent=4,
        max_retries=1,
    )


def transformers_model(model: str, shards: str) -> Any:
    """The harness' own class for transformers, with the adapter inside the model."""
    from lm_eval.models.huggingface import HFLM

    from privatelora.benchmarks.worker import TransformersEngine, WorkerConfig
    from privatelora.partition.tokenizer import load_tokenizer

    place = Path(shards)
    engine = TransformersEngine(
        WorkerConfig(
            engine="transformers",
            model=model,
            shards=place,
            adapter=place / "adapter.safetensors",
            dtype="float32",
            num_threads=1,
        )
    )
    tokenizer: Any = load_tokenizer(place / "edge" / "tokenizer")
    return HFLM(pretrained=engine._model, tokenizer=tokenizer, batch_size=1, device="cpu")


def main() -> None:
    """Evaluate and print one line."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    kind, *arguments = sys.argv[1:]
    model = (edge_model if kind == "edge" else transformers_model)(*arguments)
    task = yaml.safe_load((FOLDER / f"{TASK}.yaml").read_text())
    task["dataset_kwargs"] = {"data_files": {"test": str(ITEMS)}}
    found: Any = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=TaskManager(include_defaults=False)
    )
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    result = {
        "acc": found["results"][TASK]["acc,none"],
        "loglikelihoods": [[resp[0] for resp in s["filtered_resps"]] for s in samples],
        "are_greedy": [[bool(resp[1]) for resp in s["filtered_resps"]] for s in samples],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
