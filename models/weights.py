"""Load a Hugging Face safetensors checkpoint into a Decoder, tensor by tensor.

The decoder is built on the meta device, compared with the checkpoint's headers, given empty storage, and only
then filled; so a wrong checkpoint fails before memory is spent, and a right one is in memory once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pdengine.models.checkpoint import CheckpointError, weight_files
from pdengine.models.config import ModelConfig
from pdengine.models.decoder import Decoder, DecoderLayer

BYTES_BY_DTYPE = {"F32": 4, "BF16": 2, "F16": 2}  # safetensors' names


def load_decoder(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Read the weights in `directory` into a new Decoder on `device`, converted to `dtype`.

    `progress(done_bytes, total_bytes)` is called after each tensor, in bytes of the checkpoint. Raises
    CheckpointError, naming the file or tensor, when the checkpoint and `config` do not match exactly.
    """
    directory = Path(directory)
    with torch.device("meta"):
        decoder = Decoder(config, dtype)
    sources = _check_headers(directory, config, _destinations(decoder))

    decoder.to_empty(device=device)
    decoder.inverse_frequencies = decoder.inverse_frequencies.to(device)
    decoder.requires_grad_(False).eval()
    destinations = _destinations(decoder)
    total_bytes = sum(size for sizes in sources.values() for size in sizes.values())
    done_bytes = 0
    for path, sizes in sources.items():
        with _open(path) as tensors:
            for name, size in sizes.items():
                destinations[name].copy_(tensors.get_tensor(name))
                done_bytes += size
                if progress is not None:
                    progress(done_bytes, total_bytes)
    return decoder


def _check_headers(
    directory: Path, config: ModelConfig, expected: dict[str, Tensor]
) -> dict[Path, dict[str, int]]:
    """Compare names, shapes and dtypes with `expected`; returns the bytes of each wanted tensor by file."""
    sources: dict[Path, dict[str, int]] = {}
    missing = dict.fromkeys(expected)
    for path in weight_files(directory):
        sizes = sources.setdefault(path, {})
        with _open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name not in expected:
                    if _is_harmless_extra(name, config):
                        continue
                    raise CheckpointError(f"{path}: tensor {name} is not part of a {config.architecture}")
                if name not in missing:
                    raise CheckpointError(f"{path}: tensor {name} is also in another shard")
                del missing[name]
                header = tensors.get_slice(name)
                sizes[name] = _check_tensor(path, name, header, expected[name])
    if missing:
        name = next(iter(missing))
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory}: tensor {name} is missing{others}")
    return sources


def _check_tensor(path: Path, name: str, header: Any, expected: Tensor) -> int:
    shape: tuple[int, ...] = tuple(header.get_shape())
    dtype: str = header.get_dtype()
    if shape != tuple(expected.shape):
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(shape)}, but config.json implies {list(expected.shape)}"
        )
    if dtype not in BYTES_BY_DTYPE:
        supported = ", ".join(BYTES_BY_DTYPE)
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}; supported are {supported}")
    return math.prod(shape) * BYTES_BY_DTYPE[dtype]


def _is_harmless_extra(name: str, config: ModelConfig) -> bool:
    # Llama 2 checkpoints carry the frequencies that we compute; tied ones may carry the embeddings twice.
    is_tied_copy = name == "lm_head.weight" and config.tie_word_embeddings
    return is_tied_copy or name.endswith(".rotary_emb.inv_freq")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


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
        for name, tensor in _layer_destinations(layer).items():
            destinations[f"model.layers.{index}.{name}"] = tensor
    return destinations


def _layer_destinations(layer: DecoderLayer) -> dict[str, Tensor]:
    attention, mlp = layer.attention, layer.mlp
    destinations: dict[str, Tensor] = {
        "input_layernorm.weight": layer.input_norm.weight,
        "post_attention_layernorm.weight": layer.post_attention_norm.weight,
    }
    if attention.query_norm is not None and attention.key_norm is not None:
        destinations["self_attn.q_norm.weight"] = attention.query_norm.weight
        destinations["self_attn.k_norm.weight"] = attention.key_norm.weight
    qkv_rows = [heads * attention.head_dim for heads in attention.head_counts]
    gate_up_rows = [mlp.down_proj.in_features] * 2
    fused: list[tuple[nn.Linear, list[str], list[int]]] = [
        (attention.qkv_proj, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], qkv_rows),
        (attention.output_proj, ["self_attn.o_proj"], [attention.output_proj.out_features]),
        (mlp.gate_up_proj, ["mlp.gate_proj", "mlp.up_proj"], gate_up_rows),
        (mlp.down_proj, ["mlp.down_proj"], [mlp.down_proj.out_features]),
    ]
    for linear, names, rows in fused:
        for kind, parameter in linear.named_parameters():  # "weight", and "bias" where there is one
            for name, part in zip(names, torch.split(parameter, rows), strict=True):
                destinations[f"{name}.{kind}"] = part
    return destinations
