"""Devices that cannot be used are refused with a sentence."""

from __future__ import annotations

import pytest
import torch

from pdengine.engine.devices import open_device
from pdengine.engine.worker_config import StartupError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch as it would look with an old and a new GPU; the result lists which were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("Old", "New")[index])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_the_cpu_needs_nothing() -> None:
    assert open_device("cpu") == torch.device("cpu")


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(StartupError, match=r"device cuda:0: torch \S+ is built without CUDA"):
        open_device("cuda:0")


def test_a_gpu_is_made_current(two_gpus: list[int]) -> None:
    assert open_device("cuda:1") == torch.device("cuda", 1)
    assert two_gpus == [1]


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_too_old(name: str, two_gpus: list[int]) -> None:
    with pytest.raises(StartupError, match=r"Old has compute capability 7\.5; the oldest .* 8\.0"):
        open_device(name)
    assert two_gpus == []


def test_a_gpu_that_is_not_there(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"device cuda:2: torch sees 2 GPUs"):
        open_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartupError, match=r"device cuda:0: torch sees no GPU"):
        open_device("cuda:0")
