"""Bad folders of the PEFT library, and bad requests to project one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.e2e.bad_files import Harmful
from tests.e2e.bad_input_bench import RANKS, Bench, Cases, Seen
from tests.e2e.processes import MAIN

CASES = Cases()
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def folder(bench: Bench, *, in_features: int = 64, **settings: object) -> Path:
    """A LoRA of rank 2 on one projection of the bench's model, as PEFT writes it."""
    lora = bench.fresh() / "lora"
    lora.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{NAME}.lora_A.weight": torch.ones(2, in_features),
        f"{NAME}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(tensors, lora / "adapter_model.safetensors")
    return lora


def project(bench: Bench, lora: object, *options: object) -> Seen:
    """Run ``privatelora adapter from-peft``, which must leave nothing behind."""
    out = bench.fresh() / "out"
    arguments = (lora, out, "--model", bench.model, *RANKS, *options)
    result = bench.commands.run(MAIN, "adapter", "from-peft", *arguments)
    assert not out.exists()
    return bench.seen("privatelora adapter from-peft", result)


def _with(bench: Bench, settings: dict[str, Any]) -> Seen:
    return project(bench, folder(bench, **settings))


CASES.add(
    "LoRA that is no folder of PEFT",
    "is not a PEFT adapter: it has no adapter_config.json",
    lambda b: project(b, b.model),
)
for _settings, _printed in (
    ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; only LORA can be projected"),
    ({"in_features": 65}, "has shape (64, 65) there and (64, 64) in this model"),
    ({"r": 3}, "has rank 2, adapter_config.json says 3"),
    ({"rank_pattern": {"(x+x+)+y": 2}}, "is too complicated to be read safely"),
):
    CASES.add(
        f"LoRA with `{_settings}`",
        _printed,
        partial(_with, settings=_settings),
    )


@CASES.case("LoRA in a file with a header of a terabyte", "is damaged, cut short, or not a")
def _huge_header(bench: Bench) -> Seen:
    lora = folder(bench)
    header = (1 << 40).to_bytes(8, "little")
    (lora / "adapter_model.safetensors").write_bytes(header + b"{" * 100)
    return project(bench, lora)


@CASES.case("LoRA in a .bin that would execute code", "nothing in it was executed")
def _harmful_lora(bench: Bench) -> Seen:
    lora = folder(bench)
    (lora / "adapter_model.safetensors").unlink()
    torch.save({"a": Harmful(lora / "trap")}, lora / "adapter_model.bin")
    seen = project(bench, lora)
    assert not (lora / "trap").exists()
    return seen


@CASES.case("LoRA, and text to fit it to that is not text", "is not UTF-8 text (byte 0)")
def _binary_text(bench: Bench) -> Seen:
    lora = folder(bench)
    return project(bench, lora, "--calibration", lora / "adapter_model.safetensors")
