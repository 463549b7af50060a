"""What a device gives to a model at the moment, measured by plain torch: reading memory, and matrix products.

Machines that are shared change by the second. So each measurement is short, and is repeated between the steps
that it is compared with.
"""

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from pdengine.bench.cpu_ceilings import READ_BYTES, ROWS
from pdengine.bench.engine_costs import layer_projections
from pdengine.models.config import ModelConfig
from pdengine.triton_kernels.packed_linear import PackedLinear

GPU_COPY_BYTES = 2**30  # far above any cache, and so long that the launch does not count
GPU_PRODUCTS = 20  # in a row, so that the wait for them does not count


class Ceilings:
    """Both methods measure once."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        num_bytes = READ_BYTES if device.type == "cpu" else GPU_COPY_BYTES
        self._memory = torch.ones(num_bytes // 4, device=device)
        self._target = None if device.type == "cpu" else torch.empty_like(self._memory)
        projections = layer_projections(config)
        self._flop = 2 * ROWS * sum(projection.num_weights for projection in projections)
        self._products = [
            _products(
                torch.randn(ROWS, projection.inputs, device=device).to(dtype),
                torch.randn(projection.outputs, projection.inputs, device=device).to(dtype),
            )
            for projection in projections
        ]

    def read_rate(self) -> float:
        """Bytes per second; on a CPU of a search for the largest of 64 Mi numbers, on a GPU of a copy, where
        bytes are counted that are read and that are written."""
        num_bytes = self._memory.numel() * self._memory.element_size()
        if self._target is None:
            return num_bytes / self._seconds(self._memory.max)
        target = self._target
        return 2 * num_bytes / self._seconds(lambda: target.copy_(self._memory))

    @torch.inference_mode()
    def matmul_rate(self) -> float:
        """Operations per second in the projections of one layer for 512 tokens; on a CPU of the faster one of
        torch's linear layer and oneDNN's with packed weights, for each of them."""
        seconds = [min(map(self._seconds, products)) for products in self._products]
        return self._flop / sum(seconds)

    def _seconds(self, run: Callable[[], object]) -> float:
        times = 1 if self._device.type == "cpu" else GPU_PRODUCTS
        begin = perf_counter()
        for _ in range(times):
            run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (perf_counter() - begin) / times


def _products(inputs: Tensor, weight: Tensor) -> list[Callable[[], Tensor]]:
    """Ways to compute `inputs` `[rows, inputs]` times `weight` `[outputs, inputs]`, transposed."""
    products: list[Callable[[], Tensor]] = [lambda: F.linear(inputs, weight)]
    if inputs.device.type == "cpu":
        packed = PackedLinear(weight, None)
        products.append(lambda: packed(inputs))
    return products
