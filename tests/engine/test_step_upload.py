"""The arrays of a step: packed, copied once, and never overwritten under a copy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pdengine.engine.step_upload import (
    ALIGNMENT,
    NUM_BUFFERS,
    Array,
    PinnedUpload,
    pack,
    packed_size,
    unpack,
    upload_for,
)

CPU = torch.device("cpu")


@st.composite
def arrays_of_a_step(draw: st.DrawFn) -> list[Array]:
    arrays: list[Array] = []
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=2)))
        dtype = draw(st.sampled_from((np.int64, np.float32, np.int32)))
        arrays.append((np.arange(np.prod(shape)).reshape(shape) + 100 * number).astype(dtype))
    return arrays


@given(arrays_of_a_step())
def test_what_is_packed_comes_out_again(arrays: list[Array]) -> None:
    packed = torch.zeros(packed_size(arrays), dtype=torch.uint8)
    pack(arrays, packed.numpy())
    tensors = unpack(packed, arrays)
    assert len(tensors) == len(arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.shape == array.shape
        assert tensor.tolist() == array.tolist()
        assert tensor.numel() == 0 or (tensor.data_ptr() - packed.data_ptr()) % ALIGNMENT == 0


def test_on_a_cpu_the_tensors_are_the_arrays() -> None:
    array = np.arange(3)
    [tensor] = upload_for(CPU)([array])
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2]


class RecordingEvent:
    """Writes into a log what a CUDA event would be asked for."""

    def __init__(self, log: list[tuple[str, RecordingEvent]]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append(("record", self))

    def synchronize(self) -> None:
        self.log.append(("synchronize", self))


@pytest.fixture
def log() -> list[tuple[str, RecordingEvent]]:
    return []


def unpinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def upload_on_cpu(log: list[tuple[str, RecordingEvent]]) -> PinnedUpload:
    return PinnedUpload(CPU, allocate=unpinned, new_event=lambda: RecordingEvent(log))


def test_a_buffer_is_written_again_only_after_its_last_copy(log: list[tuple[str, RecordingEvent]]) -> None:
    upload = upload_on_cpu(log)
    steps = [upload([np.full(4, number)]) for number in range(2 * NUM_BUFFERS)]
    assert [call for call, _ in log] == ["synchronize", "record"] * (2 * NUM_BUFFERS)
    events = [event for call, event in log if call == "synchronize"]
    assert [event for call, event in log if call == "record"] == events
    assert events[:NUM_BUFFERS] == events[NUM_BUFFERS:]  # by turns
    assert len(set(map(id, events))) == NUM_BUFFERS
    assert [tensor.tolist() for [tensor] in steps] == [[number] * 4 for number in range(2 * NUM_BUFFERS)]


def test_buffers_grow_and_are_kept(log: list[tuple[str, RecordingEvent]]) -> None:
    allocated: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        allocated.append(num_bytes)
        return unpinned(num_bytes)

    upload = PinnedUpload(CPU, allocate=allocate, new_event=lambda: RecordingEvent(log))
    sizes = [10, 10, 5, 15, 15, 1000, 1000]
    for size in sizes:
        array: npt.NDArray[np.int64] = np.arange(size)
        [tensor] = upload([array])
        assert tensor.tolist() == array.tolist()
    assert len(allocated) == NUM_BUFFERS + 2 * NUM_BUFFERS  # empty at first, and each grew twice
