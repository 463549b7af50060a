"""Linear layers on a CPU whose weights were brought into the order of the fast kernels once, at load."""

from __future__ import annotations

import ctypes
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

from pdengine.triton_kernels.cpu_linear import MAX_ROWS
from pdengine.triton_kernels.cpu_native import native_kernels
from pdengine.triton_kernels.linear_code import PANEL_COLUMNS

# Up to so many rows our own kernel is the faster one. Measured in bfloat16 with two threads on Zen 4: by a
# sixth or more at 1 row, a third at 8, a fifth at 16, a twentieth at 32. float32 was not measured at this
# limit.
OWN_ROWS = 32
assert OWN_ROWS <= MAX_ROWS
HUGE_PAGE_BYTES = 2 * 2**20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the latter since Linux 6.1


class PackedLinear:
    """`x W^T + b` for `weight` `[outputs, inputs]` and `bias` `[outputs]` or None.

    Of the weights there is one copy, in oneDNN's order, from which two kernels read: oneDNN's, which is bound
    by arithmetic, and for few rows our own, which is bound by memory. Where torch has no oneDNN for this CPU
    or dtype (float16), `weight` itself is kept, and torch does what it does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._dtype = weight.dtype
        self._bias = bias
        assert bias is None or bias.shape == (self.out_features,), f"a bias of shape {tuple(bias.shape)}"
        self._is_packed = _can_pack(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight
        self.own_rows = 0  # up to so many rows are multiplied by our own kernel
        panels = None
        if self._is_packed:
            _use_huge_pages(self._weight)
            panels = _panels_of(self._weight, weight)
        native = native_kernels()
        kernel = native.linear_bfloat16 if weight.dtype == torch.bfloat16 else native.linear_float32
        num_panels = -(-self.out_features // PANEL_COLUMNS)
        if panels is None or kernel is None or num_panels < torch.get_num_threads():
            return
        self.own_rows = OWN_ROWS
        self._run, self.kernel = native.launcher.run, kernel.address
        self._panels, self._panel_bytes = panels, torch.ops.mkldnn._nbytes(self._weight) // num_panels
        self._row_bytes = self.in_features * weight.element_size()
        self._panel_bias: Tensor | None = None
        if bias is not None:
            self._panel_bias = F.pad(bias.to(torch.float32), (0, num_panels * PANEL_COLUMNS - len(bias)))
        self._bias_address = 0 if self._panel_bias is None else self._panel_bias.data_ptr()

    def __call__(self, inputs: Tensor) -> Tensor:
        """`[rows, inputs]` -> `[rows, outputs]`, both of the weights' dtype."""
        # The own kernel takes an address, and would read whatever is there.
        assert inputs.dtype == self._dtype, f"inputs are {inputs.dtype}, weights {self._dtype}"
        num_rows, in_features = inputs.shape
        assert in_features == self.in_features, f"{in_features} inputs instead of {self.in_features}"
        if num_rows > self.own_rows and self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]
        if not self._is_packed:
            return F.linear(inputs, self._weight, self._bias)
        outputs = torch.empty(num_rows, self.out_features, dtype=self._dtype)
        if num_rows:
            inputs = inputs.contiguous()
            self._run(self.kernel, True, *self.words(inputs.data_ptr(), num_rows, outputs.data_ptr()))
        return outputs

    def words(self, inputs: int, num_rows: int, outputs: int) -> tuple[int, ...]:
        """What the own kernel, at the address `kernel`, takes for up to `own_rows` rows: `inputs` and
        `outputs` are the addresses of what `__call__` takes and returns, both contiguous."""
        return (
            inputs,
            self._row_bytes,
            num_rows,
            self._row_bytes // 4,
            self._panels,
            self._panel_bytes,
            self._bias_address,
            outputs,
            self.out_features,
            0,
            0,
            0,
        )


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN for this dtype on this CPU; that of Arm has other rules, and was not tried."""
    if platform.machine() != "x86_64" or not torch._C._has_mkldnn:
        return False
    is_bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or is_bfloat16


def _use_huge_pages(packed: Tensor) -> None:
    """Reading weights in pages of 2 MiB was about 5 % faster. A kernel that has none to give says no."""
    start = -(-torch.ops.mkldnn.data_ptr(packed) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = torch.ops.mkldnn.data_ptr(packed) + torch.ops.mkldnn._nbytes(packed)
    num_bytes = (end - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if num_bytes > 0:
        madvise = ctypes.CDLL(None).madvise
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), advice)


def _panels_of(packed: Tensor, weight: Tensor) -> int | None:
    """The address of `packed`, if oneDNN has put `weight` into the panels that `cpu_linear` reads.

    Its order is its own affair and differs between CPUs; so the bits are compared.
    """
    outputs, inputs = weight.shape
    per_word = 4 // weight.element_size()
    if inputs % per_word != 0:
        return None
    num_panels = -(-outputs // PANEL_COLUMNS)
    num_bytes = torch.ops.mkldnn._nbytes(packed)
    num_words, rest = divmod(num_bytes, 4 * num_panels * PANEL_COLUMNS)
    if rest != 0 or num_words * per_word < inputs:
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    memory = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.int32)
    panels = memory.view(num_panels, num_words, PANEL_COLUMNS)
    words = weight.contiguous().view(torch.int32)  # [outputs, inputs / per_word]
    for index, panel in enumerate(panels):
        rows = words[index * PANEL_COLUMNS : (index + 1) * PANEL_COLUMNS]
        if not torch.equal(panel.T[: len(rows), : words.shape[1]], rows):
            return None
    return address
