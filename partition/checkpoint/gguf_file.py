"""A GGUF file: its configuration and tensors, in Hugging Face terms."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from privatelora.errors import PartitionError
from privatelora.partition.checkpoint.base import Checkpoint, TokenizerSource, check_tensors
from privatelora.partition.checkpoint.gguf_config import ROPE_FACTORS, hf_config
from privatelora.partition.checkpoint.gguf_header import (
    GgufHeader,
    GgufTensor,
    map_file,
    parse_header,
)
from privatelora.partition.models.families import (
    EMBED_TOKENS,
    FINAL_NORM,
    LM_HEAD,
    Shape,
    from_hf_config,
    layer_prefix,
)

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# Dequantising works on copies; in parts, they stay small beside the tensor.
_ROWS_AT_ONCE = 1024

_TOP_NAMES = {
    "token_embd.weight": EMBED_TOKENS,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


class GgufCheckpoint(Checkpoint):
    """Reads a GGUF file. Raises PartitionError if it is damaged or unsupported.

    Plain tensors keep their dtype; quantised ones are read as float32, one at a time. A file
    made from Mistral says ``llama`` and no longer tells its sliding window, so it is run
    without one, as llama.cpp does.
    """

    def __init__(self, path: Path, source: str | None = None) -> None:
        """Map the file, parse its header and check all names, shapes and encodings."""
        self.source = str(path) if source is None else source
        self.tokenizer_source = TokenizerSource(path.parent, path.name)
        self._map = map_file(path)
        try:
            header = parse_header(self._map, self.source)
            factors = self._rope_factors(header)
            try:
                self.config = from_hf_config(hf_config(header, factors))
            except PartitionError as error:
                raise PartitionError(f"{self.source}: {error}") from error
            # llama.cpp pairs neighbouring rows for rotation in this architecture, Hugging
            # Face those half a head apart, so the rows of q and k come in another order.
            self._interleaved = header.metadata["general.architecture"] == "llama"
            self._tensors = {
                hf_name(name): tensor
                for name, tensor in header.tensors.items()
                if name != ROPE_FACTORS
            }
            check_tensors(
                self.config, {name: t.shape for name, t in self._tensors.items()}, self.source
            )
            self._check_encodings()
            self.quantised = any(t.encoding not in _PLAIN for t in self._tensors.values())
        except BaseException:
            self.close()
            raise

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a tensor is read as: float32 for a quantised one."""
        return _PLAIN.get(self._tensor(name).encoding, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """Read and, where needed, dequantise one tensor; the result owns its memory."""
        tensor = self._decode(self._tensor(name))
        if self._interleaved:
            heads = self._rotated_heads(name)
            if heads is not None:
                pairs = tensor.reshape(heads, self.config.head_dim // 2, 2, *tensor.shape[1:])
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def close(self) -> None:
        """Release the mapping; may be repeated."""
        self._map.close()

    def _tensor(self, name: str) -> GgufTensor:
        if self._map.closed:
            raise PartitionError(f"{self.source} is closed")
        if name not in self._tensors:
            raise PartitionError(f"{self.source} holds no tensor {name}")
        return self._tensors[name]

    def _rotated_heads(self, name: str) -> int | None:
        """Number of heads of a q or k projection's weight or bias; None for other tensors."""
        if ".q_proj." in name:
            return self.config.num_heads
        return self.config.num_kv_heads if ".k_proj." in name else None

    def _decode(self, tensor: GgufTensor) -> torch.Tensor:
        # Copied out at once: a view left behind by an error would keep the file mapped.
        with memoryview(self._map)[tensor.start : tensor.start + tensor.nbytes] as view:
            raw = bytearray(view)
        if tensor.encoding in _PLAIN:
            return torch.frombuffer(raw, dtype=_PLAIN[tensor.encoding]).reshape(tensor.shape)
        block_size, block_nbytes = GGML_QUANT_SIZES[tensor.encoding]
        row_nbytes = tensor.shape[-1] // block_size * block_nbytes
        rows = np.frombuffer(raw, np.uint8).reshape(-1, row_nbytes)
        values = np.empty((len(rows), tensor.shape[-1]), np.float32)
        with np.errstate(all="ignore"):
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                values[part] = dequantize(rows[part], tensor.encoding)
        return torch.from_numpy(values).reshape(tensor.shape)

    def _rope_factors(self, header: GgufHeader) -> npt.NDArray[np.float32] | None:
        """Llama 3's per-frequency factors, if the file carries them."""
        tensor = header.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        if tensor.encoding is not GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise PartitionError(f"{self.source}: {ROPE_FACTORS} is not a float32 vector")
        factors: npt.NDArray[np.float32] = self._decode(tensor).numpy()
        return factors

    def _check_encodings(self) -> None:
        """Refuse encodings that cannot be read before the first tensor is asked for."""
        for encoding in {tensor.encoding for tensor in self._tensors.values()} - set(_PLAIN):
            block_nbytes = GGML_QUANT_SIZES[encoding][1]
            try:
                dequantize(np.zeros((1, block_nbytes), np.uint8), encoding)
            except NotImplementedError as error:
                raise PartitionError(
                    f"{self.source}: tensors encoded as {encoding.name} are not supported; use a "
                    "file in F16, BF16, Q8_0 or a K quantisation"
                ) from error


def hf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor; a name without one is returned as it is."""
    layer = _LAYER_NAME.fullmatch(name)
    if layer and layer[2] in _LAYER_PARTS:
        return f"{layer_prefix(int(layer[1]))}{_LAYER_PARTS[layer[2]]}.{layer[3]}"
    return _TOP_NAMES.get(name, name)
