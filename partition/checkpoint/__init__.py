"""Lazy readers of published models: Hugging Face directories and GGUF files."""

from privatelora.partition.checkpoint.base import Checkpoint, TokenizerSource
from privatelora.partition.checkpoint.locate import open_checkpoint

__all__ = ["Checkpoint", "TokenizerSource", "open_checkpoint"]
