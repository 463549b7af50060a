"""GPU memory of our own: what is asked of the CUDA driver, on a stub of it, and what torch makes of it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pdengine.engine.device_memory import CudaContext, CudaError, DeviceMemory
from pdengine.engine.gpu_memory import TRIAL_BLOCKS, largest_step, measure_gpu_use
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.runner import Runner
from pdengine.engine.sequence import Mode, Sequence
from pdengine.engine.step import Chunk
from pdengine.engine.step_upload import upload_for
from pdengine.engine.worker_config import WorkerConfig
from pdengine.models.config import load_config
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.weights import load_decoder
from pdengine.transport.messages import SamplingParams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
MIB = 2**20

# A driver with one GPU of 1 MiB, whose context is 0x1000. It writes down its calls.
STUB = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static char calls[4096];
static void note(const char *call) {
    strncat(calls, call, sizeof calls - strlen(calls) - 2);
    strcat(calls, " ");
}
const char *stub_calls(void) { return calls; }
int cuInit(unsigned flags) { return flags != 0; }
int cuGetErrorString(int error, const char **text) { *text = "a stub's error"; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 70; return ordinal == 0 ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x1000; return device != 70; }
int cuCtxSetCurrent(void *context) { note("current"); return context != (void *)0x1000; }
int cuMemAlloc_v2(unsigned long long *address, size_t size) {
    if (size > 1 << 20) return 2;
    note("allocate");
    *address = (unsigned long long)malloc(size);
    return 0;
}
int cuMemFree_v2(unsigned long long address) { note("free"); free((void *)address); return 0; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build a stub of the CUDA driver with")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "stub.c").write_text(STUB)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "libstub.so", "stub.c"], cwd=folder, check=True)
    return folder / "libstub.so"


def calls(context: CudaContext) -> list[str]:
    """The calls so far."""
    context._ffi.cdef("const char *stub_calls(void);", override=True)
    return bytes(context._ffi.string(context._driver.stub_calls())).decode().split()


def test_memory_is_freed_with_its_last_reference(driver: Path) -> None:
    context = CudaContext(0, library=str(driver))
    before = len(calls(context))
    memory = DeviceMemory(context, 1000)
    interface = memory.__cuda_array_interface__
    assert interface["shape"] == (1000,)
    assert interface["typestr"] == "|u1"
    assert interface["data"] == (memory.address, False)
    assert calls(context)[before:] == ["current", "allocate"]
    del memory
    gc.collect()
    assert calls(context)[before:] == ["current", "allocate", "current", "free"]


@pytest.mark.parametrize(
    ("device_index", "num_bytes", "sentence"),
    [
        (1, 0, r"cuDeviceGet of device 1 failed: a stub's error \(101\)"),
        (0, 2 * MIB, r"cuMemAlloc of 2097152 bytes failed: a stub's error \(2\)"),
    ],
)
def test_what_the_driver_refuses(device_index: int, num_bytes: int, sentence: str, driver: Path) -> None:
    with pytest.raises(CudaError, match=sentence):
        DeviceMemory(CudaContext(device_index, library=str(driver)), num_bytes)


def test_a_machine_without_the_driver() -> None:
    with pytest.raises(CudaError, match=r"the CUDA driver cannot be loaded: .*libnone\.so"):
        CudaContext(0, library="libnone.so")


@pytest.mark.gpu
@needs_gpu
def test_a_pool_is_memory_of_the_driver_that_torch_can_use() -> None:
    config = load_config(checkpoint_directory())
    device = torch.device("cuda", 0)
    torch.cuda.synchronize(device)
    held_by_torch = torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    one = KVCache(config, num_blocks=1, block_size=16, dtype=torch.bfloat16, device=device)
    num_blocks = 2**30 // (one.pool.numel() * one.pool.element_size())
    cache = KVCache(config, num_blocks=num_blocks, block_size=16, dtype=torch.bfloat16, device=device)
    assert cache.pool.device == device
    assert cache.describe().base_address == cache.pool.data_ptr()
    assert torch.cuda.memory_allocated(device) == held_by_torch
    assert torch.cuda.mem_get_info(device)[0] <= free - 0.9 * 2**30
    cache.pool.fill_(3)
    assert float(cache.pool[-1].float().mean()) == 3
    del cache
    gc.collect()
    assert torch.cuda.mem_get_info(device)[0] > free - 0.5 * 2**30


@pytest.mark.gpu
@needs_gpu
def test_uploads_in_quick_succession_arrive_whole() -> None:
    upload = upload_for(torch.device("cuda", 0))
    sizes = [1, 100_000, 3, 50_000, 0, 200_000, 7]
    expected = [
        [np.full(size, number), np.full(3, number, np.float32)] for number, size in enumerate(sizes * 5)
    ]
    uploaded = [upload(list(arrays)) for arrays in expected]  # nothing waits in between
    for arrays, tensors in zip(expected, uploaded, strict=True):
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.device.type == "cuda"
            assert np.array_equal(tensor.cpu().numpy(), array)


@pytest.mark.gpu
@needs_gpu
def test_a_step_is_measured_and_runs_on_any_thread() -> None:
    config = load_config(checkpoint_directory())
    device = torch.device("cuda", 0)
    model = load_decoder(checkpoint_directory(), config, dtype=torch.bfloat16, device=device)
    cache = KVCache(config, num_blocks=TRIAL_BLOCKS, block_size=16, dtype=torch.bfloat16, device=device)
    cache.pool.zero_()
    runner = Runner(model, cache, device)
    worker = WorkerConfig("unified", checkpoint_directory(), "tcp://127.0.0.1:9", device="cuda:0")
    chunks = largest_step(worker, replace(config, max_position_embeddings=512))
    use = measure_gpu_use(device, lambda: runner.run(chunks))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logits = worker.max_requests * config.vocab_size * 4
    assert use.weights >= weights
    assert logits < use.step < use.total
    assert 0 < use.free <= use.total

    tokens: list[int] = []
    thread = threading.Thread(target=lambda: tokens.extend(runner.run(chunks)))
    thread.start()
    thread.join()
    assert len(tokens) == len(chunks)


@pytest.mark.gpu
@needs_gpu
def test_a_step_waits_for_the_gpu_once() -> None:
    """All else is asynchronous: torch raises at any call that would wait."""
    config = load_config(checkpoint_directory())
    device = torch.device("cuda", 0)
    model = load_decoder(checkpoint_directory(), config, dtype=torch.bfloat16, device=device)
    cache = KVCache(config, num_blocks=TRIAL_BLOCKS, block_size=16, dtype=torch.bfloat16, device=device)
    cache.pool.zero_()
    runner = Runner(model, cache, device)
    worker = WorkerConfig("unified", checkpoint_directory(), "tcp://127.0.0.1:9", device="cuda:0")
    chunks = largest_step(worker, config)
    runner.run(chunks)
    read: list[torch.Tensor] = []
    sample = model.kernels.sample

    def keep(logits: torch.Tensor, batch: object) -> torch.Tensor:
        read.append(sample(logits, batch))  # type: ignore[arg-type]
        torch.cuda.set_sync_debug_mode("default")  # what follows reads the tokens
        return read[-1]

    model.kernels.sample = keep  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = runner.run(chunks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert read[0].tolist() == tokens


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_samples_nothing_is_complete_when_it_returns() -> None:
    """Peers may read the blocks of a prompt's first chunk as soon as the step has returned."""
    config = load_config(checkpoint_directory())
    device = torch.device("cuda", 0)
    model = load_decoder(checkpoint_directory(), config, dtype=torch.bfloat16, device=device)
    cache = KVCache(config, num_blocks=64, block_size=16, dtype=torch.bfloat16, device=device)
    cache.pool.zero_()
    sampling = SamplingParams(max_tokens=1, seed=0)
    sequence = Sequence("request", 1, Mode.PREFILL, sampling, 1000, [5] * 1000)
    sequence.block_ids = list(range(63))
    Runner(model, cache, device).run([Chunk(sequence, 800)])
    with torch.cuda.stream(torch.cuda.Stream(device)):  # it does not wait for the stream of the step
        copied = cache.pool[:50].clone()
    torch.cuda.synchronize(device)
    assert torch.equal(copied, cache.pool[:50])
    assert copied[49].abs().sum() > 0
