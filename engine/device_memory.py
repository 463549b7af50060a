"""Memory of a GPU that other processes can read: plain cudaMalloc, through the CUDA driver.

torch's own allocator is no source for a pool that peers map: segments that it expands cannot be shared by
CUDA IPC handles, and a transfer falls back to copies through the host. Nor does torch make a context current
on every new thread: `torch.cuda.set_device` returns at once where the number is that of the thread already,
as 0 is. So both are asked of the driver. Functions and types: CUDA Driver API, <cuda.h>.
"""

from __future__ import annotations

import weakref
from typing import Any

import cffi
import torch
from torch import Tensor

from pdengine.engine.worker_config import StartupError

_DECLARATIONS = """
typedef int CUresult;
typedef int CUdevice;
typedef void *CUcontext;
typedef unsigned long long CUdeviceptr;
CUresult cuInit(unsigned int flags);
CUresult cuGetErrorString(CUresult error, const char **text);
CUresult cuDeviceGet(CUdevice *device, int ordinal);
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device);
CUresult cuCtxSetCurrent(CUcontext context);
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t num_bytes);
CUresult cuMemFree_v2(CUdeviceptr address);
"""


class CudaError(StartupError):
    """A call of the CUDA driver that failed."""


class CudaContext:
    """The primary context of a GPU, the one that torch uses, and memory from it.

    Any thread may call any method. Raises CudaError if the driver cannot be loaded or refuses.
    """

    def __init__(self, device_index: int, *, library: str = "libcuda.so.1") -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(_DECLARATIONS)
        try:
            self._driver: Any = self._ffi.dlopen(library)
        except OSError as error:
            reason = str(error).partition("  Additionally")[0]  # which is about names without a path
            raise CudaError(f"the CUDA driver cannot be loaded: {reason}") from None
        self._check(self._driver.cuInit(0), "cuInit")
        device, context = self._ffi.new("CUdevice *"), self._ffi.new("CUcontext *")
        self._check(self._driver.cuDeviceGet(device, device_index), f"cuDeviceGet of device {device_index}")
        # Never released: it lives as long as the process, like the pool.
        self._check(self._driver.cuDevicePrimaryCtxRetain(context, device[0]), "cuDevicePrimaryCtxRetain")
        self._context = context[0]

    def make_current(self) -> None:
        """Let the calling thread use the GPU: what libraries find that look for a current context."""
        self._check(self._driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory, aligned to 256 bytes, its contents undefined."""
        self.make_current()
        address = self._ffi.new("CUdeviceptr *")
        self._check(self._driver.cuMemAlloc_v2(address, num_bytes), f"cuMemAlloc of {num_bytes} bytes")
        return int(address[0])

    def free(self, address: int) -> None:
        """Return what `allocate` gave. Waits until no kernel uses it."""
        self.make_current()
        self._check(self._driver.cuMemFree_v2(address), "cuMemFree")

    def _check(self, result: int, call: str) -> None:
        if result == 0:
            return
        text = self._ffi.new("char **")
        known = self._driver.cuGetErrorString(result, text) == 0
        reason = self._ffi.string(text[0]).decode() if known else "unknown error"
        raise CudaError(f"{call} failed: {reason} ({result})")


class DeviceMemory:
    """`num_bytes` of a GPU's memory, freed with its last reference: this object or a tensor made of it.

    At the end of the process the driver frees what is left, after all threads have stopped using it. Raises
    CudaError if there is not enough memory.
    """

    def __init__(self, context: CudaContext, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.address = context.allocate(num_bytes)
        weakref.finalize(self, context.free, self.address).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 2 of the protocol by which torch takes foreign memory (numba's documentation has it)."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),  # not read-only
            "version": 2,
        }

    def tensor(self, device: torch.device) -> Tensor:
        """The bytes as a tensor `[num_bytes]` uint8 that keeps this object alive; nothing is copied."""
        memory = torch.as_tensor(self, device=device)
        assert memory.data_ptr() == self.address, "torch has made a copy"
        return memory
