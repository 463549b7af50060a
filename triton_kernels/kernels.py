"""The operations of a step that differ by device, and the one place that picks an implementation.

The model and the runner call them through `Kernels` and do not know what they run on. Matrix products are not
here: torch's are the vendors' libraries on every device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdengine.triton_kernels.attention import AttentionBatch


@dataclass(frozen=True)
class SamplingBatch:
    """How each row of logits chooses its token, `[rows]` each, on the device of the logits.

    The next token is the largest of logits / temperature + Gumbel noise among the tokens that the filters
    leave, which draws from their softmax exactly. The filters apply in the order min_p, top_k, top_p (that of
    vLLM): a token stays if its probability is at least min_p times the largest one; if its logit is not below
    the k-th largest; if it belongs to the smallest set of the likeliest of those left whose probabilities
    reach top_p of their sum. Tokens as likely as the last one of a filter stay, too.
    """

    temperatures: Tensor  # float32; 0 is greedy: the largest logit, of equals the first, without filters
    min_p: Tensor  # float32 in [0, 1]; 0 is no filter
    top_k: Tensor  # int64; 0 is no filter
    top_p: Tensor  # float32 in [0, 1]; 1 is no filter; the likeliest token always stays
    seeds: Tensor  # int64: the 64 bits of the seed
    positions: Tensor  # int64: of the token to draw in its sequence; the noise is a function of both


class Kernels(Protocol):
    def add_rms_norm(
        self, residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Add `update` to `residual`, in place, and norm the sum (RMSNorm, arXiv 1910.07467).

        `residual` is `[tokens, hidden]` float32, `update` the same shape in any float dtype or None, `weight`
        `[hidden]` float32. Returns `residual` and the normed sum in `dtype`.
        """

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        eps: float,
        kv_pool: Tensor,
        layer: int,
        batch: AttentionBatch,
    ) -> Tensor:
        """Norm and rotate queries and keys, write keys and values into the cache, return the queries.

        `qkv` is `[tokens, heads + 2 * kv_heads, head_dim]`: queries, keys, values. `cos` and `sin` are
        `[tokens, 1, rotary_dim / 2]` float32, or None in a layer without rope: dimension i is paired with
        i + rotary_dim / 2, those from rotary_dim on stay (arXiv 2104.09864). `query_norm` and `key_norm` are
        weights `[head_dim]` float32 of an RMSNorm of each head, or None. Computes in float32; the result is
        `[tokens, heads, head_dim]` in the dtype of `qkv`, and so is what goes into `kv_pool`, at the blocks
        and offsets that `batch` names.
        """

    def paged_attention(
        self, query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """Causal grouped-query attention of the new tokens to their whole context, after it was stored.

        `query` is `[tokens, heads, head_dim]`, and so is the result; query head h reads KV head
        `h // (heads / kv_heads)` (arXiv 2305.13245). Chunks with a cached prefix and single decode tokens may
        be mixed. Scores and softmax are accumulated in float32. Cache slots past a sequence's context never
        count, whatever they hold.
        """

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) * up (SwiGLU, arXiv 2002.05202), in float32.

        `gate_up` is `[tokens, 2 * intermediate]`: gate, up. Returns `[tokens, intermediate]` in its dtype.
        """

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """The next token of each row: `logits` `[rows, vocabulary]` float32 -> `[rows]` int64, same device.

        A row's token depends on that row of `logits` and `batch` alone, and up to rounding not on the device.
        """


def kernels_for(device: torch.device) -> Kernels:
    """numba's for a CPU, Triton's for a GPU. Raises ValueError for any other device.

    The first call in a process compiles the kernels of a CPU, for some seconds, or loads them from a cache.
    """
    if device.type == "cpu":
        from pdengine.triton_kernels.cpu_kernels import CpuKernels

        return CpuKernels()
    if device.type == "cuda":
        # Here, because to import triton takes time, and a worker on a CPU has no use for it.
        from pdengine.triton_kernels.gpu_kernels import TritonKernels

        return TritonKernels()
    raise ValueError(f"device is {device}, it must be a CPU or a CUDA GPU")
