"""Loading a whole model with its adapter into one process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from privatelora.partition.adapter import Adapter, check_adapter, load_adapter, read_adapter
from privatelora.partition.basis import BasisFingerprint
from privatelora.partition.checkpoint import open_checkpoint
from privatelora.partition.manifest import MANIFEST_NAME, check_pair
from privatelora.partition.models.config import DecoderConfig
from privatelora.partition.models.families import tensor_names
from privatelora.partition.shard import open_shard
from privatelora.partition.split import ModelFingerprint, make_basis, natural_dtype
from privatelora.partition.tokenizer import export_tokenizer, load_tokenizer
from privatelora.runtime.chat import TextModel
from privatelora.runtime.config import DtypeName
from privatelora.runtime.device import compute_device, compute_dtype
from privatelora.runtime.engine import Engine
from privatelora.runtime.exchange import PrivateMatrices
from privatelora.runtime.language_model import Ends, UnsplitModel

Tensors = dict[str, torch.Tensor]


def open_unsplit(
    model: str,
    *,
    adapter: Path | None = None,
    basis: str = "svd",
    seed: int = 0,
    device: str = "cpu",
    dtype: DtypeName = "auto",
) -> TextModel:
    """Load ``model`` and, if given, the adapter made for it.

    ``model``: a directory that ``privatelora partition`` wrote, or anything it can read; for
    the latter the adapter's ``basis`` (and ``seed``) is made again, and has to come out as the
    one the adapter was made for. Raises PartitionError or ConfigError.
    """
    on = compute_device(device)
    if (Path(model) / "cloud" / MANIFEST_NAME).is_file():
        return _from_shards(Path(model), adapter, on, dtype)
    return _from_checkpoint(model, adapter, basis, seed, on, dtype)


def _from_shards(
    directory: Path, adapter_file: Path | None, device: torch.device, dtype_name: DtypeName
) -> TextModel:
    cloud, edge = open_shard(directory / "cloud", "cloud"), open_shard(directory / "edge", "edge")
    manifest = cloud.manifest
    check_pair(manifest.fingerprints, edge.manifest.fingerprints)
    adapter = None
    if adapter_file is not None:
        fingerprints = manifest.fingerprints
        adapter = load_adapter(adapter_file, manifest.plan, fingerprints.basis, fingerprints.model)
    dtype = compute_dtype(dtype_name, manifest.dtype)
    tensors = {**cloud.load(device, dtype), **edge.load(device, dtype)}
    return _text_model(manifest.config, adapter, tensors, edge.tokenizer_dir, device, dtype)


def _from_checkpoint(
    model: str,
    adapter_file: Path | None,
    basis_source: str,
    seed: int,
    device: torch.device,
    dtype_name: DtypeName,
) -> TextModel:
    with open_checkpoint(model) as checkpoint, tempfile.TemporaryDirectory() as tokenizer_dir:
        config = checkpoint.config
        natural = str(natural_dtype(checkpoint)).removeprefix("torch.")
        dtype = compute_dtype(dtype_name, natural)
        tensors: Tensors = {}
        model_fingerprint = ModelFingerprint(config)
        for name in tensor_names(config):
            tensor = checkpoint.read(name)
            if adapter_file is not None:
                model_fingerprint.add(name, tensor)
            tensors[name] = tensor.to(device, dtype)
        adapter = None
        if adapter_file is not None:
            adapter = read_adapter(adapter_file)
            adapter.plan.check_model(config)
            basis_fingerprint = BasisFingerprint()
            basis = make_basis(basis_source, adapter.plan, checkpoint, seed=seed)
            for name, tensor in basis.tensors():
                basis_fingerprint.add(name, tensor)
                tensors[name] = tensor.to(device, dtype)
            check_adapter(
                adapter,
                str(adapter_file),
                adapter.plan,
                basis_fingerprint.hexdigest(),
                model_fingerprint.hexdigest(),
            )
        export_tokenizer(checkpoint, Path(tokenizer_dir))
        return _text_model(config, adapter, tensors, Path(tokenizer_dir), device, dtype)


def _text_model(
    config: DecoderConfig,
    adapter: Adapter | None,
    tensors: Tensors,
    tokenizer_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> TextModel:
    plan = adapter.plan if adapter is not None else None
    matrices = None
    if adapter is not None:
        matrices = PrivateMatrices(adapter.plan, adapter.weights, device)
    engine = Engine(config, plan, range(config.num_layers), tensors, device, dtype)
    return TextModel(
        UnsplitModel(Ends(config, tensors), engine, matrices), load_tokenizer(tokenizer_dir)
    )
