"""`python -m pdengine.bench.gpu_ceilings`: what this GPU can do, measured by plain torch.

The other GPU benchmarks give their figures as shares of these, so it runs first and in the same session.
"""

import torch

from pdengine.bench.gpu_measure import Setup, bench_command, median_seconds, report


def run(setup: Setup) -> None:
    """Copy bandwidth of device memory and rate of a bfloat16 matrix product, on random data."""
    copy_bytes, size = (2**20, 64) if setup.is_dry else (2**32, 8192)
    source = torch.randint(-(2**31), 2**31, (copy_bytes // 4,), dtype=torch.int32, device=setup.device)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(setup, lambda _: target.copy_(source))

    left, right = (torch.randn(size, size, device=setup.device).to(setup.dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul_seconds = median_seconds(setup, lambda _: torch.mm(left, right, out=product))

    bandwidth = 2 * copy_bytes / copy_seconds
    rate = 2 * size**3 / matmul_seconds
    rows = [
        {
            "what": f"copy of {copy_bytes / 2**20:.0f} MiB, bytes read + written",
            "rate": f"{bandwidth / 1e9:.1f} GB/s",
        },
        {"what": f"{setup.dtype} matmul {size} x {size} x {size}", "rate": f"{rate / 1e12:.3f} TFLOP/s"},
    ]
    figures = {"copy_bytes_per_second": bandwidth, "matmul_flop_per_second": rate, "rows": rows}
    report(setup, "ceilings", "Ceilings", figures)


main = bench_command(run)

if __name__ == "__main__":
    main()
