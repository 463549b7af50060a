"""The KV cache: addresses that are exact beyond 2^31 elements, and memory that is only used when touched."""

from __future__ import annotations

import ctypes
import resource
from math import prod

import pytest
import torch

from pdengine.engine.kv_cache import DIMENSIONS, KVCache, dtype_name
from pdengine.engine.memory import kv_block_bytes
from pdengine.models.config import ModelConfig, RopeConfig
from pdengine.transport.regions import Run, copy_ranges
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.torch_attention import store_kv
from pdengine.triton_kernels.torch_kernels import TorchKernels

BLOCK_SIZE = 16
BLOCKS_BEYOND_INT32 = 2**31 // (8 * 32 * 2 * BLOCK_SIZE * 128) + 3  # of Llama-3-8B: 2 051


def make_config(num_layers: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=64,
        num_layers=num_layers,
        num_heads=4 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="float32",
        eos_token_ids=(),
        bos_token_id=None,
    )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=dtype_name)
def large(request: pytest.FixtureRequest) -> KVCache:
    """The pool of an 8B model, past 2^31 elements; pages that are not touched cost nothing."""
    config = make_config(num_layers=32, num_kv_heads=8, head_dim=128)
    return KVCache(config, num_blocks=BLOCKS_BEYOND_INT32, block_size=BLOCK_SIZE, dtype=request.param)


def test_the_description_is_exact(large: KVCache) -> None:
    region = large.describe()
    item_size = large.pool.element_size()
    assert large.pool.numel() > 2**31
    assert region.names == DIMENSIONS
    assert region.sizes == tuple(large.pool.shape) == (BLOCKS_BEYOND_INT32, 8, 32, 2, BLOCK_SIZE, 128)
    assert region.strides == tuple(stride * item_size for stride in large.pool.stride())
    assert region.strides == tuple(item_size * prod(region.sizes[axis + 1 :]) for axis in range(6))
    assert region.nbytes == large.pool.numel() * item_size
    assert region.dtype == dtype_name(large.pool.dtype)
    assert region.base_address == large.pool.data_ptr()
    assert region.remote_key == b""


def test_an_address_from_the_description_is_where_the_element_lies(large: KVCache) -> None:
    region = large.describe()
    index = (BLOCKS_BEYOND_INT32 - 1, 7, 31, 1, BLOCK_SIZE - 1, 127)
    large.pool[index] = 1.5
    address = region.base_address + sum(
        place * stride for place, stride in zip(index, region.strides, strict=True)
    )
    assert address == region.base_address + region.nbytes - large.pool.element_size()
    raw = ctypes.string_at(address, large.pool.element_size())
    assert torch.frombuffer(bytearray(raw), dtype=large.pool.dtype).item() == 1.5


def test_the_last_block_is_read_from_the_last_bytes(large: KVCache) -> None:
    """The copy that a pull makes, from the last block of one pool to the first of another."""
    config = make_config(num_layers=32, num_kv_heads=8, head_dim=128)
    small = KVCache(config, num_blocks=1, block_size=BLOCK_SIZE, dtype=large.pool.dtype)
    large.pool[-1] = torch.arange(128).to(large.pool.dtype)
    ((local, remote, length),) = copy_ranges(
        large.describe(), small.describe(), [Run(BLOCKS_BEYOND_INT32 - 1, 0, 1)]
    ).tolist()
    ctypes.memmove(local, remote, length)
    assert torch.equal(small.pool[0], large.pool[-1])


def test_keys_and_values_in_the_last_block_are_stored_and_read_back(large: KVCache) -> None:
    last = BLOCKS_BEYOND_INT32 - 1
    batch = AttentionBatch(
        block_ids=torch.tensor([last, last]),
        block_offsets=torch.tensor([0, 1]),
        block_tables=torch.tensor([[last]]),
        query_starts=torch.tensor([0, 2]),
        context_lengths=torch.tensor([2]),
        query_starts_on_host=[0, 2],
        context_lengths_on_host=[2],
        num_decodes=0,
    )
    key, value = torch.randn(2, 2, 8, 128, generator=torch.Generator().manual_seed(0)).to(large.pool.dtype)
    store_kv(large.pool, 31, key, value, batch.block_ids, batch.block_offsets)
    assert torch.equal(large.pool[last, :, 31, 0, :2], key.transpose(0, 1))
    assert torch.equal(large.pool[last, :, 31, 1, :2], value.transpose(0, 1))
    query = torch.zeros(2, 32, 128, dtype=large.pool.dtype)  # every score is equal: the mean of the values
    output = TorchKernels().paged_attention(query, large.pool, 31, batch, scale=1.0).float()
    torch.testing.assert_close(output[0], value[0].float().repeat_interleave(4, dim=0))
    mean = value.float().mean(dim=0).repeat_interleave(4, dim=0)
    torch.testing.assert_close(output[1], mean, atol=2e-2, rtol=2e-2)


def test_memory_that_no_sequence_used_is_not_resident() -> None:
    config = make_config(num_layers=32, num_kv_heads=8, head_dim=128)
    before = resident_bytes()
    cache = KVCache(config, num_blocks=BLOCKS_BEYOND_INT32, block_size=BLOCK_SIZE, dtype=torch.float32)
    cache.pool[-1] = 1.0
    one = kv_block_bytes(config, block_size=BLOCK_SIZE, item_bytes=4)
    assert cache.pool.numel() * 4 == BLOCKS_BEYOND_INT32 * one
    assert resident_bytes() - before < 16 * one


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_the_bytes_of_a_block() -> None:
    llama_8b = make_config(num_layers=32, num_kv_heads=8, head_dim=128)
    assert kv_block_bytes(llama_8b, block_size=16, item_bytes=2) == 2 * 2**20
    cache = KVCache(llama_8b, num_blocks=2, block_size=16, dtype=torch.bfloat16)
    assert cache.describe().block_bytes == 2 * 2**20
    assert torch.equal(cache.pool, torch.zeros_like(cache.pool))
