"""Partitioning needs memory for one tensor, not for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.partition.tiny import save_tiny

MIB = 2**20

# Anonymous memory is what the work needs; pages of mapped files are the system's to take back.
MEASURE = """
import json, re, sys, threading
from pathlib import Path
import torch
from tests.partition.shards import split

torch.set_num_threads(1)

STATUS = Path("/proc/self/status")

def anonymous_nbytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", STATUS.read_text())[1])

warm_up, model, out, options = sys.argv[1:]
options = json.loads(options)
split(Path(warm_up), Path(out) / "warm", **options | {"dtype": torch.float16, "rank": 8})

peak = before = anonymous_nbytes()
ended = threading.Event()

def watch():
    global peak
    while not ended.wait(0.0005):
        peak = max(peak, anonymous_nbytes())

watcher = threading.Thread(target=watch)
watcher.start()
split(Path(model), Path(out) / "measured", **options | {"dtype": torch.float16})
ended.set()
watcher.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """220 MiB of float32 in tensors of at most 4 MiB."""
    path = tmp_path_factory.mktemp("large")
    size: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
    }
    save_tiny("llama-tied", path, num_hidden_layers=1, num_key_value_heads=16, **size)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 8}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.norm.weight": torch.ones(1024),
        "model.embed_tokens.weight": torch.ones(199, 1024),
    }
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(1024, 1024, generator=generator)
    for layer in range(8):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(1024)
        for part in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        ):
            tensors[f"model.layers.{layer}.{part}_proj.weight"] = square.clone()
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({"basis": "random", "rank": 64}, (4 + 32) * MIB, id="random"),
        pytest.param(
            {"basis": "svd", "rank": 64, "layers": "0,3", "every": 2},
            (4 + 32 + 40 + 16) * MIB,
            id="svd",
        ),
    ],
)
def test_peak_memory_is_bounded_by_one_tensor(
    large_model: Path, tiny_llama: Path, tmp_path: Path, options: dict[str, object], bound: int
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tiny_llama, large_model, tmp_path, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < bound
