"""All kernels compile for GPUs that are not here, without spills, and take what launches are planned with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdengine.triton_kernels.attention_tiles import DECODE_REGISTERS, decode_shared_memory, decode_tile
from pdengine.triton_kernels.device_limits import DeviceLimits

WHOLE_TABLE = Path(__file__).parents[2] / "bench" / "results" / "kernel_resources.json"
COMMAND = [sys.executable, "-m", "pdengine.triton_kernels.compile_report"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments, env=ENVIRONMENT):
    return subprocess.run([*COMMAND, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def first_cases(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "resources.json"
    finished = run("--first-cases", "--output", str(path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(path.read_text())["kernels"]


def test_every_kernel_compiles_for_every_architecture_without_spills(first_cases):
    compiled = {(row["kernel"], row["arch"]) for row in first_cases}
    kernels = {kernel for kernel, _ in compiled}
    assert {"attend_part_kernel", "reduce_parts_kernel", "attend_tile_kernel"} < kernels
    assert compiled == {(kernel, arch) for kernel in kernels for arch in ("sm_80", "sm_90", "sm_100")}
    assert all(row["spilled"] == 0 for row in first_cases)


def test_the_whole_table_knows_the_same_kernels_and_has_no_spills(first_cases):
    whole = json.loads(WHOLE_TABLE.read_text())["kernels"]
    assert {row["kernel"] for row in first_cases} <= {row["kernel"] for row in whole}
    for row in whole:
        limits = DeviceLimits(int(row["arch"].removeprefix("sm_")), num_multiprocessors=1)
        assert row["spilled"] == 0, row
        assert row["shared_memory"] <= limits.shared_memory_per_program, row


def test_decode_programs_take_what_their_number_is_computed_from():
    decode = [row for row in json.loads(WHOLE_TABLE.read_text())["kernels"] if "attend_part" in row["kernel"]]
    assert len(decode) > 3
    for row in decode:
        dtype_name, head_dim = re.match(r"(\w+) head_dim=(\d+)", row["specialisation"]).groups()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
        expected = decode_shared_memory(decode_tile(dtype, int(head_dim)), dtype, int(head_dim))
        assert row["shared_memory"] == pytest.approx(expected, rel=0.05), row
        assert row["registers"] <= DECODE_REGISTERS, row


def test_interpreted_kernels_are_not_compiled():
    finished = run(env={**ENVIRONMENT, "TRITON_INTERPRET": "1"})
    assert finished.returncode == 1
    assert "TRITON_INTERPRET is set" in finished.stderr
