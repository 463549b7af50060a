"""Load a Hugging Face safetensors checkpoint into a Decoder, tensor by tensor.

The decoder is built on the meta device, compared with the checkpoint's headers, given empty storage, and only
then filled; so a wrong checkpoint fails before memory is spent, and a right one is in memory once. Files are
read, not mapped: one that shrinks meanwhile gives an error, where a mapping would end the process (SIGBUS).
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from pdengine.models.checkpoint import (
    INDEX_FILE,
    CheckpointError,
    open_regular_file,
    shown,
    weight_files,
)
from pdengine.models.config import PHI3, ModelConfig
from pdengine.models.decoder import Decoder, DecoderLayer
from pdengine.models.safetensors_header import TensorEntry, read_header
from pdengine.triton_kernels.kernels import Kernels, kernels_for

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
READ_BYTES = 4 * 2**20  # at once
CHECKED_BYTES = (
    2**16
)  # of each read, for NaN and infinity; to look at everything would cost a fifth of the time

logger = logging.getLogger(__name__)


def load_decoder(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Read the weights in `directory` into a new Decoder on `device`, converted to `dtype`.

    `kernels` are by default those of `device`. `progress(done_bytes, total_bytes)` is called after each
    tensor, in bytes of the checkpoint. Raises CheckpointError, naming the file or tensor, when the checkpoint
    and `config` do not match exactly. Warns of tensors with NaN or infinite values; only the first 64 KiB of
    each 4 MiB are looked at.
    """
    directory = Path(directory)
    with torch.device("meta"):
        decoder = Decoder(config, dtype, kernels or kernels_for(device))
    sources = _check_headers(directory, config, _destinations(decoder))

    _allocate(decoder, device)
    decoder.inverse_frequencies = decoder.inverse_frequencies.to(device)
    decoder.eval()
    destinations = _destinations(decoder)
    total_bytes = sum(entry.num_bytes for entries in sources.values() for entry in entries.values())
    done_bytes = 0
    buffer = torch.empty(READ_BYTES, dtype=torch.uint8)
    for path, entries in sources.items():
        with open_regular_file(path) as file:
            for name, entry in entries.items():
                if not _fill(destinations[name], file, path, entry, buffer):
                    logger.warning("%s: tensor %s has NaN or infinite values as %s", path, name, dtype)
                done_bytes += entry.num_bytes
                if progress is not None:
                    progress(done_bytes, total_bytes)
    return decoder


def _allocate(decoder: Decoder, device: torch.device) -> None:
    """Give every parameter memory on `device`, with undefined contents.

    What `Module.to_empty` does, without the second that its meta-device path spends on imports.
    """
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))


def _fill(destination: Tensor, file: BinaryIO, path: Path, entry: TensorEntry, buffer: Tensor) -> bool:
    """Read a tensor piece by piece through `buffer`; returns whether the values looked at are finite."""
    flat = destination.view(-1)  # a slice of whole rows is contiguous, too
    stored = buffer.view(DTYPES[entry.dtype])
    is_finite = True
    file.seek(entry.start)
    for first in range(0, flat.numel(), stored.numel()):
        part = flat[first : first + stored.numel()]
        num_bytes = part.numel() * stored.element_size()
        if file.readinto(buffer[:num_bytes].numpy()) != num_bytes:  # type: ignore[attr-defined]
            raise CheckpointError(f"{path}: the file has become shorter while it was read")
        part.copy_(stored[: part.numel()])
        is_finite = is_finite and _is_finite(part[: CHECKED_BYTES // part.element_size()])
    return is_finite


def _is_finite(values: Tensor) -> bool:
    # A sum is fast and shows every NaN and infinity; only one that overflows needs a second look.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _check_headers(
    directory: Path, config: ModelConfig, expected: dict[str, Tensor]
) -> dict[Path, dict[str, TensorEntry]]:
    """Compare names, shapes and dtypes with `expected`; returns the wanted tensors by file."""
    sources: dict[Path, dict[str, TensorEntry]] = {}
    missing = dict.fromkeys(expected)
    for path, indexed_names in weight_files(directory).items():
        with open_regular_file(path) as file:
            _, entries = read_header(file, path)
        for name in indexed_names:
            if name not in entries:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} is missing, though {INDEX_FILE} names it"
                )
        sources[path] = {}
        for name, entry in entries.items():
            if name not in expected:
                if _is_harmless_extra(name, config):
                    continue
                raise CheckpointError(f"{path}: tensor {name} is not part of a {config.architecture}")
            if name not in missing:
                raise CheckpointError(f"{path}: tensor {name} is also in another shard")
            del missing[name]
            _check_tensor(path, name, entry, expected[name])
            sources[path][name] = entry
    if missing:
        name = next(iter(missing))
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory}: tensor {name} is missing{others}")
    return sources


def _check_tensor(path: Path, name: str, entry: TensorEntry, expected: Tensor) -> None:
    if entry.shape != tuple(expected.shape):
        found, implied = list(entry.shape), list(expected.shape)
        raise CheckpointError(f"{path}: tensor {name} has shape {found}, but config.json implies {implied}")
    if entry.dtype not in DTYPES:
        supported = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: tensor {name} has dtype {entry.dtype}; supported are {supported}")


def _is_harmless_extra(name: str, config: ModelConfig) -> bool:
    # Llama 2 checkpoints carry the frequencies that we compute; tied ones may carry the embeddings twice.
    is_tied_copy = name == "lm_head.weight" and config.tie_word_embeddings
    return is_tied_copy or name.endswith(".rotary_emb.inv_freq")


def _destinations(decoder: Decoder) -> dict[str, Tensor]:
    """The checkpoint's tensor names, and the parameters or slices of fused parameters that they fill."""
    destinations: dict[str, Tensor] = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight,
        "model.norm.weight": decoder.norm.weight,
    }
    if decoder.lm_head is not None:
        destinations["lm_head.weight"] = decoder.lm_head.weight
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        for name, tensor in _layer_destinations(layer, decoder.config.architecture).items():
            destinations[f"model.layers.{index}.{name}"] = tensor
    return destinations


def _layer_destinations(layer: DecoderLayer, architecture: str) -> dict[str, Tensor]:
    attention, mlp = layer.attention, layer.mlp
    destinations: dict[str, Tensor] = {
        "input_layernorm.weight": layer.input_norm.weight,
        "post_attention_layernorm.weight": layer.post_attention_norm.weight,
    }
    if attention.query_norm is not None and attention.key_norm is not None:
        destinations["self_attn.q_norm.weight"] = attention.query_norm.weight
        destinations["self_attn.k_norm.weight"] = attention.key_norm.weight
    qkv_names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    qkv_rows = [heads * attention.head_dim for heads in attention.head_counts]
    gate_up_names = ["mlp.gate_proj", "mlp.up_proj"]
    gate_up_rows = [mlp.down_proj.in_features] * 2
    if architecture == PHI3:  # its checkpoints hold them fused, in the same order
        qkv_names, qkv_rows = ["self_attn.qkv_proj"], [sum(qkv_rows)]
        gate_up_names, gate_up_rows = ["mlp.gate_up_proj"], [sum(gate_up_rows)]
    fused: list[tuple[nn.Linear, list[str], list[int]]] = [
        (attention.qkv_proj, qkv_names, qkv_rows),
        (attention.output_proj, ["self_attn.o_proj"], [attention.output_proj.out_features]),
        (mlp.gate_up_proj, gate_up_names, gate_up_rows),
        (mlp.down_proj, ["mlp.down_proj"], [mlp.down_proj.out_features]),
    ]
    for linear, names, rows in fused:
        for kind, parameter in linear.named_parameters():  # "weight", and "bias" where there is one
            for name, part in zip(names, torch.split(parameter, rows), strict=True):
                destinations[f"{name}.{kind}"] = part
    return destinations
