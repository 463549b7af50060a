"""What `pdengine up` and a worker make of the options for GPUs."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from pdengine.cli.main import main
from pdengine.cli.serve import worker_config
from pdengine.cli.up import gpu_share
from pdengine.engine.worker_config import StartupError, WorkerConfig
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.transport.messages import Role

ON_GPU = ("--device", "cuda:1")


def config_of(*arguments: str) -> WorkerConfig:
    required = ["--model", str(checkpoint_directory()), "--router", "tcp://127.0.0.1:9"]
    with click.Context(main) as root:
        context = main.commands["decode"].make_context("decode", [*required, *arguments], root)
        with context:
            return worker_config("decode", **context.params)


def test_without_a_size_the_cache_takes_what_is_left() -> None:
    config = config_of(*ON_GPU)
    assert (config.device, config.kv_memory, config.gpu_memory_utilization) == ("cuda:1", None, 0.9)
    config = config_of(*ON_GPU, "--gpu-memory-utilization", "0.5", "--kv-memory", "2GiB")
    assert (config.kv_memory, config.gpu_memory_utilization) == (2 * 2**30, 0.5)


def test_a_share_of_the_hosts_memory_is_no_size_on_a_gpu() -> None:
    with pytest.raises(StartupError, match=r"--kv-memory 40% .* on device cuda:1 give a size"):
        config_of(*ON_GPU, "--kv-memory", "40%")


@pytest.mark.parametrize("share", ["0", "1.1", "-0.5", "nan"])
def test_a_share_of_a_gpu_is_above_0_and_at_most_1(share: str) -> None:
    with pytest.raises((click.BadParameter, StartupError)):
        config_of(*ON_GPU, "--gpu-memory-utilization", share)


@pytest.mark.parametrize(
    ("workers", "shares"),
    [
        ({"prefill": ("cuda:0", 1, 0.9), "decode": ("cuda", 1, 0.9)}, {"prefill": 0.45, "decode": 0.45}),
        ({"prefill": ("cuda:0", 1, 0.9), "decode": ("cuda:1", 2, 0.9)}, {"prefill": 0.9, "decode": 0.45}),
        ({"prefill": ("cuda:0", 1, 0.3), "decode": ("cuda:0", 1, 0.6)}, {"prefill": 0.3, "decode": 0.6}),
        ({"prefill": ("cuda:10", 1, 0.9), "decode": ("cuda:1", 1, 0.9)}, {"prefill": 0.9, "decode": 0.9}),
    ],
)
def test_workers_that_ask_for_more_than_their_gpu_share_it(
    workers: dict[Role, tuple[str, int, float]], shares: dict[Role, float]
) -> None:
    configs = [
        WorkerConfig(role, Path(), "tcp://127.0.0.1:9", device=device, gpu_memory_utilization=share)
        for role, (device, count, share) in workers.items()
        for _ in range(count)
    ]
    assert {config.role: gpu_share(config, configs) for config in configs} == pytest.approx(shares)
