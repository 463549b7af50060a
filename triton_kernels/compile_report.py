"""What our kernels take of a GPU: registers, spills and shared memory, of every tile size, without a GPU.

    python -m pdengine.triton_kernels.compile_report [--output FILE.json] [--first-cases]

compiles every kernel for compute capability 8.0, 9.0 and 10.0 with the ptxas that comes with Triton, and asks
the cuobjdump beside it. The exit status is 1 if a kernel spills registers to memory or needs more shared
memory than a program may have.
"""

import argparse
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdengine import triton_kernels
from pdengine.triton_kernels.ahead_of_time import CompileCase
from pdengine.triton_kernels.device_limits import DeviceLimits

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """Of one specialisation of a kernel; registers are per thread, memory is in bytes."""

    kernel: str
    specialisation: str
    arch: str
    registers: int
    spilled: int  # stack and local memory, per thread
    shared_memory: int  # per program
    num_warps: int
    num_stages: int

    @property
    def fits(self) -> bool:
        limits = DeviceLimits(int(self.arch.removeprefix("sm_")), num_multiprocessors=1)
        return self.spilled == 0 and self.shared_memory <= limits.shared_memory_per_program


def kernel_modules() -> list[str]:
    """The modules of this package that define `ahead_of_time`."""
    names = [
        f"{triton_kernels.__name__}.{info.name}" for info in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    return [name for name in names if hasattr(import_module(name), "ahead_of_time")]


def compile_cases(module: str, capability: int, first_cases: bool) -> Iterator[CompileCase]:
    """All cases of a module, or the first of each kernel."""
    seen = set()
    for case in import_module(module).ahead_of_time(capability):
        if case.kernel not in seen or not first_cases:
            seen.add(case.kernel)
            yield case


def compile_case(case: CompileCase, capability: int) -> Resources:
    """Raises ValueError for a case that does not name the arguments of its kernel."""
    names = case.kernel.arg_names
    if set(names) != set(case.arguments) | set(case.constants):
        raise ValueError(f"{case.kernel.__name__} takes {names}, its case names other arguments")
    signature = {name: case.arguments.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name in case.divisible_by_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        kernel=case.kernel.__name__,
        specialisation=case.label,
        arch=f"sm_{capability}",
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared_memory=compiled.metadata.shared,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Keys as cuobjdump prints them: REG, STACK, SHARED, LOCAL and more."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)\b", report.splitlines()[-1])}


def _compile_numbered(module: str, capability: int, first_cases: bool, number: int) -> Resources:
    """By number, because a process cannot send a kernel to another."""
    return compile_case(list(compile_cases(module, capability, first_cases))[number], capability)


def measure(first_cases: bool) -> Iterator[Resources]:
    """Compiles in as many processes as there are cores. Triton keeps the results for the next time."""
    jobs = [
        (module, capability, first_cases, number)
        for module in kernel_modules()
        for capability in CAPABILITIES
        for number, _ in enumerate(compile_cases(module, capability, first_cases))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as processes:
        yield from processes.map(_compile_numbered, *zip(*jobs, strict=True))


def table(rows: Sequence[Resources]) -> str:
    header = tuple(field.name for field in fields(Resources))
    lines = [header, *(tuple(str(value) for value in asdict(row).values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the table there")
    parser.add_argument("--first-cases", action="store_true", help="one specialisation of each kernel")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled; unset it")
    rows = []
    for row in measure(arguments.first_cases):
        rows.append(row)
        print(f"\r{len(rows)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(rows))
    if arguments.output is not None:
        report = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    misfits = [row for row in rows if not row.fits]
    if misfits:
        print(f"\n{len(misfits)} spill registers or need too much shared memory:\n{table(misfits)}")
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
