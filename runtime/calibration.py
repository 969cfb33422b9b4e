"""A whole model run on text to see what is inside it: for fitting an adapter, and judging one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from privatelora.errors import PartitionError
from privatelora.partition.adapter import Adapter
from privatelora.partition.basis import BasisFingerprint, basis_shapes, lora_a_name, lora_b_name
from privatelora.partition.checkpoint import Checkpoint, open_checkpoint
from privatelora.partition.from_peft_file import Change, Read
from privatelora.partition.manifest import TENSORS_NAME, Manifest, check_pair
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import EMBED_TOKENS, LM_HEAD, tensor_names
from privatelora.partition.plan import Plan
from privatelora.partition.shard import open_shard
from privatelora.partition.split import ModelFingerprint, make_basis
from privatelora.partition.tensor_file import open_tensor_file, sha256_of
from privatelora.partition.tokenizer import export_tokenizer, is_panic, load_tokenizer
from privatelora.runtime.engine import Engine
from privatelora.runtime.exchange import PrivateMatrices, run_locally
from privatelora.runtime.language_model import Ends

Tokens = Sequence[int]
Basis = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, read tensor by tensor: memory holds only what is being run.

    ``read``: also gives ``lm_head.weight`` where that is tied to the embedding.
    """

    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    read: Read

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. Raises PartitionError if the tokenizer cannot take it apart."""
        try:
            return list(self.tokenizer.encode(text))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise PartitionError(
                f"the model's tokenizer cannot take the text apart ({error})"
            ) from error


@contextmanager
def open_model(model: str) -> Iterator[tuple[ModelSource, Checkpoint]]:
    """Open anything that ``privatelora partition`` takes. Raises PartitionError."""
    with open_checkpoint(model) as checkpoint, tempfile.TemporaryDirectory() as directory:
        export_tokenizer(checkpoint, Path(directory))
        tokenizer = load_tokenizer(Path(directory))
        read = _with_tied_head(checkpoint.config, checkpoint.read)
        yield ModelSource(checkpoint.config, tokenizer, read), checkpoint


@contextmanager
def open_shards(directory: Path) -> Iterator[tuple[ModelSource, Manifest, Basis]]:
    """Open both shards in a directory, with their basis. Raises PartitionError."""
    cloud, edge = open_shard(directory / "cloud", "cloud"), open_shard(directory / "edge", "edge")
    check_pair(cloud.manifest.fingerprints, edge.manifest.fingerprints)
    config = cloud.manifest.config
    with ExitStack() as stack:
        files = [
            (stack.enter_context(open_tensor_file(shard.directory / TENSORS_NAME)), shard)
            for shard in (cloud, edge)
        ]

        def read(name: str) -> torch.Tensor:
            file, shard = next(item for item in files if name in item[0].names)
            tensor = file.read(name)
            if sha256_of(tensor) != shard.manifest.tensors[name].sha256:
                raise PartitionError(f"{file.path}: tensor {name} is damaged; copy it again")
            return tensor

        basis = {name: read(name).float() for name in basis_shapes(cloud.manifest.plan, config)}
        tokenizer = load_tokenizer(edge.tokenizer_dir)
        yield ModelSource(config, tokenizer, _with_tied_head(config, read)), cloud.manifest, basis


def public_basis(
    checkpoint: Checkpoint, plan: Plan, source: str, seed: int
) -> tuple[Basis, str, str]:
    """Every A and B of a plan by name, float32; the basis' and the model's fingerprint.

    ``source``: ``svd``, ``random`` (from ``seed``) or a file. Raises PartitionError or
    ConfigError.
    """
    digest = BasisFingerprint()
    basis: Basis = {}
    for name, tensor in make_basis(source, plan, checkpoint, seed=seed).tensors():
        digest.add(name, tensor)
        basis[name] = tensor
    model = ModelFingerprint(checkpoint.config)
    for name in checkpoint.names():
        model.add(name, checkpoint.read(name))
    return basis, digest.hexdigest(), model.hexdigest()


class WholeModel:
    """All layers in float32 in this process, with an adapter or without."""

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        *,
        changes: Mapping[str, Change] | None = None,
        adapter: Adapter | None = None,
        basis: Basis | None = None,
    ) -> None:
        """Read the weights. ``changes``: made to parameters. ``adapter``: with its ``basis``."""
        config, tensors = _tensors(source, changes or {}, device)
        plan = None if adapter is None else adapter.plan
        for name, tensor in (basis or {}).items():
            tensors[name] = tensor.to(device)
        self._ends = Ends(config, tensors)
        layers = range(config.num_layers)
        self._engine = Engine(config, plan, layers, tensors, device, torch.float32)
        self._matrices = None
        if adapter is not None:
            self._matrices = PrivateMatrices(adapter.plan, adapter.weights, device)

    def log_probs(self, token_ids: Tokens) -> torch.Tensor:
        """Log-probabilities (n, vocab_size) of what follows every position, on the CPU."""
        kv = self._engine.new_cache(len(token_ids))
        step = self._engine.begin(self._ends.embed(token_ids), 0, kv)
        run_locally(self._engine, step, self._matrices)
        return torch.log_softmax(self._ends.logits(step.hidden_states), dim=-1).cpu()


class ListenedModel:
    """A frozen model that tells what every layer's q, k and v projections read.

    To the engine each layer is an exchange point whose A is the identity: what it ships there
    are the inputs themselves, and a reply of zeros changes nothing.
    """

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        """Read the weights."""
        config, tensors = _tensors(source, {}, device)
        layers = range(config.num_layers)
        size = config.hidden_size
        plan = Plan(
            num_layers=len(layers), layers=tuple(layers), targets=("q",), rank_up=size, rank_down=1
        )
        identity = torch.eye(size, device=device)
        silence = torch.zeros(config.projection_size("q"), 1, device=device)
        for point in plan.points:
            tensors[lora_a_name(point)] = identity
            tensors[lora_b_name(point.layer, "q")] = silence
        self._ends = Ends(config, tensors)
        self._engine = Engine(config, plan, layers, tensors, device, torch.float32)

    def inputs(self, texts: Sequence[Tokens]) -> dict[int, torch.Tensor]:
        """Inputs (all tokens, hidden_size) by layer, float32 on the CPU."""
        found: dict[int, list[torch.Tensor]] = {}
        for token_ids in texts:
            kv = self._engine.new_cache(len(token_ids))
            step = self._engine.begin(self._ends.embed(token_ids), 0, kv)
            while (point := self._engine.advance(step)) is not None:
                if step.z is None:
                    raise RuntimeError("the engine waits without having shipped anything")
                found.setdefault(point.layer, []).append(step.z.cpu())
                step.supply(point.layers, torch.zeros(len(token_ids), 1, device=step.z.device))
        return {layer: torch.cat(parts) for layer, parts in found.items()}


@dataclass(frozen=True)
class Divergence:
    """How far one model's predictions are from another's, as a mean over positions.

    ``kl``: KL(reference || model) in nats. ``top1_agreement``: share of positions with the
    same most likely token.
    """

    kl: float
    top1_agreement: float


def divergence(
    model: WholeModel, texts: Sequence[Tokens], reference: Sequence[torch.Tensor]
) -> Divergence:
    """Compare a model with the ``log_probs`` of a reference on the same texts."""
    kl, agreed, count = 0.0, 0, 0
    for token_ids, expected in zip(texts, reference, strict=True):
        found = model.log_probs(token_ids)
        kl += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        count += len(token_ids)
    return Divergence(max(kl / count, 0.0), agreed / count)


def _with_tied_head(config: DecoderConfig, read: Read) -> Read:
    if not config.tie_word_embeddings:
        return read
    return lambda name: read(EMBED_TOKENS if name == LM_HEAD else name)


def _tensors(
    source: ModelSource, changes: Mapping[str, Change], device: torch.device
) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """The model's tensors in float32 with changes made, and the configuration that fits them."""
    config = source.config
    if config.tie_word_embeddings and changes.keys() & {EMBED_TOKENS, LM_HEAD}:
        # A LoRA changes what it names, and not what shares its weight.
        config = config.model_copy(update={"tie_word_embeddings": False})
    tensors = {}
    for name in tensor_names(config):
        # Copied: what a checkpoint gives is backed by its file.
        tensor = source.read(name).to(device, torch.float32, copy=True)
        if name in changes:
            tensor += changes[name].delta(source.read).to(device)
        tensors[name] = tensor
    return config, tensors
