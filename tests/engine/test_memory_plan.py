"""Sizes and shares of memory, what is available, and plans that do not fit."""

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from pdengine.engine.kv_cache import dtype_name
from pdengine.engine.memory import (
    MemoryPlan,
    available_memory,
    check_memory,
    format_bytes,
    memory_bytes,
    plan_memory,
    weight_bytes,
)
from pdengine.engine.worker_config import StartupError, WorkerConfig
from pdengine.models.config import load_config
from pdengine.models.weights import load_decoder

GIB = 2**30
MIB = 2**20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("1000B", 1000),
        ("64MiB", 64 * MIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("40%", 40 * MIB),
        ("12.5%", 100 * MIB // 8),
        ("100%", 100 * MIB),
    ],
)
def test_sizes_and_shares(text: str, expected: int) -> None:
    assert memory_bytes(text, available=100 * MIB) == expected


@pytest.mark.parametrize(
    "text", ["", "4GB", "4 potatoes", "-1", "0%", "101%", "1e3", "nan", "9" * 18 + "TiB", "%"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a|is more than"):
        memory_bytes(text, available=GIB)


@given(st.integers(1, 2**62))
def test_a_printed_size_is_a_size_again(num_bytes: int) -> None:
    text = format_bytes(num_bytes).replace("bytes", "B")
    assert memory_bytes(text, available=0) == pytest.approx(num_bytes, rel=0.051)


def machine(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files, 8 GiB of them available according to meminfo."""
    files = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n", **files}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def version_2(folder: str, limit: str, usage: int, inactive_file: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{folder}/memory.current": f"{usage}\n",
        f"sys/fs/cgroup{folder}/memory.stat": f"anon 1\ninactive_file {inactive_file}\n",
    }


def version_1(folder: str, limit: int, usage: int, inactive_file: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"sys/fs/cgroup/memory{folder}/memory.stat": f"cache 1\ntotal_inactive_file {inactive_file}\n",
    }


IN_A = {"proc/self/cgroup": "0::/a/b\n"}
IN_V1 = {"proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n"}, 8 * GIB),
        ({**IN_A, **version_2("/a/b", "max", GIB)}, 8 * GIB),
        ({**IN_A, **version_2("/a/b", str(3 * GIB), GIB)}, 2 * GIB),
        ({**IN_A, **version_2("/a/b", str(3 * GIB), GIB, inactive_file=MIB)}, 2 * GIB + MIB),
        ({**IN_A, **version_2("/a/b", "max", GIB), **version_2("/a", str(2 * GIB), GIB)}, GIB),
        ({**IN_A, **version_2("/a/b", str(40 * GIB), GIB)}, 8 * GIB),
        ({**IN_A, **version_2("", str(4 * GIB), GIB)}, 3 * GIB),  # in a container, the path is the host's
        ({**IN_A, **version_2("/a/b", str(GIB), 2 * GIB)}, 0),
        ({**IN_V1, **version_1("/docker/1", 3 * GIB, GIB, MIB)}, 2 * GIB + MIB),
        ({**IN_V1, **version_1("", 3 * GIB, GIB)}, 2 * GIB),
        ({**IN_V1, **version_1("/docker/1", 2**63 - 4096, GIB)}, 8 * GIB),
    ],
)
def test_a_cgroup_limits_what_is_available(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, files)) == expected


def test_this_machine_has_some_memory() -> None:
    assert 0 < available_memory() < 2**50


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_weights_are_those_that_loading_takes(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_checkpoint(family, tmp_path)
    config = load_config(tmp_path)
    decoder = load_decoder(tmp_path, config, dtype=dtype, device=torch.device("cpu"))
    loaded = sum(parameter.nbytes for parameter in decoder.parameters())
    # The vectors of norms stay in float32.
    assert weight_bytes(tmp_path, config, item_bytes=dtype.itemsize) == pytest.approx(loaded, rel=0.01)
    plan = plan_memory(WorkerConfig("decode", tmp_path, "tcp://127.0.0.1:1", dtype=dtype_name(dtype)), config)
    second_copy = decoder.embed_tokens.weight.nbytes if family == "qwen2-tied" else 0
    assert plan.weight_bytes == pytest.approx(loaded + second_copy, rel=0.01)


def plan(weights: int, pool: int) -> MemoryPlan:
    return MemoryPlan(weight_bytes=weights, block_bytes=2 * MIB, num_blocks=pool // (2 * MIB), block_size=16)


def test_a_plan_is_described_with_its_blocks_and_tokens() -> None:
    text = plan(int(1.2 * GIB), 4 * GIB).describe()
    assert text == "weights 1.2 GiB, KV cache 4.0 GiB = 2048 blocks of 2.0 MiB = 32768 tokens"


def test_what_fits_exactly_fits() -> None:
    check_memory([plan(GIB, 4 * GIB)], 5 * GIB)
    with pytest.raises(StartupError):
        check_memory([plan(GIB, 4 * GIB)], 5 * GIB - 1)


def test_a_plan_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(StartupError) as caught:
        check_memory([plan(GIB, 4 * GIB)], 4 * GIB)
    assert str(caught.value) == (
        "the worker needs 1.0 GiB for weights and 4.0 GiB for the KV cache, 5.0 GiB together, but 4.0 GiB of "
        "memory is available; --kv-memory can be at most 3072MiB"
    )
    with pytest.raises(
        StartupError, match=r"2 workers need 2.0 GiB .* 10.0 GiB together, .* at most 1024MiB$"
    ):
        check_memory([plan(GIB, 4 * GIB)] * 2, 4 * GIB)
    with pytest.raises(StartupError, match="no --kv-memory is small enough"):
        check_memory([plan(5 * GIB, 4 * GIB)], 4 * GIB)


@given(st.integers(0, 2**40), st.integers(2 * MIB, 2**40), st.integers(1, 8), st.integers(0, 2**44))
def test_what_the_refusal_offers_fits(weights: int, pool: int, count: int, available: int) -> None:
    try:
        check_memory([plan(weights, pool)] * count, available)
    except StartupError as error:
        offer = str(error).rpartition(" ")[2]
        if offer.endswith("MiB"):
            check_memory([plan(weights, memory_bytes(offer, 0))] * count, available)


def test_plans_use_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    write_checkpoint("llama-gqa", tmp_path)
    model = load_config(tmp_path)

    def plan_for(dtype: str) -> MemoryPlan:
        config = WorkerConfig("prefill", tmp_path, "tcp://127.0.0.1:9", dtype=dtype, kv_memory=MIB)
        return plan_memory(config, model)

    full, half = plan_for("float32"), plan_for("bfloat16")
    assert (full.weight_bytes, full.block_bytes) == (2 * half.weight_bytes, 2 * half.block_bytes)
    assert half.num_blocks == MIB // half.block_bytes
